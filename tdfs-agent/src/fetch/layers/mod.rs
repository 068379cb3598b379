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

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt as _;
use tdfs_common::digest::Digest;
use tdfs_common::layer_index::LayerIndex;

use super::{FetchError, joined};
use crate::oci::layer::read_span;
use crate::oci::{Descriptor, Store};
use cache::LayerCache;
pub use pull::{PulledImage, pull_image};

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
    /// Held while a span is fetched.
    busy: Mutex<HashMap<(u32, usize), Arc<tokio::sync::Mutex<()>>>>,
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
        let busy = Mutex::default();
        let (spans, requests, bytes) = Default::default();
        Ok(Self { store, index, windows, layers, busy, spans, requests, bytes })
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

    /// Makes a span (or, without spans, the layer) present.
    async fn bring(&self, layer: u32, unit: usize) -> Result<(), FetchError> {
        let turn = Arc::clone(self.busy().entry((layer, unit)).or_default());
        let guard = turn.lock().await;
        let cache = Arc::clone(&self.layers[layer as usize]);
        // Somebody else was first, or it is on disk from another boot or another index.
        let known = joined(tokio::task::spawn_blocking(move || cache.recall(unit))).await?;
        if !known {
            let whole = self.index.layers[layer as usize].spans.is_empty();
            if whole { self.bring_layer(layer).await? } else { self.bring_span(layer, unit).await? }
        }
        drop(guard);
        self.busy().remove(&(layer, unit));
        Ok(())
    }

    async fn bring_span(&self, layer: u32, unit: usize) -> Result<(), FetchError> {
        let known = &self.index.layers[layer as usize];
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
        let cache = &self.layers[layer as usize];
        let known = cache.layer();
        let blob = Descriptor::new("layer", known.blob, known.blob_size);
        pull::uncompress_into(&self.store, &blob, known.compression, known.diff_id, cache).await?;
        self.spans.fetch_add(1, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(known.blob_size, Ordering::Relaxed);
        Ok(())
    }

    async fn range(
        &self,
        blob: &Digest,
        size: u64,
        range: std::ops::Range<u64>,
    ) -> Result<Bytes, FetchError> {
        let mut bytes = BytesMut::with_capacity((range.end - range.start) as usize);
        let mut stream = self.store.blob_range(blob, size, range).await?;
        while let Some(piece) = stream.try_next().await? {
            bytes.extend_from_slice(&piece);
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes.freeze())
    }

    fn commit_later(&self, layer: u32) {
        let cache = Arc::clone(&self.layers[layer as usize]);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = cache.commit() {
                tracing::warn!("fetched spans are not kept: {error}");
            }
        });
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, HashMap<(u32, usize), Arc<tokio::sync::Mutex<()>>>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
