//! Run directories: what a process has mounted and started, and who cleans up when it died.
//!
//! ```text
//! run/ID/           a run directory, mode 0700: host users must not reach setuid programs of images
//!   owner           "PID START-TIME\n"; exclusively flocked as long as the owner lives
//!   root/ ...       mount points and files, known only to their makers
//! ```
//!
//! The lock decides; the kernel drops it with the process, however that ends. Whoever then takes it unmounts everything
//! below the directory and removes it, `owner` last, so that a crash in between leaves a directory that the next one
//! removes.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::mount;

const OWNER: &str = "owner";

/// A run directory that this process owns; dropping it removes it, if everything in it is gone.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl RunDir {
    /// Makes `path`, or takes over what a dead process left there.
    pub fn create(path: &Path) -> io::Result<Self> {
        loop {
            match DirBuilder::new().mode(0o700).create(path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            let path = path.canonicalize()?;
            let Some(mut lock) = lock(&path, true)? else { continue };
            clear(&path)?;
            let stat = std::fs::read_to_string("/proc/self/stat")?;
            // Fields count from behind the program's name, which may hold blanks; field 22 is the start time.
            let start =
                stat.rsplit(')').next().and_then(|s| s.split_whitespace().nth(19)).unwrap_or_default();
            lock.set_len(0)?;
            lock.write_all(format!("{} {start}\n", std::process::id()).as_bytes())?;
            return Ok(Self { path, _lock: lock });
        }
    }

    /// Its name, unique among the run directories beside it.
    pub fn id(&self) -> std::borrow::Cow<'_, str> {
        self.path.file_name().unwrap_or_default().to_string_lossy()
    }

    /// The directory, canonical.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let removed =
            std::fs::remove_file(self.path.join(OWNER)).and_then(|()| std::fs::remove_dir(&self.path));
        if let Err(error) = removed {
            tracing::warn!(path = %self.path.display(), %error, "run directory left behind");
        }
    }
}

/// Removes the run directories in `parent` whose owners are dead, with everything mounted below them, each after `end` has
/// ended whatever may still write into it; returns which. A container that still runs on such a mount keeps it, without
/// its cold pages.
pub fn recover(parent: &Path, end: impl Fn(&Path) -> io::Result<()>) -> io::Result<Vec<PathBuf>> {
    let mut recovered = Vec::new();
    let parent = match parent.canonicalize() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(recovered),
        parent => parent?,
    };
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let path = entry.path();
        let lock = match lock(&path, false) {
            Ok(Some(lock)) => lock,
            // Gone, or its owner lives.
            Ok(None) => continue,
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => continue,
            // Its maker died before it owned it. One that lives just makes it again.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let _ = std::fs::remove_dir(&path);
                continue;
            }
            Err(e) => return Err(e),
        };
        end(&path)?;
        clear(&path)?;
        drop(RunDir { path: path.clone(), _lock: lock });
        recovered.push(path);
    }
    Ok(recovered)
}

/// The owner's lock; `None` if the directory was removed meanwhile, `ResourceBusy` if somebody holds it.
fn lock(dir: &Path, create: bool) -> io::Result<Option<Flock<File>>> {
    let path = dir.join(OWNER);
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let file = match OpenOptions::new().read(true).write(true).create(create).custom_flags(flags).open(&path)
    {
        Err(e) if e.kind() == io::ErrorKind::NotFound && create => return Ok(None),
        file => file?,
    };
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok((lock.metadata()?.nlink() > 0).then_some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => {
            let owner = std::fs::read_to_string(&path).unwrap_or_default();
            let owner = owner.split(' ').next().unwrap_or_default().to_owned();
            let text = format!("{} is in use by process {owner}", dir.display());
            Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
        }
        Err((_, e)) => Err(e.into()),
    }
}

/// Empties a run directory, but for the lock.
fn clear(dir: &Path) -> io::Result<()> {
    mount::unmount_below(dir)?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name() == OWNER {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING_RUNS: fn(&Path) -> io::Result<()> = |_| Ok(());

    #[test]
    fn living_owners_are_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let run = RunDir::create(&parent.path().join("a")).unwrap();
        std::fs::write(run.path().join("file"), "x").unwrap();
        assert_eq!(recover(parent.path(), NOTHING_RUNS).unwrap(), Vec::<PathBuf>::new());
        let error = RunDir::create(run.path()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        assert!(run.path().join("file").exists());
    }

    #[test]
    fn what_the_dead_left_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let dead = parent.path().canonicalize().unwrap().join("dead");
        std::fs::create_dir_all(dead.join("c0/upper/deep")).unwrap();
        std::fs::write(dead.join("c0/upper/deep/file"), "x").unwrap();
        std::fs::write(dead.join(OWNER), "1 1\n").unwrap();
        std::fs::create_dir(parent.path().join("other")).unwrap();
        std::fs::write(parent.path().join("other/file"), "x").unwrap();
        assert_eq!(recover(parent.path(), NOTHING_RUNS).unwrap(), [dead.as_path()]);
        assert!(!dead.exists());
        assert!(parent.path().join("other/file").exists());
    }

    #[test]
    fn a_dead_directory_is_taken_over() {
        let parent = tempfile::tempdir().unwrap();
        let dead = parent.path().join("dead");
        std::fs::create_dir_all(dead.join("root")).unwrap();
        std::fs::write(dead.join(OWNER), "1 1\n").unwrap();
        let run = RunDir::create(&dead).unwrap();
        assert!(!dead.join("root").exists());
        drop(run);
        assert!(!dead.exists());
    }

    #[test]
    fn nothing_to_recover_is_no_error() {
        assert!(recover(Path::new("/nonexistent/run"), NOTHING_RUNS).unwrap().is_empty());
    }
}
