//! Content of a registry or an OCI layout, read through [`oci`](crate::oci).
//!
//! Nothing is kept: a page service over a registry reads every byte from it, with the credentials, mirrors and retries
//! of any other client.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use tdfs_common::digest::Digest;

use super::content::{Content, ContentError, Stored};
use crate::oci::{ClientOptions, Descriptor, OciError, Reference, Store};

/// Repositories whose connections and tokens are kept.
const REPOSITORIES_MAX: usize = 256;

/// Repositories that lie elsewhere.
#[derive(Debug)]
pub struct Upstream {
    place: Place,
    options: ClientOptions,
    stores: Mutex<HashMap<String, Store>>,
}

#[derive(Debug)]
enum Place {
    /// A registry, `host[:port]`.
    Registry(String),
    /// A directory with an OCI layout for each repository.
    Layouts(PathBuf),
}

impl Upstream {
    /// The registry at `host[:port]`.
    pub fn registry(host: &str, options: ClientOptions) -> Self {
        Self { place: Place::Registry(host.to_owned()), options, stores: Mutex::default() }
    }

    /// The OCI layouts below `dir`: repository `a/b` is the layout `dir/a/b`.
    pub fn layouts(dir: impl Into<PathBuf>, options: ClientOptions) -> Self {
        Self { place: Place::Layouts(dir.into()), options, stores: Mutex::default() }
    }

    fn store(&self, repository: &str) -> Result<Store, ContentError> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(repository) {
            return Ok(store.clone());
        }
        // Only names that are repositories get here: a layout's path never leads out of its directory.
        let named: Reference = format!("localhost/{repository}")
            .parse()
            .map_err(|_| ContentError::NotFound(repository.chars().take(300).collect()))?;
        let reference = match &self.place {
            Place::Registry(host) => format!("{host}/{repository}").parse().map_err(failed(repository))?,
            Place::Layouts(dir) => Reference::layout(dir.join(repository)),
        };
        drop(named);
        let store = Store::open(&reference, &self.options).map_err(failed(repository))?;
        if stores.len() >= REPOSITORIES_MAX {
            stores.clear();
        }
        stores.insert(repository.to_owned(), store.clone());
        Ok(store)
    }
}

impl Content for Upstream {
    fn manifest<'a>(
        &'a self,
        repository: &'a str,
        reference: &'a str,
    ) -> BoxFuture<'a, Result<Stored, ContentError>> {
        async move {
            let store = self.store(repository)?;
            let digest = match reference.parse::<Digest>() {
                Ok(digest) => Some(digest),
                Err(_) => store.tag_digest(reference).await.map_err(failed(reference))?,
            };
            let digest = digest.ok_or_else(|| ContentError::NotFound(format!("{repository}:{reference}")))?;
            let (descriptor, bytes) = store.manifest(&digest).await.map_err(failed(reference))?;
            Ok(Stored { media_type: descriptor.media_type, digest, bytes })
        }
        .boxed()
    }

    fn referrers<'a>(
        &'a self,
        repository: &'a str,
        subject: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<Descriptor>, ContentError>> {
        async move {
            let found = self.store(repository)?.referrers(subject, None).await;
            found.map_err(failed(&subject.to_string()))
        }
        .boxed()
    }

    fn blob<'a>(
        &'a self,
        repository: &'a str,
        digest: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Bytes, ContentError>>, ContentError>> {
        async move {
            let what = digest.to_string();
            let opened = self.store(repository)?.blob_part(digest, range).await;
            let pieces = opened.map_err(failed(&what))?;
            Ok(pieces.map_err(move |e| failed(&what)(e)).boxed())
        }
        .boxed()
    }
}

fn failed(what: &str) -> impl FnOnce(OciError) -> ContentError {
    let what = what.to_owned();
    move |error| {
        if error.is_not_found() {
            ContentError::NotFound(what)
        } else {
            ContentError::Unavailable { what, reason: error.to_string() }
        }
    }
}
