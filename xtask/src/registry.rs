//! A docker-registry of our own on a free port, and what it says was asked of it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use tempfile::TempDir;

use crate::command;
use crate::daemon::Daemon;
use crate::network::Place;

/// A running registry; it and all that was pushed to it are gone when it is dropped.
pub struct Registry {
    place: Place,
    address: SocketAddr,
    log: PathBuf,
    // In this order: the server ends before its files go.
    _daemon: Daemon,
    _directory: TempDir,
}

/// What a registry answered, by its access log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// GET and HEAD requests.
    pub requests: u64,
    /// Bytes of the answers' bodies.
    pub bytes: u64,
}

impl Registry {
    /// Starts a registry at `place` whose files lie below `parent`.
    pub fn start(parent: &Path, place: &Place) -> Result<Self> {
        let directory = TempDir::with_prefix_in("registry-", parent)?;
        let config = directory.path().join("config.json");
        // JSON is YAML too.
        let settings = json!({
            "version": "0.1",
            "log": { "level": "info" },
            "storage": { "filesystem": { "rootdirectory": directory.path().join("data") } },
            "http": { "addr": format!("{}:0", place.address) },
        });
        fs::write(&config, settings.to_string()).with_context(|| config.display().to_string())?;
        let log = directory.path().join("log");
        let listening = || fs::read_to_string(&log).ok().as_deref().and_then(address_in);
        let is_up = || listening().is_some();
        let daemon = Daemon::start(place.command("docker-registry").arg("serve").arg(&config), &log, is_up)?;
        let address = listening().context("the address of the registry")?;
        Ok(Self { place: place.clone(), address, log, _daemon: daemon, _directory: directory })
    }

    /// Starts our own server, the program `tdfs`, the same way.
    pub fn start_tdfs(tdfs: &Path, parent: &Path, place: &Place) -> Result<Self> {
        let directory = TempDir::with_prefix_in("tdfs-registry-", parent)?;
        let log = directory.path().join("log");
        let mut server = place.command(tdfs);
        server.arg("registry").arg("--root").arg(directory.path().join("data"));
        server.args(["--listen", &format!("{}:0", place.address)]);
        let listening = || fs::read_to_string(&log).ok().as_deref().and_then(address_in);
        let daemon = Daemon::start(&mut server, &log, || listening().is_some())?;
        let address = listening().context("the address of the registry")?;
        Ok(Self { place: place.clone(), address, log, _daemon: daemon, _directory: directory })
    }

    /// Pushes the image of an OCI layout as `repository:latest`; returns the reference.
    pub fn push(&self, layout: &Path, repository: &str) -> Result<String> {
        let reference = format!("{}/{repository}:latest", self.address);
        command::output(
            self.place
                .command("skopeo")
                .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"])
                .arg(format!("oci:{}:latest", layout.display()))
                .arg(format!("docker://{reference}")),
        )?;
        Ok(reference)
    }

    /// What was asked of it since it started.
    pub fn traffic(&self) -> Result<Traffic> {
        let log = fs::read_to_string(&self.log).with_context(|| self.log.display().to_string())?;
        Ok(traffic(&log))
    }
}

impl std::ops::Sub for Traffic {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self { requests: self.requests - earlier.requests, bytes: self.bytes - earlier.bytes }
    }
}

/// The address after "listening on" in a registry's log.
fn address_in(log: &str) -> Option<SocketAddr> {
    let (_, rest) = log.split_once("listening on ")?;
    // Up to what ends the message: a line that is still being written has no end.
    let (address, _) = rest.split_once(['"', '\n'])?;
    address.parse().ok()
}

/// Adds up the lines of an access log in Apache's combined format: `… "GET /path HTTP/1.1" 200 1234 …`.
fn traffic(log: &str) -> Traffic {
    let mut traffic = Traffic::default();
    for line in log.lines() {
        let mut quoted = line.split('"');
        let (Some(_), Some(request), Some(answer)) = (quoted.next(), quoted.next(), quoted.next()) else {
            continue;
        };
        let bytes = answer.split_whitespace().nth(1).and_then(|bytes| bytes.parse::<u64>().ok());
        if let Some(bytes) = bytes
            && (request.starts_with("GET ") || request.starts_with("HEAD "))
        {
            traffic.requests += 1;
            // A HEAD is logged with the length that a GET would have.
            traffic.bytes += if request.starts_with("GET ") { bytes } else { 0 };
        }
    }
    traffic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_address() {
        let line = "level=info msg=\"listening on 127.0.0.1:41000\" go.version=go1.19\n";
        assert_eq!(address_in(line), "127.0.0.1:41000".parse().ok());
        assert_eq!(address_in(&line[..line.len() - 25]), None, "half a line");
    }

    #[test]
    fn reads_the_access_log() {
        let log = "time=\"2024-01-01\" level=error msg=\"GET nothing\"\n\
            127.0.0.1 - - [01/Jan/2024:00:00:00 +0000] \"GET /v2/ HTTP/1.1\" 200 2 \"\" \"agent\"\n\
            127.0.0.1 - - [01/Jan/2024:00:00:00 +0000] \"HEAD /v2/a/manifests/latest HTTP/1.1\" 200 700 \"\" \"agent\"\n\
            127.0.0.1 - - [01/Jan/2024:00:00:00 +0000] \"PUT /v2/a/manifests/latest HTTP/1.1\" 201 0 \"\" \"agent\"\n\
            127.0.0.1 - - [01/Jan/2024:00:00:00 +0000] \"GET /v2/a/blobs/sha256:00 HTTP/1.1\" 206 1000 \"\" \"agent\"\n";
        assert_eq!(traffic(log), Traffic { requests: 3, bytes: 1002 });
    }
}
