//! Runtime images in a real registry, and zones on a file system that fills up.

use std::fs;
use std::future::ready;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use tdfs_agent::fetch::{FetchStats, PageService, fetch};
use tdfs_agent::oci::{CONFIG_TYPE, ClientOptions, Descriptor, Image, MANIFEST_TYPE, Reference, Store};
use tdfs_agent::pack::{Choice, Pack, Packed, ServiceInput, attach, list, load, read_group};
use tdfs_agent::rtpc::Zone;
use tdfs_common::digest::{ContentHash, Digest};
use tdfs_common::layer_index::{Compression, Layer, LayerIndex};
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::{Frame, Run, Segment, Service};
use tdfs_common::trace::{Method, Touch, Trace, TraceFile};
use tdfs_common::tree::{Body, DirEntry, Extent, Inode, Tree};
use tdfs_tests::registry::{Options, Registry};

/// Pages of the only file of the image.
const PAGES: u32 = 4000;

/// An image of one layer that is one file, no page like another.
struct OneFile {
    content: Vec<u8>,
    tree: Tree,
    index: LayerIndex,
}

impl OneFile {
    fn new() -> Self {
        let mut content = Vec::new();
        let mut state = 1u64;
        for _ in 0..PAGES {
            for _ in 0..PAGE_SIZE / 16 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                content.extend_from_slice(&state.to_le_bytes());
                content.extend_from_slice(b"\0compres");
            }
        }
        let size = content.len() as u64;
        let inode =
            |body| Inode { mode: 0o644, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: vec![], body };
        let root = Body::Directory(vec![DirEntry { name: b"file".to_vec(), ino: 1 }]);
        let extents = vec![Extent { file_offset: 0, len: size, layer: 0, layer_offset: 0 }];
        let file = Body::Regular { size, content: ContentHash::of(&content), extents };
        let blob = Digest::of(&content);
        let layer = Layer {
            blob,
            blob_size: size,
            diff_id: blob,
            size,
            compression: Compression::None,
            spans: Vec::new(),
        };
        Self {
            tree: Tree { inodes: vec![inode(root), inode(file)], layer_sizes: vec![size] },
            index: LayerIndex { layers: vec![layer], windows: None },
            content,
        }
    }

    async fn push(&self, store: &Store, reference: &Reference) -> Result<Image> {
        let layer = Descriptor::of("application/vnd.oci.image.layer.v1.tar", &self.content);
        store.push_blob(self.content.clone(), &layer.digest).await?;
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [layer.digest] },
        });
        let config = config.to_string().into_bytes();
        let descriptor = Descriptor::of(CONFIG_TYPE, &config);
        store.push_blob(config, &descriptor.digest).await?;
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": descriptor, "layers": [layer],
        });
        store.push_manifest(MANIFEST_TYPE, manifest.to_string().into(), Some("v1")).await?;
        Ok(store.resolve(reference).await?)
    }

    /// Packs a service that touches these pages, and attaches it.
    async fn add(
        &self,
        store: &Store,
        image: &Image,
        service: &str,
        touches: &[(u32, u32)],
        scratch: &Path,
    ) -> Result<Packed> {
        let size = self.content.len() as u64;
        let touches = touches.iter().map(|&(page, count)| Touch { file: 0, page, count });
        let trace = Trace {
            image: image.digest,
            service: service.into(),
            ready: "tcp:80".into(),
            method: Method::TpBtf,
            complete: true,
            lost_events: 0,
            runs: 1,
            files: vec![TraceFile { path: b"file".to_vec(), size, content: ContentHash::of(&self.content) }],
            touches: touches.collect(),
        };
        let existing = read_group(store, "files", &|_, _| {}).await?;
        let pack = Pack {
            image: image.digest,
            tree: &self.tree,
            group: "files",
            existing: &existing,
            services: vec![ServiceInput { trace, args: None }],
            allow_incomplete: false,
            scratch,
        };
        let read = |_, offset: u64, len| {
            ready(Ok(Bytes::copy_from_slice(&self.content[offset as usize..offset as usize + len])))
        };
        let packed = pack.run(read).await?;
        attach(store, image, &packed, &self.tree, &self.index, None).await?;
        Ok(packed)
    }

    async fn fetch(&self, store: &Store, state: &Path, service: &Service) -> Result<FetchStats> {
        let zone = Arc::new(Zone::open(state, service)?);
        let (stats, commit) = fetch(store, &mut PageService::default(), service, &zone, &|_, _| {}).await?;
        assert_eq!(zone.missing().count(), 0);
        for run in &service.runs {
            let mut pages = vec![0; run.count as usize * PAGE_SIZE];
            zone.data_file().read_exact_at(&mut pages, u64::from(run.zone_page) * PAGE_SIZE as u64)?;
            let start = run.file_page as usize * PAGE_SIZE;
            assert!(pages == self.content[start..start + pages.len()]);
        }
        commit.wait().await?;
        Ok(stats)
    }
}

