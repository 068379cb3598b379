//! A container under runc.
//!
//! ```text
//! create   runc makes namespaces, cgroup and mounts; the process waits before its first instruction   (launch.rs)
//! start    the process runs; `run` is both at once
//! pause    the cgroup freezer stops it, all of it
//! ```
//!
//! The container's output goes through two pipes: every line is shown to `on_line` as soon as it is complete, the last
//! lines are kept for messages, and all of it is passed on. The container is our child by way of the subreaper
//! attribute, so that its exit status reaches us. If this process dies, the container lives on until
//! [`remove_leftover`] finds it, and a runc that is still making it until [`end_orphans`] does.

mod accounts;
mod bundle;
mod launch;
mod orphan;

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::watch;

pub use accounts::{Accounts, Identity};
pub use bundle::Workload;
pub use launch::Launch;
pub use orphan::end_orphans;

/// Longest line that is looked at as a whole, bytes.
const LINE_MAX: usize = 64 << 10;
/// Lines kept for messages.
const TAIL_LINES: usize = 5;

/// Network of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// The host's.
    Host,
    /// Its own, with loopback only.
    Private,
}

/// A container cannot be made or controlled.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The image does not say how it runs, or wrongly.
    #[error("{0}")]
    Configuration(String),
    /// runc is missing or cannot be started.
    #[error("cannot start runc: {0}")]
    Runc(io::Error),
    /// runc refused.
    #[error("runc {command}: {message}")]
    Refused {
        /// Its sub-command.
        command: &'static str,
        /// Its last line.
        message: String,
    },
    /// A file of the bundle.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl SandboxError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// How a container ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `exit(code)`.
    Code(i32),
    /// Killed by this signal number.
    Signal(i32),
}

impl Exit {
    /// The code a shell would give: 128 and the signal's number for signals.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Where a container's standard output goes; its standard error always goes to ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// To our standard output.
    Stdout,
    /// To our standard error, so that standard output stays machine-readable.
    Stderr,
}

/// Called with every line of output, without its end, in the order of each stream.
pub type OnLine = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// What a container is made of.
pub struct SandboxSpec<'a> {
    /// The mounted, writable root file system.
    pub rootfs: &'a Path,
    /// What to run.
    pub workload: Workload<'a>,
    /// Where output goes.
    pub forward: Forward,
    /// Who looks at lines.
    pub on_line: Option<OnLine>,
}

/// A container, made by [`Launch`]; [`delete`](Sandbox::delete) it.
pub struct Sandbox {
    id: String,
    bundle: PathBuf,
    runc_root: PathBuf,
    init: Pid,
    exit: watch::Receiver<Option<Exit>>,
    tail: Arc<Mutex<VecDeque<String>>>,
    readers: Vec<tokio::task::JoinHandle<()>>,
}

impl Sandbox {
    /// Lets the process run.
    pub async fn start(&self) -> Result<(), SandboxError> {
        self.runc(&["start"], &[]).await
    }

    /// Stops every process of the container where it is; falls back to SIGSTOP without a freezer.
    pub async fn pause(&self) -> Result<(), SandboxError> {
        match self.runc(&["pause"], &[]).await {
            Err(SandboxError::Refused { .. }) if self.exit().is_none() => self.kill(Signal::SIGSTOP).await,
            done => done,
        }
    }

    /// The process ID of the container's first process, in our namespace.
    pub fn init_pid(&self) -> Pid {
        self.init
    }

    /// The container's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        // The sender always sends before it goes.
        let ended = exit.wait_for(Option::is_some).await.map(|e| *e);
        ended.ok().flatten().unwrap_or(Exit::Signal(Signal::SIGKILL as i32))
    }

    /// Its last lines of output, for a message.
    pub fn tail(&self) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.iter().map(String::as_str).collect::<Vec<_>>().join(" | ")
    }

    /// Sends a signal to every process of the container; no error if it has ended.
    pub async fn kill(&self, signal: Signal) -> Result<(), SandboxError> {
        match self.runc(&["kill", "--all"], &[signal.as_str()]).await {
            Err(SandboxError::Refused { .. }) if self.exit().is_some() => Ok(()),
            done => done,
        }
    }

    /// Sends a signal to its first process, as `docker kill` does; no error if it has ended.
    pub fn signal(&self, signal: Signal) -> Result<(), SandboxError> {
        match nix::sys::signal::kill(self.init, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(SandboxError::Refused { command: "kill", message: e.to_string() }),
        }
    }

    /// Kills what still runs and removes the container and its bundle. Its output is complete afterwards.
    pub async fn delete(mut self) -> Result<Exit, SandboxError> {
        self.runc(&["delete", "--force"], &[]).await?;
        let exit = self.wait().await;
        std::fs::remove_dir_all(&self.bundle).map_err(SandboxError::io(&self.bundle))?;
        for reader in self.readers.drain(..) {
            // A process that left the container may hold the pipe; nobody waits for that.
            let _ = tokio::time::timeout(Duration::from_secs(1), reader).await;
        }
        Ok(exit)
    }

    async fn runc(&self, before_id: &[&'static str], after_id: &[&str]) -> Result<(), SandboxError> {
        control(&self.runc_root, before_id, &self.id, after_id).await
    }
}

