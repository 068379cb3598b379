//! OCI images: references, registries, layouts on disk, and the layers within.
//!
//! ```text
//! text -> Reference -> Store::open -> Registry | Layout
//!                      Store::resolve -> index -> platform -> manifest -> config = Image
//!                      Store::blob*   -> bytes of layers and artifacts
//! ```
//!
//! [`Store`] is what the rest of tdfs uses. Everything it returns was checked against its digest, except
//! [`Store::blob_range`], whose caller has a hash of its own. Every wait has a timeout, every document a limit.

mod auth;
mod credentials;
mod error;
pub mod layer;
mod layout;
mod manifest;
mod pace;
mod pages;
mod platform;
mod push;
mod reference;
mod registry;
mod store;
mod stream;
mod transport;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use tdfs_common::digest::Digest;

pub use error::OciError;
pub(crate) use manifest::MANIFEST_TYPES;
pub use manifest::{
    CONFIG_MAX, CONFIG_TYPE, DESCRIPTORS_MAX, Descriptor, Document, EMPTY_TYPE, INDEX_TYPE, Image, Index,
    MANIFEST_MAX, MANIFEST_TYPE, Manifest, REF_NAME,
};
pub(crate) use pace::Pace;
pub use pages::{PageAnswer, PageSource};
pub use platform::Platform;
pub use reference::{Location, Reference};
pub(crate) use reference::{is_repository, is_tag};
pub use store::Store;
pub use stream::ByteStream;

/// How to reach registries.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Which image to take out of an index.
    pub platform: Platform,
    /// Plain HTTP (`true`) or TLS (`false`); by default plain HTTP for loopback hosts and TLS for all others.
    pub plain_http: Option<bool>,
    /// By registry host, where to read first: `host[:port]` or an address with scheme, in order.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// The only file to look for credentials in; by default those of docker, podman and skopeo.
    pub auth_file: Option<PathBuf>,
    /// PEM file of CA certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Whether to ask servers for their page service.
    pub page_service: bool,
    /// For the connection to a server.
    pub connect_timeout: Duration,
    /// For the head of an answer, and for any 64 KiB of its body.
    pub idle_timeout: Duration,
    /// How often to try again after a failure that may pass.
    pub retries: u32,
    /// Pause before the first retry; it doubles with each.
    pub backoff: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            plain_http: None,
            mirrors: BTreeMap::new(),
            auth_file: None,
            ca_file: None,
            page_service: true,
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            retries: 5,
            backoff: Duration::from_millis(100),
        }
    }
}

/// What a [`Store`] asked for and got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Requests for manifests, small blobs and tokens, uploads, redirects and refusals; retries count.
    pub metadata_requests: u64,
    /// Requests for blob streams and ranges and those that a page service answers; retries count.
    pub data_requests: u64,
    /// Bytes of all bodies.
    pub bytes_received: u64,
}

/// A blob to be stored.
#[derive(Clone, Debug)]
pub enum BlobSource {
    /// In memory.
    Bytes(Bytes),
    /// A file, which must not change meanwhile.
    File(PathBuf),
}

impl BlobSource {
    fn size(&self) -> Result<u64, OciError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.len() as u64),
            Self::File(path) => Ok(std::fs::metadata(path).map_err(OciError::io(path))?.len()),
        }
    }
}

impl From<Bytes> for BlobSource {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Vec<u8>> for BlobSource {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl From<PathBuf> for BlobSource {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

fn check(what: &str, bytes: &[u8], digest: &Digest, size: u64) -> Result<(), OciError> {
    let got = Digest::of(bytes);
    if bytes.len() as u64 != size {
        return Err(OciError::Size { what: what.to_owned(), expected: size, got: bytes.len() as u64 });
    }
    if got != *digest {
        return Err(OciError::Digest { what: what.to_owned(), expected: *digest, got });
    }
    Ok(())
}

/// Runs disk work off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OciError> + Send + 'static,
) -> Result<T, OciError> {
    joined(tokio::task::spawn_blocking(work).await)
}

fn joined<T>(result: Result<Result<T, OciError>, tokio::task::JoinError>) -> Result<T, OciError> {
    match result {
        Ok(result) => result,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(OciError::Setup("stopped while shutting down".into())),
        },
    }
}
