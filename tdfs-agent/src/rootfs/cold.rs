//! The cold device: the blocks behind everything that is not hot, read from the image's layers on demand.
//!
//! Its address space is computed, not stored: every regular file has a region of whole blocks, in inode order. A read
//! of the device becomes reads of layers; zeros are made up only where the tree says so, in holes and behind the
//! last byte of a file. Where a hot page was awaited when the image was mounted, its place here is read
//! from the zone, once it has arrived there.
//!
//! ```text
//! blocks  | file of inode 3      |pad| file of inode 7 ... |pad| ...
//!           extent  hole  extent         awaited   extent
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use tdfs_common::page::{self, PAGE_SIZE};
use tdfs_common::tree::{Body, Extent, Tree};
use tokio::sync::{OnceCell, Semaphore};

use super::awaited::{Awaited, WaitStats};
use super::reads::{Read, ReadLog};

/// Reads that may hold data at a time: 64 MiB.
const READS_MAX: usize = 64;

/// Where cold bytes come from: the image's layers, uncompressed.
pub trait ColdSource: Send + Sync + 'static {
    /// Exactly `len` verified bytes of `layer` at `offset`, or the errno that readers get. Must end some day: a reader
    /// in the kernel waits for it and cannot be killed meanwhile. Must not block: the first poll is on the thread that
    /// takes all requests.
    fn read(&self, layer: u32, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, i32>>;
}

/// An image whose files nobody has needed so far.
pub trait ColdImage: Send + Sync + 'static {
    /// Its tree and layers, or the errno that readers get. Asked for at the first cold read and, if that fails, at the
    /// next. Must not block, and must end some day.
    fn open(&self) -> BoxFuture<'_, Result<ColdFiles, i32>>;
}

/// What the files of an image are, and where their bytes come from.
pub type ColdFiles = (Arc<Tree>, Arc<dyn ColdSource>);

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

    /// First block and inode of every file that is not empty, ascending in both.
    pub fn starts(&self) -> impl Iterator<Item = (u32, u32)> {
        self.regions.iter().copied()
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
    Layer {
        layer: u32,
        offset: u64,
        len: usize,
    },
    /// Of the zone file.
    Awaited {
        offset: u64,
        len: usize,
    },
    Zeros(usize),
}

impl Piece {
    fn len(&self) -> usize {
        match *self {
            Self::Layer { len, .. } | Self::Awaited { len, .. } | Self::Zeros(len) => len,
        }
    }
}

/// How much was read through the cold device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ColdStats {
    /// Pages, without awaited ones.
    pub cold_pages: u64,
    /// Reads of the kernel, of up to 256 pages, for any of them.
    pub cold_requests: u64,
}

/// The cold device of one image.
pub struct ColdDevice {
    blocks: u32,
    files: OnceCell<Files>,
    /// Where the files come from when they are needed.
    image: Option<Arc<dyn ColdImage>>,
    awaited: Option<Awaited>,
    slots: Semaphore,
    pages: AtomicU64,
    requests: AtomicU64,
    log: OnceLock<Arc<ReadLog>>,
}

/// What the device is made of.
struct Files {
    tree: Arc<Tree>,
    map: ColdMap,
    source: Arc<dyn ColdSource>,
}

impl ColdDevice {
    /// The device over `tree`, with the map of the same tree.
    pub fn new(tree: Arc<Tree>, map: ColdMap, source: Arc<dyn ColdSource>, awaited: Option<Awaited>) -> Self {
        let blocks = map.blocks;
        Self::with(blocks, OnceCell::new_with(Some(Files { tree, map, source })), None, awaited)
    }

    /// The device of `blocks` blocks over an image that is opened at the first read.
    pub fn late(blocks: u32, image: Arc<dyn ColdImage>) -> Self {
        Self::with(blocks, OnceCell::new(), Some(image), None)
    }

