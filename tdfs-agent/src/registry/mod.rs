//! The registry side: an OCI distribution server (specification 1.1) with a page service beside it.
//!
//! ```text
//! client -> serve, patience (limits, TLS) -> observe -> access, token -> api -> Registry
//! Registry -> Repositories -> Storage: directory or S3 bucket
//!         `-> PullThrough -> another registry
//! ```
//!
//! Nothing lies in the process: every answer is made from the storage, upload sessions too, so any number of servers
//! over one storage behave as one, and a server may be killed at any moment. `repositories` draws what lies where
//! and says why nothing that is visible is ever incomplete; `uploads`, `pull_through` and [`gc`] say the rest.

mod access;
mod api;
mod content;
pub mod gc;
mod keys;
mod metrics;
mod observe;
pub mod page_service;
mod patience;
mod pull_through;
mod repositories;
pub mod request;
mod serve;
mod storage;
mod token;
mod uploads;
mod upstream;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use tdfs_common::digest::Digest;

use crate::oci::{ClientOptions, Descriptor, Document, OciError};
pub use content::{Content, ContentError, Stored};
use keys::Entry;
use metrics::Metrics;
use pull_through::PullThrough;
use repositories::{PushError, Repositories, Tag};
use request::{ManifestName, Name};
pub use serve::{Options, ServeError, Server};
use storage::Storage;
pub use storage::StorageError;
pub use upstream::Upstream;

/// All that the server reads and writes.
#[derive(Debug)]
pub struct Registry {
    repositories: Repositories,
    pull_through: Option<Arc<PullThrough>>,
    metrics: Arc<Metrics>,
    read_only: bool,
}

/// A blob that can be read.
struct Blob {
    digest: Digest,
    size: u64,
    /// It is not in the storage: the repository of the other registry that has it.
    upstream: Option<(Arc<PullThrough>, Name)>,
}

impl Registry {
    /// The registry in `root`: a directory, which is created, or `s3://bucket[/prefix]`.
    pub fn open(root: &str, read_only: bool) -> Result<Self, StorageError> {
        let (repositories, metrics) = (Repositories::new(Storage::open(root)?), Arc::default());
        Ok(Self { repositories, pull_through: None, metrics, read_only })
    }

