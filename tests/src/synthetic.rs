//! A made-up file tree with everything that is easy to get wrong, as a model: what programs must see of it, as a
//! [`Tree`] with its layers, and as a tar.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use sha2::{Digest as _, Sha256};
use tdfs_agent::rootfs::{ColdSource, HotPages};
use tdfs_common::digest::ContentHash;
use tdfs_common::envelope::Format as _;
use tdfs_common::page;
use tdfs_common::runtime_image::Run;
use tdfs_common::tree::{Body, DirEntry, Extent, Inode, Tree, Xattr};

use crate::fingerprint;

/// What lies at a path.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file: bytes, and data at ascending offsets; the rest are holes.
    File(u64, Vec<(u64, Vec<u8>)>),
    /// Another name of the file at this path.
    HardLink(Vec<u8>),
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A character device.
    CharDevice(u32, u32),
    /// A block device.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A socket, which no tar can hold.
    Socket,
}

/// A path of the tree; what a hard link says besides its target is not used.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// By full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The rest.
    pub kind: Kind,
}

/// Pseudo-random numbers that are the same in every run (splitmix64).
pub struct Random(pub u64);

impl Random {
    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// Bytes that do not compress.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.number().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// A file tree by path, without leading slash; the root's path is empty.
#[derive(Clone, Debug)]
pub struct Synthetic {
    entries: BTreeMap<Vec<u8>, Entry>,
    random: u64,
}

impl Synthetic {
    /// Just a root directory.
    #[must_use]
    pub fn empty() -> Self {
        let mut tree = Self { entries: BTreeMap::new(), random: 1 };
        tree.add("", Kind::Directory);
        tree
    }

