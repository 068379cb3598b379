//! Mounting by fsopen(2), fsconfig(2), fsmount(2) and move_mount(2) (kernel 5.2), and unmounting.
//!
//! Unlike mount(2) this takes options of any number and length, gives the file system's own error text, and a mount
//! can stay attached nowhere.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::MntFlags;

/// A mount failed.
#[derive(Debug, thiserror::Error)]
#[error("mount {what}: {call}: {source}{}{log}", if log.is_empty() { "" } else { ": " })]
pub struct MountError {
    /// File system.
    pub what: &'static str,
    /// The step.
    pub call: &'static str,
    /// What the kernel said about it.
    pub log: String,
    /// The step's error.
    pub source: io::Error,
}

/// A file system being configured.
pub struct Context {
    fd: OwnedFd,
    what: &'static str,
}

impl Context {
    /// Starts with a file system type.
    pub fn open(what: &'static str) -> Result<Self, MountError> {
        let name = CString::new(what).unwrap_or_default();
        // SAFETY: fsopen(name, flags) with a C string that lives through the call.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), libc::FSOPEN_CLOEXEC) };
        let fd =
            new_fd(fd).map_err(|source| MountError { what, call: "fsopen", log: String::new(), source })?;
        Ok(Self { fd, what })
    }

    /// Sets an option.
    pub fn set(&self, key: &'static str, value: impl AsRef<OsStr>) -> Result<(), MountError> {
        let value = CString::new(value.as_ref().as_bytes()).map_err(|e| self.failed(key, e.into()))?;
        self.config(libc::FSCONFIG_SET_STRING, Some(key), Some(&value))
    }

    /// Sets an option without a value.
    pub fn flag(&self, key: &'static str) -> Result<(), MountError> {
        self.config(libc::FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Makes the file system, mounted nowhere.
    pub fn create(&self) -> Result<(), MountError> {
        self.config(libc::FSCONFIG_CMD_CREATE, None, None)
    }

    /// The mount, attached nowhere; it goes when the descriptor closes, unless it was attached or files on it are open.
    pub fn mount(self, attributes: u64) -> Result<OwnedFd, MountError> {
        // SAFETY: fsmount(fd, flags, attributes) takes integers only.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.fd.as_raw_fd(),
                libc::FSMOUNT_CLOEXEC,
                attributes as libc::c_uint,
            )
        };
        new_fd(fd).map_err(|e| self.failed("fsmount", e))
    }

    fn config(
        &self,
        command: u32,
        key: Option<&'static str>,
        value: Option<&CStr>,
    ) -> Result<(), MountError> {
        let name = key.map(|k| CString::new(k).unwrap_or_default());
        let key_ptr = name.as_ref().map_or(std::ptr::null(), |k| k.as_ptr());
        let value_ptr = value.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: fsconfig(fd, command, key, value, aux) with C strings or null as the command wants; both outlive the
        // call.
        let done =
            unsafe { libc::syscall(libc::SYS_fsconfig, self.fd.as_raw_fd(), command, key_ptr, value_ptr, 0) };
        if done == 0 { Ok(()) } else { Err(self.failed(key.unwrap_or("create"), io::Error::last_os_error())) }
    }

    /// Adds the messages the kernel left in the context.
    fn failed(&self, call: &'static str, source: io::Error) -> MountError {
        let mut log = Vec::new();
        let mut message = [0; 512];
        while let Ok(len @ 1..) = nix::unistd::read(&self.fd, &mut message) {
            // Each starts with a level and a blank.
            log.push(String::from_utf8_lossy(message[..len].get(2..).unwrap_or_default()).trim().to_owned());
        }
        MountError { what: self.what, call, log: log.join("; "), source }
    }
}

fn new_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just returned this descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

/// Attaches a mount to a directory.
pub fn attach(mount: &OwnedFd, at: &Path) -> io::Result<()> {
    let at = CString::new(at.as_os_str().as_bytes())?;
    // SAFETY: move_mount(from, from path, to, to path, flags) with C strings that live through the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            at.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A path by which the kernel opens what `fd` refers to, also if that has no name.
pub fn fd_path(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()))
}

/// Unmounts the file system at `at`. If it stays busy, it is detached: gone from the tree, and ended by its last user.
pub fn unmount(at: &Path) -> io::Result<()> {
    // The kernel lets go of files a little after the process that had them open.
    for _ in 0..20 {
        match nix::mount::umount2(at, MntFlags::UMOUNT_NOFOLLOW) {
            Err(Errno::EBUSY) => std::thread::sleep(Duration::from_millis(10)),
            done => return Ok(done?),
        }
    }
    tracing::warn!(path = %at.display(), "still in use: detached");
    Ok(nix::mount::umount2(at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?)
}

/// Unmounts everything below `dir`, which must be a canonical path, last mounted first.
pub fn unmount_below(dir: &Path) -> io::Result<()> {
    for point in mount_points()?.iter().rev().filter(|p| p.starts_with(dir) && *p != dir) {
        unmount(point)?;
    }
    match mount_points()?.iter().find(|p| p.starts_with(dir) && *p != dir) {
        Some(left) => Err(io::Error::other(format!("{} is still mounted", left.display()))),
        None => Ok(()),
    }
}

/// Mount points of this mount namespace, in the order of mounting.
fn mount_points() -> io::Result<Vec<PathBuf>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let point = |line: &[u8]| {
        line.split(|b| *b == b' ').nth(4).map(|p| PathBuf::from(OsStr::from_bytes(&unescape(p))))
    };
    Ok(table.split(|b| *b == b'\n').filter_map(point).collect())
}

/// `\040` and the like, as the kernel writes blanks, tabs, newlines and backslashes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|_| first == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        if let Some(byte) = code.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(br"/a\040b\134c\011\012"), b"/a b\\c\t\n");
        assert_eq!(unescape(br"/a\04"), br"/a\04");
        assert_eq!(unescape(br"/a\999"), br"/a\999");
        assert!(mount_points().unwrap().contains(&PathBuf::from("/")));
    }

    #[test]
    fn failure_names_file_system_and_step() {
        let error = Context::open("tdfs-none").err().unwrap();
        assert!(error.to_string().starts_with("mount tdfs-none: fsopen: "), "{error}");
    }
}
