//! The root file system on the real kernel. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tdfs_agent::fetch::Arrivals;
use tdfs_agent::rootfs::{
    self, ColdFiles, ColdImage, ColdSource, ColdStats, HotPages, Kept, Overlay, RootFs, RootfsError, RunDir,
    WaitStats, erofs,
};
use tdfs_common::bitmap::PageBitmap;
use tdfs_common::page;
use tdfs_common::tree::{Body, Tree};
use tdfs_tests::fingerprint::Fingerprint;
use tdfs_tests::synthetic::{Kind, Layers, Random, Synthetic, Zone};
use tempfile::TempDir;
use tokio::runtime::Runtime;

struct Fixture {
    runtime: Runtime,
    dir: TempDir,
    tree: Arc<Tree>,
    layers: Arc<Layers>,
}

impl Fixture {
    fn of(synthetic: &Synthetic) -> Self {
        let (tree, layers) = synthetic.tree();
        Self {
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap(),
            dir: TempDir::with_prefix("tdfs-rootfs-").unwrap(),
            tree: Arc::new(tree),
            layers: Arc::new(layers),
        }
    }

    fn zone(&self, rarity: u64) -> Zone {
        Zone::random(self.dir.path(), &self.tree, &self.layers, rarity, rarity).unwrap()
    }

    fn mount(&self, hot: Option<HotPages<'_>>) -> RootFs {
        self.mount_over(hot, Arc::clone(&self.layers) as Arc<dyn ColdSource>).unwrap()
    }

    fn mount_over(
        &self,
        hot: Option<HotPages<'_>>,
        source: Arc<dyn ColdSource>,
    ) -> Result<RootFs, RootfsError> {
        RootFs::mount(run_dir(self.dir.path())?, Arc::clone(&self.tree), hot, source, self.runtime.handle())
    }

    /// Every path on the mount, by inode.
    fn paths(&self, rootfs: &RootFs) -> Vec<PathBuf> {
        self.tree.paths().iter().map(|p| rootfs.path().join(OsStr::from_bytes(p))).collect()
    }
}

fn run_dir(dir: &Path) -> Result<Arc<RunDir>, RootfsError> {
    let path = dir.join("run");
    RunDir::create(&path).map(Arc::new).map_err(|source| RootfsError::Io { path, source })
}