fn open(text: &str) -> Result<(Reference, Store)> {
    let reference = text.parse()?;
    let store = Store::open(&reference, &ClientOptions { retries: 1, ..ClientOptions::default() })?;
    Ok((reference, store))
}

#[tokio::test]
async fn two_services_of_an_image_in_a_registry() -> Result<()> {
    let mut registry = Registry::start(&Options::default())?;
    let dir = tempfile::tempdir()?;
    let (reference, store) = open(&registry.image("one/file:v1"))?;
    let file = OneFile::new();
    let image = file.push(&store, &reference).await?;
    let a = file.add(&store, &image, "a", &[(1000, 1000), (0, 1000)], dir.path()).await?;
    let b = file.add(&store, &image, "b", &[(500, 2000)], dir.path()).await?;
    assert_eq!((a.report.new_pages, b.report.new_pages, b.report.reused_pages), (2000, 500, 1500));
    let names: Vec<String> = list(&store, &image).await?.into_iter().map(|a| a.service).collect();
    assert_eq!(names, ["a", "b"]);

    // A node: the image is what it was, a comes in one request, then of b what a did not bring in another.
    let (_, node) = open(&registry.image("one/file:v1"))?;
    assert_eq!(node.resolve(&reference).await?.digest, image.digest);
    let state = dir.path().join("state");
    let loaded = load(&node, &state, &image, Choice::Service("a")).await?;
    let stats = file.fetch(&node, &state, &loaded.service).await?;
    let size = loaded.service.segments[0].size();
    let expected = FetchStats {
        pages_needed: 2000,
        pages_present: 0,
        pages_fetched: 2000,
        bytes_fetched: size,
        data_requests: 1,
    };
    assert_eq!(stats, expected);
    let loaded = load(&node, &state, &image, Choice::Service("b")).await?;
    let stats = file.fetch(&node, &state, &loaded.service).await?;
    assert_eq!((stats.pages_needed, stats.pages_present, stats.pages_fetched), (2000, 1500, 500));
    assert_eq!(stats.data_requests, 1);
    assert_eq!(node.requests().data_requests, 2);

    // Another node starts with b: two segments in two or more ranges, never the whole of the first.
    let state = dir.path().join("other");
    let stats = file.fetch(&node, &state, &loaded.service).await?;
    assert!(stats.pages_fetched >= 2000 && stats.pages_fetched < 2000 + 2 * 64, "{stats:?}");
    assert_eq!(node.requests().data_requests, 2 + stats.data_requests);

    // Nothing is left to ask for: the registry may go.
    registry.kill();
    let stats = file.fetch(&node, &state, &loaded.service).await?;
    assert_eq!((stats.pages_present, stats.data_requests), (2000, 0));
    let fresh = dir.path().join("fresh");
    let zone = Arc::new(Zone::open(&fresh, &loaded.service)?);
    let failed = fetch(&node, &mut PageService::default(), &loaded.service, &zone, &|_, _| {}).await;
    let line = failed.map(|(stats, _)| stats).unwrap_err().to_string();
    assert!(line.contains(&registry.addr.to_string()) && !line.contains('\n'), "{line}");
    assert_eq!(zone.missing().count(), 2000);
    Ok(())
}

