//! Layers on layers.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn hash() -> ContentHash {
    ContentHash::of(b"")
}

fn node(body: Body) -> EntryKind {
    EntryKind::Inode(Inode { mode: 0o644, uid: 1, gid: 2, mtime: 3, mtime_nsec: 4, xattrs: vec![], body })
}

fn file() -> EntryKind {
    node(Body::Regular { size: 0, content: hash(), extents: vec![] })
}

fn dir() -> EntryKind {
    node(Body::Directory(vec![]))
}

fn link(target: &str) -> EntryKind {
    node(Body::Symlink(target.into()))
}

fn hard(target: &str) -> EntryKind {
    EntryKind::HardLink(target.into())
}

const GONE: EntryKind = EntryKind::Whiteout;
const OPAQUE: EntryKind = EntryKind::Opaque;

fn layer(entries: &[(&str, EntryKind)]) -> IndexedLayer {
    let entries =
        entries.iter().map(|(p, k)| Entry { path: p.as_bytes().to_vec(), kind: k.clone() }).collect();
    let mut indexed = index(b"", Compression::None).layer;
    indexed.entries = entries;
    indexed.layer.size = 1 << 20;
    indexed
}

fn try_merge(layers: &[&[(&str, EntryKind)]]) -> Result<Tree, LayerError> {
    merge(&layers.iter().map(|l| layer(l)).collect::<Vec<_>>())
}

/// Paths of a tree, sorted, directories with a slash.
fn paths(tree: &Tree) -> Vec<String> {
    let mut out = Vec::new();
    let mut stack = vec![(0usize, String::new())];
    while let Some((ino, path)) = stack.pop() {
        let Body::Directory(entries) = &tree.inodes[ino].body else {
            out.push(path);
            continue;
        };
        if ino > 0 {
            out.push(format!("{path}/"));
        }
        for e in entries {
            let name = String::from_utf8(e.name.clone()).unwrap();
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            stack.push((e.ino as usize, path));
        }
    }
    out.sort();
    out
}

fn merged(layers: &[&[(&str, EntryKind)]]) -> Vec<String> {
    paths(&try_merge(layers).unwrap())
}

fn refused(layers: &[&[(&str, EntryKind)]]) -> String {
    try_merge(layers).expect_err("an error").to_string()
}

#[test]
fn whiteouts_hide_lower_layers_only_wherever_they_stand() {
    let lower = &[("a", file()), ("d", dir()), ("d/x", file()), ("d/s", dir()), ("d/s/y", file())][..];
    assert_eq!(merged(&[lower, &[("a", GONE), ("d", GONE), ("missing", GONE), ("no/way", GONE)]]), [""; 0]);
    // A file of the same layer survives a whiteout before it and one behind it.
    assert_eq!(merged(&[lower, &[("d", GONE), ("a", GONE), ("a", file())]]), ["a"]);
    assert_eq!(merged(&[lower, &[("a", file()), ("a", GONE), ("d", GONE)]]), ["a"]);
    assert_eq!(merged(&[lower, &[("d/s/new", file()), ("d", GONE)]]), ["a", "d/", "d/s/", "d/s/new"]);
    assert_eq!(merged(&[lower, &[("d", dir()), ("d", GONE)]]), ["a", "d/"]);
    // The way to a whiteout is not created.
    assert_eq!(merged(&[&[("p/q", GONE), ("p2", OPAQUE)]]), [""; 0]);
    // A whiteout below a file hides nothing.
    assert_eq!(merged(&[&[("a", file())], &[("a/b", GONE), ("a", OPAQUE)]]), ["a"]);
}

#[test]
fn opaque_directories_keep_what_their_layer_brings() {
    let lower = &[("d", dir()), ("d/x", file()), ("d/s", dir()), ("d/s/y", file()), ("z", file())][..];
    let news = [("d", dir()), ("d/n", file()), ("d/s/m", file())];
    for at in 0..=news.len() {
        let mut upper = news.to_vec();
        upper.insert(at, ("d", OPAQUE));
        assert_eq!(merged(&[lower, &upper]), ["d/", "d/n", "d/s/", "d/s/m", "z"], "opaque at {at}");
    }
    assert_eq!(merged(&[lower, &[("k", file()), ("", OPAQUE)]]), ["k"]);
    // The next layer sees nothing of it.
    assert_eq!(merged(&[lower, &[("d", OPAQUE)], &[("d/x", file())]]), ["d/", "d/x", "z"]);
}

#[test]
fn an_opaque_directory_in_place_of_a_link_leaves_the_target_alone() {
    let lower = &[("usr", dir()), ("usr/lib", dir()), ("usr/lib/x", file()), ("lib", link("usr/lib"))][..];
    let upper = &[("lib", dir()), ("lib", OPAQUE), ("lib/y", file())][..];
    assert_eq!(merged(&[lower, upper]), ["lib/", "lib/y", "usr/", "usr/lib/", "usr/lib/x"]);
}