/// Pages of a file that the page cache holds.
fn resident(file: &File, len: u64) -> BTreeSet<u64> {
    let pages = page::count(len) as usize;
    let mut seen = vec![0u8; pages];
    if pages > 0 {
        let map = std::ptr::null_mut();
        // SAFETY: a new read-only mapping of `pages` pages that nothing else refers to; mincore writes a byte for each.
        unsafe {
            let map = libc::mmap(map, pages * 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
            assert_ne!(map, libc::MAP_FAILED);
            assert_eq!(libc::mincore(map, pages * 4096, seen.as_mut_ptr()), 0);
            assert_eq!(libc::munmap(map, pages * 4096), 0);
        }
    }
    (0..).zip(seen).filter(|(_, flags)| flags & 1 == 1).map(|(page, _)| page).collect()
}

fn mounts_below(dir: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = dir.to_str().unwrap();
    table
        .lines()
        .filter_map(|l| l.split(' ').nth(4))
        .filter(|p| p.starts_with(dir))
        .map(str::to_owned)
        .collect()
}

/// The hostile tree and what only our own file system can hold.
fn extreme() -> Synthetic {
    let mut synthetic = Synthetic::hostile();
    for seconds in [i64::MIN, -(1 << 40), -(1 << 31) - 1, 1 << 34, 1 << 40, i64::MAX] {
        synthetic.add(format!("times/{seconds}"), Kind::Directory).mtime = (seconds, 999_999_999);
    }
    let large = synthetic.add_file("xattrs/large", 4097);
    for n in 0..3 {
        large.set(&format!("user.large{n}"), vec![n; 65_535]);
    }
    synthetic.add_file("xattrs/many-long", 1).xattrs =
        (0..90).map(|n| (format!("user.{n:0200}").into_bytes(), vec![n; 2500])).collect();
    let root = synthetic.add("", Kind::Directory);
    (root.mode, root.uid, root.gid, root.mtime) = (0o1751, 5, 70_000, (-77, 123));
    root.set("user.root", b"here".to_vec());
    synthetic
}

#[test]
fn cold_mount_equals_the_model() {
    let synthetic = extreme();
    let fixture = Fixture::of(&synthetic);
    let rootfs = fixture.mount(None);
    let expected = synthetic.fingerprint();
    Fingerprint::of(rootfs.path()).unwrap().expect_equal(&expected).unwrap();
    let cold = rootfs.cold_stats();
    assert!(cold.cold_pages > 1000 && cold.cold_requests > 0, "{cold:?}");
    // Once read, it is in the page cache, but for what the kernel reclaims.
    Fingerprint::of(rootfs.path()).unwrap().expect_equal(&expected).unwrap();
    assert!(rootfs.cold_stats().cold_pages < cold.cold_pages * 3 / 2, "{:?}", rootfs.cold_stats());

    let links = fixture.tree.link_counts();
    for (ino, path) in fixture.paths(&rootfs).iter().enumerate() {
        let metadata = fs::symlink_metadata(path).unwrap();
        assert_eq!(metadata.nlink(), u64::from(links[ino]), "{}", path.display());
        assert_eq!(metadata.ino(), rootfs.nid_of(ino as u32));
        assert_eq!(rootfs.ino_of(metadata.ino()), Some(ino as u32));
    }
    let root = fs::metadata(rootfs.path()).unwrap();
    assert_eq!((root.mode(), root.uid(), root.gid()), (0o041_751, 5, 70_000));
    assert_eq!((root.mtime(), root.mtime_nsec()), (-77, 123));
    assert_eq!(xattr::get(rootfs.path(), "user.root").unwrap().as_deref(), Some(&b"here"[..]));
    let (major, minor) = rootfs.device();
    assert_eq!(root.dev(), nix::sys::stat::makedev(major.into(), minor.into()));
    assert_eq!(File::create(rootfs.path().join("new")).unwrap_err().raw_os_error(), Some(libc::EROFS));
    rootfs.unmount().unwrap();
    assert_eq!(mounts_below(fixture.dir.path()), [""; 0]);
    assert!(!fixture.dir.path().join("run").exists());
}

#[test]
fn partly_hot_mounts_equal_the_model() {
    let synthetic = extreme();
    let fixture = Fixture::of(&synthetic);
    let expected = synthetic.fingerprint();
    for rarity in [1, 2, 5, 30] {
        let zone = fixture.zone(rarity);
        let rootfs = fixture.mount(Some(zone.hot()));
        Fingerprint::of(rootfs.path()).unwrap().expect_equal(&expected).unwrap();
        assert_eq!(rootfs.cold_stats().cold_pages == 0, rarity == 1, "{:?}", rootfs.cold_stats());
        rootfs.unmount().unwrap();
    }
}

/// The files of a fixture, which cannot be loaded for some time.
struct Late {
    tree: Arc<Tree>,
    layers: Arc<Layers>,
    fails: AtomicBool,
    opened: AtomicU64,
}

impl ColdImage for Late {
    fn open(&self) -> BoxFuture<'_, Result<ColdFiles, i32>> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let files = (Arc::clone(&self.tree), Arc::clone(&self.layers) as Arc<dyn ColdSource>);
        let fails = self.fails.load(Ordering::Relaxed);
        Box::pin(std::future::ready(if fails { Err(libc::EIO) } else { Ok(files) }))
    }
}

#[test]
fn kept_metadata_mounts_the_same_and_needs_the_files_for_cold_reads_only() {
    let synthetic = extreme();
    let fixture = Fixture::of(&synthetic);
    let expected = synthetic.fingerprint();
    for rarity in [1, 5] {
        let zone = fixture.zone(rarity);
        let rootfs = fixture.mount(Some(zone.hot()));
        let nids: Vec<u64> = (0..fixture.tree.inodes.len()).map(|ino| rootfs.nid_of(ino as u32)).collect();
        let (path, key) = (fixture.dir.path().join("kept"), [rarity as u8; 32]);
        rootfs.keepable().unwrap().keep(&path, &key).unwrap();
        rootfs.unmount().unwrap();

        let kept = Kept::open(&path, &key).unwrap();
        // What is mounted stays what it is.
        fs::remove_file(&path).unwrap();
        let late = Arc::new(Late {
            tree: Arc::clone(&fixture.tree),
            layers: Arc::clone(&fixture.layers),
            fails: AtomicBool::new(true),
            opened: AtomicU64::new(0),
        });
        let dirs = ["one", "two"].map(|name| RunDir::create(&fixture.dir.path().join(name)).unwrap());
        let mounts = dirs.map(|dir| {
            let image = Arc::clone(&late) as _;
            RootFs::mount_kept(Arc::new(dir), &kept, zone.hot(), image, fixture.runtime.handle()).unwrap()
        });
        for rootfs in &mounts {
            assert!(rootfs.keepable().is_none(), "it was made of what was kept");
            let pages: u64 = zone.runs.iter().map(|run| u64::from(run.count)).sum();
            assert_eq!(rootfs.inject().unwrap().unwrap().join().unwrap(), pages);
            assert!((0..nids.len()).all(|ino| rootfs.nid_of(ino as u32) == nids[ino]));
            assert_eq!(rootfs.cold_stats(), ColdStats::default());
        }
        assert_eq!(late.opened.load(Ordering::Relaxed), 0);
        if rarity > 1 {
            let read = fs::read(mounts[0].path().join("sizes/1048576")).map(drop);
            assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO), "its files cannot be loaded");
        }
        late.fails.store(false, Ordering::Relaxed);
        late.opened.store(0, Ordering::Relaxed);
        for rootfs in mounts {
            Fingerprint::of(rootfs.path()).unwrap().expect_equal(&expected).unwrap();
            rootfs.unmount().unwrap();
        }
        let opened = late.opened.load(Ordering::Relaxed);
        assert_eq!(opened, if rarity > 1 { 2 } else { 0 }, "once for each mount");
    }
}

