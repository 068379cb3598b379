//! A link with a round-trip time: two TUN devices and a thread for each direction that hands packets on later.
//!
//! ```text
//! namespace "registry"  [tun] -> read -> queue, each with its time -> write -> [tun]  namespace "node", and back
//! ```
//!
//! The kernel's own delay (netem) is not in every kernel. Packets pass as they are, also several segments in one
//! (`IFF_VNET_HDR`), so that the threads take little of the machine. A queue that is full drops what comes, like any other.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;

use super::inside;

/// A packet of the largest size with its header (`virtio_net_hdr`).
const PACKET_MAX: usize = (64 << 10) + 10;
/// Packets under way in one direction.
const QUEUE: usize = 8192;
/// How often a thread without packets looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);
/// `TUN_F_CSUM`, `TUN_F_TSO4`: packets may come without checksum, and as several segments in one.
const OFFLOADS: libc::c_int = 1 | 2;

nix::ioctl_write_ptr_bad!(
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);
nix::ioctl_write_int_bad!(tun_set_offload, nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>()));

/// Two devices whose packets reach each other later. They go when this is dropped.
#[derive(Debug)]
pub(super) struct Delay {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Delay {
    /// Makes a device called `name` in both namespaces; each packet takes `one_way`.
    pub(super) fn new(name: &str, namespaces: [&Path; 2], one_way: Duration) -> Result<Self> {
        let [one, other] = namespaces.map(|namespace| inside(namespace, || make(name)));
        let (one, other) = (Arc::new(one?), Arc::new(other?));
        let stop = Arc::new(AtomicBool::new(false));
        let forward = |from: &Arc<OwnedFd>, to: &Arc<OwnedFd>| {
            let (from, to, stop) = (Arc::clone(from), Arc::clone(to), Arc::clone(&stop));
            std::thread::spawn(move || {
                if let Err(error) = forward(&from, &to, one_way, &stop) {
                    eprintln!("the link has ended: {error}");
                }
            })
        };
        let threads = vec![forward(&one, &other), forward(&other, &one)];
        Ok(Self { stop, threads })
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A TUN device in the network it is made in; it lives as long as the descriptor.
fn make(name: &str) -> Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let tun = open("/dev/net/tun", flags, Mode::empty()).context("/dev/net/tun")?;
    // SAFETY: integers and a union of plain data, for all of which zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request is an ifreq that lives through the call, as TUNSETIFF wants.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) }.context("make a TUN device")?;
    // SAFETY: TUNSETOFFLOAD takes an integer.
    unsafe { tun_set_offload(tun.as_raw_fd(), OFFLOADS) }.context("set up a TUN device")?;
    Ok(tun)
}

/// Until `stop`.
fn forward(from: &OwnedFd, to: &OwnedFd, one_way: Duration, stop: &AtomicBool) -> io::Result<()> {
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut packet = vec![0; PACKET_MAX];
    while !stop.load(Ordering::Relaxed) {
        while let Some((_, packet)) = under_way.pop_front_if(|(due, _)| *due <= Instant::now()) {
            match nix::unistd::write(to, &packet) {
                // The device is not up yet or has no room: lost, as on a wire.
                Ok(_) | Err(Errno::EIO | Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let wait = under_way.front().map_or(LOOK, |(due, _)| due.saturating_duration_since(Instant::now()));
        let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut ready, Some(TimeSpec::from_duration(wait.min(LOOK))), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        loop {
            match nix::unistd::read(from, &mut packet) {
                Ok(len) if under_way.len() < QUEUE => {
                    under_way.push_back((Instant::now() + one_way, packet[..len].to_vec()));
                }
                Ok(_) => {}
                // Down, or nothing there.
                Err(Errno::EAGAIN | Errno::EIO | Errno::EINTR) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}
