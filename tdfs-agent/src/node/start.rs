//! One start, from the reference to ready.
//!
//! ```text
//! resolve -> diff -+-> fetch missing pages, verify, inject into the zone ---+-> start -> ready
//!                  +-> EROFS + cold device -> overlay -> container created -+
//!                                        \-> inject into the kernel's page cache (as soon as the zone is complete)
//! ```
//!
//! The container is created while pages arrive, and its process starts when all of them are there: until then nothing
//! reads a hot page through the mount. If this process dies the mounts stay,
//! serve hot pages and fail cold reads, until the next command removes them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::prepare::Prepared;
use super::resolve::{Choice, Pull, Resolved, resolve};
use super::{NodeError, StartReport, State};
use crate::fetch::{Commit, FetchStats, ImageLayers, Progress, fetch};
use crate::oci::{ClientOptions, Reference};
use crate::record::sandbox::{Accounts, Exit, Forward, Network, Sandbox, SandboxSpec, Workload};
use crate::record::{Probe, Readiness};
use crate::rootfs::{Injector, Overlay, RootFs};

/// How to start.
#[derive(Clone, Debug)]
pub struct StartOptions {
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
}

/// A container that is ready.
pub struct Running {
    /// How it got there.
    pub report: StartReport,
    container: Container,
    commit: Option<Commit>,
    layers: Arc<ImageLayers>,
    resolved: Resolved,
}

/// A container and everything below it, in the order in which it ends.
struct Container {
    sandbox: Sandbox,
    overlay: Overlay,
    injector: Option<Injector>,
    rootfs: RootFs,
}

/// A container that waits for its pages, and who tells when it is ready.
struct Created {
    container: Container,
    readiness: Option<Readiness>,
    mount_ms: f64,
    create_ms: f64,
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
    let mut resolved = resolve(state, reference, &options.choice, options.pull, client).await?;
    report.image = Some(resolved.image.digest);
    report.resolve_ms = ms(begin);

    let diff = Instant::now();
    let before_pull = resolved.requests();
    let prepared = Prepared::new(state, &mut resolved, progress).await?;
    let pulled = resolved.requests();
    let missing = prepared.hot.as_ref().map_or(0, |(_, zone)| zone.missing().count());
    report.source = match (&prepared.hot, missing) {
        (None, _) => "layers",
        (_, 0) => "resident",
        _ => "fetched",
    };
    if prepared.hot.is_some() {
        report.diff_ms = ms(diff);
    } else {
        report.fetch_ms = ms(diff);
        report.layer_bytes = pulled.bytes_received - before_pull.bytes_received;
        report.data_requests = pulled.data_requests - before_pull.data_requests;
    }
    let service = prepared.hot.as_ref().map(|(service, _)| service);
    report.service = service.map(|s| s.service.clone());
    let recorded = service.map(|s| s.ready.parse::<Probe>()).transpose()?;
    let probe = options.ready.clone().or(recorded);

    let fetching = async {
        let begin = Instant::now();
        let Some((service, zone)) = prepared.hot.as_ref().filter(|_| missing > 0) else {
            return Ok((FetchStats::default(), None, 0.0));
        };
        let (stats, commit) = fetch(&resolved.store, service, zone, progress).await?;
        Ok::<_, NodeError>((stats, Some(commit), ms(begin)))
    };
    let creating = create(state, &resolved, &prepared, options, probe.as_ref(), missing == 0);
    // Both to their end: half a container cannot be removed.
    let (fetched, created) = tokio::join!(fetching, creating);
    let Created { mut container, readiness, mount_ms, create_ms } = created?;
    let begun = Instant::now();
    let outcome = async {
        let fetched = fetched?;
        if container.injector.is_none() {
            container.injector = container.rootfs.inject()?;
        }
        container.sandbox.start().await?;
        let start_ms = ms(begun);
        if let Some(readiness) = readiness {
            readiness.wait(&container.sandbox, options.timeout).await?;
        }
        Ok::<_, NodeError>((fetched, start_ms))
    };
    let ((stats, commit, fetch_ms), start_ms) = match outcome.await {
        Ok(outcome) => outcome,
        Err(error) => {
            container.end().await;
            return Err(error);
        }
    };
    report.start_ms = create_ms + start_ms;
    report.ready_ms = ms(begun) - start_ms;
    report.total_ms = ms(begin);
    report.mount_ms = mount_ms;

