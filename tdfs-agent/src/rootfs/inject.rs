//! Injection: fills the kernel's page cache of a mount with exactly the hot pages, while the container is being made.
//!
//! A thread walks the runs in order of first use, a window of them at a time, asking for each piece by
//! `posix_fadvise(WILLNEED)`. Within a window it goes by file and page: programs touch neighbours in any order, and
//! together they are one read instead of many. The mount's read-ahead is 0 until it ends, so that nobody pulls in cold
//! neighbours; then it goes up for everything else, and the zone's own cached copy of the pages is dropped. Stopping
//! early, or a page that cannot be read, costs time later and nothing else.
//!
//! Pages that are still under way are injected as they arrive, a few milliseconds' worth at a time. Never before: the
//! answer to this thread must not depend on a network.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use nix::sys::stat::Mode;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::Run;
use tdfs_common::tree::Tree;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::read_ahead::ReadAhead;
use crate::fetch::Arrivals;

/// The kernel silently cuts WILLNEED to this many pages (its default read-ahead, 128 KiB).
const WILLNEED_PAGES: u32 = 32;
/// Pages whose order of first use is given up for larger pieces: a few milliseconds of injection.
const WINDOW_PAGES: u32 = 1024;
/// For how long arriving pages are gathered: frames are smaller than what neighbours in a file are spread over.
const GATHER: Duration = Duration::from_millis(5);
/// Pages that may be under way to the page cache: where the kernel reads in the background (`directio`, see the parent
/// module), a page that somebody needs now queues behind them. About a millisecond.
const IN_FLIGHT_PAGES: u32 = 256;
/// Read-ahead once the hot pages are in, KiB: the kernel's default. An evicted page comes back with its neighbours: cold
/// ones among them are read too, and where one folio holds both, it fails with them.
pub(super) const READ_AHEAD: u32 = 128;
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
    stopped: Notify,
    pages: AtomicU64,
}

impl Injector {
    /// Starts to inject `runs`, in this order, into the mount at `root`, or as they arrive.
    pub(super) fn start(
        root: BorrowedFd<'_>,
        zone: BorrowedFd<'_>,
        paths: HotPaths,
        runs: Arc<[Run]>,
        arriving: Option<(Arc<Arrivals>, Handle)>,
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
            let mut files = Files { root, paths: paths.by_inode(&runs), open: HashMap::new() };
            let injected = match &arriving {
                None => advise_zone(&zone, &runs, PosixFadviseAdvice::POSIX_FADV_WILLNEED)
                    .and_then(|()| inject(&mut files, &runs, &shared)),
                Some((arrivals, runtime)) => inject_arriving(&mut files, &runs, arrivals, runtime, &shared),
            };
            if arriving.is_some_and(|(arrivals, _)| arrivals.awaited().count() > 0) {
                // With read-ahead, a page that cannot be read would take its neighbours along.
                return injected;
            }
            read_ahead.set(READ_AHEAD)?;
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
        self.state.stopped.notify_one();
        if let Err(error) = self.finish() {
            tracing::warn!(%error, "injection ended early");
        }
    }
}

/// Where the hot files are.
#[derive(Clone)]
pub(super) enum HotPaths {
    /// In this tree.
    In(Arc<Tree>),
    /// By inode.
    Known(Arc<HashMap<u32, Vec<u8>>>),
}

impl HotPaths {
    /// By inode, at least those of `runs`.
    fn by_inode(self, runs: &[Run]) -> Arc<HashMap<u32, Vec<u8>>> {
        match self {
            Self::In(tree) => Arc::new(hot_paths(&tree, runs)),
            Self::Known(paths) => paths,
        }
    }
}

/// The paths of the files of `runs`, by inode.
pub(super) fn hot_paths(tree: &Tree, runs: &[Run]) -> HashMap<u32, Vec<u8>> {
    let mut paths = tree.paths();
    runs.iter()
        .map(|run| run.ino)
        .collect::<HashSet<_>>()
        .into_iter()
        .map(|ino| (ino, std::mem::take(&mut paths[ino as usize])))
        .collect()
}

/// The hot files, opened on the mount when they are needed.
struct Files {
    root: OwnedFd,
    paths: Arc<HashMap<u32, Vec<u8>>>,
    open: HashMap<u32, OwnedFd>,
}

impl Files {
    fn open(&mut self, ino: u32) -> io::Result<&OwnedFd> {
        if self.open.len() == OPEN_FILES && !self.open.contains_key(&ino) {
            self.open.clear();
        }
        match self.open.entry(ino) {
            Entry::Occupied(file) => Ok(file.into_mut()),
            Entry::Vacant(place) => {
                let path = self.paths.get(&ino).ok_or(io::ErrorKind::NotFound)?;
                let path = Path::new(OsStr::from_bytes(path));
                let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                Ok(place.insert(nix::fcntl::openat(&self.root, path, flags, Mode::empty())?))
            }
        }
    }
}

/// Consecutive pages of a file that the kernel takes in one request.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    ino: u32,
    page: u32,
    count: u32,
}

/// The pages of `runs`, which are a window, by file and page.
fn pieces(runs: &[Run]) -> Vec<Piece> {
    let mut runs: Vec<_> =
        runs.iter().map(|r| Piece { ino: r.ino, page: r.file_page, count: r.count }).collect();
    runs.sort_unstable_by_key(|r| (r.ino, r.page));
    runs.dedup_by(|next, piece| {
        let goes_on = next.ino == piece.ino && next.page == piece.page + piece.count;
        if goes_on {
            piece.count += next.count;
        }
        goes_on
    });
    let cut = |run: &Piece| {
        let (ino, page, count) = (run.ino, run.page, run.count);
        let part =
            move |done: u32| Piece { ino, page: page + done, count: (count - done).min(WILLNEED_PAGES) };
        (0..count).step_by(WILLNEED_PAGES as usize).map(part)
    };
    runs.iter().flat_map(cut).collect()
}

