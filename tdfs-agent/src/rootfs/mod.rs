//! The root file system of an image, served by the kernel.
//!
//! ```text
//!  overlay (rw, one per container)
//!     | lower
//!  EROFS mount ---- metadata file, written here from the tree, unlinked, or kept by an earlier mount (kept.rs)
//!     | device 1: zone file            hot pages, at page-cache speed
//!     | device 2: cold device          one file of our FUSE server -> ColdSource -> layers
//!                                                                  \-> zone file, for hot pages that came late
//! ```
//!
//! A hot page that is still under way when the image is mounted lies behind the cold device, whose reads can wait. So it
//! does for the life of the mount: evicted from the page cache it is read through FUSE again, out of the zone.
//! Where every hot page does, the mount has no zone device and reads the cold device in the background (`directio`).
//!
//! Nothing of it survives the process except the mounts themselves, which serve hot pages on and give EIO for cold ones,
//! until [`recover`] removes them.
//!
//! A process must not read cold pages through a mount that it serves itself: killed meanwhile, its reader would wait
//! for its server, whose `/dev/fuse` stays open until the reader has ended.

mod awaited;
pub mod cold;
pub mod erofs;
pub mod fuse;
pub mod inject;
mod kept;
mod mount;
pub mod overlay;
mod read_ahead;
mod reads;
mod rundir;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::Run;
use tdfs_common::tree::Tree;
use tokio::runtime::Handle;

pub use awaited::WaitStats;
pub use cold::{ColdFiles, ColdImage, ColdSource, ColdStats};
pub use erofs::ErofsError;
pub use inject::Injector;
pub use kept::{Keepable, Kept};
pub use mount::MountError;
pub use overlay::Overlay;
pub use reads::{Read, ReadLog, Reads};
pub use rundir::{RunDir, recover};

use awaited::Awaited;
use cold::ColdDevice;
use inject::HotPaths;
use mount::Context;
use read_ahead::ReadAhead;

use crate::fetch::Arrivals;

/// A root file system cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The image does not fit the file system.
    #[error(transparent)]
    Erofs(#[from] ErofsError),
    /// The kernel refused.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel does not mount EROFS from such a file.
    #[error("{} must lie on ext4 or xfs, and the kernel must mount EROFS from files (6.12)", .0.display())]
    NotOnDisk(PathBuf),
    /// The zone file lacks pages that the service uses.
    #[error("the zone file has {found} bytes, but the service uses {wanted}")]
    ShortZone {
        /// Bytes.
        found: u64,
        /// Bytes.
        wanted: u64,
    },
    /// A file or directory.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl RootfsError {
    fn io(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path: path.clone(), source }
    }
}

/// The pages of a service, present in its group's zone file or on their way there.
#[derive(Clone, Copy)]
pub struct HotPages<'a> {
    /// The zone file, on any file system.
    pub zone: &'a File,
    /// Zone pages that the service may use.
    pub zone_pages: u64,
    /// In order of first use.
    pub runs: &'a [Run],
    /// Tells of the pages on their way; all are present if `None`.
    pub arrivals: Option<&'a Arc<Arrivals>>,
}

/// A mounted image. Dropping it unmounts it; if containers still use it, their cold reads fail from then on.
pub struct RootFs {
    root: PathBuf,
    attached: bool,
    nids: Arc<[u64]>,
    device: u64,
    hot: Option<Hot>,
    runtime: Handle,
    read_ahead: ReadAhead,
    cold: Arc<ColdDevice>,
    // Dropped in this order, behind the unmount.
    _server: fuse::Server,
    dir: Arc<RunDir>,
}