    fn with(
        blocks: u32,
        files: OnceCell<Files>,
        image: Option<Arc<dyn ColdImage>>,
        awaited: Option<Awaited>,
    ) -> Self {
        let slots = Semaphore::new(READS_MAX);
        let (pages, requests, log) = Default::default();
        Self { blocks, files, image, awaited, slots, pages, requests, log }
    }

    async fn files(&self) -> Result<&Files, i32> {
        let open = || async {
            let (tree, source) = self.image.as_ref().ok_or(libc::EIO)?.open().await?;
            let map = ColdMap::new(&tree).filter(|map| map.blocks == self.blocks).ok_or(libc::EIO)?;
            Ok(Files { tree, map, source })
        };
        self.files.get_or_try_init(open).await
    }

    /// Logs reads from now on; the first log stays.
    pub fn log_reads(&self, log: Arc<ReadLog>) {
        let _ = self.log.set(log);
    }

    /// Bytes of the device.
    pub fn size(&self) -> u64 {
        u64::from(self.blocks) * PAGE_SIZE as u64
    }

    /// What was read so far.
    pub fn stats(&self) -> ColdStats {
        ColdStats {
            cold_pages: self.pages.load(Ordering::Relaxed),
            cold_requests: self.requests.load(Ordering::Relaxed),
        }
    }

    /// How long reads waited for awaited pages so far.
    pub fn wait_stats(&self) -> WaitStats {
        self.awaited.as_ref().map(Awaited::stats).unwrap_or_default()
    }

    /// Exactly `len` bytes at `offset`, or an errno: the kernel takes what a short answer lacks for zeros. Any number of
    /// reads may wait for awaited pages at a time, and a few may hold data.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, i32> {
        let files = self.files().await?;
        let pieces = self.pieces(files, offset, len).ok_or(libc::EIO)?;
        let hot = |piece: &&Piece| matches!(piece, Piece::Awaited { .. });
        let cold = len - pieces.iter().filter(hot).map(Piece::len).sum::<usize>();
        if cold > 0 {
            self.requests.fetch_add(1, Ordering::Relaxed);
            self.pages.fetch_add(page::count(cold as u64), Ordering::Relaxed);
        }
        if let Some(awaited) = self.awaited.as_ref().filter(|_| cold < len) {
            let parts = pieces.iter().filter_map(|piece| match *piece {
                Piece::Awaited { offset, len } => Some(offset..offset + len as u64),
                _ => None,
            });
            let (waited, arrived) = awaited.wait(parts).await;
            if let (Some(log), Some(waited)) = (self.log.get(), waited) {
                let error = arrived.err();
                log.add_wait(files.logged(offset, waited.begin, waited.took, waited.pages, error));
            }
            arrived?;
        }
        let Some(log) = self.log.get().filter(|_| cold > 0) else {
            return self.gather(files, &pieces, len).await;
        };
        let begin = Instant::now();
        let bytes = self.gather(files, &pieces, len).await;
        let error = bytes.as_ref().err().copied();
        log.add_cold(files.logged(offset, begin, begin.elapsed(), page::count(cold as u64), error));
        bytes
    }

    async fn gather(&self, files: &Files, pieces: &[Piece], len: usize) -> Result<Bytes, i32> {
        // The semaphore is never closed.
        let _slot = self.slots.acquire().await.ok();
        if let [Piece::Layer { layer, offset, len }] = *pieces {
            return files.layer(layer, offset, len).await;
        }
        let mut bytes = BytesMut::zeroed(len);
        let mut rest = &mut bytes[..];
        for piece in pieces {
            let (part, behind) = rest.split_at_mut_checked(piece.len()).ok_or(libc::EIO)?;
            match (piece, &self.awaited) {
                (&Piece::Layer { layer, offset, len }, _) => {
                    part.copy_from_slice(&files.layer(layer, offset, len).await?);
                }
                (Piece::Awaited { offset, .. }, Some(awaited)) => awaited.read(*offset, part).await?,
                (Piece::Awaited { .. }, None) => return Err(libc::EIO),
                (Piece::Zeros(_), _) => {}
            }
            rest = behind;
        }
        if rest.is_empty() { Ok(bytes.freeze()) } else { Err(libc::EIO) }
    }

    /// What `len` bytes at `offset` consist of; `None` if they are not all on the device.
    fn pieces(&self, files: &Files, offset: u64, len: usize) -> Option<Vec<Piece>> {
        let end = offset.checked_add(len as u64).filter(|end| *end <= self.size())?;
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < end {
            let (ino, _) = files.map.locate((at / PAGE_SIZE as u64) as u32)?;
            let Body::Regular { size, extents, .. } = &files.tree.inodes[ino as usize].body else {
                return None;
            };
            let start = u64::from(files.map.start_of(ino)?) * PAGE_SIZE as u64;
            let region_end = start + page::count(*size) * PAGE_SIZE as u64;
            let stop = end.min(region_end);
            let mut from = at - start;
            let part = from..stop - start;
            let awaited = self.awaited.iter().flat_map(|a| a.within(ino, part.clone()));
            for (bytes, zone_offset) in awaited {
                file_pieces(extents, from, bytes.start, &mut pieces);
                let len = (bytes.end - bytes.start) as usize;
                pieces.push(Piece::Awaited { offset: zone_offset, len });
                from = bytes.end;
            }
            file_pieces(extents, from, part.end, &mut pieces);
            at = stop;
        }
        Some(pieces)
    }
}

