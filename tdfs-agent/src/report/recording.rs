//! What a recording says about its image: which share of every layer, directory and file was touched.
//!
//! Bytes count once however many names a file has. "Touched" comes in columns: the first one says what any service
//! touched, each further one what one service did.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;

use serde::Serialize;
use tdfs_common::digest::Digest;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::Service;
use tdfs_common::tree::{Body, Inode, Tree};

use super::ReportError;
use super::order::{FirstUse, orders};
use super::zone::{ZoneMap, maps};
use crate::oci::Image;
use crate::pack::{LoadedRuntimeImage, Sharing, SharingSet, sharing};

/// Services that have a column of their own.
pub const SERVICES_SHOWN: usize = 8;
/// Nodes of the tree.
const NODES_MAX: usize = 2500;
/// Entries of one directory that become nodes.
const ENTRIES_MAX: usize = 150;
/// A node holds at least this part of the image.
const NODE_PART: u64 = 4000;
/// Lines of the tables of directories and of files.
const LINES_MAX: usize = 40;
/// Parts into which the strip of a file divides it.
const STRIP: u64 = 64;
/// Sets of services that are listed for a group.
const SETS_MAX: usize = 32;

/// An image and what its services touch.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recording {
    /// The image manifest.
    pub image: Digest,
    /// Its layers, compressed.
    pub image_bytes: u64,
    /// Regular files.
    pub files: u64,
    /// Their bytes, each file once.
    pub file_bytes: u64,
    /// Of these, touched.
    pub touched: Vec<u64>,
    /// Files of which a byte was touched.
    pub touched_files: u64,
    /// Names of the columns behind the first.
    pub columns: Vec<String>,
    /// All services.
    pub services: Vec<ServiceSummary>,
    /// What those of a group share.
    pub sharing: Vec<Sharing>,
    /// Sets of services that are not listed there.
    pub sets_left_out: usize,
    /// From the lowest.
    pub layers: Vec<LayerShare>,
    /// The tree of directories; the root is the first, every other follows its parent.
    pub tree: Vec<Node>,
    /// Directories by what was touched of the files directly in them; the last line holds the others.
    pub directories: Vec<Share>,
    /// Files by what was touched; the last line holds the others.
    pub largest: Vec<Share>,
    /// In which order the services go through their files.
    pub orders: Vec<FirstUse>,
    /// The zones of the groups.
    pub zones: Vec<ZoneMap>,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServiceSummary {
    /// Its name.
    pub service: String,
    /// Its group.
    pub group: String,
    /// Its runtime image.
    pub manifest: Digest,
    /// The readiness probe.
    pub ready: String,
    /// Files.
    pub files: u64,
    /// File pages.
    pub file_pages: u64,
    /// Zone pages that they lie on.
    pub zone_pages: u64,
    /// Frames that hold them.
    pub frames: usize,
    /// Pages of these frames: frames come whole.
    pub frame_pages: u64,
    /// Compressed bytes of these frames: what an empty node fetches.
    pub frame_bytes: u64,
}

/// A layer of the image.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerShare {
    /// The blob.
    pub digest: Digest,
    /// Of the blob.
    pub blob_bytes: u64,
    /// Of its files, as far as no layer above hides them; holes belong to no layer.
    pub bytes: u64,
    /// Of these.
    pub touched: Vec<u64>,
}

/// A directory, a file, or what is too small for a node of its own.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Node {
    /// Index of the directory that it lies in; its own for the root.
    pub parent: u32,
    /// Name in that directory; empty for what is too small.
    pub name: String,
    /// Whether it is a directory.
    pub directory: bool,
    /// Files in it.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of these.
    pub touched: Vec<u64>,
}

/// A line of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Share {
    /// Path without a leading slash; `None` for all the others.
    pub path: Option<String>,
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of these.
    pub touched: Vec<u64>,
    /// Of a file: the layer that its first byte lies in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<u32>,
    /// Of a file: how much of each part of it was touched, `0` nothing to `9` everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strip: Option<String>,
}

/// Bytes and what was touched of them.
#[derive(Clone, Debug, Default)]
struct Sum {
    files: u64,
    bytes: u64,
    touched: Vec<u64>,
}

impl Sum {
    fn new(columns: usize) -> Self {
        Self { touched: vec![0; columns], ..Self::default() }
    }

