//! Waits until a service answers, from inside its network namespace.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::images::Service;
use crate::network::{Place, inside};

/// The longest start that is waited for.
const TIMEOUT: Duration = Duration::from_mins(2);
/// How often it is asked: well below what a start takes, without taking a processor from it.
const POLL: Duration = Duration::from_millis(1);

/// Returns as soon as `service` answers: in the network at the end of a link, or else in that of the container whose
/// process id is in `pid_file`.
pub fn wait_at(place: &Place, service: &Service, pid_file: &Path) -> Result<()> {
    if let Some(namespace) = place.namespace() {
        return wait_in(service, namespace, None);
    }
    let pid = fs::read_to_string(pid_file)?;
    wait_in(service, &format!("/proc/{}/ns/net", pid.trim()), None)
}

/// Returns as soon as `service` answers in a network namespace, or `starter`, which brings it up, has failed.
pub fn wait_in(service: &Service, namespace: &str, mut starter: Option<&mut Child>) -> Result<()> {
    inside(Path::new(namespace), || {
        let started = Instant::now();
        while !answers(service) {
            if started.elapsed() > TIMEOUT {
                bail!("{} does not answer", service.name);
            }
            if let Some(child) = &mut starter
                && let Some(status) = child.try_wait()?
                && !status.success()
            {
                bail!("{} did not come up: {status}", service.name);
            }
            std::thread::sleep(POLL);
        }
        Ok(())
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