#[test]
fn links_in_the_way_are_followed_inside_the_root() {
    let lower = &[("usr", dir()), ("usr/lib", dir()), ("usr/lib/x", file())][..];
    for target in ["usr/lib", "/usr/lib", "../../usr/./lib/", "/../usr/lib", "usr/lib/../lib"] {
        let upper = &[("lib", link(target)), ("lib/new", file()), ("lib/x", GONE)][..];
        assert_eq!(merged(&[lower, upper]), ["lib", "usr/", "usr/lib/", "usr/lib/new"], "{target}");
    }
    assert_eq!(merged(&[&[("l", link("to/be")), ("l/f", file())]]), ["l", "to/", "to/be/", "to/be/f"]);
    assert!(
        refused(&[&[("a", link("b")), ("b", link("a")), ("a/f", file())]])
            .contains("too many symbolic links")
    );
    // The last component is replaced, not followed.
    assert_eq!(
        merged(&[&[("d", dir()), ("l", link("d"))], &[("l", dir()), ("l/f", file())]]),
        ["d/", "l/", "l/f"]
    );
}

#[test]
fn later_entries_win() {
    let lower = &[("a", dir()), ("a/x", file()), ("b", file()), ("c", link("b"))][..];
    let upper = &[("a", file()), ("b", dir()), ("b/y", file()), ("c", file())][..];
    assert_eq!(merged(&[lower, upper]), ["a", "b/", "b/y", "c"]);
    let mut twice = lower.to_vec();
    twice.extend_from_slice(upper);
    assert_eq!(merged(&[&twice]), ["a", "b/", "b/y", "c"]);
}

#[test]
fn a_directory_over_a_directory_is_new_metadata() {
    let mut first = layer(&[("d", dir()), ("d/x", file())]);
    let EntryKind::Inode(inode) = &mut first.entries[0].kind else { panic!() };
    inode.xattrs = vec![Xattr { name: b"user.a".to_vec(), value: b"1".to_vec() }];
    let mut second = layer(&[("d", dir()), ("", dir())]);
    let EntryKind::Inode(inode) = &mut second.entries[0].kind else { panic!() };
    (inode.mode, inode.mtime) = (0o700, 99);
    let tree = merge(&[first, second]).unwrap();
    assert_eq!(paths(&tree), ["d/", "d/x"]);
    let d = &tree.inodes[tree.lookup(b"d").unwrap() as usize];
    assert_eq!((d.mode, d.mtime, d.xattrs.len()), (0o700, 99, 0));
    assert_eq!((tree.inodes[0].mode, tree.inodes[0].uid), (0o644, 1));
}

#[test]
fn missing_parents_are_made_and_a_file_is_none() {
    let tree = try_merge(&[&[("a/b/c", file())]]).unwrap();
    assert_eq!(paths(&tree), ["a/", "a/b/", "a/b/c"]);
    let a = &tree.inodes[tree.lookup(b"a/b").unwrap() as usize];
    assert_eq!((a.mode, a.uid, a.gid, a.mtime), (0o755, 0, 0, 0));
    assert!(
        refused(&[&[("f", file())], &[("f/x", file())]]).contains("\"f/x\": a parent is not a directory")
    );
}

#[test]
fn hard_links_reach_across_layers() {
    let tree = try_merge(&[
        &[("d", dir()), ("d/f", file()), ("l", link("d"))],
        &[("g", hard("l/f")), ("h", hard("l")), ("d/f", GONE)],
        &[("g2", hard("g")), ("g", file())],
    ])
    .unwrap();
    assert_eq!(paths(&tree), ["d/", "g", "g2", "h", "l"]);
    let links = tree.link_counts();
    let of = |path: &[u8]| links[tree.lookup(path).unwrap() as usize];
    assert_eq!((of(b"g"), of(b"g2"), of(b"h"), of(b"l")), (1, 1, 2, 2));
    assert!(refused(&[&[("x", hard("nothing"))]]).contains("missing file"));
    assert!(refused(&[&[("d", dir()), ("x", hard("d"))]]).contains("to a directory"));
    // Unpackers remove what is there before they link.
    assert!(refused(&[&[("x", file()), ("x", hard("x"))]]).contains("missing file"));
}

#[test]
fn extents_name_their_layer() {
    let body = |offset| {
        let extents = vec![Extent { file_offset: 0, len: 10, layer: 0, layer_offset: offset }];
        node(Body::Regular { size: 10, content: hash(), extents })
    };
    let tree = try_merge(&[&[("a", body(512))], &[("b", body(1024)), ("c", hard("a"))]]).unwrap();
    let place = |path: &[u8]| {
        let Body::Regular { extents, .. } = &tree.inodes[tree.lookup(path).unwrap() as usize].body else {
            panic!()
        };
        (extents[0].layer, extents[0].layer_offset)
    };
    assert_eq!((place(b"a"), place(b"b"), place(b"c")), ((0, 512), (1, 1024), (0, 512)));
    assert_eq!(tree.layer_sizes, [1 << 20, 1 << 20]);
}