    /// All kinds of files in all the shapes that have special cases somewhere.
    #[must_use]
    pub fn hostile() -> Self {
        let mut tree = Self::empty();
        tree.add("", Kind::Directory).mode = 0o755;

        tree.add("sizes", Kind::Directory);
        let sizes = [0, 1, 2, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 8193, 12288, 65535, 65536, 65537];
        for size in sizes.into_iter().chain([131_071, 131_072, 131_073, 1_000_000, 1 << 20, (3 << 20) + 5]) {
            tree.add_file(&format!("sizes/{size}"), size);
        }

        tree.add("holes", Kind::Directory);
        let data = |len: usize, byte: u8| vec![byte; len];
        tree.add("holes/all", Kind::File(1 << 20, vec![]));
        tree.add("holes/front", Kind::File(20_000, vec![(12_288, data(7712, 1))]));
        tree.add("holes/back", Kind::File(50_000, vec![(0, data(100, 2))]));
        tree.add(
            "holes/odd",
            Kind::File(60_001, vec![(5, data(3, 3)), (4090, data(12, 4)), (60_000, data(1, 5))]),
        );
        let many = (0..300).map(|n| (n * 9000, data(4096, n as u8))).collect();
        tree.add("holes/many", Kind::File(300 * 9000, many));

        tree.add("names", Kind::Directory);
        let names: [&[u8]; 14] = [
            b"!first",
            b"-",
            b"...",
            b".hidden",
            b"..x",
            b"with blank",
            b"new\nline",
            b"back\\slash",
            b"co:lon,comma",
            b"quote\"'",
            b"\xff\xfe not utf-8",
            "ümläut".as_bytes(),
            b".\x01",
            b"trailing.",
        ];
        for name in names {
            tree.add([b"names/" as &[u8], name].concat(), Kind::File(3, vec![(0, b"abc".to_vec())]));
        }
        tree.add([b"names/" as &[u8], &[b'n'; 255]].concat(), Kind::Fifo);
        let mut deep = b"names/deep".to_vec();
        for _ in 0..12 {
            tree.add(deep.clone(), Kind::Directory);
            deep.push(b'/');
            deep.extend_from_slice(&[b'd'; 200]);
        }

        // Directories around the borders of their blocks: an entry costs 12 bytes and its name.
        tree.add("dirs", Kind::Directory);
        for count in [0, 1, 100, 202, 203, 204, 205, 3000] {
            tree.add(format!("dirs/{count}"), Kind::Directory);
            for n in 0..count {
                tree.add(format!("dirs/{count}/entry-{n:02}"), Kind::Symlink(b"x".to_vec()));
            }
        }
        tree.add("dirs/long", Kind::Directory);
        for n in 0..60 {
            tree.add(format!("dirs/long/{n:0255}"), Kind::Directory);
        }

        tree.add("links", Kind::Directory);
        for len in [1, 59, 60, 61, 1000, 4000, 4031, 4032, 4033, 4094, 4095] {
            tree.add(format!("links/{len}"), Kind::Symlink(vec![b'l'; len]));
        }
        tree.add("links/up", Kind::Symlink(b"../sizes/4097".to_vec()));
        tree.add("links/loop", Kind::Symlink(b"loop".to_vec()));
        tree.add("links/absolute", Kind::Symlink(b"/sizes/1".to_vec()));

        tree.add("hard", Kind::Directory);
        tree.add_file("hard/a", 10_000);
        for name in ["hard/b", "hard/z", "a-first-name", "zz-last-name"] {
            tree.add(name, Kind::HardLink(b"hard/a".to_vec()));
        }
        tree.add("hard/fifo", Kind::Fifo);
        tree.add("hard/fifo2", Kind::HardLink(b"hard/fifo".to_vec()));
        tree.add("hard/link", Kind::Symlink(b"a".to_vec()));
        tree.add("hard/link2", Kind::HardLink(b"hard/link".to_vec()));

        tree.add("special", Kind::Directory);
        tree.add("special/null", Kind::CharDevice(1, 3)).mode = 0o666;
        tree.add("special/whiteout-like", Kind::CharDevice(0, 0)).mode = 0;
        tree.add("special/large", Kind::CharDevice(4095, (1 << 20) - 1));
        tree.add("special/minor", Kind::BlockDevice(8, 257));
        tree.add("special/fifo", Kind::Fifo).mode = 0o622;
        tree.add("special/socket", Kind::Socket);

        tree.add("modes", Kind::Directory);
        for mode in [0, 0o1, 0o644, 0o755, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777] {
            tree.add_file(&format!("modes/file-{mode:o}"), 5).mode = mode;
            tree.add(format!("modes/dir-{mode:o}"), Kind::Directory).mode = mode;
        }
        tree.add("ids", Kind::Directory);
        for id in [0, 1, 65_534, 65_535, 65_536, 1_000_000, (1 << 31) - 1, u32::MAX - 1] {
            let file = tree.add_file(&format!("ids/{id}"), 7);
            (file.uid, file.gid) = (id, id.saturating_sub(1));
        }
        tree.add("times", Kind::Directory);
        for time in [(0, 0), (0, 999_999_999), (1, 1), (-1, 5), (1 << 31, 0), ((1 << 31) - 1, 123_456_789)] {
            tree.add(format!("times/{}.{:09}", time.0, time.1), Kind::Fifo).mtime = time;
        }

        tree.add("xattrs", Kind::Directory);
        let capability = vec![1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        tree.add_file("xattrs/ping", 5000).set("security.capability", capability);
        // Owner rw-, user 1000 r--, group r--, mask r--, others r--.
        let entry = |tag: u16, bits: u16, id: u32| {
            [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let none = u32::MAX;
        let acl =
            [2u32.to_le_bytes().to_vec(), entry(1, 6, none), entry(2, 4, 1000), entry(4, 4, none)].concat();
        let acl = [acl, entry(16, 4, none), entry(32, 4, none)].concat();
        tree.add_file("xattrs/acl", 10).set("system.posix_acl_access", acl.clone()).mode = 0o644;
        tree.add("xattrs/default-acl", Kind::Directory).set("system.posix_acl_default", acl);
        let many = tree.add_file("xattrs/many", 4097);
        for n in 0..40 {
            many.set(&format!("user.n{n}"), vec![n; usize::from(n)]);
        }
        tree.add_file("xattrs/long", 1).set(&format!("user.{}", "n".repeat(250)), vec![7; 1500]);
        tree.add_file("xattrs/empty", 1).set("user.empty", vec![]);
        tree.add("xattrs/link", Kind::Symlink(vec![b'l'; 3000])).set("trusted.link", vec![9; 900]);
        let directory = tree.add("xattrs/directory", Kind::Directory);
        directory.set("trusted.directory", vec![8; 2000]).set("user.directory", b"\0\n".to_vec());
        for n in 0..30 {
            tree.add(format!("xattrs/directory/{n:0100}"), Kind::Fifo);
        }
        tree
    }

    /// Adds a path, or replaces what is there; its directory must exist.
    pub fn add(&mut self, path: impl AsRef<[u8]>, kind: Kind) -> &mut Entry {
        let path = path.as_ref().to_vec();
        let mode = if matches!(kind, Kind::Symlink(_)) { 0o777 } else { 0o755 };
        // Every path its own time, so that two mixed up show.
        let mtime = (1_700_000_000 + self.entries.len() as i64, 1000 + self.entries.len() as u32);
        let entry = Entry { mode, uid: 0, gid: 0, mtime, xattrs: BTreeMap::new(), kind };
        self.entries.insert(path.clone(), entry);
        self.entries.entry(path).or_insert_with(|| unreachable!("just inserted"))
    }

    /// Adds a regular file of `size` bytes that do not compress.
    pub fn add_file(&mut self, path: &str, size: usize) -> &mut Entry {
        self.random += 1;
        let data = if size == 0 { vec![] } else { vec![(0, Random(self.random).bytes(size))] };
        self.add(path, Kind::File(size as u64, data))
    }

    /// Takes a path out; nothing may lie below it or link to it.
    pub fn remove(&mut self, path: &str) {
        self.entries.remove(path.as_bytes());
    }

    /// What lies at a path.
    #[must_use]
    pub fn entries(&self) -> &BTreeMap<Vec<u8>, Entry> {
        &self.entries
    }

    /// The entry behind a path, through a hard link, with its first path.
    fn inode_of<'a>(&'a self, path: &'a [u8]) -> (&'a [u8], &'a Entry) {
        match &self.entries[path].kind {
            Kind::HardLink(target) => (target, &self.entries[target]),
            _ => (path, &self.entries[path]),
        }
    }

    /// The tree, with its files' data in two layers.
    #[must_use]
    pub fn tree(&self) -> (Tree, Layers) {
        let own = |e: &&Vec<u8>| !matches!(self.entries[*e].kind, Kind::HardLink(_));
        let numbers: BTreeMap<&[u8], u32> =
            self.entries.keys().filter(own).zip(0..).map(|(path, ino)| (path.as_slice(), ino)).collect();
        let mut layers = vec![vec![], vec![]];
        let mut inodes: Vec<Inode> =
            numbers.keys().map(|path| inode(&self.entries[*path], &mut layers)).collect();
        for path in self.entries.keys().filter(|p| !p.is_empty()) {
            let slash = path.iter().rposition(|b| *b == b'/');
            let (parent, name) = (&path[..slash.unwrap_or(0)], &path[slash.map_or(0, |s| s + 1)..]);
            let ino = numbers[self.inode_of(path).0];
            if let Body::Directory(entries) = &mut inodes[numbers[parent] as usize].body {
                entries.push(DirEntry { name: name.to_vec(), ino });
            }
        }
        for inode in &mut inodes {
            if let Body::Directory(entries) = &mut inode.body {
                entries.sort_by(|a, b| a.name.cmp(&b.name));
            }
        }
        let tree = Tree { inodes, layer_sizes: layers.iter().map(|l| l.len() as u64).collect() };
        tree.validate().unwrap_or_else(|e| panic!("the synthetic tree is not valid: {e}"));
        (tree, Layers { bytes: layers, failure: AtomicI32::new(0), requests: AtomicU64::new(0) })
    }

    /// What programs must see.
    #[must_use]
    pub fn fingerprint(&self) -> fingerprint::Fingerprint {
        let mut names: BTreeMap<&[u8], Vec<&[u8]>> = BTreeMap::new();
        for path in self.entries.keys() {
            names.entry(self.inode_of(path).0).or_default().push(path);
        }
        // As a walk that sorts by file name meets them: component by component.
        for names in names.values_mut() {
            names.sort_by_key(|p| p.split(|b| *b == b'/').collect::<Vec<_>>());
        }
        let as_path = |p: &[u8]| PathBuf::from(OsStr::from_bytes(p));
        let entries = self.entries.keys().filter(|p| !p.is_empty()).map(|path| {
            let (first, entry) = self.inode_of(path);
            let directory = matches!(entry.kind, Kind::Directory);
            let (content, size) = match &entry.kind {
                Kind::File(size, data) => (Some(sha256(*size, data)), *size),
                Kind::Symlink(target) => (None, target.len() as u64),
                _ => (None, 0),
            };
            let text = |x: (&Vec<u8>, &Vec<u8>)| (String::from_utf8_lossy(x.0).into_owned(), x.1.clone());
            let seen = fingerprint::Entry {
                mode: st_mode(entry),
                uid: entry.uid,
                gid: entry.gid,
                nlink: if directory { 0 } else { names[first].len() as u64 },
                first_name: as_path(names[first][0]),
                mtime: (entry.mtime.0, entry.mtime.1.into()),
                rdev: match entry.kind {
                    Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => {
                        nix::sys::stat::makedev(major.into(), minor.into())
                    }
                    _ => 0,
                },
                xattrs: entry.xattrs.iter().map(text).collect(),
                target: if let Kind::Symlink(target) = &entry.kind { Some(as_path(target)) } else { None },
                size,
                sha256: content,
            };
            (as_path(path), seen)
        });
        entries.collect()
    }

    /// The tree as an uncompressed layer. Sockets are left out, and holes are written as zeros.
    pub fn tar(&self) -> Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        // A link needs its target first.
        let is_link = |e: &Entry| matches!(e.kind, Kind::HardLink(_));
        let (links, others): (Vec<_>, Vec<_>) = self.entries.iter().partition(|(_, e)| is_link(e));
        for (path, entry) in others.into_iter().chain(links) {
            if path.is_empty() || matches!(entry.kind, Kind::Socket) {
                continue;
            }
            let mut header = tar::Header::new_ustar();
            header.set_mode(entry.mode.into());
            header.set_size(0);
            header.set_mtime(entry.mtime.0.max(0) as u64);
            let mut content = Vec::new();
            let mut extensions: Vec<(String, Vec<u8>)> = vec![
                ("path".into(), path.clone()),
                ("mtime".into(), format_time(entry.mtime).into_bytes()),
                ("uid".into(), entry.uid.to_string().into_bytes()),
                ("gid".into(), entry.gid.to_string().into_bytes()),
            ];
            for (name, value) in &entry.xattrs {
                extensions.push((format!("SCHILY.xattr.{}", String::from_utf8_lossy(name)), value.clone()));
            }
            let kind = match &entry.kind {
                Kind::Directory => tar::EntryType::Directory,
                Kind::File(size, data) => {
                    content = bytes_of(*size, data);
                    header.set_size(*size);
                    tar::EntryType::Regular
                }
                Kind::HardLink(target) | Kind::Symlink(target) => {
                    extensions.push(("linkpath".into(), target.clone()));
                    if is_link(entry) { tar::EntryType::Link } else { tar::EntryType::Symlink }
                }
                Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => {
                    header.set_device_major(*major)?;
                    header.set_device_minor(*minor)?;
                    if matches!(entry.kind, Kind::CharDevice(..)) {
                        tar::EntryType::Char
                    } else {
                        tar::EntryType::Block
                    }
                }
                Kind::Fifo => tar::EntryType::Fifo,
                Kind::Socket => continue,
            };
            header.set_entry_type(kind);
            header.set_cksum();
            tar.append_pax_extensions(extensions.iter().map(|(k, v)| (k.as_str(), v.as_slice())))?;
            tar.append(&header, content.as_slice())
                .with_context(|| String::from_utf8_lossy(path).into_owned())?;
        }
        Ok(tar.into_inner()?)
    }
}

impl Entry {
    /// Sets an extended attribute.
    pub fn set(&mut self, name: &str, value: Vec<u8>) -> &mut Self {
        self.xattrs.insert(name.as_bytes().to_vec(), value);
        self
    }
}

/// The layers of a synthetic tree, in memory.
pub struct Layers {
    bytes: Vec<Vec<u8>>,
    failure: AtomicI32,
    requests: AtomicU64,
}

impl Layers {
    /// From now on every read fails with this errno; with 0 it works again.
    pub fn fail_with(&self, errno: i32) {
        self.failure.store(errno, Ordering::Relaxed);
    }

