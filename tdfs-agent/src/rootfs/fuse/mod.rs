//! A FUSE file system that is one file: the cold device, as the kernel sees it.
//!
//! The mount is attached nowhere. The open file keeps it alive, and it ends with the EROFS mount that uses the file, so
//! a crash leaves nothing of it behind.

pub mod protocol;
mod server;

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::cold::ColdDevice;
use super::mount::{self, Context, MountError};
pub use server::Server;

/// Serves `device` as a file, which this returns opened.
pub fn serve(device: Arc<ColdDevice>, runtime: &Handle) -> Result<(Server, File), MountError> {
    let failed = |call, source| MountError { what: "fuse", call, log: String::new(), source };
    let dev_fuse = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/fuse");
    let dev_fuse: OwnedFd = dev_fuse.map_err(|e| failed("open /dev/fuse", e))?.into();
    let context = Context::open("fuse")?;
    context.set("source", "tdfs-cold")?;
    context.set("fd", dev_fuse.as_raw_fd().to_string())?;
    context.set("rootmode", "100400")?;
    context.set("user_id", "0")?;
    context.set("group_id", "0")?;
    context.create()?;
    let server =
        Server::start(dev_fuse, device, runtime.clone()).map_err(|e| failed("start the server", e))?;
    let root = context.mount(libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV)?;
    let open = || {
        let file = File::open(mount::fd_path(&root))?;
        // Makes the kernel ask for the size; until then it takes the root node for an empty file.
        file.metadata()?;
        Ok(file)
    };
    let file = open().map_err(|e| failed("open the cold device", e))?;
    Ok((server, file))
}
