//! Pushing blobs.

use axum::body::Body;
use axum::http::header::{CONTENT_RANGE, HeaderName, LOCATION, RANGE};
use axum::http::{Response, StatusCode};
use tdfs_common::digest::Digest;

use super::super::keys::Entry;
use super::super::request::{self, Name, UploadId};
use super::super::uploads::{Upload, UploadError, store};
use super::{Answer, CONTENT_DIGEST, Head, Refusal, Registry, empty, sessions};
use futures_util::stream::{StreamExt as _, TryStreamExt as _};

const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");

pub async fn begin(registry: &Registry, name: &Name, head: &Head, body: sessions::Body) -> Answer {
    let storage = registry.repositories().storage();
    if let Some(digest) = head.parameter("digest") {
        let digest = request::digest(&digest)?;
        store(storage, body.map_err(UploadError::from).boxed(), &digest).await?;
        return created(registry, name, &digest).await;
    }
    let mount = head.parameter("mount").and_then(|d| d.parse::<Digest>().ok());
    let from = head.parameter("from").and_then(|n| n.parse::<Name>().ok());
    if let (Some(digest), Some(from)) = (mount, from)
        && registry.repositories().rely(&from, &Entry::Blob(digest)).await?.is_some()
        && registry.repositories().link(name, &digest).await?
    {
        return Ok(empty(StatusCode::CREATED, blob(name, &digest)));
    }
    let upload = Upload::begin(storage, name).await?;
    Ok(accepted(name, &upload, StatusCode::ACCEPTED))
}

async fn find(registry: &Registry, name: &Name, id: &UploadId) -> Result<Upload, Refusal> {
    let found = Upload::find(registry.repositories().storage(), name, id).await?;
    found.ok_or_else(Refusal::upload_unknown)
}

pub async fn status(registry: &Registry, name: &Name, id: &UploadId) -> Answer {
    Ok(accepted(name, &find(registry, name, id).await?, StatusCode::NO_CONTENT))
}

pub async fn append(
    registry: &Registry,
    name: &Name,
    id: &UploadId,
    head: &Head,
    body: sessions::Body,
) -> Answer {
    let mut upload = find(registry, name, id).await?;
    let announced = place(name, &upload, head)?;
    upload.append(registry.repositories().storage(), body, announced).await?;
    Ok(accepted(name, &upload, StatusCode::ACCEPTED))
}

pub async fn finish(
    registry: &Registry,
    name: &Name,
    id: &UploadId,
    head: &Head,
    body: sessions::Body,
) -> Answer {
    let upload = find(registry, name, id).await?;
    let digest = head.parameter("digest");
    let digest = digest.ok_or_else(|| Refusal::digest_invalid("the digest of the blob is missing"))?;
    let digest = request::digest(&digest)?;
    place(name, &upload, head)?;
    let storage = registry.repositories().storage();
    upload.finish(storage, body, &digest).await?;
    let answer = created(registry, name, &digest).await?;
    upload.remove(storage).await?;
    Ok(answer)
}

pub async fn cancel(registry: &Registry, name: &Name, id: &UploadId) -> Answer {
    find(registry, name, id).await?.remove(registry.repositories().storage()).await?;
    Ok(empty(StatusCode::NO_CONTENT, []))
}

/// Bytes that the body must have, if the client said; an error where it does not begin at the end of what is there.
fn place(name: &Name, upload: &Upload, head: &Head) -> Result<Option<u64>, Refusal> {
    let length = head.length();
    let Some(header) = head.header(CONTENT_RANGE) else { return Ok(length) };
    let invalid = |message: String| Refusal::new(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", message);
    let range = request::content_range(header)
        .ok_or_else(|| invalid("the Content-Range is not of the form FIRST-LAST".into()))?;
    if range.start != upload.offset {
        let message = format!("the next byte of this upload is {}", upload.offset);
        let refusal = Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", message);
        return Err(state(name, upload).into_iter().fold(refusal, |r, (name, value)| r.with(name, &value)));
    }
    let announced = range.end - range.start;
    if length.is_some_and(|length| length != announced) {
        let message = "Content-Range and Content-Length differ";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", message));
    }
    Ok(Some(announced))
}

async fn created(registry: &Registry, name: &Name, digest: &Digest) -> Answer {
    if !registry.repositories().link(name, digest).await? {
        let message = "this blob was being deleted, push it again";
        return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "BLOB_UPLOAD_INVALID", message));
    }
    Ok(empty(StatusCode::CREATED, blob(name, digest)))
}

fn blob(name: &Name, digest: &Digest) -> [(HeaderName, String); 2] {
    [(LOCATION, format!("/v2/{name}/blobs/{digest}")), (CONTENT_DIGEST, digest.to_string())]
}

/// Where to go on, and from which byte.
fn state(name: &Name, upload: &Upload) -> [(HeaderName, String); 3] {
    let id = upload.id.as_str();
    [
        (LOCATION, format!("/v2/{name}/blobs/uploads/{id}")),
        (RANGE, format!("0-{}", upload.offset.saturating_sub(1))),
        (UPLOAD_ID, id.to_owned()),
    ]
}

fn accepted(name: &Name, upload: &Upload, status: StatusCode) -> Response<Body> {
    empty(status, state(name, upload))
}
