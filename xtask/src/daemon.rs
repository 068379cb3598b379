//! A server of our own for the time of a demo or a benchmark: its own process group, ended with us.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A started server cannot be used at once: how long it may take.
const START: Duration = Duration::from_secs(30);
/// How often it is asked.
const POLL: Duration = Duration::from_millis(5);

/// A running server; ended by SIGTERM when dropped.
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts `command` with its output in the file `log` and waits until `is_up`.
    pub fn start(command: &mut Command, log: &Path, is_up: impl Fn() -> bool) -> Result<Self> {
        let name = command.get_program().to_owned();
        let out = File::create(log).with_context(|| log.display().to_string())?;
        // setpriv ends it with us even when we are killed; the process group keeps Ctrl-C for us, who clean up.
        let mut guarded = Command::new("setpriv");
        guarded.args(["--pdeathsig", "TERM", "--"]).arg(&name).args(command.get_args());
        let child = guarded
            .process_group(0)
            .stdin(std::process::Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("cannot start {}", name.display()))?;
        let mut daemon = Self { child };
        wait_until(&name.display().to_string(), || match daemon.child.try_wait()? {
            Some(status) => {
                let text = std::fs::read_to_string(log).unwrap_or_default();
                bail!("ended at once, {status}: {}", text.lines().last().unwrap_or_default())
            }
            None => Ok(is_up()),
        })?;
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// Asks `is_done` until it says yes; an error after half a minute.
pub fn wait_until(what: &str, mut is_done: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !is_done().with_context(|| what.to_owned())? {
        if started.elapsed() > START {
            bail!("{what}: nothing within {} s", START.as_secs());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}