#[test]
fn metadata_is_clean_to_fsck() {
    let fixture = Fixture::of(&extreme());
    for rarity in [None, Some(3)] {
        let zone = rarity.map(|r| fixture.zone(r));
        let (runs, pages) = zone.as_ref().map_or((&[][..], 0), |z| (&z.runs[..], z.pages));
        let metadata = erofs::write(&fixture.tree, runs, pages).unwrap();
        let path = fixture.dir.path().join("metadata");
        fs::write(&path, metadata.image).unwrap();
        let cold = fixture.dir.path().join("cold");
        let file = File::create(&cold).unwrap();
        file.set_len(u64::from(metadata.cold.blocks()) * 4096).unwrap();
        for block in 0..metadata.cold.blocks() {
            let (ino, page) = metadata.cold.locate(block).unwrap();
            file.write_all_at(&fixture.layers.page(&fixture.tree, ino, page), u64::from(block) * 4096)
                .unwrap();
        }
        let mut fsck = Command::new("fsck.erofs");
        fsck.arg("-d3");
        if let Some(zone) = &zone {
            fsck.arg(format!("--device=/proc/{}/fd/{}", std::process::id(), zone.file.as_raw_fd()));
        }
        let output = fsck.arg(format!("--device={}", cold.display())).arg(&path).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("No errors found"), "{text}");
    }
}

#[test]
fn huge_sparse_files_are_read_at_any_offset() {
    let mut synthetic = Synthetic::empty();
    let offsets = [0, 5_000_000_000, (1 << 32) - 4096, (1 << 41) + 12_345, (5 << 40) - 10_000];
    let mut sorted = offsets.to_vec();
    sorted.sort_unstable();
    let data: Vec<(u64, Vec<u8>)> = sorted.iter().map(|o| (*o, Random(*o).bytes(10_000))).collect();
    synthetic.add("huge", Kind::File(5 << 40, data.clone()));
    synthetic.add("partly-hot", Kind::File(6 << 30, data[..3].to_vec()));
    synthetic.add("hole", Kind::File(4 << 40, vec![]));
    let fixture = Fixture::of(&synthetic);
    let hole = vec![0; 100_000];
    for hot in [false, true] {
        let zone = hot.then(|| fixture.zone(40_000));
        assert!(zone.as_ref().is_none_or(|z| z.runs.len() > 1));
        let rootfs = fixture.mount(zone.as_ref().map(Zone::hot));
        for (name, parts) in [("huge", &data[..]), ("partly-hot", &data[..3]), ("hole", &[])] {
            let file = File::open(rootfs.path().join(name)).unwrap();
            let mut bytes = vec![1; 100_000];
            file.read_exact_at(&mut bytes, 1 << 31).unwrap();
            assert!(bytes == hole, "{name}");
            for (offset, expected) in parts {
                let mut bytes = vec![1; 10_000];
                file.read_exact_at(&mut bytes, *offset).unwrap();
                assert!(bytes == *expected, "{name} at {offset}");
            }
        }
    }
}

#[test]
fn many_readers_at_once_get_the_right_bytes() {
    let synthetic = Synthetic::hostile();
    let fixture = Fixture::of(&synthetic);
    let expected = synthetic.fingerprint();
    let zone = fixture.zone(4);
    let rootfs = fixture.mount(Some(zone.hot()));
    rootfs.set_read_ahead(128).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| Fingerprint::of(rootfs.path()).unwrap().expect_equal(&expected).unwrap());
        }
        let injector = rootfs.inject().unwrap().unwrap();
        assert_eq!(injector.join().unwrap(), zone.runs.iter().map(|r| u64::from(r.count)).sum::<u64>());
    });
}

