//! Answers the kernel's requests for one file.
//!
//! A thread takes requests from `/dev/fuse` and answers at once what it can. A READ that has to wait becomes a tokio
//! task, and any number of them wait at a time. A request that is dropped unanswered (source panicked, runtime gone,
//! server stopped) is answered EIO. When the server's last descriptor of `/dev/fuse` closes, also by `kill -9`, the kernel answers EIO
//! to everything: no way leads to zeros.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::thread::JoinHandle;

use futures_util::FutureExt;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::EventFd;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use zerocopy::IntoBytes;

use super::protocol::{self, Answer, OutHeader};
use crate::rootfs::cold::ColdDevice;

/// A running server; stops when dropped, whereupon readers get EIO.
pub struct Server {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `file` on `device`, a non-blocking descriptor of `/dev/fuse`, with reads on `runtime`.
    pub fn start(device: OwnedFd, file: Arc<ColdDevice>, runtime: Handle) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new()?);
        let stopped = Arc::clone(&stop);
        let serve = move || {
            if let Err(error) = serve(&Arc::new(device), &stopped, &file, &runtime) {
                tracing::error!(%error, "cold device stopped: cold reads fail from now on");
            }
        };
        let thread = std::thread::Builder::new().name("tdfs-cold".into()).spawn(serve)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let stopped = self.stop.write(1);
        if let Some(thread) = self.thread.take().filter(|_| stopped.is_ok()) {
            let _ = thread.join();
        }
    }
}

/// Until the file system is unmounted or `stop` is signalled.
fn serve(device: &Arc<OwnedFd>, stop: &EventFd, file: &Arc<ColdDevice>, runtime: &Handle) -> io::Result<()> {
    let mut reads = JoinSet::new();
    let mut buffer = [0; protocol::REQUEST_MAX];
    loop {
        let len = match nix::unistd::read(device, &mut buffer) {
            Ok(len) => len,
            Err(Errno::EAGAIN) => {
                let mut fds = [
                    PollFd::new(device.as_fd(), PollFlags::POLLIN),
                    PollFd::new(stop.as_fd(), PollFlags::POLLIN),
                ];
                match nix::poll::poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) if fds[1].any() == Some(true) => return Ok(()),
                    Ok(_) | Err(Errno::EINTR) => continue,
                    Err(e) => return Err(e.into()),
                }
            }
            // ENOENT: the reader was killed before its request got here.
            Err(Errno::EINTR | Errno::ENOENT) => continue,
            Err(Errno::ENODEV) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let Some((unique, answer)) = protocol::answer(&buffer[..len], file.size()) else {
            return Err(io::Error::other("request without a header"));
        };
        if answer == Answer::Nothing {
            continue;
        }
        let reply = Reply { device: Arc::clone(device), unique, sent: false };
        match answer {
            Answer::Nothing => {}
            Answer::Body(body) => reply.send(Ok(&body)),
            Answer::Error(errno) => reply.send(Err(errno)),
            Answer::Read { offset, len } => {
                let file = Arc::clone(file);
                let read = async move {
                    let data = file.read(offset, len).await;
                    if let Err(errno) = data {
                        tracing::warn!(offset, len, errno, "cold read failed");
                    }
                    reply.send(data.as_deref().map_err(|e| *e));
                };
                // A task costs more than twice as much as a read of what is at hand.
                let mut read = AssertUnwindSafe(read).catch_unwind().boxed();
                let _runtime = runtime.enter();
                if read.poll_unpin(&mut Context::from_waker(Waker::noop())).is_pending() {
                    reads.spawn_on(read, runtime);
                }
            }
        }
        while reads.try_join_next().is_some() {}
    }
}

/// The duty to answer one request.
struct Reply {
    device: Arc<OwnedFd>,
    unique: u64,
    sent: bool,
}

impl Reply {
    fn send(mut self, result: Result<&[u8], i32>) {
        self.write(result);
    }

    fn write(&mut self, result: Result<&[u8], i32>) {
        self.sent = true;
        let (body, error): (&[u8], i32) = match result {
            Ok(body) => (body, 0),
            Err(errno) if (1..512).contains(&errno) => (&[], -errno),
            // The kernel refuses other numbers, and the reader would wait for ever.
            Err(_) => (&[], -libc::EIO),
        };
        let len = size_of::<OutHeader>() + body.len();
        let header = OutHeader { len: len as u32, error, unique: self.unique };
        let written =
            nix::sys::uio::writev(&*self.device, &[IoSlice::new(header.as_bytes()), IoSlice::new(body)]);
        // ENOENT: nobody waits any more.
        if let Err(error) = written
            && !matches!(error, Errno::ENOENT | Errno::ENODEV)
        {
            tracing::error!(%error, "the kernel refused an answer");
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.sent {
            self.write(Err(libc::EIO));
        }
    }
}
