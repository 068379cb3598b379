//! A writable overlay for one container on top of a shared root file system.
//!
//! ```text
//! DIR/upper    what the container writes; starts as an empty copy of the lower root directory
//! DIR/work     overlayfs's own
//! DIR/merged   the mount
//! ```
//!
//! DIR belongs into a run directory, so that it is cleaned up after a crash.

use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::UtimensatFlags;
use nix::sys::time::TimeSpec;

use super::RootfsError;
use super::mount::{self, Context};

/// A mounted overlay; dropping it unmounts it and removes what the container wrote.
#[derive(Debug)]
pub struct Overlay {
    dir: PathBuf,
    merged: PathBuf,
    mounted: bool,
}

impl Overlay {
    /// Mounts an overlay over `lower` with its directories in `dir`, which is made if need be.
    pub fn mount(lower: &Path, dir: &Path) -> Result<Self, RootfsError> {
        let failed = RootfsError::io(dir);
        std::fs::create_dir_all(dir).map_err(&failed)?;
        let dir = dir.canonicalize().map_err(&failed)?;
        let mut overlay = Self { merged: dir.join("merged"), dir, mounted: false };
        let (upper, work) = (overlay.dir.join("upper"), overlay.dir.join("work"));
        for made in [&upper, &work, &overlay.merged] {
            std::fs::create_dir(made).map_err(&failed)?;
        }
        copy_attributes(lower, &upper).map_err(&failed)?;

        let context = Context::open("overlay")?;
        context.set("source", "tdfs")?;
        context.set("lowerdir", escape(lower))?;
        context.set("upperdir", escape(&upper))?;
        context.set("workdir", escape(&work))?;
        context.create()?;
        mount::attach(&context.mount(0)?, &overlay.merged).map_err(RootfsError::io(&overlay.merged))?;
        overlay.mounted = true;
        Ok(overlay)
    }

    /// The merged directory.
    pub fn path(&self) -> &Path {
        &self.merged
    }

    /// What the container has written so far.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Unmounts and removes everything.
    pub fn unmount(mut self) -> Result<(), RootfsError> {
        self.remove().map_err(RootfsError::io(&self.dir))
    }

    fn remove(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.mounted) {
            mount::unmount(&self.merged)?;
        }
        for made in ["merged", "work", "upper"] {
            match std::fs::remove_dir_all(self.dir.join(made)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        match std::fs::remove_dir(&self.dir) {
            // Whoever put something else there removes the directory.
            Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
                Err(e)
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(dir = %self.dir.display(), %error, "overlay left behind");
        }
    }
}

/// overlayfs splits lower directories at colons and takes backslashes for escapes.
fn escape(path: &Path) -> OsString {
    let escaped = path.as_os_str().as_bytes().iter().flat_map(|b| {
        let special = matches!(b, b':' | b'\\');
        special.then_some(b'\\').into_iter().chain([*b])
    });
    OsString::from_vec(escaped.collect())
}

/// The merged root has the attributes of the upper directory.
fn copy_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let meta = from.metadata()?;
    for name in list_xattrs(from)? {
        // Not every upper file system has every attribute; the lower ones stay hidden either way.
        if let Err(error) = copy_xattr(from, to, &name) {
            tracing::warn!(name = %name.to_string_lossy(), %error, "attribute of the root directory not copied");
        }
    }
    std::os::unix::fs::chown(to, Some(meta.uid()), Some(meta.gid()))?;
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    let mtime = TimeSpec::new(meta.mtime(), meta.mtime_nsec());
    nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, to, &mtime, &mtime, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}

fn list_xattrs(path: &Path) -> io::Result<Vec<CString>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut names = vec![0u8; 65536];
    // SAFETY: the buffer is as long as said and outlives the call.
    let len = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    names[..len].split(|b| *b == 0).filter(|n| !n.is_empty()).map(|n| Ok(CString::new(n)?)).collect()
}

fn copy_xattr(from: &Path, to: &Path, name: &CString) -> io::Result<()> {
    let (from, to) = (CString::new(from.as_os_str().as_bytes())?, CString::new(to.as_os_str().as_bytes())?);
    let mut value = vec![0u8; 65536];
    // SAFETY: the buffer is as long as said and outlives the call.
    let len =
        unsafe { libc::lgetxattr(from.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: `len` bytes of the buffer were just filled.
    let done = unsafe { libc::lsetxattr(to.as_ptr(), name.as_ptr(), value.as_ptr().cast(), len, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_escaped() {
        assert_eq!(escape(Path::new(r"/a:b\c,d")), OsString::from(r"/a\:b\\c,d"));
    }
}
