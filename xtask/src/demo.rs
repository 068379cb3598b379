//! `cargo xtask demo`: one real image, started the usual way and by tdfs, side by side.
//!
//! Everything is local and private: a registry on a free loopback port, a containerd with its own directories, empty
//! state directories. All of it is removed at the end, also after an error or Ctrl-C.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;
use xtask::command;
use xtask::containerd::Containerd;
use xtask::images::{self, Cache, Compression};
use xtask::install;
use xtask::network::Place;
use xtask::registry::{Registry, Traffic};
use xtask::table::Table;

/// The stages of a start that `tdfs run --json` reports, as milliseconds.
const STAGES: [&str; 7] = ["resolve", "diff", "fetch", "mount", "start", "ready", "total"];

/// Runs the demo on the image called `name`.
pub fn run(name: &str) -> Result<()> {
    let image = images::recipe(name)?;
    let service = &image.services[0];
    step("installing what is needed");
    install::packages(install::IMAGE_PACKAGES)?;
    install::packages(install::RUN_PACKAGES)?;
    install::require_root("to mount and to run containers")?;
    step("building tdfs");
    let tdfs = build_release()?;
    step(&format!("building the image {name} from Debian packages (kept for the next time)"));
    let layout = Cache::default().image(image, Compression::Gzip)?;

    let directory = TempDir::with_prefix_in("demo-", command::workspace().join("target"))?;
    let registry = Registry::start(directory.path(), &Place::here())?;
    step("pushing the image to a registry on loopback");
    let reference = registry.push(&layout, name)?;

    let state = |of: &str| directory.path().join(of).display().to_string();
    let tdfs = |arguments: &[&str]| -> Result<Value> {
        let mut command = Command::new(&tdfs);
        command.args(["--json"]).args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit());
        let output = command.output().context("cannot start tdfs")?;
        if !output.status.success() {
            bail!("`tdfs {}` failed: {}", arguments.join(" "), output.status);
        }
        serde_json::from_slice(&output.stdout).context("the JSON that tdfs printed")
    };
    step("recording a start (this is done once, in CI)");
    let recording = tdfs(&[
        "record",
        &reference,
        "--service",
        service.name,
        "--ready",
        service.ready,
        "--push",
        "--state",
        &state("ci"),
    ])?;
    println!("{}", describe(&recording));

    step("starting it the usual way: containerd pulls the whole image");
    let mut table = Table::new(&["", "containerd, full pull", "tdfs, empty node", "tdfs, again"]);
    let before = registry.traffic()?;
    let full = Containerd::start(directory.path(), &Place::here())?.start_service(&reference, service)?;
    let full_traffic = registry.traffic()? - before;

    step("starting it with tdfs on an empty node, and once more");
    let node = state("node");
    // Its own network, as under containerd: nothing of this machine is in the way of its port.
    let mut start = vec!["run", &reference, "--service", service.name, "--state", &node];
    start.extend(["--network", "private", "--exit-when-ready"]);
    let mut starts = Vec::new();
    for _ in 0..2 {
        let before = registry.traffic()?;
        starts.push((tdfs(&start)?, registry.traffic()? - before));
    }

    for stage in STAGES {
        let full = match stage {
            "fetch" => Some(full.pull),
            "start" => Some(full.start),
            "ready" => Some(full.ready),
            "total" => Some(full.pull + full.start + full.ready),
            _ => None,
        };
        let full = full.map(|time| time.as_secs_f64() * 1000.0);
        let ours = starts.iter().map(|(report, _)| report[format!("{stage}_ms")].as_f64());
        table.row(&format!("{stage}, ms"), std::iter::once(full).chain(ours).map(milliseconds));
    }
    for name in ["pages_needed", "cold_pages"] {
        let ours = starts.iter().map(|(report, _)| report[name].to_string());
        table.row(&name.replace('_', " "), std::iter::once("–".to_owned()).chain(ours));
    }
    let traffic: Vec<Traffic> = std::iter::once(full_traffic).chain(starts.iter().map(|(_, t)| *t)).collect();
    table.row("downloaded, MB", traffic.iter().map(|traffic| megabytes(traffic.bytes as f64)));
    table.row("requests", traffic.iter().map(|traffic| traffic.requests.to_string()));
    println!("\n{table}");
    println!(
        "containerd's fetch is resolve, download and unpack. Stages of tdfs overlap, so they may add up to more than \
         the total.\nCold pages are those outside the runtime image that were read before ready. Bytes and requests are counted by the registry, which is on this machine: no network slows the \
         download down."
    );
    Ok(())
}

/// Builds the release `tdfs` and returns its path.
pub fn build_release() -> Result<PathBuf> {
    command::run(
        Command::new("cargo")
            .args(["build", "--release", "--locked", "--package", "tdfs-agent", "--bin", "tdfs"])
            .current_dir(command::workspace()),
    )?;
    Ok(command::workspace().join("target/release/tdfs"))
}

fn step(text: &str) {
    eprintln!("==> {text}");
}

/// What a recording found, in one line.
fn describe(recording: &Value) -> String {
    let number = |name: &str| recording[name].as_f64().unwrap_or(f64::NAN);
    format!(
        "{} pages in {} files touched until ready: runtime image {} MB, {:.1} % of the image ({} MB); \
         precision {}, recall {}, lost events {}",
        recording["pages"],
        recording["files"],
        megabytes(number("bytes")),
        100.0 * number("bytes") / number("image_bytes"),
        megabytes(number("image_bytes")),
        recording["oracle"]["precision"],
        recording["oracle"]["recall"],
        recording["lost_events"],
    )
}

fn milliseconds(time: Option<f64>) -> String {
    time.map_or_else(|| "–".to_owned(), |time| format!("{time:.0}"))
}

fn megabytes(bytes: f64) -> String {
    format!("{:.1}", bytes / 1e6)
}
