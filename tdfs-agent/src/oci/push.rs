//! A repository of a registry, writing side. Everything goes to the registry itself, never to a mirror.
//!
//! ```text
//! HEAD  blobs/<digest>                           there already: done
//! POST  blobs/uploads/                           -> Location
//! PUT   <Location>?digest=...  with the blob     or PATCH piece by piece, then PUT without a body
//! PUT   manifests/<tag or digest>
//! ```
//!
//! A broken upload starts again with the HEAD: the last PUT may have arrived. A manifest with a `subject` that the
//! registry does not index (no `OCI-Subject` in its answer) is entered into the list at tag `sha256-<hex>`. Nothing
//! locks that list against other programs, so it is read back until the entry is in it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tdfs_common::digest::Digest;
use url::Url;

use super::layout::referrers_tag;
use super::manifest::{Descriptor, Document, INDEX_TYPE};
use super::registry::{Registry, pause};
use super::transport::{Answer, Kind, Outgoing, is_as_secure};
use super::{BlobSource, OciError, blocking};

/// Bytes of a blob sent at once; larger blobs go in pieces of this.
const PIECE: u64 = 16 << 20;
/// Attempts to get an entry into a list of referrers that others write as well.
const LIST_ATTEMPTS: usize = 5;
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");

impl Registry {
    /// Uploads a blob unless it is there.
    pub async fn push_blob(&self, source: &BlobSource, digest: &Digest) -> Result<(), OciError> {
        let mut failures = 0;
        loop {
            if self.has_blob(digest, self.attempts()).await? {
                return Ok(());
            }
            match self.upload(source, digest).await {
                Ok(()) => return Ok(()),
                Err(e) => pause(self, &mut failures, e).await?,
            }
        }
    }

    async fn upload(&self, source: &BlobSource, digest: &Digest) -> Result<(), OciError> {
        let size = source.size()?;
        let start = self.origin().url("blobs/uploads/")?;
        let answer =
            self.write(Method::POST, start.clone(), &[], Bytes::new(), &[StatusCode::ACCEPTED]).await?;
        let mut target = location(&answer, &start)?;
        let mut sent = 0;
        while size > PIECE && sent < size {
            let piece = read_piece(source, sent, PIECE.min(size - sent)).await?;
            let next = sent + piece.len() as u64;
            // The distribution specification writes this header without the unit.
            let headers = [(CONTENT_RANGE, format!("{sent}-{}", next - 1)), octets()];
            let answer = self
                .write(
                    Method::PATCH,
                    target.clone(),
                    &headers,
                    piece,
                    &[StatusCode::ACCEPTED, StatusCode::NO_CONTENT],
                )
                .await?;
            target = location(&answer, &target)?;
            sent = next;
        }
        let rest = if sent == size { Bytes::new() } else { read_piece(source, 0, size).await? };
        target.query_pairs_mut().append_pair("digest", &digest.to_string());
        self.write(Method::PUT, target, &[octets()], rest, &[StatusCode::CREATED, StatusCode::NO_CONTENT])
            .await?;
        Ok(())
    }

    /// Uploads a manifest or index, and keeps the list of referrers if the registry does not.
    pub async fn push_manifest(
        &self,
        media_type: &str,
        document: &Document,
        bytes: &Bytes,
        tag: Option<&str>,
    ) -> Result<Descriptor, OciError> {
        let descriptor = document.describe(media_type, bytes);
        let digest = descriptor.digest.to_string();
        let answer = self.put_manifest(media_type, bytes, tag.unwrap_or(&digest)).await?;
        if let Some(subject) = document.subject()
            && answer.header(SUBJECT).is_none()
        {
            self.list_referrer(&subject.digest, &descriptor).await?;
        }
        Ok(descriptor)
    }

    async fn put_manifest(&self, media_type: &str, bytes: &Bytes, name: &str) -> Result<Answer, OciError> {
        let url = self.origin().url(&format!("manifests/{name}"))?;
        let headers = [(CONTENT_TYPE, media_type.to_owned())];
        let mut failures = 0;
        loop {
            match self.write(Method::PUT, url.clone(), &headers, bytes.clone(), &[StatusCode::CREATED]).await
            {
                Ok(answer) => return Ok(answer),
                Err(e) => pause(self, &mut failures, e).await?,
            }
        }
    }

    /// Enters `referrer` into the list at the referrers tag of `subject`, leaving the other entries as they are.
    async fn list_referrer(&self, subject: &Digest, referrer: &Descriptor) -> Result<(), OciError> {
        let _listing = self.listing.lock().await;
        let tag = referrers_tag(subject);
        for _ in 0..LIST_ATTEMPTS {
            let mut list = match self.tagged(&tag, self.attempts()).await {
                Ok(served) => {
                    serde_json::from_slice(&served.bytes).map_err(|e| OciError::malformed(&*tag, e))?
                }
                Err(e) if e.is_not_found() => {
                    json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [] })
                }
                Err(e) => return Err(e),
            };
            let entries = list.get_mut("manifests").and_then(Value::as_array_mut);
            let entries = entries.ok_or_else(|| OciError::malformed(&*tag, "not a list of referrers"))?;
            if entries.iter().any(|e| e["digest"] == referrer.digest.to_string()) {
                return Ok(());
            }
            entries.push(json!(referrer));
            let bytes = Bytes::from(list.to_string());
            Document::parse(&tag, Some(INDEX_TYPE), &bytes)?;
            self.put_manifest(INDEX_TYPE, &bytes, &tag).await?;
        }
        Err(OciError::malformed(tag, "others keep overwriting the list of referrers"))
    }

    async fn write(
        &self,
        method: Method,
        url: Url,
        headers: &[(HeaderName, String)],
        body: Bytes,
        expected: &[StatusCode],
    ) -> Result<Answer, OciError> {
        let what = format!("{method}");
        let mut request = Outgoing::new(method, url, Kind::Metadata);
        request.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        for (name, value) in headers {
            let value = HeaderValue::from_str(value).map_err(|e| OciError::malformed(name.as_str(), e))?;
            request.headers.insert(name, value);
        }
        request.body = Some(body);
        let answer = self.origin().request(request).await?;
        self.origin().expect(answer, expected, &what).await
    }
}

fn octets() -> (HeaderName, String) {
    (CONTENT_TYPE, "application/octet-stream".to_owned())
}

fn location(answer: &Answer, asked: &Url) -> Result<Url, OciError> {
    let bad = || OciError::malformed(&*answer.url, "an upload without a place to go");
    let target = asked.join(answer.header(LOCATION).ok_or_else(bad)?).map_err(|_| bad())?;
    if !is_as_secure(asked, &target) {
        return Err(OciError::malformed(&*answer.url, "an upload that leads to something less secure"));
    }
    Ok(target)
}

async fn read_piece(source: &BlobSource, offset: u64, len: u64) -> Result<Bytes, OciError> {
    match source {
        BlobSource::Bytes(bytes) => Ok(bytes.slice(offset as usize..(offset + len) as usize)),
        BlobSource::File(path) => {
            let path = path.clone();
            blocking(move || {
                let mut piece = vec![0; len as usize];
                let file = File::open(&path).map_err(OciError::io(&path))?;
                file.read_exact_at(&mut piece, offset).map_err(OciError::io(&path))?;
                Ok(piece.into())
            })
            .await
        }
    }
}
