//! `tdfs run --events` and `tdfs report`: a real recording and a real start, drawn and looked at in a browser.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tdfs_tests::images::{self, recipe};
use tdfs_tests::proxy::{Pace, Proxy};
use tdfs_tests::registry::{Options, Registry};
use tdfs_tests::{browser, tdfs};
use tempfile::TempDir;
use xtask::command;

/// A registry with the python image and its two services in one group.
struct Served {
    dir: TempDir,
    registry: Registry,
    image: String,
}

impl Served {
    fn new() -> Result<Self> {
        let (dir, registry) = (TempDir::with_prefix("tdfs-report-")?, Registry::start(&Options::default())?);
        let image = registry.image("python:latest");
        let copy = ["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"];
        let layout = format!("oci:{}:latest", images::image("python")?.display());
        command::output(Command::new("skopeo").args(copy).args([layout, format!("docker://{image}")]))?;
        let served = Self { dir, registry, image };
        for (n, service) in recipe("python")?.services.iter().enumerate() {
            let record = ["record", &served.image, "--service", service.name, "--ready", service.ready];
            let state = served.path("recorder");
            let mut arguments: Vec<&str> = record.into_iter().chain(["--push", "--state", &state]).collect();
            if n > 0 {
                arguments.push("--");
                arguments.extend(service.command);
            }
            tdfs::json(arguments)?;
        }
        Ok(served)
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// A start of the service `http` on `node`; also returns its events.
    fn run(&self, image: &str, node: &str, more: &[&str]) -> Result<(Value, Value)> {
        let (state, events) = (self.path(node), self.path("events.json"));
        let run = ["run", image, "--service", "http", "--network", "private", "--exit-when-ready"];
        let options = ["--state", &state, "--events", &events];
        let report = tdfs::json(run.iter().chain(&options).chain(more))?;
        Ok((report, serde_json::from_str(&fs::read_to_string(events)?)?))
    }
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("{value} is no number"))
}

fn whole(value: &Value) -> Result<u64> {
    value.as_u64().with_context(|| format!("{value} is no whole number"))
}

fn list(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().with_context(|| format!("{value} is no list"))
}

/// The stage `name` took what the report says.
fn expect_stage(events: &Value, report: &Value, name: &str, field: &str) -> Result<()> {
    let stage = list(&events["stages"])?.iter().find(|s| s["name"] == name).context("no such stage")?;
    let took = number(&stage["end_ms"])? - number(&stage["begin_ms"])?;
    ensure!((took - number(&report[field])?).abs() < 1e-6, "{name}: {stage} {report}");
    Ok(())
}

/// The value of a tile of a drawn page.
fn tile<'a>(document: &'a str, id: &str) -> Result<&'a str> {
    let (_, after) =
        document.split_once(&format!("id=\"{id}\">")).with_context(|| format!("no tile {id}"))?;
    Ok(after.split_once('<').context("a tile ends")?.0)
}

fn expect_tile(document: &str, id: &str, number: &Value) -> Result<()> {
    let shown = tile(document, id)?.replace(',', "");
    ensure!(shown.parse::<u64>().ok() == number.as_u64(), "{id}: {shown:?} is shown for {number}");
    Ok(())
}

/// The page was drawn and no script, policy or network failed.
fn drawn(page: &Path) -> Result<String> {
    let document = browser::document(page)?;
    ensure!(document.contains("data-drawn=\"true\""), "not drawn: {document:.2000}");
    ensure!(!document.contains("data-error"), "the page reports an error: {document:.600}");
    Ok(document)
}

/// The data of a page.
fn data(page: &str) -> Result<Value> {
    let (_, after) = page.split_once("<script type=\"application/json\" id=\"data\">").context("no data")?;
    Ok(serde_json::from_str(after.split_once("</script>").context("data end")?.0)?)
}

