//! The whole way: files in layers, traces, packing, a layout, fetching, and the pages in the zone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::json;
use tdfs_common::digest::{ContentHash, Digest};
use tdfs_common::layer_index::{Compression, Layer, LayerIndex};
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::{Run, SEGMENT_TYPE, Service};
use tdfs_common::trace::{Method, Touch, Trace, TraceFile};
use tdfs_common::tree::{Body, DirEntry, Extent, Inode, Tree};

use super::*;
use crate::fetch::{FetchStats, PageService, fetch};
use crate::oci::{CONFIG_TYPE, ClientOptions, Descriptor, Document, Image, MANIFEST_TYPE, Reference, Store};
use crate::rtpc::Zone;

const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// Two layers, files scattered over them, and an image of them in a layout.
pub(crate) struct Fixture {
    pub dir: tempfile::TempDir,
    pub store: Store,
    pub image: Image,
    tree: Tree,
    index: LayerIndex,
    layers: Vec<Vec<u8>>,
    /// Content by inode.
    pub files: BTreeMap<u32, Vec<u8>>,
}

/// Makes service metadata contradict its image.
type Change = Box<dyn Fn(&mut Service)>;

/// A file as its blocks of 3000 bytes: `None` is a hole, otherwise the content.
pub(crate) type Blocks = Vec<Option<u8>>;

impl Fixture {
    pub async fn new(files: &[Blocks]) -> Self {
        const BLOCK: usize = 3000;
        let mut layers = vec![b"first".to_vec(), b"second".to_vec()];
        let inode =
            |body| Inode { mode: 0o644, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: vec![], body };
        let mut inodes = vec![inode(Body::Directory(Vec::new()))];
        let mut contents = BTreeMap::new();
        let mut entries = Vec::new();
        for (n, blocks) in files.iter().enumerate() {
            let (mut content, mut extents) = (Vec::new(), Vec::new());
            for block in blocks {
                let bytes = vec![block.unwrap_or(0); BLOCK];
                if let Some(seed) = block {
                    let layer = usize::from(*seed) % 2;
                    let offset = layers[layer].len() as u64;
                    layers[layer].extend_from_slice(&bytes);
                    let (file_offset, len) = (content.len() as u64, BLOCK as u64);
                    extents.push(Extent { file_offset, len, layer: layer as u32, layer_offset: offset });
                }
                content.extend(bytes);
            }
            let hash = ContentHash::of(&content);
            let body = Body::Regular { size: content.len() as u64, content: hash, extents };
            entries.push(DirEntry { name: format!("f{n:03}").into_bytes(), ino: inodes.len() as u32 });
            contents.insert(inodes.len() as u32, content);
            inodes.push(inode(body));
        }
        inodes[0].body = Body::Directory(entries);
        let tree = Tree { inodes, layer_sizes: layers.iter().map(|l| l.len() as u64).collect() };

        let dir = tempfile::tempdir().unwrap();
        let reference: Reference = format!("oci:{}/image:test", dir.path().display()).parse().unwrap();
        let store = Store::open(&reference, &ClientOptions::default()).unwrap();
        let image = push_image(&store, &reference, &layers).await;
        let layer = |bytes: &Vec<u8>| Layer {
            blob: Digest::of(bytes),
            blob_size: bytes.len() as u64,
            diff_id: Digest::of(bytes),
            size: bytes.len() as u64,
            compression: Compression::None,
            spans: Vec::new(),
        };
        let index = LayerIndex { layers: layers.iter().map(layer).collect(), windows: None };
        Self { dir, store, image, tree, index, layers, files: contents }
    }

