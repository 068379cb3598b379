//! Read-ahead of one mount, through the kernel's backing device info in sysfs.
//!
//! A file-backed EROFS mount has a device info named `erofs-N`, N counted up and never used again; nothing else says
//! which N a mount has. So we compare the names before and after making the file system, and try again if another one was
//! made meanwhile.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::mount::{Context, MountError};

const SYSFS: &str = "/sys/class/bdi";
const ATTEMPTS: usize = 50;

/// The read-ahead of one mount.
#[derive(Clone, Debug)]
pub struct ReadAhead(PathBuf);

impl ReadAhead {
    /// Sets it for files opened from now on; an open file keeps what it had.
    pub fn set(&self, kib: u32) -> io::Result<()> {
        std::fs::write(&self.0, kib.to_string())
    }

    /// Makes an EROFS file system from a context that `configure` returns, which may be called more than once.
    pub fn of_new(
        configure: impl Fn() -> Result<Context, MountError>,
    ) -> Result<(Context, Self), MountError> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let failed = |source| MountError { what: "erofs", call: SYSFS, log: String::new(), source };
        for _ in 0..ATTEMPTS {
            let context = configure()?;
            let before = names().map_err(failed)?;
            context.create()?;
            let after = names().map_err(failed)?;
            let mut new = after.difference(&before);
            if let (Some(name), None) = (new.next(), new.next()) {
                return Ok((context, Self(Path::new(SYSFS).join(name).join("read_ahead_kb"))));
            }
        }
        Err(failed(io::Error::other("cannot tell which device info is the new mount's")))
    }
}

fn names() -> io::Result<BTreeSet<OsString>> {
    let names = std::fs::read_dir(SYSFS)?.map(|e| Ok(e?.file_name()));
    names.filter(|n| n.as_ref().map_or(true, |n| n.as_bytes().starts_with(b"erofs-"))).collect()
}
