//! A running `tdfs registry` on a free loopback port.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::tdfs;

/// The server; killed on drop.
#[derive(Debug)]
pub struct Server {
    /// `127.0.0.1:PORT`.
    pub addr: SocketAddr,
    /// The object that it printed when it listened.
    pub report: Value,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    /// Held open: the server must not die of a closed pipe.
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    /// Starts a server over the directory `root`.
    pub fn start(root: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_over(&root.display().to_string(), arguments, &[])
    }

    /// Starts a server over any storage, with these variables in its environment.
    pub fn start_over(root: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Result<Self> {
        let mut command = tdfs::command(["--json", "registry", "--root", root])?;
        if !arguments.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command.args(arguments).envs(environment.iter().copied());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("tdfs")?;
        let stderr = BufReader::new(child.stderr.take().context("stderr is piped")?);
        let log = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&log);
        // Drained all the time, so that the server never blocks on it.
        let drained = thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        let mut stdout = BufReader::new(child.stdout.take().context("stdout is piped")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let Ok(report) = serde_json::from_str::<Value>(&line) else {
            let status = child.wait()?;
            let _ = drained.join();
            let said = log.lock().unwrap_or_else(PoisonError::into_inner).join("\n");
            bail!("tdfs registry did not start: {status}\n{said}");
        };
        let addr = report["listen"].as_str().context("no address")?.parse()?;
        Ok(Self { addr, report, child, log, _stdout: stdout })
    }

    /// `http://127.0.0.1:PORT/PATH`.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.addr)
    }

    /// `127.0.0.1:PORT/NAME`, for references.
    #[must_use]
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.addr)
    }

    /// Pushes the image `latest` of a layout as `name`, with an optional tag; returns the reference to it.
    pub fn push(&self, layout: &Path, name: &str) -> Result<String> {
        let image = self.image(name);
        xtask::command::output(
            Command::new("skopeo")
                .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"])
                .arg(format!("oci:{}:latest", layout.display()))
                .arg(format!("docker://{image}")),
        )?;
        Ok(image)
    }

    /// What it wrote to standard error so far.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Sends a signal and waits until the server has ended.
    pub fn stop(&mut self, signal: Signal) -> Result<ExitStatus> {
        kill(self.pid(), signal).context("signal the server")?;
        Ok(self.child.wait()?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
