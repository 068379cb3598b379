//! Waiting until a service is ready.
//!
//! While recording, the tracer's kernel events say so where there are any (LISTEN, exec, first page, user probe), with
//! the time it happened. Without a tracer: connections, fanotify marks on the container's overlay, and a user probe
//! alone. Requests and log lines work the same for both. Nothing is left behind: marks and probes go with their file
//! descriptors.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::sched::{CloneFlags, setns};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use nix::unistd::Pid;
use regex::bytes::Regex;
use tdfs_common::tree::Tree;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use super::probe::{HttpProbe, Probe};
use super::sandbox::{Exit, OnLine, Sandbox};
use super::tracer::{Notice, Tracer, TracerError, What, now};
use super::{ImageFile, residency, symbol};
use crate::rootfs::RootFs;

/// At least, between two attempts to connect.
const RETRY: Duration = Duration::from_millis(2);
/// An attempt takes the service's processor: the next one waits for this part of the time since the first.
const RETRY_PART: u32 = 33;
/// For one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// After the container's end, for events and output that are still on their way.
const GRACE: Duration = Duration::from_millis(200);

/// A service does not become ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// The file of the probe.
    #[error("{path}: {reason}")]
    File {
        /// In the image.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The container ended first.
    #[error("the container ended {} before it was ready{}", describe(*exit), last(tail))]
    Ended {
        /// How.
        exit: Exit,
        /// Its last lines of output.
        tail: String,
    },
    /// It took too long.
    #[error("not ready after {} s ({probe}){}", timeout.as_secs_f32(), last(tail))]
    Timeout {
        /// The probe.
        probe: String,
        /// The limit.
        timeout: Duration,
        /// The container's last lines of output.
        tail: String,
    },
    /// No kernel events.
    #[error(transparent)]
    Tracer(#[from] TracerError),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

fn describe(exit: Exit) -> String {
    match exit {
        Exit::Code(code) => format!("with exit code {code}"),
        Exit::Signal(signal) => format!("by signal {signal}"),
    }
}

fn last(tail: &str) -> String {
    if tail.is_empty() { "; it printed nothing".into() } else { format!("; its last output: {tail}") }
}

fn io_error<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> ReadyError {
    move |e| ReadyError::Io { what, source: e.into() }
}

/// What a probe points at in the image.
#[derive(Clone, Copy)]
pub(super) enum Target {
    /// Nothing.
    None,
    /// A file, by its inode in the tree.
    File(u32),
    /// A function: its file, and its offset there in bytes.
    Function(u32, u64),
}

impl Target {
    /// Looks the probe's file and symbol up. The pages this reads are dropped again: they are not the service's.
    pub(super) fn find(probe: &Probe, rootfs: &RootFs, tree: &Tree) -> Result<Self, ReadyError> {
        let find = |path: &str| {
            let reason = || "no such file in the image".to_owned();
            let found = ImageFile::find(tree, path.as_bytes());
            found.ok_or_else(|| ReadyError::File { path: path.to_owned(), reason: reason() })
        };
        match probe {
            Probe::Open(path) | Probe::Exec(path) => Ok(Self::File(find(path)?.ino)),
            Probe::Uprobe { path, symbol: name } => {
                let failed = |reason: String| ReadyError::File { path: path.clone(), reason };
                let found = find(path)?;
                let file = found.open(rootfs).map_err(|e| failed(e.to_string()))?;
                let offset = tokio::task::block_in_place(|| symbol::file_offset(&file, name));
                residency::forget(&file).map_err(|e| failed(e.to_string()))?;
                let offset = offset.map_err(|reason| failed(format!("{name}: {reason}")))?;
                Ok(Self::Function(found.ino, offset))
            }
            Probe::Tcp(_) | Probe::Http(_) | Probe::Log(_) | Probe::Exit(_) => Ok(Self::None),
        }
    }
}

/// A probe that watches from before the container starts.
pub struct Readiness {
    probe: Probe,
    means: Means,
}

/// What has to be in place before the start.
enum Means {
    /// Nothing.
    None,
    /// Somebody looks at every line; the time of the first match.
    Lines(watch::Sender<Option<u64>>),
    /// A mark on the file.
    Mark(AsyncFd<Fanotify>),
    /// A user probe of our own.
    Uprobe(Box<Tracer>),
    /// The tracer that records, and the files of the image.
    Events(Target, Arc<Tree>),
}

impl Readiness {
    /// For a container over `rootfs`, a mount of `tree`, whose overlay is mounted at `merged`; to be called before it
    /// starts, on a multi-threaded runtime: it may read the image.
    pub fn prepare(probe: &Probe, rootfs: &RootFs, tree: &Tree, merged: &Path) -> Result<Self, ReadyError> {
        if let Some(readiness) = Self::without_files(probe) {
            return Ok(readiness);
        }
        let means = match (Target::find(probe, rootfs, tree)?, probe) {
            (Target::File(ino), Probe::Open(_)) => Means::Mark(mark(tree, merged, ino, MaskFlags::FAN_OPEN)?),
            // Minimum kernel version 5.0.
            (Target::File(ino), _) => Means::Mark(mark(tree, merged, ino, MaskFlags::FAN_OPEN_EXEC)?),
            (Target::Function(ino, offset), _) => {
                let mut tracer = Tracer::uprobe_only()?;
                tracer.attach_uprobe(&ImageFile { ino, tree }.path_in(rootfs.path()), offset)?;
                Means::Uprobe(Box::new(tracer))
            }
            (Target::None, _) => Means::None,
        };
        Ok(Self { probe: probe.clone(), means })
    }

    /// The same for a probe that points at nothing in the image; `None` for others.
    pub fn without_files(probe: &Probe) -> Option<Self> {
        let means = match probe {
            Probe::Log(_) => Means::Lines(watch::Sender::new(None)),
            Probe::Tcp(_) | Probe::Http(_) | Probe::Exit(_) => Means::None,
            Probe::Open(_) | Probe::Exec(_) | Probe::Uprobe { .. } => return None,
        };
        Some(Self { probe: probe.clone(), means })
    }

    /// The same with the kernel events of `tracer`.
    pub(super) fn prepare_traced(
        probe: &Probe,
        target: Target,
        rootfs: &RootFs,
        tree: &Arc<Tree>,
        tracer: &mut Tracer,
    ) -> Result<Self, ReadyError> {
        match (target, probe) {
            (Target::File(ino), Probe::Open(_)) => tracer.watch_inode(rootfs.nid_of(ino))?,
            (Target::Function(ino, offset), _) => {
                tracer.attach_uprobe(&ImageFile { ino, tree }.path_in(rootfs.path()), offset)?;
            }
            _ => {}
        }
        let means = match probe {
            Probe::Log(_) => Means::Lines(watch::Sender::new(None)),
            Probe::Exit(_) => Means::None,
            _ => Means::Events(target, Arc::clone(tree)),
        };
        Ok(Self { probe: probe.clone(), means })
    }

    /// Whether the tracer sees the moment itself; lines and answers are noticed after it.
    pub(super) fn is_event(&self) -> bool {
        matches!(self.means, Means::Events(..)) && !matches!(self.probe, Probe::Http(_))
    }

    /// Must be given to the container.
    pub fn on_line(&self) -> Option<OnLine> {
        let (Means::Lines(matched), Probe::Log(regex)) = (&self.means, &self.probe) else { return None };
        let (matched, regex): (_, Regex) = (matched.clone(), regex.clone());
        Some(Arc::new(move |line| {
            if matched.borrow().is_none() && regex.is_match(line) {
                matched.send_replace(Some(now()));
            }
        }))
    }

    /// Waits until the service is ready; when it was (CLOCK_MONOTONIC, nanoseconds).
    pub async fn wait(self, sandbox: &Sandbox, timeout: Duration) -> Result<u64, ReadyError> {
        self.wait_traced(sandbox, None, timeout).await
    }

    pub(super) async fn wait_traced(
        self,
        sandbox: &Sandbox,
        tracer: Option<&mut Tracer>,
        timeout: Duration,
    ) -> Result<u64, ReadyError> {
        let probe = self.probe.clone();
        let mut ready = std::pin::pin!(self.condition(sandbox, tracer));
        let ended = async {
            if matches!(probe, Probe::Exit(_)) { std::future::pending().await } else { sandbox.wait().await }
        };
        let exit = tokio::select! {
            biased;
            ready = &mut ready => return ready,
            exit = ended => exit,
            () = tokio::time::sleep(timeout) => {
                return Err(ReadyError::Timeout { probe: probe.to_string(), timeout, tail: sandbox.tail() });
            }
        };
        match tokio::time::timeout(GRACE, ready).await {
            Ok(ready @ Ok(_)) => ready,
            _ => Err(ReadyError::Ended { exit, tail: sandbox.tail() }),
        }
    }

    async fn condition(self, sandbox: &Sandbox, tracer: Option<&mut Tracer>) -> Result<u64, ReadyError> {
        let Self { probe, means } = self;
        let pid = sandbox.init_pid();
        match (&probe, means, tracer) {
            (Probe::Tcp(port), Means::Events(..), Some(tracer)) => listening(tracer, *port).await,
            (&Probe::Tcp(port), ..) => {
                let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                let connects =
                    move |ip: &IpAddr| TcpStream::connect_timeout(&(*ip, port).into(), ANSWER).is_ok();
                retry(pid, move || loopback.iter().any(connects)).await
            }
            (Probe::Http(http), means, tracer) => {
                if let (Means::Events(..), Some(tracer)) = (means, tracer) {
                    listening(tracer, http.address().1).await?;
                }
                let http = http.clone();
                retry(pid, move || status(&http).is_ok_and(|s| http.accepts(s))).await
            }
            (Probe::Log(_), Means::Lines(matched), _) => {
                let mut matched = matched.subscribe();
                let found = matched.wait_for(Option::is_some).await.map(|t| *t);
                Ok(found.ok().flatten().unwrap_or_else(now))
            }
            (Probe::Exit(code), ..) => {
                let exit = sandbox.wait().await;
                if exit == Exit::Code(*code) {
                    return Ok(now());
                }
                tokio::time::sleep(GRACE).await;
                Err(ReadyError::Ended { exit, tail: sandbox.tail() })
            }
            (_, Means::Mark(group), _) => {
                let ready = group.readable().await.map_err(io_error("fanotify"))?;
                drop(ready);
                Ok(now())
            }
            (_, Means::Uprobe(mut tracer), _) => Ok(tracer.notice(|n| n.what == What::Uprobe).await?.ktime),
            (_, Means::Events(target, tree), Some(tracer)) => {
                let wanted = |n: &Notice| match (&n.what, &probe, target) {
                    (What::Page, Probe::Open(_), _) | (What::Uprobe, Probe::Uprobe { .. }, _) => true,
                    (What::Exec(filename, interp), Probe::Exec(_), Target::File(ino)) => {
                        executes(&tree, ino, n.tgid, [filename, interp])
                    }
                    _ => false,
                };
                Ok(tracer.notice(wanted).await?.ktime)
            }
            // Means without what they belong to are never made.
            (_, Means::None | Means::Lines(_) | Means::Events(..), _) => std::future::pending().await,
        }
    }
}

/// Whether an execution is one of inode `ino`: by the path that was given, by the interpreter, or by what runs now.
fn executes(tree: &Tree, ino: u32, tgid: u32, paths: [&[u8]; 2]) -> bool {
    let is = |path: &[u8]| path.starts_with(b"/") && tree.resolve(path) == Some(ino);
    let running = || std::fs::read_link(format!("/proc/{tgid}/exe"));
    paths.into_iter().any(is) || running().is_ok_and(|p| is(p.as_os_str().as_encoded_bytes()))
}

async fn listening(tracer: &mut Tracer, port: u16) -> Result<u64, ReadyError> {
    Ok(tracer.notice(|n| n.what == What::Listen(port)).await?.ktime)
}

/// A group that becomes readable when the file is opened through the overlay. Marking an inode reads none of its pages.
fn mark(tree: &Tree, merged: &Path, ino: u32, mask: MaskFlags) -> Result<AsyncFd<Fanotify>, ReadyError> {
    let at = ImageFile { ino, tree }.path_in(merged);
    let failed = io_error::<Errno>("fanotify");
    let init = InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
    let group = Fanotify::init(init, EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC).map_err(&failed)?;
    group.mark(MarkFlags::FAN_MARK_ADD, mask, AT_FDCWD, Some(&at)).map_err(&failed)?;
    // SAFETY: the group owns its descriptor, and nothing replaces it.
    let registered = unsafe { AsyncFd::register_with_interest(group, tokio::io::Interest::READABLE) };
    registered.map_err(|e| io_error("fanotify")(e))
}

/// Repeats `attempt` in the network namespace of `pid` until it succeeds; when it did. Gives up when dropped.
async fn retry(pid: Pid, attempt: impl Fn() -> bool + Send + 'static) -> Result<u64, ReadyError> {
    let namespace = match File::open(format!("/proc/{pid}/ns/net")) {
        Ok(namespace) => namespace,
        // The process has ended: nothing will answer, and whoever waits for its end tells how it ended.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            std::future::pending().await
        }
        Err(e) => return Err(io_error("network namespace")(e)),
    };
    let (send, receive) = oneshot::channel();
    // A thread of its own: its namespace must not leak into a pool.
    let run = move || {
        if let Err(e) = setns(&namespace, CloneFlags::CLONE_NEWNET) {
            let _ = send.send(Err(io_error("network namespace")(e)));
            return;
        }
        let first = Instant::now();
        while !send.is_closed() {
            if attempt() {
                let _ = send.send(Ok(now()));
                return;
            }
            std::thread::sleep(RETRY.max(first.elapsed() / RETRY_PART));
        }
    };
    std::thread::Builder::new().name("readiness".into()).spawn(run).map_err(io_error("thread"))?;
    receive.await.unwrap_or_else(|_| Err(io_error("thread")(io::Error::other("ended early"))))
}

/// The status of the answer to one GET (RFC 9112, section 4: `HTTP/1.1 200 OK`).
fn status(http: &HttpProbe) -> io::Result<u16> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from(http.address()), ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let (target, host) = (http.target(), http.host());
    write!(stream, "GET {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: tdfs\r\nConnection: close\r\n\r\n")?;
    let mut line = [0; 12];
    stream.read_exact(&mut line)?;
    let status =
        std::str::from_utf8(&line).ok().and_then(|l| l.strip_prefix("HTTP/1.")?.get(2..)?.parse().ok());
    let status = status.ok_or_else(|| io::Error::other("not an HTTP answer"))?;
    // The service is not disturbed by a connection reset while it answers; the rest has a limit.
    let _ = io::copy(&mut stream.take(1 << 20), &mut io::sink());
    Ok(status)
}
