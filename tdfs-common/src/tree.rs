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
/// Longest path, bytes (PATH_MAX - 1).
pub const PATH_MAX: usize = 4095;
/// Bytes of all paths together: a small tree could otherwise stand for terabytes of them.
pub const PATHS_MAX: u64 = 1 << 30;
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
        // Bytes of each directory's path; parents come first.
        let mut path_lens = vec![0usize; self.inodes.len()];
        let mut paths = 0;
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
                        let path = path_lens[n] + usize::from(n > 0) + entry.name.len();
                        paths += path as u64;
                        ok(path <= PATH_MAX && paths <= PATHS_MAX, "paths too long")?;
                        if child.is_some_and(|c| matches!(c.body, Body::Directory(_))) {
                            ok(entry.ino as usize > n, "directory before its parent")?;
                            ok(!named[entry.ino as usize], "directory with two names")?;
                            path_lens[entry.ino as usize] = path;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::envelope::{decode, encode};

    fn inode(body: Body) -> Inode {
        Inode { mode: 0o755, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: vec![], body }
    }

    fn dir(entries: &[(&str, u32)]) -> Inode {
        let entry = |(name, ino): &(&str, u32)| DirEntry { name: name.as_bytes().to_vec(), ino: *ino };
        inode(Body::Directory(entries.iter().map(entry).collect()))
    }

    fn link(target: &str) -> Inode {
        inode(Body::Symlink(target.into()))
    }

    fn file(size: u64, extents: &[(u64, u64, u32, u64)]) -> Inode {
        let extent = |(file_offset, len, layer, layer_offset): &(u64, u64, u32, u64)| Extent {
            file_offset: *file_offset,
            len: *len,
            layer: *layer,
            layer_offset: *layer_offset,
        };
        let extents = extents.iter().map(extent).collect();
        inode(Body::Regular { size, content: ContentHash::of(b""), extents })
    }

    fn tree(inodes: Vec<Inode>) -> Tree {
        Tree { inodes, layer_sizes: vec![10_000] }
    }

    /// `/bin -> usr/bin`, `/loop -> loop`, `/up -> ../../usr`, `/usr/bin/sh`, also as `/usr/bash`.
    fn sample() -> Tree {
        tree(vec![
            dir(&[("bin", 1), ("loop", 2), ("up", 3), ("usr", 4)]),
            link("usr/bin"),
            link("loop"),
            link("../../usr"),
            dir(&[("bash", 6), ("bin", 5)]),
            dir(&[("sh", 6)]),
            file(5000, &[(0, 5000, 0, 512)]),
        ])
    }

    fn refused(tree: &Tree) -> String {
        tree.validate().expect_err("an error").to_string()
    }

    #[test]
    fn paths_links_and_lookups() {
        let tree = sample();
        tree.validate().unwrap();
        let paths: Vec<String> = tree.paths().into_iter().map(|p| String::from_utf8(p).unwrap()).collect();
        assert_eq!(paths, ["", "bin", "loop", "up", "usr", "usr/bin", "usr/bash"]);
        assert_eq!(tree.link_counts(), [3, 1, 1, 1, 3, 2, 2]);
        assert_eq!(tree.lookup(b"/usr/bin/sh"), Some(6));
        assert_eq!(tree.lookup(b"bin/sh"), None);
        for (path, ino) in [
            ("bin/sh", Some(6)),
            ("/up/bin//./sh", Some(6)),
            ("../bin/../bash", Some(6)),
            ("", Some(0)),
            ("loop", None),
            ("usr/none", None),
            ("usr/bash/x", None),
        ] {
            assert_eq!(tree.resolve(path.as_bytes()), ino, "{path}");
        }
    }

    #[test]
    fn rules_of_names() {
        for (inodes, reason) in [
            (vec![], "no root"),
            (vec![link("x")], "no root"),
            (vec![dir(&[("a", 1)])], "name of no inode"),
            (vec![dir(&[("a", 0)])], "name of no inode"),
            (vec![dir(&[]), link("x")], "inode without a name"),
            (vec![dir(&[("b", 1), ("a", 1)]), link("x")], "out of order"),
            (vec![dir(&[("a", 1), ("a", 1)]), link("x")], "out of order"),
            (vec![dir(&[("a", 1), ("b", 1)]), dir(&[])], "two names"),
            (vec![dir(&[]), dir(&[("a", 1)])], "directory before its parent"),
            (vec![dir(&[("a", 2)]), dir(&[]), dir(&[("b", 1)])], "directory before its parent"),
            (vec![dir(&[("", 1)]), link("x")], "bad name"),
            (vec![dir(&[(".", 1)]), link("x")], "bad name"),
            (vec![dir(&[("..", 1)]), link("x")], "bad name"),
            (vec![dir(&[("a/b", 1)]), link("x")], "bad name"),
            (vec![dir(&[("a\0", 1)]), link("x")], "bad name"),
            (vec![dir(&[(&"n".repeat(256), 1)]), link("x")], "bad name"),
            (vec![dir(&[("a", 1)]), link("")], "bad symlink target"),
            (vec![dir(&[("a", 1)]), link(&"t".repeat(4096))], "bad symlink target"),
        ] {
            let message = refused(&tree(inodes));
            assert!(message.contains(reason), "{message}");
        }
    }

    #[test]
    fn rules_of_inodes() {
        let with = |change: &dyn Fn(&mut Inode)| {
            let mut inode = file(10, &[]);
            change(&mut inode);
            tree(vec![dir(&[("a", 1)]), inode])
        };
        let xattr = |name: &[u8], len: usize| Xattr { name: name.to_vec(), value: vec![0; len] };
        with(&|i| i.xattrs = vec![xattr(b"user.a", 65535), xattr(b"user.b", 0)]).validate().unwrap();
        for (bad, reason) in [
            (with(&|i| i.mode = 0o10000), "type bits"),
            (with(&|i| i.mtime_nsec = 1_000_000_000), "nanoseconds"),
            (with(&|i| i.xattrs = vec![xattr(b"b", 0), xattr(b"a", 0)]), "attributes out of order"),
            (with(&|i| i.xattrs = vec![xattr(b"a", 0), xattr(b"a", 0)]), "attributes out of order"),
            (with(&|i| i.xattrs = vec![xattr(b"", 0)]), "bad attribute name"),
            (with(&|i| i.xattrs = vec![xattr(b"a\0", 0)]), "bad attribute name"),
            (with(&|i| i.xattrs = vec![xattr(b"a", 65536)]), "value too long"),
            (with(&|i| i.body = Body::CharDevice { major: 4096, minor: 0 }), "bad device"),
            (with(&|i| i.body = Body::BlockDevice { major: 0, minor: 1 << 20 }), "bad device"),
            (with(&|i| *i = file(FILE_MAX + 1, &[])), "file too large"),
            (with(&|i| *i = file(10, &[(0, 0, 0, 0)])), "extents overlap"),
            (with(&|i| *i = file(10, &[(0, 5, 0, 0), (4, 2, 0, 0)])), "extents overlap"),
            (with(&|i| *i = file(10, &[(5, 6, 0, 0)])), "past the end"),
            (with(&|i| *i = file(10, &[(u64::MAX, 2, 0, 0)])), "past the end"),
            (with(&|i| *i = file(10, &[(0, 5, 1, 0)])), "outside its layer"),
            (with(&|i| *i = file(10, &[(0, 5, 0, 9_996)])), "outside its layer"),
            (with(&|i| *i = file(10, &[(0, 5, 0, u64::MAX)])), "outside its layer"),
        ] {
            let message = refused(&bad);
            assert!(message.contains(reason), "{message}");
        }
    }

    #[test]
    fn a_tree_too_deep_for_paths_is_refused() {
        let deep = |levels: u32| {
            let name = "n".repeat(NAME_MAX);
            let mut inodes: Vec<Inode> = (1..=levels).map(|n| dir(&[(&name, n)])).collect();
            inodes.push(dir(&[]));
            tree(inodes)
        };
        deep(16).validate().unwrap();
        assert!(refused(&deep(17)).contains("paths too long"));
        // Names of one file in a deep directory, over and over.
        let mut wide = deep(15);
        let names = (0..300_000).map(|n| DirEntry { name: format!("{n:06}").into_bytes(), ino: 16 });
        wide.inodes[15].body = Body::Directory(names.collect());
        wide.inodes.push(link("x"));
        wide.inodes.truncate(16);
        wide.inodes.push(link("x"));
        assert!(refused(&wide).contains("paths too long"));
    }

    #[test]
    fn the_largest_tree_decodes() {
        let mut inodes = vec![inode(Body::Directory(Vec::new()))];
        let entries =
            (1..INODES_MAX as u32).map(|ino| DirEntry { name: format!("{ino:07}").into_bytes(), ino });
        inodes[0].body = Body::Directory(entries.collect());
        inodes.resize(INODES_MAX, inode(Body::Fifo));
        let mut largest = tree(inodes);
        let bytes = encode(&largest).unwrap();
        assert_eq!(decode::<Tree>(&bytes).unwrap().inodes.len(), INODES_MAX);
        largest.inodes.push(inode(Body::Fifo));
        assert!(refused(&largest).contains("too many inodes"));
    }

    proptest! {
        #[test]
        fn decoding_survives_flipped_bytes(flips in proptest::collection::vec((0usize..4096, any::<u8>()), 1..4)) {
            // Flips under the compression, where they reach the decoder and the rules.
            let raw = bincode::encode_to_vec(sample(), bincode::config::standard()).unwrap();
            let mut bad = raw;
            let len = bad.len();
            for (at, value) in &flips {
                bad[at % len] ^= value;
            }
            let mut bytes = encode(&sample()).unwrap()[..20].to_vec();
            bytes.extend_from_slice(&(len as u32).to_le_bytes());
            bytes.extend(zstd::bulk::compress(&bad, 1).unwrap());
            if let Ok(tree) = decode::<Tree>(&bytes) {
                prop_assert!(tree.validate().is_ok());
                prop_assert_eq!(tree.paths().len(), tree.inodes.len());
                prop_assert_eq!(tree.link_counts().len(), tree.inodes.len());
                tree.resolve(b"bin/sh");
            }
        }
    }
}
