//! What the server's parts read: manifests, referrers and blobs of repositories, wherever they are stored.

use std::ops::Range;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use tdfs_common::digest::Digest;

use crate::oci::Descriptor;

/// Stored content cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// There is no such repository, manifest or blob.
    #[error("{0} is unknown")]
    NotFound(String),
    /// The storage, or the registry behind this one, fails.
    #[error("{what}: {reason}")]
    Unavailable {
        /// What was read.
        what: String,
        /// Why it cannot be.
        reason: String,
    },
}

/// A manifest or index as it was pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes, which have this digest.
    pub bytes: Bytes,
}

/// Read access to repositories. No call holds a lock while it waits for storage.
pub trait Content: Send + Sync + 'static {
    /// The manifest or index at a tag or digest of a repository.
    fn manifest<'a>(
        &'a self,
        repository: &'a str,
        reference: &'a str,
    ) -> BoxFuture<'a, Result<Stored, ContentError>>;

    /// The manifests of a repository whose `subject` is `subject`, with their annotations; empty where there are none.
    fn referrers<'a>(
        &'a self,
        repository: &'a str,
        subject: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<Descriptor>, ContentError>>;

    /// Bytes `range` of a blob of a repository, read as they are taken; an error where the blob is shorter.
    fn blob<'a>(
        &'a self,
        repository: &'a str,
        digest: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Bytes, ContentError>>, ContentError>>;
}
