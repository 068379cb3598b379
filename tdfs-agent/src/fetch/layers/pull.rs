//! The full pull: every layer of an image, indexed while it arrives.
//!
//! ```text
//! images/<manifest>/tree      of the merged layers
//!                   index     of the layers
//!                   windows   their deflate windows, as the blob that a runtime image refers to
//! ```
//!
//! These three are written last and replaced atomically, so that they only ever speak of complete layers; a damaged
//! one is made anew from what the layers' own directories hold.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf as _, Bytes};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tdfs_common::digest::{Digest, DigestWriter};
use tdfs_common::envelope::{self, Format};
use tdfs_common::layer_index::{Compression, Layer, LayerIndex};
use tdfs_common::tree::Tree;
use tokio::sync::mpsc;

use super::cache::{LayerCache, directory, temporary};
use crate::fetch::{FetchError, Progress, joined};
use crate::oci::layer::{IndexedLayer, LayerError, index_layer, merge, rebase_windows, uncompress};
use crate::oci::{Descriptor, Image, OciError, Store};

/// Layers downloaded at the same time.
const LAYERS_AT_ONCE: usize = 2;
/// Pieces of a download that wait for the indexer.
const PIECES: usize = 64;

/// An image of which every layer is on disk.
pub struct PulledImage {
    /// Its files.
    pub tree: Tree,
    /// Random access into its layers.
    pub index: LayerIndex,
    /// The blob with the deflate windows, where there are any.
    pub windows: Option<PathBuf>,
}

