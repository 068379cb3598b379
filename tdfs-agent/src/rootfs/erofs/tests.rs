//! The writer against the reader, for random trees.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tdfs_common::digest::ContentHash;
use tdfs_common::envelope::Format;
use tdfs_common::page;
use tdfs_common::runtime_image::Run;
use tdfs_common::tree::{Body, DirEntry, Extent, Inode, Tree, Xattr};

use super::reader::{Found, Reader};
use super::{ErofsError, write};

fn inode(body: Body) -> Inode {
    Inode { mode: 0o755, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: vec![], body }
}

fn file(size: u64, extents: Vec<Extent>) -> Inode {
    inode(Body::Regular { size, content: ContentHash::of(b""), extents })
}

fn full(size: u64) -> Inode {
    file(size, vec![Extent { file_offset: 0, len: size, layer: 0, layer_offset: 0 }])
}

/// A root directory with these inodes under numbered names.
fn flat(inodes: Vec<Inode>) -> Tree {
    let names = (1..=inodes.len() as u32).map(|ino| DirEntry { name: format!("{ino:06}").into_bytes(), ino });
    let mut all = vec![inode(Body::Directory(names.collect()))];
    all.extend(inodes);
    Tree { inodes: all, layer_sizes: vec![u64::MAX] }
}

fn run(ino: u32, file_page: u32, zone_page: u32, count: u32) -> Run {
    Run { ino, file_page, zone_page, count }
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = (1u8..=255).prop_filter("a slash", |b| *b != b'/');
    let any_len = prop_oneof![4 => 1usize..20, 1 => 240usize..=255];
    any_len
        .prop_flat_map(move |len| prop::collection::vec(byte.clone(), len))
        .prop_filter("dots", |n| n != b"." && n != b"..")
}

fn body() -> impl Strategy<Value = Body> {
    let device = (0u32..1 << 12, 0u32..1 << 20);
    let size =
        prop_oneof![Just(0), 1u64..5, 4090u64..4100, 1u64..300_000, (1u64 << 32) - 5..(1 << 32) + 9000];
    let parts = prop::collection::vec((0u64..40_000, 1u64..40_000), 0..6);
    let regular = (size, parts, any::<bool>()).prop_map(|(size, parts, dense)| {
        let mut extents = Vec::new();
        let mut at = 0;
        for (gap, len) in parts {
            let start = if dense { at } else { at + gap };
            if start + len <= size {
                extents.push(Extent { file_offset: start, len, layer: 0, layer_offset: start });
                at = start + len;
            }
        }
        Body::Regular { size, content: ContentHash::of(b""), extents }
    });
    prop_oneof![
        4 => Just(Body::Directory(vec![])),
        4 => regular,
        2 => prop::collection::vec(1u8..=255, 1..4096).prop_map(Body::Symlink),
        1 => device.clone().prop_map(|(major, minor)| Body::CharDevice { major, minor }),
        1 => device.prop_map(|(major, minor)| Body::BlockDevice { major, minor }),
        1 => Just(Body::Fifo),
        1 => Just(Body::Socket),
    ]
}

fn xattrs() -> impl Strategy<Value = Vec<Xattr>> {
    let prefix = prop::sample::select(vec!["user.", "trusted.", "security.", "system.", "other."]);
    let name = (prefix, "[a-z]{0,40}").prop_map(|(p, n)| format!("{p}{n}").into_bytes());
    let acl = prop::sample::select(vec!["system.posix_acl_access", "system.posix_acl_default"]);
    let name = prop_oneof![5 => name, 1 => acl.prop_map(|n| n.as_bytes().to_vec())];
    let value = prop_oneof![4 => prop::collection::vec(any::<u8>(), 0..30), 1 => prop::collection::vec(any::<u8>(), 0..5000)];
    let all = prop::collection::btree_map(name, value, 0..4);
    prop_oneof![2 => Just(vec![]), 1 => all.prop_map(|m| m.into_iter().map(|(name, value)| Xattr { name, value }).collect())]
}

