//! Every tar dialect, entry by entry.

use super::*;

/// A raw header: what the `tar` crate will not write.
fn header(path: &[u8], kind: u8, size: u64, change: impl FnOnce(&mut tar::Header)) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.as_mut_bytes()[156] = kind;
    header.set_size(size);
    header.set_mode(0o644);
    change(&mut header);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn padded(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    data.resize(data.len().next_multiple_of(512), 0);
    data
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + rest.to_string().len();
    if len.to_string().len() > rest.to_string().len() {
        len += 1;
    }
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

/// An extended header with `records`, then an entry.
fn pax(records: &[(&str, &[u8])], entry: &[u8]) -> Vec<u8> {
    let data: Vec<u8> = records.iter().flat_map(|(k, v)| record(k, v)).collect();
    [header(b"pax", b'x', data.len() as u64, |_| {}), padded(&data), entry.to_vec()].concat()
}

fn walk(tar: &[u8]) -> Result<Vec<Entry>, LayerError> {
    let mut tar = tar.to_vec();
    tar.extend_from_slice(&[0; 1024]);
    try_index(&tar, Compression::None).map(|i| i.layer.entries)
}

fn one(tar: &[u8]) -> Entry {
    let mut entries = walk(tar).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

fn inode(tar: &[u8]) -> Inode {
    match one(tar).kind {
        EntryKind::Inode(inode) => inode,
        other => panic!("{other:?}"),
    }
}

fn error(tar: &[u8]) -> String {
    walk(tar).expect_err("an error").to_string()
}

#[test]
fn every_type_of_file() {
    let device = |kind| {
        header(b"dev", kind, 0, |h| {
            h.set_device_major(259).unwrap();
            h.set_device_minor(70000).unwrap();
        })
    };
    assert_eq!(inode(&device(b'3')).body, Body::CharDevice { major: 259, minor: 70000 });
    assert_eq!(inode(&device(b'4')).body, Body::BlockDevice { major: 259, minor: 70000 });
    assert_eq!(inode(&header(b"d/", b'5', 0, |_| {})).body, Body::Directory(vec![]));
    assert_eq!(inode(&header(b"old-style/", 0, 0, |_| {})).body, Body::Directory(vec![]));
    assert_eq!(inode(&header(b"fifo", b'6', 0, |_| {})).body, Body::Fifo);
    let link = header(b"s", b'2', 0, |h| h.set_link_name_literal("../a//b").unwrap());
    assert_eq!(inode(&link).body, Body::Symlink(b"../a//b".to_vec()));
    assert_eq!(inode(&link).mode, 0o777);
    let link = header(b"h", b'1', 0, |h| h.set_link_name_literal("./a//b").unwrap());
    assert_eq!(one(&link), Entry { path: b"h".to_vec(), kind: EntryKind::HardLink(b"a/b".to_vec()) });
    for kind in [0, b'0', b'7'] {
        let body = inode(&[header(b"f", kind, 5, |_| {}), padded(b"hello")].concat()).body;
        let extents = vec![Extent { file_offset: 0, len: 5, layer: 0, layer_offset: 512 }];
        assert_eq!(body, Body::Regular { size: 5, content: ContentHash::of(b"hello"), extents });
    }
    let empty = Body::Regular { size: 0, content: ContentHash::of(b""), extents: vec![] };
    assert_eq!(inode(&header(b"f", b'0', 0, |_| {})).body, empty);
    assert!(error(&header(b"v", b'V', 0, |_| {})).contains("type 'V' is not supported"));
}

#[test]
fn only_files_have_data() {
    // As in Go's archive/tar: a size on anything else says nothing.
    for kind in [b'1', b'2', b'3', b'4', b'5', b'6'] {
        let odd = header(b"x", kind, 5, |h| h.set_link_name_literal("y").unwrap());
        assert_eq!(walk(&[odd.clone(), odd].concat()).unwrap().len(), 2, "type {kind}");
    }
}

#[test]
fn metadata_of_every_width() {
    let got = inode(&header(b"f", b'0', 0, |h| {
        h.set_mode(0o104_755);
        h.set_uid(u64::from(u32::MAX)); // base 256
        h.set_gid(7);
        h.set_mtime(1 << 40);
    }));
    assert_eq!((got.mode, got.uid, got.gid, got.mtime, got.mtime_nsec), (0o4755, u32::MAX, 7, 1 << 40, 0));
    let before_1970 = header(b"f", b'0', 0, |h| {
        h.as_old_mut().mtime = [0xff; 12];
    });
    assert_eq!(inode(&before_1970).mtime, -1);
    let blank = header(b"f", b'0', 0, |h| {
        h.as_old_mut().uid = *b"        ";
        h.as_old_mut().gid = *b"   17 \0 ";
    });
    assert_eq!((inode(&blank).uid, inode(&blank).gid), (0, 0o17));
    assert!(error(&header(b"f", b'0', 0, |h| h.set_uid(1 << 32))).contains("owner or group out of range"));
    assert!(error(&header(b"f", b'0', 0, |h| h.as_old_mut().uid = *b"bad\0\0\0\0\0")).contains("bad owner"));
    assert!(error(&header(b"f", b'0', 0, |h| h.as_old_mut().size = [0xff; 12])).contains("bad size"));
}

#[test]
fn pax_records_override_the_header() {
    let data = b"some data";
    let long = [b"dir/".to_vec(), vec![b'n'; 200]].concat();
    let entry = [header(b"f", b'0', 0, |_| {}), padded(data)].concat();
    let tar = pax(
        &[
            ("path", &long),
            ("size", b"9"),
            ("uid", b"4000000000"),
            ("gid", b"12"),
            ("mtime", b"1700000000.123456789999"),
            ("SCHILY.xattr.security.capability", b"\x01\x00=\n\x02"),
            ("SCHILY.xattr.user.b", b"2"),
            ("SCHILY.xattr.user.a", b"1"),
            ("SCHILY.xattr.user.b", b""),
            ("comment", b"ignored"),
        ],
        &entry,
    );
    let Entry { path, kind: EntryKind::Inode(got) } = one(&tar) else { panic!() };
    assert_eq!(path, long);
    assert_eq!((got.uid, got.gid), (4_000_000_000, 12));
    assert_eq!((got.mtime, got.mtime_nsec), (1_700_000_000, 123_456_789));
    let names: Vec<_> = got.xattrs.iter().map(|x| (x.name.as_slice(), x.value.as_slice())).collect();
    assert_eq!(
        names,
        [(&b"security.capability"[..], &b"\x01\x00=\n\x02"[..]), (b"user.a", b"1"), (b"user.b", b"")]
    );
    assert_eq!(got.file_size(), 9);
}

#[test]
fn pax_times_before_1970() {
    let at = |text: &[u8]| {
        let got = inode(&pax(&[("mtime", text)], &header(b"f", b'0', 0, |_| {})));
        (got.mtime, got.mtime_nsec)
    };
    assert_eq!(at(b"-1"), (-1, 0));
    assert_eq!(at(b"-1.25"), (-2, 750_000_000));
    assert_eq!(at(b"5.000000001"), (5, 1));
    assert_eq!(at(b"5."), (5, 0));
    for bad in [&b"x"[..], b"1.x", b"--1", b"99999999999999999999"] {
        let tar = pax(&[("mtime", bad)], &header(b"f", b'0', 0, |_| {}));
        assert!(error(&tar).contains("bad value of extended header \"mtime\""));
    }
}

#[test]
fn pax_records_end_with_their_entry_and_global_ones_do_nothing() {
    let file = |name: &[u8]| header(name, b'0', 0, |_| {});
    let global = record("path", b"global");
    let tar = [
        pax(&[("path", b"renamed")], &file(b"a")),
        header(b"g", b'g', global.len() as u64, |_| {}),
        padded(&global),
        file(b"b"),
    ]
    .concat();
    let paths: Vec<_> = walk(&tar).unwrap().into_iter().map(|e| e.path).collect();
    assert_eq!(paths, [b"renamed".to_vec(), b"b".to_vec()]);
}

#[test]
fn damaged_pax_records_are_refused() {
    let file = header(b"f", b'0', 0, |_| {});
    for bad in [
        &b"x path=a\n"[..],
        b"path=a\n",
        b"9999 path=a\n",
        b"3 path=a\n",
        b"9 path=a",
        b"11 path=a\n",
        b"7 =aaa\n",
        b"99999999999999999999999 path=a\n",
        b"12 path=a\0b\n",
        b"0 path=a\n",
        b"1 ",
    ] {
        let tar = [header(b"x", b'x', bad.len() as u64, |_| {}), padded(bad), file.clone()].concat();
        assert!(error(&tar).contains("extended header"), "{}", String::from_utf8_lossy(bad));
    }
    let tar = header(b"x", b'x', (1 << 20) + 1, |_| {});
    assert!(error(&tar).contains("too long"));
    // Nothing after it.
    assert!(try_index(&pax(&[("path", b"x")], b""), Compression::None).is_err());
}

#[test]
fn gnu_and_ustar_long_names() {
    let long: String = "d/".repeat(100) + &"n".repeat(150);
    let target: String = "t/".repeat(200);
    let mut tar = tar::Builder::new(Vec::new());
    let mut h = tar::Header::new_gnu();
    h.set_entry_type(tar::EntryType::Symlink);
    h.set_size(0);
    tar.append_link(&mut h, &long, &target).unwrap();
    let indexed = index(&tar.into_inner().unwrap(), Compression::None);
    assert_eq!(indexed.layer.entries[0].path, long.as_bytes());
    let EntryKind::Inode(inode) = &indexed.layer.entries[0].kind else { panic!() };
    assert_eq!(inode.body, Body::Symlink(target.into_bytes()));

    let prefixed = |trailer: &[u8]| {
        header(b"name", b'0', 0, |h| {
            let ustar = h.as_ustar_mut().unwrap();
            ustar.prefix[..3].copy_from_slice(b"pre");
            ustar.prefix[131..135].copy_from_slice(b"time");
            ustar.pad[12 - trailer.len()..].copy_from_slice(trailer);
        })
    };
    assert_eq!(one(&prefixed(b"")).path, b"pre/name");
    let full = header(&[b'n'; 100], b'0', 0, |h| h.as_ustar_mut().unwrap().prefix = [b'p'; 155]);
    assert_eq!(one(&full).path, [vec![b'p'; 155], b"/".to_vec(), vec![b'n'; 100]].concat());
    let star = header(b"name", b'0', 0, |h| {
        let ustar = h.as_ustar_mut().unwrap();
        ustar.prefix[..131].fill(b'p');
        ustar.prefix[131..].fill(b'1');
        ustar.pad[8..].copy_from_slice(b"tar\0");
    });
    assert_eq!(one(&star).path, [vec![b'p'; 131], b"/name".to_vec()].concat());
    // The same bytes are times in a GNU header.
    let gnu = header(b"name", b'0', 0, |h| {
        h.as_ustar_mut().unwrap().prefix.fill(b'1');
        h.as_mut_bytes()[257..265].copy_from_slice(b"ustar  \0");
    });
    assert_eq!(one(&gnu).path, b"name");
}

#[test]
fn paths_stay_inside_the_root() {
    for (raw, clean) in [
        ("./a", "a"),
        ("a/", "a"),
        ("/a//b", "a/b"),
        ("../../a", "a"),
        ("a/../../b", "b"),
        ("a/./b/..", "a"),
        ("./", ""),
        ("/", ""),
    ] {
        assert_eq!(one(&header(raw.as_bytes(), b'5', 0, |_| {})).path, clean.as_bytes(), "{raw}");
    }
    assert!(error(&header(b".", b'0', 0, |_| {})).contains("root must be a directory"));
    let long = [b'x'; 256];
    assert!(error(&pax(&[("path", &long)], &header(b"f", b'0', 0, |_| {}))).contains("name is too long"));
    let long = b"x/".repeat(2049);
    assert!(error(&pax(&[("path", &long)], &header(b"f", b'0', 0, |_| {}))).contains("path is too long"));
}

#[test]
fn whiteouts_are_told_from_files() {
    let kind = |path: &[u8]| one(&header(path, b'0', 0, |_| {}));
    assert_eq!(kind(b".wh.a"), Entry { path: b"a".to_vec(), kind: EntryKind::Whiteout });
    assert_eq!(kind(b"d/e/.wh.a"), Entry { path: b"d/e/a".to_vec(), kind: EntryKind::Whiteout });
    assert_eq!(kind(b"d/e/.wh..wh..opq"), Entry { path: b"d/e".to_vec(), kind: EntryKind::Opaque });
    assert_eq!(kind(b".wh..wh..opq"), Entry { path: b"".to_vec(), kind: EntryKind::Opaque });
    for aufs in [&b".wh..wh.aufs"[..], b".wh..wh.plnk/1.2", b".wh..wh.orph/", b"d/.wh..wh.x"] {
        assert_eq!(walk(&header(aufs, b'0', 0, |_| {})).unwrap(), []);
    }
    for bad in [&b".wh."[..], b"d/.wh..", b"d/.wh..."] {
        assert!(error(&header(bad, b'0', 0, |_| {})).contains("whiteout of no name"));
    }
}

#[test]
fn attributes_that_could_do_harm_are_dropped() {
    let name = |n: &str| format!("SCHILY.xattr.{n}");
    let given = [
        "trusted.overlay.opaque",
        "user.overlay.redirect",
        "trusted.x",
        "user.x",
        "security.selinux",
        "system.posix_acl_access",
        "system.other",
        "com.apple.quarantine",
    ]
    .map(name);
    let records: Vec<(&str, &[u8])> = given.iter().map(|n| (n.as_str(), &b"v"[..])).collect();
    let names = |kind: u8| -> Vec<String> {
        let link = header(b"f", kind, 0, |h| h.set_link_name_literal("t").unwrap());
        let x = inode(&pax(&records, &link)).xattrs;
        x.into_iter().map(|x| String::from_utf8(x.name).unwrap()).collect()
    };
    assert_eq!(names(b'0'), ["security.selinux", "system.posix_acl_access", "trusted.x", "user.x"]);
    // The kernel lets `user.` attributes on files and directories only.
    assert_eq!(names(b'2'), ["security.selinux", "system.posix_acl_access", "trusted.x"]);
    for (key, value) in [
        (name("user."), vec![]),
        (name(&format!("user.{}", "x".repeat(251))), vec![]),
        (name("user.x"), vec![0; 65536]),
    ] {
        let tar = pax(&[(&key, &value)], &header(b"f", b'0', 0, |_| {}));
        assert!(error(&tar).contains("bad extended attribute"), "{key}");
    }
}

/// A sparse file of 20000 bytes, data at 4096 and at 12288.
const MAP: [(u64, u64); 2] = [(4096, 1000), (12288, 100)];

fn sparse_content() -> (Vec<u8>, Vec<u8>) {
    let stored = content(3, 1100);
    let mut file = vec![0; 20000];
    file[4096..5096].copy_from_slice(&stored[..1000]);
    file[12288..12388].copy_from_slice(&stored[1000..]);
    (stored, file)
}

fn check_sparse(inode: &Inode, layer_offset: u64) {
    let (_, file) = sparse_content();
    let extents = vec![
        Extent { file_offset: 4096, len: 1000, layer: 0, layer_offset },
        Extent { file_offset: 12288, len: 100, layer: 0, layer_offset: layer_offset + 1000 },
    ];
    assert_eq!(inode.body, Body::Regular { size: 20000, content: ContentHash::of(&file), extents });
}

fn old_sparse(map: &[(u64, u64)], size: u64, stored: &[u8]) -> Vec<u8> {
    let mut extended = Vec::new();
    let head = header(b"sparse", b'S', stored.len() as u64, |h| {
        h.as_mut_bytes()[257..265].copy_from_slice(b"ustar  \0");
        let gnu = h.as_gnu_mut().unwrap();
        gnu.set_real_size(size);
        let mut map = map.iter();
        for (slot, (offset, len)) in gnu.sparse.iter_mut().zip(&mut map) {
            slot.set_offset(*offset);
            slot.set_length(*len);
        }
        gnu.set_is_extended(map.len() > 0);
        while map.len() > 0 {
            let mut block = tar::GnuExtSparseHeader::new();
            for (slot, (offset, len)) in block.sparse_mut().iter_mut().zip(&mut map) {
                slot.set_offset(*offset);
                slot.set_length(*len);
            }
            block.set_is_extended(map.len() > 0);
            extended.extend_from_slice(block.as_bytes());
        }
    });
    [head, extended, padded(stored)].concat()
}

#[test]
fn sparse_files_of_every_format() {
    let (stored, _) = sparse_content();
    let file = |size: usize| header(b"f", b'0', size as u64, |_| {});
    check_sparse(&inode(&old_sparse(&MAP, 20000, &stored)), 512);

    let v00 = pax(
        &[
            ("GNU.sparse.size", b"20000"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.offset", b"4096"),
            ("GNU.sparse.numbytes", b"1000"),
            ("GNU.sparse.offset", b"12288"),
            ("GNU.sparse.numbytes", b"100"),
        ],
        &[file(1100), padded(&stored)].concat(),
    );
    check_sparse(&inode(&v00), 1536);

    let v01 = pax(
        &[
            ("GNU.sparse.size", b"20000"),
            ("GNU.sparse.name", b"real"),
            ("GNU.sparse.map", b"4096,1000,12288,100,20000,0"),
        ],
        &[file(1100), padded(&stored)].concat(),
    );
    assert_eq!(one(&v01).path, b"real");
    check_sparse(&inode(&v01), 1536);

    let map = padded(b"3\n4096\n1000\n12288\n100\n20000\n0\n");
    let v10 = pax(
        &[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"real"),
            ("GNU.sparse.realsize", b"20000"),
        ],
        &[file(map.len() + 1100), map, padded(&stored)].concat(),
    );
    assert_eq!(one(&v10).path, b"real");
    check_sparse(&inode(&v10), 2048);
}

#[test]
fn sparse_maps_of_many_blocks_and_of_none() {
    let map: Vec<(u64, u64)> = (0..60).map(|n| (n * 1024, 512)).collect();
    let stored = content(9, 60 * 512);
    let mut file = vec![0; 60 * 1024];
    for (n, piece) in stored.chunks(512).enumerate() {
        file[n * 1024..n * 1024 + 512].copy_from_slice(piece);
    }
    let got = inode(&old_sparse(&map, file.len() as u64, &stored));
    let Body::Regular { size, content, extents } = got.body else { panic!() };
    assert_eq!((size, content, extents.len()), (61440, ContentHash::of(&file), 60));

    let hole = inode(&old_sparse(&[], 10000, b""));
    let zeros = ContentHash::of(&[0; 10000]);
    assert_eq!(hole.body, Body::Regular { size: 10000, content: zeros, extents: vec![] });
    let hole =
        pax(&[("GNU.sparse.size", b"10000"), ("GNU.sparse.numblocks", b"0")], &header(b"f", b'0', 0, |_| {}));
    assert_eq!(inode(&hole).file_size(), 10000);
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    let (stored, _) = sparse_content();
    for (map, size, reason) in [
        (&[(4096, 1000), (4200, 100)][..], 20000, "overlap"),
        (&[(12288, 100), (4096, 1000)], 20000, "overlap"),
        (&[(4096, 1000), (19950, 100)], 20000, "past the end"),
        (&[(4096, 1000)], 20000, "does not match"),
        (&[(4096, 1000), (8192, 101)], 20000, "does not match"),
        (&[(4096, 1100)], (1 << 44) + 1, "too large"),
        (&[(4096, 1100)], 1 << 43, "bytes of holes"),
    ] {
        let message = error(&old_sparse(map, size, &stored));
        assert!(message.contains(reason), "{message}");
    }
    let in_data = |map: &[u8]| {
        let map = padded(map);
        let records: [(&str, &[u8]); 2] = [("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"20000")];
        pax(&records, &[header(b"f", b'0', map.len() as u64, |_| {}), map].concat())
    };
    for bad in [&b"x\n"[..], b"1\n2\n", b"9999999999\n", b"123456789012345678901\n", b"\n", b"1\n1\n1\n"] {
        assert!(error(&in_data(bad)).contains("sparse"), "{}", String::from_utf8_lossy(bad));
    }
    let no_size = pax(&[("GNU.sparse.map", b"0,1")], &[header(b"f", b'0', 1, |_| {}), padded(b"x")].concat());
    assert!(error(&no_size).contains("without a size"));
}

#[test]
fn the_end_of_an_archive() {
    let file = header(b"f", b'0', 0, |_| {});
    // Without zero blocks, with one, with two and something behind: as Go's archive/tar takes them.
    for end in [vec![], vec![0; 512], [vec![0; 1024], b"garbage".to_vec()].concat()] {
        let tar = [file.clone(), end].concat();
        let indexed = index(&tar, Compression::None);
        assert_eq!((indexed.layer.entries.len(), &indexed.tar), (1, &tar));
    }
    let lone = [file.clone(), vec![0; 512], file].concat();
    assert!(error(&lone).contains("empty header"));
}

#[test]
fn a_wrong_checksum_is_refused_and_a_signed_one_taken() {
    let mut tar = header("\u{e9}".as_bytes(), b'0', 0, |_| {});
    tar[0] ^= 1;
    assert!(error(&tar).contains("checksum"));
    tar[0] ^= 1;
    let sum: i64 = (0..512).map(|n| if (148..156).contains(&n) { 32 } else { i64::from(tar[n] as i8) }).sum();
    tar[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(one(&tar).path, "\u{e9}".as_bytes());
}