    pub fn trace(&self, service: &str, touches: &[(usize, u32, u32)]) -> Trace {
        let files: Vec<TraceFile> = self
            .files
            .iter()
            .map(|(ino, content)| TraceFile {
                path: format!("f{:03}", ino - 1).into_bytes(),
                size: content.len() as u64,
                content: ContentHash::of(content),
            })
            .collect();
        let mut seen = BTreeSet::new();
        let mut out = Vec::new();
        for &(file, page, count) in touches {
            let file = file % files.len();
            let pages = files[file].size.div_ceil(PAGE_SIZE as u64) as u32;
            for page in page..page + count {
                if page < pages && seen.insert((file, page)) {
                    out.push(Touch { file: file as u32, page, count: 1 });
                }
            }
        }
        Trace {
            image: self.image.digest,
            service: service.into(),
            ready: "tcp:80".into(),
            method: Method::TpBtf,
            complete: true,
            lost_events: 0,
            runs: 1,
            files,
            touches: out,
        }
    }

    async fn pack(&self, existing: &Group, traces: Vec<Trace>) -> Packed {
        let services = traces.into_iter().map(|trace| ServiceInput { trace, args: None }).collect();
        let pack = Pack {
            image: self.image.digest,
            tree: &self.tree,
            group: "web",
            existing,
            services,
            allow_incomplete: false,
            scratch: self.dir.path(),
        };
        let read = |layer: u32, offset: u64, len: usize| {
            let bytes = &self.layers[layer as usize][offset as usize..offset as usize + len];
            std::future::ready(Ok(Bytes::copy_from_slice(bytes)))
        };
        pack.run(read).await.unwrap()
    }

    async fn attach(&self, packed: &Packed) -> Vec<Attached> {
        attach(&self.store, &self.image, packed, &self.tree, &self.index, None).await.unwrap()
    }

    /// Packs and attaches the traces together, beside what the group has.
    pub async fn add(&self, traces: Vec<Trace>) -> (Packed, Vec<Attached>) {
        let group = read_group(&self.store, "web", &|_, _| {}).await.unwrap();
        let packed = self.pack(&group, traces).await;
        let attached = self.attach(&packed).await;
        (packed, attached)
    }

    pub async fn load(&self, choice: Choice<'_>) -> Result<LoadedRuntimeImage, PackError> {
        load(&self.store, &self.state(), &self.image, choice).await
    }

    pub async fn loaded(&self, service: &str) -> LoadedRuntimeImage {
        self.load(Choice::Service(service)).await.unwrap()
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn zone(&self, service: &Service) -> Arc<Zone> {
        Arc::new(Zone::open(&self.state(), service).unwrap())
    }

    async fn fetch(&self, service: &Service) -> Result<FetchStats, FetchError> {
        let zone = self.zone(service);
        let (stats, commit) =
            fetch(&self.store, &mut PageService::default(), service, &zone, &|_, _| {}).await?;
        self.expect_right_pages(service, &zone, true);
        commit.wait().await?;
        Ok(stats)
    }

    /// Pages of the service in its zone are those of its files; all of them, or as many as the zone says.
    pub fn expect_right_pages(&self, service: &Service, zone: &Zone, all: bool) {
        let missing = zone.missing();
        assert!(!all || missing.count() == 0);
        for run in &service.runs {
            for n in 0..run.count {
                if !missing.contains(u64::from(run.zone_page + n)) {
                    let mut page = vec![0; PAGE_SIZE];
                    let offset = u64::from(run.zone_page + n) * PAGE_SIZE as u64;
                    zone.data_file().read_exact_at(&mut page, offset).unwrap();
                    assert_eq!(page, self.page(run.ino, run.file_page + n));
                }
            }
        }
    }

    fn page(&self, ino: u32, page: u32) -> Vec<u8> {
        let content = &self.files[&ino];
        let start = page as usize * PAGE_SIZE;
        let mut out = content[start..content.len().min(start + PAGE_SIZE)].to_vec();
        out.resize(PAGE_SIZE, 0);
        out
    }

    /// Contents of the pages that a trace touches and that are not holes.
    fn contents(&self, trace: &Trace) -> BTreeSet<Vec<u8>> {
        let data = |t: &&Touch| {
            let Body::Regular { extents, .. } = &self.tree.inodes[t.file as usize + 1].body else {
                return false;
            };
            let start = u64::from(t.page) * PAGE_SIZE as u64;
            extents.iter().any(|e| e.file_offset < start + PAGE_SIZE as u64 && start < e.file_offset + e.len)
        };
        trace.touches.iter().filter(data).map(|t| self.page(t.file + 1, t.page)).collect()
    }

    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.dir.path().join("image/blobs/sha256").join(digest.hex())
    }
}

