//! One start, from the reference to ready.
//!
//! ```text
//! runc boots -------------------------------------------------------------------\
//! resolve, diff ---+-> fetch missing pages, verify, inject into the zone         |
//!                  |        fetched: wait for all \      / streaming: at once    |
//!                  +----------------------------------+--> container.rs: mounts --+--> container runs -> ready
//! ```
//!
//! The zone is opened, which waits for the disk, as soon as the page table is there and while the rest of the metadata
//! is decoded (`resolve.rs`, `prepare.rs`).
//!
//! [`StartMode`] says which way a start takes. Nothing looks at the image before its pages are there or, streaming, wait
//! for: pages that had not arrived when the image was mounted lie behind the cold device, whose reads wait for them and
//! make them wanted first. A fetch that fails before ready ends the start; later it makes the reads of what it did not
//! bring fail. If this process dies the mounts stay, serve hot pages and fail cold reads, until the next command
//! removes them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tdfs_common::page::PAGE_SIZE;
use tokio::task::{JoinHandle, spawn_blocking};

use super::container::{Container, Created, Making};
use super::fetching::{Fetching, Rest};
use super::files::LazyFiles;
use super::prepare::{Prepared, keep};
use super::resolve::{Choice, Pull, Resolved, resolve};
use super::timeline::{Moments, Recording, Stages};
use super::{NodeError, StartReport, State};
use crate::fetch::{Decoders, Progress, SourceUse, bytes_missing};
use crate::oci::{ClientOptions, Reference};
use crate::record::Probe;
use crate::record::sandbox::{Exit, Forward, Launch, Network, Sandbox};

/// A container is created and started in about this time: a shorter fetch gains nothing by streaming.
const CREATION: Duration = Duration::from_millis(60);
/// What the detour of a page through FUSE costs a container that starts meanwhile (measured: 28,000 pages, 60 ms).
const DETOUR: Duration = Duration::from_micros(2);

/// When the container's process starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartMode {
    /// Streaming if what is missing is expected to take longer than creating the container and the detour through FUSE,
    /// or if that shows while it comes.
    Auto,
    /// When all pages are there.
    Fetched,
    /// As soon as the container is created: it waits for the pages that it reads.
    Streaming,
}

impl StartMode {
    /// Whether to stream `pages` in `stored` bytes that should arrive `within` this time, and why.
    fn streams(self, pages: u64, stored: u64, within: Duration) -> (bool, String) {
        let size = stored as f64 / f64::from(1 << 20);
        let why = format!("{size:.1} MiB are missing and should take {} ms", within.as_millis());
        match self {
            Self::Auto => (is_long(within, pages), why),
            Self::Fetched => (false, "as asked for".into()),
            Self::Streaming => (true, "as asked for".into()),
        }
    }
}

/// Whether to stream `pages` rather than wait `within` for them.
fn is_long(within: Duration, pages: u64) -> bool {
    within >= CREATION + DETOUR.saturating_mul(u32::try_from(pages).unwrap_or(u32::MAX))
}

/// How to start.
#[derive(Clone, Debug)]
pub struct StartOptions {
    /// When its process starts.
    pub mode: StartMode,
    /// Which runtime image.
    pub choice: Choice,
    /// When to ask the registry.
    pub pull: Pull,
    /// Readiness; the recorded one if `None`.
    pub ready: Option<Probe>,
    /// For readiness.
    pub timeout: Duration,
    /// Network of the container.
    pub network: Network,
    /// Arguments in place of the recorded ones or the image's.
    pub args: Option<Vec<String>>,
    /// Where the container's output goes.
    pub forward: Forward,
    /// Whether to record what happens, see [`Running::recording`].
    pub events: bool,
}

/// A container that is ready.
pub struct Running {
    /// How it got there.
    pub report: StartReport,
    recording: Option<Arc<Recording>>,
    container: Container,
    fetching: Option<Fetching>,
    files: Arc<LazyFiles>,
    /// The metadata of its mount is being kept for the next.
    keeping: Option<JoinHandle<()>>,
    resolved: Resolved,
}

