//! Layers packed by real programs: indexed, merged and read at random like the files they were made from.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use sha2::{Digest as _, Sha256};
use tdfs_agent::fetch::{ImageLayers, pull_image};
use tdfs_agent::oci::layer::{IndexedLayer, index_layer, merge, read_span};
use tdfs_agent::oci::{ClientOptions, Image, Reference, Store};
use tdfs_common::layer_index::Compression;
use tdfs_common::tree::{Body, Tree};
use tdfs_tests::fingerprint::{Entry, Fingerprint};
use tdfs_tests::images::{Unpacked, image};
use tdfs_tests::synthetic::Random;

/// What programs would see of a tree whose layers are at hand uncompressed.
fn fingerprint(tree: &Tree, layers: &[Vec<u8>]) -> Fingerprint {
    let links = tree.link_counts();
    let mut names: BTreeMap<u32, PathBuf> = BTreeMap::new();
    let mut entries = BTreeMap::new();
    let mut todo = vec![(PathBuf::new(), 0u32)];
    // In the order of a walk that sorts by file name.
    while let Some((path, ino)) = todo.pop() {
        let inode = &tree.inodes[ino as usize];
        let mut seen = Entry {
            mode: inode.st_mode(),
            uid: inode.uid,
            gid: inode.gid,
            nlink: links[ino as usize].into(),
            first_name: names.entry(ino).or_insert_with(|| path.clone()).clone(),
            mtime: (inode.mtime, inode.mtime_nsec.into()),
            rdev: 0,
            xattrs: BTreeMap::new(),
            target: None,
            size: inode.file_size(),
            sha256: None,
        };
        for x in &inode.xattrs {
            seen.xattrs.insert(String::from_utf8_lossy(&x.name).into_owned(), x.value.clone());
        }
        match &inode.body {
            Body::Directory(children) => {
                seen.nlink = 0;
                for child in children.iter().rev() {
                    todo.push((path.join(OsStr::from_bytes(&child.name)), child.ino));
                }
            }
            Body::Regular { size, extents, .. } => {
                let mut file = vec![0; *size as usize];
                for e in extents {
                    let from = &layers[e.layer as usize][e.layer_offset as usize..][..e.len as usize];
                    file[e.file_offset as usize..][..e.len as usize].copy_from_slice(from);
                }
                seen.sha256 = Some(hex::encode(Sha256::digest(&file)));
            }
            Body::Symlink(target) => {
                seen.size = target.len() as u64;
                seen.target = Some(OsStr::from_bytes(target).into());
            }
            Body::CharDevice { major, minor } | Body::BlockDevice { major, minor } => {
                seen.rdev = makedev((*major).into(), (*minor).into());
            }
            Body::Fifo | Body::Socket => {}
        }
        if !path.as_os_str().is_empty() {
            entries.insert(path, seen);
        }
    }
    entries.into_iter().collect()
}

/// Changes every entry, where a format cannot hold all of it.
fn mapped(print: &Fingerprint, change: impl Fn(&mut Entry)) -> Fingerprint {
    let entries = print.entries().iter().map(|(path, entry)| {
        let mut entry = entry.clone();
        change(&mut entry);
        (path.clone(), entry)
    });
    entries.collect()
}

fn index(blob: &[u8], compression: Compression) -> Result<(IndexedLayer, Vec<u8>, Vec<u8>)> {
    let (mut tar, mut windows) = (Vec::new(), Vec::new());
    let indexed = index_layer(blob, compression, &mut tar, &mut windows)?;
    Ok((indexed, tar, windows))
}

/// A tree with what archivers stumble over. Names stay under what ustar can hold unless `long`.
fn awkward_tree(root: &Path, seed: u64, long: bool) -> Result<()> {
    let mut random = Random(seed);
    let mut dirs = vec![root.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    for n in 0..120 {
        let dir = &dirs[random.below(dirs.len() as u64) as usize];
        let mut name = format!("n{n}");
        if long && random.below(5) == 0 {
            name.push_str(&"x".repeat(random.below(240) as usize));
        }
        let path = dir.join(name);
        match random.below(12) {
            0 | 1 => {
                fs::create_dir(&path)?;
                dirs.push(path);
            }
            2 => symlink("t".repeat(1 + random.below(if long { 300 } else { 90 }) as usize), &path)?,
            3 if !files.is_empty() => {
                fs::hard_link(&files[random.below(files.len() as u64) as usize], &path)?;
            }
            4 => mknod(&path, SFlag::S_IFIFO, Mode::from_bits_truncate(0o640), 0)?,
            5 => {
                let device = makedev(1 + random.below(4000), random.below(1 << 20));
                mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), device)?;
            }
            kind => {
                let file = File::create(&path)?;
                let mut end = 0;
                // Pieces with holes between them, some at the end.
                for _ in 0..random.below(if kind < 9 { 2 } else { 40 }) {
                    let len = 1 + random.below(9000) as usize;
                    let piece = random.bytes(len);
                    file.write_all_at(&piece, end)?;
                    end += piece.len() as u64 + random.below(3) * random.below(40_000);
                }
                file.set_len(end)?;
                file.set_permissions(fs::Permissions::from_mode(random.below(0o10000) as u32 | 0o400))?;
                if random.below(3) == 0 {
                    xattr::set(&path, format!("user.{n}"), &random.bytes(20))?;
                }
                if random.below(4) == 0 {
                    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                    xattr::set(&path, "security.capability", &capability)?;
                }
                files.push(path);
            }
        }
    }
    Ok(())
}

