//! Containers that start while their pages are on the wire.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tdfs_tests::fingerprint::Fingerprint;
use tdfs_tests::images::{self, Unpacked};
use tdfs_tests::proxy::{Pace, Proxy};
use tdfs_tests::registry::{Options, Registry};
use tdfs_tests::tdfs::{self, Running};
use tempfile::TempDir;

use crate::registry::pushed;
use crate::{expect_clean, number, run, show, text};

/// A registry with an image and its runtime images, and how many bytes a start moves.
struct Served {
    dir: TempDir,
    registry: Registry,
    name: &'static str,
    /// Of page data.
    data: u64,
    /// Of everything else.
    metadata: u64,
}

impl Served {
    fn new(name: &'static str) -> Result<Self> {
        let registry = Registry::start(&Options::default())?;
        let dir = tempfile::tempdir()?;
        pushed(&registry, name, &dir.path().join("recorder"))?;
        let mut served = Self { dir, registry, name, data: 0, metadata: 0 };
        let proxy = served.proxy(Pace::BytesPerSecond(1 << 30))?;
        let report = run(&served.image(&proxy), &served.node("measured"), &served.more("fetched"))?;
        ensure!(report["start_mode"] == "fetched" && number(&report, "pages_awaited")? == 0, "{report}");
        served.data = number(&report, "bytes_fetched")?;
        // Everything but metadata is there now, and no cold page is read by who only mounts.
        std::fs::remove_dir_all(served.node("measured").join("metadata"))?;
        let proxy = served.proxy(Pace::BytesPerSecond(1 << 30))?;
        let (image, state) = (served.image(&proxy), show(&served.node("measured")));
        let target = served.dir.path().join("mount");
        std::fs::create_dir(&target)?;
        let target = show(&target);
        tdfs::json(["mount", &image, &target, "--service", served.service(), "--state", &state])?;
        served.metadata = proxy.passed();
        tdfs::json(["umount", &target, "--state", &state])?;
        Ok(served)
    }

    fn proxy(&self, pace: Pace) -> Result<Proxy> {
        Ok(Proxy::start(self.registry.addr, pace)?)
    }

    fn image(&self, proxy: &Proxy) -> String {
        format!("{}/{}:latest", proxy.addr, self.name)
    }

    fn node(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn service(&self) -> &'static str {
        if self.name == "python" { "http" } else { self.name }
    }

    fn more<'a>(&self, mode: &'a str) -> [&'a str; 4] {
        ["--start", mode, "--service", self.service()]
    }

    /// For `tdfs run`.
    fn arguments(&self, proxy: &Proxy, node: &Path) -> Vec<String> {
        let mut arguments = text(["run", &self.image(proxy), "--network", "private", "--state", &show(node)]);
        arguments.extend(self.more("streaming").map(str::to_owned));
        arguments
    }
}

