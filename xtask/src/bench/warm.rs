//! The warm start that others are measured against: the same command under the same runc on an overlay of the unpacked
//! layers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};
use xtask::images::Service;
use xtask::network::Place;
use xtask::{command, ready};

use super::subject::Subject;

/// The service on an overlay of the unpacked layers under runc.
pub struct WarmOverlay<'a> {
    place: Place,
    service: &'a Service,
    bundle: PathBuf,
    lower: String,
    id: String,
}

impl<'a> WarmOverlay<'a> {
    /// Prepares starts at `place`; what they need lies in `directory`.
    pub fn new(subject: &'a Subject, directory: &Path, place: &Place) -> Result<Self> {
        let layers: Vec<_> = subject.lower.iter().map(|layer| layer.display().to_string()).collect();
        let bundle = directory.join("bundle");
        for sub in ["rootfs", "upper", "work"] {
            fs::create_dir_all(bundle.join(sub))?;
        }
        command::output(Command::new("runc").args(["spec", "--bundle"]).arg(&bundle))?;
        let file = bundle.join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&file)?)?;
        spec["root"] = json!({ "path": "rootfs", "readonly": false });
        match &subject.process {
            Some(process) => {
                for part in ["args", "cwd", "env", "user"] {
                    spec["process"][part] = process[part].clone();
                }
            }
            None => spec["process"]["args"] = json!(subject.service.command),
        }
        spec["process"]["terminal"] = json!(false);
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(CAPABILITIES);
        }
        if place.namespace().is_some()
            && let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut()
        {
            namespaces.retain(|namespace| namespace["type"] != "network");
        }
        fs::write(&file, spec.to_string())?;
        Ok(Self {
            place: place.clone(),
            service: &subject.service,
            bundle,
            lower: layers.join(":"),
            id: format!("tdfs-bench-{}", std::process::id()),
        })
    }

    /// Milliseconds from mounting to the first answer.
    pub fn start(&self) -> Result<f64> {
        let at = |sub: &str| self.bundle.join(sub);
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            self.lower,
            at("upper").display(),
            at("work").display()
        );
        let started = Instant::now();
        mount(Some("overlay"), &at("rootfs"), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .context("mount the overlay")?;
        let _running = Running(self);
        // The container keeps these streams: pipes would never end.
        let mut runc = self.place.command("runc");
        runc.args(["run", "--detach", "--bundle"]).arg(&self.bundle).arg(&self.id);
        runc.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut runc = runc.spawn().context("cannot start runc")?;
        let namespace = self.place.namespace().context("a warm start is measured in the node's network")?;
        let outcome = ready::wait_in(self.service, namespace, Some(&mut runc));
        let ready_ms = started.elapsed().as_secs_f64() * 1000.0;
        runc.wait()?;
        outcome.map(|()| ready_ms)
    }
}

/// What containers usually may do.
const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
];

/// Ends the container and unmounts its root when dropped.
struct Running<'a>(&'a WarmOverlay<'a>);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = command::output(Command::new("runc").args(["delete", "--force", &self.0.id]));
        let _ = umount2(&self.0.bundle.join("rootfs"), MntFlags::MNT_DETACH);
        for sub in ["upper", "work"] {
            let _ = fs::remove_dir_all(self.0.bundle.join(sub));
            let _ = fs::create_dir(self.0.bundle.join(sub));
        }
    }
}