fn pack(root: &Path, arguments: &[&str]) -> Result<Vec<u8>> {
    let packed = Command::new("tar")
        .args(["--create", "--numeric-owner", "--directory"])
        .arg(root)
        .args(arguments)
        .arg(".")
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(packed.status.success(), "tar {arguments:?}: {}", packed.status);
    Ok(packed.stdout)
}

/// What GNU tar packs in each of its formats is, merged, the tree it packed.
#[test]
fn gnu_tar_in_every_format() -> Result<()> {
    let pax = ["--format=pax", "--xattrs", "--xattrs-include=*"];
    for seed in 1..=6 {
        let root = tempfile::tempdir()?;
        awkward_tree(root.path(), seed, true)?;
        let whole = Fingerprint::of(root.path())?;
        let coarse = mapped(&whole, |e| {
            e.mtime.1 = 0;
            e.xattrs.clear();
        });
        for (arguments, expected) in [
            (&pax[..], &whole),
            (&[&pax[..], &["--sparse", "--sparse-version=0.0"]].concat(), &whole),
            (&[&pax[..], &["--sparse", "--sparse-version=0.1"]].concat(), &whole),
            (&[&pax[..], &["--sparse", "--sparse-version=1.0"]].concat(), &whole),
            (&["--format=gnu"], &coarse),
            (&["--format=gnu", "--sparse"], &coarse),
            (&["--format=oldgnu", "--sparse"], &coarse),
        ] {
            let archive = pack(root.path(), arguments)?;
            let (indexed, tar, _) = index(&archive, Compression::None)?;
            let found = fingerprint(&merge(&[indexed])?, &[tar]);
            expected.expect_equal(&found).with_context(|| format!("seed {seed}, {arguments:?}"))?;
        }
        let root = tempfile::tempdir()?;
        awkward_tree(root.path(), seed, false)?;
        let short = mapped(&Fingerprint::of(root.path())?, |e| {
            e.mtime.1 = 0;
            e.xattrs.clear();
        });
        let (indexed, tar, _) = index(&pack(root.path(), &["--format=ustar"])?, Compression::None)?;
        short.expect_equal(&fingerprint(&merge(&[indexed])?, &[tar]))?;
    }
    Ok(())
}

/// Whatever gzip and pigz make of a layer, each span alone is its part of the whole.
#[test]
fn spans_of_real_compressors() -> Result<()> {
    let mut random = Random(5);
    // Text, noise and zeros.
    let mut data = Vec::new();
    while data.len() < 14 << 20 {
        match random.below(3) {
            0 => {
                let len = random.below(100_000) as usize;
                data.extend(random.bytes(len));
            }
            1 => data.resize(data.len() + random.below(300_000) as usize, 0),
            _ => (0..random.below(20_000)).for_each(|n| data.extend(format!("line {n}\n").as_bytes())),
        }
    }
    let root = tempfile::tempdir()?;
    fs::write(root.path().join("file"), &data)?;
    let tar = pack(root.path(), &[])?;
    fs::write(root.path().join("tar"), &tar)?;
    for program in [
        &["gzip", "-1"][..],
        &["gzip", "-9"],
        &["gzip", "--rsyncable"],
        &["pigz", "-1"],
        &["pigz", "-9"],
        &["pigz", "-i"],
        &["pigz", "-b", "2048"],
        &["pigz", "-p", "1", "-R"],
        &["pigz", "-0"],
    ] {
        let input = File::open(root.path().join("tar"))?;
        let made = Command::new(program[0]).args(&program[1..]).arg("-c").stdin(input).output()?;
        ensure!(made.status.success(), "{program:?}");
        let (indexed, out, windows) = index(&made.stdout, Compression::Gzip)?;
        assert!(out == tar, "{program:?}");
        let layer = &indexed.layer;
        assert!(layer.spans.len() > 1, "{program:?}: {} spans", layer.spans.len());
        for (n, span) in layer.spans.iter().enumerate() {
            let (from, to) = (layer.span_in(n), layer.span_out(n));
            let window = span.window.map(|w| &windows[w.offset as usize..][..w.len as usize]);
            let compressed = &made.stdout[from.start as usize..from.end as usize];
            let bytes = read_span(layer, n, compressed, window)?;
            assert!(bytes == tar[to.start as usize..to.end as usize], "{program:?} span {n}");
        }
    }
    Ok(())
}

