//! The server is killed (`kill -9`) while pages are on the wire.

use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tdfs_tests::proxy::{Pace, Proxy};
use tdfs_tests::server::Server;
use tdfs_tests::tdfs;

use crate::{Served, expect_clean, number, source};

/// Slow enough to be killed in the middle. What the kernel has taken from the server already, about a megabyte, comes
/// also afterwards.
const SLOW: Pace = Pace::BytesPerSecond(2 << 20);

/// A start that goes on in the background.
fn start(arguments: Vec<String>) -> Result<Child> {
    let mut command = tdfs::command(["--json"])?;
    Ok(command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// Kills `server` when `bytes` of its answers are through. The start `node` must be waiting for more.
fn kill_at(bytes: u64, proxy: &Proxy, server: &mut Server, node: &mut Child) -> Result<()> {
    while proxy.passed() < bytes && node.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    server.stop(Signal::SIGKILL)?;
    ensure!(node.try_wait()?.is_none(), "it was over before the server was killed");
    Ok(())
}

fn report(node: Child) -> Result<Value> {
    let Output { status, stdout, stderr } = node.wait_with_output()?;
    let said = String::from_utf8_lossy(&stderr);
    ensure!(status.success(), "{status}: {said}");
    serde_json::from_slice(&stdout).with_context(|| said.into_owned())
}

#[test]
fn a_mirror_is_replaced_by_the_registry_which_sends_only_what_is_missing() -> Result<()> {
    let served = Served::new("python")?;
    let registry = served.server(&[])?;
    for (mode, tenths) in [("fetched", 1), ("fetched", 4), ("streaming", 2)] {
        let node = format!("{mode}-{tenths}");
        let mut mirror = served.server(&[])?;
        let proxy = Proxy::start(mirror.addr, SLOW)?;
        let more = ["--start", mode, "--mirror", &format!("http://{}", proxy.addr)];
        let mut child = start(served.run(registry.addr, &node, &more))?;
        kill_at(served.tenths(tenths), &proxy, &mut mirror, &mut child)?;
        let report = report(child)?;
        let needed = number(&report, "pages_needed")?;
        let brought = number(source(&report, "mirror"), "pages")?;
        ensure!(0 < brought && brought < needed, "{report}");
        ensure!(number(&source(&report, "mirror")["failures"], "broken")? > 0, "{report}");
        // Beside a stream, what readers wait for is asked for apart, and may be all that is missing.
        if mode == "fetched" {
            let rest = source(&report, "page_service");
            ensure!(rest["requests"] == 1 && number(rest, "pages")? == needed - brought, "{report}");
            ensure!(source(&report, "ranges").is_null(), "{report}");
        }
        ensure!(number(&report, "pages_fetched")? == needed, "{report}");
        let again = tdfs::json(served.run(registry.addr, &node, &[]))?;
        ensure!(again["source"] == "resident", "{again}");
        served.expect_right(registry.addr, &node)?;
    }
    Ok(())
}

#[test]
fn a_server_that_comes_back_is_asked_for_the_rest() -> Result<()> {
    let served = Served::new("python")?;
    for (mode, tenths) in [("fetched", 2), ("streaming", 4)] {
        let node = format!("{mode}-{tenths}");
        let mut server = served.server(&[])?;
        let proxy = Proxy::start(server.addr, SLOW)?;
        let mut child = start(served.run(proxy.addr, &node, &["--start", mode]))?;
        kill_at(served.tenths(tenths), &proxy, &mut server, &mut child)?;
        let server = served.server(&["--listen", &server.addr.to_string()])?;
        let report = report(child)?;
        ensure!(number(&report, "pages_fetched")? == number(&report, "pages_needed")?, "{report}");
        ensure!(number(&source(&report, "page_service")["failures"], "broken")? > 0, "{report}");
        if mode == "fetched" {
            // Nothing of what had arrived came again, by whichever source it went on.
            ensure!(number(&report, "bytes_fetched")? == served.data, "{} {report}", served.data);
        }
        served.expect_right(server.addr, &node)?;
    }
    Ok(())
}

#[test]
fn without_any_server_left_it_is_one_error_and_the_next_start_goes_on() -> Result<()> {
    let served = Served::new("python")?;
    for mode in ["fetched", "streaming"] {
        for tenths in [1, 4] {
            let node = format!("{mode}-{tenths}");
            let mut server = served.server(&[])?;
            let proxy = Proxy::start(server.addr, SLOW)?;
            let mut child = start(served.run(proxy.addr, &node, &["--start", mode]))?;
            kill_at(served.tenths(tenths), &proxy, &mut server, &mut child)?;
            let Output { status, stdout, stderr } = child.wait_with_output()?;
            let said = String::from_utf8_lossy(&stderr);
            ensure!(status.code() == Some(1) && stdout.is_empty(), "{mode} {tenths}: {status} {said}");
            let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("tdfs: ")).collect();
            ensure!(errors.len() == 1 && said.lines().last() == errors.first().copied(), "{mode}: {said}");
            ensure!(errors[0].contains(&proxy.addr.to_string()), "it says who is away: {said}");
            expect_clean(&served.path(&node))?;

            let server = served.server(&["--listen", &server.addr.to_string()])?;
            proxy.hurry();
            let healed = tdfs::json(served.run(proxy.addr, &node, &["--start", mode]))?;
            let present = number(&healed, "pages_present")?;
            ensure!(present > 0 && present < number(&healed, "pages_needed")?, "{healed}");
            ensure!(source(&healed, "page_service")["requests"] == 1, "{healed}");
            if mode == "fetched" {
                ensure!(number(&healed, "pages_fetched")? == number(&healed, "pages_needed")? - present);
            }
            served.expect_right(server.addr, &node)?;
        }
    }
    Ok(())
}
