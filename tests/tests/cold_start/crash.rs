//! `kill -9` at any moment leaves a state directory that the next command uses correctly.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tdfs_tests::fingerprint::Fingerprint;
use tdfs_tests::images::{self, Unpacked};
use tdfs_tests::synthetic::Random;
use tdfs_tests::tdfs;

use crate::{Recorded, expect_clean, run, show, text};

#[test]
fn killed_at_random_moments() -> Result<()> {
    let recorded = Recorded::new("python", 1)?;
    let node = recorded.path("node");
    let mut random = Random(20_261_121);
    let mut ready = 0;
    for round in 0..16 {
        if round % 4 == 0 {
            // Every fourth round starts from nothing; the others from what the killed ones left.
            let _ = std::fs::remove_dir_all(node.join("zones"));
        }
        let mut arguments = text(["--json", "run"]);
        arguments.extend([recorded.reference(), "--network".into(), "private".into()]);
        arguments.extend(["--state".into(), show(&node)]);
        let mut child = tdfs::command(arguments)?.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_millis(random.below(400)));
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL)?;
        let output = child.wait_with_output()?;
        ready += usize::from(!output.stdout.is_empty());
        child = tdfs::command(["inspect", &recorded.reference(), "--state", &show(&node)])?
            .stdout(Stdio::null())
            .spawn()?;
        ensure!(child.wait()?.success(), "the command after a crash cleans up");
        expect_clean(&node)?;
    }
    ensure!(ready < 16, "none of the processes was killed in the middle of a start");
    let report = run(&recorded.reference(), &node, &[])?;
    ensure!(report["service"] == "http", "{report}");

    let oracle = Fingerprint::of(&Unpacked::new(&images::image("python")?, "latest")?.path())?;
    tdfs::mounted(&recorded.reference(), &node, Fingerprint::of)?.expect_equal(&oracle)?;
    expect_clean(&node)
}

#[test]
fn a_mount_whose_server_was_killed_is_removed() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    let (node, target) = (recorded.path("node"), tempfile::tempdir()?);
    let mounted =
        tdfs::json(["mount", &recorded.reference(), &show(target.path()), "--state", &show(&node)])?;
    let pid = mounted["pid"].as_i64().unwrap_or_default();
    ensure!(pid > 1, "{mounted}");
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL)?;
    // Its lock goes with it, but not before the kernel has taken it down.
    while std::path::Path::new(&format!("/proc/{pid}")).exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let report = run(&recorded.reference(), &node, &[])?;
    ensure!(report["source"] == "resident", "{report}");
    ensure!(std::fs::read_dir(target.path())?.next().is_none(), "the dead mount is gone");
    expect_clean(&node)
}
