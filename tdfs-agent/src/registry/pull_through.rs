//! Pull-through: what is not in the storage comes from another registry and stays.
//!
//! Comes in: names that clients ask for. Goes out: verified content, to the clients and into the storage. A blob is
//! fetched by a task of its own, whoever waits for it: the bytes go through the hash into the storage and into a
//! nameless file (in `TMPDIR`), from which every client that asked for it reads as far as it has grown. So many
//! clients cause one fetch, a slow one delays nobody, and one that goes away stops nothing. The last piece is given
//! out only when the digest of the whole was right, so nobody gets a whole blob that is wrong. A range of a blob that
//! is not here waits for the bytes before it.
//!
//! Tags are asked for anew each time; while the other registry is away, what is stored is served.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tdfs_common::digest::Digest;
use tokio::sync::watch;
use url::Url;

use super::content::ContentError;
use super::keys;
use super::metrics::Metrics;
use super::repositories::Repositories;
use super::request::Name;
use crate::oci::{ByteStream, ClientOptions, Descriptor, OciError, Reference, Store};

/// Clients of repositories that are kept, with their connections and tokens.
const STORES_MAX: usize = 256;
/// Bytes read from the file at a time.
const READ: u64 = 256 << 10;
/// For a connection to the other registry.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How often the other registry is asked again.
const RETRIES: u32 = 2;

/// The other registry.
#[derive(Debug)]
pub struct PullThrough {
    host: String,
    options: ClientOptions,
    stores: Mutex<HashMap<Name, Store>>,
    fetches: Mutex<HashMap<Digest, Arc<Fetch>>>,
    metrics: Arc<Metrics>,
}

/// A blob on its way.
#[derive(Debug)]
pub struct Fetch {
    file: File,
    /// Bytes that may be read, or why there will be no more.
    progress: watch::Receiver<Result<u64, String>>,
    size: u64,
}

/// Nothing, or what is there.
fn found<T>(result: Result<T, OciError>) -> Result<Option<T>, OciError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.is_not_found() => Ok(None),
        // What we are not allowed to see is not there for our clients.
        Err(OciError::Denied { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

impl PullThrough {
    /// The registry at `address`, `http[s]://host[:port]`; credentials are those of docker.
    pub fn new(address: &str, options: ClientOptions, metrics: Arc<Metrics>) -> Result<Self, OciError> {
        let bad = || OciError::Setup(format!("{address:?} is not of the form http[s]://host[:port]"));
        let url: Url = address.parse().map_err(|_| bad())?;
        let plain_http = match url.scheme() {
            "http" => true,
            "https" => false,
            _ => return Err(bad()),
        };
        let is_bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.username().is_empty();
        let host = url.host_str().filter(|_| is_bare).ok_or_else(bad)?;
        let host = match (url.port(), host.contains('.')) {
            (None, true) => host.to_owned(),
            // A name without dots is taken for a host only with a port.
            _ => format!("{host}:{}", url.port_or_known_default().ok_or_else(bad)?),
        };
        let options = ClientOptions {
            plain_http: Some(plain_http),
            connect_timeout: CONNECT_WITHIN,
            retries: RETRIES,
            ..options
        };
        Ok(Self { host, options, stores: Mutex::default(), fetches: Mutex::default(), metrics })
    }

    fn store(&self, name: &Name) -> Result<Store, OciError> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(name) {
            return Ok(store.clone());
        }
        let reference: Reference = format!("{}/{name}:latest", self.host).parse()?;
        let store = Store::open(&reference, &self.options)?;
        if stores.len() == STORES_MAX {
            stores.clear();
        }
        stores.insert(name.clone(), store.clone());
        Ok(store)
    }

    /// What a tag stands for there now.
    pub async fn tag(&self, name: &Name, tag: &str) -> Result<Option<Digest>, OciError> {
        self.store(name)?.tag_digest(tag).await
    }

    /// A manifest, checked.
    pub async fn manifest(
        &self,
        name: &Name,
        digest: &Digest,
    ) -> Result<Option<(Descriptor, Bytes)>, OciError> {
        found(self.store(name)?.manifest(digest).await)
    }

    /// Bytes of a blob.
    pub async fn blob_size(&self, name: &Name, digest: &Digest) -> Result<Option<u64>, OciError> {
        found(self.store(name)?.blob_size(digest).await).map(Option::flatten)
    }

    /// What refers to a manifest there.
    pub async fn referrers(&self, name: &Name, subject: &Digest) -> Result<Vec<Descriptor>, OciError> {
        Ok(found(self.store(name)?.referrers(subject, None).await)?.unwrap_or_default())
    }

    /// The fetch of a blob of `size` bytes, which begins unless it is underway.
    pub fn fetch(
        self: &Arc<Self>,
        repositories: &Repositories,
        name: &Name,
        digest: &Digest,
        size: u64,
    ) -> Result<Arc<Fetch>, OciError> {
        let store = self.store(name)?;
        let mut fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fetch) = fetches.get(digest) {
            return Ok(fetch.clone());
        }
        let spool = || -> std::io::Result<(File, File)> {
            let file = tempfile::tempfile()?;
            Ok((file.try_clone()?, file))
        };
        let (file, read) = spool().map_err(|e| OciError::Setup(format!("temporary file: {e}")))?;
        let (sender, progress) = watch::channel(Ok(0));
        let fetch = Arc::new(Fetch { file: read, progress, size });
        fetches.insert(*digest, fetch.clone());
        let (upstream, repositories) = (self.clone(), repositories.clone());
        let (name, descriptor) = (name.clone(), Descriptor::new("application/octet-stream", *digest, size));
        tokio::spawn(async move {
            upstream.metrics.upstream_fetches.inc();
            let ended = match store.blob_stream(&descriptor).await {
                Ok(stream) => upstream.run(&repositories, &name, &descriptor, stream, &file, &sender).await,
                Err(e) => Err(e.to_string()),
            };
            // Before anybody can hear of the end: who asks again then finds the blob in the storage, or tries anew.
            upstream.fetches.lock().unwrap_or_else(PoisonError::into_inner).remove(&descriptor.digest);
            if let Err(reason) = &ended {
                tracing::warn!("{}: {reason}", descriptor.digest);
            }
            sender.send_modify(|state| *state = ended.map(|()| descriptor.size));
        });
        Ok(fetch)
    }

    /// Moves a blob into the storage and, all but its last piece, in front of the readers.
    async fn run(
        &self,
        repositories: &Repositories,
        name: &Name,
        blob: &Descriptor,
        mut stream: ByteStream,
        file: &File,
        sender: &watch::Sender<Result<u64, String>>,
    ) -> Result<(), String> {
        let storage = repositories.storage();
        let mut writer = Some(storage.writer(keys::content(&blob.digest), blob.digest));
        let mut written = 0;
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|e| e.to_string())?;
            self.metrics.upstream_bytes.inc_by(piece.len() as u64);
            // What was written by the last round is followed by more, so it is not the last piece.
            sender.send_modify(|state| *state = Ok(written));
            written +=
                write(file, piece.clone(), written).await.map_err(|e| format!("temporary file: {e}"))?;
            let stored = match &mut writer {
                Some(writer) => writer.write(piece).await,
                None => Ok(()),
            };
            if let Err(e) = stored {
                // The clients get it all the same.
                tracing::error!("{e}");
                writer = None;
            }
        }
        let Some(writer) = writer else { return Ok(()) };
        let stored = match writer.commit().await {
            Ok(Ok(_)) => repositories.link(name, &blob.digest).await.map(|_| ()),
            Ok(Err(got)) => return Err(format!("content has digest {got}")),
            Err(e) => Err(e),
        };
        if let Err(e) = stored {
            tracing::error!("{e}");
        }
        Ok(())
    }
}