#[test]
fn failing_source_is_eio_and_never_zeros() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let zone = fixture.zone(3);
    let rootfs = fixture.mount(Some(zone.hot()));
    let hot: BTreeSet<(u32, u64)> = hot_pages(&zone);
    for errno in [libc::EIO, libc::ENETDOWN, 0x1234_5678, -5] {
        fixture.layers.fail_with(errno);
        check_every_page(&fixture, &rootfs, &hot);
    }
    fixture.layers.fail_with(0);
    Fingerprint::of(rootfs.path()).unwrap().expect_equal(&Synthetic::hostile().fingerprint()).unwrap();
}

fn hot_pages(zone: &Zone) -> BTreeSet<(u32, u64)> {
    zone.runs.iter().flat_map(|r| (r.file_page..r.file_page + r.count).map(|p| (r.ino, p.into()))).collect()
}

/// Hot pages and pages of holes have their bytes, all others fail.
fn check_every_page(fixture: &Fixture, rootfs: &RootFs, hot: &BTreeSet<(u32, u64)>) {
    check_every_page_at(fixture, rootfs.path(), hot);
}

fn check_every_page_at(fixture: &Fixture, root: &Path, hot: &BTreeSet<(u32, u64)>) {
    let (mut right, mut failed) = (0, 0);
    for (ino, path) in (0u32..).zip(fixture.tree.paths()) {
        let Body::Regular { size, extents, .. } = &fixture.tree.inodes[ino as usize].body else { continue };
        let file = File::open(root.join(OsStr::from_bytes(&path))).unwrap();
        for page in 0..page::count(*size) {
            let (start, end) = (page * 4096, (page * 4096 + 4096).min(*size));
            let mut bytes = vec![0xAA; (end - start) as usize];
            match file.read_exact_at(&mut bytes, start) {
                Ok(()) => {
                    let expected = &fixture.layers.page(&fixture.tree, ino, page as u32)[..bytes.len()];
                    assert!(bytes == expected, "page {page} of inode {ino}");
                    let data = extents.iter().any(|e| e.file_offset < end && e.file_offset + e.len > start);
                    assert!(hot.contains(&(ino, page)) || !data, "page {page} of inode {ino} is cold");
                    right += 1;
                }
                Err(e) => {
                    assert!(!hot.contains(&(ino, page)), "page {page} of inode {ino} is hot: {e}");
                    assert_eq!(e.raw_os_error(), Some(libc::EIO));
                    failed += 1;
                }
            }
        }
    }
    assert!(right > 100 && failed > 100, "{right} {failed}");
}

/// A source that breaks its promises.
struct Broken(fn() -> Result<Bytes, i32>);

impl ColdSource for Broken {
    fn read(&self, _: u32, _: u64, _: usize) -> BoxFuture<'_, Result<Bytes, i32>> {
        Box::pin(async { (self.0)() })
    }
}

#[test]
fn broken_source_is_eio() {
    let mut synthetic = Synthetic::empty();
    synthetic.add_file("file", 100_000);
    let fixture = Fixture::of(&synthetic);
    let sources: [fn() -> Result<Bytes, i32>; 4] = [
        || panic!("as a test"),
        || Ok(Bytes::new()),
        || Ok(Bytes::from(vec![1; 4095])),
        || Ok(Bytes::from(vec![1; 1 << 21])),
    ];
    for source in sources {
        let rootfs = fixture.mount_over(None, Arc::new(Broken(source))).unwrap();
        let error = fs::read(rootfs.path().join("file")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        rootfs.unmount().unwrap();
    }
}

/// A source that never answers.
struct Hanging;

impl ColdSource for Hanging {
    fn read(&self, _: u32, _: u64, _: usize) -> BoxFuture<'_, Result<Bytes, i32>> {
        Box::pin(std::future::pending())
    }
}

fn one_file_that_hangs() -> (Fixture, RootFs) {
    let mut synthetic = Synthetic::empty();
    synthetic.add_file("file", 100_000);
    let fixture = Fixture::of(&synthetic);
    let rootfs = fixture.mount_over(None, Arc::new(Hanging)).unwrap();
    (fixture, rootfs)
}

/// A thread that reads the first page of `file`, once it waits for it in the kernel.
fn waiting_reader(file: File) -> JoinHandle<io::Result<()>> {
    waiting_reader_at(file, 0)
}