async fn push_image(store: &Store, reference: &Reference, layers: &[Vec<u8>]) -> Image {
    let mut descriptors = Vec::new();
    for layer in layers {
        let descriptor = Descriptor::of(LAYER_TYPE, layer);
        store.push_blob(layer.clone(), &descriptor.digest).await.unwrap();
        descriptors.push(descriptor);
    }
    let diff_ids: Vec<Digest> = layers.iter().map(|l| Digest::of(l)).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/f000"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = config.to_string().into_bytes();
    let descriptor = Descriptor::of(CONFIG_TYPE, &config);
    store.push_blob(config, &descriptor.digest).await.unwrap();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": descriptor, "layers": descriptors,
    });
    store.push_manifest(MANIFEST_TYPE, manifest.to_string().into(), Some("test")).await.unwrap();
    store.resolve(reference).await.unwrap()
}

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// 40 files of 30 pages each, of which no two are alike, and a trace of all.
fn large() -> (Vec<Blocks>, Vec<(usize, u32, u32)>) {
    let block = |file: usize, n: usize| Some((file * 7 + n * 11) as u8);
    let files = (0..40).map(|f| (0..40).map(|n| block(f, n)).collect()).collect();
    (files, (0..40).map(|f| (f, 0, 30)).collect())
}

fn touches() -> impl Strategy<Value = Vec<(usize, u32, u32)>> {
    proptest::collection::vec((0usize..8, 0u32..12, 1u32..6), 1..20)
}

proptest! {
    // Few cases: each syncs several files.
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn zone_pages_are_the_pages_of_the_files(
        files in proptest::collection::vec(
            proptest::collection::vec(proptest::option::weighted(0.8, 0u8..4), 0..16), 1..8),
        a in touches(),
        b in touches(),
        together in any::<bool>(),
    ) {
        run(async {
            let f = Fixture::new(&files).await;
            let (a, b) = (f.trace("a", &a), f.trace("b", &b));
            let (in_a, in_b) = (f.contents(&a), f.contents(&b));
            let only_b = in_b.difference(&in_a).count() as u64;
            let all = in_a.union(&in_b).count() as u64;
            if together {
                let (packed, _) = f.add(vec![a, b]).await;
                assert_eq!(packed.report.new_pages, all);
            } else {
                assert_eq!(f.add(vec![a]).await.0.report.new_pages, in_a.len() as u64);
                assert_eq!(f.add(vec![b]).await.0.report.new_pages, only_b);
            }
            let a = f.fetch(&f.loaded("a").await.service).await.unwrap();
            let expected = FetchStats { pages_needed: in_a.len() as u64, pages_fetched: in_a.len() as u64, ..a };
            assert_eq!((a, a.pages_present, a.data_requests), (expected, 0, u64::from(!in_a.is_empty())));
            let b = f.fetch(&f.loaded("b").await.service).await.unwrap();
            assert_eq!((b.pages_needed, b.pages_fetched), (in_b.len() as u64, only_b));
            assert_eq!((b.pages_present, b.data_requests), (in_b.len() as u64 - only_b, u64::from(only_b > 0)));
            let again = f.fetch(&f.loaded("b").await.service).await.unwrap();
            assert_eq!((again.pages_present, again.bytes_fetched, again.data_requests), (in_b.len() as u64, 0, 0));
        });
    }

    #[test]
    fn a_damaged_segment_exposes_nothing_wrong(
        at in any::<proptest::sample::Index>(),
        flip in 1u8..,
        kind in 0..4,
    ) {
        run(async {
            let (files, touches) = large();
            let f = Fixture::new(&files).await;
            let (packed, _) = f.add(vec![f.trace("a", &touches)]).await;
            let service = &packed.services[0];
            let segment = &service.segments[0];
            let blob = f.blob(&segment.blob);
            let good = fs::read(&blob).unwrap();
            let mut bad = good.clone();
            let at = at.index(good.len());
            match kind {
                0 => bad[at] ^= flip,
                1 => bad.truncate(at),
                2 => bad.push(flip),
                _ => {
                    let frames: Vec<_> = segment.placed().map(|p| p.bytes).collect();
                    let bytes = |n: usize| good[frames[n].start as usize..frames[n].end as usize].to_vec();
                    bad = [bytes(1), bytes(0), good[frames[2].start as usize..].to_vec()].concat();
                }
            }
            fs::write(&blob, &bad).unwrap();
            let zone = f.zone(service);
            match fetch(&f.store, &mut PageService::default(), service, &zone, &|_, _| {}).await {
                Ok(_) => assert!(kind == 0, "only a bit that zstd ignores goes unnoticed"),
                Err(e) => {
                    let text = e.to_string();
                    assert!(text.contains(&segment.blob.hex()) && !text.contains('\n'), "{text}");
                }
            }
            f.expect_right_pages(service, &zone, false);
            drop(zone);
            fs::write(&blob, &good).unwrap();
            f.fetch(service).await.unwrap();
        });
    }
}