fn some_inode() -> impl Strategy<Value = Inode> {
    let times = (prop_oneof![0i64..2_000_000_000, any::<i64>()], 0u32..1_000_000_000);
    (0u16..=0o7777, any::<u32>(), any::<u32>(), times, xattrs(), body()).prop_map(
        |(mode, uid, gid, times, xattrs, body)| Inode {
            mode,
            uid,
            gid,
            mtime: times.0,
            mtime_nsec: times.1,
            xattrs,
            body,
        },
    )
}

/// Inodes find their directories and names among the inodes before them.
fn tree() -> impl Strategy<Value = Tree> {
    let node = || (any::<prop::sample::Index>(), name(), some_inode());
    let link = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), name());
    let many = prop_oneof![3 => 0usize..30, 1 => 300usize..600];
    let nodes = many.prop_flat_map(move |n| prop::collection::vec(node(), n));
    (nodes, prop::collection::vec(link, 0..10)).prop_map(|(nodes, links)| {
        let mut inodes = vec![inode(Body::Directory(vec![]))];
        let mut directories = vec![BTreeMap::from([])];
        let mut directory_of = BTreeMap::from([(0u32, 0usize)]);
        for (parent, name, node) in nodes {
            let parent = parent.index(directories.len());
            let ino = inodes.len() as u32;
            if directories[parent].contains_key(&name) {
                continue;
            }
            directories[parent].insert(name, ino);
            if matches!(node.body, Body::Directory(_)) {
                directory_of.insert(ino, directories.len());
                directories.push(BTreeMap::new());
            }
            inodes.push(node);
        }
        for (parent, target, name) in links {
            let target = target.index(inodes.len()) as u32;
            let parent = parent.index(directories.len());
            if !directory_of.contains_key(&target) {
                directories[parent].entry(name).or_insert(target);
            }
        }
        for (ino, directory) in directory_of {
            let entries = directories[directory].iter().map(|(n, i)| DirEntry { name: n.clone(), ino: *i });
            inodes[ino as usize].body = Body::Directory(entries.collect());
        }
        Tree { inodes, layer_sizes: vec![u64::MAX] }
    })
}

/// Disjoint runs on a zone of 100,000 pages, in any order.
fn runs(tree: &Tree) -> impl Strategy<Value = Vec<Run>> + use<> {
    let files: Vec<(u32, u64)> =
        (0u32..).zip(&tree.inodes).map(|(n, i)| (n, page::count(i.file_size()))).collect();
    let files: Vec<(u32, u64)> = files.into_iter().filter(|f| f.1 > 0).collect();
    let one = (any::<prop::sample::Index>(), 0u32..90, 1u32..90, 0u32..90_000, any::<bool>());
    prop::collection::vec(one, 0..if files.is_empty() { 1 } else { 40 }).prop_map(move |picks| {
        let mut runs: Vec<Run> = Vec::new();
        let mut ends: BTreeMap<u32, Run> = BTreeMap::new();
        for (pick, gap, count, zone, goes_on) in picks {
            let Some(&(ino, pages)) = (!files.is_empty()).then(|| pick.get(&files)) else { continue };
            let before = ends.get(&ino).copied().unwrap_or(run(ino, 0, zone, 0));
            // Often right behind the run before, in file and zone, as one piece or two.
            let gap = if goes_on { 0 } else { gap };
            let file_page = before.file_page + before.count + gap;
            let zone_page = if goes_on { before.zone_page + before.count } else { zone };
            let count = count.min(u32::try_from(pages).unwrap().saturating_sub(file_page));
            if count > 0 && zone_page + count <= 100_000 {
                let next = run(ino, file_page, zone_page, count);
                ends.insert(ino, next);
                runs.push(next);
            }
        }
        let half = runs.len() / 2;
        runs.rotate_left(half);
        runs
    })
}

