//! Pairs of starts of one image, interleaved so that both see the same machine. Nothing comes over a network.
//!
//! - `tdfs run` with its runtime image resident, next to the same command under the same runc on an overlay of the
//!   unpacked layers, whose files are in the page cache. Both times run from the command until a client that asks all the
//!   time gets the first answer.
//! - `tdfs record` with the probe attached, next to the same without.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::images::{self, Cache, Compression};
use xtask::network::{Link, Side};
use xtask::table::Table;
use xtask::{command, install};

use super::methods::{self, Method as _};
use super::statistics::{median, quantile};
use super::subject::Subject;
use super::warm::WarmOverlay;

/// Runs `pairs` pairs of each comparison on the image called `name` and prints a table and one line of JSON.
pub fn run(name: &str, pairs: usize) -> Result<()> {
    install::packages(install::IMAGE_PACKAGES)?;
    install::packages(install::RUN_PACKAGES)?;
    install::require_root("to mount and to run containers")?;
    let tdfs = Tdfs { program: crate::demo::build_release()? };
    let directory = TempDir::with_prefix_in("bench-", command::workspace().join("target"))?;
    let subject = Subject::new(name, directory.path())?;
    let name = &subject.name;

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
    let warm = warm_start(&tdfs, &subject, directory.path(), pairs)?;
    report("warm_start", format!("{name}: resident start / warm overlay"), &warm);
    let probe = probe_cost(&tdfs, directory.path(), pairs)?;
    report("probe_cost", "python: recorded start with probe / without".into(), &probe);
    println!("{table}\n{results}");
    Ok(())
}

/// A start with its runtime image resident, and one on an overlay of the unpacked layers.
fn warm_start(tdfs: &Tdfs, subject: &Subject, directory: &Path, pairs: usize) -> Result<Pairs> {
    let service = &subject.service;
    let packed = directory.join("packed");
    tdfs.json(
        tdfs.command()
            .arg("record")
            .arg(format!("oci:{}", subject.layout(Compression::Gzip)?.display()))
            // Where it is going to run: services read other files in other networks.
            .args(["--service", service.name, "--ready", service.ready, "--network", "host"])
            .args([path("--output", &packed), path("--state", &directory.join("ci"))].concat()),
    )?;
    install::packages(install::NETWORK_PACKAGES)?;
    let link = Link::new(u8::try_from(std::process::id() % 200)?, Duration::ZERO)?;
    let place = link.place(Side::Node);
    let warm = WarmOverlay::new(subject, directory, &place)?;
    let mut resident = methods::Tdfs {
        name: "tdfs, resident",
        place,
        program: tdfs.program.clone(),
        directory,
        reference: format!("oci:{}", packed.display()),
        service,
        options: Vec::new(),
        state: None,
    };
    resident.reset()?;
    Pairs::measure(pairs, || Ok(resident.start(&mut |_| ())?.ready_ms), || warm.start())
}

/// The same recording with typed tracepoints and without any probe, when the page cache is asked afterwards. The time is
/// the container's own: from the start of its process to its end, which both learn from the kernel.
fn probe_cost(tdfs: &Tdfs, directory: &Path, pairs: usize) -> Result<Pairs> {
    let layout = Cache::default().image(images::recipe("python")?, Compression::Gzip)?;
    let start = |method: &str| {
        let report = tdfs.json(
            tdfs.command()
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
        mut ours: impl FnMut() -> Result<f64>,
        mut theirs: impl FnMut() -> Result<f64>,
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

struct Tdfs {
    program: PathBuf,
}

impl Tdfs {
    /// Prints JSON.
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--json");
        command
    }

    fn json(&self, command: &mut Command) -> Result<Value> {
        let text = command::output(command)?;
        serde_json::from_str(&text)
            .with_context(|| format!("the JSON that {} printed", self.program.display()))
    }
}
