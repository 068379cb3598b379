//! The recorder against known page sets. Needs root, BPF and runc.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::image::ImageConfiguration;
use tdfs_agent::record::order::{PageRun, evicted, first_use};
use tdfs_agent::record::sandbox::{Accounts, Forward, Launch, Network, SandboxSpec, Workload};
use tdfs_agent::record::{
    Probe, Readiness, ReadyError, RecordError, RecordInput, Recording, Tracer, TracerOptions, record,
    residency, tracer,
};
use tdfs_agent::rootfs::{Overlay, RootFs, RunDir};
use tdfs_common::abi::{Event, Kind as EventKind};
use tdfs_common::digest::Digest;
use tdfs_common::envelope::Format;
use tdfs_common::trace::Method;
use tdfs_common::tree::{Inode, Tree};
use tdfs_tests::synthetic::{Kind, Random, Synthetic};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const TOUCHER: &str = env!("CARGO_BIN_EXE_toucher");
const PAGES: u64 = 3000;
const METHODS: [Method; 2] = [Method::TpBtf, Method::Tracepoint];
const PASSWD: &[u8] = b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/data:/bin/sh\n";
const LONG: Duration = Duration::from_mins(1);

/// An image with `toucher`, what it needs to run, and two files of PAGES pages and a bit, on a private mount.
struct Image {
    rootfs: RootFs,
    tree: Arc<Tree>,
    runtime: Runtime,
    dir: TempDir,
}

impl Image {
    fn new() -> Self {
        let mut image = Synthetic::empty();
        for dir in ["data", "etc", "bin", "dev", "proc", "sys", "tmp", "lib", "lib/x86_64-linux-gnu", "lib64"]
        {
            image.add(dir, Kind::Directory);
        }
        for name in ["data/a", "data/b"] {
            image.add_file(name, PAGES as usize * 4096 + 100);
        }
        image.add("data/link", Kind::Symlink(b"a".to_vec()));
        image.add("bin/second", Kind::Symlink(b"../second".to_vec()));
        let mut copy = |from: &str, to: &str| {
            let bytes = fs::read(from).unwrap();
            image.add(to, Kind::File(bytes.len() as u64, vec![(0, bytes)]));
        };
        copy(TOUCHER, "toucher");
        copy(TOUCHER, "second");
        let ldd = Command::new("ldd").arg(TOUCHER).output().unwrap();
        let ldd = String::from_utf8(ldd.stdout).unwrap();
        for library in ldd.split_whitespace().filter(|w| w.starts_with("/lib")) {
            copy(library, &library[1..]);
        }
        image.add("etc/passwd", Kind::File(PASSWD.len() as u64, vec![(0, PASSWD.to_vec())]));

        let (tree, layers) = image.tree();
        let dir = tempfile::tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let run = dir.path().join("run");
        let run = Arc::new(RunDir::create(&run).unwrap());
        let tree = Arc::new(tree);
        let rootfs = RootFs::mount(run, Arc::clone(&tree), None, Arc::new(layers), runtime.handle()).unwrap();
        Self { rootfs, tree, runtime, dir }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.rootfs.path().join(name)
    }

    fn options(&self, method: Method) -> TracerOptions {
        let sizes = self.tree.inodes.iter().map(Inode::file_size);
        TracerOptions { method: Some(method), ..TracerOptions::new(self.rootfs.device(), sizes) }
    }

    /// Pages of the file in the page cache.
    fn resident(&self, name: &str) -> BTreeSet<u32> {
        let file = File::open(self.file(name)).unwrap();
        residency::resident(&file).unwrap().iter().map(|p| p as u32).collect()
    }

    /// Pages of the file among `runs`.
    fn pages(&self, runs: &[PageRun], name: &str) -> Vec<u32> {
        let nid = self.rootfs.nid_of(self.tree.lookup(name.as_bytes()).unwrap());
        runs.iter().filter(|r| r.ino == nid).flat_map(|r| r.pages.clone()).collect()
    }

    /// What was `recorded` of a file was `resident` before the `events` ended, and nothing else; but the kernel may evict
    /// any page at any time, and says so.
    fn expect_exact(&self, name: &str, resident: &BTreeSet<u32>, recorded: &BTreeSet<u32>, events: &[Event]) {
        assert!(resident.is_subset(recorded), "{name}: {resident:?}, recorded {recorded:?}");
        let evicted: BTreeSet<u32> = self.pages(&evicted(events, 0), name).into_iter().collect();
        let lost: Vec<&u32> = recorded.difference(resident).filter(|p| !evicted.contains(p)).collect();
        assert!(lost.is_empty(), "{name}: recorded, but neither resident nor evicted: {lost:?}");
    }