    /// Reads so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// A page of a file of the tree, zero-padded.
    #[must_use]
    pub fn page(&self, tree: &Tree, ino: u32, page: u32) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let Body::Regular { extents, .. } = &tree.inodes[ino as usize].body else { return bytes };
        let (start, end) = (u64::from(page) * 4096, u64::from(page) * 4096 + 4096);
        for e in extents {
            let (from, to) = (e.file_offset.max(start), (e.file_offset + e.len).min(end));
            if from < to {
                let at = (e.layer_offset + from - e.file_offset) as usize;
                let data = &self.bytes[e.layer as usize][at..at + (to - from) as usize];
                bytes[(from - start) as usize..(to - start) as usize].copy_from_slice(data);
            }
        }
        bytes
    }
}

impl ColdSource for Layers {
    fn read(&self, layer: u32, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, i32>> {
        Box::pin(async move {
            // Every other answer takes the asynchronous way.
            if self.requests.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                tokio::task::yield_now().await;
            }
            match self.failure.load(Ordering::Relaxed) {
                0 => Ok(Bytes::copy_from_slice(
                    &self.bytes[layer as usize][offset as usize..offset as usize + len],
                )),
                errno => Err(errno),
            }
        })
    }
}

/// A zone file with some pages of the tree, in a random order with other bytes between them.
pub struct Zone {
    /// The file.
    pub file: File,
    /// Its pages.
    pub pages: u64,
    /// The hot pages, in a random order.
    pub runs: Vec<Run>,
}

impl Zone {
    /// About one run in `rarity` possible ones is hot; with 1, all pages are.
    pub fn random(dir: &Path, tree: &Tree, layers: &Layers, rarity: u64, seed: u64) -> io::Result<Self> {
        let mut random = Random(seed);
        let mut runs = Vec::new();
        for (ino, inode) in tree.inodes.iter().enumerate() {
            let (mut page, pages) = (0, page::count(inode.file_size()) as u32);
            while page < pages {
                let count = (1 + random.below(40) as u32).min(pages - page);
                if random.below(rarity) == 0 {
                    runs.push(Run { ino: ino as u32, file_page: page, zone_page: 0, count });
                }
                page += count;
            }
        }
        for n in (1..runs.len()).rev() {
            runs.swap(n, random.below(n as u64 + 1) as usize);
        }
        let mut file = tempfile::tempfile_in(dir)?;
        let mut pages = 0;
        for run in &mut runs {
            let gap = random.below(3) as u32;
            file.write_all(&vec![0xDD; gap as usize * 4096])?;
            run.zone_page = pages + gap;
            for page in run.file_page..run.file_page + run.count {
                file.write_all(&layers.page(tree, run.ino, page))?;
            }
            pages = run.zone_page + run.count;
        }
        file.sync_all()?;
        Ok(Self { file, pages: pages.into(), runs })
    }

