//! The usual way to start a container, for comparison: a private containerd pulls the whole image, unpacks it and runs
//! it from an overlay.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use tempfile::TempDir;

use crate::daemon::{Daemon, wait_until};
use crate::images::Service;
use crate::network::Place;
use crate::{command, ready};

/// A running containerd of our own; it and all that it holds are gone when it is dropped.
pub struct Containerd {
    place: Place,
    /// Sockets and the state of running containers: short paths, as in `/run/containerd`.
    run: TempDir,
    // In this order: the server ends before its files go.
    _daemon: Daemon,
    _root: TempDir,
}

/// How long each stage of a start took.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Resolve, download and unpack.
    pub pull: Duration,
    /// Mount, create the container, start its process.
    pub start: Duration,
    /// From then until it answers.
    pub ready: Duration,
}

impl Containerd {
    /// Starts containerd at `place` with its images below `parent`.
    pub fn start(parent: &Path, place: &Place) -> Result<Self> {
        let root = TempDir::with_prefix_in("containerd-", parent)?;
        let run = TempDir::with_prefix_in("tdfs-containerd-", "/run")?;
        let socket = run.path().join("sock");
        let config = root.path().join("config.toml");
        // A JSON string is a TOML string too.
        let text = format!(
            "version = 2\nroot = {}\nstate = {}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {}\n",
            json!(root.path().join("root")),
            json!(run.path().join("state")),
            json!(socket),
        );
        fs::write(&config, text).with_context(|| config.display().to_string())?;
        let is_up = || UnixStream::connect(&socket).is_ok();
        let daemon = Daemon::start(
            place.command("containerd").arg("--config").arg(&config),
            &root.path().join("log"),
            is_up,
        )?;
        Ok(Self { place: place.clone(), run, _daemon: daemon, _root: root })
    }

    /// `ctr` that talks to it; it fetches what it pulls itself.
    pub fn ctr(&self) -> Command {
        self.client("ctr")
    }

    /// A `program` with the options of `ctr`, that talks to it.
    pub fn client(&self, program: &str) -> Command {
        let mut client = self.place.command(program);
        client.arg("--address").arg(self.run.path().join("sock"));
        client
    }

    /// The name of our container: runc knows all containers of the machine by name.
    fn container(&self) -> String {
        self.run.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Pulls `image` over plain HTTP, runs `service` until it answers, and removes the container. At the end of a link
    /// the container shares its network.
    pub fn start_service(&self, image: &str, service: &Service) -> Result<Start> {
        let pid_file = self.run.path().join("pid");
        let t0 = Instant::now();
        command::output(self.ctr().args(["images", "pull", "--plain-http", image]))?;
        let t1 = Instant::now();
        let _container = Container { containerd: self };
        command::output(
            self.ctr()
                .args(["run", "--detach", "--pid-file"])
                .arg(&pid_file)
                .args(self.place.namespace().map(|_| "--net-host"))
                .args([image, &self.container()])
                .args(service.command),
        )?;
        let t2 = Instant::now();
        ready::wait_at(&self.place, service, &pid_file)?;
        Ok(Start { pull: t1 - t0, start: t2 - t1, ready: t2.elapsed() })
    }
}

/// Ends and removes the container when dropped.
struct Container<'a> {
    containerd: &'a Containerd,
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let name = &self.containerd.container();
        let ctr = |arguments: &[&str]| command::output(self.containerd.ctr().args(arguments));
        let _ = ctr(&["tasks", "kill", "--signal", "KILL", name]);
        let _ = wait_until("end of the container", || Ok(ctr(&["tasks", "delete", name]).is_ok()));
        let _ = ctr(&["containers", "delete", name]);
    }
}
