//! `cargo xtask bench`: how close a start by tdfs comes to a warm one.
//!
//! Pairs of starts of one image, interleaved so that both see the same machine: `tdfs run` with its runtime image
//! resident, and the same command under the same runc on an overlay of the unpacked layers, whose files are in the page
//! cache. Nothing comes over a network. Both times run from the command until the service answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::images::{self, Cache, Compression, Image, Service};
use xtask::table::Table;
use xtask::{command, install, ready};

/// Runs `pairs` pairs on the image called `name` and prints a table and one line of JSON.
pub fn run(name: &str, pairs: usize) -> Result<()> {
    let image = images::recipe(name)?;
    let service = &image.services[0];
    install::packages(install::IMAGE_PACKAGES)?;
    install::packages(install::RUN_PACKAGES)?;
    install::require_root("to mount and to run containers")?;
    let tdfs = Tdfs { program: crate::demo::build_release()? };
    let layout = Cache::default().image(image, Compression::Gzip)?;
    let directory = TempDir::with_prefix_in("bench-", command::workspace().join("target"))?;

    let packed = directory.path().join("packed");
    let (ci, node) = (directory.path().join("ci"), directory.path().join("node"));
    tdfs.json(
        Command::new(&tdfs.program)
            .arg("record")
            .arg(format!("oci:{}", layout.display()))
            .args(["--service", service.name, "--ready", service.ready])
            .args([path("--output", &packed), path("--state", &ci)].concat()),
    )?;
    let start = || {
        tdfs.json(
            Command::new(&tdfs.program)
                .arg("run")
                .arg(format!("oci:{}", packed.display()))
                .args(["--service", service.name, "--network", "private", "--exit-when-ready"])
                .args(path("--state", &node)),
        )
    };
    let warm = WarmOverlay::new(image, service, directory.path())?;
    // Makes the runtime image resident, and the unpacked files cached.
    start()?;
    warm.start()?;

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        let measure_ours = || start()?["total_ms"].as_f64().context("total_ms");
        // Whoever comes first pays for what the other left behind: take turns.
        if pair % 2 == 0 {
            ours.push(measure_ours()?);
            theirs.push(warm.start()?);
        } else {
            theirs.push(warm.start()?);
            ours.push(measure_ours()?);
        }
    }
    // The probe's own cost belongs here as a second pair: `tdfs record` with and without tracing on the same mount.
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
    let result = json!({
        "image": name,
        "pairs": pairs,
        "tdfs_resident_ms": median(&ours),
        "warm_overlay_ms": median(&theirs),
        "ratio": median(&ratios),
    });
    let mut table = Table::new(&["image", "tdfs, resident, ms", "warm overlay, ms", "ratio", "pairs"]);
    table.row(
        name,
        [
            format!("{:.0}", median(&ours)),
            format!("{:.0}", median(&theirs)),
            format!("{:.3}", median(&ratios)),
            pairs.to_string(),
        ],
    );
    println!("{table}\n{result}");
    Ok(())
}

fn path(option: &str, path: &Path) -> Vec<String> {
    vec![option.to_owned(), path.display().to_string()]
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

struct Tdfs {
    program: PathBuf,
}

impl Tdfs {
    fn json(&self, command: &mut Command) -> Result<Value> {
        let text = command::output(command.arg("--json"))?;
        serde_json::from_str(&text)
            .with_context(|| format!("the JSON that {} printed", self.program.display()))
    }
}

/// The service on an overlay of the unpacked layers under runc.
struct WarmOverlay<'a> {
    service: &'a Service,
    bundle: PathBuf,
    lower: String,
    id: String,
}

impl<'a> WarmOverlay<'a> {
    fn new(image: &Image, service: &'a Service, directory: &Path) -> Result<Self> {
        let layers = Cache::default().unpacked(image)?;
        let layers: Vec<_> = layers.iter().map(|layer| layer.display().to_string()).collect();
        let bundle = directory.join("bundle");
        for sub in ["rootfs", "upper", "work"] {
            fs::create_dir_all(bundle.join(sub))?;
        }
        command::output(Command::new("runc").args(["spec", "--bundle"]).arg(&bundle))?;
        let file = bundle.join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&file)?)?;
        spec["root"] = json!({ "path": "rootfs", "readonly": false });
        spec["process"]["terminal"] = json!(false);
        spec["process"]["args"] = json!(service.command);
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(CAPABILITIES);
        }
        fs::write(&file, spec.to_string())?;
        Ok(Self {
            service,
            bundle,
            lower: layers.join(":"),
            id: format!("tdfs-bench-{}", std::process::id()),
        })
    }

    /// Milliseconds from mounting to the first answer.
    fn start(&self) -> Result<f64> {
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
        command::run(
            Command::new("runc")
                .args(["run", "--detach", "--pid-file"])
                .arg(at("pid"))
                .arg("--bundle")
                .arg(&self.bundle)
                .arg(&self.id)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        )?;
        let pid = fs::read_to_string(at("pid"))?.trim().parse().context("process id of the container")?;
        ready::wait(self.service, pid)?;
        Ok(started.elapsed().as_secs_f64() * 1000.0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!(median(&[]).is_nan());
    }
}