    fn add(&mut self, other: &Self) {
        self.files += other.files;
        self.bytes += other.bytes;
        self.touched.iter_mut().zip(&other.touched).for_each(|(a, b)| *a += b);
    }
}

/// Disjoint byte ranges of a file that were touched, ascending.
type Ranges = Vec<Range<u64>>;

/// By file: what any service touched, then each one. Empty for files that nobody touched.
struct Touched {
    columns: usize,
    files: HashMap<u32, Vec<Ranges>>,
}

impl Touched {
    fn new(tree: &Tree, services: &[Service]) -> Self {
        let columns = 1 + services.len().min(SERVICES_SHOWN);
        let mut files: HashMap<u32, Vec<Ranges>> = HashMap::new();
        for (n, service) in services.iter().enumerate() {
            for run in &service.runs {
                let size = tree.inodes[run.ino as usize].file_size();
                let page = PAGE_SIZE as u64;
                let start = u64::from(run.file_page) * page;
                let end = (start + u64::from(run.count) * page).min(size);
                let file = files.entry(run.ino).or_insert_with(|| vec![Vec::new(); columns]);
                file[0].push(start..end);
                if let Some(own) = file.get_mut(n + 1) {
                    own.push(start..end);
                }
            }
        }
        files.values_mut().flatten().for_each(merge);
        Self { columns, files }
    }

    fn ranges(&self, ino: u32, column: usize) -> &[Range<u64>] {
        self.files.get(&ino).map_or(&[], |columns| &columns[column])
    }

    /// What was touched of `bytes` of the file, by column.
    fn within(&self, ino: u32, bytes: &Range<u64>) -> Vec<u64> {
        (0..self.columns).map(|column| overlap(self.ranges(ino, column), bytes)).collect()
    }

    fn strip(&self, ino: u32, size: u64) -> String {
        let part = |n: u64| {
            let at = |n: u64| (u128::from(size) * u128::from(n) / u128::from(STRIP)) as u64;
            let bytes = at(n)..at(n + 1).max(at(n) + 1);
            let touched = overlap(self.ranges(ino, 0), &bytes);
            // Some is never shown as nothing.
            let tenth = (touched * 9).div_ceil(bytes.end - bytes.start).min(9) as u8;
            char::from(b'0' + tenth)
        };
        (0..STRIP).map(part).collect()
    }
}

/// Sorts `ranges` and joins those that meet.
fn merge(ranges: &mut Ranges) {
    ranges.sort_unstable_by_key(|r| r.start);
    ranges.dedup_by(|next, last| {
        let meets = next.start <= last.end;
        if meets {
            last.end = last.end.max(next.end);
        }
        meets
    });
}

/// Bytes of `ranges`, disjoint and ascending, within `bytes`.
fn overlap(ranges: &[Range<u64>], bytes: &Range<u64>) -> u64 {
    let first = ranges.partition_point(|r| r.end <= bytes.start);
    let inside = ranges[first..].iter().take_while(|r| r.start < bytes.end);
    inside.map(|r| r.end.min(bytes.end) - r.start.max(bytes.start)).sum()
}

impl Recording {
    /// What the runtime images of `image` say about it.
    pub fn new(image: &Image, loaded: Vec<LoadedRuntimeImage>) -> Result<Self, ReportError> {
        let mut loaded = loaded.into_iter();
        let first = loaded.next().ok_or(ReportError::NoRuntimeImage(image.digest))?;
        let (tree, mut manifests, mut services) = (first.tree, vec![first.manifest], vec![first.service]);
        for next in loaded {
            if next.tree != tree {
                let (first, second) = (services[0].service.clone(), next.service.service);
                return Err(ReportError::Trees { first, second });
            }
            manifests.push(next.manifest);
            services.push(next.service);
        }
        let blobs: Vec<_> = image.layers.iter().map(|l| (l.digest, l.size)).collect();
        Ok(Self::of(image.digest, &blobs, &tree, &manifests, &services))
    }