/// Pulls every layer of `image` that is not in the `state` directory yet.
pub async fn pull_image(
    state: &Path,
    store: &Store,
    image: &Image,
    progress: Progress<'_>,
) -> Result<PulledImage, FetchError> {
    let received = AtomicU64::new(0);
    let total = image.size();
    let count = |bytes| progress(received.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
    let layers: Vec<IndexedLayer> = stream::iter(image.layers.iter().zip(&image.diff_ids))
        .map(|(blob, diff_id)| pull_layer(state, store, blob, *diff_id, &count))
        .buffered(LAYERS_AT_ONCE)
        .try_collect()
        .await?;
    let (state, manifest) = (state.to_owned(), image.digest);
    joined(tokio::task::spawn_blocking(move || assemble(&state, &manifest, layers))).await
}

/// One layer, out of its directory or out of the store.
async fn pull_layer(
    state: &Path,
    store: &Store,
    blob: &Descriptor,
    diff_id: Digest,
    received: &impl Fn(u64),
) -> Result<IndexedLayer, FetchError> {
    let compression = compression(&blob.media_type)?;
    // Of the layer to be: enough for its directory.
    let layer =
        Layer { blob: blob.digest, blob_size: blob.size, diff_id, size: 0, compression, spans: Vec::new() };
    let state = state.to_owned();
    let opened = tokio::task::spawn_blocking(move || {
        let cache = LayerCache::open(&state, &layer)?;
        let lock = cache.lock_whole()?;
        let known = recall(&cache)?;
        let (tar, windows) = (cache.temporary()?, cache.temporary()?);
        Ok::<_, FetchError>((Arc::new(cache), lock, known, tar, windows))
    });
    let (cache, lock, known, tar, windows) = joined(opened).await?;
    if let Some(known) = known {
        received(blob.size);
        return Ok(known);
    }
    let at = Arc::clone(&cache);
    let (indexed, tar, windows) = stream_into(store, blob, received, move |reader| {
        // Through the plain files: errors of a `NamedTempFile` lose their number.
        let mut tar_writer = BufWriter::with_capacity(1 << 20, tar.as_file());
        let mut windows_writer = BufWriter::new(windows.as_file());
        let indexed = index_layer(reader, compression, &mut tar_writer, &mut windows_writer)?;
        synced(tar_writer).and_then(|()| synced(windows_writer)).map_err(FetchError::at(at.dir()))?;
        Ok((indexed, tar, windows))
    })
    .await?;
    check_diff_id(&indexed.layer, diff_id)?;
    joined(tokio::task::spawn_blocking(move || {
        let _lock = lock;
        let path = beside(cache.dir(), &indexed.layer, "windows");
        windows.persist(&path).map_err(|e| FetchError::at(&path)(e.error))?;
        save(&beside(cache.dir(), &indexed.layer, "indexed"), &indexed)?;
        cache.replace(tar)?;
        Ok(indexed)
    }))
    .await
}

/// Fetches a whole layer unless somebody else did meanwhile; says whether it was fetched.
pub(super) async fn bring_whole(store: &Store, cache: Arc<LayerCache>) -> Result<bool, FetchError> {
    let at = Arc::clone(&cache);
    let opened = tokio::task::spawn_blocking(move || {
        let lock = at.lock_whole()?;
        Ok::<_, FetchError>((lock, at.recall_whole()?, at.temporary()?))
    });
    let (lock, known, tar) = joined(opened).await?;
    if known {
        return Ok(false);
    }
    let blob = Descriptor::new("layer", cache.layer().blob, cache.layer().blob_size);
    let (compression, at) = (cache.layer().compression, Arc::clone(&cache));
    let (layer, tar) = stream_into(store, &blob, &|_| {}, move |reader| {
        let mut writer = BufWriter::with_capacity(1 << 20, tar.as_file());
        let layer = uncompress(reader, compression, &mut writer)?;
        synced(writer).map_err(FetchError::at(at.dir()))?;
        Ok((layer, tar))
    })
    .await?;
    check_diff_id(&layer, cache.layer().diff_id)?;
    joined(tokio::task::spawn_blocking(move || {
        let _lock = lock;
        cache.replace(tar)
    }))
    .await?;
    Ok(true)
}

fn synced(mut writer: BufWriter<&File>) -> io::Result<()> {
    writer.flush()?;
    writer.get_ref().sync_all()
}

fn check_diff_id(layer: &Layer, expected: Digest) -> Result<(), FetchError> {
    if layer.diff_id == expected {
        return Ok(());
    }
    Err(FetchError::DiffId { blob: layer.blob, expected, got: layer.diff_id })
}

/// Streams a whole blob, verified at its end, into `work`, which reads it on a thread of its own.
async fn stream_into<T: Send + 'static>(
    store: &Store,
    blob: &Descriptor,
    received: &impl Fn(u64),
    work: impl FnOnce(Pieces) -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    let (sender, receiver) = mpsc::channel(PIECES);
    let failure = Arc::new(Mutex::new(None));
    let pieces = Pieces { receiver, piece: Bytes::new(), failure: Arc::clone(&failure) };
    let worker = tokio::task::spawn_blocking(move || work(pieces));
    let mut stream = store.blob_stream(blob).await?;
    loop {
        let piece = stream.try_next().await;
        let end = !matches!(piece, Ok(Some(_)));
        if let Ok(Some(piece)) = &piece {
            received(piece.len() as u64);
        }
        // A worker that gave up says why when it is joined.
        if let Some(piece) = piece.transpose()
            && sender.send(piece).await.is_err()
        {
            break;
        }
        if end {
            break;
        }
    }
    drop(sender);
    let result = joined(worker).await;
    // The worker saw only that reading failed.
    match failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(FetchError::Oci(error)),
        None => result,
    }
}

/// The receiving end of a download.
struct Pieces {
    receiver: mpsc::Receiver<Result<Bytes, OciError>>,
    piece: Bytes,
    failure: Arc<Mutex<Option<OciError>>>,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(Ok(piece)) => self.piece = piece,
                Some(Err(error)) => {
                    *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return Err(io::Error::other("download failed"));
                }
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}

