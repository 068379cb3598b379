//! Two network namespaces, a registry's and a node's, with a link of known bandwidth between them.
//!
//! ```text
//! namespace "registry"  10.231.N.1 [veth]=========[veth] 10.231.N.2  namespace "node"
//!                              tbf in both directions
//! ```
//!
//! A link with a round-trip time is made of TUN devices instead (`network/delay.rs`).
//!
//! Programs enter by `nsenter --net`: `ip netns exec` would mount another /sys and hide the cgroups from runc. Both
//! namespaces are gone when the link is dropped; one left by a killed process is removed by the next with its name.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::command;

mod delay;

use delay::Delay;

/// Bandwidth of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bits per second.
    pub bits: u64,
}

/// Which end of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where servers run.
    Registry,
    /// Where containers start.
    Node,
}

/// What passed the link towards the node, as it is on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Bytes, with the headers of every packet.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
}

/// A network to run programs in.
#[derive(Clone, Debug)]
pub struct Place {
    namespace: Option<String>,
    /// The address to listen on there.
    pub address: String,
}

impl Place {
    /// This machine's own network, on loopback.
    pub fn here() -> Self {
        Self { namespace: None, address: "127.0.0.1".into() }
    }

    /// The file that stands for it, unless it is this machine's own.
    pub fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// `program` in this network.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some(namespace) = &self.namespace else { return Command::new(program) };
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={namespace}")).arg("--").arg(program);
        command
    }
}

/// Does `work` in the network that the file at `namespace` stands for.
///
/// # Errors
///
/// Where this process may not enter it, or `work` fails or panics.
pub fn inside<T: Send>(namespace: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(namespace).with_context(|| namespace.display().to_string())?;
    let entered = move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).context("enter the network")?;
        work()
    };
    // Only this thread enters the namespace, and it ends there.
    std::thread::scope(|scope| scope.spawn(entered).join()).unwrap_or_else(|_| bail!("panicked in a network"))
}

/// Two namespaces and the link between them.
#[derive(Debug)]
pub struct Link {
    name: String,
    subnet: u8,
    delay: Option<Delay>,
}

impl Link {
    /// Makes a link without a limit, with a round-trip time of `rtt` on top of its own. `number` tells links apart that
    /// exist at the same time.
    ///
    /// # Errors
    ///
    /// Where the kernel has no namespaces, veth or TUN, or this process may not make them.
    pub fn new(number: u8, rtt: Duration) -> Result<Self> {
        let mut link = Self { name: format!("tdfs-bench{number}"), subnet: number, delay: None };
        link.remove();
        for side in [Side::Registry, Side::Node] {
            ip(&["netns", "add", &link.namespace(side)])?;
        }
        let (registry, node) = (link.namespace(Side::Registry), link.namespace(Side::Node));
        if rtt.is_zero() {
            let (type_, peer) = (["type", "veth"], ["peer", "name", DEVICE, "netns", &node]);
            ip(&[&["link", "add", DEVICE, "netns", &registry][..], &type_, &peer].concat())?;
        } else {
            let namespaces = [link.file(Side::Registry), link.file(Side::Node)];
            link.delay = Some(Delay::new(DEVICE, [&namespaces[0], &namespaces[1]].map(Path::new), rtt / 2)?);
        }
        for side in [Side::Registry, Side::Node] {
            let namespace = link.namespace(side);
            ip(&["-n", &namespace, "addr", "add", &format!("{}/24", link.address(side)), "dev", DEVICE])?;
            for device in [DEVICE, "lo"] {
                ip(&["-n", &namespace, "link", "set", device, "up"])?;
            }
        }
        Ok(link)
    }

    /// The address of one end.
    pub fn address(&self, side: Side) -> String {
        format!("10.231.{}.{}", self.subnet, if side == Side::Registry { 1 } else { 2 })
    }