fn waiting_reader_at(file: File, offset: u64) -> JoinHandle<io::Result<()>> {
    let (tell, told) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        tell.send(nix::unistd::gettid()).unwrap();
        file.read_exact_at(&mut [0; 1], offset)
    });
    let waits_in = format!("/proc/self/task/{}/wchan", told.recv().unwrap());
    // For the answer of FUSE or, where that is read in the background, for the page.
    let waits = |place: &str| place.contains("request_wait_answer") || place.contains("folio_wait");
    while !waits(&fs::read_to_string(&waits_in).unwrap()) {
        std::thread::yield_now();
    }
    reader
}

#[test]
fn readers_do_not_outlive_the_runtime() {
    let (mut fixture, rootfs) = one_file_that_hangs();
    let reader = waiting_reader(File::open(rootfs.path().join("file")).unwrap());
    let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
    std::mem::replace(&mut fixture.runtime, other).shutdown_background();
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    // Nor does any later one wait.
    let error = fs::read(rootfs.path().join("file")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

#[test]
fn readers_do_not_outlive_the_mount() {
    let (_fixture, rootfs) = one_file_that_hangs();
    let reader = waiting_reader(File::open(rootfs.path().join("file")).unwrap());
    rootfs.unmount().unwrap();
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn injection_brings_exactly_the_hot_pages() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let zone = fixture.zone(3);
    let rootfs = fixture.mount(Some(zone.hot()));
    let hot = hot_pages(&zone);
    let found = || {
        let mut found = BTreeSet::new();
        for (ino, path) in (0u32..).zip(fixture.paths(&rootfs)) {
            if let Body::Regular { size, .. } = fixture.tree.inodes[ino as usize].body {
                found.extend(resident(&File::open(path).unwrap(), size).into_iter().map(|page| (ino, page)));
            }
        }
        found
    };
    assert_eq!(found(), BTreeSet::new());
    // The kernel may reclaim some at any time, and then gets another chance.
    let complete = (0..10).any(|_| {
        assert_eq!(rootfs.inject().unwrap().unwrap().join().unwrap(), hot.len() as u64);
        let found = found();
        assert!(found.is_subset(&hot), "{:?}", found.difference(&hot).collect::<Vec<_>>());
        found == hot
    });
    assert!(complete);
    assert_eq!(rootfs.cold_stats(), ColdStats::default());
    // The zone's own copy of them is gone.
    let left = resident(&zone.file, zone.pages * 4096);
    let used =
        |p: &u64| zone.runs.iter().any(|r| (r.zone_page..r.zone_page + r.count).contains(&(*p as u32)));
    assert!(!left.iter().any(used), "{left:?}");
    // Read-ahead works from now on: one page asked, its neighbours come along.
    let big = fixture.tree.lookup(b"sizes/3145733").unwrap();
    let cold = (0..700).find(|p| (*p..*p + 32).all(|n| !hot.contains(&(big, n)))).unwrap();
    let file = File::open(rootfs.path().join("sizes/3145733")).unwrap();
    file.read_exact_at(&mut [0; 10], cold * 4096).unwrap();
    assert!(rootfs.cold_stats().cold_pages > 1, "{:?}", rootfs.cold_stats());
}

/// A zone of which some pages are still under way: until they arrive its file has a hole there.
struct LateZone {
    zone: Zone,
    file: File,
    arrivals: Arc<Arrivals>,
}

impl LateZone {
    /// One in `rarity` pages, and its neighbours, are awaited.
    fn new(fixture: &Fixture, rarity: u64) -> Self {
        let zone = fixture.zone(2);
        let file = tempfile::tempfile_in(fixture.dir.path()).unwrap();
        file.set_len(zone.pages * 4096).unwrap();
        let mut random = Random(rarity);
        let mut awaited = PageBitmap::new(zone.pages);
        for start in (0..zone.pages).step_by(7).filter(|_| random.below(rarity) == 0) {
            awaited.insert_range(start..(start + 7).min(zone.pages));
        }
        let late = Self { zone, file, arrivals: Arc::new(Arrivals::new(awaited)) };
        (0..late.zone.pages).filter(|p| !late.awaits(*p)).for_each(|p| late.copy(p));
        late
    }

    fn awaits(&self, page: u64) -> bool {
        self.arrivals.awaits(page..page + 1)
    }

    fn copy(&self, page: u64) {
        let mut bytes = [0; 4096];
        self.zone.file.read_exact_at(&mut bytes, page * 4096).unwrap();
        self.file.write_all_at(&bytes, page * 4096).unwrap();
    }

    fn arrive(&self, page: u64) {
        self.copy(page);
        self.arrivals.arrive(page..page + 1);
    }

    fn hot(&self) -> HotPages<'_> {
        HotPages { zone: &self.file, arrivals: Some(&self.arrivals), ..self.zone.hot() }
    }

    /// Inode and page of a file that are hot and awaited, with the page of the zone. The kernel waits for no page of a
    /// file without any data.
    fn awaited_file_pages(&self, tree: &Tree) -> Vec<(u32, u64, u64)> {
        let has_data = |ino: u32| matches!(&tree.inodes[ino as usize].body, Body::Regular { extents, .. } if !extents.is_empty());
        let runs = self.zone.runs.iter().filter(|r| has_data(r.ino));
        let pages = runs
            .flat_map(|r| (0..r.count).map(|n| (r.ino, (r.file_page + n).into(), (r.zone_page + n).into())));
        pages.filter(|(.., zone_page)| self.awaits(*zone_page)).collect()
    }
}

#[test]
fn pages_that_arrive_late_are_waited_for_and_right() {
    let synthetic = extreme();
    let fixture = Fixture::of(&synthetic);
    let expected = synthetic.fingerprint();
    for rarity in [1, 3] {
        let late = LateZone::new(&fixture, rarity);
        let mut order: Vec<u64> = (0..late.zone.pages).filter(|p| late.awaits(*p)).collect();
        let mut random = Random(rarity + 77);
        for n in (1..order.len()).rev() {
            order.swap(n, random.below(n as u64 + 1) as usize);
        }
        let rootfs = fixture.mount(Some(late.hot()));
        let injector = rootfs.inject().unwrap().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| Fingerprint::of(rootfs.path()).unwrap().expect_equal(&expected).unwrap());
            }
            // The pages come when somebody waits for one, so that nobody is always too late to wait.
            for page in order {
                while late.awaits(page) && rootfs.wait_stats().waited_requests == 0 {
                    std::thread::yield_now();
                }
                late.arrive(page);
            }
        });
        assert_eq!(injector.join().unwrap(), hot_pages(&late.zone).len() as u64);
        let waited = rootfs.wait_stats();
        assert!(waited.waited_pages > 0 && !waited.waited.is_zero(), "{waited:?}");
        rootfs.unmount().unwrap();
    }
}

