//! One uncompressed layer on disk.
//!
//! ```text
//! layers/<diff id>/tar              the whole layer: made aside, hashed to the diff ID, synced, renamed
//!                  complete         presence of it, one unit
//!                  spans-<index>/tar      spans fetched one by one, sparse
//!                                present  presence of them
//!                  <blob>.indexed   entries and spans of the tar, where the layer was pulled (`pull`)
//!                  <blob>.windows   deflate windows of the blob, likewise
//!                  lock             flocked while presence is written
//!                  pulling          flocked while the whole layer is fetched
//! ```
//!
//! Spans do not go into the whole layer's file. An index comes with a runtime image and could lie about the hashes of
//! its spans; the directory named after all of them keeps the lie away from readers with another index.
//!
//! Bytes count only where a presence bit vouches for them. What another boot left is checked again before it counts:
//! a span against its hash, a layer without spans against the diff ID. A whole layer of another boot serves as a
//! source of spans until something needs all of it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::{Bytes, BytesMut};
use tdfs_common::digest::{ContentHash, Digest, DigestWriter};
use tdfs_common::layer_index::Layer;
use tempfile::NamedTempFile;

use crate::fetch::FetchError;
use crate::rtpc::Presence;

/// How names of temporary files begin.
const TEMPORARY: &str = ".part-";

/// A layer's directory, opened.
pub struct LayerCache {
    dir: PathBuf,
    layer: Layer,
    complete: Presence,
    /// Opened once the layer is complete.
    whole: OnceLock<File>,
    spans: Option<Spans>,
}

/// The spans of one index.
struct Spans {
    dir: PathBuf,
    tar: File,
    present: Presence,
    /// Inserted since the last commit.
    fresh: Mutex<Vec<u64>>,
    /// Whether somebody has promised to commit them.
    promised: AtomicBool,
}

impl LayerCache {
    /// Opens or makes the directory of `layer` below the state directory.
    pub fn open(state: &Path, layer: &Layer) -> Result<Self, FetchError> {
        let dir = directory(state, &layer.diff_id);
        fs::create_dir_all(&dir).map_err(FetchError::at(&dir))?;
        let complete = Presence::open(&dir.join("complete"), 1)?;
        let whole = OnceLock::new();
        let mut cache = Self { dir, layer: layer.clone(), complete, whole, spans: None };
        if !layer.spans.is_empty() && !cache.is_complete() {
            cache.spans = Some(Spans::open(&cache.dir.join(format!("spans-{}", name(layer))), layer)?);
        }
        Ok(cache)
    }

