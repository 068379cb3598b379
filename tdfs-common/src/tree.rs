//! The tree: an image's merged file system, inode metadata and where each file's bytes lie in the layers.
//!
//! Inodes are numbered by their place in [`Tree::inodes`]; 0 is the root, and a directory comes before the
//! directories in it, so that a validated tree has no cycle. Names, targets and attributes are bytes: Linux does
//! not promise UTF-8.

use bincode::{Decode, Encode};

use crate::digest::ContentHash;
use crate::envelope::{Format, FormatError, ensure};

/// Most inodes of one image; a decoder reserves them at once, which has to stay below the envelope's limit.
pub const INODES_MAX: usize = 3 << 19;
/// Longest name, bytes (NAME_MAX).
pub const NAME_MAX: usize = 255;
/// Longest symlink target, bytes (PATH_MAX - 1).
pub const TARGET_MAX: usize = 4095;
/// Largest file, bytes: 2^32 pages, which EROFS block numbers can address.
pub const FILE_MAX: u64 = 1 << 44;

/// An extended attribute with its full name (`security.capability`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub struct Xattr {
    /// Full name.
    pub name: Vec<u8>,
    /// Value.
    pub value: Vec<u8>,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct DirEntry {
    /// One path component.
    pub name: Vec<u8>,
    /// Index into [`Tree::inodes`].
    pub ino: u32,
}

/// Bytes of a file that lie together in one layer; what no extent covers is a hole and reads as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Extent {
    /// Offset in the file, bytes.
    pub file_offset: u64,
    /// Bytes.
    pub len: u64,
    /// Layer, counted from the lowest.
    pub layer: u32,
    /// Offset in the layer's uncompressed tar, bytes.
    pub layer_offset: u64,
}

/// What an inode is, by file type.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Body {
    /// Entries in ascending byte order of their names.
    Directory(Vec<DirEntry>),
    /// A regular file.
    Regular {
        /// Bytes.
        size: u64,
        /// BLAKE3 of the content.
        content: ContentHash,
        /// In ascending order, disjoint, within `size`.
        extents: Vec<Extent>,
    },
    /// The target.
    Symlink(Vec<u8>),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// One inode.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Inode {
    /// Permission bits with setuid, setgid and sticky (`0o7777`).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group owner.
    pub gid: u32,
    /// Modification time, seconds since the epoch.
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
    /// In ascending order of their names.
    pub xattrs: Vec<Xattr>,
    /// The rest.
    pub body: Body,
}

/// The merged file tree of an image.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Tree {
    /// All inodes; 0 is the root directory.
    pub inodes: Vec<Inode>,
    /// Uncompressed bytes of each layer, lowest first: extents lie within.
    pub layer_sizes: Vec<u64>,
}

impl Inode {
    /// The mode as stat(2) gives it, with the file type.
    pub fn st_mode(&self) -> u32 {
        let kind: u32 = match self.body {
            Body::Directory(_) => 0o040_000,
            Body::Regular { .. } => 0o100_000,
            Body::Symlink(_) => 0o120_000,
            Body::CharDevice { .. } => 0o020_000,
            Body::BlockDevice { .. } => 0o060_000,
            Body::Fifo => 0o010_000,
            Body::Socket => 0o140_000,
        };
        kind | u32::from(self.mode)
    }

    /// Bytes of a regular file; 0 for anything else.
    pub fn file_size(&self) -> u64 {
        if let Body::Regular { size, .. } = self.body { size } else { 0 }
    }
}

impl Tree {
    /// Link count of every inode: names for files, 2 plus sub-directories for directories.
    pub fn link_counts(&self) -> Vec<u32> {
        let mut links = vec![0u32; self.inodes.len()];
        for (n, inode) in self.inodes.iter().enumerate() {
            if let Body::Directory(entries) = &inode.body {
                links[n] += 2;
                for entry in entries {
                    let child = &self.inodes[entry.ino as usize];
                    if matches!(child.body, Body::Directory(_)) {
                        links[n] += 1;
                    } else {
                        links[entry.ino as usize] += 1;
                    }
                }
            }
        }
        links
    }

    /// The first path of every inode in a depth-first walk, without a leading slash; the root's is empty.
    pub fn paths(&self) -> Vec<Vec<u8>> {
        let mut paths: Vec<Option<Vec<u8>>> = vec![None; self.inodes.len()];
        paths[0] = Some(Vec::new());
        let mut stack = vec![0u32];
        while let Some(dir) = stack.pop() {
            let Body::Directory(entries) = &self.inodes[dir as usize].body else { continue };
            let base = paths[dir as usize].clone().unwrap_or_default();
            for entry in entries {
                let slot = &mut paths[entry.ino as usize];
                if slot.is_none() {
                    let mut path = base.clone();
                    if !path.is_empty() {
                        path.push(b'/');
                    }
                    path.extend_from_slice(&entry.name);
                    *slot = Some(path);
                    stack.push(entry.ino);
                }
            }
        }
        paths.into_iter().map(Option::unwrap_or_default).collect()
    }