#[test]
fn a_recording_and_a_start_in_a_browser() -> Result<()> {
    let served = Served::new()?;
    // Much longer than a container is created in, on a busy machine too: its reads have to wait.
    let proxy = Proxy::start(served.registry.addr, Pace::BytesPerSecond(1 << 20))?;
    let slow = format!("{}/python:latest", proxy.addr);
    let (report, events) = served.run(&slow, "node", &["--start", "streaming"])?;

    ensure!(events["version"] == 1 && events["reference"] == slow.as_str(), "{events}");
    ensure!(events["start"] == report, "{} {report}", events["start"]);
    for stage in ["resolve", "diff", "fetch", "mount", "ready"] {
        expect_stage(&events, &report, stage, &format!("{stage}_ms"))?;
    }
    expect_stage(&events, &report, "create", "start_ms")?;
    let samples = list(&events["arrivals"]["samples"])?;
    ensure!(samples.len() > 2 && events["arrivals"]["pages_missing"] == report["pages_needed"]);
    ensure!(samples.last().context("samples")?["pages"] == report["pages_needed"], "{events}");
    let waits = &events["waits"];
    ensure!(whole(&waits["pages"])? >= whole(&report["waited_pages"])?, "{waits} {report}");
    let waited = whole(&report["waited_requests"])?;
    ensure!(waits["lost"] == 0 && list(&waits["reads"])?.len() as u64 >= waited && waited > 0, "{waits}");

    let (page, state, from) = (served.path("page.html"), served.path("other"), served.path("events.json"));
    let arguments = ["report", &served.image, "--state", &state, "--events", &from, "--output", &page];
    let written = tdfs::json(arguments)?;
    let text = fs::read_to_string(&page)?;
    ensure!(written["bytes"] == text.len() && text.len() < 4 << 20, "{written}");
    let document = drawn(page.as_ref())?;
    for section in [
        "timeline",
        "cold",
        "waits",
        "sources",
        "treemap",
        "layers",
        "directories",
        "files",
        "order",
        "zone",
        "sharing",
    ] {
        ensure!(document.contains(&format!("<section id=\"{section}\"")), "no section {section}");
    }
    for field in ["pages_needed", "pages_present", "pages_fetched", "pages_awaited", "cold_pages"] {
        expect_tile(&document, field, &report[field])?;
    }
    let inspected = tdfs::json(["inspect", &served.image, "--state", &state])?;
    expect_tile(&document, "zone_pages", &inspected["unique_pages"])?;
    expect_tile(&document, "services", &Value::from(2))?;
    let drawn_from = data(&text)?;
    ensure!(
        drawn_from["recording"]["sharing"] == inspected["groups"],
        "{}",
        drawn_from["recording"]["sharing"]
    );
    ensure!(drawn_from["start"]["timeline"] == events);
    let picture = served.dir.path().join("page.png");
    let colours = browser::colours(page.as_ref(), &picture)?;
    ensure!(colours > 50, "{colours} colours");

    every_control(&text, served.dir.path())?;
    perfetto(&served, &events)?;
    refusals(&served)?;
    hostile(&served, events)
}

/// Whatever can be pointed at and clicked works, without the policy that keeps any other script out.
fn every_control(page: &str, directory: &Path) -> Result<()> {
    const VISITOR: &str = "
        let pointed = 0;
        const point = () => document.querySelectorAll('svg *').forEach((target, n) => {
            if (n % 9) return;
            target.dispatchEvent(new PointerEvent('pointermove', { bubbles: true, clientX: 300, clientY: 300 }));
            pointed += document.getElementById('tip').hidden ? 0 : 1;
        });
        point();
        for (const button of document.querySelectorAll('button')) { button.click(); point(); }
        const folders = document.querySelectorAll('svg .folder').length;
        document.querySelector('svg .folder').dispatchEvent(new MouseEvent('click', { bubbles: true }));
        const opened = document.querySelectorAll('.crumbs button').length;
        document.querySelectorAll('details').forEach((folded) => { folded.open = true; });
        document.body.dataset.visited = [pointed > 200, folders > 10, opened > 1].join();";
    let (before, policy) = page.split_once("<meta http-equiv").context("a policy")?;
    let (_, after) = policy.split_once(">\n").context("the policy ends")?;
    let visited = directory.join("visited.html");
    fs::write(
        &visited,
        format!("{before}{}", after.replace("</body>", &format!("<script>{VISITOR}</script></body>"))),
    )?;
    let document = drawn(&visited)?;
    let (_, said) = document.split_once("data-visited=\"").context("the visitor did not come to its end")?;
    ensure!(said.starts_with("true,true,true\""), "{said:.40}");
    Ok(())
}

/// The trace has every stage, as long as it was, inside the start.
fn perfetto(served: &Served, events: &Value) -> Result<()> {
    let (from, to) = (served.path("events.json"), served.path("trace.json"));
    tdfs::json(["report", "--events", &from, "--format", "perfetto", "-o", &to])?;
    let trace: Value = serde_json::from_str(&fs::read_to_string(to)?)?;
    let all = list(&trace["traceEvents"])?;
    let complete = |name: &str| all.iter().find(|e| e["ph"] == "X" && e["name"] == name).context("missing");
    let start = complete("start")?;
    let end = number(&start["ts"])? + number(&start["dur"])?;
    for stage in list(&events["stages"])? {
        let event = complete(stage["name"].as_str().context("a name")?)?;
        let took = (number(&stage["end_ms"])? - number(&stage["begin_ms"])?) * 1000.0;
        ensure!((number(&event["dur"])? - took).abs() < 1e-3, "{stage} {event}");
        let outside =
            event["tid"] == start["tid"] && number(&event["ts"])? + number(&event["dur"])? > end + 1e-3;
        ensure!(!outside, "{event} ends after {start}");
    }
    let reads = list(&events["waits"]["reads"])?.len() + list(&events["cold"]["reads"])?.len();
    let drawn = all.iter().filter(|e| e["args"]["kind"].is_string()).count();
    ensure!(drawn == reads, "{drawn} of {reads} reads");
    Ok(())
}

