//! A second opinion for the tests: reads EROFS by offsets, sharing nothing with the writer, and checks what the kernel
//! relies on.

use std::collections::BTreeMap;
use std::ops::Range;

/// An inode as found on disk.
#[derive(Debug, Clone)]
pub struct Found {
    pub nid: u64,
    pub mode: u16,
    pub size: u64,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
    pub nlink: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub rdev: u32,
    /// Directory or symlink.
    pub bytes: Vec<u8>,
    pub chunks: Chunks,
}

#[derive(Debug, Clone, Default)]
pub struct Chunks {
    bits: u32,
    table: Vec<(u16, u32)>,
}

impl Chunks {
    /// Device and block of a page; `None` for a hole.
    pub fn page(&self, page: u64) -> Option<(u16, u32)> {
        let (device, block) = self.table[(page >> self.bits) as usize];
        let inside = (page & ((1 << self.bits) - 1)) as u32;
        (block != u32::MAX).then(|| (device, block + inside))
    }

    pub fn len(&self) -> usize {
        self.table.len()
    }
}

pub struct Reader<'a> {
    image: &'a [u8],
    pub devices: Vec<u32>,
    pub inodes: u64,
    root: u64,
}

impl<'a> Reader<'a> {
    pub fn open(image: &'a [u8]) -> Self {
        let this = Self { image, devices: vec![], inodes: 0, root: 0 };
        assert_eq!(image.len() % 4096, 0);
        assert_eq!(this.u32(1024), 0xE0F5E1E2);
        assert_eq!(this.u32(1024 + 36) as usize, image.len() / 4096);
        assert_eq!((image[1024 + 12], image[1024 + 13]), (12, 0));
        assert_eq!(this.u32(1024 + 80), 0xC, "chunks and devices");
        let mut block = image[1024..4096].to_vec();
        block[4..8].fill(0);
        let crc = block.iter().fold(u32::MAX, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |c, _| (c >> 1) ^ (0x82F6_3B78 & (c & 1).wrapping_neg()))
        });
        assert_eq!(this.u32(1024 + 4), crc);
        let slots = usize::from(this.u16(1024 + 88)) * 128;
        let devices = (0..usize::from(this.u16(1024 + 86))).map(|n| this.u32(slots + 128 * n + 64)).collect();
        let (inodes, root) = (this.u64(1024 + 16), this.u16(1024 + 14).into());
        Self { devices, inodes, root, ..this }
    }

    /// All inodes by their paths.
    pub fn walk(&self) -> BTreeMap<Vec<u8>, Found> {
        let mut found = BTreeMap::new();
        let mut used = BTreeMap::new();
        let mut stack = vec![(Vec::new(), self.root, self.root)];
        while let Some((path, nid, parent)) = stack.pop() {
            let inode = self.inode(nid, &mut used);
            if inode.mode & 0o170_000 == 0o040_000 {
                for (name, child, kind) in entries(&inode.bytes) {
                    match name.as_slice() {
                        b"." => assert_eq!((child, kind), (nid, 2)),
                        b".." => assert_eq!((child, kind), (parent, 2)),
                        _ => {
                            let mode = self.u16(child as usize * 32 + 4);
                            let type_of = [0, 5, 3, 0, 2, 0, 4, 0, 1, 0, 7, 0, 6][usize::from(mode >> 12)];
                            assert_eq!(kind, type_of);
                            stack.push(([&path[..], b"/", &name].concat(), child, nid));
                        }
                    }
                }
            }
            found.insert(path, inode);
        }
        let mut end = 4096;
        for range in used.into_values() {
            assert!(range.start >= end, "{range:?} overlaps what ends at {end}");
            end = range.end;
        }
        assert!(end <= self.image.len());
        found
    }

    fn inode(&self, nid: u64, used: &mut BTreeMap<usize, Range<usize>>) -> Found {
        let at = nid as usize * 32;
        let format = self.u16(at);
        assert_eq!(format & 1, 1, "extended");
        let (mode, size) = (self.u16(at + 4), self.u64(at + 8));
        let union = self.u32(at + 16);
        let count = usize::from(self.u16(at + 2));
        let xattr_len = if count == 0 { 0 } else { 12 + 4 * (count - 1) };
        let body = at + 64 + xattr_len;
        let mut own = at..body;
        let (mut bytes, mut chunks, mut rdev) = (Vec::new(), Chunks::default(), 0);
        match (format >> 1, mode & 0o170_000) {
            (4, 0o100_000) => {
                assert_eq!(union & !0x1f, 0x20, "indexes");
                let table = body.next_multiple_of(8);
                chunks.bits = union & 0x1f;
                let pages = size.div_ceil(4096);
                let len = pages.div_ceil(1 << chunks.bits) as usize;
                for entry in (table..).step_by(8).take(len) {
                    let (device, block) = (self.u16(entry + 2), self.u32(entry + 4));
                    assert!(block == u32::MAX || (1..=self.devices.len()).contains(&device.into()));
                    chunks.table.push((device, block));
                }
                own.end = table + 8 * len;
                let last = chunks.page(pages - 1);
                assert!(last.is_none_or(|(d, b)| b < self.devices[usize::from(d) - 1]), "past the device");
            }
            (0, 0o040_000 | 0o120_000) => {
                let start = union as usize * 4096;
                bytes = self.image[start..start + size as usize].to_vec();
                used.insert(start, start..start + bytes.len().next_multiple_of(4096));
            }
            (2, 0o040_000 | 0o120_000) => {
                let (start, tail) = (union as usize * 4096, (size % 4096) as usize);
                let whole = size as usize - tail;
                bytes = [&self.image[start..start + whole], &self.image[body..body + tail]].concat();
                if whole > 0 {
                    used.insert(start, start..start + whole);
                }
                own.end = body + tail;
                assert_eq!(at / 4096, (own.end - 1) / 4096, "inline data across blocks");
            }
            (0, 0o100_000) => assert_eq!(size, 0),
            (0, _) => rdev = union,
            other => panic!("layout and type {other:?}"),
        }
        used.insert(own.start, own);
        Found {
            nid,
            mode,
            size,
            uid: self.u32(at + 24),
            gid: self.u32(at + 28),
            mtime: self.u64(at + 32) as i64,
            mtime_nsec: self.u32(at + 40),
            nlink: self.u32(at + 44),
            xattrs: if xattr_len == 0 { BTreeMap::new() } else { self.xattrs(at + 64 + 12..body) },
            rdev,
            bytes,
            chunks,
        }
    }

    fn xattrs(&self, mut range: Range<usize>) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut all = BTreeMap::new();
        while !range.is_empty() {
            let at = range.start;
            let (name, value) = (usize::from(self.image[at]), usize::from(self.u16(at + 2)));
            let prefix = [
                "",
                "user.",
                "system.posix_acl_access",
                "system.posix_acl_default",
                "trusted.",
                "",
                "security.",
            ][usize::from(self.image[at + 1])];
            let full = [prefix.as_bytes(), &self.image[at + 4..at + 4 + name]].concat();
            all.insert(full, self.image[at + 4 + name..at + 4 + name + value].to_vec());
            range.start = at + (4 + name + value).next_multiple_of(4);
        }
        assert_eq!(range.start, range.end);
        all
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.image[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.image[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.image[at..at + 8].try_into().unwrap())
    }
}

/// Names, nids and types of a directory, whose order the kernel's binary search needs.
fn entries(bytes: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
    let mut all: Vec<(Vec<u8>, u64, u8)> = Vec::new();
    for (n, block) in bytes.chunks(4096).enumerate() {
        let last_block = (n + 1) * 4096 >= bytes.len();
        let u16_at = |at: usize| usize::from(u16::from_le_bytes(block[at..at + 2].try_into().unwrap()));
        let count = u16_at(8) / 12;
        assert_eq!(u16_at(8) % 12, 0);
        for entry in 0..count {
            let start = u16_at(12 * entry + 8);
            let end = if entry + 1 < count { u16_at(12 * (entry + 1) + 8) } else { block.len() };
            let mut name = &block[start..end];
            if entry + 1 == count && !last_block {
                name = name.split(|b| *b == 0).next().unwrap();
            }
            let nid = u64::from_le_bytes(block[12 * entry..12 * entry + 8].try_into().unwrap());
            all.push((name.to_vec(), nid, block[12 * entry + 10]));
        }
    }
    assert!(all.is_sorted_by(|a, b| a.0 < b.0), "names out of order");
    all
}
