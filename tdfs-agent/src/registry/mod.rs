//! The registry side: an OCI distribution server (specification 1.1) with a page service beside it.
//!
//! ```text
//! client -> server (limits, TLS) -> api -> Registry -> Repositories -> Storage: a directory or an S3 bucket
//! ```
//!
//! Nothing lies in the process: every answer is made from the storage, upload sessions too, so any number of servers
//! over one storage behave as one, and a server may be killed at any moment. [`repositories`] draws what lies where
//! and says why nothing that is visible is ever incomplete; [`uploads`] and [`gc`] say the rest.

mod api;
mod content;
pub mod gc;
mod keys;
pub mod page_service;
mod repositories;
pub mod request;
mod serve;
mod storage;
mod uploads;
mod upstream;

use std::ops::Range;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use tdfs_common::digest::Digest;

use crate::oci::Descriptor;
pub use content::{Content, ContentError, Stored};
use keys::Entry;
use repositories::Repositories;
use request::{ManifestName, Name};
pub use serve::{Options, Server};
use storage::Storage;
pub use storage::StorageError;
pub use upstream::Upstream;

/// All that the server reads and writes.
#[derive(Debug)]
pub struct Registry {
    repositories: Repositories,
    read_only: bool,
}

/// A blob that can be read.
struct Blob {
    digest: Digest,
    size: u64,
}

impl Registry {
    /// The registry in `root`: a directory, which is created, or `s3://bucket[/prefix]`.
    pub fn open(root: &str, read_only: bool) -> Result<Self, StorageError> {
        Ok(Self { repositories: Repositories::new(Storage::open(root)?), read_only })
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
        let size = self.size(name, &Entry::Blob(*digest), rely).await?;
        Ok(size.map(|size| Blob { digest: *digest, size }))
    }

    /// Bytes of a blob.
    async fn read(
        &self,
        blob: Blob,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, ContentError>>, ContentError> {
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
            ManifestName::Digest(digest) => *digest,
            ManifestName::Tag(tag) => match self.repositories.tag(name, tag).await? {
                Some(tag) => tag.digest,
                None => return Ok(None),
            },
        };
        if rely && self.size(name, &Entry::Manifest(digest), rely).await?.is_none() {
            return Ok(None);
        }
        Ok(self.repositories.manifest(name, &digest).await?)
    }

    /// What refers to a manifest.
    async fn referrers(&self, name: &Name, subject: &Digest) -> Result<Vec<Descriptor>, ContentError> {
        Ok(self.repositories.referrers(name, subject).await?)
    }
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