/// Starts a container and waits until it is ready.
pub async fn start(
    state: &State,
    reference: &Reference,
    options: &StartOptions,
    client: &ClientOptions,
    progress: Progress<'_>,
) -> Result<Running, NodeError> {
    let begin = Instant::now();
    let mut report = StartReport::default();
    let mut stages = Stages::new(begin);
    let moments = options.events.then(|| Moments::new(begin));
    let run = state.new_run()?;
    let (place, runc) = (Arc::clone(&run), state.runc());
    let launching = spawn_blocking(move || {
        let launch = Launch::run(&place.id(), &place.path().join("bundle"), &runc);
        // Where nobody waits for it any more, it is dropped before its place.
        (launch, place)
    });
    let resolved = resolve(state, reference, &options.choice, options.pull, client).await;
    let (launch, _) = launching.await?;
    let (launch, mut resolved) = (launch?, resolved?);
    let pages = std::mem::take(&mut resolved.pages);
    let (sources, answers) = (pages.sources(), pages.answers());
    report.image = Some(resolved.image.digest);
    report.resolve_ms = ms(begin);
    stages.add("resolve", begin, report.resolve_ms);

    let diff = Instant::now();
    let before_pull = resolved.requests();
    let pulling = |done, total| {
        if let Some(moments) = &moments {
            moments.arrived(0, done, total);
        }
        progress(done, total);
    };
    let manifest = resolved.runtime.as_ref().map(|runtime| runtime.manifest);
    let prepared = Prepared::new(state, &mut resolved, &pulling).await?;
    let pulled = resolved.requests();
    let missing = prepared.missing.count();
    let mut streaming;
    (report.source, report.start_mode, (streaming, report.start_reason)) = match &prepared.hot {
        None => ("layers", "layers", (false, "there is no runtime image".into())),
        Some(_) if missing == 0 => ("resident", "resident", (false, "nothing is missing".into())),
        Some((service, _)) => {
            let stored = bytes_missing(service, &prepared.missing);
            let within = pages.expected(stored, missing * PAGE_SIZE as u64);
            match options.mode.streams(missing, stored, within) {
                why @ (true, _) => ("fetched", "streaming", why),
                why @ (false, _) => ("fetched", "fetched", why),
            }
        }
    };
    if prepared.hot.is_some() {
        report.diff_ms = ms(diff);
        stages.add("diff", diff, report.diff_ms);
    } else {
        report.fetch_ms = ms(diff);
        stages.add("pull", diff, report.fetch_ms);
        report.layer_bytes = pulled.bytes_received - before_pull.bytes_received;
        report.data_requests = pulled.data_requests - before_pull.data_requests;
    }
    let service = prepared.hot.as_ref().map(|(service, _)| service);
    report.service = service.map(|s| s.service.clone());
    let recorded = service.map(|s| s.ready.parse::<Probe>()).transpose()?;
    let probe = options.ready.clone().or(recorded);

    let hot = prepared.hot.as_ref().filter(|_| missing > 0);
    let decoders = if streaming { Decoders::beside_container() } else { Decoders::everywhere() };
    let mut fetching =
        hot.map(|hot| Fetching::begin(&resolved.store, pages, hot, prepared.missing.clone(), decoders));
    if let (Some(fetching), Some(moments)) = (&mut fetching, &moments) {
        moments.missing(missing);
        fetching.record(moments.clone());
    }
    let shown = fetching.as_ref().map(|f| f.show(progress));
    let shown = async {
        match shown {
            Some(shown) => shown.await,
            None => std::future::pending().await,
        }
    };
    let starting = async {
        if let Some(fetching) = fetching.as_mut().filter(|_| !streaming) {
            let all = match options.mode {
                StartMode::Auto => fetching.done_unless(is_long).await,
                StartMode::Fetched | StartMode::Streaming => fetching.done().await.map(|()| true),
            };
            if !all.map_err(|e| (e, None))? {
                streaming = true;
                report.start_mode = "streaming";
                report.start_reason.push_str(", but come more slowly");
            }
        }
        let arrivals = fetching.as_ref().filter(|_| streaming).map(|f| Arc::clone(f.arrivals()));
        let (probe, arrivals, moments) = (probe.as_ref(), arrivals.as_ref(), moments.as_ref());
        let making = Making { resolved: &resolved, prepared: &prepared, options, probe, arrivals, moments };
        let created = making.create(run, launch).await.map_err(|e| (e, None))?;
        let Created { container, readiness, begin: creating, mount_ms, create_ms } = created;
        let begun = Instant::now();
        let running = async {
            match readiness {
                Some(readiness) => Ok(readiness.wait(&container.sandbox, options.timeout).await.map(drop)?),
                None => Ok(()),
            }
        };
        let outcome = match &mut fetching {
            Some(fetching) => tokio::select! {
                biased;
                error = fetching.failure() => Err(error),
                outcome = running => outcome,
            },
            None => running.await,
        };
        if let Err(error) = outcome {
            return Err((error, Some(container)));
        }
        (report.mount_ms, report.start_ms) = (mount_ms, create_ms);
        (report.ready_ms, report.total_ms) = (ms(begun), ms(begin));
        stages.add("mount", creating, mount_ms);
        stages.add("create", creating + Duration::from_secs_f64(mount_ms / 1000.0), create_ms);
        stages.add("ready", begun, report.ready_ms);
        Ok(container)
    };
    let started = tokio::select! {
        started = starting => started,
        never = shown => match never {},
    };
    let container = match started {
        Ok(container) => container,
        Err((error, container)) => {
            let error = match fetching {
                Some(fetching) => fetching.give_up(error).await,
                None => error,
            };
            if let Some(container) = container {
                container.end().await;
            }
            return Err(error);
        }
    };

    let keepable = manifest.and_then(|manifest| Some((manifest, container.rootfs.keepable()?)));
    let keeping =
        keepable.map(|(manifest, keepable)| tokio::spawn(keep(keepable, state.kept(&manifest), manifest)));

    let (cold, waited) = (container.rootfs.cold_stats(), container.rootfs.wait_stats());
    (report.cold_pages, report.cold_requests) = (cold.cold_pages, cold.cold_requests);
    (report.waited_pages, report.waited_requests) = (waited.waited_pages, waited.waited_requests);
    report.waited_ms = waited.waited.as_secs_f64() * 1000.0;
    if let Some((_, zone)) = &prepared.hot {
        report.pages_needed = zone.needed().count();
        report.pages_present = report.pages_needed - missing.min(report.pages_needed);
        report.layer_bytes = prepared.files.layer_stats().bytes;
        if let Some(fetching) = &mut fetching {
            let used = sources.list();
            report.data_requests = used.iter().filter(|s| s.pages + s.bytes > 0).map(|s| s.requests).sum();
            report.pages_awaited = fetching.arrivals().awaited().count();
            let (stats, fetch_ms) = fetching.leave_alone().await;
            report.fetch_ms = fetch_ms;
            stages.add("fetch", fetching.since(), fetch_ms);
            (report.pages_fetched, report.bytes_fetched) = (stats.pages_fetched, stats.bytes_fetched);
        }
    }
    let asked = resolved.requests();
    (report.metadata_requests, report.bytes_received) = (asked.metadata_requests, asked.bytes_received);
    if fetching.is_none() {
        // An answer without pages was about metadata.
        report.metadata_requests += answers;
    }
    let local = SourceUse {
        source: "local",
        pages: report.pages_present,
        bytes: report.pages_present * PAGE_SIZE as u64,
        ..SourceUse::default()
    };
    let layers = SourceUse {
        source: "layers",
        bytes: report.layer_bytes,
        requests: if prepared.hot.is_none() { report.data_requests } else { 0 },
        ..SourceUse::default()
    };
    let used = std::iter::once(local).chain(sources.list()).chain(std::iter::once(layers));
    report.sources = used.filter(|s| s.pages + s.bytes + s.requests > 0).collect();
    let service = prepared.hot.as_ref().map(|(service, _)| Arc::clone(service));
    let recording = match moments {
        Some(moments) => {
            let tree = Arc::clone(&prepared.files.get().await?.tree);
            Some(Arc::new(moments.recording(reference.to_string(), &report, stages, tree, service)))
        }
        None => None,
    };
    Ok(Running { report, recording, container, fetching, files: prepared.files, keeping, resolved })
}

impl Running {
    /// What happened, if that was asked for; it goes on until the container has ended.
    pub fn recording(&self) -> Option<Arc<Recording>> {
        self.recording.clone()
    }

    /// The container.
    pub fn sandbox(&self) -> &Sandbox {
        &self.container.sandbox
    }

    /// Kills the container if it still runs, and removes everything but the caches. What was fetched, and the `rest` of
    /// the pages if it is to be fetched, is durable afterwards.
    pub async fn end(self, rest: Rest) -> Option<Exit> {
        if let Some(fetching) = &self.fetching {
            fetching.release_readers();
        }
        let exit = self.container.end().await;
        if let Some(fetching) = self.fetching {
            fetching.end(rest).await;
        }
        if let Some(keeping) = self.keeping {
            // It warns of what went wrong itself.
            let _ = keeping.await;
        }
        if let Err(error) = self.files.flush().await {
            tracing::warn!("the cold pages are not durable: {error}");
        }
        self.resolved.remembered().await;
        exit
    }
}

pub(super) fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