#[test]
fn all_pages_of_a_frame_come_and_gaps_are_not_counted() {
    run(async {
        let (files, touches) = large();
        let f = Fixture::new(&files).await;
        let (packed, _) = f.add(vec![f.trace("a", &touches)]).await;
        let all = &packed.services[0];
        // The same zone, but of its 1200 pages two are needed, 10 frames apart.
        let first = all.runs.iter().find(|r| r.zone_page == 0).copied().unwrap();
        let last =
            all.runs.iter().find(|r| (r.zone_page..r.zone_page + r.count).contains(&700)).copied().unwrap();
        let file_page = last.file_page + 700 - last.zone_page;
        let runs =
            vec![Run { count: 1, ..first }, Run { ino: last.ino, file_page, zone_page: 700, count: 1 }];
        let some = Service { runs, ..all.clone() };
        let stats = f.fetch(&some).await.unwrap();
        assert_eq!((stats.pages_needed, stats.pages_fetched, stats.data_requests), (2, 128, 1));
        let frames: Vec<_> = all.segments[0].placed().collect();
        assert_eq!(stats.bytes_fetched, frames[10].bytes.end);
        let rest = f.fetch(all).await.unwrap();
        assert_eq!((rest.pages_present, rest.pages_fetched), (128, all.needed().count() - 128));
    });
}

#[test]
fn progress_counts_to_the_total() {
    run(async {
        let (files, touches) = large();
        let f = Fixture::new(&files).await;
        let (packed, _) = f.add(vec![f.trace("a", &touches)]).await;
        let service = &packed.services[0];
        let seen = std::sync::Mutex::new(Vec::new());
        let progress = |bytes: u64, total: u64| seen.lock().unwrap().push((bytes, total));
        let (stats, commit) =
            fetch(&f.store, &mut PageService::default(), service, &f.zone(service), &progress).await.unwrap();
        commit.wait().await.unwrap();
        let size = service.segments[0].size();
        assert_eq!(stats.bytes_fetched, size);
        let seen = seen.into_inner().unwrap();
        assert!(seen.is_sorted() && seen.iter().all(|s| s.1 == size));
        assert_eq!(seen.last(), Some(&(size, size)));
    });
}