#[tokio::test]
async fn skopeo_copies_an_image_and_its_runtime_image() -> Result<()> {
    let registry = Registry::start(&Options::default())?;
    let dir = tempfile::tempdir()?;
    let (reference, store) = open(&registry.image("one/file:v1"))?;
    let file = OneFile::new();
    let image = file.push(&store, &reference).await?;
    file.add(&store, &image, "a", &[(7, 100)], dir.path()).await?;
    let artifact = list(&store, &image).await?.remove(0).manifest.digest;
    for name in [":v1".to_owned(), format!("@{artifact}")] {
        let status = Command::new("skopeo")
            .args(["copy", "--quiet", "--all", "--preserve-digests"])
            .args(["--src-tls-verify=false", "--dest-tls-verify=false"])
            .arg(format!("docker://{}{name}", registry.image("one/file")))
            .arg(format!("docker://{}{name}", registry.image("two/copy")))
            .status()?;
        assert!(status.success(), "skopeo copy {name}");
    }
    let (reference, copy) = open(&registry.image("two/copy:v1"))?;
    assert_eq!(copy.resolve(&reference).await?.digest, image.digest);
    // skopeo does not copy the list of referrers of a registry without the API, so the artifact is named.
    let loaded = load(&copy, dir.path(), &image, Choice::Pinned(artifact)).await?;
    assert_eq!(file.fetch(&copy, dir.path(), &loaded.service).await?.pages_fetched, 100);
    Ok(())
}

/// A tmpfs that holds `pages` pages; unmounted on drop.
struct Small(tempfile::TempDir);

impl Small {
    fn new(pages: usize) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let size = format!("size={}", pages * PAGE_SIZE);
        mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))?;
        Ok(Self(dir))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Left over, it is one empty directory in /tmp.
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_is_an_error_and_what_was_there_stays() -> Result<()> {
    const FRAMES: u64 = 16;
    let disk = Small::new(300)?;
    let pages = |n: u64| vec![n as u8 + 1; 64 * PAGE_SIZE];
    let frames = (0..FRAMES).map(|n| Frame { len: 100, pages: 64, hash: ContentHash::of(&pages(n)) });
    let service = Service {
        group: "full".into(),
        service: "s".into(),
        image: Digest::of(b"image"),
        args: None,
        ready: "exit".into(),
        segments: vec![Segment { blob: Digest::of(b"segment"), base: 0, frames: frames.collect() }],
        runs: vec![Run { ino: 1, file_page: 0, zone_page: 0, count: FRAMES as u32 * 64 }],
    };
    let zone = Arc::new(Zone::open(disk.0.path(), &service)?);
    let writer = zone.writer()?;
    let failed = (0..FRAMES).find_map(|n| writer.inject(n * 64, &pages(n)).err().map(|e| (n, e)));
    let (stopped, error) = failed.expect("1024 pages fit on a disk of 300");
    assert_eq!(error.errno(), libc::ENOSPC);
    assert!(stopped >= 3, "{stopped}");
    assert_eq!(zone.missing().count(), (FRAMES - stopped) * 64);
    for n in 0..stopped {
        let mut read = pages(99);
        zone.data_file().read_exact_at(&mut read, n * 64 * PAGE_SIZE as u64)?;
        assert!(read == pages(n));
    }
    // The bits need room as well: without it, they stay what they were.
    let path = zone.path().with_file_name("presence");
    let committed = writer.commit();
    assert_eq!(committed.is_ok(), fs::exists(&path)?);
    Ok(())
}
