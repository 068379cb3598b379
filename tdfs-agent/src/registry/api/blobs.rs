//! Reading and deleting blobs.

use axum::body::Body;
use axum::http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE,
    RANGE,
};
use axum::http::{Response, StatusCode};
use tdfs_common::digest::Digest;

use super::super::request::{Name, Wanted};
use super::{Answer, CONTENT_DIGEST, Head, Refusal, Registry, empty, set};

pub async fn get(registry: &Registry, name: &Name, digest: &Digest, head: &Head) -> Answer {
    let is_head = head.is_head();
    let blob =
        registry.open_blob(name, digest, is_head).await?.ok_or_else(|| Refusal::blob_unknown(digest))?;
    let etag = format!("\"{digest}\"");
    let immutable = [
        (CONTENT_DIGEST, digest.to_string()),
        (ETAG, etag.clone()),
        (ACCEPT_RANGES, "bytes".to_owned()),
        (CACHE_CONTROL, "max-age=31536000, immutable".to_owned()),
    ];
    if head.header(IF_NONE_MATCH).is_some_and(|tags| matches(tags, &etag)) {
        return Ok(empty(StatusCode::NOT_MODIFIED, immutable));
    }
    let range = head.header(RANGE).filter(|_| head.header(IF_RANGE).is_none_or(|tag| tag == etag));
    let (status, range) = match Wanted::parse(range, blob.size) {
        Wanted::Whole => (StatusCode::OK, 0..blob.size),
        Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        Wanted::Unsatisfiable => {
            let message = format!("the blob has {} bytes", blob.size);
            let refusal = Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", message);
            return Err(refusal.with(CONTENT_RANGE, &format!("bytes */{}", blob.size)));
        }
    };
    let length = range.end - range.start;
    let content_range = format!("bytes {}-{}/{}", range.start, range.end.saturating_sub(1), blob.size);
    let size = blob.size;
    let body = if is_head { Body::empty() } else { Body::from_stream(registry.read(blob, range).await?) };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    set(&mut response, immutable);
    set(
        &mut response,
        [
            (CONTENT_TYPE, "application/octet-stream".to_owned()),
            (CONTENT_LENGTH, if is_head && status == StatusCode::OK { size } else { length }.to_string()),
        ],
    );
    if status == StatusCode::PARTIAL_CONTENT {
        set(&mut response, [(CONTENT_RANGE, content_range)]);
    }
    Ok(response)
}

/// Whether one of the entity tags of a header is `etag` (RFC 9110, section 13.1.2).
pub fn matches(tags: &str, etag: &str) -> bool {
    tags.split(',').map(|tag| tag.trim().trim_start_matches("W/")).any(|tag| tag == etag || tag == "*")
}

pub async fn delete(registry: &Registry, name: &Name, digest: &Digest) -> Answer {
    if !registry.repositories().delete_blob(name, digest).await? {
        return Err(Refusal::blob_unknown(digest));
    }
    Ok(empty(StatusCode::ACCEPTED, []))
}