    /// A name for a container that nobody else uses.
    fn id(&self) -> String {
        let unique = self.dir.path().file_name().unwrap().to_str().unwrap();
        format!("tdfs-record-{}", unique.trim_start_matches('.'))
    }

    fn record(
        &self,
        probe: &str,
        steps: &[String],
        adapt: impl Fn(&mut RecordInput<'_>),
    ) -> Result<Recording, RecordError> {
        let configuration = configuration("");
        let mut input = RecordInput {
            rootfs: &self.rootfs,
            tree: &self.tree,
            image: Digest::of(b"image"),
            configuration: &configuration,
            accounts: Accounts { passwd: PASSWD, group: b"" },
            service: "toucher",
            args: Some(steps),
            probe: &probe.parse().unwrap(),
            timeout: LONG,
            network: Network::Private,
            forward: Forward::Stderr,
            id: &self.id(),
            runc_root: &self.dir.path().join("runc"),
            method: None,
            ring_bytes: tracer::RING_BYTES,
        };
        adapt(&mut input);
        self.runtime.block_on(record(input))
    }

    /// Starts a container and waits for it without a tracer.
    fn wait(&self, probe: &str, steps: &[String], timeout: Duration) -> Result<u64, ReadyError> {
        let probe: Probe = probe.parse().unwrap();
        self.runtime.block_on(async {
            let overlay = Overlay::mount(self.rootfs.path(), &self.rootfs.dir().join(self.id())).unwrap();
            let readiness = Readiness::prepare(&probe, &self.rootfs, &self.tree, overlay.path())?;
            let (bundle, runc) = (self.dir.path().join("bundle"), self.dir.path().join("runc"));
            let spec = SandboxSpec {
                rootfs: overlay.path(),
                workload: Workload {
                    configuration: &configuration(""),
                    args: Some(steps),
                    accounts: Accounts::default(),
                    network: Network::Private,
                },
                forward: Forward::Stderr,
                on_line: readiness.on_line(),
            };
            let sandbox = Launch::create(&self.id(), &bundle, &runc).unwrap().finish(spec).await.unwrap();
            sandbox.start().await.unwrap();
            let ready = readiness.wait(&sandbox, timeout).await;
            sandbox.delete().await.unwrap();
            overlay.unmount().unwrap();
            ready
        })
    }
}

/// A configuration whose user must be looked up.
fn app() -> &'static ImageConfiguration {
    static APP: std::sync::LazyLock<ImageConfiguration> = std::sync::LazyLock::new(|| configuration("app"));
    &APP
}