    /// Of the layers `blobs`, digest and bytes of each.
    fn of(
        image: Digest,
        blobs: &[(Digest, u64)],
        tree: &Tree,
        manifests: &[Digest],
        services: &[Service],
    ) -> Self {
        let touched = Touched::new(tree, services);
        let names = Names::new(tree, &touched);
        let all = &names.sums[0];
        let mut groups = sharing(services);
        let mut sets_left_out = 0;
        for group in &mut groups {
            sets_left_out += group.sets.len().saturating_sub(SETS_MAX);
            group.sets.truncate(SETS_MAX);
            for set in &mut group.sets {
                shorten(set);
            }
        }
        Self {
            image,
            image_bytes: blobs.iter().map(|(_, bytes)| bytes).sum(),
            files: all.files,
            file_bytes: all.bytes,
            touched: all.touched.clone(),
            touched_files: touched.files.len() as u64,
            columns: services.iter().take(SERVICES_SHOWN).map(|s| s.service.clone()).collect(),
            services: services.iter().zip(manifests).map(|(s, m)| ServiceSummary::new(s, *m)).collect(),
            sharing: groups,
            sets_left_out,
            layers: layers(blobs, tree, &touched),
            directories: names.directories(),
            largest: names.largest(&touched),
            tree: names.nodes(),
            orders: orders(services, &names.paths),
            zones: maps(services),
        }
    }
}

/// Names the first services of a large set and counts the others.
fn shorten(set: &mut SharingSet) {
    let more = set.services.len().saturating_sub(SERVICES_SHOWN);
    if more > 0 {
        set.services.truncate(SERVICES_SHOWN);
        set.services.push(format!("{more} more"));
    }
}

impl ServiceSummary {
    fn new(service: &Service, manifest: Digest) -> Self {
        let frames = service.frames_by_first_use();
        let mut files: Vec<u32> = service.runs.iter().map(|r| r.ino).collect();
        files.sort_unstable();
        files.dedup();
        Self {
            service: service.service.clone(),
            group: service.group.clone(),
            manifest,
            ready: service.ready.clone(),
            files: files.len() as u64,
            file_pages: service.file_pages(),
            zone_pages: service.needed().count(),
            frames: frames.len(),
            frame_pages: frames.iter().map(|f| u64::from(f.placed.frame.pages)).sum(),
            frame_bytes: frames.iter().map(|f| u64::from(f.placed.frame.len)).sum(),
        }
    }
}

fn layers(blobs: &[(Digest, u64)], tree: &Tree, touched: &Touched) -> Vec<LayerShare> {
    let mut sums = vec![Sum::new(touched.columns); blobs.len()];
    for (ino, inode) in tree.inodes.iter().enumerate() {
        let Body::Regular { extents, .. } = &inode.body else { continue };
        for extent in extents {
            let bytes = extent.file_offset..extent.file_offset + extent.len;
            let touched = touched.within(ino as u32, &bytes);
            sums[extent.layer as usize].add(&Sum { files: 0, bytes: extent.len, touched });
        }
    }
    let layer = |((digest, blob_bytes), sum): (&(Digest, u64), Sum)| LayerShare {
        digest: *digest,
        blob_bytes: *blob_bytes,
        bytes: sum.bytes,
        touched: sum.touched,
    };
    blobs.iter().zip(sums).map(layer).collect()
}

/// The tree by names: every file in the first directory that names it.
struct Names<'a> {
    tree: &'a Tree,
    paths: Vec<Vec<u8>>,
    /// By inode: of a file, or of everything below a directory.
    sums: Vec<Sum>,
    /// By inode of a directory: names and inodes of what counts as in it.
    entries: HashMap<u32, Vec<(&'a [u8], u32)>>,
}

impl<'a> Names<'a> {
    fn new(tree: &'a Tree, touched: &Touched) -> Self {
        let columns = touched.columns;
        let of_file = |(ino, inode): (usize, &Inode)| match inode.body {
            Body::Regular { size, .. } => {
                Sum { files: 1, bytes: size, touched: touched.within(ino as u32, &(0..size)) }
            }
            _ => Sum::new(columns),
        };
        let mut sums: Vec<Sum> = tree.inodes.iter().enumerate().map(of_file).collect();
        let mut entries: HashMap<u32, Vec<_>> = HashMap::new();
        let mut seen = vec![false; tree.inodes.len()];
        for (dir, inode) in tree.inodes.iter().enumerate() {
            let Body::Directory(names) = &inode.body else { continue };
            let counted = names.iter().filter_map(|entry| {
                let first = !std::mem::replace(&mut seen[entry.ino as usize], true);
                let body = &tree.inodes[entry.ino as usize].body;
                let counts = matches!(body, Body::Regular { .. } | Body::Directory(_));
                (first && counts).then_some((&*entry.name, entry.ino))
            });
            entries.insert(dir as u32, counted.collect());
        }
        // A directory comes before the directories in it.
        for dir in (0..tree.inodes.len()).rev() {
            let mut sum = Sum::new(columns);
            let Some(names) = entries.get(&(dir as u32)) else { continue };
            for (_, ino) in names {
                sum.add(&sums[*ino as usize]);
            }
            sums[dir] = sum;
        }
        Self { tree, paths: tree.paths(), sums, entries }
    }

