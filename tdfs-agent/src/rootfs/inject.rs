//! Injection: fills the kernel's page cache of a mount with exactly the hot pages, while the container is being made.
//!
//! A thread walks the runs in order of first use, asking for each piece by `posix_fadvise(WILLNEED)`. The mount's
//! read-ahead is 0 until it ends, so that nobody pulls in cold neighbours; then it goes up for everything else, and the
//! zone's own cached copy of the pages is dropped. Stopping early, or a page that cannot be read, costs time later and
//! nothing else.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use nix::sys::stat::Mode;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::Run;
use tdfs_common::tree::Tree;

use super::read_ahead::ReadAhead;

/// The kernel silently cuts WILLNEED to this many pages (its default read-ahead, 128 KiB).
const WILLNEED_PAGES: u32 = 32;
/// Read-ahead once the hot pages are in, KiB: the kernel's default.
const READ_AHEAD_AFTER: u32 = 128;
/// Files kept open at a time; runs come back to a file often.
const OPEN_FILES: usize = 400;

/// A running injection. Dropping it stops it and waits for it, which takes no longer than one read of the zone.
pub struct Injector {
    state: Arc<State>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Default)]
struct State {
    stop: AtomicBool,
    pages: AtomicU64,
}

impl Injector {
    /// Starts to inject `runs`, in this order, into the mount of `tree` at `root`.
    pub(super) fn start(
        root: BorrowedFd<'_>,
        zone: BorrowedFd<'_>,
        tree: Arc<Tree>,
        runs: Arc<[Run]>,
        read_ahead: ReadAhead,
    ) -> io::Result<Self> {
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        let (root, zone) = (root.as_raw_fd(), zone.as_raw_fd());
        let (ready, unshared) = mpsc::sync_channel(1);
        let run = move || {
            // Our own descriptor table without /dev/fuse: if the process is killed while this thread waits for the
            // cold device, the device's last descriptor must still close, or both wait for each other for ever.
            let own_table = keep_only([root, zone]);
            let failed = own_table.is_err();
            let _ = ready.send(own_table);
            if failed {
                return Ok(());
            }
            // SAFETY: both are open in this thread's own table, and nothing else in this thread knows of them.
            let (root, zone) = unsafe { (OwnedFd::from_raw_fd(root), OwnedFd::from_raw_fd(zone)) };
            advise_zone(&zone, &runs, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
            let injected = inject(&root, &tree, &runs, &shared);
            read_ahead.set(READ_AHEAD_AFTER)?;
            injected?;
            advise_zone(&zone, &runs, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        };
        let thread = std::thread::Builder::new().name("tdfs-inject".into()).spawn(run)?;
        // The caller's descriptors must stay open until the thread has its own.
        unshared.recv().map_err(io::Error::other)??;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Pages asked for so far.
    pub fn pages(&self) -> u64 {
        self.state.pages.load(Ordering::Relaxed)
    }

    /// Waits for the end and returns the pages.
    pub fn join(mut self) -> io::Result<u64> {
        self.finish()?;
        Ok(self.pages())
    }

    fn finish(&mut self) -> io::Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(done)) => done,
            Some(Err(_)) => Err(io::Error::other("the injection thread panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        if let Err(error) = self.finish() {
            tracing::warn!(%error, "injection ended early");
        }
    }
}

fn inject(root: &OwnedFd, tree: &Tree, runs: &[Run], state: &State) -> io::Result<()> {
    let paths = tree.paths();
    let mut files: HashMap<u32, OwnedFd> = HashMap::new();
    for run in runs {
        if !files.contains_key(&run.ino) {
            if files.len() == OPEN_FILES {
                files.clear();
            }
            let path = Path::new(OsStr::from_bytes(&paths[run.ino as usize]));
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            files.insert(run.ino, nix::fcntl::openat(root, path, flags, Mode::empty())?);
        }
        let file = &files[&run.ino];
        let mut done = 0;
        while done < run.count {
            if state.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let pages = (run.count - done).min(WILLNEED_PAGES);
            advise(file, run.file_page + done, pages, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
            done += pages;
            state.pages.fetch_add(pages.into(), Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Advises on the zone pages of all runs, in ascending order: a zone that is not resident is read in once, in
/// sequence, since reading it through the mount in order of first use would seek for every page.
fn advise_zone(zone: &OwnedFd, runs: &[Run], advice: PosixFadviseAdvice) -> io::Result<()> {
    let mut spans: Vec<(u32, u32)> = runs.iter().map(|r| (r.zone_page, r.zone_page + r.count)).collect();
    spans.sort_unstable();
    spans.dedup_by(|next, span| {
        let joins = next.0 <= span.1;
        if joins {
            span.1 = span.1.max(next.1);
        }
        joins
    });
    for (mut at, end) in spans {
        while at < end {
            let pages = (end - at).min(WILLNEED_PAGES);
            advise(zone, at, pages, advice)?;
            at += pages;
        }
    }
    Ok(())
}

fn advise(file: &OwnedFd, page: u32, pages: u32, advice: PosixFadviseAdvice) -> io::Result<()> {
    let bytes = |pages: u32| i64::from(pages) * PAGE_SIZE as i64;
    Ok(posix_fadvise(file, bytes(page), bytes(pages), advice)?)
}

/// Gives this thread a descriptor table of its own that holds, besides standard streams, only `keep` (kernel 5.9).
fn keep_only(mut keep: [RawFd; 2]) -> io::Result<()> {
    keep.sort_unstable();
    let mut from: libc::c_uint = 3;
    for to in keep.iter().map(|fd| *fd as libc::c_uint).chain([libc::c_uint::MAX]) {
        let last = if to == libc::c_uint::MAX { to } else { to.wrapping_sub(1) };
        if from <= last {
            // SAFETY: only this thread's new table changes; nothing in this thread uses what is closed.
            let done = unsafe { libc::syscall(libc::SYS_close_range, from, last, libc::CLOSE_RANGE_UNSHARE) };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        from = to.saturating_add(1).max(3);
    }
    Ok(())
}
