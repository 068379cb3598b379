//! `cargo xtask fuzz`: every fuzz target for some time, coverage-guided.
//!
//! Needs a nightly toolchain (`rustup toolchain install nightly`): the sanitizer and coverage flags are not stable. What
//! the fuzzer found interesting stays in `tests/fuzz/corpus` and is the start of the next run.

use std::process::Command;

use anyhow::{Context, Result, bail};
use xtask::command;
use xtask::tools::cargo_tool;

const CARGO_FUZZ: &str = "0.13.2";

/// Runs the targets called `names` (all if none is named) for `seconds` each.
pub fn run(names: &[String], seconds: u32) -> Result<()> {
    let cargo_fuzz = cargo_tool("cargo-fuzz", CARGO_FUZZ)?;
    let fuzz = |action: &str| {
        let mut command = Command::new(&cargo_fuzz);
        // The cargo that runs this program would win otherwise.
        command.env("RUSTUP_TOOLCHAIN", "nightly").env_remove("CARGO").current_dir(command::workspace());
        // GCC's instrumentation does not fit the runtime of the compiler of Rust: it finds errors in zstd that are none.
        command.env("CFLAGS", "-fno-sanitize=address").env("CXXFLAGS", "-fno-sanitize=address");
        command.args(["fuzz", action, "--fuzz-dir", "tests/fuzz"]);
        command
    };
    let known = command::output(&mut fuzz("list")).context("cargo-fuzz with a nightly toolchain")?;
    let known: Vec<&str> = known.lines().collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("no fuzz target {unknown:?}: there are {}", known.join(", "));
    }
    for target in known.iter().filter(|target| names.is_empty() || names.iter().any(|name| name == *target)) {
        println!("==> {target}");
        command::run(fuzz("run").args(["--target-dir", "target/fuzz", target, "--"]).args([
            format!("-max_total_time={seconds}"),
            // A clean parser neither needs more memory for inputs this small, nor longer for one of them.
            "-rss_limit_mb=2048".into(),
            "-timeout=10".into(),
            "-print_final_stats=1".into(),
            "-verbosity=0".into(),
        ]))
        .with_context(|| format!("fuzz target {target}"))?;
    }
    Ok(())
}