/// Waits until `proxy` has passed `bytes` on, or `child` has ended.
fn wait_passed(proxy: &Proxy, bytes: u64, child: &mut Child) -> Result<()> {
    while proxy.passed() < bytes && child.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The EROFS mount of the only container of `node`.
fn root_of(node: &Path) -> Result<PathBuf> {
    let run = std::fs::read_dir(node.join("runs"))?.next().context("nothing runs")??;
    Ok(run.path().join("root"))
}

fn streams(name: &'static str) -> Result<()> {
    let served = Served::new(name)?;
    let node = served.node("node");
    let proxy = served.proxy(Pace::BytesPerSecond(2 << 20))?;
    let running = Running::start(served.arguments(&proxy, &node))?;
    let report = &running.report;
    ensure!(report["source"] == "fetched" && report["start_mode"] == "streaming", "{report}");
    ensure!(number(report, "waited_requests")? > 0 && report["waited_ms"].as_f64() > Some(0.0), "{report}");
    let [needed, fetched, awaited] =
        ["pages_needed", "pages_fetched", "pages_awaited"].map(|f| number(report, f));
    ensure!(needed? == fetched? + awaited?, "{report}");
    ensure!(number(report, "cold_pages")? * 100 < number(report, "pages_needed")?, "{report}");
    proxy.hurry();
    let oracle = Fingerprint::of(&Unpacked::new(&images::image(name)?, "latest")?.path())?;
    Fingerprint::of(&root_of(&node)?)?.expect_equal(&oracle)?;
    // A first process of a container ignores SIGTERM unless it handles it.
    running.stop(Signal::SIGINT)?;
    expect_clean(&node)?;
    let again = run(&served.image(&proxy), &node, &["--service", served.service()])?;
    ensure!(again["source"] == "resident" && again["start_mode"] == "resident", "{again}");
    expect_clean(&node)
}

#[test]
fn nginx_streams() -> Result<()> {
    streams("nginx")
}

#[test]
fn python_streams() -> Result<()> {
    streams("python")
}

#[test]
fn a_link_that_is_slower_than_expected_makes_a_start_stream() -> Result<()> {
    let served = Served::new("python")?;
    let node = served.node("node");
    let proxy = served.proxy(Pace::BytesPerSecond(2 << 20))?;
    let image = served.image(&proxy);
    let run = ["run", &image, "--network", "private", "--state", &show(&node), "--service", "http"];
    let running = Running::start(text(run))?;
    let report = &running.report;
    ensure!(report["start_mode"] == "streaming" && number(report, "waited_requests")? > 0, "{report}");
    let reason = report["start_reason"].as_str().unwrap_or_default();
    ensure!(reason.ends_with("but come more slowly"), "{report}");
    proxy.hurry();
    running.stop(Signal::SIGINT)?;
    expect_clean(&node)
}

#[test]
fn a_registry_that_goes_away_is_one_error_and_the_next_start_goes_on() -> Result<()> {
    let served = Served::new("python")?;
    for tenths in [1, 5, 9] {
        let node = served.node(&tenths.to_string());
        let proxy = served.proxy(Pace::CloseAfter(served.metadata + served.data * tenths / 10))?;
        let mut arguments = text(["--json"]);
        arguments.extend(served.arguments(&proxy, &node));
        arguments.push("--exit-when-ready".into());
        let output = tdfs::command(arguments)?.stdout(Stdio::piped()).stderr(Stdio::piped()).output()?;
        let messages = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{tenths}: {messages}");
        let error = messages.lines().last().unwrap_or_default();
        ensure!(error.starts_with("tdfs: ") && error.contains("/blobs/"), "{tenths}: {messages}");
        expect_clean(&node)?;
        let proxy = served.proxy(Pace::BytesPerSecond(1 << 30))?;
        let healed = run(&served.image(&proxy), &node, &served.more("streaming"))?;
        ensure!(tenths < 5 || number(&healed, "pages_present")? > 0, "what had arrived was kept: {healed}");
        ensure!(number(&healed, "pages_present")? < number(&healed, "pages_needed")?, "{healed}");
        expect_clean(&node)?;
    }
    Ok(())
}

/// runc reads the image's accounts before the container's process runs: with holes in their place nginx finds no user.
#[test]
fn nobody_sees_a_page_that_has_not_arrived() -> Result<()> {
    let served = Served::new("nginx")?;
    for mode in ["fetched", "streaming"] {
        let proxy = served.proxy(Pace::BytesPerSecond(1 << 20))?;
        let report = run(&served.image(&proxy), &served.node(mode), &served.more(mode))?;
        ensure!(report["start_mode"] == mode, "{report}");
    }
    Ok(())
}

#[test]
fn pages_that_never_come_are_errors_of_their_readers() -> Result<()> {
    let served = Served::new("python")?;
    let node = served.node("node");
    let proxy = served.proxy(Pace::StallAfter(served.metadata + served.data / 4))?;
    let mut arguments = served.arguments(&proxy, &node);
    // A shell needs few of the pages; the interpreter many.
    arguments.extend(text(["--ready", "log:^started", "--", "sh", "-c"]));
    arguments.push("echo started; sleep 3; python3 -c 'print(\"al\" + \"ive\")'; exit $?".to_owned());
    let running = Running::start(arguments)?;
    ensure!(number(&running.report, "pages_awaited")? > 0, "{}", running.report);
    proxy.close();
    let (status, messages) = running.finish()?;
    // SIGBUS, or an error that the shell or the interpreter noticed.
    ensure!(status.code().is_some_and(|c| c != 0) && !messages.contains("alive"), "{status} {messages}");
    expect_clean(&node)
}

#[test]
fn demanded_pages_overtake_a_stalled_answer() -> Result<()> {
    let served = Served::new("python")?;
    let node = served.node("node");
    let proxy = served.proxy(Pace::StallAfter(served.metadata + served.data / 8))?;
    let report = run(&served.image(&proxy), &node, &served.more("streaming"))?;
    ensure!(proxy.stalled() && number(&report, "waited_requests")? > 0, "{report}");
    // The answer that stalled is given up after half a minute, and only then asked for again.
    ensure!(number(&report, "data_requests")? > 2, "{report}");
    expect_clean(&node)?;
    let again = run(&served.image(&proxy), &node, &["--service", served.service()])?;
    ensure!(again["source"] == "resident", "{again}");
    Ok(())
}

#[test]
fn killed_while_pages_arrive() -> Result<()> {
    let served = Served::new("python")?;
    let node = served.node("node");
    for tenths in [0, 2, 5, 8] {
        let proxy = served.proxy(Pace::BytesPerSecond(4 << 20))?;
        let mut child = tdfs::command(served.arguments(&proxy, &node))?
            .arg("--exit-when-ready")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        wait_passed(&proxy, served.metadata + served.data * tenths / 10, &mut child)?;
        child.kill()?;
        child.wait()?;
        tdfs::json(["inspect", &served.image(&proxy), "--state", &show(&node)])?;
        expect_clean(&node)?;
    }
    let proxy = served.proxy(Pace::BytesPerSecond(8 << 20))?;
    let report = run(&served.image(&proxy), &node, &served.more("streaming"))?;
    ensure!(report["service"] == "http", "{report}");
    expect_clean(&node)
}
