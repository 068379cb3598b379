//! Records what a service touches until it is ready.
//!
//! ```text
//!  image's tree --RootFs--> private EROFS mount, read-ahead 0 --Overlay--> runc container
//!                              |                                              |
//!                 page events: Tracer                         readiness: Readiness (kernel event, request, line)
//!                              |                                              |
//!                              `---- order of first use, cut at that moment --'--> Trace
//! ```
//!
//! Only inodes of the private mount count, so nothing of the host, of /proc or of the container's own writes leaks in;
//! and because a page is there only when it was demanded, the set is exact. After the moment of readiness the container
//! is stopped, and everything recorded up to then is compared with the page cache, which knows nothing of the probe. The
//! cut is at the event where the kernel says it; a line or an answer is noticed some time after it, and there the cut is
//! where the container was stopped.
//! O_DIRECT and DAX are outside: EROFS files have neither behind an overlay.
//!
//! A crash leaves a container or a runc that makes it, and mounts: `sandbox::remove_leftover`, `sandbox::end_orphans` and
//! `rootfs::recover` remove them.

mod offsets;
mod oracle;
pub mod order;
mod probe;
mod ready;
pub mod residency;
pub mod sandbox;
mod symbol;
pub mod tracer;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use oci_spec::image::ImageConfiguration;
use tdfs_common::digest::Digest;
use tdfs_common::page::{self, PAGE_SIZE};
use tdfs_common::trace::{Method, Touch, Trace, TraceFile};
use tdfs_common::tree::{Body, Inode, Tree};

use crate::rootfs::{Overlay, RootFs, RootfsError};
use order::PageRun;
use sandbox::{Accounts, Forward, Launch, Network, Sandbox, SandboxError, SandboxSpec, Workload};

pub use oracle::Oracle;
pub use probe::{HttpProbe, Probe, ProbeError};
use ready::Target;
pub use ready::{Readiness, ReadyError};
pub use tracer::{Tracer, TracerError, TracerOptions};

/// A service cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The probe of the kernel.
    #[error(transparent)]
    Tracer(#[from] TracerError),
    /// The container.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Its root file system.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// It does not become ready.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// The page cache cannot be asked.
    #[error("page cache of the image: {0}")]
    Residency(io::Error),
}

/// What to record.
pub struct RecordInput<'a> {
    /// The image, freshly mounted: nothing of it may have been read.
    pub rootfs: &'a RootFs,
    /// Its files, as they are mounted.
    pub tree: &'a Arc<Tree>,
    /// Its manifest.
    pub image: Digest,
    /// Its configuration.
    pub configuration: &'a ImageConfiguration,
    /// Its accounts, read without a trace in the page cache.
    pub accounts: Accounts<'a>,
    /// Name of the service.
    pub service: &'a str,
    /// Arguments in place of the image's `Cmd`.
    pub args: Option<&'a [String]>,
    /// When it is ready.
    pub probe: &'a Probe,
    /// How long that may take.
    pub timeout: Duration,
    /// The container's network.
    pub network: Network,
    /// Where its output goes.
    pub forward: Forward,
    /// Its name, unique on this machine.
    pub id: &'a str,
    /// runc's state.
    pub runc_root: &'a Path,
    /// Only this method instead of the best that works.
    pub method: Option<Method>,
    /// Size of the event buffer, bytes: a power of two; usually [`tracer::RING_BYTES`].
    pub ring_bytes: u32,
}

/// What was recorded.
#[derive(Clone, Debug)]
pub struct Recording {
    /// What the service touched.
    pub trace: Trace,
    /// The check, unless the page cache itself was the method.
    pub oracle: Option<Oracle>,
    /// From the start of the process to readiness, milliseconds.
    pub ready_ms: f64,
    /// The probe's own words.
    pub diagnostics: Vec<String>,
}

impl Recording {
    /// Touched bytes, in whole pages.
    pub fn bytes(&self) -> u64 {
        self.trace.pages() * PAGE_SIZE as u64
    }
}

