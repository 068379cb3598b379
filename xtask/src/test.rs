//! `cargo xtask test`: everything that has to hold before a change is taken.
//!
//! Cheap checks come first, the tests come last: their runner's summary closes the output. Tests of the crate
//! `tdfs-tests` mount, trace and start containers, so they run one at a time; all others run side by side.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};
use xtask::images::{Cache, Compression, IMAGES};
use xtask::tools::cargo_tool;
use xtask::{command, ebpf, install};

/// A version that the pinned toolchain builds.
const CARGO_DENY: &str = "0.20.2";

/// Runs all checks and tests; with `quick` only those that need neither root nor images.
pub fn run(quick: bool) -> Result<()> {
    let started = Instant::now();
    let mut stages = Stages::default();
    if !quick {
        install::require_root("to mount, trace and run containers; `--quick` runs what needs no root")?;
        stages.run("packages", || {
            install::packages(install::IMAGE_PACKAGES)?;
            install::packages(install::RUN_PACKAGES)?;
            install::packages(install::TEST_PACKAGES)
        })?;
    }
    stages.run("fmt", || command::run(cargo().args(["fmt", "--all", "--check"])))?;
    stages.run("clippy", || {
        command::run(cargo().args([
            "clippy",
            "--locked",
            "--all-targets",
            "--quiet",
            "--",
            "--deny",
            "warnings",
        ]))
    })?;
    stages.run("doc", || {
        let flags = "--deny warnings";
        command::run(cargo().args(["doc", "--locked", "--no-deps", "--quiet"]).env("RUSTDOCFLAGS", flags))
    })?;
    if quick {
        stages.run("unit tests", || {
            test(&["--workspace", "--exclude", "tdfs-ebpf", "--exclude", "tdfs-tests"], &[])
        })?;
    } else {
        stages.run("ebpf", check_ebpf)?;
        stages.run("deny", deny)?;
        stages.run("images", || {
            IMAGES.iter().try_for_each(|image| Cache::default().image(image, Compression::Gzip).map(|_| ()))
        })?;
        // The end-to-end tests run the program that lies beside them.
        stages.run("build", || command::run(cargo().args(["build", "--locked"])))?;
        stages.run("tests", all_tests)?;
    }
    println!("everything passed in {:.0} s ({stages})", started.elapsed().as_secs_f64());
    Ok(())
}

fn cargo() -> Command {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(command::workspace());
    cargo
}

/// The committed probe must be what its source builds. A machine without a toolchain for BPF cannot tell; CI has one.
fn check_ebpf() -> Result<()> {
    match ebpf::run(true) {
        Err(error) if !is_ci() && error.to_string() == "no toolchain for BPF" => {
            println!("ebpf: not checked, {error:#}");
            Ok(())
        }
        result => result,
    }
}

fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|ci| ci == "true")
}

/// Licences, sources and banned crates. Advisories are left out: their database is not on a package registry, and a
/// new entry must not fail an unchanged tree.
fn deny() -> Result<()> {
    let program = cargo_tool("cargo-deny", CARGO_DENY)?;
    let checks = ["--all-features", "check", "bans", "licenses", "sources"];
    command::run(Command::new(program).args(checks).current_dir(command::workspace()))
}

fn all_tests() -> Result<()> {
    if has_nextest() {
        return test(&["--workspace", "--exclude", "tdfs-ebpf"], &[]);
    }
    test(&["--workspace", "--exclude", "tdfs-ebpf", "--exclude", "tdfs-tests"], &[])?;
    test(&["--package", "tdfs-tests"], &["--", "--test-threads=1"])
}

fn has_nextest() -> bool {
    Command::new("cargo").args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success())
}

/// nextest isolates tests in processes and ends those that hang (`.config/nextest.toml`); cargo test does without.
fn test(packages: &[&str], arguments: &[&str]) -> Result<()> {
    let mut command = cargo();
    if has_nextest() {
        command.args(["nextest", "run", "--locked", "--no-fail-fast"]).args(packages);
    } else {
        command.args(["test", "--locked", "--no-fail-fast", "--quiet"]).args(packages).args(arguments);
    }
    // Errors of tests say where they come from; thirty frames of the test runner would bury that.
    command::run(command.env("RUST_LIB_BACKTRACE", "0"))
}

/// How long each stage took.
#[derive(Default)]
struct Stages {
    done: Vec<(&'static str, u64)>,
}

impl Stages {
    fn run(&mut self, name: &'static str, stage: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("==> {name}");
        let started = Instant::now();
        if let Err(error) = stage() {
            bail!(error.context(format!("{name} failed")));
        }
        self.done.push((name, started.elapsed().as_secs()));
        Ok(())
    }
}

impl std::fmt::Display for Stages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (name, seconds)) in self.done.iter().enumerate() {
            write!(f, "{}{name} {seconds} s", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
