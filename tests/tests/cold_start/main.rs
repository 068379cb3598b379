//! Cold starts of real images, end to end: record, attach, push, start on an empty node.

mod agent;
mod crash;
mod damage;
mod foreground;
mod groups;
mod kept;
mod mounts;
mod registry;
mod streaming;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tdfs_tests::images::{self, Service, recipe};
use tdfs_tests::tdfs;
use tempfile::TempDir;

/// A real image with the runtime images of some of its services, in a layout of its own.
pub struct Recorded {
    dir: TempDir,
    /// What `tdfs record` said, service by service.
    pub reports: Vec<Value>,
}

impl Recorded {
    /// Records the first `services` services of the image `name` into one group.
    pub fn new(name: &str, services: usize) -> Result<Self> {
        let image = format!("oci:{}", images::image(name)?.display());
        let recorded = Self { dir: TempDir::with_prefix("tdfs-cold-")?, reports: Vec::new() };
        let reports = recipe(name)?.services[..services].iter().map(|service| {
            let trace = recorded.trace(service.name);
            let (layout, state) = (recorded.layout(), recorded.state());
            let mut arguments = text(["record", &image, "--service", service.name, "--group", "test"]);
            arguments.extend(text(["--ready", service.ready, "--output"]));
            arguments.extend([layout.display().to_string(), "--state".into(), state.display().to_string()]);
            arguments.extend(["--trace".into(), trace.display().to_string()]);
            arguments.extend(command_of(service, name)?);
            tdfs::json(arguments).with_context(|| format!("record {}", service.name))
        });
        let reports = reports.collect::<Result<_>>()?;
        Ok(Self { reports, ..recorded })
    }

    /// The layout.
    pub fn layout(&self) -> PathBuf {
        self.dir.path().join("layout")
    }

    /// A directory for whatever a test needs.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The layout as an image reference.
    pub fn reference(&self) -> String {
        format!("oci:{}", self.layout().display())
    }

    /// The recorder's state directory: it holds all layers.
    pub fn state(&self) -> PathBuf {
        self.path("recorder")
    }

    /// The trace of a service.
    pub fn trace(&self, service: &str) -> PathBuf {
        self.path(&format!("{service}.trace"))
    }

    /// The blob of a descriptor with this media type in the artifact of `service`.
    pub fn blob(&self, service: &str, media_type: &str) -> Result<PathBuf> {
        let inspected = tdfs::json(["inspect", &self.reference(), "--state", &show(&self.state())])?;
        let images = inspected["runtime_images"].as_array().context("no runtime images")?;
        let image = images.iter().find(|i| i["service"] == service).context("no such service")?;
        let manifest = self.blob_path(image["manifest"].as_str().context("no manifest")?);
        let manifest: Value = serde_json::from_slice(&std::fs::read(manifest)?)?;
        let layers = manifest["layers"].as_array().context("no layers")?;
        let layer = layers.iter().find(|l| l["mediaType"] == media_type).context("no such blob")?;
        Ok(self.blob_path(layer["digest"].as_str().context("no digest")?))
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.layout().join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }
}

/// Arguments that start `service`: the first one is the image's own command.
fn command_of(service: &Service, image: &str) -> Result<Vec<String>> {
    let first = recipe(image)?.services[0].name;
    if service.name == first {
        return Ok(Vec::new());
    }
    Ok(std::iter::once("--").chain(service.command.iter().copied()).map(str::to_owned).collect())
}

/// Owned arguments.
pub fn text<const N: usize>(arguments: [&str; N]) -> Vec<String> {
    arguments.map(str::to_owned).to_vec()
}

/// A path as an argument.
pub fn show(path: &Path) -> String {
    path.display().to_string()
}

/// A number of a report.
pub fn number(report: &Value, field: &str) -> Result<u64> {
    report[field].as_u64().with_context(|| format!("{field} is no number in {report}"))
}