    fn is_directory(&self, ino: u32) -> bool {
        matches!(self.tree.inodes[ino as usize].body, Body::Directory(_))
    }

    /// The largest directories, opened one by one for as long as there is room.
    fn nodes(&self) -> Vec<Node> {
        let least = self.sums[0].bytes / NODE_PART;
        let node = |parent, name: &[u8], directory, sum: &Sum| Node {
            parent,
            name: String::from_utf8_lossy(name).into_owned(),
            directory,
            files: sum.files,
            bytes: sum.bytes,
            touched: sum.touched.clone(),
        };
        let mut nodes = vec![node(0, b"/", true, &self.sums[0])];
        let mut closed = BinaryHeap::from([(self.sums[0].bytes, Reverse(0u32), 0u32)]);
        while let Some((_, Reverse(at), ino)) = closed.pop() {
            let mut entries = self.entries[&ino].clone();
            entries.sort_by_key(|(_, ino)| Reverse(self.sums[*ino as usize].bytes));
            let large = |(_, ino): &&(&[u8], u32)| self.sums[*ino as usize].bytes > least;
            let kept = entries.iter().take(ENTRIES_MAX).take_while(large).count();
            if nodes.len() + kept + 1 > NODES_MAX {
                break;
            }
            if kept == 0 {
                continue;
            }
            let mut others = Sum::new(self.sums[0].touched.len());
            for (n, (name, ino)) in entries.iter().enumerate() {
                let sum = &self.sums[*ino as usize];
                if n >= kept {
                    others.add(sum);
                    continue;
                }
                let directory = self.is_directory(*ino);
                if directory {
                    closed.push((sum.bytes, Reverse(nodes.len() as u32), *ino));
                }
                nodes.push(node(at, name, directory, sum));
            }
            if others.files > 0 {
                nodes.push(node(at, b"", false, &others));
            }
        }
        nodes
    }

    fn directories(&self) -> Vec<Share> {
        let own = |(dir, names): (&u32, &Vec<(&[u8], u32)>)| {
            let mut sum = Sum::new(self.sums[0].touched.len());
            let files = names.iter().filter(|(_, ino)| !self.is_directory(*ino));
            files.for_each(|(_, ino)| sum.add(&self.sums[*ino as usize]));
            (*dir, sum)
        };
        let sums: Vec<_> = self.entries.iter().map(own).filter(|(_, sum)| sum.files > 0).collect();
        table(sums, |dir, sum| Share::new(Some(&self.paths[dir as usize]), sum))
    }

    fn largest(&self, touched: &Touched) -> Vec<Share> {
        let files = self.entries.values().flatten().filter(|(_, ino)| !self.is_directory(*ino));
        let sums: Vec<_> = files.map(|(_, ino)| (*ino, self.sums[*ino as usize].clone())).collect();
        table(sums, |ino, sum| {
            let inode = &self.tree.inodes[ino as usize];
            let layer = match &inode.body {
                Body::Regular { extents, .. } => extents.first().map(|e| e.layer),
                _ => None,
            };
            let strip = Some(touched.strip(ino, inode.file_size()));
            Share { layer, strip, ..Share::new(Some(&self.paths[ino as usize]), sum) }
        })
    }
}

impl Share {
    fn new(path: Option<&Vec<u8>>, sum: &Sum) -> Self {
        Self {
            path: path.map(|p| String::from_utf8_lossy(p).into_owned()),
            files: sum.files,
            bytes: sum.bytes,
            touched: sum.touched.clone(),
            layer: None,
            strip: None,
        }
    }
}