    /// The inode at `path` (a leading slash may be missing), without following symbolic links.
    pub fn lookup(&self, path: &[u8]) -> Option<u32> {
        let mut at = 0u32;
        for name in path.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
            let Body::Directory(entries) = &self.inodes[at as usize].body else { return None };
            let found = entries.binary_search_by(|e| e.name.as_slice().cmp(name)).ok()?;
            at = entries[found].ino;
        }
        Some(at)
    }

    /// The inode at `path`, following symbolic links inside the image; `None` where nothing is or links loop.
    pub fn resolve(&self, path: &[u8]) -> Option<u32> {
        let mut todo: Vec<Vec<u8>> = components(path);
        let mut chain = vec![0u32];
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == b".." {
                if chain.len() > 1 {
                    chain.pop();
                }
                continue;
            }
            let Body::Directory(entries) = &self.inodes[*chain.last()? as usize].body else { return None };
            let found = entries.binary_search_by(|e| e.name.cmp(&name)).ok()?;
            let ino = entries[found].ino;
            if let Body::Symlink(target) = &self.inodes[ino as usize].body {
                links += 1;
                if links > 40 {
                    return None;
                }
                if target.first() == Some(&b'/') {
                    chain.truncate(1);
                }
                todo.extend(components(target));
            } else {
                chain.push(ino);
            }
        }
        chain.last().copied()
    }
}

/// Components of `path`, last first, without empty ones and `.`.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|b| *b == b'/').filter(|n| !n.is_empty() && *n != b".").rev().map(<[u8]>::to_vec).collect()
}

impl Format for Tree {
    const MAGIC: [u8; 8] = *b"TDFSTREE";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = 256 << 20;
    const NAME: &'static str = "tree";

    fn validate(&self) -> Result<(), FormatError> {
        let ok = |c: bool, reason: &str| ensure(c, Self::NAME, || reason.to_owned());
        ok(self.inodes.len() <= INODES_MAX, "too many inodes")?;
        ok(self.layer_sizes.len() <= crate::layer_index::LAYERS_MAX, "too many layers")?;
        let root = self.inodes.first().map(|i| &i.body);
        ok(matches!(root, Some(Body::Directory(_))), "no root directory")?;
        let mut named = vec![false; self.inodes.len()];
        named[0] = true;
        for (n, inode) in self.inodes.iter().enumerate() {
            ok(inode.mode & !0o7777 == 0, "mode has type bits")?;
            ok(inode.mtime_nsec < 1_000_000_000, "nanoseconds past a second")?;
            ok(inode.xattrs.is_sorted_by(|a, b| a.name < b.name), "attributes out of order")?;
            for x in &inode.xattrs {
                ok(!x.name.is_empty() && x.name.len() <= 255 && !x.name.contains(&0), "bad attribute name")?;
                ok(x.value.len() <= 65535, "attribute value too long")?;
            }
            match &inode.body {
                Body::Directory(entries) => {
                    ok(entries.is_sorted_by(|a, b| a.name < b.name), "names out of order")?;
                    for entry in entries {
                        validate_name(&entry.name)?;
                        let child = self.inodes.get(entry.ino as usize);
                        ok(child.is_some() && entry.ino != 0, "name of no inode")?;
                        if child.is_some_and(|c| matches!(c.body, Body::Directory(_))) {
                            ok(entry.ino as usize > n, "directory before its parent")?;
                            ok(!named[entry.ino as usize], "directory with two names")?;
                        }
                        named[entry.ino as usize] = true;
                    }
                }
                Body::Regular { size, extents, .. } => {
                    ok(*size <= FILE_MAX, "file too large")?;
                    let mut at = 0;
                    for e in extents {
                        ok(e.len > 0 && e.file_offset >= at, "extents overlap")?;
                        at = e.file_offset.saturating_add(e.len);
                        ok(at <= *size, "extent past the end of its file")?;
                        let layer = self.layer_sizes.get(e.layer as usize).copied();
                        let end = e.layer_offset.checked_add(e.len);
                        ok(layer.zip(end).is_some_and(|(l, e)| e <= l), "extent outside its layer")?;
                    }
                }
                Body::Symlink(target) => {
                    let good = !target.is_empty() && target.len() <= TARGET_MAX && !target.contains(&0);
                    ok(good, "bad symlink target")?;
                }
                Body::CharDevice { major, minor } | Body::BlockDevice { major, minor } => {
                    ok(*major < 1 << 12 && *minor < 1 << 20, "bad device number")?;
                }
                Body::Fifo | Body::Socket => {}
            }
        }
        ok(named.iter().all(|n| *n), "inode without a name")
    }
}

fn validate_name(name: &[u8]) -> Result<(), FormatError> {
    let bad = name.is_empty() || name.len() > NAME_MAX || name == b"." || name == b"..";
    ensure(!bad && !name.contains(&b'/') && !name.contains(&0), Tree::NAME, || "bad name".into())
}
