//! The cold device: the blocks behind everything that is not hot, read from the image's layers on demand.
//!
//! Its address space is computed, not stored: every regular file has a region of whole blocks, in inode order. A read
//! of the device becomes reads of layers; zeros are made up only where the tree says so, in holes and behind the
//! last byte of a file.
//!
//! ```text
//! blocks  | file of inode 3      |pad| file of inode 7 ... |pad| ...
//!           extent  hole  extent
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use tdfs_common::page::{self, PAGE_SIZE};
use tdfs_common::tree::{Body, Extent, Tree};

/// Where cold bytes come from: the image's layers, uncompressed.
pub trait ColdSource: Send + Sync + 'static {
    /// Exactly `len` verified bytes of `layer` at `offset`, or the errno that readers get. Must end some day: a reader
    /// in the kernel waits for it and cannot be killed meanwhile.
    fn read(&self, layer: u32, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, i32>>;
}

/// Which file each block of the cold device belongs to.
#[derive(Debug, Clone)]
pub struct ColdMap {
    /// First block and inode of every file that is not empty, ascending in both.
    regions: Vec<(u32, u32)>,
    blocks: u32,
}

impl ColdMap {
    /// The map of `tree`; `None` if it needs more blocks than block numbers can say.
    pub fn new(tree: &Tree) -> Option<Self> {
        let mut regions = Vec::new();
        let mut blocks = 0u32;
        for (ino, inode) in tree.inodes.iter().enumerate() {
            let pages = page::count(inode.file_size());
            if pages > 0 {
                regions.push((blocks, ino as u32));
                blocks = blocks.checked_add(u32::try_from(pages).ok()?)?;
            }
        }
        Some(Self { regions, blocks })
    }

    /// Blocks of the device.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// First block of a file; `None` for an empty file or no file.
    pub fn start_of(&self, ino: u32) -> Option<u32> {
        let found = self.regions.binary_search_by_key(&ino, |r| r.1).ok()?;
        Some(self.regions[found].0)
    }

    /// Inode and page of the file that `block` belongs to; `None` past the end.
    pub fn locate(&self, block: u32) -> Option<(u32, u32)> {
        if block >= self.blocks {
            return None;
        }
        let (start, ino) = self.regions[self.regions.partition_point(|r| r.0 <= block) - 1];
        Some((ino, block - start))
    }
}

/// A part of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    Layer { layer: u32, offset: u64, len: usize },
    Zeros(usize),
}

/// How much was read through the cold device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ColdStats {
    /// Pages.
    pub cold_pages: u64,
    /// Reads of the kernel, of up to 256 pages.
    pub cold_requests: u64,
}

/// The cold device of one image.
pub struct ColdDevice {
    tree: Arc<Tree>,
    map: ColdMap,
    source: Arc<dyn ColdSource>,
    pages: AtomicU64,
    requests: AtomicU64,
}

impl ColdDevice {
    /// The device over `tree`, with the map of the same tree.
    pub fn new(tree: Arc<Tree>, map: ColdMap, source: Arc<dyn ColdSource>) -> Self {
        Self { tree, map, source, pages: AtomicU64::new(0), requests: AtomicU64::new(0) }
    }

    /// Bytes of the device.
    pub fn size(&self) -> u64 {
        u64::from(self.map.blocks) * PAGE_SIZE as u64
    }

    /// What was read so far.
    pub fn stats(&self) -> ColdStats {
        ColdStats {
            cold_pages: self.pages.load(Ordering::Relaxed),
            cold_requests: self.requests.load(Ordering::Relaxed),
        }
    }

    /// Exactly `len` bytes at `offset`, or an errno: the kernel takes what a short answer lacks for zeros.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, i32> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.pages.fetch_add(page::count(len as u64), Ordering::Relaxed);
        let pieces = self.pieces(offset, len).ok_or(libc::EIO)?;
        if let [Piece::Layer { layer, offset, len }] = pieces[..] {
            return self.read_layer(layer, offset, len).await;
        }
        let mut bytes = BytesMut::with_capacity(len);
        for piece in pieces {
            match piece {
                Piece::Zeros(len) => bytes.resize(bytes.len() + len, 0),
                Piece::Layer { layer, offset, len } => {
                    bytes.extend_from_slice(&self.read_layer(layer, offset, len).await?);
                }
            }
        }
        Ok(bytes.freeze())
    }

    async fn read_layer(&self, layer: u32, offset: u64, len: usize) -> Result<Bytes, i32> {
        let bytes = self.source.read(layer, offset, len).await?;
        if bytes.len() == len { Ok(bytes) } else { Err(libc::EIO) }
    }

    /// What `len` bytes at `offset` consist of; `None` if they are not all on the device.
    fn pieces(&self, offset: u64, len: usize) -> Option<Vec<Piece>> {
        let end = offset.checked_add(len as u64).filter(|end| *end <= self.size())?;
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < end {
            let (ino, _) = self.map.locate((at / PAGE_SIZE as u64) as u32)?;
            let Body::Regular { size, extents, .. } = &self.tree.inodes[ino as usize].body else {
                return None;
            };
            let start = u64::from(self.map.start_of(ino)?) * PAGE_SIZE as u64;
            let region_end = start + page::count(*size) * PAGE_SIZE as u64;
            let stop = end.min(region_end);
            file_pieces(extents, at - start, stop - start, &mut pieces);
            at = stop;
        }
        Some(pieces)
    }
}

/// Appends what bytes `at..end` of a file consist of.
fn file_pieces(extents: &[Extent], mut at: u64, end: u64, pieces: &mut Vec<Piece>) {
    let first = extents.partition_point(|e| e.file_offset + e.len <= at);
    for extent in extents[first..].iter().take_while(|e| e.file_offset < end) {
        if extent.file_offset > at {
            pieces.push(Piece::Zeros((extent.file_offset - at) as usize));
            at = extent.file_offset;
        }
        let inside = at - extent.file_offset;
        let len = (extent.len - inside).min(end - at);
        let offset = extent.layer_offset + inside;
        pieces.push(Piece::Layer { layer: extent.layer, offset, len: len as usize });
        at += len;
    }
    if at < end {
        pieces.push(Piece::Zeros((end - at) as usize));
    }
}
