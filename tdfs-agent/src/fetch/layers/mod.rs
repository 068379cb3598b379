//! The layers of an image, uncompressed, on disk: everything a start reads that is not in its runtime image.
//!
//! ```text
//! read(layer, offset, len) -> spans -> here?  yes: from the tar file
//!                                      no:    range of the blob + window -> inflate -> verify -> tar file -> here
//! ```
//!
//! Concurrent readers of one span share one fetch. A layer without spans is fetched whole on its first read. A span
//! is served as soon as it is verified and written; its presence becomes durable in the background, data first, so a
//! crash only forgets. Reads block on the registry for as long as its client retries, and then fail.

mod cache;
mod pull;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt as _;
use tdfs_common::digest::Digest;
use tdfs_common::layer_index::LayerIndex;
use tokio::sync::{OnceCell, Semaphore};

use super::{FetchError, joined};
use crate::oci::layer::read_span;
use crate::oci::{Descriptor, OciError, Store};
use cache::LayerCache;
pub use pull::{PulledImage, pull_image};

/// Spans fetched and inflated at the same time; each takes some megabytes of memory.
const SPANS_AT_ONCE: usize = 8;

/// One fetch and everybody who waits for it.
type Fetching = Arc<OnceCell<Result<(), Arc<FetchError>>>>;

/// What was fetched from layers on demand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerStats {
    /// Spans; a layer fetched whole counts as one.
    pub spans: u64,
    /// Requests for ranges of layers and for windows.
    pub requests: u64,
    /// Bytes of their answers.
    pub bytes: u64,
}

/// The layers of one image.
pub struct ImageLayers {
    store: Store,
    index: LayerIndex,
    windows: Option<Descriptor>,
    layers: Vec<Arc<LayerCache>>,
    /// What is being fetched.
    busy: Mutex<HashMap<(u32, usize), Fetching>>,
    slots: Semaphore,
    spans: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl ImageLayers {
    /// The layers of a validated `index`, kept below the `state` directory and fetched from `store`; `windows` is the
    /// blob with the deflate windows. Reads nothing yet.
    pub fn new(
        state: &Path,
        store: Store,
        index: LayerIndex,
        windows: Option<Descriptor>,
    ) -> Result<Self, FetchError> {
        let layers = index.layers.iter().map(|l| LayerCache::open(state, l).map(Arc::new));
        let layers = layers.collect::<Result<_, _>>()?;
        let (busy, slots) = (Mutex::default(), Semaphore::new(SPANS_AT_ONCE));
        let (spans, requests, bytes) = Default::default();
        Ok(Self { store, index, windows, layers, busy, slots, spans, requests, bytes })
    }

    /// What was fetched so far.
    pub fn stats(&self) -> LayerStats {
        LayerStats {
            spans: self.spans.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }

    /// Exactly `len` verified bytes of an uncompressed layer, which must lie in it.
    pub async fn read(&self, layer: u32, offset: u64, len: usize) -> Result<Bytes, FetchError> {
        let outside = || FetchError::OutsideLayer { layer, offset, len };
        let known = self.index.layers.get(layer as usize).ok_or_else(outside)?;
        let end = offset.checked_add(len as u64).filter(|end| *end <= known.size).ok_or_else(outside)?;
        if len == 0 {
            return Ok(Bytes::new());
        }
        let cache = &self.layers[layer as usize];
        let units = match known.span_at(offset).zip(known.span_at(end - 1)) {
            Some((first, last)) => first..=last,
            None => 0..=0,
        };
        for unit in units {
            if !cache.contains(unit) {
                self.bring(layer, unit).await?;
            }
        }
        let cache = Arc::clone(cache);
        joined(tokio::task::spawn_blocking(move || cache.read(offset, len))).await
    }

    /// Makes a span (or, without spans, the layer) present, or waits for whoever is at it.
    async fn bring(&self, layer: u32, unit: usize) -> Result<(), FetchError> {
        let key = (layer, unit);
        let fetching = Arc::clone(self.busy().entry(key).or_default());
        let found = || async { self.find(layer, unit).await.map_err(Arc::new) };
        let outcome = fetching.get_or_init(found).await.clone();
        let mut busy = self.busy();
        // Whoever comes now starts afresh.
        if busy.get(&key).is_some_and(|f| Arc::ptr_eq(f, &fetching)) {
            busy.remove(&key);
        }
        outcome.map_err(FetchError::Shared)
    }

    async fn find(&self, layer: u32, unit: usize) -> Result<(), FetchError> {
        let cache = Arc::clone(&self.layers[layer as usize]);
        // Somebody else was first, or it is on disk from another boot.
        if joined(tokio::task::spawn_blocking(move || cache.recall(unit))).await? {
            return Ok(());
        }
        if self.index.layers[layer as usize].spans.is_empty() {
            return self.bring_layer(layer).await;
        }
        match self.bring_span(layer, unit).await {
            Err(FetchError::Oci(error @ OciError::Range { .. })) => {
                tracing::warn!("fetching a whole layer: {error}");
                self.bring_layer(layer).await
            }
            other => other,
        }
    }

    async fn bring_span(&self, layer: u32, unit: usize) -> Result<(), FetchError> {
        let known = &self.index.layers[layer as usize];
        // Never closed.
        let _slot = self.slots.acquire().await;
        let window = async {
            let Some(window) = known.spans[unit].window else { return Ok(None) };
            let blob = self.windows.as_ref().ok_or(FetchError::NoWindows { layer: known.blob })?;
            let range = window.offset..window.offset + u64::from(window.len);
            self.range(&blob.digest, blob.size, range).await.map(Some)
        };
        let compressed = self.range(&known.blob, known.blob_size, known.span_in(unit));
        let (compressed, window) = tokio::try_join!(compressed, window)?;
        let cache = Arc::clone(&self.layers[layer as usize]);
        joined(tokio::task::spawn_blocking(move || {
            let bytes = read_span(cache.layer(), unit, &compressed, window.as_deref())?;
            cache.insert(unit, &bytes)
        }))
        .await?;
        self.spans.fetch_add(1, Ordering::Relaxed);
        self.commit_later(layer);
        Ok(())
    }

    async fn bring_layer(&self, layer: u32) -> Result<(), FetchError> {
        let cache = Arc::clone(&self.layers[layer as usize]);
        let blob_size = cache.layer().blob_size;
        if pull::bring_whole(&self.store, cache).await? {
            self.spans.fetch_add(1, Ordering::Relaxed);
            self.requests.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(blob_size, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn range(&self, blob: &Digest, size: u64, range: Range<u64>) -> Result<Bytes, FetchError> {
        let mut bytes = BytesMut::with_capacity((range.end - range.start) as usize);
        let mut stream = self.store.blob_range(blob, size, range).await?;
        while let Some(piece) = stream.try_next().await? {
            bytes.extend_from_slice(&piece);
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes.freeze())
    }

    /// Makes everything fetched so far durable: a process that ends does not wait for what goes on in the background.
    pub async fn flush(&self) -> Result<(), FetchError> {
        let layers = self.layers.clone();
        joined(tokio::task::spawn_blocking(move || layers.iter().try_for_each(|layer| layer.commit()))).await
    }

    fn commit_later(&self, layer: u32) {
        let cache = Arc::clone(&self.layers[layer as usize]);
        if cache.promise_commit() {
            tokio::task::spawn_blocking(move || {
                if let Err(error) = cache.commit() {
                    tracing::warn!("fetched spans are not kept: {error}");
                }
            });
        }
    }

    fn busy(&self) -> MutexGuard<'_, HashMap<(u32, usize), Fetching>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