    /// What is not there comes from the registry at `upstream`, `http[s]://host[:port]`, and stays.
    pub fn pulling_through(mut self, upstream: &str, options: ClientOptions) -> Result<Self, OciError> {
        self.pull_through = Some(Arc::new(PullThrough::new(upstream, options, self.metrics.clone())?));
        Ok(self)
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Deletes what nothing reaches.
    pub async fn collect(&self, collection: gc::Collection) -> Result<gc::Collected, gc::CollectError> {
        gc::collect(&self.repositories, collection).await
    }

    fn repositories(&self) -> &Repositories {
        &self.repositories
    }

    /// The bytes that a repository has of a blob or manifest. With `rely`, they stay for a while.
    async fn size(&self, name: &Name, entry: &Entry, rely: bool) -> Result<Option<u64>, StorageError> {
        if rely && !self.read_only {
            return self.repositories.rely(name, entry).await;
        }
        self.repositories.size(name, entry).await
    }

    /// A blob. With `rely`, a push may count on it from now on.
    async fn open_blob(
        &self,
        name: &Name,
        digest: &Digest,
        rely: bool,
    ) -> Result<Option<Blob>, ContentError> {
        if let Some(size) = self.size(name, &Entry::Blob(*digest), rely).await? {
            return Ok(Some(Blob { digest: *digest, size, upstream: None }));
        }
        let Some(pull_through) = &self.pull_through else { return Ok(None) };
        let size = pull_through.blob_size(name, digest).await.map_err(upstream_failed)?;
        let Some(size) = size else { return Ok(None) };
        // Another repository may have brought it; that this one has it was for the other registry to say.
        let stored = self.repositories.storage().head(&keys::content(digest)).await?;
        if stored.is_some() && self.repositories.link(name, digest).await? {
            return Ok(Some(Blob { digest: *digest, size, upstream: None }));
        }
        Ok(Some(Blob { digest: *digest, size, upstream: Some((pull_through.clone(), name.clone())) }))
    }

    /// Bytes of a blob.
    async fn read(
        &self,
        blob: Blob,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, ContentError>>, ContentError> {
        if let Some((pull_through, name)) = &blob.upstream {
            let fetch = pull_through.fetch(&self.repositories, name, &blob.digest, blob.size);
            return Ok(fetch.map_err(upstream_failed)?.read(range));
        }
        let stream = self.repositories.read(&blob.digest, range).await?;
        let stream = stream.ok_or_else(|| ContentError::NotFound(blob.digest.to_string()))?;
        Ok(stream.map_err(ContentError::from).boxed())
    }

    /// A manifest. With `rely`, a push may count on it from now on.
    async fn manifest(
        &self,
        name: &Name,
        reference: &ManifestName,
        rely: bool,
    ) -> Result<Option<Stored>, ContentError> {
        let digest = match reference {
            ManifestName::Digest(digest) => Some(*digest),
            ManifestName::Tag(tag) => self.tagged(name, tag).await?,
        };
        let Some(digest) = digest else { return Ok(None) };
        if !rely || self.size(name, &Entry::Manifest(digest), rely).await?.is_some() {
            let stored = self.repositories.manifest(name, &digest).await?;
            if stored.is_some() {
                return Ok(stored);
            }
        }
        let Some(pull_through) = &self.pull_through else { return Ok(None) };
        let pulled = pull_through.manifest(name, &digest).await.map_err(upstream_failed)?;
        let Some((descriptor, bytes)) = pulled else { return Ok(None) };
        let media_type = descriptor.media_type;
        let (_, document) =
            Document::parse(&digest.to_string(), Some(&media_type), &bytes).map_err(upstream_failed)?;
        self.repositories.put(name, &media_type, &document, bytes.clone()).await?;
        Ok(Some(Stored { media_type, digest, bytes }))
    }

    /// What a tag stands for: what it stands for in the other registry, if that has it and can be asked.
    async fn tagged(&self, name: &Name, tag: &str) -> Result<Option<Digest>, ContentError> {
        let stored = self.repositories.tag(name, tag).await?;
        let Some(pull_through) = &self.pull_through else { return Ok(stored.map(|t| t.digest)) };
        match pull_through.tag(name, tag).await {
            Ok(Some(digest)) => {
                let now = Tag { digest, upstream: true };
                if stored.as_ref() != Some(&now) {
                    self.repositories.set_tag(name, tag, &now).await?;
                }
                Ok(Some(digest))
            }
            Ok(None) => {
                // What was pushed here stays; what was pulled through is gone with its origin.
                if stored.as_ref().is_some_and(|t| t.upstream) {
                    self.repositories.delete_tag(name, tag).await?;
                }
                Ok(stored.filter(|t| !t.upstream).map(|t| t.digest))
            }
            Err(e) => {
                tracing::warn!("{name}:{tag}: {e}");
                stored.map(|t| Some(t.digest)).ok_or_else(|| upstream_failed(e))
            }
        }
    }

    /// What refers to a manifest, here and in the other registry as far as it can be asked.
    async fn referrers(&self, name: &Name, subject: &Digest) -> Result<Vec<Descriptor>, ContentError> {
        let mut found = self.repositories.referrers(name, subject).await?;
        if let Some(pull_through) = &self.pull_through {
            match pull_through.referrers(name, subject).await {
                Ok(more) => {
                    let known: Vec<Digest> = found.iter().map(|d| d.digest).collect();
                    found.extend(more.into_iter().filter(|d| !known.contains(&d.digest)));
                }
                Err(e) => tracing::warn!("referrers of {subject} in {name}: {e}"),
            }
        }
        Ok(found)
    }

    /// Stores a manifest whose content is here or, if there is another registry, there.
    async fn push(
        &self,
        name: &Name,
        media_type: &str,
        document: &Document,
        bytes: Bytes,
    ) -> Result<Digest, PushError> {
        let mut pulled = None;
        loop {
            match self.repositories.push(name, media_type, document, bytes.clone()).await {
                // Each round brings one thing, so the same one is not missing twice.
                Err(PushError::Missing(digest))
                    if pulled != Some(digest) && self.pull(name, &digest).await =>
                {
                    pulled = Some(digest);
                }
                result => return result,
            }
        }
    }

    /// Brings a manifest or blob from the other registry, if it can be had.
    async fn pull(&self, name: &Name, digest: &Digest) -> bool {
        if self.pull_through.is_none() {
            return false;
        }
        if let Ok(Some(_)) = self.manifest(name, &ManifestName::Digest(*digest), false).await {
            return true;
        }
        let Ok(Some(blob)) = self.open_blob(name, digest, false).await else { return false };
        let Some((pull_through, name)) = blob.upstream else { return true };
        match pull_through.fetch(&self.repositories, &name, digest, blob.size) {
            Ok(fetch) => fetch.done().await.is_ok(),
            Err(_) => false,
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn upstream_failed(error: OciError) -> ContentError {
    ContentError::Unavailable { what: "upstream registry".to_owned(), reason: error.to_string() }
}

impl From<StorageError> for ContentError {
    fn from(error: StorageError) -> Self {
        Self::Unavailable { what: "registry".to_owned(), reason: error.to_string() }
    }
}

fn repository(text: &str) -> Result<Name, ContentError> {
    text.parse().map_err(|_| ContentError::NotFound(format!("repository {text:?}")))
}

impl Content for Registry {
    fn manifest<'a>(
        &'a self,
        repository: &'a str,
        reference: &'a str,
    ) -> BoxFuture<'a, Result<Stored, ContentError>> {
        Box::pin(async move {
            let unknown = || ContentError::NotFound(format!("{repository}:{reference}"));
            let name = self::repository(repository)?;
            let reference = reference.parse().map_err(|_| unknown())?;
            self.manifest(&name, &reference, false).await?.ok_or_else(unknown)
        })
    }

    fn referrers<'a>(
        &'a self,
        repository: &'a str,
        subject: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<Descriptor>, ContentError>> {
        Box::pin(async move { self.referrers(&self::repository(repository)?, subject).await })
    }

    fn blob<'a>(
        &'a self,
        repository: &'a str,
        digest: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Bytes, ContentError>>, ContentError>> {
        Box::pin(async move {
            let blob = self.open_blob(&self::repository(repository)?, digest, false).await?;
            let blob = blob.ok_or_else(|| ContentError::NotFound(digest.to_string()))?;
            if range.start > range.end || range.end > blob.size {
                let reason = format!("it has {} bytes, not {range:?}", blob.size);
                return Err(ContentError::Unavailable { what: digest.to_string(), reason });
            }
            self.read(blob, range).await
        })
    }
}
