//! Hot pages that were under way when the image was mounted.
//!
//! ```text
//! kernel -> cold device --within--> pages of the zone --wait--> Arrivals --read--> zone file
//! ```
//!
//! What had arrived by then lies behind the zone device of the mount and never comes here. A read of the others waits
//! for [`Arrivals`], without holding memory or a thread, and fails with their errno if the fetch has failed.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tdfs_common::bitmap::PageBitmap;
use tdfs_common::page::{self, PAGE_SIZE};
use tdfs_common::runtime_image::Run;

use super::RootfsError;
use crate::fetch::Arrivals;

/// How long reads waited for awaited pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitStats {
    /// Pages of the reads that had to wait.
    pub waited_pages: u64,
    /// These reads.
    pub waited_requests: u64,
    /// How long, all of them together.
    pub waited: Duration,
}

/// A read that had to wait.
#[derive(Clone, Copy, Debug)]
pub struct Waited {
    /// Since when.
    pub begin: Instant,
    /// How long.
    pub took: Duration,
    /// Pages of the read that were awaited in the beginning.
    pub pages: u64,
}

/// The awaited pages of a mount.
#[derive(Debug)]
pub struct Awaited {
    /// By file and page.
    runs: Vec<Run>,
    zone: Arc<File>,
    arrivals: Arc<Arrivals>,
    pages: AtomicU64,
    requests: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Awaited {
    /// The parts of `runs`, which are by file and page, that have arrived in the `zone`, and the others.
    pub fn split(
        runs: &[Run],
        arrivals: &Arc<Arrivals>,
        zone: &File,
    ) -> Result<(Vec<Run>, Self), RootfsError> {
        let (present, runs) = split(runs, &arrivals.awaited());
        let zone = zone.try_clone().map_err(RootfsError::io("zone file".as_ref()))?;
        let (pages, requests, nanoseconds) = Default::default();
        let awaited =
            Self { runs, zone: Arc::new(zone), arrivals: Arc::clone(arrivals), pages, requests, nanoseconds };
        Ok((present, awaited))
    }

    /// The awaited parts of `bytes` of a file, and where in the zone file each lies.
    pub fn within(&self, ino: u32, bytes: Range<u64>) -> impl Iterator<Item = (Range<u64>, u64)> {
        let start = |r: &Run| u64::from(r.file_page) * PAGE_SIZE as u64;
        let end = move |r: &Run| start(r) + u64::from(r.count) * PAGE_SIZE as u64;
        let first = self.runs.partition_point(|r| (r.ino, end(r)) <= (ino, bytes.start));
        let here = self.runs[first..].iter().take_while(move |r| r.ino == ino && start(r) < bytes.end);
        here.map(move |run| {
            let part = bytes.start.max(start(run))..bytes.end.min(end(run));
            let offset = u64::from(run.zone_page) * PAGE_SIZE as u64 + (part.start - start(run));
            (part, offset)
        })
    }

    /// Waits until all `parts` of the zone file are there; `None` where they were.
    pub async fn wait(&self, parts: impl Iterator<Item = Range<u64>>) -> (Option<Waited>, Result<(), i32>) {
        let pages: Vec<_> = parts.map(|p| p.start / PAGE_SIZE as u64..page::count(p.end)).collect();
        if !pages.iter().any(|p| self.arrivals.awaits(p.clone())) {
            return (None, Ok(()));
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        let count = pages.iter().map(|p| p.end - p.start).sum();
        self.pages.fetch_add(count, Ordering::Relaxed);
        let begin = Instant::now();
        let arrived = self.arrivals.wait(&pages).await;
        let took = begin.elapsed();
        self.nanoseconds.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        (Some(Waited { begin, took, pages: count }), arrived)
    }

    /// Fills `bytes` with what lies at `offset` of the zone file, which must have arrived.
    pub async fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), i32> {
        if read_cached(&self.zone, bytes, offset) {
            return Ok(());
        }
        let (zone, mut read) = (Arc::clone(&self.zone), vec![0; bytes.len()]);
        let reading =
            tokio::task::spawn_blocking(move || zone.read_exact_at(&mut read, offset).map(|()| read));
        let read = reading.await.map_err(|_| libc::EIO)?;
        bytes.copy_from_slice(&read.map_err(|e: io::Error| e.raw_os_error().unwrap_or(libc::EIO))?);
        Ok(())
    }

    /// What was waited for so far.
    pub fn stats(&self) -> WaitStats {
        WaitStats {
            waited_pages: self.pages.load(Ordering::Relaxed),
            waited_requests: self.requests.load(Ordering::Relaxed),
            waited: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)),
        }
    }
}

/// Fills `bytes` if that needs no disk: a page that has just arrived lies in the page cache.
fn read_cached(file: &File, bytes: &mut [u8], offset: u64) -> bool {
    let part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: the kernel writes at most `iov_len` bytes to `bytes`, which is borrowed mutably.
    let got = unsafe {
        libc::preadv2(file.as_raw_fd(), &raw const part, 1, offset as libc::off_t, libc::RWF_NOWAIT)
    };
    got == bytes.len() as isize
}

/// The parts of `runs`, in their order, without a page of `awaited`, and with only such.
fn split(runs: &[Run], awaited: &PageBitmap) -> (Vec<Run>, Vec<Run>) {
    let (mut present, mut missing) = (Vec::with_capacity(runs.len()), Vec::new());
    for run in runs {
        let mut done = 0;
        while done < run.count {
            let is_awaited = |n: u32| awaited.contains(u64::from(run.zone_page + n));
            let first = is_awaited(done);
            let end = (done + 1..run.count).find(|n| is_awaited(*n) != first).unwrap_or(run.count);
            let part = Run {
                ino: run.ino,
                file_page: run.file_page + done,
                zone_page: run.zone_page + done,
                count: end - done,
            };
            if first {
                missing.push(part);
            } else {
                present.push(part);
            }
            done = end;
        }
    }
    (present, missing)
}
