//! Writes EROFS metadata from a tree: one pass gives every inode its place, a second fills one zeroed buffer.
//!
//! No file content goes in. Hot runs become chunks on the zone device, the rest of a file chunks on the cold device,
//! where every file has a region of its own ([`ColdMap`]). The chunk size of a file is the largest that its runs allow,
//! so a file that is all cold, or hot in one piece, needs one chunk. A file without any data is one hole.

use std::ops::Range;

use tdfs_common::page;
use tdfs_common::runtime_image::Run;
use tdfs_common::tree::{Body, DirEntry, Inode, Tree};
use zerocopy::IntoBytes;

use super::format::{self, BLOCK, CHUNK_BITS_MAX, NULL_BLOCK, SLOT};
use crate::rootfs::cold::ColdMap;

/// Largest metadata of an image, bytes.
const METADATA_MAX: u64 = 2 << 30;
/// A file that needs more chunks (64 GiB partly hot) is served cold as a whole.
const CHUNKS_MAX: u64 = 1 << 24;
/// Bytes of attributes that an inode can count, with header.
const XATTRS_MAX: usize = size_of::<format::XattrHeader>() + 4 * (u16::MAX as usize - 1);

/// Metadata of one image.
#[derive(Debug)]
pub struct Metadata {
    /// The file for the kernel, whole blocks.
    pub image: Vec<u8>,
    /// By inode of the tree, ascending; the kernel's inode numbers.
    pub nids: Vec<u64>,
    /// What the blocks of the cold device are.
    pub cold: ColdMap,
}

/// The tree or its hot runs cannot be said in EROFS.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// Attributes of one inode.
    #[error("{path}: more than 256 KiB of attributes")]
    Xattrs {
        /// In the image.
        path: String,
    },
    /// Cold device.
    #[error("the image's files are larger than 16 TiB together")]
    Content,
    /// Metadata.
    #[error("the image needs more than 2 GiB of file system metadata")]
    Metadata,
    /// A hot run that does not fit the tree or the zone.
    #[error("hot pages {first}..{end} of inode {ino} {reason}")]
    Run {
        /// Inode.
        ino: u32,
        /// First page.
        first: u32,
        /// Page after the last.
        end: u64,
        /// Why.
        reason: &'static str,
    },
}

/// Metadata for `tree` (validated), with `hot` pages on a zone of `zone_pages`. Without hot pages the cold device
/// is the only one; else it is the second. No page of a file may be hot twice.
pub fn write(tree: &Tree, hot: &[Run], zone_pages: u64) -> Result<Metadata, ErofsError> {
    let runs = check_runs(tree, hot, zone_pages)?;
    let cold = ColdMap::new(tree).filter(|c| c.blocks() < NULL_BLOCK).ok_or(ErofsError::Content)?;
    let devices = if runs.is_empty() { vec![cold.blocks()] } else { vec![zone_pages as u32, cold.blocks()] };
    let layout = Layout::of(tree, &runs, &cold, devices.len() as u16)?;

    let mut image = vec![0; layout.blocks as usize * BLOCK];
    let links = tree.link_counts();
    for (ino, inode) in tree.inodes.iter().enumerate() {
        layout.write_inode(&mut image, tree, ino, inode, links[ino]);
    }
    let nids: Vec<u64> = layout.places.iter().map(|p| p.offset / SLOT as u64).collect();
    write_super(&mut image, &nids, &devices);
    Ok(Metadata { image, nids, cold })
}

/// `runs` by inode and page, if they fit the tree and a zone of `zone_pages`.
pub fn check_runs(tree: &Tree, runs: &[Run], zone_pages: u64) -> Result<Vec<Run>, ErofsError> {
    let mut runs = runs.to_vec();
    runs.sort_unstable_by_key(|r| (r.ino, r.file_page));
    let mut before: Option<&Run> = None;
    for run in &runs {
        let end = u64::from(run.file_page) + u64::from(run.count);
        let fail = |reason| Err(ErofsError::Run { ino: run.ino, first: run.file_page, end, reason });
        let Some(Body::Regular { size, .. }) = tree.inodes.get(run.ino as usize).map(|i| &i.body) else {
            return fail("are not of a regular file");
        };
        if run.count == 0 || end > page::count(*size) {
            return fail("lie past its end");
        }
        if u64::from(run.zone_page) + u64::from(run.count) > zone_pages.min(u64::from(NULL_BLOCK)) {
            return fail("lie past the end of the zone");
        }
        let overlap = |b: &Run| {
            b.ino == run.ino && u64::from(b.file_page) + u64::from(b.count) > u64::from(run.file_page)
        };
        if before.is_some_and(overlap) {
            return fail("are hot twice");
        }
        before = Some(run);
    }
    Ok(runs)
}

