//! Traces: merging those of one service, and finding their files in a tree.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use tdfs_common::digest::{ContentHash, Digest};
use tdfs_common::page::{self, PAGE_SIZE};
use tdfs_common::trace::{Touch, Trace, TraceFile};
use tdfs_common::tree::{Body, Extent, Tree};

use super::PackError;

/// Consecutive pages of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRun {
    /// Index into the tree's inodes.
    pub ino: u32,
    /// First page.
    pub page: u32,
    /// Pages.
    pub count: u32,
}

/// What a trace asks for, in terms of a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// Touched pages in order of first use, none twice.
    pub runs: Vec<FileRun>,
    /// Touched pages that lie in holes and need no data.
    pub hole_pages: u64,
    /// Touched pages of files that are not in the tree.
    pub dropped_pages: u64,
}

/// One trace for all runs of a service: the pages of the first in its order, then what each further run adds.
///
/// Files are told apart by path and content, so runs of two builds of an image keep both versions of a file.
pub fn merge_traces(traces: &[Trace]) -> Result<Trace, PackError> {
    let (first, others) = traces.split_first().ok_or(PackError::NoTrace)?;
    let mut merged = Trace { files: Vec::new(), touches: Vec::new(), ..first.clone() };
    for other in others {
        if other.service != first.service {
            let (first, second) = (first.service.clone(), other.service.clone());
            return Err(PackError::Services { first, second });
        }
        merged.method = merged.method.max(other.method);
        merged.complete &= other.complete;
        merged.lost_events = merged.lost_events.saturating_add(other.lost_events);
        merged.runs = merged.runs.saturating_add(other.runs);
    }
    let mut numbers: HashMap<(&[u8], ContentHash, u64), u32> = HashMap::new();
    let mut seen: HashMap<u32, Pages> = HashMap::new();
    for trace in traces {
        for touch in &trace.touches {
            let file = &trace.files[touch.file as usize];
            let number = *numbers.entry((&file.path, file.content, file.size)).or_insert_with(|| {
                merged.files.push(file.clone());
                merged.files.len() as u32 - 1
            });
            for new in seen.entry(number).or_default().insert(pages_of(touch)) {
                let (page, count) = (new.start as u32, (new.end - new.start) as u32);
                merged.touches.push(Touch { file: number, page, count });
            }
        }
    }
    Ok(merged)
}

/// Finds the files of `trace` in `tree`, the one of `image`, by path and content.
///
/// Files that are not there are an error, or with `allow_incomplete` left out; so is a trace that missed events.
pub fn resolve(
    trace: &Trace,
    tree: &Tree,
    image: &Digest,
    allow_incomplete: bool,
) -> Result<Resolved, PackError> {
    let service = || trace.service.clone();
    if !allow_incomplete && (!trace.complete || trace.lost_events > 0) {
        return Err(PackError::Incomplete { service: service(), lost_events: trace.lost_events });
    }
    let found: Vec<Option<(u32, &[Extent])>> = trace.files.iter().map(|f| find(tree, f)).collect();
    let absent = || trace.files.iter().zip(&found).filter(|(_, f)| f.is_none()).map(|(t, _)| t);
    if let (Some(file), false) = (absent().next(), allow_incomplete) {
        return Err(PackError::OtherImage {
            service: service(),
            recorded: trace.image,
            image: *image,
            files: absent().count() as u64,
            path: String::from_utf8_lossy(&file.path).into_owned(),
        });
    }
    let mut resolved = Resolved::default();
    // By inode: two traced paths may be links to one.
    let mut seen: HashMap<u32, Pages> = HashMap::new();
    for touch in &trace.touches {
        let Some((ino, extents)) = found[touch.file as usize] else {
            resolved.dropped_pages += u64::from(touch.count);
            continue;
        };
        for new in seen.entry(ino).or_default().insert(pages_of(touch)) {
            let mut holes = new.end - new.start;
            for data in with_data(extents, &new) {
                let count = data.end - data.start;
                holes -= count;
                resolved.runs.push(FileRun { ino, page: data.start as u32, count: count as u32 });
            }
            resolved.hole_pages += holes;
        }
    }
    Ok(resolved)
}

/// The inode and extents of a traced file.
fn find<'a>(tree: &'a Tree, file: &TraceFile) -> Option<(u32, &'a [Extent])> {
    let ino = tree.lookup(&file.path)?;
    match &tree.inodes[ino as usize].body {
        Body::Regular { size, content, extents } if *size == file.size && *content == file.content => {
            Some((ino, extents))
        }
        _ => None,
    }
}

/// The parts of `pages` that an extent reaches into: the rest of them are holes and read as zeros without data.
fn with_data(extents: &[Extent], pages: &Range<u64>) -> Vec<Range<u64>> {
    let size = PAGE_SIZE as u64;
    let (start, end) = (pages.start * size, pages.end * size);
    let first = extents.partition_point(|e| e.file_offset + e.len <= start);
    let mut parts: Vec<Range<u64>> = Vec::new();
    for extent in extents[first..].iter().take_while(|e| e.file_offset < end) {
        let from = (extent.file_offset / size).max(pages.start);
        let to = page::count(extent.file_offset + extent.len).min(pages.end);
        match parts.last_mut() {
            Some(last) if from <= last.end => last.end = last.end.max(to),
            _ => parts.push(from..to),
        }
    }
    parts
}

