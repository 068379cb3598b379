//! Ways to start a service on an empty node.
//!
//! All of them start it in the network of the node, so that one client outside can tell when it answers, and none leaves
//! anything that makes the next start easier: each has directories of its own, made anew.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tempfile::TempDir;
use xtask::containerd::Containerd;
use xtask::images::Service;
use xtask::network::Place;
use xtask::ready;

use super::report::WARM;
use super::warm::WarmOverlay;

/// What one start told, besides the link.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Start {
    /// From the command to the first answer, milliseconds.
    pub ready_ms: f64,
    /// Peak of memory that the starting program itself held, bytes; not known of daemons.
    pub memory: Option<u64>,
    /// What the program says of it.
    pub report: Option<Value>,
}

/// What a start has come to; what passed the link until then is looked up at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The service has answered.
    Answered,
    /// The program has told what it received.
    Told,
}

/// A way to start a service on a node that has nothing of it.
pub trait Method {
    /// Its name in the table.
    fn name(&self) -> &str;
    /// Starts in a round: what takes seconds is measured more often than what takes minutes.
    fn starts(&self) -> usize {
        2
    }
    /// Makes the node empty again. Not timed.
    fn reset(&mut self) -> Result<()>;
    /// Starts the service, calls `reached` when it has answered and perhaps later, and ends it.
    fn start(&mut self, reached: &mut dyn FnMut(Moment)) -> Result<Start>;
}

/// The files of the image are unpacked and cached: no cold start is faster.
pub struct Warm<'a>(pub WarmOverlay<'a>);

impl Method for Warm<'_> {
    fn name(&self) -> &'static str {
        WARM
    }

    fn reset(&mut self) -> Result<()> {
        // Reads its files: between two rounds of this, minutes pass, and page caches are reclaimed.
        self.0.start().map(drop)
    }

    fn start(&mut self, reached: &mut dyn FnMut(Moment)) -> Result<Start> {
        let ready_ms = self.0.start()?;
        reached(Moment::Answered);
        Ok(Start { ready_ms, ..Start::default() })
    }
}

/// containerd pulls and unpacks the whole image.
pub struct FullPull<'a> {
    pub name: &'static str,
    pub place: Place,
    pub directory: &'a Path,
    pub reference: String,
    pub service: &'a Service,
    pub containerd: Option<Containerd>,
}

impl Method for FullPull<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn starts(&self) -> usize {
        1
    }

    fn reset(&mut self) -> Result<()> {
        // The old one ends first.
        self.containerd = None;
        self.containerd = Some(Containerd::start(self.directory, &self.place)?);
        Ok(())
    }

    fn start(&mut self, reached: &mut dyn FnMut(Moment)) -> Result<Start> {
        let containerd = self.containerd.take().context("no containerd")?;
        let start = containerd.start_service(&self.reference, self.service)?;
        // It fetches nothing after the pull.
        reached(Moment::Answered);
        let ready_ms = (start.pull + start.start + start.ready).as_secs_f64() * 1000.0;
        Ok(Start { ready_ms, ..Start::default() })
    }
}

/// `tdfs run` with an empty state directory.
pub struct Tdfs<'a> {
    pub name: &'static str,
    pub place: Place,
    pub program: PathBuf,
    pub directory: &'a Path,
    pub reference: String,
    pub service: &'a Service,
    pub options: Vec<&'static str>,
    pub state: Option<TempDir>,
}

impl Method for Tdfs<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn reset(&mut self) -> Result<()> {
        self.state = Some(TempDir::with_prefix_in("node-", self.directory)?);
        Ok(())
    }

    fn start(&mut self, reached: &mut dyn FnMut(Moment)) -> Result<Start> {
        let state = self.state.as_ref().context("no state directory")?;
        let mut command = self.place.command(&self.program);
        command.args(["--json", "run", &self.reference, "--plain-http", "--service", self.service.name]);
        command.args(&self.options).arg("--state").arg(state.path());
        let log = self.directory.join("tdfs.log");
        let log_file = fs::File::create(&log)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log_file);
        let started = Instant::now();
        let mut child = command.spawn().context("cannot start tdfs")?;
        let outcome = match self.place.namespace() {
            Some(namespace) => ready::wait_in(self.service, namespace, Some(&mut child)),
            None => bail!("a start of an empty node is measured at the end of a link"),
        };
        let ready_ms = started.elapsed().as_secs_f64() * 1000.0;
        reached(Moment::Answered);
        let (report, memory) = end(child, reached)?;
        let said = || fs::read_to_string(&log).unwrap_or_default().trim().to_owned();
        outcome.with_context(said)?;
        let report = serde_json::from_str(&report).with_context(said)?;
        Ok(Start { ready_ms, memory, report: Some(report) })
    }
}

/// Tells `tdfs run` to end, by the signal that every service of ours handles as the first process of a container; returns what it printed and its peak of memory.
fn end(mut child: Child, reached: &mut dyn FnMut(Moment)) -> Result<(String, Option<u64>)> {
    let pid = child.id();
    // It prints its report as soon as it knows that the service is ready, which may be after the client does.
    let mut output = child.stdout.take().context("no output")?;
    let mut report = Vec::new();
    let mut byte = [0; 4096];
    while !report.contains(&b'\n') {
        match output.read(&mut byte)? {
            0 => break,
            n => report.extend_from_slice(&byte[..n]),
        }
    }
    reached(Moment::Told);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGINT);
    output.read_to_end(&mut report)?;
    child.wait()?;
    Ok((String::from_utf8_lossy(&report).into_owned(), peak.map(|kib: u64| kib << 10)))
}