/// Consecutive pages of a file on consecutive blocks of a device.
#[derive(Clone, Copy)]
struct Segment {
    page: u64,
    device: u16,
    block: u32,
}

/// A regular file: segments in order, all starting at multiples of the chunk size.
struct Chunks {
    /// Of those of all files.
    segments: Range<usize>,
    bits: u32,
    count: u64,
}

impl Chunks {
    /// Puts its segments behind `all`. `runs` are the file's own; `cold` is where its cold pages start, `None` if it has
    /// no data at all.
    fn of(all: &mut Vec<Segment>, runs: &[Run], pages: u64, cold: Option<(u16, u32)>) -> Self {
        let cold_at = |page: u64| match cold {
            Some((device, block)) => Segment { page, device, block: block + page as u32 },
            None => Segment { page, device: 0, block: NULL_BLOCK },
        };
        let first = all.len();
        let mut at = 0;
        for run in runs {
            let page = u64::from(run.file_page);
            if page > at {
                all.push(cold_at(at));
            }
            let goes_on = all[first..].last().is_some_and(|s| {
                page == at
                    && s.device == 1
                    && u64::from(s.block) + (page - s.page) == u64::from(run.zone_page)
            });
            if !goes_on {
                all.push(Segment { page, device: 1, block: run.zone_page });
            }
            at = page + u64::from(run.count);
        }
        if at < pages {
            all.push(cold_at(at));
        }
        let starts = all[first..].iter().fold(0, |starts, s| starts | s.page);
        let bits = if starts == 0 { pages.next_power_of_two().ilog2() } else { starts.trailing_zeros() };
        let bits = bits.min(CHUNK_BITS_MAX);
        let count = pages.div_ceil(1 << bits);
        if count > CHUNKS_MAX && !runs.is_empty() {
            all.truncate(first);
            return Self::of(all, &[], pages, cold);
        }
        Self { segments: first..all.len(), bits, count }
    }

    fn write(&self, all: &[Segment], table: &mut [u8]) {
        let mut following = all[self.segments.clone()].iter().copied().peekable();
        let mut segment = Segment { page: 0, device: 0, block: NULL_BLOCK };
        for (n, slot) in table.chunks_exact_mut(size_of::<format::ChunkIndex>()).enumerate() {
            let page = (n as u64) << self.bits;
            if let Some(next) = following.next_if(|s| s.page == page) {
                segment = next;
            }
            let hole = segment.block == NULL_BLOCK;
            let block = if hole { NULL_BLOCK } else { segment.block + (page - segment.page) as u32 };
            let (device, block) = (segment.device.into(), block.into());
            slot.copy_from_slice(format::ChunkIndex { block_high: 0.into(), device, block }.as_bytes());
        }
    }
}

/// How an inode's content is stored.
enum Content {
    /// Nothing but the device number, if it is a device.
    None(u32),
    /// A directory or symlink: `blocks` whole blocks from `first`, then `inline` bytes behind the attributes.
    Bytes { first: u32, blocks: u32, inline: u32 },
    /// A regular file.
    Chunks(Chunks),
}

/// Where an inode goes.
struct Place {
    offset: u64,
    xattr_len: u32,
    size: u64,
    content: Content,
}

struct Layout {
    places: Vec<Place>,
    segments: Vec<Segment>,
    parents: Vec<u32>,
    blocks: u32,
}