/// A set of pages as disjoint ranges, start to end: a hostile touch of billions of pages costs one entry.
#[derive(Default)]
struct Pages(BTreeMap<u64, u64>);

impl Pages {
    /// Adds `range` and returns the parts that were not in the set.
    fn insert(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut whole = range.clone();
        let mut swallowed = Vec::new();
        while let Some((&start, &end)) = self.0.range(..=range.end).next_back()
            && end >= range.start
        {
            self.0.remove(&start);
            whole = whole.start.min(start)..whole.end.max(end);
            swallowed.push(start..end);
        }
        self.0.insert(whole.start, whole.end);
        let mut new = Vec::new();
        let mut at = range.start;
        for old in swallowed.iter().rev() {
            if at < old.start {
                new.push(at..old.start);
            }
            at = at.max(old.end);
        }
        if at < range.end {
            new.push(at..range.end);
        }
        new
    }
}

/// The pages of a touch.
fn pages_of(touch: &Touch) -> Range<u64> {
    let start = u64::from(touch.page);
    start..start + u64::from(touch.count)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use tdfs_common::trace::Method;
    use tdfs_common::tree::{DirEntry, Inode};

    use super::*;

    fn trace(files: &[(&str, u64)], touches: &[(u32, u32, u32)]) -> Trace {
        let file = |&(path, size): &(&str, u64)| TraceFile {
            path: path.into(),
            size,
            content: ContentHash::of(path.as_bytes()),
        };
        Trace {
            image: Digest::of(b"image"),
            service: "web".into(),
            ready: "tcp:80".into(),
            method: Method::TpBtf,
            complete: true,
            lost_events: 0,
            runs: 1,
            files: files.iter().map(file).collect(),
            touches: touches.iter().map(|&(file, page, count)| Touch { file, page, count }).collect(),
        }
    }

    fn inode(body: Body) -> Inode {
        Inode { mode: 0o755, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: Vec::new(), body }
    }

    /// Name, size, and extents as `(file_offset, len)`.
    type File<'a> = (&'a str, u64, &'a [(u64, u64)]);

    /// A tree with these files in its root.
    fn tree(files: &[File<'_>]) -> Tree {
        let mut inodes = vec![inode(Body::Directory(Vec::new()))];
        let mut entries = Vec::new();
        for (name, size, extents) in files {
            let extent =
                |&(file_offset, len)| Extent { file_offset, len, layer: 0, layer_offset: file_offset };
            entries.push(DirEntry { name: name.as_bytes().to_vec(), ino: inodes.len() as u32 });
            inodes.push(inode(Body::Regular {
                size: *size,
                content: ContentHash::of(name.as_bytes()),
                extents: extents.iter().map(extent).collect(),
            }));
        }
        inodes[0].body = Body::Directory(entries);
        Tree { inodes, layer_sizes: vec![1 << 40] }
    }

    fn run(ino: u32, page: u32, count: u32) -> FileRun {
        FileRun { ino, page, count }
    }

    #[test]
    fn merges_in_order_of_the_first_run() {
        let a = trace(&[("a", 40960), ("b", 8192)], &[(1, 1, 1), (0, 4, 2), (0, 0, 1)]);
        let mut b = trace(&[("c", 4096), ("a", 40960)], &[(1, 3, 4), (0, 0, 1), (1, 0, 2)]);
        b.method = Method::Residency;
        b.lost_events = 3;
        b.complete = false;
        let m = merge_traces(&[a, b]).unwrap();
        assert_eq!((m.runs, m.lost_events, m.complete, m.method), (2, 3, false, Method::Residency));
        let touches = m.touches.iter().map(|t| (m.files[t.file as usize].path[0], t.page, t.count));
        let expected = [
            (b'b', 1, 1),
            (b'a', 4, 2),
            (b'a', 0, 1),
            (b'a', 3, 1),
            (b'a', 6, 1),
            (b'c', 0, 1),
            (b'a', 1, 1),
        ];
        assert_eq!(touches.collect::<Vec<_>>(), expected);
        tdfs_common::envelope::encode(&m).unwrap();
    }

    #[test]
    fn keeps_two_versions_of_a_file_apart() {
        let a = trace(&[("a", 8192)], &[(0, 0, 2)]);
        let mut b = a.clone();
        b.files[0].content = ContentHash::of(b"new");
        let m = merge_traces(&[a.clone(), b]).unwrap();
        assert_eq!((m.files.len(), m.pages()), (2, 4));
        let mut c = a.clone();
        c.service = "db".into();
        assert!(matches!(merge_traces(&[a, c]), Err(PackError::Services { .. })));
        assert!(matches!(merge_traces(&[]), Err(PackError::NoTrace)));
    }

    #[test]
    fn refuses_what_is_incomplete_or_of_another_image() {
        let tree = tree(&[("a", 8192, &[(0, 8192)])]);
        let image = Digest::of(b"image");
        let good = trace(&[("a", 8192)], &[(0, 0, 2)]);
        assert_eq!(resolve(&good, &tree, &image, false).unwrap().runs, [run(1, 0, 2)]);
        let mut lossy = good.clone();
        lossy.lost_events = 7;
        let e = resolve(&lossy, &tree, &image, false).unwrap_err();
        assert!(e.to_string().contains("7 lost events"), "{e}");
        resolve(&lossy, &tree, &image, true).unwrap();
        let stopped = Trace { complete: false, ..good.clone() };
        assert!(matches!(resolve(&stopped, &tree, &image, false), Err(PackError::Incomplete { .. })));
        // Another build of the image will do as long as what was touched is the same.
        let rebuilt = Trace { image: Digest::of(b"old"), ..good };
        resolve(&rebuilt, &tree, &image, false).unwrap();
        let two = trace(&[("a", 8192), ("x", 4096)], &[(1, 0, 1), (0, 1, 1)]);
        let e = resolve(&two, &tree, &image, false).unwrap_err();
        assert!(matches!(e, PackError::OtherImage { files: 1, .. }), "{e}");
        let partial = resolve(&two, &tree, &image, true).unwrap();
        assert_eq!((partial.runs, partial.dropped_pages), (vec![run(1, 1, 1)], 1));
    }

    #[test]
    fn holes_need_no_pages() {
        let tree = tree(&[("s", 1 << 40, &[(5000, 1), (40960, 8192), (49152, 10), (1 << 39, 4096)])]);
        let all = trace(&[("s", 1 << 40)], &[(0, 1, 1), (0, 0, 1), (0, 2, (1 << 28) - 2)]);
        let resolved = resolve(&all, &tree, &Digest::of(b""), false).unwrap();
        assert_eq!(resolved.runs, [run(1, 1, 1), run(1, 10, 3), run(1, 1 << 27, 1)]);
        assert_eq!(resolved.hole_pages, (1 << 28) - 5);
    }

    #[test]
    fn two_names_of_an_inode_are_one_file() {
        let mut tree = tree(&[("a", 8192, &[(0, 8192)])]);
        let Body::Directory(entries) = &mut tree.inodes[0].body else { panic!() };
        entries.push(DirEntry { name: b"b".to_vec(), ino: 1 });
        let mut t = trace(&[("a", 8192), ("b", 8192)], &[(0, 0, 1), (1, 0, 2)]);
        t.files[1].content = t.files[0].content;
        let resolved = resolve(&t, &tree, &Digest::of(b""), false).unwrap();
        assert_eq!(resolved.runs, [run(1, 0, 1), run(1, 1, 1)]);
    }

    proptest! {
        #[test]
        fn page_sets_agree_with_a_set(ranges in proptest::collection::vec((0u64..100, 1u64..30), 0..30)) {
            let (mut pages, mut model) = (Pages::default(), BTreeSet::new());
            for (start, count) in ranges {
                let range = start..start + count;
                let new: Vec<u64> = pages.insert(range.clone()).into_iter().flatten().collect();
                let expected: Vec<u64> = range.clone().filter(|p| !model.contains(p)).collect();
                prop_assert_eq!(new, expected);
                model.extend(range);
                prop_assert_eq!(pages.0.iter().flat_map(|(s, e)| *s..*e).collect::<BTreeSet<_>>(), model.clone());
            }
        }

        #[test]
        fn merging_is_the_union_in_order(
            runs in proptest::collection::vec(proptest::collection::vec((0u32..3, 0u32..20, 1u32..5), 0..10), 1..4),
        ) {
            let names = [("a", 1 << 20), ("b", 1 << 20), ("c", 1 << 20)];
            let mut expected = Vec::new();
            let mut traces = Vec::new();
            for (n, touches) in runs.iter().enumerate() {
                let mut mine = BTreeSet::new();
                let mut t = trace(&names, &[]);
                for &(file, page, count) in touches {
                    for page in page..page + count {
                        if mine.insert((file, page)) {
                            // Runs number their files differently.
                            t.touches.push(Touch { file: (file + n as u32) % 3, page, count: 1 });
                            if !expected.contains(&(file, page)) {
                                expected.push((file, page));
                            }
                        }
                    }
                }
                t.files.rotate_right(n % 3);
                traces.push(t);
            }
            let merged = merge_traces(&traces).unwrap();
            let pages = merged.touches.iter().flat_map(|t| {
                let name = merged.files[t.file as usize].path[0];
                (t.page..t.page + t.count).map(move |p| (u32::from(name - b'a'), p))
            });
            prop_assert_eq!(pages.collect::<Vec<_>>(), expected);
        }
    }
}