/// The lines of which most was touched, and one for all others.
fn table(mut sums: Vec<(u32, Sum)>, line: impl Fn(u32, &Sum) -> Share) -> Vec<Share> {
    sums.sort_by_key(|(ino, sum)| (Reverse((sum.touched[0], sum.bytes)), *ino));
    let kept = sums.iter().take(LINES_MAX).take_while(|(_, sum)| sum.touched[0] > 0).count();
    let mut lines: Vec<Share> = sums[..kept].iter().map(|(ino, sum)| line(*ino, sum)).collect();
    if let Some((_, first)) = sums.get(kept) {
        let mut others = Sum::new(first.touched.len());
        sums[kept..].iter().for_each(|(_, sum)| others.add(sum));
        lines.push(Share::new(None, &others));
    }
    lines
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;
    use tdfs_common::digest::ContentHash;
    use tdfs_common::runtime_image::{Frame, Run, Segment};
    use tdfs_common::tree::{DirEntry, Extent};

    use super::*;

    /// A service of one file that needs these zone pages, of a zone with so many frames.
    pub fn service(name: &str, runs: &[(u32, u32)], frames: u32) -> Service {
        let frame = Frame { len: 100, pages: 64, hash: ContentHash::of(b"") };
        let mut file_page = 0;
        let run = |&(zone_page, count): &(u32, u32)| {
            file_page += count;
            Run { ino: 1, file_page: file_page - count, zone_page, count }
        };
        Service {
            group: "g".into(),
            service: name.into(),
            image: Digest::of(b"image"),
            args: None,
            ready: "exit".into(),
            segments: vec![Segment { blob: Digest::of(b""), base: 0, frames: vec![frame; frames as usize] }],
            runs: runs.iter().map(run).collect(),
        }
    }

    fn inode(body: Body) -> Inode {
        Inode { mode: 0, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: vec![], body }
    }

    /// A file in the directory with this index.
    #[derive(Clone, Debug)]
    struct File {
        dir: usize,
        size: u64,
        layer: u32,
        hole: bool,
        runs: Vec<(u32, u32)>,
    }

    const DIRS: usize = 5;

    /// `/`, and four directories, each in the one before; then the files, each also under a second name in the root.
    fn tree(files: &[File]) -> Tree {
        let names = |dir: usize| {
            let deeper = (dir + 1 < DIRS).then(|| DirEntry { name: b"d".to_vec(), ino: dir as u32 + 1 });
            let own = files.iter().enumerate().filter(|(_, f)| f.dir == dir);
            let own = own.map(|(n, _)| DirEntry {
                name: format!("f{n:03}</script>").into_bytes(),
                ino: (DIRS + n) as u32,
            });
            deeper.into_iter().chain(own).collect()
        };
        let mut inodes: Vec<Inode> = (0..DIRS).map(|dir| inode(Body::Directory(names(dir)))).collect();
        let Body::Directory(last) = &mut inodes[DIRS - 1].body else { panic!("a directory") };
        last.extend(
            (0..files.len())
                .map(|n| DirEntry { name: format!("z{n:03}").into_bytes(), ino: (DIRS + n) as u32 }),
        );
        inodes.extend(files.iter().map(|f| {
            let from = if f.hole { f.size / 2 } else { 0 };
            let extent = Extent { file_offset: from, len: f.size - from, layer: f.layer, layer_offset: 0 };
            let extents = Some(extent).filter(|e| e.len > 0).into_iter().collect();
            inode(Body::Regular { size: f.size, content: ContentHash::of(b""), extents })
        }));
        Tree { inodes, layer_sizes: vec![1 << 40; 3] }
    }

    fn file() -> impl Strategy<Value = File> {
        let runs = prop::collection::vec((0u32..40, 1u32..20), 0..4);
        (0..DIRS, 0u64..200_000, 0u32..3, any::<bool>(), runs)
            .prop_map(|(dir, size, layer, hole, runs)| File { dir, size, layer, hole, runs })
    }

    proptest! {
        #[test]
        fn every_table_adds_up_to_the_totals(files in prop::collection::vec(file(), 0..90)) {
            let tree = tree(&files);
            // Each run of a file is of another service, so that services overlap.
            let services: Vec<Service> = (0..4).map(|n| {
                let mut service = service(&n.to_string(), &[], 64);
                service.runs = files.iter().enumerate().filter_map(|(f, file)| {
                    let (start, count) = *file.runs.get(n)?;
                    let pages = tdfs_common::page::count(file.size) as u32;
                    let count = count.min(pages.checked_sub(start)?);
                    (count > 0).then_some(Run { ino: (DIRS + f) as u32, file_page: start, zone_page: start, count })
                }).collect();
                service
            }).collect();
            let blobs = [(Digest::of(b"1"), 7); 3];
            let manifests = [Digest::of(b"manifest"); 4];
            let report = Recording::of(Digest::of(b"image"), &blobs, &tree, &manifests, &services);

            // The model counts byte by byte, in units of one page or its rest.
            let mut touched = vec![0u64; 5];
            let mut holes = 0;
            for (f, file) in files.iter().enumerate() {
                holes += if file.hole { file.size / 2 } else { 0 };
                for page in 0..tdfs_common::page::count(file.size) {
                    let bytes = (file.size - page * 4096).min(4096);
                    let uses = |s: &Service| s.runs.iter().any(|r| {
                        r.ino == (DIRS + f) as u32 && (r.file_page..r.file_page + r.count).contains(&(page as u32))
                    });
                    touched[0] += if services.iter().any(uses) { bytes } else { 0 };
                    for (n, service) in services.iter().enumerate() {
                        touched[n + 1] += if uses(service) { bytes } else { 0 };
                    }
                }
            }
            let bytes: u64 = files.iter().map(|f| f.size).sum();
            prop_assert_eq!((report.files, report.file_bytes), (files.len() as u64, bytes));
            prop_assert_eq!(&report.touched, &touched);
            let total = |shares: &[Share]| {
                let mut sum = Sum::new(5);
                for s in shares {
                    sum.add(&Sum { files: s.files, bytes: s.bytes, touched: s.touched.clone() });
                }
                (sum.files, sum.bytes, sum.touched)
            };
            let expected = (files.len() as u64, bytes, touched.clone());
            for shares in [&report.directories, &report.largest] {
                prop_assert!(shares.len() <= LINES_MAX + 1);
                prop_assert_eq!(total(shares), expected.clone());
            }
            prop_assert_eq!(report.layers.iter().map(|l| l.bytes).sum::<u64>() + holes, bytes);
            prop_assert!(report.layers.iter().map(|l| l.touched[0]).sum::<u64>() <= touched[0]);
            // Every directory that was opened equals what it shows.
            for (n, node) in report.tree.iter().enumerate() {
                let mut sum = Sum::new(5);
                let children = report.tree.iter().enumerate().skip(1).filter(|(_, c)| c.parent as usize == n);
                for (_, c) in children {
                    sum.add(&Sum { files: c.files, bytes: c.bytes, touched: c.touched.clone() });
                }
                prop_assert!(n == 0 || (node.parent as usize) < n);
                if sum.files > 0 {
                    prop_assert!(node.directory);
                    prop_assert_eq!((sum.files, sum.bytes, sum.touched), (node.files, node.bytes, node.touched.clone()));
                }
            }
        }
    }

    #[test]
    fn a_large_tree_is_summed_up() {
        let small = |n: usize| File { dir: n % DIRS, size: 10, layer: 0, hole: false, runs: vec![] };
        let mut files: Vec<File> = (0..9000).map(small).collect();
        files.push(File { dir: 2, size: 1 << 20, layer: 1, hole: false, runs: vec![] });
        let tree = tree(&files);
        let report = Recording::of(
            Digest::of(b"image"),
            &[(Digest::of(b"1"), 1); 3],
            &tree,
            &[],
            &[service("a", &[], 1)],
        );
        assert!(report.tree.len() < 20, "{}", report.tree.len());
        let large: Vec<_> = report.tree.iter().filter(|n| !n.directory && n.files == 1).collect();
        assert_eq!(large.len(), 1);
        assert_eq!(report.directories.len(), 1);
        assert_eq!(report.directories[0].files, 9001);
    }

    #[test]
    fn a_strip_shows_where_a_file_was_touched() {
        let files = [File { dir: 0, size: 64 * 4096 * 10, layer: 0, hole: false, runs: vec![] }; 1];
        let tree = tree(&files);
        let mut web = service("web", &[], 64);
        web.runs = vec![
            Run { ino: DIRS as u32, file_page: 0, zone_page: 0, count: 10 },
            Run { ino: DIRS as u32, file_page: 635, zone_page: 10, count: 5 },
        ];
        let touched = Touched::new(&tree, &[web]);
        let strip = touched.strip(DIRS as u32, files[0].size);
        assert_eq!(strip, format!("9{}5", "0".repeat(62)));
        assert_eq!(touched.strip(DIRS as u32, 1).len(), 64);
    }
}
