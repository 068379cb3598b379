//! Programs from crates.io and PyPI that checks run: taken from the PATH, or else put once into `target/tools`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::command;

/// The program of crate `name`, built in `version` unless some version of it is on the PATH.
///
/// # Errors
///
/// When cargo cannot build it.
pub fn cargo_tool(name: &str, version: &str) -> Result<PathBuf> {
    if command::exists(name) {
        return Ok(name.into());
    }
    let tools = command::workspace().join("target/tools");
    let program = tools.join("bin").join(name);
    if !program.is_file() {
        // A debug build takes half the time and is fast enough for what these programs do here.
        command::run(
            Command::new("cargo")
                .args(["install", name, "--version", version, "--locked", "--debug", "--quiet"])
                .args(["--no-default-features", "--root"])
                .arg(&tools)
                .env("CARGO_TARGET_DIR", tools.join("build"))
                .env("CARGO_PROFILE_DEV_DEBUG", "0"),
        )?;
        // Some hundred megabytes that nothing needs any more.
        fs::remove_dir_all(tools.join("build"))?;
    }
    Ok(program)
}

/// The program `name` of the Python package `package` (`package==version`), in an environment of its own.
///
/// # Errors
///
/// When pip cannot install it.
pub fn python_tool(name: &str, package: &str) -> Result<PathBuf> {
    if command::exists(name) {
        return Ok(name.into());
    }
    let directory = command::workspace().join("target/tools").join(name);
    let program = directory.join("bin").join(name);
    if !program.is_file() {
        command::output(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory))?;
        let mut pip = Command::new(directory.join("bin/pip"));
        command::output(pip.args(["install", "--quiet", "--disable-pip-version-check", package]))?;
    }
    Ok(program)
}
