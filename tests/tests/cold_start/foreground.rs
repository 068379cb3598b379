//! `tdfs run` in the foreground: signals, and events that cannot be written.

use nix::sys::signal::Signal;

use super::*;

fn start(recorded: &Recorded, more: &[&str]) -> Result<tdfs::Running> {
    let node = show(&recorded.path("node"));
    let run = ["run", &recorded.reference(), "--network", "private", "--state", &node].map(str::to_owned);
    tdfs::Running::start(run.into_iter().chain(more.iter().map(|m| (*m).to_owned())))
}

#[test]
fn a_signal_right_after_the_report_reaches_the_container() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    for _ in 0..10 {
        // nginx ends by it, with success.
        let status = start(&recorded, &[])?.stop(Signal::SIGINT)?;
        ensure!(status.success(), "{status}");
    }
    expect_clean(&recorded.path("node"))
}

#[test]
fn events_that_cannot_be_written_leave_the_container_alone() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    let running = start(&recorded, &["--events", "/dev/full"])?;
    ensure!(running.report["start_mode"] != Value::Null, "{}", running.report);
    nix::sys::signal::kill(running.pid(), Signal::SIGINT)?;
    let (status, messages) = running.finish()?;
    // Once as a warning when it was ready, once as the error of the command when the container had ended.
    ensure!(messages.matches("cannot write /dev/full").count() == 2, "{messages}");
    ensure!(!status.success() && messages.lines().any(|line| line.starts_with("tdfs: ")), "{messages}");

    let events = show(&recorded.path("events.json"));
    let absent = format!("{}:absent", recorded.reference());
    tdfs::error(["run", &absent, "--state", &show(&recorded.path("node")), "--events", &events])?;
    ensure!(!Path::new(&events).exists(), "a start that failed leaves no events");
    expect_clean(&recorded.path("node"))
}
