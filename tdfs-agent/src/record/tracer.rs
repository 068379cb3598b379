//! The tracer: loads the probe, attaches it by the best means the kernel has, and collects its events.
//!
//! ```text
//!  probe --ring buffer--> thread --pages--> memory, until finish()
//!                            `-----notices-> ready(): LISTEN, exec, user probe, pages of the watched inode
//! ```
//!
//! The thread sleeps in poll(2): the probe wakes it when a quarter of the ring is unread or something happened that
//! somebody waits for. What does not fit the ring is counted by the probe; `finish` adds what the kernel skipped
//! because a program was already running on the CPU. A crash leaves nothing behind: programs and maps go with their
//! file descriptors.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use aya::maps::{Array, MapData, PerCpuArray, RingBuf};
use aya::programs::uprobe::{UProbeAttachLocation, UProbeScope};
use aya::programs::{BtfTracePoint, TracePoint, UProbe};
use aya::{Btf, Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tdfs_common::abi::{CHUNK_PAGES, Control, Event, ExecEvent, Kind, Loss};
use tdfs_common::trace::Method;
use tokio::sync::mpsc;

use super::offsets::{self, Offsets};

static PROBE: &[u8] = aya::include_bytes_aligned!("../../../tdfs-ebpf/prebuilt/tdfs-ebpf.o");

/// Most bitmaps of the probe: with 512 pages each, 128 GiB of touched files.
const CHUNKS_MAX: u64 = 1 << 16;
/// Default size of the ring buffer, bytes: 200,000 page events.
pub const RING_BYTES: u32 = 8 << 20;

/// Why there is no tracer, or no more events.
#[derive(Debug, thiserror::Error)]
pub enum TracerError {
    /// The kernel does not say where a field lies.
    #[error("{}: {what} is missing", place.display())]
    Offset {
        /// The field or type.
        what: String,
        /// Where it was looked for.
        place: PathBuf,
    },
    /// tracefs is needed for classic tracepoints.
    #[error("cannot mount tracefs: {0}")]
    Tracefs(io::Error),
    /// The kernel refused the probe.
    #[error("cannot {what} the probe: {reason}")]
    Probe {
        /// What was tried.
        what: &'static str,
        /// The kernel's and aya's reasons, innermost last.
        reason: String,
    },
    /// A system call of the tracer failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The collecting thread is gone.
    #[error("the tracer stopped early")]
    Stopped,
}

/// `error` with all its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

fn probe_error<E: std::error::Error + 'static>(what: &'static str) -> impl Fn(E) -> TracerError {
    move |e| TracerError::Probe { what, reason: chain(&e) }
}

fn io_error<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> TracerError {
    move |e| TracerError::Io { what, source: e.into() }
}

/// CLOCK_MONOTONIC, nanoseconds: the clock of the probe's time stamps.
pub fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is live; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What to trace.
#[derive(Clone, Debug)]
pub struct TracerOptions {
    /// Device of the private mount (major, minor).
    pub device: (u32, u32),
    /// How many bitmaps the probe may need at most.
    pub chunks: u64,
    /// Size of the ring buffer, bytes: a power of two, at least a page.
    pub ring_bytes: u32,
    /// Only this method instead of the best that works.
    pub method: Option<Method>,
}

impl TracerOptions {
    /// For a file system on `device` with inodes of `sizes` (bytes); directories count, their size may be 0
    /// unless they have more than 512 pages, for which there is some room.
    pub fn new(device: (u32, u32), sizes: impl Iterator<Item = u64>) -> Self {
        let chunks =
            sizes.map(|s| tdfs_common::page::count(s).div_ceil(CHUNK_PAGES).max(1)).sum::<u64>() + 64;
        Self { device, chunks, ring_bytes: RING_BYTES, method: None }
    }
}