#[test]
fn hostile_numbers_of_steps_end() {
    // Links that stretch every path to the limit.
    let long = "d/".repeat(2000);
    let mut entries: Vec<(String, EntryKind)> = vec![("l0".into(), link(&long)), ("l0/.x".into(), file())];
    entries.push(("l".into(), link(&format!("l0/{}", "../".repeat(1300)))));
    for n in 0..10_000 {
        entries.push((format!("l/f{n}"), file()));
    }
    let entries: Vec<(&str, EntryKind)> = entries.iter().map(|(p, k)| (p.as_str(), k.clone())).collect();
    assert!(refused(&[&entries]).contains("directories to search"));
}

/// A file system as a map from path to what is there; a reference for [`merge`] without links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thing {
    Dir(u16),
    File(u16),
}

#[derive(Clone, Debug)]
enum Change {
    Dir(String, u16),
    File(String, u16),
    Gone(String),
    Opaque(String),
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec("[abc]", 1..4).prop_map(|parts| parts.join("/"))
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (path(), 0..0o1000u16).prop_map(|(p, m)| Change::Dir(p, m)),
        4 => (path(), 0..0o1000u16).prop_map(|(p, m)| Change::File(p, m)),
        1 => path().prop_map(Change::Gone),
        1 => path().prop_map(Change::Opaque),
    ]
}

/// Applies one layer to `lower`: its own entries build a second map, then both are overlaid. `None` when an entry has
/// a file for a parent.
fn overlay(lower: &BTreeMap<String, Thing>, changes: &[Change]) -> Option<BTreeMap<String, Thing>> {
    let below = |p: &str, dir: &str| p.strip_prefix(dir).is_some_and(|r| r.starts_with('/'));
    let parents =
        |p: &str| -> Vec<String> { p.match_indices('/').map(|(at, _)| p[..at].to_owned()).collect() };
    let mut tree = lower.clone();
    let mut ours = std::collections::BTreeSet::new();
    for change in changes {
        match change {
            Change::Dir(p, mode) | Change::File(p, mode) => {
                for parent in parents(p) {
                    if let Thing::File(_) = *tree.entry(parent.clone()).or_insert(Thing::Dir(0o755)) {
                        return None;
                    }
                    ours.insert(parent);
                }
                let is_dir = matches!(change, Change::Dir(..));
                if !(is_dir && matches!(tree.get(p), Some(Thing::Dir(_)))) {
                    tree.retain(|q, _| !below(q, p));
                    ours.retain(|q| !below(q, p));
                }
                tree.insert(p.clone(), if is_dir { Thing::Dir(*mode) } else { Thing::File(*mode) });
                ours.insert(p.clone());
            }
            Change::Gone(p) => tree.retain(|q, _| ours.contains(q) || !(q == p || below(q, p))),
            Change::Opaque(p) => tree.retain(|q, _| ours.contains(q) || !below(q, p)),
        }
    }
    Some(tree)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn merge_agrees_with_a_map(layers in proptest::collection::vec(proptest::collection::vec(change(), 0..12), 1..4)) {
        let mut model = Some(BTreeMap::new());
        let mut indexed = Vec::new();
        for changes in &layers {
            model = model.and_then(|m| overlay(&m, changes));
            let entries: Vec<(&str, EntryKind)> = changes.iter().map(|change| match change {
                Change::Dir(p, m) => (p.as_str(), with_mode(dir(), *m)),
                Change::File(p, m) => (p.as_str(), with_mode(file(), *m)),
                Change::Gone(p) => (p.as_str(), GONE),
                Change::Opaque(p) => (p.as_str(), OPAQUE),
            }).collect();
            indexed.push(layer(&entries));
        }
        let Some(model) = model else {
            prop_assert!(merge(&indexed).is_err());
            return Ok(());
        };
        let tree = merge(&indexed).unwrap();
        let mut found = BTreeMap::new();
        for p in paths(&tree) {
            let p = p.trim_end_matches('/').to_owned();
            let inode = &tree.inodes[tree.lookup(p.as_bytes()).unwrap() as usize];
            let is_dir = matches!(inode.body, Body::Directory(_));
            found.insert(p, if is_dir { Thing::Dir(inode.mode) } else { Thing::File(inode.mode) });
        }
        prop_assert_eq!(found, model);
    }
}

fn with_mode(kind: EntryKind, mode: u16) -> EntryKind {
    match kind {
        EntryKind::Inode(inode) => EntryKind::Inode(Inode { mode, ..inode }),
        other => other,
    }
}