/// Writes a piece at its place; returns its length.
async fn write(file: &File, piece: Bytes, at: u64) -> std::io::Result<u64> {
    let file = file.try_clone()?;
    let work = move || file.write_all_at(&piece, at).map(|()| piece.len() as u64);
    tokio::task::spawn_blocking(work).await?
}

impl Fetch {
    /// Waits until the blob is here; an error if it will not be.
    pub async fn done(&self) -> Result<(), ContentError> {
        self.available(self.size).await.map(|_| ())
    }

    /// Bytes that may be read, once they are `least` or more. All of them are only when the fetch has ended.
    async fn available(&self, least: u64) -> Result<u64, ContentError> {
        let failed = |reason: String| ContentError::Unavailable {
            what: "blob of the upstream registry".to_owned(),
            reason,
        };
        let mut progress = self.progress.clone();
        let enough = |state: &Result<u64, String>| state.as_ref().map_or(true, |bytes| *bytes >= least);
        let state = progress.wait_for(enough).await.map_err(|e| failed(e.to_string()))?.clone();
        state.map_err(failed)
    }

    /// Bytes of the blob, as they come.
    pub fn read(self: Arc<Self>, range: Range<u64>) -> BoxStream<'static, Result<Bytes, ContentError>> {
        stream::try_unfold((self, range), |(fetch, range)| async move {
            if range.is_empty() {
                return Ok(None);
            }
            let available = fetch.available(range.start + 1).await?.min(range.end);
            let mut piece = vec![0; (available - range.start).min(READ) as usize];
            let file = fetch.file.try_clone();
            let work = move || file?.read_exact_at(&mut piece, range.start).map(|()| piece);
            let piece = tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(e.into()));
            let piece = piece.map_err(|e| ContentError::Unavailable {
                what: "temporary file".to_owned(),
                reason: e.to_string(),
            })?;
            let next = range.start + piece.len() as u64..range.end;
            Ok(Some((Bytes::from(piece), (fetch, next))))
        })
        .boxed()
    }
}