    /// For mounting.
    #[must_use]
    pub fn hot(&self) -> HotPages<'_> {
        HotPages { zone: &self.file, zone_pages: self.pages, runs: &self.runs, arrivals: None }
    }
}

fn inode(entry: &Entry, layers: &mut [Vec<u8>]) -> Inode {
    let body = match &entry.kind {
        Kind::Directory => Body::Directory(vec![]),
        Kind::File(size, data) => {
            let mut extents = Vec::new();
            for (offset, bytes) in data {
                // As in a tar: data at multiples of 512, in whatever layer.
                let layer = offset.wrapping_add(bytes.len() as u64) as usize % layers.len();
                let at = layers[layer].len().next_multiple_of(512) + 512;
                layers[layer].resize(at, 0xEE);
                layers[layer].extend_from_slice(bytes);
                let (len, layer) = (bytes.len() as u64, layer as u32);
                extents.push(Extent { file_offset: *offset, len, layer, layer_offset: at as u64 });
            }
            // Nobody hashes a file that is larger than memory.
            let content = if *size < 1 << 30 { bytes_of(*size, data) } else { vec![] };
            Body::Regular { size: *size, content: ContentHash::of(&content), extents }
        }
        Kind::Symlink(target) => Body::Symlink(target.clone()),
        Kind::CharDevice(major, minor) => Body::CharDevice { major: *major, minor: *minor },
        Kind::BlockDevice(major, minor) => Body::BlockDevice { major: *major, minor: *minor },
        Kind::Fifo => Body::Fifo,
        Kind::Socket => Body::Socket,
        Kind::HardLink(_) => unreachable!("a hard link has no inode of its own"),
    };
    let xattrs = entry.xattrs.iter().map(|(n, v)| Xattr { name: n.clone(), value: v.clone() }).collect();
    let (mtime, mtime_nsec) = entry.mtime;
    Inode { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime, mtime_nsec, xattrs, body }
}

fn st_mode(entry: &Entry) -> u32 {
    let kind = match entry.kind {
        Kind::Directory => libc::S_IFDIR,
        Kind::File(..) | Kind::HardLink(_) => libc::S_IFREG,
        Kind::Symlink(_) => libc::S_IFLNK,
        Kind::CharDevice(..) => libc::S_IFCHR,
        Kind::BlockDevice(..) => libc::S_IFBLK,
        Kind::Fifo => libc::S_IFIFO,
        Kind::Socket => libc::S_IFSOCK,
    };
    kind | u32::from(entry.mode)
}

fn bytes_of(size: u64, data: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    for (offset, data) in data {
        bytes[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
    }
    bytes
}

fn sha256(size: u64, data: &[(u64, Vec<u8>)]) -> String {
    hex::encode(Sha256::digest(bytes_of(size, data)))
}

/// As PAX writes it; the nanoseconds count up from the seconds also before 1970.
fn format_time((seconds, nanoseconds): (i64, u32)) -> String {
    if seconds < 0 && nanoseconds > 0 {
        return format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds);
    }
    format!("{seconds}.{nanoseconds:09}")
}