impl Layout {
    /// `runs` sorted by inode and page.
    fn of(tree: &Tree, mut runs: &[Run], cold: &ColdMap, cold_device: u16) -> Result<Self, ErofsError> {
        let mut places = Vec::with_capacity(tree.inodes.len());
        let mut segments = Vec::with_capacity(tree.inodes.len() + 2 * runs.len());
        let mut cold = cold.starts().peekable();
        let mut parents = vec![0u32; tree.inodes.len()];
        let mut at = BLOCK as u64;
        let mut far_blocks = 0u64;
        for (ino, inode) in tree.inodes.iter().enumerate() {
            let own = runs.partition_point(|r| r.ino as usize == ino);
            let (of_file, rest) = runs.split_at(own);
            runs = rest;
            let xattr_len = xattr_len(inode);
            if xattr_len > XATTRS_MAX {
                let path = String::from_utf8_lossy(&tree.paths()[ino]).into_owned();
                return Err(ErofsError::Xattrs { path });
            }
            let head = size_of::<format::Inode>() + xattr_len;
            let size = match &inode.body {
                Body::Directory(entries) => {
                    for entry in entries {
                        if matches!(tree.inodes[entry.ino as usize].body, Body::Directory(_)) {
                            parents[entry.ino as usize] = ino as u32;
                        }
                    }
                    Names::of(entries, ino as u32, 0).size()
                }
                Body::Symlink(target) => target.len() as u64,
                _ => inode.file_size(),
            };
            let mut len = head as u64;
            let content = match &inode.body {
                Body::Directory(_) | Body::Symlink(_) => {
                    let first = far_blocks as u32;
                    let tail = (size % BLOCK as u64) as usize;
                    let inline = if tail != 0 && head + tail <= BLOCK { tail } else { 0 };
                    let blocks = (size - inline as u64).div_ceil(BLOCK as u64) as u32;
                    far_blocks += u64::from(blocks);
                    len += inline as u64;
                    if inline > 0 && at % BLOCK as u64 + len > BLOCK as u64 {
                        at = at.next_multiple_of(BLOCK as u64);
                    }
                    Content::Bytes { first, blocks, inline: inline as u32 }
                }
                Body::Regular { extents, .. } if size > 0 => {
                    let start = cold.next_if(|(_, of)| *of == ino as u32).map(|(block, _)| block);
                    let start = start.filter(|_| !extents.is_empty()).map(|block| (cold_device, block));
                    let chunks = Chunks::of(&mut segments, of_file, page::count(size), start);
                    len = len.next_multiple_of(8) + 8 * chunks.count;
                    Content::Chunks(chunks)
                }
                Body::CharDevice { major, minor } | Body::BlockDevice { major, minor } => {
                    Content::None(format::device_number(*major, *minor))
                }
                Body::Regular { .. } | Body::Fifo | Body::Socket => Content::None(0),
            };
            places.push(Place { offset: at, xattr_len: xattr_len as u32, size, content });
            at = (at + len).next_multiple_of(SLOT as u64);
            if at + far_blocks * BLOCK as u64 > METADATA_MAX {
                return Err(ErofsError::Metadata);
            }
        }
        let first_far = at.div_ceil(BLOCK as u64) as u32;
        for place in &mut places {
            if let Content::Bytes { first, .. } = &mut place.content {
                *first += first_far;
            }
        }
        Ok(Self { places, segments, parents, blocks: first_far + far_blocks as u32 })
    }