impl Files {
    async fn layer(&self, layer: u32, offset: u64, len: usize) -> Result<Bytes, i32> {
        let bytes = self.source.read(layer, offset, len).await?;
        if bytes.len() == len { Ok(bytes) } else { Err(libc::EIO) }
    }

    /// For the log: a read at `offset`.
    fn logged(&self, offset: u64, begin: Instant, took: Duration, pages: u64, error: Option<i32>) -> Read {
        let (ino, page) = self.map.locate((offset / PAGE_SIZE as u64) as u32).unwrap_or_default();
        Read { begin, took, ino, page, pages, error }
    }
}

/// Appends what bytes `at..end` of a file consist of.
fn file_pieces(extents: &[Extent], mut at: u64, end: u64, pieces: &mut Vec<Piece>) {
    if at >= end {
        return;
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tdfs_common::digest::ContentHash;
    use tdfs_common::tree::{DirEntry, Inode};

    /// A source whose every byte tells its layer and offset.
    struct Pattern;

    fn pattern(layer: u32, offset: u64) -> u8 {
        (1 + (u64::from(layer) * 101 + offset * 7 + offset / 251) % 255) as u8
    }

    impl ColdSource for Pattern {
        fn read(&self, layer: u32, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, i32>> {
            Box::pin(async move {
                match layer {
                    9 => Err(libc::ENETDOWN),
                    8 => Ok(Bytes::from_static(b"short")),
                    _ => Ok((offset..offset + len as u64).map(|o| pattern(layer, o)).collect()),
                }
            })
        }
    }

    fn tree(files: Vec<(u64, Vec<Extent>)>) -> Tree {
        let inode = |body| Inode { mode: 0, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: vec![], body };
        let names = (1..=files.len() as u32).map(|ino| DirEntry { name: ino.to_string().into_bytes(), ino });
        let mut inodes = vec![inode(Body::Directory(names.collect()))];
        inodes.extend(
            files
                .into_iter()
                .map(|(size, extents)| inode(Body::Regular { size, content: ContentHash::of(b""), extents })),
        );
        Tree { inodes, layer_sizes: vec![] }
    }

    fn extent(file_offset: u64, len: u64, layer: u32, layer_offset: u64) -> Extent {
        Extent { file_offset, len, layer, layer_offset }
    }

    fn device(files: Vec<(u64, Vec<Extent>)>) -> ColdDevice {
        let tree = Arc::new(tree(files));
        let map = ColdMap::new(&tree).unwrap();
        ColdDevice::new(tree, map, Arc::new(Pattern), None)
    }

    fn read(device: &ColdDevice, offset: u64, len: usize) -> Result<Bytes, i32> {
        futures_util::FutureExt::now_or_never(device.read(offset, len)).unwrap()
    }

    #[test]
    fn every_file_has_whole_blocks_in_inode_order() {
        let map =
            ColdMap::new(&tree(vec![(1, vec![]), (0, vec![]), (8192, vec![]), (8193, vec![])])).unwrap();
        assert_eq!(map.blocks(), 6);
        assert_eq!(
            [0, 1, 2, 3, 4, 5].map(|ino| map.start_of(ino)),
            [None, Some(0), None, Some(1), Some(3), None]
        );
        let found: Vec<_> = (0..7).map(|block| map.locate(block)).collect();
        let file = |ino, page| Some((ino, page));
        assert_eq!(found, [file(1, 0), file(3, 0), file(3, 1), file(4, 0), file(4, 1), file(4, 2), None]);
        assert!(ColdMap::new(&tree(vec![(1 << 44, vec![])])).is_none());
        assert_eq!(ColdMap::new(&tree(vec![])).unwrap().locate(0), None);
    }

    #[test]
    fn reads_outside_the_device_fail() {
        let device = device(vec![(5000, vec![extent(0, 5000, 0, 0)])]);
        assert_eq!(device.size(), 8192);
        assert!(read(&device, 0, 8192).is_ok());
        for (offset, len) in
            [(0, 8193), (8192, 1), (4096, 4097), (u64::MAX, 2), (u64::MAX - 4095, 4096), (1 << 60, 4096)]
        {
            assert_eq!(read(&device, offset, len), Err(libc::EIO), "{offset} {len}");
        }
    }

    #[test]
    fn failing_and_short_sources_are_errors() {
        let failing = |layer| device(vec![(9000, vec![extent(0, 4096, 1, 0), extent(5000, 4000, layer, 0)])]);
        assert!(read(&failing(2), 0, 12288).is_ok());
        assert_eq!(read(&failing(9), 0, 12288), Err(libc::ENETDOWN));
        assert_eq!(read(&failing(8), 0, 12288), Err(libc::EIO));
        assert_eq!(read(&failing(8), 8192, 808), Err(libc::EIO));
        assert!(read(&failing(9), 0, 4096).is_ok());
    }

    #[test]
    fn what_is_read_is_counted() {
        let device = device(vec![(9000, vec![extent(0, 9000, 1, 0)])]);
        read(&device, 0, 4096).unwrap();
        read(&device, 4096, 8192).unwrap();
        assert_eq!(device.stats(), ColdStats { cold_pages: 3, cold_requests: 2 });
    }

    proptest! {
        #[test]
        fn reads_equal_the_whole_device(
            files in prop::collection::vec((0u64..9000, prop::collection::vec((0u64..3000, 1u64..6000, 0u32..3), 0..5)), 0..6),
            at: prop::sample::Index, len in 0usize..30_000,
        ) {
            let mut whole = Vec::new();
            let mut model = Vec::new();
            for (mut size, parts) in files {
                let mut bytes = Vec::new();
                let mut extents = Vec::new();
                for (gap, len, layer) in parts {
                    let (start, from) = (bytes.len() as u64 + gap, gap * 13);
                    bytes.resize(start as usize, 0);
                    bytes.extend((from..from + len).map(|o| pattern(layer, o)));
                    extents.push(extent(start, len, layer, from));
                }
                size += bytes.len() as u64;
                bytes.resize((size as usize).next_multiple_of(PAGE_SIZE), 0);
                whole.extend(bytes);
                model.push((size, extents));
            }
            let device = device(model);
            prop_assert_eq!(device.size(), whole.len() as u64);
            let at = at.index(whole.len() + 1);
            let len = len.min(whole.len() - at);
            prop_assert_eq!(read(&device, at as u64, len).unwrap(), &whole[at..at + len]);
        }
    }
}