/// A layer that was pulled before, if all of it is still here.
fn recall(cache: &LayerCache) -> Result<Option<IndexedLayer>, FetchError> {
    let Some(indexed) = load::<IndexedLayer>(&beside(cache.dir(), cache.layer(), "indexed")) else {
        return Ok(None);
    };
    let (layer, named) = (&indexed.layer, cache.layer());
    if (layer.blob, layer.blob_size, layer.diff_id) != (named.blob, named.blob_size, named.diff_id) {
        return Ok(None);
    }
    let windows = layer.spans.iter().filter_map(|s| s.window).map(|w| w.offset + u64::from(w.len)).max();
    let stored = fs::metadata(beside(cache.dir(), layer, "windows")).map_or(0, |m| m.len());
    if windows.unwrap_or(0) > stored {
        return Ok(None);
    }
    let here = cache.recall_whole()?;
    Ok(here.then_some(indexed))
}

/// What is known of a layer's blob: other blobs may uncompress to the same layer.
fn beside(dir: &Path, layer: &Layer, what: &str) -> PathBuf {
    dir.join(format!("{}.{what}", layer.blob.hex()))
}

/// Merges the layers, or finds that done.
fn assemble(state: &Path, manifest: &Digest, layers: Vec<IndexedLayer>) -> Result<PulledImage, FetchError> {
    let dir = state.join("images").join(manifest.hex());
    fs::create_dir_all(&dir).map_err(FetchError::at(&dir))?;
    let windows_path = dir.join("windows");
    let here = |index: &LayerIndex| match index.windows {
        None => true,
        Some((digest, _)) => file_digest(&windows_path).is_some_and(|d| d == digest),
    };
    let tree = load::<Tree>(&dir.join("tree"));
    let index = load::<LayerIndex>(&dir.join("index")).filter(here);
    if let (Some(tree), Some(index)) = (tree, index) {
        let windows = index.windows.map(|_| windows_path);
        return Ok(PulledImage { tree, index, windows });
    }
    let tree = merge(&layers)?;
    let mut file = temporary(&dir).map_err(FetchError::at(&dir))?;
    let mut digest = DigestWriter::default();
    let mut size = 0;
    let mut index = LayerIndex { layers: Vec::new(), windows: None };
    for IndexedLayer { mut layer, .. } in layers {
        let path = beside(&directory(state, &layer.diff_id), &layer, "windows");
        let windows = fs::read(&path).map_err(FetchError::at(&path))?;
        rebase_windows(&mut layer, size);
        size += windows.len() as u64;
        digest.update(&windows);
        file.write_all(&windows).map_err(FetchError::at(&windows_path))?;
        index.layers.push(layer);
    }
    if size > 0 {
        index.windows = Some((digest.finish(), size));
        file.as_file().sync_all().map_err(FetchError::at(&windows_path))?;
        file.persist(&windows_path).map_err(|e| FetchError::at(&windows_path)(e.error))?;
    }
    save(&dir.join("tree"), &tree)?;
    save(&dir.join("index"), &index)?;
    let windows = index.windows.map(|_| windows_path);
    Ok(PulledImage { tree, index, windows })
}

fn compression(media_type: &str) -> Result<Compression, FetchError> {
    match media_type.rsplit(['+', '.']).next() {
        Some("gzip") => Ok(Compression::Gzip),
        Some("zstd") => Ok(Compression::Zstd),
        Some("tar") => Ok(Compression::None),
        _ => Err(FetchError::LayerType(media_type.chars().take(100).collect())),
    }
}

fn file_digest(path: &Path) -> Option<Digest> {
    let mut digest = DigestWriter::default();
    io::copy(&mut File::open(path).ok()?, &mut digest).ok()?;
    Some(digest.finish())
}

/// `None` where the file is missing or damaged: it is made anew.
fn load<T: Format>(path: &Path) -> Option<T> {
    envelope::decode(&fs::read(path).ok()?).ok()
}

fn save<T: Format>(path: &Path, value: &T) -> Result<(), FetchError> {
    let at = || FetchError::at(path);
    let bytes = envelope::encode(value).map_err(LayerError::from)?;
    let mut file = temporary(path.parent().unwrap_or(path)).map_err(at())?;
    file.write_all(&bytes).and_then(|()| file.as_file().sync_all()).map_err(at())?;
    file.persist(path).map_err(|e| at()(e.error))?;
    Ok(())
}
