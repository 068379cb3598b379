//! A group data zone on this node: one sparse file, page addresses as in the runtime image.
//!
//! ```text
//! STATE/zones/GROUP/lock              held for the moment of opening
//! STATE/zones/GROUP/0/segments        zone directory: what the data file may hold pages of
//!                     data            sparse; zone page n at byte n * 4096; never cut or punched while leased
//!                     presence        which pages are there
//!                     lock            held by the process that fetches, until its pages are durable
//! STATE/zones/GROUP/1/...             another lineage: segments that contradict those of 0
//! ```
//!
//! GROUP is [`group_key`], as a group may be named anything. Two segments at one address (a group recorded twice from
//! scratch, two registries with a group of one name) never share a data file: the second gets a lineage of its own.
//!
//! Opening picks the lineage, makes the zone directory durable before any page of a new segment can be present, and
//! takes a lease, a shared `flock` on the data file that lasts as long as any descriptor of it; whoever evicts must
//! hold it exclusively. After a reboot the frames this service needs are read back and hashed before they count.
//!
//! A [`Writer`] puts verified pages into the file. They are present for this process at once and for everyone, after
//! any crash, with the next commit, so a container starts without waiting for the disk. `pwrite` does the writing: a
//! full disk is an error, where a store into a mapping would be a signal.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tdfs_common::bitmap::PageBitmap;
use tdfs_common::digest::ContentHash;
use tdfs_common::envelope;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::{
    FRAME_PAGES, PlacedFrame, SEGMENTS_MAX, Segment, Service, ZoneDirectory, group_key,
};

use super::presence::replace;
use super::{Presence, RtpcError};

/// A group data zone, opened for one service.
#[derive(Debug)]
pub struct Zone {
    dir: PathBuf,
    data_path: PathBuf,
    data: File,
    presence: Presence,
    needed: PageBitmap,
}

/// The right to add pages to a zone, exclusive among all processes.
#[derive(Debug)]
pub struct Writer {
    zone: Arc<Zone>,
    _lock: File,
}

impl Zone {
    /// Opens the zone that holds the segments of `service`, a validated one, below the state directory.
    ///
    /// Blocks on the disk: after a reboot it reads every present page the service needs.
    pub fn open(state: &Path, service: &Service) -> Result<Self, RtpcError> {
        let group = state.join("zones").join(group_key(&service.group));
        fs::create_dir_all(&group).map_err(RtpcError::at(&group))?;
        let opening = exclusive(&group.join("lock"))?;
        let dir = lineage(&group, service)?;
        let data_path = dir.join("data");
        let data = open_or_create(&data_path)?;
        let at = || RtpcError::at(&data_path);
        data.lock_shared().map_err(at())?;
        let len = service.zone_pages() * PAGE_SIZE as u64;
        if data.metadata().map_err(at())?.len() < len {
            data.set_len(len).map_err(at())?;
        }
        let presence = Presence::open(&dir.join("presence"), service.zone_pages())?;
        drop(opening);
        let zone = Self { dir, data_path, data, presence, needed: service.needed() };
        if zone.presence.boot_changed() {
            zone.verify(&service.segments);
            zone.commit_if_idle()?;
        }
        Ok(zone)
    }

    /// The pages the service needs.
    pub fn needed(&self) -> &PageBitmap {
        &self.needed
    }

    /// The pages the service needs that are not here (FlacIO's rt_diff).
    pub fn missing(&self) -> PageBitmap {
        self.presence.missing(&self.needed)
    }

    /// The sparse file; zone page `n` lies at byte `n * 4096`. Only present pages mean anything.
    pub fn data_file(&self) -> &File {
        &self.data
    }

    /// The path of the sparse file.
    pub fn path(&self) -> &Path {
        &self.data_path
    }

    /// Asks the kernel to read the needed pages into its page cache, without waiting. Serving a mount from a file that
    /// is not resident is slow: the kernel's read-ahead does not follow scattered pages.
    pub fn prefetch(&self) {
        for run in self.needed.difference(&self.missing()).runs() {
            // The kernel cuts one request at 128 KiB.
            for start in run.clone().step_by(32) {
                let pages = (run.end - start).min(32);
                let (offset, len) = (start as i64 * PAGE_SIZE as i64, pages as i64 * PAGE_SIZE as i64);
                // Advice: where the file system cannot follow it, the pages are read later.
                let _ = posix_fadvise(&self.data, offset, len, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
            }
        }
    }

    /// Waits until no other process fetches into this zone, and learns what the last one brought. Blocks.
    pub fn writer(self: &Arc<Self>) -> Result<Writer, RtpcError> {
        let lock = exclusive(&self.dir.join("lock"))?;
        self.presence.reload()?;
        Ok(Writer { zone: self.clone(), _lock: lock })
    }

    /// Hashes the frames with needed pages that another boot left; what does not match is not present.
    fn verify(&self, segments: &[Segment]) {
        let suspects = self.presence.suspects();
        let frames: Vec<PlacedFrame> = segments
            .iter()
            .flat_map(Segment::placed)
            .filter(|f| suspects.intersects(f.pages.clone()) && self.needed.intersects(f.pages.clone()))
            .collect();
        let next = AtomicUsize::new(0);
        let check = || {
            let mut pages = vec![0; FRAME_PAGES as usize * PAGE_SIZE];
            while let Some(f) = frames.get(next.fetch_add(1, Ordering::Relaxed)) {
                let pages = &mut pages[..f.frame.pages as usize * PAGE_SIZE];
                let whole = f.pages.clone().all(|p| suspects.contains(p) || self.presence.contains(p));
                let read = self.data.read_exact_at(pages, f.pages.start * PAGE_SIZE as u64);
                if whole && read.is_ok() && ContentHash::of(pages) == f.frame.hash {
                    self.presence.insert(f.pages.clone());
                } else {
                    tracing::warn!(zone = %self.data_path.display(), pages = ?f.pages,
                        "pages did not survive the reboot; they are fetched again");
                    self.presence.remove(f.pages.clone());
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(check);
            }
            check();
        });
    }

    /// Writes down what was verified, unless another process is busy: it writes its own findings.
    fn commit_if_idle(&self) -> Result<(), RtpcError> {
        let path = self.dir.join("lock");
        let lock = open_or_create(&path)?;
        match lock.try_lock() {
            Ok(()) => {
                self.presence.reload()?;
                self.presence.commit(&self.data)
            }
            Err(fs::TryLockError::WouldBlock) => Ok(()),
            Err(fs::TryLockError::Error(e)) => Err(RtpcError::at(&path)(e)),
        }
    }
}

impl Writer {
    /// The pages the service needs that are not here.
    pub fn missing(&self) -> PageBitmap {
        self.zone.missing()
    }