#[test]
fn services_are_chosen_by_name_age_or_digest() {
    run(async {
        let f = Fixture::new(&[vec![Some(1); 20], vec![Some(2); 20]]).await;
        let none = f.load(Choice::Only).await;
        assert!(matches!(none, Err(PackError::NoRuntimeImage { .. })));
        let (_, first) = f.add(vec![f.trace("a", &[(0, 0, 3)])]).await;
        assert_eq!(f.load(Choice::Only).await.unwrap().manifest, first[0].manifest.digest);
        let (_, second) = f.add(vec![f.trace("a", &[(0, 0, 9)]), f.trace("b", &[(1, 0, 9)])]).await;
        let e = f.load(Choice::Only).await.unwrap_err();
        assert!(e.to_string().ends_with("a, b"), "{e}");
        let e = f.load(Choice::Service("c")).await.unwrap_err();
        assert!(e.to_string().contains("\"c\"; there are: a, b"), "{e}");
        assert_eq!(f.loaded("a").await.manifest, second[0].manifest.digest);
        assert_eq!(f.loaded("b").await.manifest, second[1].manifest.digest);
        let old = f.load(Choice::Pinned(first[0].manifest.digest)).await.unwrap();
        assert_eq!(old.service.file_pages(), 3);
        let names: Vec<String> =
            list(&f.store, &f.image).await.unwrap().into_iter().map(|a| a.service).collect();
        assert_eq!(names, ["a", "b"]);
        // The image is as it was, and nobody takes an artifact for one.
        let reference: Reference = format!("oci:{}/image:test", f.dir.path().display()).parse().unwrap();
        assert_eq!(f.store.resolve(&reference).await.unwrap().digest, f.image.digest);
        let not_one = f.load(Choice::Pinned(f.image.digest)).await.unwrap_err();
        assert!(not_one.to_string().contains("not a runtime image"), "{not_one}");
    });
}

#[test]
fn metadata_is_read_from_the_state_directory_the_second_time() {
    run(async {
        let f = Fixture::new(&[vec![Some(1); 20]]).await;
        f.add(vec![f.trace("a", &[(0, 0, 9)])]).await;
        let first = f.loaded("a").await;
        let before = f.store.requests().metadata_requests;
        assert_eq!(f.loaded("a").await.service, first.service);
        let warm = f.store.requests().metadata_requests - before;
        // A cached blob that is damaged is fetched again.
        for entry in fs::read_dir(f.state().join("metadata")).unwrap() {
            fs::write(entry.unwrap().path(), b"garbage").unwrap();
        }
        let before = f.store.requests().metadata_requests;
        assert_eq!(f.loaded("a").await.service, first.service);
        assert_eq!(f.store.requests().metadata_requests - before, warm + 3);
    });
}

#[test]
fn addresses_of_a_replaced_service_are_not_given_out_again() {
    run(async {
        let f = Fixture::new(&[vec![Some(1); 9], vec![Some(2); 20], vec![Some(3); 9]]).await;
        f.add(vec![f.trace("a", &[(0, 0, 1)])]).await;
        let (old, _) = f.add(vec![f.trace("b", &[(1, 0, 20)])]).await;
        // The new recording of b shares nothing with the old one, so the old segment leaves the group.
        let (new, _) = f.add(vec![f.trace("b", &[(2, 0, 1)])]).await;
        assert_eq!(new.services[0].segments[0].base, old.services[0].zone_pages());
        let (c, _) = f.add(vec![f.trace("c", &[(1, 0, 1), (0, 0, 1), (2, 0, 1)])]).await;
        let bases: Vec<u64> = c.services[0].segments.iter().map(|s| s.base).collect();
        assert_eq!(bases, [0, new.services[0].segments[0].base, new.services[0].zone_pages()]);
        assert_eq!((c.report.new_pages, c.report.reused_pages), (1, 2));
    });
}

#[test]
fn a_service_that_needs_nothing_new_has_no_segment_of_its_own() {
    run(async {
        let f = Fixture::new(&[vec![Some(1); 20], vec![None; 20]]).await;
        let (a, _) = f.add(vec![f.trace("a", &[(0, 0, 20)])]).await;
        let (b, _) = f.add(vec![f.trace("b", &[(0, 2, 3), (1, 0, 15)])]).await;
        assert!(b.segment.is_none());
        assert_eq!(b.report.hole_pages, 15);
        assert_eq!(b.services[0].segments, a.services[0].segments);
        let (c, _) = f.add(vec![f.trace("c", &[(1, 0, 15)])]).await;
        assert_eq!((c.services[0].segments.len(), c.services[0].runs.len()), (0, 0));
        assert_eq!(f.fetch(&f.loaded("c").await.service).await.unwrap(), FetchStats::default());
    });
}