/// Kills and removes the container `id` that a dead process left; nothing happens without one.
pub async fn remove_leftover(runc_root: &Path, id: &str) -> Result<(), SandboxError> {
    if !runc_root.join(id).exists() {
        return Ok(());
    }
    control(runc_root, &["delete", "--force"], id, &[]).await
}

async fn control(
    root: &Path,
    before_id: &[&'static str],
    id: &str,
    after_id: &[&str],
) -> Result<(), SandboxError> {
    let mut command = runc(root);
    command.args(before_id).arg(id).args(after_id).stdin(Stdio::null());
    let output = command.output().await.map_err(SandboxError::Runc)?;
    if output.status.success() {
        return Ok(());
    }
    let message = message(&String::from_utf8_lossy(&output.stderr));
    Err(SandboxError::Refused { command: before_id[0], message })
}

fn runc(root: &Path) -> Command {
    let mut command = Command::new("runc");
    command.arg("--root").arg(root);
    command
}

/// runc's last complaint, without the decoration of its logger.
fn message(log: &str) -> String {
    let line = log.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("no reason given");
    let start = line.find("msg=\"").map_or(0, |at| at + 5);
    line[start..].trim_end_matches('"').to_owned()
}

fn wait(init: Pid) -> Exit {
    loop {
        match waitpid(init, None) {
            Ok(WaitStatus::Exited(_, code)) => return Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Exit::Signal(signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return Exit::Signal(Signal::SIGKILL as i32),
        }
    }
}

/// Passes output on, line by line to whoever looks.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    on_line: Option<OnLine>,
    tail: Arc<Mutex<VecDeque<String>>>,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut line = Vec::new();
    let mut passing = true;
    let seen = |line: &mut Vec<u8>| {
        if let Some(on_line) = &on_line {
            on_line(line);
        }
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(String::from_utf8_lossy(&line[..line.len().min(500)]).trim_end().to_owned());
        line.clear();
    };
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        for piece in buffer[..n].split_inclusive(|b| *b == b'\n') {
            line.extend_from_slice(piece.strip_suffix(b"\n").unwrap_or(piece));
            if piece.ends_with(b"\n") || line.len() >= LINE_MAX {
                seen(&mut line);
            }
        }
        // A container must not block because whoever reads our output went away.
        passing = passing && to.write_all(&buffer[..n]).await.is_ok() && to.flush().await.is_ok();
    }
    if !line.is_empty() {
        seen(&mut line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_line_is_seen_and_everything_is_passed_on() {
        let text = [b"one\ntwo".as_slice(), &vec![b'x'; 2 * LINE_MAX], b"\n\nlast"].concat();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        let on_line: OnLine = Arc::new(move |l| seen.lock().unwrap().push(l.to_vec()));
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let mut out = Vec::new();
        pump(text.as_slice(), &mut out, Some(on_line), Arc::clone(&tail)).await;
        assert_eq!(out, text);
        let lines = lines.lock().unwrap();
        assert_eq!(lines.first().unwrap(), b"one");
        assert_eq!(lines.last().unwrap(), b"last");
        assert!(lines.iter().all(|l| l.len() <= 2 * LINE_MAX), "a line without end is cut");
        assert_eq!(tail.lock().unwrap().back().unwrap(), "last");
    }

    #[test]
    fn messages_lose_their_decoration() {
        assert_eq!(message("time=\"x\" level=error msg=\"no such file\"\n\n"), "no such file");
        assert_eq!(message("plain\n"), "plain");
        assert_eq!(message(""), "no reason given");
    }
}
