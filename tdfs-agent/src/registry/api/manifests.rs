//! Manifests, tags and referrers.

use std::ops::ControlFlow;

use axum::body::Body;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH, LINK, LOCATION};
use axum::http::{Response, StatusCode};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use serde_json::json;
use tdfs_common::digest::Digest;

use super::super::repositories::{Tag, order};
use super::super::request::{ManifestName, Name};
use super::{Answer, CONTENT_DIGEST, Head, Refusal, Registry, blobs, empty, json, sessions, set};
use crate::oci::{Document, INDEX_TYPE, MANIFEST_MAX, MANIFEST_TYPES};

const OCI_SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
const OCI_FILTERS: HeaderName = HeaderName::from_static("oci-filters-applied");
/// Bytes of descriptors in one answer; with what is around them it stays below what a client must accept.
const REFERRERS_MAX: usize = 3 << 20;
/// Referrers in one answer.
const REFERRERS_COUNT_MAX: usize = 1000;

pub async fn get(registry: &Registry, name: &Name, reference: &ManifestName, head: &Head) -> Answer {
    let is_head = head.is_head();
    let found = registry.manifest(name, reference, is_head).await?;
    let stored = found.ok_or_else(|| Refusal::manifest_unknown(reference))?;
    let etag = format!("\"{}\"", stored.digest);
    let about = [(CONTENT_DIGEST, stored.digest.to_string()), (ETAG, etag.clone())];
    if head.header(IF_NONE_MATCH).is_some_and(|tags| blobs::matches(tags, &etag)) {
        return Ok(empty(StatusCode::NOT_MODIFIED, about));
    }
    let length = stored.bytes.len();
    let mut response = Response::new(if is_head { Body::empty() } else { Body::from(stored.bytes) });
    set(&mut response, about);
    set(&mut response, [(CONTENT_TYPE, stored.media_type), (CONTENT_LENGTH, length.to_string())]);
    Ok(response)
}

pub async fn put(
    registry: &Registry,
    name: &Name,
    reference: ManifestName,
    head: &Head,
    body: sessions::Body,
) -> Answer {
    let bytes = read(head, body).await?;
    let (media_type, document) = parse(head, &bytes)?;
    let digest = Digest::of(&bytes);
    if let ManifestName::Digest(expected) = &reference
        && *expected != digest
    {
        return Err(Refusal::digest_invalid(format_args!("the manifest has digest {digest}")));
    }
    registry.push(name, &media_type, &document, bytes).await?;
    if let ManifestName::Tag(tag) = &reference {
        registry.repositories().set_tag(name, tag, &Tag { digest, upstream: false }).await?;
    }
    let mut response = empty(
        StatusCode::CREATED,
        [(LOCATION, format!("/v2/{name}/manifests/{digest}")), (CONTENT_DIGEST, digest.to_string())],
    );
    if let Some(subject) = document.subject() {
        set(&mut response, [(OCI_SUBJECT, subject.digest.to_string())]);
    }
    Ok(response)
}

/// The manifest and what it is.
fn parse(head: &Head, bytes: &[u8]) -> Result<(String, Document), Refusal> {
    let invalid = |reason: String| Refusal::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", reason);
    let hint = head.header(CONTENT_TYPE).map(|t| t.split(';').next().unwrap_or(t).trim());
    // Without a type, or with one that says nothing, the manifest's own decides.
    let hint = hint.filter(|t| !matches!(*t, "application/json" | "application/octet-stream"));
    if let Some(hint) = hint.filter(|t| !MANIFEST_TYPES.contains(t)) {
        return Err(invalid(format!("{hint:?} is not the media type of a manifest or index")));
    }
    Document::parse("manifest", hint, bytes).map_err(|e| invalid(e.to_string()))
}