#[test]
fn metadata_that_does_not_fit_is_refused() {
    run(async {
        let f = Fixture::new(&[vec![Some(1); 20]]).await;
        let trace = || f.trace("a", &[(0, 0, 9)]);
        let run = |ino, file_page| Run { ino, file_page, zone_page: 0, count: 1 };
        let other = Digest::of(b"other");
        let mut smaller = f.index.clone();
        smaller.layers[0].size -= 1;
        let mut renamed = f.index.clone();
        renamed.layers[1].diff_id = other;
        let mut windows = f.index.clone();
        windows.windows = Some((Digest::of(b"w"), 1));
        let cases: Vec<(&str, Change, &LayerIndex)> = vec![
            ("belongs to another image", Box::new(move |s| s.image = other), &f.index),
            ("no file", Box::new(move |s| s.runs = vec![run(0, 0)]), &f.index),
            ("no file", Box::new(move |s| s.runs = vec![run(9999, 0)]), &f.index),
            ("past the end", Box::new(move |s| s.runs = vec![run(1, 15)]), &f.index),
            ("tree is of other layers", Box::new(|_| {}), &smaller),
            ("layer index is of another image", Box::new(|_| {}), &renamed),
        ];
        for (expected, change, index) in cases {
            let mut packed = f.pack(&Group::default(), vec![trace()]).await;
            change(&mut packed.services[0]);
            attach(&f.store, &f.image, &packed, &f.tree, index, None).await.unwrap();
            let e = f.load(Choice::Only).await.unwrap_err().to_string();
            assert!(e.contains(expected) && !e.contains('\n'), "{expected}: {e}");
        }
        let packed = f.pack(&Group::default(), vec![trace()]).await;
        attach(&f.store, &f.image, &packed, &f.tree, &windows, Some(b"w".to_vec().into())).await.unwrap();
        let loaded = f.load(Choice::Only).await.unwrap();
        assert_eq!(loaded.windows.map(|w| w.size), Some(1));
    });
}

#[test]
fn artifacts_that_were_changed_are_refused() {
    run(async {
        let f = Fixture::new(&[vec![Some(1); 20]]).await;
        let (_, attached) = f.add(vec![f.trace("a", &[(0, 0, 9)])]).await;
        let digest = attached[0].manifest.digest;
        let (descriptor, bytes) = f.store.manifest(&digest).await.unwrap();
        let (_, document) = Document::parse("it", Some(&descriptor.media_type), &bytes).unwrap();
        let Document::Manifest(good) = document else { panic!("an index") };
        let other = Descriptor::of(MANIFEST_TYPE, b"other");
        let fresh = tempfile::tempdir().unwrap();

        let mut moved = good.clone();
        moved.subject = Some(other);
        let mut unlisted = good.clone();
        unlisted.layers.retain(|l| l.media_type != SEGMENT_TYPE);
        let mut shorter = good.clone();
        shorter.layers.iter_mut().filter(|l| l.media_type == SEGMENT_TYPE).for_each(|l| l.size -= 1);
        let mut twice = good.clone();
        twice.layers.push(good.layers[0].clone());
        let mut bare = good.clone();
        bare.layers.clear();
        let mut renamed = good.clone();
        renamed.annotations.insert("dev.tdfs.service".into(), "b".into());
        for (manifest, expected) in [
            (moved, "another image"),
            (unlisted, "a segment is not among its blobs"),
            (shorter, "a segment is not among its blobs"),
            (twice, "more than one application/vnd.tdfs.service"),
            (bare, "no application/vnd.tdfs"),
            (renamed, "another service"),
        ] {
            let bytes = serde_json::to_vec(&manifest).unwrap();
            let pushed = f.store.push_manifest(MANIFEST_TYPE, bytes.into(), None).await.unwrap();
            let e = load(&f.store, fresh.path(), &f.image, Choice::Pinned(pushed.digest)).await.unwrap_err();
            assert!(e.to_string().contains(expected), "{expected}: {e}");
        }
        // Every metadata blob, flipped, cut, or replaced by another.
        let blobs: Vec<&Descriptor> = good.layers.iter().filter(|l| l.media_type != SEGMENT_TYPE).collect();
        for blob in &blobs {
            let path = f.blob(&blob.digest);
            let content = fs::read(&path).unwrap();
            let mut flipped = content.clone();
            flipped[content.len() / 2] ^= 1;
            let swapped =
                fs::read(f.blob(&blobs[usize::from(blob.digest == blobs[0].digest)].digest)).unwrap();
            for bad in [flipped, content[..content.len() - 1].to_vec(), swapped, Vec::new()] {
                fs::write(&path, bad).unwrap();
                // Not the blobs that were kept above.
                let fresh = tempfile::tempdir().unwrap();
                let refused = load(&f.store, fresh.path(), &f.image, Choice::Pinned(digest)).await;
                let e = refused.unwrap_err().to_string();
                assert!(e.contains(&blob.digest.hex()), "{e}");
            }
            fs::write(&path, content).unwrap();
        }
        load(&f.store, fresh.path(), &f.image, Choice::Pinned(digest)).await.unwrap();
    });
}

