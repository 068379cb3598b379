//! A container and what lies below it: mounts in, a running process out.
//!
//! ```text
//! EROFS + cold device -> overlay -> runc, which booted meanwhile -> the process
//!                   \-> inject into the kernel's page cache what is there
//! ```

use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;

use super::NodeError;
use super::prepare::Prepared;
use super::resolve::Resolved;
use super::start::{StartOptions, ms};
use super::timeline::Moments;
use crate::fetch::Arrivals;
use crate::record::sandbox::{Accounts, Exit, Launch, Sandbox, SandboxSpec, Workload};
use crate::record::{Probe, Readiness};
use crate::rootfs::{Injector, Overlay, RootFs, RunDir};

/// A container and everything below it, in the order in which it ends.
pub(super) struct Container {
    pub sandbox: Sandbox,
    overlay: Overlay,
    injector: Option<Injector>,
    pub rootfs: RootFs,
}

/// A container, and who tells when it is ready.
pub(super) struct Created {
    pub container: Container,
    pub readiness: Option<Readiness>,
    /// When mounting began.
    pub begin: Instant,
    pub mount_ms: f64,
    pub create_ms: f64,
}

/// What a container is made of.
pub(super) struct Making<'a> {
    pub resolved: &'a Resolved,
    pub prepared: &'a Prepared,
    pub options: &'a StartOptions,
    pub probe: Option<&'a Probe>,
    /// Tells of the pages that are not in the zone yet.
    pub arrivals: Option<&'a Arc<Arrivals>>,
    pub moments: Option<&'a Moments>,
}

impl Making<'_> {
    /// Mounts the image, starts the injection and runs the container. The zone is complete or becomes so with the
    /// arrivals: runc itself reads files of the image, so a page that is not there must not be a hole of the zone even
    /// before the container's process starts.
    pub async fn create(&self, run: Arc<RunDir>, launch: Launch) -> Result<Created, NodeError> {
        let begin = Instant::now();
        let rootfs = self.mount(Arc::clone(&run)).await?;
        if let Some(moments) = self.moments {
            rootfs.log_reads(Arc::clone(&moments.reads));
        }
        let injector = rootfs.inject()?;
        let overlay = Overlay::mount(rootfs.path(), &run.path().join("container"))?;
        let readiness = match self.probe.map(|probe| (probe, Readiness::without_files(probe))) {
            None => None,
            Some((_, Some(readiness))) => Some(readiness),
            Some((probe, None)) => {
                let tree = &self.prepared.files.get().await?.tree;
                Some(Readiness::prepare(probe, &rootfs, tree, overlay.path())?)
            }
        };
        let mount_ms = ms(begin);

        let creating = Instant::now();
        let recorded = self.prepared.hot.as_ref().and_then(|(service, _)| service.args.as_deref());
        let (passwd, group) = self.prepared.files.accounts(&self.resolved.image).await?;
        let spec = SandboxSpec {
            rootfs: overlay.path(),
            workload: Workload {
                configuration: &self.resolved.image.configuration,
                args: self.options.args.as_deref().or(recorded),
                accounts: Accounts { passwd: &passwd, group: &group },
                network: self.options.network,
            },
            forward: self.options.forward,
            on_line: readiness.as_ref().and_then(Readiness::on_line),
        };
        let sandbox = launch.finish(spec).await?;
        let container = Container { sandbox, overlay, injector, rootfs };
        Ok(Created { container, readiness, begin, mount_ms, create_ms: ms(creating) })
    }

    async fn mount(&self, run: Arc<RunDir>) -> Result<RootFs, NodeError> {
        let hot = self.prepared.hot_pages(self.arrivals);
        if let (Some(kept), Some(hot), None) = (&self.prepared.kept, hot, self.arrivals) {
            let image = Arc::clone(&self.prepared.files);
            let mount = || RootFs::mount_kept(run, kept, hot, image, &Handle::current());
            return Ok(tokio::task::block_in_place(mount)?);
        }
        let files = self.prepared.files.get().await?;
        let (tree, source) = (Arc::clone(&files.tree), files.cold_source());
        let mount = || RootFs::mount(run, tree, hot, source, &Handle::current());
        Ok(tokio::task::block_in_place(mount)?)
    }
}

impl Container {
    /// Kills what still runs and removes the mounts; how the container ended, if runc says so.
    pub async fn end(self) -> Option<Exit> {
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