/// Compares everything but content.
fn assert_same(found: &Found, inode: &Inode, nlink: u32) {
    assert_eq!(u32::from(found.mode), inode.st_mode());
    assert_eq!((found.uid, found.gid, found.nlink), (inode.uid, inode.gid, nlink));
    assert_eq!((found.mtime, found.mtime_nsec), (inode.mtime, inode.mtime_nsec));
    let storable = |x: &&Xattr| {
        let acl = x.name.starts_with(b"system.posix_acl_");
        acl || [&b"user."[..], b"trusted.", b"security."]
            .iter()
            .any(|p| x.name.starts_with(p) && x.name != *p)
    };
    let xattrs = inode.xattrs.iter().filter(storable).map(|x| (x.name.clone(), x.value.clone())).collect();
    assert_eq!(found.xattrs, xattrs);
    match &inode.body {
        Body::Regular { size, .. } => assert_eq!(found.size, *size),
        Body::Symlink(target) => assert_eq!(&found.bytes, target),
        Body::CharDevice { major, minor } | Body::BlockDevice { major, minor } => {
            assert_eq!((found.rdev >> 8) & 0xfff, *major);
            assert_eq!((found.rdev & 0xff) | ((found.rdev >> 12) & 0xfff00), *minor);
        }
        _ => {}
    }
}

