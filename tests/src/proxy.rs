//! A TCP proxy in front of a registry that delivers answers slowly, or one of them not at all. Little lies in between:
//! what the client has not got, the registry has not sent.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::{RcvBuf, TcpMaxSeg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket};

/// Bytes passed on at a time.
const PIECE: usize = 16 << 10;
/// Bytes that the kernel may take from the registry beforehand, for each connection.
const AHEAD: usize = 32 << 10;
/// Bytes of a TCP segment between registry and proxy.
const SEGMENT: u32 = 1460;

/// What the proxy does to answers.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Passes on so many bytes a second, all connections together.
    BytesPerSecond(u64),
    /// The first connection that has brought so many bytes brings no more; all others are not slowed down.
    StallAfter(u64),
    /// After so many bytes of a connection the others come one by one, with pauses, for ever.
    TrickleAfter(u64, Duration),
    /// After so many bytes, all connections together, every connection breaks and none is made any more.
    CloseAfter(u64),
}

/// The running proxy; its connections break when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub addr: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pace: Pace,
    begin: Instant,
    passed: AtomicU64,
    hurried: AtomicBool,
    stalled: AtomicBool,
    closed: AtomicBool,
    connections: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    /// Starts a proxy in front of `upstream` on a free loopback port.
    pub fn start(upstream: SocketAddr, pace: Pace) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            pace,
            begin: Instant::now(),
            passed: AtomicU64::new(0),
            hurried: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                if serving.closed.load(Ordering::Relaxed) {
                    return;
                }
                // A client whose connection cannot be passed on finds it closed.
                let _ = serving.connect(client, upstream);
            }
        });
        Ok(Self { addr, shared })
    }

    /// Bytes of answers passed on so far.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::Relaxed)
    }

    /// Slows nothing down any more.
    pub fn hurry(&self) {
        self.shared.hurried.store(true, Ordering::Relaxed);
    }

    /// Whether a connection was stalled.
    #[must_use]
    pub fn stalled(&self) -> bool {
        self.shared.stalled.load(Ordering::Relaxed)
    }

    /// Breaks every connection and refuses new ones.
    pub fn close(&self) {
        self.shared.close();
        // Wakes the listener.
        let _ = TcpStream::connect(self.addr);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.close();
    }
}

/// A connection in which the kernel holds little. A large segment size, as loopback has, would make the sender's buffer
/// large.
fn connect(upstream: SocketAddr) -> io::Result<TcpStream> {
    let family = if upstream.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, RcvBuf, &AHEAD)?;
    setsockopt(&socket, TcpMaxSeg, &SEGMENT)?;
    nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(upstream))?;
    Ok(socket.into())
}

impl Shared {
    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        for connection in self.connections().drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    fn connect(self: &Arc<Self>, client: TcpStream, upstream: SocketAddr) -> io::Result<()> {
        let server = connect(upstream)?;
        server.set_nodelay(true)?;
        client.set_nodelay(true)?;
        self.connections().extend([client.try_clone()?, server.try_clone()?]);
        if self.closed.load(Ordering::Relaxed) {
            self.close();
        }
        let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
        let shared = Arc::clone(self);
        thread::spawn(move || {
            let _ = shared.answer(server, &client);
            let _ = client.shutdown(Shutdown::Both);
        });
        Ok(())
    }

    /// Passes the answers of one connection on.
    fn answer(&self, mut from: TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let (mut brought, mut buffer) = (0, [0; PIECE]);
        loop {
            let len = from.read(&mut buffer)?;
            if len == 0 {
                return Ok(());
            }
            brought += len as u64;
            let passed = self.passed.fetch_add(len as u64, Ordering::Relaxed);
            match self.pace {
                _ if self.hurried.load(Ordering::Relaxed) => {}
                Pace::BytesPerSecond(rate) => {
                    let due = Duration::from_secs_f64(passed as f64 / rate as f64);
                    thread::sleep(due.saturating_sub(self.begin.elapsed()));
                }
                Pace::StallAfter(bytes) => {
                    if brought > bytes && !self.stalled.swap(true, Ordering::Relaxed) {
                        // Until the client has had enough of it.
                        while to.peek(&mut [0])? > 0 {
                            thread::sleep(Duration::from_millis(10));
                        }
                        return Ok(());
                    }
                }
                Pace::TrickleAfter(bytes, pause) => {
                    let quick = bytes.saturating_sub(brought - len as u64).min(len as u64) as usize;
                    to.write_all(&buffer[..quick])?;
                    for byte in &buffer[quick..len] {
                        thread::sleep(pause);
                        to.write_all(&[*byte])?;
                    }
                    continue;
                }
                Pace::CloseAfter(bytes) => {
                    if passed + len as u64 > bytes {
                        self.close();
                        return Ok(());
                    }
                }
            }
            to.write_all(&buffer[..len])?;
        }
    }

    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
