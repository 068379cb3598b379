//! `cargo xtask bench`: how close a start by tdfs comes to a warm one, and what recording costs.
//!
//! Pairs of starts of one image, interleaved so that both see the same machine. Nothing comes over a network.
//!
//! - `tdfs run` with its runtime image resident, next to the same command under the same runc on an overlay of the
//!   unpacked layers, whose files are in the page cache. Both times run from the command until the service answers.
//! - `tdfs record` with the probe attached, next to the same without.

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

/// Runs `pairs` pairs of each comparison on the image called `name` and prints a table and one line of JSON.
pub fn run(name: &str, pairs: usize) -> Result<()> {
    let image = images::recipe(name)?;
    install::packages(install::IMAGE_PACKAGES)?;
    install::packages(install::RUN_PACKAGES)?;
    install::require_root("to mount and to run containers")?;
    let tdfs = Tdfs { program: crate::demo::build_release()? };
    let layout = Cache::default().image(image, Compression::Gzip)?;
    let directory = TempDir::with_prefix_in("bench-", command::workspace().join("target"))?;

    let mut table = Table::new(&["milliseconds", "tdfs", "reference", "ratio", "quartiles", "pairs"]);
    let mut results = json!({ "image": name, "pairs": pairs });
    let mut report = |key: &str, name: String, measured: &Pairs| {
        let ratio = |quarter| format!("{:.3}", quantile(&measured.ratios(), quarter));
        table.row(
            &name,
            [
                format!("{:.0}", median(&measured.ours)),
                format!("{:.0}", median(&measured.theirs)),
                ratio(0.5),
                format!("{}-{}", ratio(0.25), ratio(0.75)),
                pairs.to_string(),
            ],
        );
        results[key] = measured.json();
    };
    let warm = warm_start(&tdfs, image, &layout, directory.path(), pairs)?;
    report("warm_start", format!("{name}: resident start / warm overlay"), &warm);
    let probe = probe_cost(&tdfs, directory.path(), pairs)?;
    report("probe_cost", "python: recorded start with probe / without".into(), &probe);
    println!("{table}\n{results}");
    Ok(())
}

/// A start with its runtime image resident, and one on an overlay of the unpacked layers.
fn warm_start(tdfs: &Tdfs, image: &Image, layout: &Path, directory: &Path, pairs: usize) -> Result<Pairs> {
    let service = &image.services[0];
    let (packed, node) = (directory.join("packed"), directory.join("node"));
    tdfs.json(
        Command::new(&tdfs.program)
            .arg("record")
            .arg(format!("oci:{}", layout.display()))
            .args(["--service", service.name, "--ready", service.ready])
            .args([path("--output", &packed), path("--state", &directory.join("ci"))].concat()),
    )?;
    let start = || {
        let report = tdfs.json(
            Command::new(&tdfs.program)
                .arg("run")
                .arg(format!("oci:{}", packed.display()))
                .args(["--service", service.name, "--network", "private", "--exit-when-ready"])
                .args(path("--state", &node)),
        )?;
        report["total_ms"].as_f64().context("total_ms")
    };
    let warm = WarmOverlay::new(image, service, directory)?;
    Pairs::measure(pairs, start, || warm.start())
}

/// The same recording with typed tracepoints and without any probe, when the page cache is asked afterwards. The time is
/// the container's own: from the start of its process to its end, which both learn from the kernel.
fn probe_cost(tdfs: &Tdfs, directory: &Path, pairs: usize) -> Result<Pairs> {
    let layout = Cache::default().image(images::recipe("python")?, Compression::Gzip)?;
    let start = |method: &str| {
        let report = tdfs.json(
            Command::new(&tdfs.program)
                .arg("record")
                .arg(format!("oci:{}", layout.display()))
                .args(["--service", "probe-cost", "--ready", "exit", "--method", method])
                .args(path("--state", &directory.join("ci")))
                .arg("--")
                .args(["python3", "-c", "import http.server"]),
        )?;
        report["ready_ms"].as_f64().context("ready_ms")
    };
    Pairs::measure(pairs, || start("tp-btf"), || start("residency"))
}

/// Milliseconds of two things measured one after the other.
struct Pairs {
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

impl Pairs {
    /// Runs both once for nothing, to warm up, and then `pairs` times.
    fn measure(
        pairs: usize,
        ours: impl Fn() -> Result<f64>,
        theirs: impl Fn() -> Result<f64>,
    ) -> Result<Self> {
        ours()?;
        theirs()?;
        let mut measured = Self { ours: Vec::new(), theirs: Vec::new() };
        for pair in 0..pairs {
            // Whoever comes first pays for what the other left behind: take turns.
            if pair % 2 == 0 {
                measured.ours.push(ours()?);
                measured.theirs.push(theirs()?);
            } else {
                measured.theirs.push(theirs()?);
                measured.ours.push(ours()?);
            }
        }
        Ok(measured)
    }

    fn ratios(&self) -> Vec<f64> {
        self.ours.iter().zip(&self.theirs).map(|(ours, theirs)| ours / theirs).collect()
    }

    fn json(&self) -> Value {
        json!({
            "tdfs_ms": median(&self.ours),
            "reference_ms": median(&self.theirs),
            "ratio": median(&self.ratios()),
            "ratio_quartiles": [quantile(&self.ratios(), 0.25), quantile(&self.ratios(), 0.75)],
        })
    }
}

fn path(option: &str, path: &Path) -> Vec<String> {
    vec![option.to_owned(), path.display().to_string()]
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below which `part` of all values lie, interpolated.
fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = part * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
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
        assert!((quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25) - 2.0).abs() < f64::EPSILON);
        assert!(median(&[]).is_nan());
    }
}
