//! Installs the Debian packages that the demo, the tests and the benchmark run.
//!
//! Only what is missing is installed, without recommendations. Some of these packages bring a daemon (containerd,
//! docker-registry): its service is not started, we only want the programs and start our own instances of them.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command;

/// What builds the images: see [`crate::images`].
pub const IMAGE_PACKAGES: &[&str] = &["ca-certificates", "mmdebstrap", "pigz"];

/// What runs and checks them: runtimes, registries and the tools whose answers the tests compare with ours.
pub const RUN_PACKAGES: &[&str] =
    &["apache2-utils", "containerd", "docker-registry", "erofs-utils", "runc", "skopeo", "umoci"];

/// What only the tests need: other clients of registries, what runs their S3 server, and a browser.
pub const TEST_PACKAGES: &[&str] =
    &["buildah", "chromium", "fonts-dejavu-core", "podman", "python3-venv", "stargz-snapshotter"];

/// What makes networks of known bandwidth.
pub const NETWORK_PACKAGES: &[&str] = &["iproute2", "util-linux"];

/// Installs those of `packages` that are missing.
///
/// # Errors
///
/// Without root only when something is missing; otherwise when apt fails.
pub fn packages(packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    require_root(&format!("to install {}", missing.join(" ")))?;
    eprintln!("installing {}", missing.join(" "));
    let _services = NoServices::new()?;
    command::output(apt().arg("update"))?;
    command::output(apt().args(["install", "--yes", "--no-install-recommends"]).args(&missing))?;
    Ok(())
}

/// Fails with one clear line unless this process is root.
pub fn require_root(why: &str) -> Result<()> {
    // The owner of our own /proc entry is our effective user.
    let user = fs::metadata("/proc/self").context("/proc/self")?.uid();
    if user != 0 {
        bail!("root is needed {why}: run this command again as root");
    }
    Ok(())
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-qq", "-o", "DPkg::Lock::Timeout=600"]);
    apt
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    if !command::exists("dpkg-query") {
        bail!("this machine has no dpkg: Debian 12 or a relative of it is needed");
    }
    // dpkg-query exits 1 when it does not know one of the packages, and still lists the others.
    let listed = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(packages)
        .output()
        .context("cannot start dpkg-query")?;
    let listed = String::from_utf8_lossy(&listed.stdout);
    let installed: BTreeSet<&str> =
        listed.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    Ok(packages.iter().copied().filter(|package| !installed.contains(package)).collect())
}

/// While it lives, packages that are installed do not start their services (Debian policy, invoke-rc.d).
struct NoServices {
    ours: bool,
}

impl NoServices {
    const POLICY: &str = "/usr/sbin/policy-rc.d";

    fn new() -> Result<Self> {
        if Path::new(Self::POLICY).exists() {
            return Ok(Self { ours: false });
        }
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(Self::POLICY)
            .and_then(|mut file| file.write_all(b"#!/bin/sh\nexit 101\n"))
            .context(Self::POLICY)?;
        Ok(Self { ours: true })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours {
            let _ = fs::remove_file(Self::POLICY);
        }
    }
}
