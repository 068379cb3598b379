//! A mount for people: the image's root file system, read-only, at a path of their choice.
//!
//! The mount lives as long as its server: unmounting it (by anybody) ends the server, and ending the server unmounts
//! it. A killed server leaves a mount whose hot pages read on and whose cold pages give EIO, until the next command
//! removes it.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::mount::{MntFlags, MsFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};
use tdfs_common::digest::Digest;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use super::files::LazyFiles;
use super::prepare::Prepared;
use super::resolve::{Choice, Pull, Resolved, resolve};
use super::{NodeError, State};
use crate::fetch::{Progress, fetch};
use crate::oci::{ClientOptions, Reference};
use crate::rootfs::RootFs;

/// In the run directory of a mount: where it is mounted.
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

/// A mount, served by this process.
pub struct MountServer {
    /// What was mounted.
    pub report: MountReport,
    rootfs: RootFs,
    files: Arc<LazyFiles>,
    resolved: Resolved,
}

/// Fetches what is missing and mounts the image.
pub async fn mount(
    state: &State,
    reference: &Reference,
    options: &MountOptions,
    client: &ClientOptions,
    progress: Progress<'_>,
) -> Result<MountServer, NodeError> {
    let begin = Instant::now();
    let at = |path: &Path, e: io::Error| NodeError::Target { path: path.to_owned(), reason: e.to_string() };
    let target = options.target.canonicalize().map_err(|e| at(&options.target, e))?;
    if !target.is_dir() {
        return Err(at(&target, io::Error::from(io::ErrorKind::NotADirectory)));
    }
    let mut resolved = resolve(state, reference, &options.choice, options.pull, client).await?;
    let mut pages = std::mem::take(&mut resolved.pages);
    let prepared = Prepared::new(state, &mut resolved, progress).await?;
    let mut report = MountReport {
        target,
        image: resolved.image.digest,
        service: prepared.hot.as_ref().map(|(s, _)| s.service.clone()),
        pages_needed: 0,
        pages_fetched: 0,
        total_ms: 0.0,
        pid: std::process::id(),
    };
    if let Some((service, zone)) = &prepared.hot {
        let (stats, commit) = fetch(&resolved.store, &mut pages, service, zone, progress).await?;
        (report.pages_needed, report.pages_fetched) = (stats.pages_needed, stats.pages_fetched);
        commit.wait().await?;
    }
    let dir = state.new_run()?;
    let files = prepared.files.get().await?;
    let rootfs = tokio::task::block_in_place(|| {
        let tree = Arc::clone(&files.tree);
        let rootfs =
            RootFs::mount(dir, tree, prepared.hot_pages(None), files.cold_source(), &Handle::current())?;
        if let Some(injector) = rootfs.inject()? {
            injector.join().map_err(|e| at(rootfs.path(), e))?;
        }
        let bind = MsFlags::MS_BIND;
        nix::mount::mount(Some(rootfs.path()), &report.target, None::<&str>, bind, None::<&str>)
            .map_err(|e| at(&report.target, e.into()))?;
        fs::write(rootfs.dir().join(TARGET), report.target.as_os_str().as_encoded_bytes())
            .map_err(|e| at(rootfs.dir(), e))?;
        Ok::<_, NodeError>(rootfs)
    })?;
    report.total_ms = begin.elapsed().as_secs_f64() * 1000.0;
    Ok(MountServer { report, rootfs, files: prepared.files, resolved })
}

impl MountServer {
    /// Serves until somebody unmounts it or this process is told to end.
    pub async fn serve(self) -> Result<(), NodeError> {
        let target = self.report.target.clone();
        let at = |e: io::Error| NodeError::Target { path: target.clone(), reason: e.to_string() };
        let mut terminate = signal(SignalKind::terminate()).map_err(at)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(at)?;
        let device = self.rootfs.device();
        let watched = target.clone();
        let gone = tokio::task::spawn_blocking(move || wait_unmounted(&watched, device));
        tokio::select! {
            gone = gone => gone?.map_err(at)?,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tokio::task::block_in_place(|| {
            if is_mounted(&target, device).map_err(at)? {
                nix::mount::umount2(&target, MntFlags::MNT_DETACH).map_err(|e| at(e.into()))?;
            }
            let _ = fs::remove_file(self.rootfs.dir().join(TARGET));
            Ok::<_, NodeError>(self.rootfs.unmount()?)
        })?;
        self.resolved.remembered().await;
        Ok(self.files.flush().await?)
    }
}

/// Unmounts what [`mount`] mounted on `target` and waits until its server has cleaned up.
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