/// An event that may make a service ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub ktime: u64,
    /// Process, as the initial pid namespace numbers it.
    pub tgid: u32,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A process of the watched namespace listens on this port.
    Listen(u16),
    /// A process of the watched namespace executed a program: its path, and the interpreter of a script.
    Exec(Vec<u8>, Vec<u8>),
    /// The user-space probe was reached.
    Uprobe,
    /// A page of the watched inode was read for the first time.
    Page,
}

/// What the probe saw.
#[derive(Clone, Debug, Default)]
pub struct Events {
    /// [`Kind::Added`], [`Kind::Used`] and [`Kind::Removed`], in no particular order.
    pub pages: Vec<Event>,
    /// Events that could not be delivered.
    pub lost: u64,
    /// The probe's own words.
    pub diagnostics: Vec<String>,
}

/// A loaded and attached probe.
pub struct Tracer {
    ebpf: Ebpf,
    method: Method,
    control: Array<MapData, u64>,
    watched: Arc<AtomicU64>,
    notices: mpsc::UnboundedReceiver<Notice>,
    /// The thread ends when this closes, after the programs above are gone.
    _stop: OwnedFd,
    thread: Option<JoinHandle<(Vec<Event>, Vec<String>)>>,
}

impl Tracer {
    /// Loads the probe and attaches it: BTF-typed tracepoints, else classic ones.
    pub fn attach(options: &TracerOptions) -> Result<Self, TracerError> {
        match options.method {
            Some(Method::TpBtf) => Self::typed(options),
            Some(Method::Tracepoint) => Self::classic(options),
            Some(Method::Residency) => {
                Err(TracerError::Probe { what: "attach", reason: "not asked for".into() })
            }
            None => Self::typed(options).or_else(|typed| {
                tracing::debug!("no BTF-typed tracepoints: {typed}");
                Self::classic(options)
            }),
        }
    }

    fn typed(options: &TracerOptions) -> Result<Self, TracerError> {
        let offsets = offsets::typed()?;
        let btf = Btf::from_sys_fs().map_err(probe_error("load"))?;
        let mut tracer = Self::load(options, &offsets, Method::TpBtf)?;
        for (program, tracepoint, needed) in [
            ("page_added", "mm_filemap_add_to_page_cache", true),
            ("page_removed", "mm_filemap_delete_from_page_cache", true),
            ("page_read", "mm_filemap_get_pages", false),
            ("page_fault", "mm_filemap_fault", false),
            ("socket_state", "inet_sock_set_state", true),
            ("program_executed", "sched_process_exec", true),
        ] {
            let program: &mut BtfTracePoint = tracer.program(program)?;
            let attached = program.load(tracepoint, &btf).and_then(|()| program.attach().map(|_| ()));
            optional(attached.map_err(probe_error("attach")), needed)?;
        }
        Ok(tracer)
    }

    fn classic(options: &TracerOptions) -> Result<Self, TracerError> {
        let offsets = offsets::classic()?;
        let mut tracer = Self::load(options, &offsets, Method::Tracepoint)?;
        for (program, category, name, needed) in [
            ("classic_page_added", "filemap", "mm_filemap_add_to_page_cache", true),
            ("classic_page_removed", "filemap", "mm_filemap_delete_from_page_cache", true),
            ("classic_page_read", "filemap", "mm_filemap_get_pages", false),
            ("classic_page_fault", "filemap", "mm_filemap_fault", false),
            ("classic_socket_state", "sock", "inet_sock_set_state", true),
            ("classic_program_executed", "sched", "sched_process_exec", true),
        ] {
            let program: &mut TracePoint = tracer.program(program)?;
            let attached = program.load().and_then(|()| program.attach(category, name).map(|_| ()));
            optional(attached.map_err(probe_error("attach")), needed)?;
        }
        Ok(tracer)
    }

    /// A probe without page events, for [`Tracer::attach_uprobe`] alone.
    pub fn uprobe_only() -> Result<Self, TracerError> {
        let options = TracerOptions { device: (0, 0), chunks: 1, ring_bytes: 1 << 12, method: None };
        Self::load(&options, &[0; _], Method::Residency)
    }