/// `tdfs run` until ready, with a private network.
pub fn run(reference: &str, state: &Path, more: &[&str]) -> Result<Value> {
    let mut arguments = text(["run", reference, "--exit-when-ready", "--network", "private"]);
    arguments.extend(["--state".into(), show(state)]);
    arguments.extend(more.iter().map(|m| (*m).to_owned()));
    tdfs::json(arguments)
}

/// Nothing of a state directory is mounted or runs any more.
pub fn expect_clean(state: &Path) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let left: Vec<&str> = mounts.lines().filter(|l| l.contains(&show(state))).collect();
    ensure!(left.is_empty(), "left mounted: {left:?}");
    for name in ["runs", "runc"] {
        if state.join(name).exists() {
            let left = tool("find", &[&show(&state.join(name)), "-mindepth", "1"])?;
            ensure!(left.is_empty(), "left in {name}: {left}");
        }
    }
    Ok(())
}

/// Runs a tool of Debian's to its end.
pub fn tool(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Records, starts cold on an empty node, starts again. The first service of the image touches `megabytes`, within 5 %,
/// wherever it is built from Debian 12.
fn cold_and_warm(name: &str, megabytes: f64) -> Result<()> {
    let recorded = Recorded::new(name, 1)?;
    let report = &recorded.reports[0];
    let touched = number(report, "bytes")? as f64 / 1e6;
    ensure!((touched / megabytes - 1.0).abs() < 0.05, "{touched} MB, where others saw {megabytes}");
    ensure!(report["complete"] == true && report["lost_events"] == 0, "{report}");
    ensure!(report["oracle"]["precision"] == 1.0 && report["oracle"]["recall"] == 1.0, "{report}");
    ensure!(number(report, "bytes")? == number(report, "pages")? * 4096);
    expect_clean(&recorded.state())?;

    let (node, cold) = few_cold_pages(&recorded)?;
    let needed = number(&cold, "pages_needed")?;

    let warm = run(&recorded.reference(), &node, &[])?;
    ensure!(warm["source"] == "resident" && number(&warm, "pages_present")? == needed, "{warm}");
    ensure!(number(&warm, "pages_fetched")? + number(&warm, "data_requests")? == 0, "{warm}");
    ensure!(number(&warm, "bytes_fetched")? == 0, "{warm}");
    expect_clean(&node)
}

/// Starts cold on an empty node, which it returns. Where the kernel evicts a hot page that nobody has used yet, reading it
/// again brings its cold neighbours; so one start of three must do with few of them.
fn few_cold_pages(recorded: &Recorded) -> Result<(PathBuf, Value)> {
    let mut reports = Vec::new();
    for attempt in 0..3 {
        let node = recorded.path(&format!("node{attempt}"));
        let cold = run(&recorded.reference(), &node, &["--start", "fetched"])?;
        let needed = number(&cold, "pages_needed")?;
        ensure!(cold["source"] == "fetched" && number(&cold, "pages_present")? == 0, "{cold}");
        ensure!(needed > 0 && number(&cold, "pages_fetched")? == needed, "{cold}");
        ensure!(number(&cold, "data_requests")? == 1, "one segment, one request: {cold}");
        expect_clean(&node)?;
        if number(&cold, "cold_pages")? * 100 < needed {
            return Ok((node, cold));
        }
        reports.push(cold);
    }
    bail!("cold pages before ready: {reports:?}")
}

#[test]
fn nginx_starts_cold_and_warm() -> Result<()> {
    cold_and_warm("nginx", 3.7)
}

#[test]
fn redis_starts_cold_and_warm() -> Result<()> {
    cold_and_warm("redis", 6.4)
}

#[test]
fn python_starts_cold_and_warm() -> Result<()> {
    cold_and_warm("python", 11.4)
}

#[test]
fn pytorch_starts_cold_and_warm() -> Result<()> {
    cold_and_warm("pytorch", 114.7)
}
