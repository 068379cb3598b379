//! A mount for people: the image's root file system, read-only, at a path of their choice.
//!
//! ```text
//! image, runtime image -> one EROFS mount in a run directory -> a bind mount on each target, with a run directory
//! ```
//!
//! The mount lives as long as its server: unmounting it (by anybody) ends the server, and ending the server unmounts
//! it. The EROFS mount goes with the last of its targets. A killed server leaves a mount whose hot pages read on and whose
//! cold pages give EIO, until the next command removes it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use nix::mount::{MntFlags, MsFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};
use tdfs_common::digest::Digest;
use tokio::runtime::Handle;

use super::files::LazyFiles;
use super::prepare::Prepared;
use super::resolve::{Choice, Pull, Resolved, resolve};
use super::{NodeError, State};
use crate::fetch::{Progress, fetch};
use crate::oci::{ClientOptions, Reference};
use crate::rootfs::{Injector, RootFs, RunDir};

/// In the run directory of a target: where it is.
pub(super) const TARGET: &str = "target";

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Which runtime image.
    pub choice: Choice,
    /// When to ask the registry.
    pub pull: Pull,
    /// An existing directory.
    pub target: PathBuf,
}

/// The `--json` object of `tdfs mount`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountReport {
    /// Where it is.
    pub target: PathBuf,
    /// The image manifest.
    pub image: Digest,
    /// The service whose pages are at hand.
    pub service: Option<String>,
    /// Zone pages of the service.
    pub pages_needed: u64,
    /// Of these, fetched now.
    pub pages_fetched: u64,
    /// Milliseconds from the command to the mount.
    pub total_ms: f64,
    /// The process that serves cold pages.
    pub pid: u32,
}

/// The images that this process has mounted.
pub struct Mounts {
    state: State,
    /// By image and runtime image; who makes or looks for a mount holds its lock.
    images: Mutex<HashMap<Key, Arc<Slot>>>,
}

type Key = (Digest, Option<Digest>);
type Slot = tokio::sync::Mutex<Weak<Mounted>>;

/// An image, mounted in a run directory.
struct Mounted {
    rootfs: RootFs,
    files: Arc<LazyFiles>,
    service: Option<String>,
    pages_needed: u64,
}

/// A mount on a target, served by this process.
pub struct MountServer {
    /// What was mounted.
    pub report: MountReport,
    mounted: Arc<Mounted>,
    resolved: Resolved,
    /// The target's own, which says where it is.
    dir: Arc<RunDir>,
}

impl Mounts {
    /// None yet.
    pub fn new(state: State) -> Self {
        Self { state, images: Mutex::default() }
    }