    fn load(options: &TracerOptions, offsets: &Offsets, method: Method) -> Result<Self, TracerError> {
        let device = options.device.0 << 20 | options.device.1;
        // Not for less than a page of events.
        let wake = u64::from(options.ring_bytes / 4).max(4096);
        let mut loader = EbpfLoader::new();
        loader.override_global("DEVICE", &device, true).override_global("WAKE_BYTES", &wake, true);
        loader.override_global("OFFSETS", offsets.as_slice(), true);
        loader.map_max_entries("PAGES", options.chunks.clamp(1, CHUNKS_MAX) as u32);
        loader.map_max_entries("EVENTS", options.ring_bytes);
        let mut ebpf = loader.load(PROBE).map_err(probe_error("load"))?;
        let ring = ebpf.take_map("EVENTS").ok_or(TracerError::Stopped)?;
        let ring = RingBuf::try_from(ring).map_err(probe_error("load"))?;
        let control = ebpf.take_map("CONTROL").ok_or(TracerError::Stopped)?;
        let control = Array::try_from(control).map_err(probe_error("load"))?;
        let diagnostics = Diagnostics::default();
        let logger =
            EbpfLogger::init_with_logger(&mut ebpf, diagnostics.clone()).map_err(probe_error("load"))?;
        let (send, notices) = mpsc::unbounded_channel();
        let (stopped, stop) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(io_error("pipe"))?;
        let watched = Arc::new(AtomicU64::new(u64::MAX));
        let watch = Arc::clone(&watched);
        let thread = std::thread::Builder::new()
            .name("tracer".into())
            .spawn(move || {
                let pages = collect(ring, logger, &stopped, &watch, &send);
                (pages, diagnostics.take())
            })
            .map_err(io_error("thread"))?;
        Ok(Self { ebpf, method, control, watched, notices, _stop: stop, thread: Some(thread) })
    }

    fn program<'a, P>(&'a mut self, name: &str) -> Result<&'a mut P, TracerError>
    where
        &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
    {
        let program = self.ebpf.program_mut(name).ok_or(TracerError::Stopped)?;
        program.try_into().map_err(probe_error("load"))
    }

    /// By what means pages are observed.
    pub fn method(&self) -> Method {
        self.method
    }

    /// From now on LISTEN and exec events of the pid namespace of process `pid` are noticed.
    pub fn watch_namespace_of(&mut self, pid: i32) -> Result<(), TracerError> {
        let namespace = fs::metadata(format!("/proc/{pid}/ns/pid")).map_err(io_error("pid namespace"))?;
        let (major, minor) = (nix::sys::stat::major(namespace.dev()), nix::sys::stat::minor(namespace.dev()));
        self.set(Control::PidnsDev, major << 20 | minor)?;
        self.set(Control::PidnsIno, namespace.ino())
    }

    /// From now on pages of inode `ino` are noticed.
    pub fn watch_inode(&mut self, ino: u64) -> Result<(), TracerError> {
        self.watched.store(ino, Ordering::Relaxed);
        self.set(Control::WatchIno, ino)
    }

    fn set(&mut self, slot: Control, value: u64) -> Result<(), TracerError> {
        self.control.set(slot as u32, value, 0).map_err(probe_error("control"))
    }

    /// From now on the execution of the instruction at `offset` (bytes) of the file at `path` is noticed.
    pub fn attach_uprobe(&mut self, path: &Path, offset: u64) -> Result<(), TracerError> {
        let program: &mut UProbe = self.program("user_probe")?;
        program.load().map_err(probe_error("load"))?;
        let at = UProbeAttachLocation::AbsoluteOffset(offset);
        program.attach(at, path, UProbeScope::AllProcesses).map_err(probe_error("attach"))?;
        Ok(())
    }

    /// Waits for the first notice that `matches` accepts.
    pub async fn notice(&mut self, mut matches: impl FnMut(&Notice) -> bool) -> Result<Notice, TracerError> {
        loop {
            let notice = self.notices.recv().await.ok_or(TracerError::Stopped)?;
            if matches(&notice) {
                return Ok(notice);
            }
        }
    }

    /// Detaches the probe and returns everything it saw.
    pub fn finish(mut self) -> Result<Events, TracerError> {
        let skipped: u64 =
            self.ebpf.programs().map(|(_, p)| p.fd().map_or(0, |fd| misses(fd.as_fd().as_raw_fd()))).sum();
        let lost = self.lost()?;
        let thread = self.thread.take().ok_or(TracerError::Stopped)?;
        // Detaches: no event comes after the last drain.
        drop(self);
        let (pages, diagnostics) = thread.join().map_err(|_| TracerError::Stopped)?;
        Ok(Events { pages, lost: lost + skipped, diagnostics })
    }

    fn lost(&self) -> Result<u64, TracerError> {
        let map = self.ebpf.map("LOST").ok_or(TracerError::Stopped)?;
        let counters: PerCpuArray<_, u64> = PerCpuArray::try_from(map).map_err(probe_error("read"))?;
        let mut lost = 0;
        for slot in 0..Loss::COUNT {
            lost += counters.get(&slot, 0).map_err(probe_error("read"))?.iter().sum::<u64>();
        }
        Ok(lost)
    }
}