/// The body, if it is not too large. Of one that is, some more is read, so that the client hears about it.
async fn read(head: &Head, mut body: sessions::Body) -> Result<Bytes, Refusal> {
    let too_large = || {
        let message = format!("a manifest has {MANIFEST_MAX} bytes at most");
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message)
    };
    if head.length().is_some_and(|length| length > 2 * MANIFEST_MAX) {
        return Err(too_large());
    }
    let (mut bytes, mut total) = (BytesMut::new(), 0);
    while let Some(piece) = body.next().await {
        let piece = piece?;
        total += piece.len() as u64;
        if total <= MANIFEST_MAX {
            bytes.extend_from_slice(&piece);
        } else if total > 2 * MANIFEST_MAX {
            break;
        }
    }
    if total > MANIFEST_MAX { Err(too_large()) } else { Ok(bytes.freeze()) }
}

pub async fn delete(registry: &Registry, name: &Name, reference: &ManifestName) -> Answer {
    let was_there = match reference {
        ManifestName::Tag(tag) => registry.repositories().delete_tag(name, tag).await?,
        ManifestName::Digest(digest) => registry.repositories().delete_manifest(name, digest).await?,
    };
    if !was_there {
        return Err(Refusal::manifest_unknown(reference));
    }
    Ok(empty(StatusCode::ACCEPTED, []))
}

pub async fn tags(registry: &Registry, name: &Name, head: &Head) -> Answer {
    let mut tags = registry.repositories().tags(name).await?;
    if tags.is_empty() && !registry.repositories().exists(name).await? {
        let message = format!("{name} is not known here");
        return Err(Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", message));
    }
    if let Some(last) = head.parameter("last") {
        let last = order(&last);
        tags.retain(|tag| order(tag) > last);
    }
    let most = match head.parameter("n").map(|n| n.parse::<usize>()) {
        None => tags.len(),
        Some(Ok(n)) => n,
        Some(Err(_)) => {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", "n is not a number"));
        }
    };
    let has_more = tags.len() > most;
    tags.truncate(most);
    let mut response = json(&json!({ "name": name.as_str(), "tags": tags }));
    if let (true, Some(last)) = (has_more, tags.last()) {
        set(&mut response, [(LINK, format!("</v2/{name}/tags/list?n={most}&last={last}>; rel=\"next\""))]);
    }
    Ok(response)
}

pub async fn referrers(registry: &Registry, name: &Name, subject: &Digest, head: &Head) -> Answer {
    let mut found = registry.referrers(name, subject).await?;
    let wanted = head.parameter("artifactType");
    if let Some(wanted) = &wanted {
        found.retain(|d| d.artifact_type.as_ref() == Some(wanted));
    }
    if let Some(last) = head.parameter("last") {
        let seen = found.iter().position(|d| d.digest.to_string() == last);
        found.drain(..seen.map_or(0, |at| at + 1));
    }
    let mut left = REFERRERS_MAX;
    let fits = found.iter().take(REFERRERS_COUNT_MAX).try_fold(0, |count, descriptor| {
        // The first one always fits: a manifest is no larger than an answer may be.
        let size = serde_json::to_string(descriptor).map_or(0, |text| text.len());
        if count > 0 && size > left {
            return ControlFlow::Break(count);
        }
        left = left.saturating_sub(size);
        ControlFlow::Continue(count + 1)
    });
    let (ControlFlow::Continue(fits) | ControlFlow::Break(fits)) = fits;
    let has_more = fits < found.len();
    found.truncate(fits);
    let mut response = json(&json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": found }));
    set(&mut response, [(CONTENT_TYPE, INDEX_TYPE.to_owned())]);
    if wanted.is_some() {
        set(&mut response, [(OCI_FILTERS, "artifactType".to_owned())]);
    }
    if let (true, Some(last)) = (has_more, found.last()) {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("last", &last.digest.to_string());
        query.extend_pairs(wanted.iter().map(|wanted| ("artifactType", wanted)));
        let target = format!("/v2/{name}/referrers/{subject}?{}", query.finish());
        set(&mut response, [(LINK, format!("<{target}>; rel=\"next\""))]);
    }
    Ok(response)
}