fn configuration(user: &str) -> ImageConfiguration {
    let rest = r#""architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"history":[]"#;
    let config = format!(r#"{{{rest},"config":{{"Entrypoint":["/toucher"],"User":"{user}"}}}}"#);
    serde_json::from_str(&config).unwrap()
}

/// Pages of the trace's file, in order.
fn traced(recording: &Recording, path: &str) -> Vec<u32> {
    let trace = &recording.trace;
    trace.validate().unwrap();
    let of = |file: u32| trace.files[file as usize].path == path.as_bytes();
    trace.touches.iter().filter(|t| of(t.file)).flat_map(|t| t.page..t.page + t.count).collect()
}

/// A full and exact recording.
fn exact(recording: &Recording) {
    let oracle = recording.oracle.unwrap();
    assert!(oracle.recorded > 0);
    assert_eq!((oracle.precision, oracle.recall), (1.0, 1.0), "{oracle:?}");
    assert_eq!((recording.trace.complete, recording.trace.lost_events), (true, 0));
    assert!(recording.diagnostics.is_empty(), "{:?}", recording.diagnostics);
}

/// `n` distinct pages in a random order.
fn random_pages(seed: u64, n: usize) -> Vec<u32> {
    let mut random = Random(seed);
    let mut pages = Vec::new();
    while pages.len() < n {
        let page = random.below(PAGES) as u32;
        if !pages.contains(&page) {
            pages.push(page);
        }
    }
    pages
}

fn step(how: &str, path: impl AsRef<Path>, pages: &[u32]) -> String {
    let pages: Vec<String> = pages.iter().map(u32::to_string).collect();
    format!("{how}:{}:{}", path.as_ref().display(), pages.join(","))
}

fn touch(steps: &[String]) {
    let out = Command::new(TOUCHER).args(steps).output().unwrap();
    assert!(out.status.success(), "{steps:?}: {}", String::from_utf8_lossy(&out.stderr));
}

const WAYS: [&str; 9] =
    ["read", "pread", "readv", "mmap", "populate", "sendfile", "splice", "uring", "willneed"];

#[test]
fn every_way_to_touch_a_page_is_recorded_exactly() {
    for method in METHODS {
        for (n, how) in WAYS.into_iter().enumerate() {
            let image = Image::new();
            let tracer = Tracer::attach(&image.options(method)).unwrap();
            assert_eq!(tracer.method(), method);
            let pages = random_pages(n as u64, 120);
            touch(&[step(how, image.file("data/a"), &pages)]);
            let resident = image.resident("data/a");
            let events = tracer.finish().unwrap();
            assert_eq!((events.lost, events.diagnostics.len()), (0, 0));
            let runs = first_use(&events.pages, u64::MAX);
            assert_eq!(
                image.pages(&runs, "data/a"),
                pages,
                "{how} by {method:?}: pages in order of first use"
            );
            image.expect_exact("data/a", &resident, &pages.into_iter().collect(), &events.pages);
            assert!(image.pages(&runs, "data/b").is_empty());
        }
    }
}

#[test]
fn large_folios_and_programs_are_recorded_exactly() {
    for method in METHODS {
        let image = Image::new();
        let tracer = Tracer::attach(&image.options(method)).unwrap();
        touch(&[
            step("huge", image.file("data/a"), &[700]),
            format!("exec:{}", image.file("second").display()),
        ]);
        let residents = ["data/a", "second"].map(|name| (name, image.resident(name)));
        let events = tracer.finish().unwrap().pages;
        let runs = first_use(&events, u64::MAX);
        for (name, resident) in residents {
            let recorded: BTreeSet<u32> =
                image.pages(&runs, name).into_iter().filter(|p| u64::from(*p) <= PAGES).collect();
            assert!(recorded.len() > 1, "{name} by {method:?}: {recorded:?}");
            image.expect_exact(name, &resident, &recorded, &events);
        }
        assert!(image.pages(&runs, "data/a").contains(&700));
    }
}

#[test]
fn lost_events_are_counted_and_make_the_trace_incomplete() {
    for method in METHODS {
        let image = Image::new();
        let options = TracerOptions { ring_bytes: 4096, ..image.options(method) };
        let tracer = Tracer::attach(&options).unwrap();
        touch(&[step("mmap", image.file("data/a"), &random_pages(1, 1000))]);
        let events = tracer.finish().unwrap();
        // A touched page is two events, added and used; the ring has room for 102.
        assert!(events.lost > 0 && events.pages.len() as u64 + events.lost >= 2000, "{}", events.lost);
        let said = |text: &str| events.diagnostics.iter().any(|d| d.contains(text));
        assert!(said("ring buffer full"), "{:?}", events.diagnostics);

        // Another image: of this one the kernel may evict pages, which need a bitmap too.
        let image = Image::new();
        // Directories are read before.
        File::open(image.file("data/b")).unwrap();
        let tracer = Tracer::attach(&TracerOptions { chunks: 1, ..image.options(method) }).unwrap();
        touch(&[step("pread", image.file("data/b"), &[5, 600])]);
        let events = tracer.finish().unwrap();
        // More, if the kernel evicts what was read.
        let touches = events.pages.iter().filter(|e| e.kind != EventKind::Removed as u32).count();
        assert!(touches == 2 && events.lost >= 2, "{events:?}: one bitmap holds pages 0 to 511");
        assert!(events.diagnostics.iter().any(|d| d.contains("page map full")), "{:?}", events.diagnostics);
    }
    let image = Image::new();
    let steps = [step("pread", "/data/a", &random_pages(2, 1000)), "exit:0".into()];
    let recording = image.record("exit", &steps, |input| input.ring_bytes = 4096).unwrap();
    assert!(!recording.trace.complete && recording.trace.lost_events > 0);
    assert!(recording.oracle.unwrap().recall < 1.0);
}

/// Records with a kernel event as readiness: what the program touches right behind it must not be in the trace.
#[test]
fn nothing_after_a_kernel_event_is_recorded() {
    let (before, after) = (random_pages(3, 50), random_pages(4, 400));
    for method in METHODS {
        for (probe, event) in [
            ("tcp:8080", "listen:8080"),
            ("open:/data/link", "pread:/data/a:9"),
            ("exec:/second", "exec:/bin/second"),
            ("exec:/bin/second", "exec:/second"),
            ("uprobe:/toucher:readiness_point", "call"),
        ] {
            let image = Image::new();
            let steps = [
                step("pread", "/data/b", &before),
                event.into(),
                step("pread", "/data/b", &after),
                step("mmap", "/data/a", &after),
                "wait".into(),
            ];
            let recording = image.record(probe, &steps, |input| input.method = Some(method)).unwrap();
            exact(&recording);
            assert_eq!(recording.trace.method, method);
            assert_eq!(traced(&recording, "data/b"), before, "{probe} by {method:?}");
            let a: &[u32] = if event.contains("/data/a") { &[9] } else { &[] };
            assert_eq!(traced(&recording, "data/a"), a, "{probe} by {method:?}");
            assert!(!traced(&recording, "toucher").is_empty());
            assert_eq!(recording.trace.ready, probe);
            assert!(recording.ready_ms > 0.0 && recording.ready_ms < 60_000.0);
        }
    }
}

#[test]
fn requests_lines_and_exits_end_a_recording() {
    let pages = random_pages(5, 50);
    for (probe, event, end) in [
        ("http:http://127.0.0.1:8080/health", "answer:8080", "wait"),
        ("log:^ready .* \\d+$", "print:ready on 80", "wait"),
        ("log:ready", "error:now ready", "exit:1"),
        ("exit=3", "print:nothing", "exit:3"),
    ] {
        let image = Image::new();
        let steps =
            [step("uring", "/data/a", &pages), event.into(), end.into(), step("read", "/data/b", &pages)];
        let recording = image.record(probe, &steps, |_| {}).unwrap();
        exact(&recording);
        assert_eq!(traced(&recording, "data/a"), pages, "{probe}");
        assert!(traced(&recording, "data/b").is_empty());
    }
}

#[test]
fn without_bpf_the_page_cache_gives_the_same_pages() {
    let pages = random_pages(6, 300);
    let known: BTreeSet<u32> = pages.iter().copied().collect();
    for (probe, event) in
        [("tcp:8080", "listen:8080"), ("open:/data/b", "pread:/data/b:1"), ("exec:/second", "exec:/second")]
    {
        // The kernel may evict some of them first, which nothing tells here: then they are looked for again.
        let all = (0..5).any(|_| {
            let image = Image::new();
            let steps = [step("mmap", "/data/a", &pages), event.into(), "wait".into()];
            let residency = |input: &mut RecordInput<'_>| input.method = Some(Method::Residency);
            let recording = image.record(probe, &steps, residency).unwrap();
            assert!(recording.oracle.is_none() && recording.trace.complete);
            assert_eq!(recording.trace.method, Method::Residency);
            let found = traced(&recording, "data/a");
            assert!(found.is_sorted() && found.iter().all(|p| known.contains(p)), "{probe}: {found:?}");
            found.len() == known.len()
        });
        assert!(all, "{probe}");
    }
}

#[test]
fn accounts_are_read_without_a_trace() {
    let image = Image::new();
    let recording = image.record("exit", &["exit:0".into()], |input| input.configuration = app()).unwrap();
    exact(&recording);
    assert!(!traced(&recording, "toucher").is_empty());
}

#[test]
fn readiness_without_a_tracer() {
    for (probe, event) in [
        ("tcp:8080", "listen:8080"),
        ("http:http://localhost:8080/=200", "answer:8080"),
        ("log:^ready$", "print:ready"),
        ("open:/data/link", "pread:/data/a:0"),
        ("exec:/bin/second", "exec:/second"),
        ("uprobe:/toucher:readiness_point", "call"),
    ] {
        let image = Image::new();
        let before = tracer::now();
        let ready = image.wait(probe, &[event.into(), "wait".into()], LONG).unwrap();
        assert!(ready > before && ready < tracer::now(), "{probe}");
        let never = image.wait(probe, &["wait".into()], Duration::from_millis(500)).unwrap_err();
        assert!(
            matches!(&never, ReadyError::Timeout { probe: p, .. } if p.parse::<Probe>().is_ok()),
            "{never}"
        );
        let ended = image.wait(probe, &["error:boom".into(), "exit:7".into()], LONG).unwrap_err().to_string();
        assert!(ended.contains("exit code 7") && ended.contains("boom"), "{probe}: {ended}");
    }
    let image = Image::new();
    image.wait("exit=7", &["exit:7".into()], LONG).unwrap();
    let ended = image.wait("exit", &["exit:7".into()], LONG).unwrap_err().to_string();
    assert!(ended.contains("exit code 7"), "{ended}");
}

#[test]
fn a_probe_of_a_missing_file_or_symbol_is_one_clear_error() {
    let image = Image::new();
    for (probe, message) in [
        ("open:/data/none", "/data/none: no such file in the image"),
        ("exec:/data", "/data: no such file in the image"),
        ("uprobe:/toucher:no_such_function", "/toucher: no_such_function: no such symbol"),
        ("uprobe:/data/a:main", "/data/a: main: not an ELF file"),
    ] {
        let traced = image.record(probe, &["wait".into()], |_| {}).unwrap_err().to_string();
        assert!(traced.contains(message), "{traced}");
        let untraced = image.wait(probe, &["wait".into()], LONG).unwrap_err().to_string();
        assert!(untraced.contains(message), "{untraced}");
    }
}