/// An optional program may fail to attach: the kernel is too old for its tracepoint.
fn optional(attached: Result<(), TracerError>, needed: bool) -> Result<(), TracerError> {
    match attached {
        Err(e) if !needed => {
            tracing::debug!("{e}");
            Ok(())
        }
        attached => attached,
    }
}

/// Runs of a program that the kernel skipped (`recursion_misses` in fdinfo, Linux 5.12).
fn misses(program: i32) -> u64 {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{program}")).unwrap_or_default();
    let line = info.lines().find_map(|l| l.strip_prefix("recursion_misses:"));
    line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// Keeps what the probe says about itself, and passes it on.
#[derive(Clone, Default)]
struct Diagnostics(Arc<Mutex<Vec<String>>>);

impl Diagnostics {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl log::Log for Diagnostics {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args().to_string();
        tracing::warn!("probe: {text}");
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    fn flush(&self) {}
}

/// Drains the ring until the other end of `stopped` is closed; the page events.
fn collect(
    mut ring: RingBuf<MapData>,
    mut logger: EbpfLogger<Diagnostics>,
    stopped: &OwnedFd,
    watched: &AtomicU64,
    notices: &mpsc::UnboundedSender<Notice>,
) -> Vec<Event> {
    let mut pages = Vec::new();
    loop {
        let stop = {
            let wait = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = [wait(stopped.as_fd()), wait(ring.as_fd()), wait(logger.as_fd())];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => fds[0].any().unwrap_or(true),
                Err(Errno::EINTR) => false,
                Err(e) => {
                    tracing::error!("tracer: poll: {e}");
                    true
                }
            }
        };
        while let Some(record) = ring.next() {
            let Some(event) = Event::parse(&record) else { continue };
            let what = match Kind::from_u32(event.kind) {
                Some(Kind::Removed) => {
                    pages.push(event);
                    continue;
                }
                Some(Kind::Added | Kind::Used) => {
                    pages.push(event);
                    if event.ino != watched.load(Ordering::Relaxed) {
                        continue;
                    }
                    What::Page
                }
                Some(Kind::Listen) => What::Listen(event.index as u16),
                Some(Kind::Uprobe) => What::Uprobe,
                Some(Kind::Exec) => {
                    let Some([filename, interp]) = ExecEvent::paths(&record) else { continue };
                    What::Exec(filename.to_vec(), interp.to_vec())
                }
                None => continue,
            };
            // Nobody may be waiting any more.
            let _ = notices.send(Notice { ktime: event.ktime, tgid: event.tgid, what });
        }
        logger.flush();
        if stop {
            return pages;
        }
    }
}