#[test]
fn awaited_pages_are_not_counted_as_cold() {
    let mut synthetic = Synthetic::empty();
    synthetic.add_file("file", 800_000);
    let fixture = Fixture::of(&synthetic);
    let zone = Zone::random(fixture.dir.path(), &fixture.tree, &fixture.layers, 1, 1).unwrap();
    let mut awaited = PageBitmap::new(zone.pages);
    awaited.insert_range(0..zone.pages);
    let arrivals = Arc::new(Arrivals::new(awaited));
    let runs: Vec<_> = zone.runs.iter().filter(|r| r.file_page > 0).copied().collect();
    assert!(!runs.is_empty());
    let rootfs = fixture.mount(Some(HotPages { runs: &runs, arrivals: Some(&arrivals), ..zone.hot() }));
    arrivals.arrive(0..zone.pages);
    let expected = synthetic.fingerprint();
    Fingerprint::of(rootfs.path()).unwrap().expect_equal(&expected).unwrap();
    let hot: u64 = runs.iter().map(|r| u64::from(r.count)).sum();
    assert_eq!(rootfs.cold_stats().cold_pages, page::count(800_000) - hot);
    assert_eq!(rootfs.wait_stats(), WaitStats::default());
}

#[test]
fn pages_that_never_arrive_are_eio_and_never_zeros() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let late = LateZone::new(&fixture, 2);
    let lost: BTreeSet<(u32, u64)> =
        late.awaited_file_pages(&fixture.tree).into_iter().map(|(ino, page, _)| (ino, page)).collect();
    assert!(lost.len() > 100);
    let rootfs = fixture.mount(Some(late.hot()));
    let injector = rootfs.inject().unwrap().unwrap();
    let (ino, page, _) = late.awaited_file_pages(&fixture.tree)[0];
    let path = &fixture.paths(&rootfs)[ino as usize];
    let reader = waiting_reader_at(File::open(path).unwrap(), page * 4096);
    late.arrivals.fail(libc::EIO);
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    injector.join().unwrap();
    fixture.layers.fail_with(libc::EIO);
    let present = hot_pages(&late.zone).difference(&lost).copied().collect();
    check_every_page(&fixture, &rootfs, &present);
}