    /// What the layer should be.
    pub fn layer(&self) -> &Layer {
        &self.layer
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether a span (or, without spans, the layer) is here and known to be right.
    pub fn contains(&self, unit: usize) -> bool {
        self.is_complete() || self.spans.as_ref().is_some_and(|s| s.present.contains(unit as u64))
    }

    /// Whether the whole layer is here and known to be right.
    pub fn is_complete(&self) -> bool {
        self.whole().is_some()
    }

    /// Looks again: for what another process committed, and for what another boot left. Reads and hashes the latter.
    pub fn recall(&self, unit: usize) -> Result<bool, FetchError> {
        let Some(spans) = &self.spans else { return self.recall_whole() };
        self.complete.reload()?;
        spans.present.reload()?;
        if self.contains(unit) {
            return Ok(true);
        }
        let range = self.layer.span_out(unit);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let mut right = |tar: &File| {
            tar.read_exact_at(&mut bytes, range.start).is_ok()
                && ContentHash::of(&bytes) == self.layer.spans[unit].hash
        };
        let id = unit as u64;
        if spans.present.suspects().contains(id) {
            if right(&spans.tar) {
                spans.present.insert(id..id + 1);
                return Ok(true);
            }
            tracing::warn!(dir = %spans.dir.display(), unit, "a span did not survive; it is fetched again");
            spans.present.remove(id..id + 1);
        }
        if self.complete.suspects().contains(0) && self.tar().is_ok_and(|tar| right(&tar)) {
            self.insert(unit, &bytes)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Whether the whole layer is here; hashes what another boot left.
    pub fn recall_whole(&self) -> Result<bool, FetchError> {
        self.complete.reload()?;
        if self.is_complete() || !self.complete.suspects().contains(0) {
            return Ok(self.is_complete());
        }
        let right = self.tar().and_then(|mut tar| {
            let mut digest = DigestWriter::default();
            io::copy(&mut tar, &mut digest)?;
            Ok(digest.finish() == self.layer.diff_id)
        });
        if right.is_ok_and(|right| right) {
            self.complete.insert(0..1);
        } else {
            tracing::warn!(dir = %self.dir.display(), "a layer did not survive; it is fetched again");
            self.complete.remove(0..1);
        }
        self.commit()?;
        Ok(self.is_complete())
    }

    /// Bytes of the layer, which must be present.
    pub fn read(&self, offset: u64, len: usize) -> Result<Bytes, FetchError> {
        let spans = || self.spans.as_ref().map(|s| &s.tar);
        let tar = self.whole().or_else(spans).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
        let mut bytes = BytesMut::zeroed(len);
        tar.and_then(|tar| tar.read_exact_at(&mut bytes, offset)).map_err(FetchError::at(&self.dir))?;
        Ok(bytes.freeze())
    }

    /// Writes a verified span and marks it present.
    pub fn insert(&self, unit: usize, bytes: &[u8]) -> Result<(), FetchError> {
        let Some(spans) = &self.spans else { return Ok(()) };
        let at = self.layer.span_out(unit).start;
        spans.tar.write_all_at(bytes, at).map_err(FetchError::at(&spans.dir))?;
        // Known as uncommitted before anybody can commit it.
        lock(&spans.fresh).push(unit as u64);
        spans.present.insert(unit as u64..unit as u64 + 1);
        Ok(())
    }

    /// Whether the caller has to call [`commit`](Self::commit), because nobody has promised it yet.
    pub fn promise_commit(&self) -> bool {
        self.spans.as_ref().is_some_and(|s| !s.promised.swap(true, Ordering::AcqRel))
    }

    /// Makes what is present durable. Blocks on the disk. What the disk refuses is not present any more.
    pub fn commit(&self) -> Result<(), FetchError> {
        let lock_file = self.flock("lock");
        if let Some(spans) = &self.spans {
            // Spans from here on need another commit.
            spans.promised.store(false, Ordering::Release);
        }
        let _lock = lock_file?;
        if let Some(spans) = &self.spans {
            let fresh = std::mem::take(&mut *lock(&spans.fresh));
            let committed = spans.present.reload().and_then(|()| spans.present.commit(&spans.tar));
            if let Err(error) = committed {
                for unit in fresh {
                    spans.present.remove(unit..unit + 1);
                }
                return Err(error.into());
            }
        }
        self.complete.reload()?;
        match self.tar() {
            Ok(tar) => Ok(self.complete.commit(&tar)?),
            Err(_) => Ok(()),
        }
    }

    /// Makes the caller the only one who fetches the whole layer, until the returned lock is dropped. Blocks while
    /// another one does. Temporary files that a crash left behind are removed.
    pub fn lock_whole(&self) -> Result<File, FetchError> {
        let lock = self.flock("pulling")?;
        for entry in fs::read_dir(&self.dir).map_err(FetchError::at(&self.dir))?.flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(TEMPORARY.as_bytes()) {
                fs::remove_file(entry.path()).map_err(FetchError::at(&entry.path()))?;
            }
        }
        Ok(lock)
    }

    /// A file to write the whole layer, or something about it, to. Needs [`lock_whole`](Self::lock_whole).
    pub fn temporary(&self) -> Result<NamedTempFile, FetchError> {
        temporary(&self.dir).map_err(FetchError::at(&self.dir))
    }

    /// Puts the complete, verified and synced `file` in the place of the tar. Needs [`lock_whole`](Self::lock_whole).
    pub fn replace(&self, file: NamedTempFile) -> Result<(), FetchError> {
        let path = self.dir.join("tar");
        file.persist(&path).map_err(|e| FetchError::at(&path)(e.error))?;
        File::open(&self.dir).and_then(|d| d.sync_all()).map_err(FetchError::at(&self.dir))?;
        self.complete.insert(0..1);
        self.commit()?;
        // Who has them open keeps them, and cannot commit any more.
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b"spans-")
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::warn!("{}: {error}; it only takes room", entry.path().display());
            }
        }
        Ok(())
    }

    fn whole(&self) -> Option<&File> {
        if self.whole.get().is_none() && self.complete.contains(0) {
            let tar = self.tar().ok()?;
            return Some(self.whole.get_or_init(|| tar));
        }
        self.whole.get()
    }

    /// The file of the whole layer, which nothing vouches for.
    fn tar(&self) -> io::Result<File> {
        File::open(self.dir.join("tar"))
    }

    fn flock(&self, name: &str) -> Result<File, FetchError> {
        let path = self.dir.join(name);
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        file.and_then(|f| f.lock().map(|()| f)).map_err(FetchError::at(&path))
    }
}

impl Spans {
    fn open(dir: &Path, layer: &Layer) -> Result<Self, FetchError> {
        fs::create_dir_all(dir).map_err(FetchError::at(dir))?;
        let (path, present) = (dir.join("tar"), dir.join("present"));
        let tar = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let tar = tar.map_err(FetchError::at(&path))?;
        if tar.metadata().map_err(FetchError::at(&path))?.len() != layer.size {
            // A new file. Bits that somehow outlived its predecessor would stand for zeros.
            match fs::remove_file(&present) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(FetchError::at(&present)(e)),
                _ => tar.set_len(layer.size).map_err(FetchError::at(&path))?,
            }
        }
        let present = Presence::open(&present, layer.spans.len() as u64)?;
        let (fresh, promised) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self { dir: dir.to_owned(), tar, present, fresh, promised })
    }
}

/// The directory of the layer with this diff ID.
pub fn directory(state: &Path, diff_id: &Digest) -> PathBuf {
    state.join("layers").join(diff_id.hex())
}

/// A temporary file in `dir`.
pub fn temporary(dir: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(dir)
}

/// Stands for what an index says about the content of a layer.
fn name(layer: &Layer) -> String {
    let mut digest = DigestWriter::default();
    digest.update(&layer.size.to_le_bytes());
    for span in &layer.spans {
        digest.update(&span.out_offset.to_le_bytes());
        digest.update(span.hash.as_bytes());
    }
    digest.finish().hex()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