/// Runs the service until it is ready and returns the pages it touched. The container is gone afterwards. Needs a
/// multi-threaded runtime: it reads the image, whose pages other tasks of the runtime may have to bring.
pub async fn record(input: RecordInput<'_>) -> Result<Recording, RecordError> {
    let rootfs = input.rootfs;
    // What we read ourselves comes before the tracer, which remembers pages for good.
    let target = Target::find(input.probe, rootfs, input.tree)?;
    let mut tracer = attach(&input)?;
    let overlay = Overlay::mount(rootfs.path(), &rootfs.dir().join(input.id))?;
    let readiness = match &mut tracer {
        Some(tracer) => Readiness::prepare_traced(input.probe, target, rootfs, input.tree, tracer)?,
        None => Readiness::prepare(input.probe, rootfs, input.tree, overlay.path())?,
    };
    let bundle = rootfs.dir().join(format!("{}.bundle", input.id));
    let launch = Launch::create(input.id, &bundle, input.runc_root)?;
    let spec = SandboxSpec {
        rootfs: overlay.path(),
        workload: Workload {
            configuration: input.configuration,
            args: input.args,
            accounts: input.accounts,
            network: input.network,
        },
        forward: input.forward,
        on_line: readiness.on_line(),
    };
    let sandbox = launch.finish(spec).await?;
    let ready = run(&sandbox, readiness, tracer.as_mut(), input.timeout).await;
    let recording = match ready {
        Ok(moments) => tokio::task::block_in_place(|| finish(&input, moments, tracer)),
        Err(e) => Err(e),
    };
    let deleted = sandbox.delete().await;
    let recording = recording?;
    deleted?;
    overlay.unmount()?;
    Ok(recording)
}

/// The best tracer there is; `None` to ask the page cache instead.
fn attach(input: &RecordInput<'_>) -> Result<Option<Tracer>, RecordError> {
    if input.method == Some(Method::Residency) {
        return Ok(None);
    }
    let sizes = input.tree.inodes.iter().map(Inode::file_size);
    let mut options = TracerOptions::new(input.rootfs.device(), sizes);
    options.method = input.method;
    options.ring_bytes = input.ring_bytes;
    match tokio::task::block_in_place(|| Tracer::attach(&options)) {
        Ok(tracer) => Ok(Some(tracer)),
        Err(e) if input.method.is_none() => {
            tracing::warn!("recording by page-cache residency, without order: {e}");
            Ok(None)
        }
        Err(e) => Err(e.into()),
    }
}

/// When the process was started, when it was ready, and the end of what is recorded (CLOCK_MONOTONIC, nanoseconds).
#[derive(Clone, Copy)]
struct Moments {
    started: u64,
    ready: u64,
    cut: u64,
}

/// Starts the container, waits until it is ready and stops it there.
async fn run(
    sandbox: &Sandbox,
    readiness: Readiness,
    mut tracer: Option<&mut Tracer>,
    timeout: Duration,
) -> Result<Moments, RecordError> {
    if let Some(tracer) = &mut tracer {
        tracer.watch_namespace_of(sandbox.init_pid().as_raw())?;
    }
    let started = tracer::now();
    sandbox.start().await?;
    let is_event = readiness.is_event();
    let ready = readiness.wait_traced(sandbox, tracer, timeout).await?;
    if sandbox.exit().is_none() {
        match sandbox.pause().await {
            // It may have ended just now.
            Err(e) if sandbox.exit().is_none() => return Err(e.into()),
            _ => {}
        }
    }
    // Lines and answers are noticed late, here as in a start: what is touched meanwhile belongs to the recording.
    let cut = if is_event { ready } else { tracer::now() };
    Ok(Moments { started, ready, cut })
}