#[test]
fn waiting_readers_do_not_stand_in_the_way() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let late = LateZone::new(&fixture, 1);
    let rootfs = fixture.mount(Some(late.hot()));
    let paths = fixture.paths(&rootfs);
    let some: Vec<_> = late.awaited_file_pages(&fixture.tree).into_iter().step_by(5).take(150).collect();
    assert_eq!(some.len(), 150);
    let open = |ino: u32| File::open(&paths[ino as usize]).unwrap();
    let readers: Vec<_> =
        some.iter().map(|&(ino, page, _)| waiting_reader_at(open(ino), page * 4096)).collect();
    while rootfs.wait_stats().waited_requests < 150 {
        std::thread::yield_now();
    }
    // A cold page, and one that arrives, while the others wait.
    let hot = hot_pages(&late.zone);
    let big = fixture.tree.lookup(b"sizes/3145733").unwrap();
    let cold = (0..768).find(|p| !hot.contains(&(big, *p))).unwrap();
    open(big).read_exact_at(&mut [0; 10], cold * 4096).unwrap();
    let mut readers = readers.into_iter();
    late.arrive(some[0].2);
    readers.next().unwrap().join().unwrap().unwrap();
    // Nor does anybody wait for ever.
    rootfs.unmount().unwrap();
    for reader in readers {
        assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}

#[test]
fn an_injection_that_waits_can_be_dropped() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let late = LateZone::new(&fixture, 2);
    let rootfs = fixture.mount(Some(late.hot()));
    let injector = rootfs.inject().unwrap().unwrap();
    while injector.pages() == 0 {
        std::thread::yield_now();
    }
    drop(injector);
    assert_eq!(rootfs.wait_stats(), WaitStats::default());
    rootfs.unmount().unwrap();
}

#[test]
fn without_hot_pages_there_is_read_ahead_at_once() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let empty = tempfile::tempfile_in(fixture.dir.path()).unwrap();
    let rootfs = fixture.mount(Some(HotPages { zone: &empty, zone_pages: 0, runs: &[], arrivals: None }));
    assert!(rootfs.inject().unwrap().is_none());
    fs::read(rootfs.path().join("sizes/3145733")).unwrap();
    let ColdStats { cold_pages, cold_requests } = rootfs.cold_stats();
    assert!(cold_pages == 769 && cold_requests < 769 / 8, "{cold_pages} pages in {cold_requests} requests");
}

#[test]
fn without_read_ahead_only_what_is_asked_for_is_read() {
    let mut synthetic = Synthetic::empty();
    synthetic.add_file("file", 1 << 20);
    let fixture = Fixture::of(&synthetic);
    let rootfs = fixture.mount(None);
    let file = File::open(rootfs.path().join("file")).unwrap();
    for page in [7, 8, 9, 200, 100] {
        file.read_exact_at(&mut [0; 100], page * 4096).unwrap();
    }
    assert!(resident(&file, 1 << 20).is_subset(&BTreeSet::from([7, 8, 9, 100, 200])));
    assert_eq!(rootfs.cold_stats(), ColdStats { cold_pages: 5, cold_requests: 5 });
}