fn check(tree: &Tree, runs: &[Run]) {
    let metadata = write(tree, runs, 100_000).unwrap();
    let reader = Reader::open(&metadata.image);
    let found = reader.walk();
    assert_eq!(reader.inodes, tree.inodes.len() as u64);
    let cold_device = if runs.is_empty() { 1 } else { 2 };
    assert_eq!(reader.devices.len(), cold_device);
    assert_eq!(reader.devices[cold_device - 1], metadata.cold.blocks());
    assert!(metadata.nids.is_sorted_by(|a, b| a < b));

    let mut pages_of: BTreeMap<u32, BTreeMap<u64, u32>> = BTreeMap::new();
    for r in runs {
        let pages = (0..r.count).map(|n| (u64::from(r.file_page + n), r.zone_page + n));
        pages_of.entry(r.ino).or_default().extend(pages);
    }
    // Every path of the tree, and no other.
    let mut paths = BTreeMap::new();
    let mut stack = vec![(Vec::new(), 0u32)];
    while let Some((path, ino)) = stack.pop() {
        if let Body::Directory(entries) = &tree.inodes[ino as usize].body {
            stack.extend(entries.iter().map(|e| ([&path[..], b"/", &e.name].concat(), e.ino)));
        }
        paths.insert(path, ino);
    }
    assert_eq!(found.keys().collect::<Vec<_>>(), paths.keys().collect::<Vec<_>>());
    let links = tree.link_counts();
    for (path, ino) in paths {
        let (inode, found) = (&tree.inodes[ino as usize], &found[&path]);
        assert_eq!(found.nid, metadata.nids[ino as usize]);
        assert_same(found, inode, links[ino as usize]);
        let Body::Regular { size, extents, .. } = &inode.body else { continue };
        let none = BTreeMap::new();
        let hot = pages_of.get(&ino).unwrap_or(&none);
        let pages = page::count(*size);
        // All pages of small files; of large ones those around the runs.
        let around = hot.keys().flat_map(|p| [p.saturating_sub(1), *p, *p + 1]);
        let probes: BTreeSet<u64> =
            around.chain([0, pages / 2]).chain(0..200).chain([pages.saturating_sub(1)]).collect();
        for page in probes.into_iter().filter(|p| *p < pages) {
            let expected = match (hot.get(&page), extents.is_empty()) {
                (Some(zone_page), _) => Some((1, *zone_page)),
                (None, true) => None,
                (None, false) => {
                    Some((cold_device as u16, metadata.cold.start_of(ino).unwrap() + page as u32))
                }
            };
            assert_eq!(found.chunks.page(page), expected, "page {page} of inode {ino}");
            if expected.is_some_and(|(d, _)| d == cold_device as u16) && !hot.contains_key(&page) {
                assert_eq!(metadata.cold.locate(expected.unwrap().1), Some((ino, page as u32)));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn reader_finds_what_was_written((tree, runs) in tree().prop_flat_map(|t| { let r = runs(&t); (Just(t), r) })) {
        tree.validate().unwrap();
        check(&tree, &runs);
    }
}

#[test]
fn chunks_are_as_large_as_the_runs_allow() {
    let tree =
        flat(vec![full(1 << 30), full(1 << 30), full(1 << 30), full(100 * 4096), file(1 << 40, vec![])]);
    let whole = run(2, 0, 7, 1 << 18);
    let third = run(3, 1024, 7, 2048);
    let small = [run(4, 0, 10, 3), run(4, 3, 13, 97)];
    let metadata = write(&tree, &[whole, third, small[0], small[1]], 1 << 18 | 7).unwrap();
    let found = Reader::open(&metadata.image).walk();
    let chunks = |n: u32| found[format!("/{n:06}").as_bytes()].chunks.len();
    assert_eq!([1, 2, 3, 4, 5].map(chunks), [1, 1, 256, 1, 1]);
}

#[test]
fn a_table_past_all_measure_makes_the_file_cold() {
    let tree = flat(vec![full(1 << 40), full(4096)]);
    let metadata = write(&tree, &[run(1, 5, 0, 1), run(2, 0, 0, 1)], 1).unwrap();
    let found = Reader::open(&metadata.image).walk();
    assert_eq!(found[&b"/000001"[..]].chunks.page(5), Some((2, 5)));
    assert_eq!(found[&b"/000002"[..]].chunks.page(0), Some((1, 0)));
}

#[test]
fn largest_file_fills_the_cold_device() {
    let largest = (u64::from(u32::MAX) - 1) * 4096;
    let metadata = write(&flat(vec![full(largest)]), &[], 0).unwrap();
    assert_eq!(metadata.cold.blocks(), u32::MAX - 1);
    let found = Reader::open(&metadata.image).walk();
    assert_eq!(found[&b"/000001"[..]].chunks.page(u64::from(u32::MAX) - 2), Some((1, u32::MAX - 2)));
    for files in [vec![full(largest + 1)], vec![full(largest), full(1)], vec![full(1 << 44), full(1 << 44)]] {
        assert!(matches!(write(&flat(files), &[], 0), Err(ErofsError::Content)));
    }
}

#[test]
fn what_cannot_be_stored_is_refused() {
    let value = |n: u8, len: usize| Xattr { name: format!("user.{n}").into_bytes(), value: vec![1; len] };
    let mut fits = full(1);
    fits.xattrs = (0..4).map(|n| value(n, 65_521)).collect();
    check(&flat(vec![fits.clone()]), &[]);
    fits.xattrs.push(value(5, 20));
    let error = write(&flat(vec![full(2), fits]), &[], 0).unwrap_err();
    assert_eq!(error.to_string(), "000002: more than 256 KiB of attributes");

    let tree = flat(vec![full(3 * 4096 - 1), inode(Body::Fifo)]);
    let refused = |runs: &[Run]| matches!(write(&tree, runs, 10), Err(ErofsError::Run { .. }));
    assert!(!refused(&[run(1, 0, 7, 3)]));
    assert!(refused(&[run(1, 0, 7, 4)]), "past the file");
    assert!(refused(&[run(1, 0, 8, 3)]), "past the zone");
    assert!(refused(&[run(1, 0, 0, 0)]), "empty");
    assert!(refused(&[run(2, 0, 0, 1)]), "not a file");
    assert!(refused(&[run(3, 0, 0, 1)]), "nothing");
    assert!(refused(&[run(1, 1, 0, 2), run(1, 0, 5, 2)]), "twice");
    assert!(refused(&[run(1, u32::MAX, 0, u32::MAX)]), "overflow");
}
