//! Layers: what is in one, where its bytes lie, and how to read a part of it without the rest.
//!
//! [`index_layer`] reads a layer blob once, front to back, and yields an [`IndexedLayer`]: the tar's entries with
//! the place and the BLAKE3 of every file, the spans where decompression can start, and the digests that tie
//! both to the image. [`merge`] turns the layers of an image into its [`Tree`](tdfs_common::tree::Tree);
//! [`read_span`] decompresses one span.
//!
//! ```text
//!             thread 1                       calling thread
//! blob --> sha256 --> inflate --chunks--> sha256, span hash --> tar sink
//!                        |                       |
//!                     windows                 tar walk --> entries
//! ```
//!
//! Memory is bounded: a few chunks, one deflate window, and the entries, whose number and size are limited.
//! Input is hostile until its digest is checked, which is the caller's part: compare [`Layer::blob`] and
//! [`Layer::diff_id`] with what the image names before believing an entry.

mod gzip;
mod header;
mod merge;
mod pax;
mod scan;
mod span;
mod sparse;
#[cfg(test)]
mod tests;
mod walk;
mod zstd;

use std::io::{self, Read, Write};

use bincode::{Decode, Encode};
use tdfs_common::envelope::{Format, FormatError};
use tdfs_common::layer_index::{Compression, Layer, LayerIndex};
use tdfs_common::tree::{Body, INODES_MAX, Inode};

pub use merge::merge;
pub use span::read_span;

/// Most uncompressed bytes of one layer.
pub const LAYER_MAX: u64 = 1 << 40;
/// Most entries of one layer.
pub const ENTRIES_MAX: usize = INODES_MAX;

/// One layer, indexed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct IndexedLayer {
    /// Digests, sizes and spans; window offsets count from the start of this layer's own windows.
    pub layer: Layer,
    /// What the tar says, in its order.
    pub entries: Vec<Entry>,
}

/// One entry of a layer's tar.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Entry {
    /// Components joined by `/`, without `.`, `..` and a leading slash; the root's is empty.
    pub path: Vec<u8>,
    /// What the entry does at that path.
    pub kind: EntryKind,
}

/// What an entry does.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum EntryKind {
    /// Creates an inode, or gives a directory new metadata. Extents say layer 0 until the layers are merged.
    Inode(Inode),
    /// Gives the file at this path one more name.
    HardLink(Vec<u8>),
    /// Removes what lower layers have at the path.
    Whiteout,
    /// Removes what lower layers have in the directory.
    Opaque,
}

/// Why a layer cannot be indexed, merged or read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The blob could not be read.
    #[error("reading a layer: {0}")]
    Read(#[source] io::Error),
    /// The uncompressed tar or the windows could not be written.
    #[error("writing an uncompressed layer: {0}")]
    Write(#[source] io::Error),
    /// The compressed stream is damaged.
    #[error("layer is damaged at byte {offset} of the blob: {reason}")]
    Compressed {
        /// Offset in the blob, bytes.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// A tar header is damaged.
    #[error("bad tar header at byte {offset} of the layer: {reason}")]
    Header {
        /// Offset in the uncompressed tar, bytes.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// An entry cannot be unpacked.
    #[error("layer entry {path:?}: {reason}")]
    Entry {
        /// The entry's path, as far as it is known.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The tar ends in the middle of an entry.
    #[error("layer is truncated in {path:?}")]
    Truncated {
        /// The entry, or the last one before the cut.
        path: String,
    },
    /// More than this code accepts.
    #[error("layer has more than {limit} {what}")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A span does not decompress to what the index says.
    #[error("span {span} of layer {layer}: {reason}")]
    Span {
        /// The span's number.
        span: usize,
        /// The layer's blob.
        layer: String,
        /// What is wrong.
        reason: String,
    },
    /// The merged tree is over a limit of its format.
    #[error(transparent)]
    Tree(#[from] FormatError),
    /// The reader of the tar gave up first; its own error says why.
    #[error("layer was abandoned")]
    Abandoned,
}

impl LayerError {
    /// The error number a reader of the file system gets.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Read(e) | Self::Write(e) => e.raw_os_error().unwrap_or(libc::EIO),
            _ => libc::EIO,
        }
    }

    fn entry(path: &[u8], reason: impl Into<String>) -> Self {
        Self::Entry { path: lossy(path), reason: reason.into() }
    }
}

/// `path` for a message, cut to a bearable length.
fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(300)]).into_owned()
}

/// Indexes one layer: `blob` is read to its end, the uncompressed tar goes to `tar`, compressed deflate windows
/// go to `windows`. Blocks on all three.
pub fn index_layer(
    blob: impl Read + Send,
    compression: Compression,
    tar: impl Write,
    windows: &mut impl Write,
) -> Result<IndexedLayer, LayerError> {
    let (layer, entries) = scan::scan(blob, compression, LAYER_MAX, tar, windows, walk::walk)?;
    Ok(IndexedLayer { layer, entries })
}

/// Uncompresses one layer without looking into it, for a layer that has no spans. The caller compares the digests.
pub fn uncompress(
    blob: impl Read + Send,
    compression: Compression,
    tar: impl Write,
) -> Result<Layer, LayerError> {
    let (layer, ()) = scan::scan(blob, compression, LAYER_MAX, tar, &mut io::sink(), |_| Ok(()))?;
    Ok(layer)
}

/// Moves the layer's windows to `base`, where its own windows begin in a blob that holds several layers' windows.
pub fn rebase_windows(layer: &mut Layer, base: u64) {
    for window in layer.spans.iter_mut().filter_map(|s| s.window.as_mut()) {
        window.offset += base;
    }
}

/// What stays on disk of an indexed layer, so that another image with the same layer need not index it again.
impl Format for IndexedLayer {
    const MAGIC: [u8; 8] = *b"TDFSENTR";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = 256 << 20;
    const NAME: &'static str = "indexed layer";

    fn validate(&self) -> Result<(), FormatError> {
        // Spans by the index's own rules; the rest is checked where it is used, by `merge`.
        let windows =
            self.layer.spans.iter().filter_map(|s| s.window).map(|w| w.offset + u64::from(w.len)).max();
        LayerIndex { layers: vec![self.layer.clone()], windows: windows.map(|size| (self.layer.blob, size)) }
            .validate()
    }
}

// The decoder counts the whole vector against its limit before it reads the first element.
const _: () = assert!(ENTRIES_MAX * size_of::<Entry>() < tdfs_common::envelope::LIMIT);
const _: () = assert!(INODES_MAX * size_of::<Inode>() < tdfs_common::envelope::LIMIT);

/// An empty directory as unpackers create it where an archive names none: owned by root, 0755, at the epoch.
fn implied_directory() -> Inode {
    Inode {
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: 0,
        mtime_nsec: 0,
        xattrs: vec![],
        body: Body::Directory(vec![]),
    }
}