impl RootFs {
    /// Mounts `tree` at `root` in the run directory `dir`, which must lie on ext4 or xfs, with read-ahead 0. Pages
    /// that are not `hot` come from `source`, read by tasks on `runtime`. Does not block on `source`, nor on arrivals.
    pub fn mount(
        dir: Arc<RunDir>,
        tree: Arc<Tree>,
        hot: Option<HotPages<'_>>,
        source: Arc<dyn ColdSource>,
        runtime: &Handle,
    ) -> Result<Self, RootfsError> {
        let hot = hot.filter(|h| !h.runs.is_empty());
        let zone = hot.map(|h| zone_of(&h)).transpose()?;
        let runs = match &hot {
            Some(hot) => erofs::check_runs(&tree, hot.runs, hot.zone_pages)?,
            None => Vec::new(),
        };
        let (present, awaited) = match zone.as_ref().zip(hot.and_then(|h| h.arrivals)) {
            Some((zone, arrivals)) => {
                let (present, awaited) = Awaited::split(&runs, arrivals, zone)?;
                (present, Some(awaited))
            }
            None => (runs, None),
        };
        let metadata = erofs::write(&tree, &present, hot.map_or(0, |h| h.zone_pages))?;

        let failed = RootfsError::io(dir.path());
        // Without a name there is nothing to clean up.
        let unnamed =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(dir.path());
        let mut file = unnamed.map_err(&failed)?;
        file.write_all(&metadata.image).map_err(&failed)?;

        let cold = Arc::new(ColdDevice::new(Arc::clone(&tree), metadata.cold, source, awaited));
        let device = zone.as_ref().filter(|_| !present.is_empty());
        let mounted = Mounted::new(&dir, &file, device, &cold, runtime)?;
        let hot = zone.zip(hot).map(|(zone, hot)| Hot {
            zone,
            zone_pages: hot.zone_pages,
            runs: hot.runs.into(),
            paths: HotPaths::In(tree),
            arrivals: hot.arrivals.cloned(),
        });
        mounted.attach(dir, metadata.nids.into(), hot, cold, runtime)
    }

    /// Mounts what an earlier mount of the same image left, with the same `hot` pages, all of them present; the files of
    /// the `image` are needed for cold reads only.
    pub fn mount_kept(
        dir: Arc<RunDir>,
        kept: &Kept,
        hot: HotPages<'_>,
        image: Arc<dyn ColdImage>,
        runtime: &Handle,
    ) -> Result<Self, RootfsError> {
        let zone = zone_of(&hot)?;
        let cold = Arc::new(ColdDevice::late(kept.cold_blocks, image));
        let mounted = Mounted::new(&dir, &kept.file, Some(&zone), &cold, runtime)?;
        let (zone_pages, runs) = (hot.zone_pages, hot.runs.into());
        let paths = HotPaths::Known(Arc::clone(&kept.paths));
        let hot = Some(Hot { zone, zone_pages, runs, paths, arrivals: None });
        mounted.attach(dir, Arc::clone(&kept.nids), hot, cold, runtime)
    }

    /// Where it is mounted, read-only.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Its run directory, in which containers may keep their directories.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Major and minor number of the mount, as stat(2) gives them.
    pub fn device(&self) -> (u32, u32) {
        (nix::sys::stat::major(self.device) as u32, nix::sys::stat::minor(self.device) as u32)
    }

    /// The kernel's inode number of an inode of the tree.
    pub fn nid_of(&self, ino: u32) -> u64 {
        self.nids[ino as usize]
    }

    /// The inode of the tree with an inode number of the kernel.
    pub fn ino_of(&self, nid: u64) -> Option<u32> {
        self.nids.binary_search(&nid).ok().map(|ino| ino as u32)
    }

    /// Sets the read-ahead, KiB, of files opened from now on.
    pub fn set_read_ahead(&self, kib: u32) -> Result<(), RootfsError> {
        self.read_ahead.set(kib).map_err(RootfsError::io(&self.root))
    }

    /// Starts to inject the hot pages, awaited ones as they arrive. End it before the mount. Without any there is nothing
    /// to do but what every injection ends with: read-ahead.
    pub fn inject(&self) -> Result<Option<Injector>, RootfsError> {
        let Some(hot) = &self.hot else {
            self.set_read_ahead(inject::READ_AHEAD)?;
            return Ok(None);
        };
        let start = |root: File| {
            let arriving = hot.arrivals.as_ref().map(|a| (Arc::clone(a), self.runtime.clone()));
            let (paths, runs) = (hot.paths.clone(), Arc::clone(&hot.runs));
            Injector::start(root.as_fd(), hot.zone.as_fd(), paths, runs, arriving, self.read_ahead.clone())
        };
        File::open(&self.root).and_then(start).map(Some).map_err(RootfsError::io(&self.root))
    }

    /// What the next mount of this image could use, unless this one was made of it.
    pub fn keepable(&self) -> Option<Keepable> {
        let hot = self.hot.as_ref()?;
        let HotPaths::In(tree) = &hot.paths else { return None };
        Some(Keepable { tree: Arc::clone(tree), runs: Arc::clone(&hot.runs), zone_pages: hot.zone_pages })
    }