#[test]
fn a_group_that_contradicts_itself_is_refused() {
    run(async {
        let f = Fixture::new(&[vec![Some(1); 20], vec![Some(2); 20]]).await;
        f.add(vec![f.trace("a", &[(0, 0, 9)])]).await;
        let blind = f.pack(&Group::default(), vec![f.trace("b", &[(1, 0, 9)])]).await;
        f.attach(&blind).await;
        let e = read_group(&f.store, "web", &|_, _| {}).await.unwrap_err();
        assert!(e.to_string().contains("disagree about the zone"), "{e}");
        assert_eq!(read_group(&f.store, "other", &|_, _| {}).await.unwrap().pages.len(), 0);
        // On a node the two services get zones of their own.
        let (a, b) = (f.loaded("a").await.service, f.loaded("b").await.service);
        f.fetch(&a).await.unwrap();
        f.fetch(&b).await.unwrap();
        assert_ne!(f.zone(&a).path(), f.zone(&b).path());
        f.fetch(&a).await.unwrap();
    });
}

#[test]
fn a_tag_that_is_no_group_index_is_refused() {
    run(async {
        let f = Fixture::new(&[vec![Some(1); 20]]).await;
        f.store.push_manifest(MANIFEST_TYPE, f.image.manifest.clone(), Some("tdfs-group-web")).await.unwrap();
        let e = read_group(&f.store, "web", &|_, _| {}).await.unwrap_err();
        assert!(e.to_string().contains("tdfs-group-web"), "{e}");
    });
}

#[test]
fn layers_that_are_short_are_noticed() {
    run(async {
        let f = Fixture::new(&[vec![Some(1); 20]]).await;
        let pack = Pack {
            image: f.image.digest,
            tree: &f.tree,
            group: "web",
            existing: &Group::default(),
            services: vec![ServiceInput { trace: f.trace("a", &[(0, 0, 9)]), args: None }],
            allow_incomplete: false,
            scratch: f.dir.path(),
        };
        let short = |_, _, len: usize| std::future::ready(Ok(Bytes::from(vec![1; len - 1])));
        assert!(matches!(pack.run(short).await, Err(PackError::ShortRead { .. })));
        let names = |dir: &Path| fs::read_dir(dir).unwrap().count();
        assert_eq!(names(f.dir.path()), 1, "no temporary file is left");
    });
}

#[test]
fn packing_twice_gives_the_same_segment() {
    run(async {
        let (files, touches) = large();
        let f = Fixture::new(&files).await;
        let one = f.pack(&Group::default(), vec![f.trace("a", &touches)]).await;
        let two = f.pack(&Group::default(), vec![f.trace("a", &touches)]).await;
        assert_eq!(one.services, two.services);
        let path = &one.segment.as_ref().unwrap().path;
        let written = fs::read(path).unwrap();
        assert_eq!(Digest::of(&written), one.services[0].segments[0].blob);
        assert_eq!(written.len() as u64, one.report.segment_bytes);
    });
}