/// Layers in a layout of their own.
struct Layout(tempfile::TempDir);

impl Layout {
    fn new(layers: &[Vec<u8>]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::create_dir_all(dir.path().join("blobs/sha256"))?;
        let blob = |bytes: &[u8]| -> Result<serde_json::Value> {
            let hex = hex::encode(Sha256::digest(bytes));
            fs::write(dir.path().join("blobs/sha256").join(&hex), bytes)?;
            Ok(serde_json::json!({"digest": format!("sha256:{hex}"), "size": bytes.len()}))
        };
        let typed = |mut value: serde_json::Value, media_type: &str| {
            value["mediaType"] = media_type.into();
            value
        };
        let mut descriptors = Vec::new();
        let mut diff_ids = Vec::new();
        for tar in layers {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(tar)?;
            let layer = blob(&gzip.finish()?)?;
            descriptors.push(typed(layer, "application/vnd.oci.image.layer.v1.tar+gzip"));
            diff_ids.push(format!("sha256:{}", hex::encode(Sha256::digest(tar))));
        }
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {}, "history": [],
            "rootfs": {"type": "layers", "diff_ids": diff_ids}
        });
        let config = typed(blob(config.to_string().as_bytes())?, "application/vnd.oci.image.config.v1+json");
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": kind, "config": config, "layers": descriptors
        });
        let mut manifest = typed(blob(manifest.to_string().as_bytes())?, kind);
        manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "latest"});
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(dir.path().join("index.json"), index.to_string())?;
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Self(dir))
    }
}

async fn open(layout: &Path) -> Result<(Store, Image)> {
    let reference: Reference = format!("oci:{}:latest", layout.display()).parse()?;
    let store = Store::open(&reference, &ClientOptions::default())?;
    let image = store.resolve(&reference).await?;
    Ok((store, image))
}

/// Pulls a layout's image and shows what is in it.
async fn pulled(layout: &Path, state: &Path) -> Result<Fingerprint> {
    let (store, image) = open(layout).await?;
    let pulled = pull_image(state, &store, &image, &|_, _| {}).await?;
    let layers = image.diff_ids.iter().map(|d| fs::read(state.join("layers").join(d.hex()).join("tar")));
    Ok(fingerprint(&pulled.tree, &layers.collect::<Result<Vec<_>, _>>()?))
}

/// umoci's own times on directories that upper layers changed without naming them.
fn without_directory_times(print: &Fingerprint) -> Fingerprint {
    mapped(print, |e| {
        if e.mode & 0o170_000 == 0o040_000 {
            e.mtime = (0, 0);
        }
    })
}

/// Layers made by hand, unpacked by umoci and merged by us.
#[tokio::test(flavor = "multi_thread")]
async fn awkward_layers_are_what_umoci_unpacks() -> Result<()> {
    let entry =
        |tar: &mut tar::Builder<Vec<u8>>, path: &str, kind: tar::EntryType, link: &str| -> Result<()> {
            let mut header = tar::Header::new_ustar();
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(kind);
            header.set_link_name_literal(link)?;
            header.set_mode(0o751);
            header.set_mtime(path.len() as u64);
            let data = if kind.is_file() { path.as_bytes() } else { b"" };
            header.set_size(data.len() as u64);
            header.set_cksum();
            Ok(tar.append(&header, data)?)
        };
    let mut lower = tar::Builder::new(Vec::new());
    let mut upper = tar::Builder::new(Vec::new());
    let (dir, file) = (tar::EntryType::Directory, tar::EntryType::Regular);
    for path in ["./", "a/", "real/", "w/", "w/d/", "op/", "op/k/", "usr/", "usr/lib/"] {
        entry(&mut lower, path, dir, "")?;
    }
    for path in [
        "a/f",
        "real/x",
        "real/y",
        "w/c",
        "w/d/e",
        "op/c",
        "op/k/z",
        "usr/lib/so",
        "../../esc/q",
        "a/../dd/r",
        "/abs",
        "./dot",
        "twice",
        "twice",
        "missing/parent/f",
        "gone",
        "filedir",
    ] {
        entry(&mut lower, path, file, "")?;
    }
    for (path, target) in [("sl", "real"), ("sl2", "/real"), ("sl3", "../../../real"), ("lib", "usr/lib")] {
        entry(&mut lower, path, tar::EntryType::Symlink, target)?;
    }
    entry(&mut lower, "a/hard", tar::EntryType::Link, "./a/f")?;
    entry(&mut lower, "hardsym", tar::EntryType::Link, "sl")?;

    for path in ["sl/new", "sl/.wh.x", "sl2/via", "sl3/via3", "w/n", ".wh.w", "op/new", "op/.wh..wh..opq"] {
        entry(&mut upper, path, file, "")?;
    }
    for path in ["op/late", "op/k/nk", "b/c/d", ".wh.gone", ".wh.never", "no/.wh.where", ".wh..wh.aufs"] {
        entry(&mut upper, path, file, "")?;
    }
    for path in ["op/", "filedir/", "lib/"] {
        entry(&mut upper, path, dir, "")?;
    }
    for path in ["filedir/f", "lib/.wh..wh..opq", "lib/own"] {
        entry(&mut upper, path, file, "")?;
    }
    entry(&mut upper, "across", tar::EntryType::Link, "sl/y")?;
    let layout = Layout::new(&[lower.into_inner()?, upper.into_inner()?])?;
    let expected =
        without_directory_times(&Fingerprint::of(&Unpacked::new(layout.0.path(), "latest")?.path())?);
    let state = tempfile::tempdir()?;
    let found = without_directory_times(&pulled(layout.0.path(), state.path()).await?);
    expected.expect_equal(&found)?;
    let names: BTreeSet<&Path> = found.entries().keys().map(PathBuf::as_path).collect();
    assert!(names.contains(Path::new("usr/lib/so")) && !names.contains(Path::new("real/x")));
    Ok(())
}