    /// Writes verified `pages` from `zone_page` on and marks them present (FlacIO's rt_inject). Threads may share the
    /// writer.
    pub fn inject(&self, zone_page: u64, pages: &[u8]) -> Result<(), RtpcError> {
        let end = zone_page.saturating_add((pages.len() / PAGE_SIZE) as u64);
        if !pages.len().is_multiple_of(PAGE_SIZE) || end > self.zone.needed.len() {
            return Err(RtpcError::OutsideZone { path: self.zone.data_path.clone(), pages: zone_page..end });
        }
        let at = RtpcError::at(&self.zone.data_path);
        self.zone.data.write_all_at(pages, zone_page * PAGE_SIZE as u64).map_err(at)?;
        self.zone.presence.insert(zone_page..end);
        Ok(())
    }

    /// Makes the pages injected so far durable, then their presence. Blocks on the disk.
    pub fn commit(&self) -> Result<(), RtpcError> {
        self.zone.presence.commit(&self.zone.data)
    }
}

/// The directory of the lineage that agrees with the segments of `service` and shares most with it; made if there is
/// none. Afterwards its zone directory names all of them. The caller holds the lock of the group.
fn lineage(group: &Path, service: &Service) -> Result<PathBuf, RtpcError> {
    let mut next = 0;
    let mut best: Option<(usize, PathBuf, Vec<Segment>)> = None;
    for entry in fs::read_dir(group).map_err(RtpcError::at(group))? {
        let entry = entry.map_err(RtpcError::at(group))?;
        let Some(number) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        next = next.max(u64::from(number) + 1);
        let Some(known) = read_directory(&entry.path()) else { continue };
        let shared = service.segments.iter().filter(|s| known.contains(s)).count();
        if let Some(merged) = merge(known, &service.segments)
            && best.as_ref().is_none_or(|(most, ..)| shared > *most)
        {
            best = Some((shared, entry.path(), merged));
        }
    }
    if let Some((shared, dir, merged)) = best {
        if shared < service.segments.len() {
            write_directory(&dir, &service.group, merged)?;
        }
        return Ok(dir);
    }
    let dir = group.join(next.to_string());
    fs::create_dir(&dir).map_err(RtpcError::at(&dir))?;
    write_directory(&dir, &service.group, service.segments.clone())?;
    Ok(dir)
}

/// The segments of a lineage; `None`, with a warning, if it cannot be known what its pages are.
pub(super) fn read_directory(dir: &Path) -> Option<Vec<Segment>> {
    let path = dir.join("segments");
    let read = fs::read(&path).map_err(|e| e.to_string());
    match read.and_then(|bytes| envelope::decode::<ZoneDirectory>(&bytes).map_err(|e| e.to_string())) {
        Ok(directory) => Some(directory.segments),
        Err(reason) => {
            tracing::warn!(path = %path.display(), reason, "zone directory is damaged; its zone is not used");
            None
        }
    }
}

fn write_directory(dir: &Path, group: &str, segments: Vec<Segment>) -> Result<(), RtpcError> {
    let path = dir.join("segments");
    let bytes = envelope::encode(&ZoneDirectory { group: group.to_owned(), segments })
        .map_err(|source| RtpcError::Format { path: path.clone(), source })?;
    replace(&path, &bytes)
}

/// Both lists as one, or nothing if different segments claim the same zone pages.
fn merge(known: Vec<Segment>, wanted: &[Segment]) -> Option<Vec<Segment>> {
    let mut all = known;
    let new: Vec<Segment> = wanted.iter().filter(|s| !all.contains(s)).cloned().collect();
    all.extend(new);
    all.sort_by_key(|s| s.base);
    let disjoint = all.is_sorted_by(|a, b| a.zone_range().end <= b.base);
    (disjoint && all.len() <= SEGMENTS_MAX).then_some(all)
}

fn open_or_create(path: &Path) -> Result<File, RtpcError> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(RtpcError::at(path))
}

/// An exclusive lock on the file at `path`, until the file is closed.
fn exclusive(path: &Path) -> Result<File, RtpcError> {
    let file = open_or_create(path)?;
    file.lock().map_err(RtpcError::at(path))?;
    Ok(file)
}