fn refusals(served: &Served) -> Result<()> {
    let (from, state) = (served.path("events.json"), served.path("other"));
    let error = tdfs::error(["report", &served.image, "--format", "perfetto", "--state", &state])?;
    ensure!(error.contains("--events"), "{error}");
    let text = fs::read_to_string(&from)?;
    let image = data_digest(&text)?;
    let other = served.path("other.json");
    fs::write(&other, text.replace(&image, &format!("sha256:{}", "0".repeat(64))))?;
    let error = tdfs::error(["report", &served.image, "--events", &other, "--state", &state])?;
    ensure!(error.contains("not of sha256:"), "{error}");
    fs::write(&other, &text[..text.len() / 2])?;
    let error = tdfs::error(["report", "--events", &other])?;
    ensure!(error.contains("no events of a start"), "{error}");
    Ok(())
}

fn data_digest(events: &str) -> Result<String> {
    let events: Value = serde_json::from_str(events)?;
    Ok(events["start"]["image"].as_str().context("an image")?.to_owned())
}

/// A name that would be a script is text.
fn hostile(served: &Served, mut events: Value) -> Result<()> {
    const NAME: &str = "</script><img src=x onerror=alert(1)>";
    events["reference"] = NAME.into();
    for file in events["files"].as_array_mut().context("files")? {
        file["path"] = NAME.into();
    }
    let (from, page) = (served.path("hostile.json"), served.path("hostile.html"));
    fs::write(&from, events.to_string())?;
    tdfs::json(["report", "--events", &from, "--output", &page])?;
    let document = drawn(page.as_ref())?;
    ensure!(!document.contains("<img"), "the name became an element");
    ensure!(document.contains("<h1 id=\"title\">&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;</h1>"));
    ensure!(document.matches("/&lt;/script&gt;&lt;img").count() > 0, "files are listed");
    Ok(())
}

/// Pages that were not recorded are cold, and the events say which, of what file, and that nothing of it was recorded.
#[test]
fn what_was_cold_and_why() -> Result<()> {
    let served = Served::new()?;
    let read = "cat /usr/share/common-licenses/GPL-3 > /dev/null; echo started; sleep 60";
    let more = ["--start", "fetched", "--ready", "log:^started", "--", "sh", "-c", read];
    let (report, events) = served.run(&served.image, "node", &more)?;
    let cold = &events["cold"];
    ensure!(whole(&report["cold_pages"])? > 0 && cold["lost"] == 0, "{report}");
    let pages: u64 = list(&cold["reads"])?.iter().map(|r| whole(&r["pages"])).sum::<Result<u64>>()?;
    ensure!(pages >= whole(&report["cold_pages"])? && whole(&cold["pages"])? == pages, "{cold}");
    let files = list(&events["files"])?;
    let at = files.iter().position(|f| f["path"] == "usr/share/common-licenses/GPL-3").context("not read")?;
    let size = whole(&files[at]["pages"])?;
    ensure!(files[at]["recorded_pages"] == 0 && files[at]["layer"].is_u64(), "{}", files[at]);
    let of_it = list(&cold["reads"])?.iter().filter(|r| r["file"] == at);
    let read: u64 = of_it.map(|r| whole(&r["pages"])).sum::<Result<u64>>()?;
    ensure!(read == size, "{read} of {size} pages");
    Ok(())
}

/// Ready while pages are on the wire: the events go on until the last one has come, as do the arrivals that they tell.
#[test]
fn events_go_on_beyond_ready() -> Result<()> {
    let served = Served::new()?;
    let proxy = Proxy::start(served.registry.addr, Pace::BytesPerSecond(1 << 20))?;
    let program = "print('started', flush=True); import time; time.sleep(60)";
    let more = ["--start", "streaming", "--ready", "log:^started", "--", "python3", "-S", "-c", program];
    let (report, events) = served.run(&format!("{}/python:latest", proxy.addr), "node", &more)?;
    ensure!(whole(&report["pages_awaited"])? > 0, "{report}");
    let last = list(&events["arrivals"]["samples"])?.last().context("samples")?;
    ensure!(last["pages"] == report["pages_needed"], "{last} {report}");
    ensure!(number(&last["ms"])? > number(&report["total_ms"])?, "{last} {report}");
    ensure!(number(&events["until_ms"])? >= number(&last["ms"])?, "{last}");
    Ok(())
}