/// A real image of several layers.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_image_is_what_umoci_unpacks() -> Result<()> {
    let layout = image("python")?;
    let state = tempfile::tempdir()?;
    let expected = without_directory_times(&Fingerprint::of(&Unpacked::new(&layout, "latest")?.path())?);
    expected.expect_equal(&without_directory_times(&pulled(&layout, state.path()).await?))
}

/// A small file system of its own, unmounted at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(bytes: u64) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let options = format!("size={bytes}");
        mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))?;
        Ok(Self(dir))
    }

    fn resize(&self, bytes: u64) -> Result<()> {
        let options = format!("size={bytes}");
        let flags = MsFlags::MS_REMOUNT;
        Ok(mount(Some("tmpfs"), self.0.path(), Some("tmpfs"), flags, Some(options.as_str()))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// A full disk is one clear error; with room again, what is there is right.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_an_error_and_no_damage() -> Result<()> {
    let root = tempfile::tempdir()?;
    fs::write(root.path().join("file"), Random(9).bytes(20 << 20))?;
    let tar = pack(root.path(), &[])?;
    let layout = Layout::new(std::slice::from_ref(&tar))?;
    let (store, image) = open(layout.0.path()).await?;
    let elsewhere = tempfile::tempdir()?;
    let index = pull_image(elsewhere.path(), &store, &image, &|_, _| {}).await?.index;

    let disk = SmallDisk::new(10 << 20)?;
    let state = disk.0.path();
    let error =
        pull_image(state, &store, &image, &|_, _| {}).await.err().context("a pull onto a full disk")?;
    assert_eq!(error.errno(), libc::ENOSPC, "{error}");

    // A plain layer needs no windows, so the index of a pull is enough to read on demand.
    let mut plain = index.clone();
    let (indexed, ..) = self::index(&tar, Compression::None)?;
    let blob = tdfs_common::digest::Digest::of(&tar);
    store.push_blob(tar.clone(), &blob).await?;
    plain.layers = vec![indexed.layer];
    plain.windows = None;
    let layers = ImageLayers::new(state, store.clone(), plain.clone(), None)?;
    let mut failures = 0;
    let check = |at: usize, read: &[u8]| assert!(read == &tar[at..at + read.len()], "at {at}");
    for at in (0..tar.len() - 4096).step_by(1 << 20) {
        match layers.read(0, at as u64, 4096).await {
            Ok(read) => check(at, &read),
            Err(error) => {
                assert_eq!(error.errno(), libc::ENOSPC, "{error}");
                failures += 1;
            }
        }
    }
    assert!(failures > 0 && layers.stats().spans > 0);

    disk.resize(60 << 20)?;
    let again = ImageLayers::new(state, store.clone(), plain, None)?;
    for layers in [layers, again] {
        for at in (0..tar.len() - 4096).step_by(1 << 20) {
            check(at, &layers.read(0, at as u64, 4096).await?);
        }
    }
    pull_image(state, &store, &image, &|_, _| {}).await?;
    let tars = state.join("layers").join(image.diff_ids[0].hex()).join("tar");
    assert!(fs::read(tars)? == tar);
    Ok(())
}