#[test]
fn overlay_shows_the_image_and_keeps_writes_apart() {
    let mut synthetic = extreme();
    // To overlayfs this is a deleted file.
    synthetic.remove("special/whiteout-like");
    let fixture = Fixture::of(&synthetic);
    let rootfs = fixture.mount(None);
    let overlay = Overlay::mount(rootfs.path(), &rootfs.dir().join("c,1:x\\y")).unwrap();
    let other = Overlay::mount(rootfs.path(), &rootfs.dir().join("c2")).unwrap();
    Fingerprint::of(overlay.path()).unwrap().expect_equal(&synthetic.fingerprint()).unwrap();
    let root = fs::metadata(overlay.path()).unwrap();
    assert_eq!((root.mode(), root.uid(), root.gid()), (0o041_751, 5, 70_000));
    assert_eq!((root.mtime(), root.mtime_nsec()), (-77, 123));
    assert_eq!(xattr::get(overlay.path(), "user.root").unwrap().as_deref(), Some(&b"here"[..]));

    fs::write(overlay.path().join("sizes/4096"), "changed").unwrap();
    fs::remove_file(overlay.path().join("hard/a")).unwrap();
    assert_eq!(fs::read_to_string(overlay.path().join("sizes/4096")).unwrap(), "changed");
    assert_eq!(fs::read_to_string(overlay.upper().join("sizes/4096")).unwrap(), "changed");
    Fingerprint::of(other.path()).unwrap().expect_equal(&synthetic.fingerprint()).unwrap();
    Fingerprint::of(rootfs.path()).unwrap().expect_equal(&synthetic.fingerprint()).unwrap();
    overlay.unmount().unwrap();
    other.unmount().unwrap();
    let left: Vec<_> = fs::read_dir(rootfs.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    rootfs.unmount().unwrap();
    assert!(!fixture.dir.path().join("run").exists());
}

#[test]
fn overlay_outlives_its_mount_only_for_cached_pages() {
    let synthetic = Synthetic::hostile();
    let fixture = Fixture::of(&synthetic);
    let rootfs = fixture.mount(None);
    let overlay = Overlay::mount(rootfs.path(), &fixture.dir.path().join("container")).unwrap();
    let cached = fs::read(overlay.path().join("sizes/8193")).unwrap();
    rootfs.unmount().unwrap();
    assert_eq!(fs::read(overlay.path().join("sizes/8193")).unwrap(), cached);
    let error = fs::read(overlay.path().join("sizes/8192")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

#[test]
fn failed_mounts_leave_nothing_behind() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let zone = fixture.zone(3);
    let error = |hot| {
        let error =
            fixture.mount_over(Some(hot), Arc::clone(&fixture.layers) as _).err().unwrap().to_string();
        assert_eq!(mounts_below(fixture.dir.path()), [""; 0]);
        assert!(!fixture.dir.path().join("run").exists());
        error
    };
    let text = error(HotPages { zone_pages: zone.pages + 1, ..zone.hot() });
    assert!(text.contains("the zone file has"), "{text}");
    let text = error(HotPages { zone_pages: 1, ..zone.hot() });
    assert!(text.contains("lie past the end of the zone"), "{text}");

    let shm = TempDir::new_in("/dev/shm").unwrap();
    let on_tmpfs = RootFs::mount(
        run_dir(shm.path()).unwrap(),
        Arc::clone(&fixture.tree),
        None,
        Arc::clone(&fixture.layers) as _,
        fixture.runtime.handle(),
    );
    let text = on_tmpfs.err().unwrap().to_string();
    assert!(text.contains("ext4 or xfs"), "{text}");
    assert_eq!(fs::read_dir(shm.path()).unwrap().count(), 0);

    let rootfs = fixture.mount(None);
    let again = fixture.mount_over(None, Arc::clone(&fixture.layers) as _).err().unwrap().to_string();
    assert!(again.contains("is in use by process"), "{again}");
    assert!(rootfs.path().join("sizes").is_dir());
}

#[test]
fn a_mount_in_use_is_detached() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let rootfs = fixture.mount(None);
    let held = File::open(rootfs.path().join("sizes/65536")).unwrap();
    held.read_exact_at(&mut [0; 10], 0).unwrap();
    rootfs.unmount().unwrap();
    assert_eq!(mounts_below(fixture.dir.path()), [""; 0]);
    assert!(!fixture.dir.path().join("run").exists());
    held.read_exact_at(&mut [0; 10], 0).unwrap();
    let error = held.read_exact_at(&mut [0; 10], 8192).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

/// Another process that holds mounts of the hostile tree.
struct Holder(Child);

impl Holder {
    fn start(dir: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rootfs-holder"));
        let mut child = command.arg(dir).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "mounted\n");
        Self(child)
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Nothing here starts a runc that would have to be ended first.
fn recover(dir: &Path) -> io::Result<Vec<PathBuf>> {
    rootfs::recover(dir, |_| Ok(()))
}

#[test]
fn after_kill_9_hot_pages_are_served_cold_ones_fail_and_recover_cleans_up() {
    let synthetic = Synthetic::hostile();
    let fixture = Fixture::of(&synthetic);
    let dir = fixture.dir.path();
    let holder = Holder::start(dir, &["3"]);
    let root = dir.join("held/root");
    let hot = hot_pages(&fixture.zone(3));
    assert!(recover(dir).unwrap().is_empty(), "its owner lives");
    assert_eq!(mounts_below(dir).len(), 2);
    holder.kill();
    check_every_page_at(&fixture, &root, &hot);

    // A file that somebody still has open must not stand in the way.
    let held = File::open(dir.join("held/container/merged/sizes/1")).unwrap();
    fs::write(dir.join("held/container/merged/written"), "x").unwrap();
    assert_eq!(recover(dir).unwrap(), [dir.join("held")]);
    assert_eq!(mounts_below(dir), [""; 0]);
    assert!(!dir.join("held").exists());
    drop(held);
    assert!(recover(dir).unwrap().is_empty());
    // The name can be used again.
    Holder::start(dir, &["3"]).kill();
    Holder::start(dir, &["3"]).kill();
    recover(dir).unwrap();
}

#[test]
fn a_waiting_reader_gets_eio_when_the_server_is_killed() {
    let fixture = Fixture::of(&Synthetic::hostile());
    let dir = fixture.dir.path();
    let holder = Holder::start(dir, &["1000000", "hang"]);
    let reader = waiting_reader(File::open(dir.join("held/root/sizes/65536")).unwrap());
    holder.kill();
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    recover(dir).unwrap();
}