    /// Mounts the image on the target, and before, unless it is mounted already, fetches what is missing.
    pub async fn mount(
        &self,
        reference: &Reference,
        options: &MountOptions,
        client: &ClientOptions,
        progress: Progress<'_>,
    ) -> Result<MountServer, NodeError> {
        let begin = Instant::now();
        let at =
            |path: &Path, e: io::Error| NodeError::Target { path: path.to_owned(), reason: e.to_string() };
        let target = options.target.canonicalize().map_err(|e| at(&options.target, e))?;
        if !target.is_dir() {
            return Err(at(&target, io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let mut resolved = resolve(&self.state, reference, &options.choice, options.pull, client).await?;
        let slot = self.slot((resolved.image.digest, resolved.runtime.as_ref().map(|r| r.manifest)));
        let mut pages_fetched = 0;
        let mounted = {
            let mut place = slot.lock().await;
            if let Some(mounted) = place.upgrade() {
                mounted
            } else {
                let (mounted, fetched) = Mounted::new(&self.state, &mut resolved, progress).await?;
                let mounted = Arc::new(mounted);
                (*place, pages_fetched) = (Arc::downgrade(&mounted), fetched);
                mounted
            }
        };
        let dir = self.state.new_run()?;
        let source = mounted.rootfs.path();
        fs::write(dir.path().join(TARGET), target.as_os_str().as_encoded_bytes())
            .map_err(|e| at(dir.path(), e))?;
        let report = MountReport {
            image: resolved.image.digest,
            service: mounted.service.clone(),
            pages_needed: mounted.pages_needed,
            pages_fetched,
            total_ms: 0.0,
            pid: std::process::id(),
            target,
        };
        let bound =
            nix::mount::mount(Some(source), &report.target, None::<&str>, MsFlags::MS_BIND, None::<&str>);
        let mut server = MountServer { report, mounted, resolved, dir };
        match bound {
            Ok(()) => {
                server.report.total_ms = begin.elapsed().as_secs_f64() * 1000.0;
                Ok(server)
            }
            Err(e) => {
                let error = at(&server.report.target, e.into());
                server.end().await?;
                Err(error)
            }
        }
    }

    /// Where the mount of these is or will be; places whose mounts are gone are forgotten.
    fn slot(&self, key: Key) -> Arc<Slot> {
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let is_used = |slot: &Arc<Slot>| {
            Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|mounted| mounted.strong_count() > 0)
        };
        images.retain(|_, slot| is_used(slot));
        Arc::clone(images.entry(key).or_default())
    }
}

impl Mounted {
    /// Fetches what is missing and mounts the image; also returns how many pages were fetched.
    async fn new(
        state: &State,
        resolved: &mut Resolved,
        progress: Progress<'_>,
    ) -> Result<(Self, u64), NodeError> {
        let mut pages = std::mem::take(&mut resolved.pages);
        let prepared = Prepared::new(state, resolved, progress).await?;
        let (mut needed, mut fetched) = (0, 0);
        if let Some((service, zone)) = &prepared.hot {
            let (stats, commit) = fetch(&resolved.store, &mut pages, service, zone, progress).await?;
            (needed, fetched) = (stats.pages_needed, stats.pages_fetched);
            commit.wait().await?;
        }
        let dir = state.new_run()?;
        let files = prepared.files.get().await?;
        let rootfs = tokio::task::block_in_place(|| {
            let tree = Arc::clone(&files.tree);
            let rootfs =
                RootFs::mount(dir, tree, prepared.hot_pages(None), files.cold_source(), &Handle::current())?;
            let injected = rootfs.inject()?.map_or(Ok(0), Injector::join);
            injected.map_err(|source| NodeError::State { path: rootfs.path().to_owned(), source })?;
            Ok::<_, NodeError>(rootfs)
        })?;
        let service = prepared.hot.as_ref().map(|(service, _)| service.service.clone());
        Ok((Self { rootfs, files: prepared.files, service, pages_needed: needed }, fetched))
    }
}

impl MountServer {
    /// Serves until somebody unmounts it, or until `stop`.
    pub async fn serve(self, stop: impl Future<Output = ()>) -> Result<(), NodeError> {
        let (target, device) = (self.report.target.clone(), self.mounted.rootfs.device());
        let at = |e: io::Error| NodeError::Target { path: target.clone(), reason: e.to_string() };
        let watched = target.clone();
        let gone = tokio::task::spawn_blocking(move || wait_unmounted(&watched, device));
        tokio::select! {
            gone = gone => gone?.map_err(at)?,
            () = stop => {}
        }
        if is_mounted(&target, device).map_err(at)? {
            nix::mount::umount2(&target, MntFlags::MNT_DETACH).map_err(|e| at(e.into()))?;
        }
        self.end().await
    }

    /// Ends the image's mount, if this was its last target, and then says that the target is free.
    async fn end(self) -> Result<(), NodeError> {
        let mut ended = Ok(());
        if let Some(mounted) = Arc::into_inner(self.mounted) {
            ended = tokio::task::block_in_place(|| mounted.rootfs.unmount()).map_err(NodeError::from);
            ended = ended.and(mounted.files.flush().await.map_err(NodeError::from));
        }
        self.resolved.remembered().await;
        let _ = fs::remove_file(self.dir.path().join(TARGET));
        ended
    }
}

/// Unmounts what [`Mounts::mount`] mounted on `target` and waits until its server has cleaned up.
pub async fn umount(state: &Path, target: &Path) -> Result<(), NodeError> {
    let failed = |reason: String| NodeError::Target { path: target.to_owned(), reason };
    let dir = run_of(&state.join("runs"), target);
    nix::mount::umount2(target, MntFlags::UMOUNT_NOFOLLOW).map_err(|e| {
        failed(if e == nix::errno::Errno::EINVAL {
            "nothing is mounted there".into()
        } else {
            e.desc().into()
        })
    })?;
    if let Some(dir) = dir {
        let owner = dir.join("owner");
        let waiting = tokio::task::spawn_blocking(move || match fs::File::open(&owner) {
            // The server holds it locked while it lives.
            Ok(owner) => owner.lock_shared(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        });
        waiting.await?.map_err(|e| failed(e.to_string()))?;
    }
    Ok(())
}

/// The run directory of the mount on `target`.
fn run_of(runs: &Path, target: &Path) -> Option<PathBuf> {
    let dirs = fs::read_dir(runs).ok()?.flatten().map(|d| d.path());
    let mine =
        |dir: &PathBuf| fs::read(dir.join(TARGET)).is_ok_and(|t| t == target.as_os_str().as_encoded_bytes());
    dirs.into_iter().find(mine)
}

/// Blocks until `target` no longer shows `device`. The kernel marks the file with every change of the mount table.
fn wait_unmounted(target: &Path, device: (u32, u32)) -> io::Result<()> {
    let table = fs::File::open("/proc/self/mountinfo")?;
    while is_mounted(target, device)? {
        let mut poll = [PollFd::new(table.as_fd(), PollFlags::POLLPRI)];
        nix::poll::poll(&mut poll, PollTimeout::NONE)?;
    }
    Ok(())
}

fn is_mounted(target: &Path, (major, minor): (u32, u32)) -> io::Result<bool> {
    let device = format!("{major}:{minor}");
    let table = fs::read("/proc/self/mountinfo")?;
    // Fields: id, parent, major:minor, root, mount point (blanks and backslashes in octal), ...
    let escaped: Vec<u8> = target
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .flat_map(|b| match b {
            b' ' | b'\t' | b'\n' | b'\\' => format!("\\{b:03o}").into_bytes(),
            b => vec![*b],
        })
        .collect();
    Ok(table.split(|b| *b == b'\n').any(|line| {
        let mut fields = line.split(|b| *b == b' ');
        fields.nth(2) == Some(device.as_bytes()) && fields.nth(1) == Some(&escaped)
    }))
}