    /// Limits both directions to `rate`, or to nothing.
    ///
    /// # Errors
    ///
    /// Where the kernel has no token bucket filter.
    pub fn shape(&self, rate: Option<Rate>) -> Result<()> {
        for side in [Side::Registry, Side::Node] {
            let namespace = self.namespace(side);
            let tc = |arguments: &[&str]| {
                command::output(Command::new("tc").args(["-n", &namespace, "qdisc"]).args(arguments))
            };
            // There is none to delete before the first time.
            let _ = tc(&["del", "dev", DEVICE, "root"]);
            if let Some(Rate { bits }) = rate {
                let bytes = bits / 8;
                // The bucket holds 4 ms and the largest packet that the kernel hands on whole; the queue, 50 ms.
                let (burst, limit) = ((bytes / 250).max(128 << 10), (bytes / 20).max(256 << 10));
                let [rate, burst, limit] = [format!("{bits}bit"), burst.to_string(), limit.to_string()];
                tc(&["add", "dev", DEVICE, "root", "tbf", "rate", &rate, "burst", &burst, "limit", &limit])?;
            }
        }
        Ok(())
    }

    /// What was sent to the node since the link was shaped.
    ///
    /// # Errors
    ///
    /// When it is not shaped, or `tc` fails.
    pub fn passed(&self) -> Result<Passed> {
        let registry = self.namespace(Side::Registry);
        let mut tc = Command::new("tc");
        let shown = command::output(tc.args(["-n", &registry, "-s", "-j", "qdisc", "show", "dev", DEVICE]))?;
        let shown: Value = serde_json::from_str(&shown).context("the JSON of tc")?;
        let sent = &shown[0];
        ensure!(sent["kind"] == "tbf", "a link counts what passes while it is shaped");
        let number = |name: &str| sent[name].as_u64().with_context(|| format!("{name} in {sent}"));
        Ok(Passed { bytes: number("bytes")?, packets: number("packets")? })
    }

    /// One end, to run programs at.
    pub fn place(&self, side: Side) -> Place {
        Place { namespace: Some(self.file(side)), address: self.address(side) }
    }

    fn file(&self, side: Side) -> String {
        format!("/run/netns/{}", self.namespace(side))
    }

    fn namespace(&self, side: Side) -> String {
        format!("{}-{}", self.name, if side == Side::Registry { "registry" } else { "node" })
    }

    fn remove(&self) {
        for side in [Side::Registry, Side::Node] {
            let _ = ip(&["netns", "del", &self.namespace(side)]);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Its devices are in the namespaces.
        drop(self.delay.take());
        self.remove();
    }
}

impl std::ops::Sub for Passed {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self { bytes: self.bytes - earlier.bytes, packets: self.packets - earlier.packets }
    }
}

impl std::str::FromStr for Rate {
    type Err = String;

    /// `100mbit`, `1gbit`
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || format!("{text:?} is not a bandwidth such as 100mbit or 1gbit");
        let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?);
        let factor = match unit {
            "kbit" => 1_000,
            "mbit" => 1_000_000,
            "gbit" => 1_000_000_000,
            _ => return Err(bad()),
        };
        let number: u64 = digits.parse().map_err(|_| bad())?;
        let bits = number.checked_mul(factor).filter(|bits| *bits > 0).ok_or_else(bad)?;
        Ok(Self { bits })
    }
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.bits {
            bits if bits % 1_000_000_000 == 0 => write!(f, "{} Gb/s", bits / 1_000_000_000),
            bits if bits % 1_000_000 == 0 => write!(f, "{} Mb/s", bits / 1_000_000),
            bits => write!(f, "{} kb/s", bits / 1_000),
        }
    }
}

/// Both ends have this name: each is in its own namespace.
const DEVICE: &str = "tdfs";

fn ip(arguments: &[&str]) -> Result<String> {
    command::output(Command::new("ip").args(arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        for (text, shown) in [("100mbit", "100 Mb/s"), ("10gbit", "10 Gb/s"), ("1500mbit", "1500 Mb/s")] {
            assert_eq!(text.parse::<Rate>().map(|r| r.to_string()), Ok(shown.to_owned()));
        }
        for bad in ["", "mbit", "0gbit", "1gb", "10", "99999999999999gbit"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }
}
