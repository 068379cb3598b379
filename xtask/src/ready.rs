//! Waits until a service answers, from inside its network namespace.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::images::Service;

/// The longest start that is waited for.
const TIMEOUT: Duration = Duration::from_mins(2);
/// How often it is asked: well below what a start takes, without taking a processor from it.
const POLL: Duration = Duration::from_millis(1);

/// Returns as soon as `service`, one of whose processes is `pid`, answers.
pub fn wait(service: &Service, pid: u32) -> Result<()> {
    let namespace = format!("/proc/{pid}/ns/net");
    let namespace = File::open(&namespace).with_context(|| namespace.clone())?;
    // Only this thread enters the namespace, and it ends there.
    std::thread::scope(|scope| {
        let poll = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET).context("enter the network of the container")?;
            let started = Instant::now();
            while !answers(service) {
                if started.elapsed() > TIMEOUT {
                    bail!("{} does not answer", service.name);
                }
                std::thread::sleep(POLL);
            }
            Ok(())
        });
        poll.join().unwrap_or_else(|_| bail!("the poller panicked"))
    })
}

fn answers(service: &Service) -> bool {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, service.port)) else { return false };
    if !service.ready.starts_with("http:") {
        return true;
    }
    let mut status = [0; 12];
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").is_ok()
        && stream.read_exact(&mut status).is_ok()
        && status.ends_with(b" 200")
}