    let cold = container.rootfs.cold_stats();
    (report.cold_pages, report.cold_requests) = (cold.cold_pages, cold.cold_requests);
    if let Some((_, zone)) = &prepared.hot {
        report.pages_needed = zone.needed().count();
        report.pages_present = report.pages_needed - missing.min(report.pages_needed);
        report.fetch_ms = fetch_ms;
        report.pages_fetched = stats.pages_fetched;
        report.bytes_fetched = stats.bytes_fetched;
        report.data_requests = stats.data_requests;
        report.layer_bytes = prepared.layer_stats().bytes;
    }
    report.metadata_requests = resolved.requests().metadata_requests;
    Ok(Running { report, container, commit, layers: prepared.layers, resolved })
}

/// Mounts the image and creates the container; also starts the injection if the zone is complete.
async fn create(
    state: &State,
    resolved: &Resolved,
    prepared: &Prepared,
    options: &StartOptions,
    probe: Option<&Probe>,
    resident: bool,
) -> Result<Created, NodeError> {
    let begin = Instant::now();
    let (id, dir) = state.new_run()?;
    let rootfs = tokio::task::block_in_place(|| {
        let tree = Arc::clone(&prepared.tree);
        RootFs::mount(&dir, tree, prepared.hot_pages(), prepared.cold_source(), &Handle::current())
    })?;
    let injector = if resident { rootfs.inject()? } else { None };
    let overlay = Overlay::mount(rootfs.path(), &dir.join("container"))?;
    let readiness = probe.map(|probe| Readiness::prepare(probe, &rootfs, overlay.path())).transpose()?;
    let mount_ms = ms(begin);

    let creating = Instant::now();
    let recorded = prepared.hot.as_ref().and_then(|(service, _)| service.args.as_deref());
    let (passwd, group) = prepared.accounts(&resolved.image).await?;
    let sandbox = Sandbox::create(SandboxSpec {
        id: &id,
        bundle: &dir.join("bundle"),
        runc_root: &state.runc(),
        rootfs: overlay.path(),
        workload: Workload {
            configuration: &resolved.image.configuration,
            args: options.args.as_deref().or(recorded),
            accounts: Accounts { passwd: &passwd, group: &group },
            network: options.network,
        },
        forward: options.forward,
        on_line: readiness.as_ref().and_then(Readiness::on_line),
    })
    .await?;
    let container = Container { sandbox, overlay, injector, rootfs };
    Ok(Created { container, readiness, mount_ms, create_ms: ms(creating) })
}

impl Running {
    /// The container.
    pub fn sandbox(&self) -> &Sandbox {
        &self.container.sandbox
    }

    /// Kills the container if it still runs, and removes everything but the caches. What was fetched is durable
    /// afterwards.
    pub async fn end(self) -> Option<Exit> {
        let exit = self.container.end().await;
        if let Some(commit) = self.commit
            && let Err(error) = commit.wait().await
        {
            tracing::warn!("the fetched pages are not durable: {error}");
        }
        if let Err(error) = self.layers.flush().await {
            tracing::warn!("the cold pages are not durable: {error}");
        }
        self.resolved.remembered().await;
        exit
    }
}

impl Container {
    async fn end(self) -> Option<Exit> {
        let exit = match self.sandbox.delete().await {
            Ok(exit) => Some(exit),
            Err(error) => {
                tracing::warn!("{error}");
                None
            }
        };
        let removed = tokio::task::block_in_place(|| {
            drop(self.injector);
            let removed = self.overlay.unmount();
            removed.and(self.rootfs.unmount())
        });
        if let Err(error) = removed {
            tracing::warn!("{error}");
        }
        exit
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
