//! Many nodes at once: each a process with an empty state directory, all starting one service from one server.

use std::fs;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::unistd::Pid;
use serde_json::Value;
use tdfs_tests::images::{self, recipe};
use tdfs_tests::server::Server;
use tdfs_tests::tdfs;
use tempfile::TempDir;

const NODES: usize = 64;
/// What a request may hold (see the page service's documentation): its plan and 6 MiB of page data, and as much again
/// for its connection's buffers and the allocator.
const BYTES_PER_REQUEST: u64 = 12 << 20;

#[test]
fn sixty_four_nodes_start_at_once() -> Result<()> {
    let dir = TempDir::with_prefix("tdfs-fleet-")?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let server = Server::start(&dir.path().join("registry"), &[])?;
    let image = server.push(&images::image("nginx")?, "fleet/nginx:latest")?;
    let service = &recipe("nginx")?.services[0];
    let recorder = path("recorder");
    let record = ["record", &image, "--service", service.name, "--ready", service.ready, "--push"];
    tdfs::json(record.into_iter().chain(["--state", &recorder]))?;

    let before = peak(server.pid())?;
    let done = AtomicBool::new(false);
    let small = AtomicU64::new(0);
    let reports = thread::scope(|scope| {
        // A small request gets its answer while large ones are under way.
        let asking = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                ask(&server)?;
                small.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        let reports = start_all(&image, service.name, &path("node"));
        done.store(true, Ordering::Relaxed);
        let asked: Result<()> = asking.join().unwrap_or_else(|_| anyhow::bail!("the asker panicked"));
        asked.context("a small request beside the large ones").and(reports)
    })?;
    for report in &reports {
        let number = |field: &str| report[field].as_u64().with_context(|| format!("{field} in {report}"));
        ensure!(number("pages_fetched")? == number("pages_needed")?, "{report}");
        ensure!(number("pages_present")? == 0, "{report}");
    }
    ensure!(reports.len() == NODES);
    ensure!(small.into_inner() > 0);
    let grown = peak(server.pid())?.saturating_sub(before);
    ensure!(grown <= NODES as u64 * BYTES_PER_REQUEST, "the server grew by {grown} bytes");
    Ok(())
}

/// Starts every node and waits for all.
fn start_all(image: &str, service: &str, state: &str) -> Result<Vec<Value>> {
    let start = |n: usize| -> Result<Child> {
        let state = format!("{state}-{n}");
        let run = ["--json", "run", image, "--service", service, "--state", &state];
        let mut command =
            tdfs::command(run.into_iter().chain(["--network", "private", "--exit-when-ready"]))?;
        // All of them share a few processors.
        command.args(["--timeout", "5m", "--start", "fetched"]);
        Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    };
    let nodes = (0..NODES).map(start).collect::<Result<Vec<_>>>()?;
    // Each to its end, also after a failure: none may be left behind.
    let ended: Vec<_> = nodes.into_iter().map(Child::wait_with_output).collect();
    ended
        .into_iter()
        .map(|output| {
            let output = output?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success(), "a node failed: {said}");
            serde_json::from_slice(&output.stdout).with_context(|| said)
        })
        .collect()
}

/// One request that needs nothing from storage but a lookup.
fn ask(server: &Server) -> Result<()> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(server.addr)?;
    // A guard against hanging for ever, not a measurement.
    stream.set_read_timeout(Some(Duration::from_mins(1)))?;
    stream.write_all(b"GET /v2/ HTTP/1.1\r\nHost: registry\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(())
}

/// Peak of the memory that a process held, bytes.
fn peak(pid: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}
