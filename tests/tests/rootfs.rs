//! The root file system on the real kernel. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use tdfs_agent::rootfs::{ColdSource, HotPages, RootFs};
use tdfs_common::page;
use tdfs_common::runtime_image::Run;
use tdfs_common::tree::Tree;
use tdfs_tests::fingerprint::Fingerprint;
use tdfs_tests::synthetic::{Layers, Random, Synthetic};
use tempfile::TempDir;
use tokio::runtime::Runtime;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A zone file with some pages of the tree, in a random order with other bytes between them.
struct Zone {
    file: File,
    pages: u64,
    runs: Vec<Run>,
}

impl Zone {
    /// About one run in `rarity` possible ones is hot; with 1, all pages are.
    fn random(dir: &Path, tree: &Tree, layers: &Layers, rarity: u64, seed: u64) -> Self {
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
        let mut file = tempfile::tempfile_in(dir).unwrap();
        let mut pages = 0;
        for run in &mut runs {
            let gap = random.below(3) as u32;
            file.write_all(&vec![0xDD; gap as usize * 4096]).unwrap();
            run.zone_page = pages + gap;
            for page in run.file_page..run.file_page + run.count {
                file.write_all(&layers.page(tree, run.ino, page)).unwrap();
            }
            pages = run.zone_page + run.count;
        }
        file.sync_all().unwrap();
        Self { file, pages: pages.into(), runs }
    }

    fn hot(&self) -> HotPages<'_> {
        HotPages { zone: &self.file, zone_pages: self.pages, runs: &self.runs }
    }
}

struct Fixture {
    runtime: Runtime,
    dir: TempDir,
    tree: Arc<Tree>,
    layers: Arc<Layers>,
    expected: Fingerprint,
}

impl Fixture {
    fn of(synthetic: &Synthetic) -> Self {
        let (tree, layers) = synthetic.tree();
        Self {
            runtime: runtime(),
            dir: TempDir::with_prefix("tdfs-rootfs-").unwrap(),
            tree: Arc::new(tree),
            layers: Arc::new(layers),
            expected: synthetic.fingerprint(),
        }
    }

    fn mount(&self, hot: Option<HotPages<'_>>) -> RootFs {
        let source = Arc::clone(&self.layers) as Arc<dyn ColdSource>;
        let dir = self.dir.path().join("run");
        RootFs::mount(&dir, Arc::clone(&self.tree), hot, source, self.runtime.handle()).unwrap()
    }
}

#[test]
fn cold_mount_equals_the_model() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let rootfs = fixture.mount(None);
    Fingerprint::of(rootfs.path()).unwrap().expect_equal(&fixture.expected).unwrap();
    assert!(rootfs.cold_stats().cold_pages > 0);
    let links = fixture.tree.link_counts();
    for (ino, path) in fixture.tree.paths().iter().enumerate() {
        use std::os::unix::ffi::OsStrExt as _;
        let metadata = fs::symlink_metadata(rootfs.path().join(std::ffi::OsStr::from_bytes(path))).unwrap();
        assert_eq!(metadata.nlink(), u64::from(links[ino]));
        assert_eq!(metadata.ino(), rootfs.nid_of(ino as u32));
        assert_eq!(rootfs.ino_of(metadata.ino()), Some(ino as u32));
    }
    let root = fs::metadata(rootfs.path()).unwrap();
    let (major, minor) = rootfs.device();
    assert_eq!(root.dev(), nix::sys::stat::makedev(major.into(), minor.into()));
    let run = rootfs.dir().to_owned();
    rootfs.unmount().unwrap();
    assert!(!run.exists());
}

#[test]
fn partly_hot_mounts_equal_the_model() {
    let fixture = Fixture::of(&Synthetic::hostile());
    for (rarity, seed) in [(1, 1), (2, 2), (5, 3), (30, 4)] {
        let zone = Zone::random(fixture.dir.path(), &fixture.tree, &fixture.layers, rarity, seed);
        let rootfs = fixture.mount(Some(zone.hot()));
        Fingerprint::of(rootfs.path()).unwrap().expect_equal(&fixture.expected).unwrap();
        assert_eq!(rootfs.cold_stats().cold_pages == 0, rarity == 1, "{:?}", rootfs.cold_stats());
        rootfs.unmount().unwrap();
    }
}
