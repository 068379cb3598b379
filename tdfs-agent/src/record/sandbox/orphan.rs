//! Orphans: runc that goes on making a container after the process that started it has died.
//!
//! It would make directories in the place of the root file system after that was unmounted. Found by its command line, in
//! which the bundle stands; stopped first, so that it starts nothing more, and killed after all that it had started.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// For one orphan; the kernel ends what is killed in milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Ends whatever works on a bundle below `dir`, a canonical path, and waits until it has ended.
pub fn end_orphans(dir: &Path) -> io::Result<()> {
    for pid in processes()? {
        // A process that is gone has no arguments.
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if bundle_in(&arguments).is_some_and(|bundle| bundle.starts_with(dir)) {
            end(pid)?;
            tracing::info!(%pid, dir = %dir.display(), "ended runc, whose owner is dead");
        }
    }
    Ok(())
}

fn bundle_in(arguments: &[u8]) -> Option<&Path> {
    let mut arguments = arguments.split(|byte| *byte == 0);
    arguments.find(|a| *a == b"--bundle")?;
    arguments.next().map(|bundle| Path::new(OsStr::from_bytes(bundle)))
}

fn end(pid: Pid) -> io::Result<()> {
    let begin = Instant::now();
    send(pid, Signal::SIGSTOP)?;
    loop {
        let stopped = !matches!(process(pid), Some(Process { state: b'R' | b'S' | b'D', .. }));
        let children: Vec<Pid> =
            processes()?.filter(|p| process(*p).is_some_and(|p| p.parent == pid && p.lives())).collect();
        if stopped && children.is_empty() {
            send(pid, Signal::SIGKILL)?;
            if !process(pid).is_some_and(|p| p.lives()) {
                return Ok(());
            }
        }
        for child in children {
            send(child, Signal::SIGKILL)?;
        }
        if begin.elapsed() > PATIENCE {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {pid} does not end")));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// To a process that may have ended.
fn send(pid: Pid, signal: Signal) -> io::Result<()> {
    match kill(pid, signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// What proc(5) says of a process.
struct Process {
    state: u8,
    parent: Pid,
}

impl Process {
    /// Whether it can still do something.
    fn lives(&self) -> bool {
        !matches!(self.state, b'Z' | b'X')
    }
}

fn process(pid: Pid) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name of the program, which may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    Some(Process { state, parent: Pid::from_raw(fields.next()?.parse().ok()?) })
}

fn processes() -> io::Result<impl Iterator<Item = Pid>> {
    let pid = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    Ok(fs::read_dir("/proc")?.filter_map(pid).map(Pid::from_raw))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn what_works_on_a_bundle_ends_with_its_children() {
        let start = |bundle: &str| {
            let mut sh = Command::new("sh");
            sh.args(["-c", "sleep 300 & sleep 300; true", "runc", "--bundle", bundle, "id"]).spawn().unwrap()
        };
        let children_of = |pid: u32| -> Vec<Pid> {
            let pid = Pid::from_raw(pid.cast_signed());
            processes().unwrap().filter(|p| process(*p).is_some_and(|p| p.parent == pid)).collect()
        };
        let (mut orphan, mut other) = (start("/run/orphan/bundle"), start("/run/orphan2/bundle"));
        while children_of(orphan.id()).len() < 2 || children_of(other.id()).len() < 2 {
            thread::sleep(Duration::from_millis(1));
        }
        let children = children_of(orphan.id());
        end_orphans(Path::new("/run/orphan")).unwrap();
        assert_eq!(orphan.try_wait().unwrap().and_then(|s| s.signal()), Some(Signal::SIGKILL as i32));
        assert!(children.iter().all(|c| !process(*c).is_some_and(|p| p.lives())));
        assert!(other.try_wait().unwrap().is_none());
        assert_eq!(children_of(other.id()).len(), 2);
        end_orphans(Path::new("/run/orphan2")).unwrap();
        assert!(other.wait().unwrap().signal().is_some());
    }
}
