//! Runs the built `tdfs` as people do.

use std::ffi::OsStr;
use std::io::{BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// The `tdfs` of the same build as this test.
pub fn program() -> Result<PathBuf> {
    // target/<profile>/deps/<test>: cargo puts the binaries of the workspace two levels up.
    let test = std::env::current_exe()?;
    let profile = test.ancestors().nth(2).context("a test lies in target/<profile>/deps")?;
    let program = profile.join("tdfs");
    if !program.is_file() {
        bail!("{} is missing: `cargo build` first, or run `cargo xtask test`", program.display());
    }
    Ok(program)
}

/// `tdfs` with these arguments, not yet started.
pub fn command(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.args(arguments).stdin(Stdio::null());
    Ok(command)
}

/// Runs `tdfs --json` with these arguments to its end and returns the object that it printed.
pub fn json(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Value> {
    said(&output(arguments)?)
}

/// Runs `tdfs --json` with these arguments, which must fail, and returns its one line of error.
pub fn error(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String> {
    let output = output(arguments)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        bail!("tdfs succeeded and should not: {}", String::from_utf8_lossy(&output.stdout));
    }
    if output.status.code() != Some(1) {
        bail!("tdfs did not end with an error of its own: {}\n{stderr}", output.status);
    }
    Ok(stderr.lines().last().unwrap_or_default().to_owned())
}

fn output(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Output> {
    command(["--json"])?.args(arguments).output().context("start tdfs")
}

/// The object that a `tdfs` which has succeeded printed.
fn said(output: &Output) -> Result<Value> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("tdfs failed: {}\n{stderr}", output.status);
    }
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("not JSON: {:?}\n{stderr}", String::from_utf8_lossy(&output.stdout)))
}

/// Mounts `image` on a node, shows its files to `look` and unmounts it.
pub fn mounted<T>(image: &str, state: &Path, look: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let parent = tempfile::tempdir()?;
    let target = parent.path().join("mount");
    std::fs::create_dir(&target)?;
    // A relative path, and one that reads like the command.
    let mut mount = command(["--json", "mount", image, "mount", "--state"])?;
    said(&mount.arg(state).current_dir(&parent).output().context("start tdfs")?)?;
    let seen = look(&target);
    json(["umount".as_ref(), target.as_os_str(), "--state".as_ref(), state.as_os_str()])?;
    seen
}

/// A `tdfs run` in the foreground: it has reported readiness and its container lives.
pub struct Running {
    child: Child,
    messages: Option<JoinHandle<String>>,
    /// Held open: tdfs must not die of a closed pipe when it prints more.
    _stdout: BufReader<ChildStdout>,
    /// The object that it printed when the container was ready.
    pub report: Value,
}

impl Running {
    /// Starts `tdfs --json` with these arguments and waits for the first object on its standard output.
    pub fn start(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Self> {
        let mut command = command(["--json"])?;
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start tdfs")?;
        let mut stderr = child.stderr.take().context("stderr is piped")?;
        // Drained all the time, so that tdfs never blocks on it.
        let messages = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        let mut stdout = BufReader::new(child.stdout.take().context("stdout is piped")?);
        let report = serde_json::Deserializer::from_reader(&mut stdout).into_iter::<Value>().next();
        match report {
            Some(Ok(report)) => Ok(Self { child, messages: Some(messages), _stdout: stdout, report }),
            other => {
                let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
                let status = child.wait()?;
                let messages = messages.join().unwrap_or_default();
                bail!("tdfs did not report readiness ({other:?}): {status}\n{messages}")
            }
        }
    }

    /// The process id of tdfs.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Waits until the container and tdfs have ended; also returns what they said on standard error.
    pub fn finish(mut self) -> Result<(ExitStatus, String)> {
        let status = self.child.wait()?;
        let messages = self.messages.take().and_then(|m| m.join().ok());
        Ok((status, messages.unwrap_or_default()))
    }

    /// Sends `signal` to tdfs and waits until it has ended.
    pub fn stop(mut self, signal: Signal) -> Result<ExitStatus> {
        kill(self.pid(), signal).context("signal tdfs")?;
        Ok(self.child.wait()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A process that was waited for is gone: its number may be another's now.
        if matches!(self.child.try_wait(), Ok(None)) {
            // What most first processes of containers end of; SIGTERM they ignore.
            let _ = kill(self.pid(), Signal::SIGINT);
            let _ = self.child.wait();
        }
    }
}