/// Collects the events, checks them against the page cache and makes the trace.
fn finish(
    input: &RecordInput<'_>,
    moments: Moments,
    tracer: Option<Tracer>,
) -> Result<Recording, RecordError> {
    let (rootfs, tree) = (input.rootfs, input.tree);
    let known = |runs: Vec<PageRun>| -> Vec<(u32, PageRun)> {
        runs.into_iter().filter_map(|run| clamp(rootfs, tree, run)).collect()
    };
    let (method, runs, oracle, lost, diagnostics) = if let Some(tracer) = tracer {
        let method = tracer.method();
        // The tracer still watches: the kernel may evict pages while they are counted.
        let asked = tracer::now();
        let mut resident = oracle::resident(rootfs, tree).map_err(RecordError::Residency)?;
        let events = tracer.finish()?;
        oracle::forget(&mut resident, &known(order::evicted(&events.pages, asked)));
        let oracle = oracle::compare(
            &known(order::first_use(&events.pages, u64::MAX)),
            &known(order::left(&events.pages)),
            &resident,
        );
        let runs = known(order::first_use(&events.pages, moments.cut));
        (method, runs, Some(oracle), events.lost, events.diagnostics)
    } else {
        let resident = oracle::resident(rootfs, tree).map_err(RecordError::Residency)?;
        let mut inos: Vec<u32> = resident.keys().copied().collect();
        inos.sort_unstable();
        let pages = inos.iter().flat_map(|ino| {
            let nid = rootfs.nid_of(*ino);
            resident[ino].iter().map(move |page| (nid, page as u32))
        });
        (Method::Residency, known(order::runs(pages)), None, 0, Vec::new())
    };
    let complete = lost == 0 && oracle.is_none_or(|o| o.recall >= 1.0);
    let (files, touches) = touches(tree, &runs);
    let trace = Trace {
        image: input.image,
        service: input.service.to_owned(),
        ready: input.probe.to_string(),
        method,
        complete,
        lost_events: lost,
        runs: 1,
        files,
        touches,
    };
    let ready_ms = moments.ready.saturating_sub(moments.started) as f64 / 1e6;
    Ok(Recording { trace, oracle, ready_ms, diagnostics })
}

/// The inode of a run, if it is a regular file, and the run without pages past its end.
fn clamp(rootfs: &RootFs, tree: &Tree, mut run: PageRun) -> Option<(u32, PageRun)> {
    let ino = rootfs.ino_of(run.ino)?;
    let pages = page::count(tree.inodes[ino as usize].file_size());
    run.pages.end = run.pages.end.min(u32::try_from(pages).unwrap_or(u32::MAX));
    (!run.pages.is_empty()).then_some((ino, run))
}

/// Files in order of first use, and the runs by their numbers.
fn touches(tree: &Tree, runs: &[(u32, PageRun)]) -> (Vec<TraceFile>, Vec<Touch>) {
    let paths = tree.paths();
    let mut numbers: HashMap<u32, u32> = HashMap::new();
    let mut files = Vec::new();
    let mut touches = Vec::with_capacity(runs.len());
    for (ino, run) in runs {
        let Body::Regular { size, content, .. } = tree.inodes[*ino as usize].body else { continue };
        let file = *numbers.entry(*ino).or_insert_with(|| {
            files.push(TraceFile { path: paths[*ino as usize].clone(), size, content });
            files.len() as u32 - 1
        });
        touches.push(Touch { file, page: run.pages.start, count: run.pages.len() as u32 });
    }
    (files, touches)
}

/// A regular file of the image.
struct ImageFile<'a> {
    /// Its inode in the tree.
    ino: u32,
    tree: &'a Tree,
}

impl<'a> ImageFile<'a> {
    /// The file at `path`, through symbolic links of the image.
    fn find(tree: &'a Tree, path: &[u8]) -> Option<Self> {
        let ino = tree.resolve(path)?;
        matches!(tree.inodes[ino as usize].body, Body::Regular { .. }).then_some(Self { ino, tree })
    }

    /// Its path, free of symbolic links, where the image is mounted at `mount`.
    fn path_in(&self, mount: &Path) -> PathBuf {
        mount.join(os_path(&self.tree.paths()[self.ino as usize]))
    }

    fn open(&self, rootfs: &RootFs) -> io::Result<File> {
        File::open(self.path_in(rootfs.path()))
    }
}

fn os_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}