    /// Logs what is read through the cold device from now on; the first log stays.
    pub fn log_reads(&self, log: Arc<ReadLog>) {
        self.cold.log_reads(log);
    }

    /// What was read through the cold device so far.
    pub fn cold_stats(&self) -> ColdStats {
        self.cold.stats()
    }

    /// How long hot pages were waited for so far.
    pub fn wait_stats(&self) -> WaitStats {
        self.cold.wait_stats()
    }

    /// Unmounts and removes everything. If it stays in use it is detached instead, and cold reads fail from then on.
    pub fn unmount(mut self) -> Result<(), RootfsError> {
        self.detach().map_err(RootfsError::io(&self.root))
    }

    fn detach(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.attached) {
            mount::unmount(&self.root)?;
        }
        match std::fs::remove_dir(&self.root) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for RootFs {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            tracing::warn!(path = %self.root.display(), %error, "mount left behind");
        }
    }
}

/// The hot pages of a mount.
struct Hot {
    zone: File,
    zone_pages: u64,
    runs: Arc<[Run]>,
    paths: HotPaths,
    arrivals: Option<Arc<Arrivals>>,
}

/// A file system that is attached nowhere.
struct Mounted {
    root: OwnedFd,
    device: u64,
    read_ahead: ReadAhead,
    server: fuse::Server,
}

impl Mounted {
    /// Mounts EROFS `metadata` for the run directory `dir`, over the `zone` file, if that is one of its devices, and the
    /// `cold` device.
    fn new(
        dir: &RunDir,
        metadata: &File,
        zone: Option<&File>,
        cold: &Arc<ColdDevice>,
        runtime: &Handle,
    ) -> Result<Self, RootfsError> {
        let failed = RootfsError::io(dir.path());
        let (server, cold_file) = fuse::serve(Arc::clone(cold), runtime)?;
        let (context, read_ahead) = ReadAhead::of_new(|| {
            let context = Context::open("erofs")?;
            context.set("source", mount::fd_path(metadata))?;
            for device in zone.into_iter().chain([&cold_file]) {
                context.set("device", mount::fd_path(device))?;
            }
            context.flag("ro")?;
            if zone.is_none() {
                // The FUSE file is then read in the background (6.13, EINVAL before): many requests are answered for
                // one wake-up instead of one for two. A zone must be read through the page cache, where its pages are.
                let _ = context.flag("directio");
            }
            Ok(context)
        })
        .map_err(|error| match error.source.raw_os_error() {
            Some(libc::ENOTBLK) => RootfsError::NotOnDisk(dir.path().to_owned()),
            _ => error.into(),
        })?;
        read_ahead.set(0).map_err(&failed)?;
        // The host gets no devices and no setuid programs from an image; containers do, through their overlay.
        let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
        let root = context.mount(attributes)?;
        let device = File::open(mount::fd_path(&root)).and_then(|f| f.metadata()).map_err(&failed)?.dev();
        Ok(Self { root, device, read_ahead, server })
    }

    fn attach(
        self,
        dir: Arc<RunDir>,
        nids: Arc<[u64]>,
        hot: Option<Hot>,
        cold: Arc<ColdDevice>,
        runtime: &Handle,
    ) -> Result<RootFs, RootfsError> {
        let root = dir.path().join("root");
        let attached = std::fs::create_dir(&root).and_then(|()| mount::attach(&self.root, &root));
        let failed = RootfsError::io(dir.path());
        let mut rootfs = RootFs {
            root,
            attached: false,
            nids,
            device: self.device,
            hot,
            runtime: runtime.clone(),
            read_ahead: self.read_ahead,
            cold,
            _server: self.server,
            dir,
        };
        attached.map_err(failed)?;
        rootfs.attached = true;
        Ok(rootfs)
    }
}

/// A second handle of the zone file, if it is long enough: the kernel takes what is missing for zeros.
fn zone_of(hot: &HotPages<'_>) -> Result<File, RootfsError> {
    let failed = |source| RootfsError::Io { path: "zone file".into(), source };
    let found = hot.zone.metadata().map_err(failed)?.len();
    let wanted = hot.zone_pages * PAGE_SIZE as u64;
    if found < wanted {
        return Err(RootfsError::ShortZone { found, wanted });
    }
    hot.zone.try_clone().map_err(failed)
}
