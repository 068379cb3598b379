//! Launching: runc boots while the root file system of its container is still being made.
//!
//! ```text
//! Launch::run  --spawn-->  runc: loads, reads BUNDLE/config.json ... waits
//! resolve, diff, fetch, mount
//! finish(spec) --pipe--->  config.json arrives: namespaces, cgroup, mounts, the process
//! ```
//!
//! `config.json` is a symbolic link to a descriptor that runc inherits, the end of a pipe: booting takes runc 10 ms or
//! more, which then cost nothing. If this process dies first, the pipe ends and so does runc, before it has made
//! anything; so it does when a launch is dropped. If it dies later, runc goes on (`orphan.rs`).
//!
//! The first move of a process between control groups in a while waits for an RCU grace period, 6 to 13 ms at HZ=250, and
//! runc makes one in every start; those that follow soon do not wait (`cgroup_threadgroup_rwsem`, a per-CPU lock whose
//! readers need no barrier while nobody writes). So a launch begins, and is finished, with a move that moves nothing, in
//! a thread of its own: that time passes while runc boots, or reads its configuration.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::unistd::Pid;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::sync::watch;

use super::{
    Forward, Sandbox, SandboxError, SandboxSpec, bundle, message, pump, remove_leftover, runc, wait,
};

/// runc, waiting to be told what to run. Needs a tokio runtime. Dropping it ends runc and removes the bundle.
pub struct Launch {
    runc: Runc,
    id: String,
    runc_root: PathBuf,
    config: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Launch {
    /// For a container whose process waits for [`Sandbox::start`]. `id` is unique on this machine and also the host
    /// name; `bundle` is made, `runc_root` if it is missing.
    pub fn create(id: &str, bundle: &Path, runc_root: &Path) -> Result<Self, SandboxError> {
        Self::begin(id, bundle, runc_root, &["create"])
    }

    /// For a container whose process starts at once, which is faster than one after the other.
    pub fn run(id: &str, bundle: &Path, runc_root: &Path) -> Result<Self, SandboxError> {
        Self::begin(id, bundle, runc_root, &["run", "--detach"])
    }

    fn begin(
        id: &str,
        bundle: &Path,
        runc_root: &Path,
        arguments: &[&'static str],
    ) -> Result<Self, SandboxError> {
        // Minimum kernel version 3.4.
        nix::sys::prctl::set_child_subreaper(true).map_err(|e| SandboxError::Runc(e.into()))?;
        for dir in [bundle, runc_root] {
            fs::create_dir_all(dir).map_err(SandboxError::io(dir))?;
        }
        move_nothing();
        let (config_read, config) = new_pipe()?;
        let (stdout, stdout_write) = new_pipe()?;
        let (stderr, stderr_write) = new_pipe()?;
        let link = bundle.join("config.json");
        let inherited = format!("/proc/self/fd/{}", config_read.as_raw_fd());
        std::os::unix::fs::symlink(inherited, &link).map_err(SandboxError::io(&link))?;
        let mut command = runc(runc_root);
        command.arg("--log").arg(bundle.join("runc.log")).args(arguments);
        command.arg("--bundle").arg(bundle);
        command.arg("--pid-file").arg(bundle.join("pid")).arg(id);
        command.stdin(Stdio::null()).stdout(stdout_write).stderr(stderr_write);
        // Whatever else this process starts in this moment gets the descriptor too, which harms nobody: it has nothing to
        // read but the configuration, and does not keep the pipe from ending.
        fcntl(&config_read, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|e| SandboxError::Runc(e.into()))?;
        let child = command.spawn().map_err(SandboxError::Runc)?;
        // The command keeps our copies of the write ends open: without this the pipes would never end.
        drop(command);
        let runc = Runc { child, name: arguments[0], bundle: Some(bundle.to_owned()) };
        Ok(Self { runc, id: id.to_owned(), runc_root: runc_root.to_owned(), config, stdout, stderr })
    }

    /// Makes the container.
    pub async fn finish(mut self, spec: SandboxSpec<'_>) -> Result<Sandbox, SandboxError> {
        move_nothing();
        let config = bundle::spec(&self.id, spec.rootfs, &spec.workload)?;
        let config = serde_json::to_vec(&config).map_err(|e| SandboxError::Configuration(e.to_string()))?;
        let sender = pipe::Sender::from_owned_fd(self.config).map_err(SandboxError::Runc)?;
        let bundle = self.runc.configure(sender, &config, &self.runc_root, &self.id).await?;

        let forward = spec.forward == Forward::Stdout;
        let tail = Arc::new(Mutex::default());
        let mut readers = Vec::new();
        for (pipe, to_stdout) in [(self.stdout, forward), (self.stderr, false)] {
            let reader = pipe::Receiver::from_owned_fd(pipe).map_err(SandboxError::Runc)?;
            let writer: Box<dyn AsyncWrite + Send + Unpin> =
                if to_stdout { Box::new(tokio::io::stdout()) } else { Box::new(tokio::io::stderr()) };
            readers.push(tokio::spawn(pump(reader, writer, spec.on_line.clone(), Arc::clone(&tail))));
        }
        let pid_file = bundle.join("pid");
        let text = fs::read_to_string(&pid_file).map_err(SandboxError::io(&pid_file))?;
        let pid = text
            .trim()
            .parse()
            .map_err(|_| SandboxError::Configuration(format!("runc wrote pid {text:?}")))?;
        let init = Pid::from_raw(pid);
        let (sender, exit) = watch::channel(None);
        tokio::task::spawn_blocking(move || {
            let _ = sender.send(Some(wait(init)));
        });
        let (id, runc_root) = (self.id, self.runc_root);
        Ok(Sandbox { id, bundle, runc_root, init, exit, tail, readers })
    }
}

/// The process, and its bundle until the container is made.
struct Runc {
    child: Child,
    name: &'static str,
    bundle: Option<PathBuf>,
}

impl Runc {
    /// Sends the configuration and waits until the container is made; returns its bundle.
    async fn configure(
        &mut self,
        mut sender: pipe::Sender,
        config: &[u8],
        runc_root: &Path,
        id: &str,
    ) -> Result<PathBuf, SandboxError> {
        let status = tokio::select! {
            // A runc that does not read has ended or is about to, and says why.
            _ = sender.write_all(config) => None,
            status = self.child.wait() => Some(status),
        };
        drop(sender);
        let status = match status {
            Some(status) => status,
            None => self.child.wait().await,
        };
        if status.map_err(SandboxError::Runc)?.success()
            && let Some(bundle) = self.bundle.take()
        {
            return Ok(bundle);
        }
        let log = self.bundle.as_ref().map(|b| fs::read_to_string(b.join("runc.log")).unwrap_or_default());
        let _ = remove_leftover(runc_root, id).await;
        Err(SandboxError::Refused { command: self.name, message: message(&log.unwrap_or_default()) })
    }

    /// Ends it, for good: nothing may appear in the bundle later.
    fn end(&mut self) -> io::Result<ExitStatus> {
        let _ = self.child.start_kill();
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(status),
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        let Some(bundle) = self.bundle.take() else { return };
        if let Err(error) = self.end().and_then(|_| fs::remove_dir_all(&bundle)) {
            tracing::warn!(bundle = %bundle.display(), %error, "bundle left behind");
        }
    }
}

/// Moves this process to the control group that it is in, in a thread that nobody waits for.
fn move_nothing() {
    let thread = thread::Builder::new().name("tdfs-cgroup".into()).spawn(|| {
        if let Err(error) = move_to_own_group() {
            tracing::debug!(%error, "runc will wait for an RCU grace period");
        }
    });
    // Where threads are scarce runc waits instead.
    drop(thread);
}

fn move_to_own_group() -> io::Result<()> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    // Version 2 alone is mounted at the first, beside version 1 at the second.
    let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
    let mut processes = mounts.iter().map(|mount| Path::new(mount).join(own).join("cgroup.procs"));
    let processes = processes.find(|path| path.exists()).ok_or(io::ErrorKind::NotFound)?;
    fs::OpenOptions::new().write(true).open(processes)?.write_all(b"0")
}

fn new_pipe() -> Result<(OwnedFd, OwnedFd), SandboxError> {
    nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| SandboxError::Runc(e.into()))
}
