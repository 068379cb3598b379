//! One uncompressed layer on disk.
//!
//! ```text
//! layers/<diff id>/tar            the uncompressed layer, sparse until it is complete
//!                  spans-<hash>   presence of the spans of one index (another index cuts other spans)
//!                  complete       presence of the whole
//!                  indexed        the tar's entries and spans, where the layer was pulled (`pull`)
//!                  windows        its deflate windows, likewise
//!                  lock           flocked while presence is written
//! ```
//!
//! Bytes of the tar count only where a presence bit vouches for them. What another boot left is checked against the
//! spans' hashes (or, without spans, the diff ID) before it counts again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use tdfs_common::digest::{ContentHash, ContentHasher, Digest, DigestWriter};
use tdfs_common::layer_index::Layer;

use crate::fetch::FetchError;
use crate::rtpc::Presence;

/// A layer's directory, opened.
pub struct LayerCache {
    dir: PathBuf,
    layer: Layer,
    tar: Mutex<Arc<File>>,
    spans: Option<Presence>,
    complete: Presence,
}

impl LayerCache {
    /// Opens or makes the directory of `layer` below the state directory.
    pub fn open(state: &Path, layer: &Layer) -> Result<Self, FetchError> {
        let dir = directory(state, &layer.diff_id);
        fs::create_dir_all(&dir).map_err(FetchError::at(&dir))?;
        let path = dir.join("tar");
        let tar = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let tar = tar.map_err(FetchError::at(&path))?;
        if tar.metadata().map_err(FetchError::at(&path))?.len() < layer.size {
            tar.set_len(layer.size).map_err(FetchError::at(&path))?;
        }
        let spans = match layer.spans.len() as u64 {
            0 => None,
            spans => Some(Presence::open(&dir.join(format!("spans-{}", partition(layer))), spans)?),
        };
        let complete = Presence::open(&dir.join("complete"), 1)?;
        Ok(Self { dir, layer: layer.clone(), tar: Mutex::new(Arc::new(tar)), spans, complete })
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
        self.complete.contains(0) || self.spans.as_ref().is_some_and(|s| s.contains(unit as u64))
    }

    /// Whether the whole layer is here and known to be right.
    pub fn is_complete(&self) -> bool {
        self.complete.contains(0)
    }

    /// Looks again: for what another process committed, and for what another boot left. Reads and hashes the latter.
    pub fn recall(&self, unit: usize) -> Result<bool, FetchError> {
        self.complete.reload()?;
        let Some(spans) = &self.spans else { return self.recall_whole() };
        spans.reload()?;
        if self.contains(unit) {
            return Ok(true);
        }
        if !spans.suspects().contains(unit as u64) && !self.complete.suspects().contains(0) {
            return Ok(false);
        }
        let range = self.layer.span_out(unit);
        let bytes = self.read(range.start, (range.end - range.start) as usize)?;
        let right = ContentHash::of(&bytes) == self.layer.spans[unit].hash;
        if right {
            spans.insert(unit as u64..unit as u64 + 1);
        } else {
            tracing::warn!(dir = %self.dir.display(), unit, "a span did not survive; it is fetched again");
            spans.remove(unit as u64..unit as u64 + 1);
        }
        Ok(right)
    }

    /// Whether the whole layer is here; hashes what another boot left.
    pub fn recall_whole(&self) -> Result<bool, FetchError> {
        self.complete.reload()?;
        if self.is_complete() || !self.complete.suspects().contains(0) {
            return Ok(self.is_complete());
        }
        let tar = self.tar();
        let mut digest = DigestWriter::default();
        let mut reader = (&*tar).take(self.layer.size);
        io::Seek::rewind(&mut &*tar)
            .and_then(|()| io::copy(&mut reader, &mut digest))
            .map_err(FetchError::at(&self.dir))?;
        if digest.finish() == self.layer.diff_id {
            self.complete.insert(0..1);
        } else {
            tracing::warn!(dir = %self.dir.display(), "a layer did not survive; it is fetched again");
            self.complete.remove(0..1);
        }
        self.commit()?;
        Ok(self.is_complete())
    }

    /// Bytes of the tar, which must be present.
    pub fn read(&self, offset: u64, len: usize) -> Result<Bytes, FetchError> {
        let mut bytes = BytesMut::zeroed(len);
        self.tar().read_exact_at(&mut bytes, offset).map_err(FetchError::at(&self.dir))?;
        Ok(bytes.freeze())
    }

    /// Writes a verified span and marks it present.
    pub fn insert(&self, unit: usize, bytes: &[u8]) -> Result<(), FetchError> {
        let at = self.layer.span_out(unit).start;
        self.tar().write_all_at(bytes, at).map_err(FetchError::at(&self.dir))?;
        if let Some(spans) = &self.spans {
            spans.insert(unit as u64..unit as u64 + 1);
        }
        Ok(())
    }

    /// Makes what is present durable. Blocks on the disk.
    pub fn commit(&self) -> Result<(), FetchError> {
        let path = self.dir.join("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let lock = lock.and_then(|l| l.lock().map(|()| l)).map_err(FetchError::at(&path))?;
        let tar = self.tar();
        for presence in self.spans.iter().chain([&self.complete]) {
            presence.reload()?;
            presence.commit(&tar)?;
        }
        drop(lock);
        Ok(())
    }

    /// Puts the complete, verified and synced `file` in the place of the tar.
    pub fn replace(&self, file: tempfile::NamedTempFile) -> Result<(), FetchError> {
        let path = self.dir.join("tar");
        let file = file.persist(&path).map_err(|e| FetchError::at(&path)(e.error))?;
        *self.tar.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(file);
        File::open(&self.dir).and_then(|d| d.sync_all()).map_err(FetchError::at(&self.dir))?;
        self.complete.insert(0..1);
        self.commit()
    }

    fn tar(&self) -> Arc<File> {
        Arc::clone(&self.tar.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The directory of the layer with this diff ID.
pub fn directory(state: &Path, diff_id: &Digest) -> PathBuf {
    state.join("layers").join(diff_id.hex())
}

/// Stands for where an index cuts the layer into spans.
fn partition(layer: &Layer) -> String {
    let mut hasher = ContentHasher::default();
    for span in &layer.spans {
        hasher.update(&span.out_offset.to_le_bytes());
    }
    hasher.finish().as_bytes()[..8].iter().map(|b| format!("{b:02x}")).collect()
}