/// `runs` in windows of [`WINDOW_PAGES`], or more where a run is longer.
fn windows(runs: &[Run]) -> impl Iterator<Item = &[Run]> {
    let mut pages = 0;
    runs.chunk_by(move |run, _| {
        pages = if pages < WINDOW_PAGES { pages + run.count } else { run.count };
        pages < WINDOW_PAGES
    })
}

/// Returns when all of them are in, except after a stop.
fn inject(files: &mut Files, runs: &[Run], state: &State) -> io::Result<()> {
    let mut in_flight = 0;
    let mut pieces = windows(runs).flat_map(pieces).peekable();
    while let Some(piece) = pieces.next().filter(|_| !state.stop.load(Ordering::Relaxed)) {
        let file = files.open(piece.ino)?;
        advise(file, piece.page, piece.count, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
        in_flight += piece.count;
        if in_flight >= IN_FLIGHT_PAGES || pieces.peek().is_none() {
            wait_for(file, piece.page + piece.count - 1);
            in_flight = 0;
        }
        state.pages.fetch_add(piece.count.into(), Ordering::Relaxed);
    }
    Ok(())
}

/// Until a page is in: requests are answered in their order, so those before are too. A page that cannot be read is
/// its reader's concern.
fn wait_for(file: &OwnedFd, page: u32) {
    let _ = nix::sys::uio::pread(file, &mut [0], i64::from(page) * PAGE_SIZE as i64);
}

/// Injects what is there, again and again until nothing more will arrive.
fn inject_arriving(
    files: &mut Files,
    runs: &[Run],
    arrivals: &Arrivals,
    runtime: &Handle,
    state: &State,
) -> io::Result<()> {
    let mut left = runs.to_vec();
    let mut news = arrivals.news();
    loop {
        let over = news.borrow_and_update().over;
        let awaited = arrivals.awaited();
        let arrived =
            |run: &Run| !(run.zone_page..run.zone_page + run.count).any(|page| awaited.contains(page.into()));
        let there: Vec<Run> = left.extract_if(.., |run| arrived(run)).collect();
        inject(files, &there, state)?;
        if left.is_empty() || over || state.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        // Not by a timer of the runtime, which this thread could not wake: it lacks the runtime's descriptors.
        std::thread::sleep(GATHER);
        runtime.block_on(async {
            tokio::select! {
                // It fails only without a sender, and we hold one.
                _ = news.changed() => {}
                () = state.stopped.notified() => {}
            }
        });
    }
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Runs that share no page of a file, in some order.
    fn runs() -> impl Strategy<Value = Vec<Run>> {
        let sizes = prop::collection::vec((0u32..4, 0u32..3, 1u32..700), 0..40);
        sizes
            .prop_map(|sizes| {
                let mut ends = [0; 4];
                let run = |(ino, gap, count): (u32, u32, u32)| {
                    let end = &mut ends[ino as usize];
                    let file_page = *end + gap;
                    *end = file_page + count;
                    Run { ino, file_page, zone_page: 0, count }
                };
                sizes.into_iter().map(run).collect()
            })
            .prop_shuffle()
    }

    fn pages_of(pieces: &[Piece]) -> Vec<(u32, u32)> {
        pieces.iter().flat_map(|p| (p.page..p.page + p.count).map(|page| (p.ino, page))).collect()
    }

    proptest! {
        #[test]
        fn pieces_of_a_window_are_its_pages_once_in_as_few_requests_as_the_kernel_takes(runs in runs()) {
            let mut joined = Vec::new();
            for window in windows(&runs) {
                joined.extend_from_slice(window);
                let before_last: u32 = window[..window.len() - 1].iter().map(|r| r.count).sum();
                prop_assert!(before_last < WINDOW_PAGES);

                let pieces = pieces(window);
                let mut pages: Vec<(u32, u32)> = window
                    .iter()
                    .flat_map(|r| (r.file_page..r.file_page + r.count).map(|page| (r.ino, page)))
                    .collect();
                pages.sort_unstable();
                prop_assert_eq!(pages_of(&pieces), &pages[..]);
                prop_assert!(pieces.iter().all(|p| p.count > 0 && p.count <= WILLNEED_PAGES));

                let mut spans: BTreeMap<(u32, u32), u32> = BTreeMap::new();
                for (n, (ino, page)) in pages.iter().enumerate() {
                    let goes_on = n > 0 && pages[n - 1] == (*ino, page.wrapping_sub(1));
                    match spans.last_entry().filter(|_| goes_on) {
                        Some(mut span) => *span.get_mut() += 1,
                        None => {
                            spans.insert((*ino, *page), 1);
                        }
                    }
                }
                let fewest: u32 = spans.values().map(|len| len.div_ceil(WILLNEED_PAGES)).sum();
                prop_assert_eq!(pieces.len(), fewest as usize);
            }
            let places = |runs: &[Run]| -> Vec<_> { runs.iter().map(|r| (r.ino, r.file_page, r.count)).collect() };
            prop_assert_eq!(places(&joined), places(&runs));
        }
    }
}