    fn write_inode(&self, image: &mut [u8], tree: &Tree, ino: usize, inode: &Inode, links: u32) {
        let place = &self.places[ino];
        let (layout, union) = match &place.content {
            Content::None(device) => (format::LAYOUT_PLAIN, *device),
            Content::Bytes { inline: 0, first, .. } => (format::LAYOUT_PLAIN, *first),
            Content::Bytes { first, .. } => (format::LAYOUT_INLINE, *first),
            Content::Chunks(chunks) => (format::LAYOUT_CHUNKS, format::CHUNK_INDEXES | chunks.bits),
        };
        let xattr_len = place.xattr_len as usize;
        let xattr_count = xattr_len.checked_sub(size_of::<format::XattrHeader>()).map_or(0, |n| n / 4 + 1);
        let head = format::Inode {
            format: (layout << 1 | 1).into(),
            xattr_count: (xattr_count as u16).into(),
            mode: (inode.st_mode() as u16).into(),
            reserved: 0.into(),
            size: place.size.into(),
            union: union.into(),
            ino: (ino as u32 + 1).into(),
            uid: inode.uid.into(),
            gid: inode.gid.into(),
            mtime: (inode.mtime as u64).into(),
            mtime_nsec: inode.mtime_nsec.into(),
            nlink: links.into(),
            reserved2: [0; 16],
        };
        let offset = place.offset as usize;
        let xattrs_at = offset + size_of::<format::Inode>();
        image[offset..xattrs_at].copy_from_slice(head.as_bytes());
        let tail = xattrs_at + xattr_len;
        if xattr_len > 0 {
            write_xattrs(&mut image[xattrs_at..tail], inode);
        }
        match &place.content {
            Content::None(_) => {}
            Content::Chunks(chunks) => {
                let table = tail.next_multiple_of(8);
                chunks.write(&self.segments, &mut image[table..table + 8 * chunks.count as usize]);
            }
            Content::Bytes { first, blocks, inline } => {
                let far = *first as usize * BLOCK;
                let far = far..far + *blocks as usize * BLOCK;
                let tail = tail..tail + *inline as usize;
                match &inode.body {
                    Body::Directory(entries) => {
                        let names = Names::of(entries, ino as u32, self.parents[ino]);
                        self.write_directory(image, tree, &names, far, tail);
                    }
                    Body::Symlink(target) => {
                        let (whole, rest) = target.split_at(target.len() - tail.len());
                        image[far][..whole.len()].copy_from_slice(whole);
                        image[tail].copy_from_slice(rest);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Blocks of `names` in the `far` part of the `image`, the last one in `tail` if that is not empty.
    fn write_directory(
        &self,
        image: &mut [u8],
        tree: &Tree,
        names: &Names<'_>,
        far: Range<usize>,
        tail: Range<usize>,
    ) {
        let mut far = far.step_by(BLOCK);
        for block in names.blocks() {
            // Of the measured size: a directory that grew since would not fit.
            let to = &mut image[far.next().map_or(tail.clone(), |at| at..at + BLOCK)];
            let (mut entry_at, mut name_at) = (0, block.len() * size_of::<format::DirEntry>());
            for Name { name, ino } in block.map(|n| names.get(n)) {
                let entry = format::DirEntry {
                    nid: (self.places[ino as usize].offset / SLOT as u64).into(),
                    name_offset: (name_at as u16).into(),
                    kind: kind(&tree.inodes[ino as usize].body),
                    reserved: 0,
                };
                to[entry_at..entry_at + size_of_val(&entry)].copy_from_slice(entry.as_bytes());
                to[name_at..name_at + name.len()].copy_from_slice(name);
                entry_at += size_of_val(&entry);
                name_at += name.len();
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Name<'a> {
    name: &'a [u8],
    ino: u32,
}

/// The names in a directory, with `.` and `..` where they sort.
struct Names<'a> {
    entries: &'a [DirEntry],
    /// Places of `.` and `..` among all names, and what they stand for.
    dots: [(usize, Name<'a>); 2],
}

impl<'a> Names<'a> {
    fn of(entries: &'a [DirEntry], ino: u32, parent: u32) -> Self {
        let before = |dots: &[u8]| entries.partition_point(|e| e.name.as_slice() < dots);
        let this = (before(b"."), Name { name: b".", ino });
        let parent = (before(b"..") + 1, Name { name: b"..", ino: parent });
        Self { entries, dots: [this, parent] }
    }

    fn len(&self) -> usize {
        self.entries.len() + self.dots.len()
    }

    fn get(&self, n: usize) -> Name<'a> {
        if let Some((_, dots)) = self.dots.iter().find(|(at, _)| *at == n) {
            return *dots;
        }
        let entry = &self.entries[n - self.dots.iter().filter(|(at, _)| *at < n).count()];
        Name { name: &entry.name, ino: entry.ino }
    }

    fn cost(&self, n: usize) -> usize {
        size_of::<format::DirEntry>() + self.get(n).name.len()
    }

    /// Which of them go into each block: at least one, since a name is at most 255 bytes.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let mut used = 0;
            let full = |n: &usize| {
                used += self.cost(*n);
                used > BLOCK
            };
            let end = (from..self.len()).find(full).unwrap_or(self.len());
            let block = from..end;
            from = end;
            (!block.is_empty()).then_some(block)
        })
    }

    /// Bytes of its blocks, the last one only as far as it is used.
    fn size(&self) -> u64 {
        let used = |block: Range<usize>| block.map(|n| self.cost(n)).sum::<usize>() as u64;
        self.blocks().fold(0, |size: u64, block| size.next_multiple_of(BLOCK as u64) + used(block))
    }
}

fn kind(body: &Body) -> u8 {
    match body {
        Body::Regular { .. } => 1,
        Body::Directory(_) => 2,
        Body::CharDevice { .. } => 3,
        Body::BlockDevice { .. } => 4,
        Body::Fifo => 5,
        Body::Socket => 6,
        Body::Symlink(_) => 7,
    }
}

/// Attributes that some Linux file system could hold; unpacking to one drops the others as well.
fn xattrs(inode: &Inode) -> impl Iterator<Item = (u8, &[u8], &[u8])> {
    inode.xattrs.iter().filter_map(|x| {
        let (prefix, name) = format::xattr_prefix(&x.name)?;
        Some((prefix, name, x.value.as_slice()))
    })
}

/// Bytes of an inode's attributes with their header; 0 without any.
fn xattr_len(inode: &Inode) -> usize {
    let entry = |(_, name, value): (u8, &[u8], &[u8])| {
        (size_of::<format::XattrEntry>() + name.len() + value.len()).next_multiple_of(4)
    };
    let entries: usize = xattrs(inode).map(entry).sum();
    if entries == 0 { 0 } else { size_of::<format::XattrHeader>() + entries }
}

fn write_xattrs(mut to: &mut [u8], inode: &Inode) {
    let mut put = |bytes: &[u8], pad_to: usize| {
        let (here, rest) = std::mem::take(&mut to).split_at_mut(pad_to);
        here[..bytes.len()].copy_from_slice(bytes);
        to = rest;
    };
    put(format::XattrHeader::default().as_bytes(), size_of::<format::XattrHeader>());
    for (prefix, name, value) in xattrs(inode) {
        let (name_len, value_len) = (name.len() as u8, (value.len() as u16).into());
        let head = format::XattrEntry { name_len, prefix, value_len };
        let entry = [head.as_bytes(), name, value].concat();
        put(&entry, entry.len().next_multiple_of(4));
    }
}

fn write_super(image: &mut [u8], nids: &[u64], devices: &[u32]) {
    let slots_at = format::SUPER_OFFSET + size_of::<format::SuperBlock>();
    let slot_len = size_of::<format::DeviceSlot>();
    let mut name = [0; 16];
    name[..4].copy_from_slice(b"tdfs");
    let superblock = format::SuperBlock {
        magic: format::MAGIC.into(),
        checksum: 0.into(),
        compat: (format::COMPAT_SB_CHKSUM | format::COMPAT_MTIME).into(),
        block_bits: BLOCK.ilog2() as u8,
        extra_slots: 0,
        root_nid: (nids[0] as u16).into(),
        inodes: (nids.len() as u64).into(),
        build_time: 0.into(),
        build_time_nsec: 0.into(),
        blocks: ((image.len() / BLOCK) as u32).into(),
        meta_block: 0.into(),
        xattr_block: 0.into(),
        uuid: [0; 16],
        name,
        incompat: (format::INCOMPAT_CHUNKED_FILE | format::INCOMPAT_DEVICE_TABLE).into(),
        algorithms: 0.into(),
        devices: (devices.len() as u16).into(),
        devices_at: ((slots_at / slot_len) as u16).into(),
        reserved: [0; 38],
    };
    image[format::SUPER_OFFSET..slots_at].copy_from_slice(superblock.as_bytes());
    for (n, blocks) in devices.iter().enumerate() {
        let blocks = (*blocks).into();
        let slot = format::DeviceSlot { tag: [0; 64], blocks, mapped_block: 0.into(), reserved: [0; 56] };
        let at = slots_at + n * slot_len;
        image[at..at + slot_len].copy_from_slice(slot.as_bytes());
    }
    let checksum = !crc32c::crc32c(&image[format::SUPER_OFFSET..BLOCK]);
    image[format::SUPER_OFFSET + 4..format::SUPER_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
}
