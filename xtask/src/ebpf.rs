//! Builds the probe and keeps `tdfs-ebpf/prebuilt/tdfs-ebpf.o`, which the agent embeds.
//!
//! `core` for BPF comes from one of two places: Debian's `rustc-web` ships it compiled, elsewhere rustup's
//! `rust-src` is compiled along (`-Z build-std`). What is missing is installed; where neither works, the committed
//! object serves. The object holds BTF but no DWARF and no path of this machine, and two builds are equal byte for
//! byte.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::install;

/// What both routes must share for equal objects, and the newest whose LLVM bpf-linker can read.
const RUST: &str = "1.96.0";
const LINKER: &str = "0.10.4";
const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

/// Where `core` for BPF comes from.
enum Route {
    /// Debian's rustc with its compiled `core`, and the LLVM it is linked with.
    Debian { llvm: PathBuf },
    /// rustup's toolchain with `rust-src`.
    Rustup,
}

/// Builds the probe and replaces the committed object; with `check`, compares instead and fails on a difference.
pub fn run(check: bool) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
    let prebuilt = root.join("tdfs-ebpf/prebuilt/tdfs-ebpf.o");
    let route = match route() {
        Ok(route) => route,
        Err(e) if prebuilt.exists() && !check => {
            println!("ebpf: no toolchain for BPF ({e:#}); using the committed object");
            return Ok(());
        }
        Err(e) => return Err(e.context("no toolchain for BPF")),
    };
    match &route {
        Route::Debian { llvm } => println!("ebpf: Debian's rustc {RUST} with {}", llvm.display()),
        Route::Rustup => println!("ebpf: rustup's toolchain {RUST} with rust-src"),
    }
    let target_dir = root.join("target/bpf").join(if check { "check" } else { "build" });
    let object = strip(&build(root, &route, &target_dir)?)?;
    for path in [root, &cargo_home()?] {
        let path = path.as_os_str().as_encoded_bytes();
        ensure!(!object.windows(path.len()).any(|w| w == path), "the object holds a path of this machine");
    }
    if check {
        let committed = fs::read(&prebuilt).with_context(|| prebuilt.display().to_string())?;
        ensure!(committed == object, "the committed object differs from its source: run `cargo xtask ebpf`");
        println!("ebpf: the committed object matches its source ({} bytes)", object.len());
    } else if fs::read(&prebuilt).is_ok_and(|committed| committed == object) {
        println!("ebpf: {} bytes, as committed", object.len());
    } else {
        fs::create_dir_all(prebuilt.parent().unwrap_or(root))?;
        fs::write(&prebuilt, &object).with_context(|| prebuilt.display().to_string())?;
        println!("ebpf: wrote {} ({} bytes)", prebuilt.display(), object.len());
    }
    Ok(())
}

/// The first route that works here, after installing what it needs.
fn route() -> Result<Route> {
    let route = debian().or_else(|debian| {
        rustup()
            .map_err(|rustup| rustup.context(format!("Debian's packages: {debian:#}; rustup's toolchain")))
    })?;
    linker()?;
    Ok(route)
}

fn debian() -> Result<Route> {
    let installed = || -> Result<()> {
        let version = output(Command::new(DEBIAN_RUSTC).arg("--version"))?;
        ensure!(version.starts_with(&format!("rustc {RUST} ")), "{DEBIAN_RUSTC} is {}", version.trim());
        let sysroot = output(Command::new(DEBIAN_RUSTC).args(["--print", "sysroot"]))?;
        let core = Path::new(sysroot.trim()).join("lib/rustlib").join(TARGET);
        ensure!(core.exists(), "{} is missing", core.display());
        Ok(())
    };
    if installed().is_err() {
        install::packages(&DEBIAN_PACKAGES)?;
        installed()?;
    }
    let libraries = output(Command::new("ldd").arg(DEBIAN_RUSTC))?;
    let llvm = libraries.split_whitespace().find(|w| w.starts_with('/') && w.contains("libLLVM"));
    Ok(Route::Debian { llvm: llvm.context("Debian's rustc is not linked with a shared LLVM")?.into() })
}

fn rustup() -> Result<Route> {
    let installed = || output(Command::new("rustup").args(["run", RUST, "rustc", "--print", "sysroot"]));
    let has_sources =
        |sysroot: &str| Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").exists();
    if !installed().is_ok_and(|s| has_sources(&s)) {
        let args = ["toolchain", "install", RUST, "--profile", "minimal", "--component", "rust-src"];
        run_command(Command::new("rustup").args(args))?;
        ensure!(has_sources(&installed()?), "rustup's toolchain {RUST} has no rust-src");
    }
    Ok(Route::Rustup)
}

fn linker() -> Result<()> {
    let installed = || output(Command::new("bpf-linker").arg("--version")).is_ok_and(|v| v.contains(LINKER));
    if !installed() {
        run_command(Command::new("cargo").args(["install", "bpf-linker", "--version", LINKER, "--locked"]))?;
        ensure!(installed(), "bpf-linker {LINKER} is not in PATH");
    }
    Ok(())
}

/// Compiles the probe; the object as the linker wrote it.
fn build(root: &Path, route: &Route, target_dir: &Path) -> Result<Vec<u8>> {
    let mut flags: Vec<OsString> = Vec::new();
    for flag in ["--cfg=bpf_target_arch=\"x86_64\"", "-Cdebuginfo=2", "-Clink-arg=--btf"] {
        flags.push(flag.into());
    }
    let mut remap = |path: &Path, name: &str| {
        let mut flag = OsString::from("--remap-path-prefix=");
        flag.push(path);
        flag.push("=");
        flag.push(name);
        flags.push(flag);
    };
    remap(root, "/tdfs");
    // The directory is named after the registry or its mirror. It exists: this program has dependencies too.
    for registry in fs::read_dir(cargo_home()?.join("registry/src")).context("cargo's registry sources")? {
        remap(&registry?.path(), "/crates");
    }
    let mut command = match route {
        Route::Debian { llvm } => {
            // bpf-linker takes the LLVM it finds first: there must be exactly one.
            let directory = target_dir.with_file_name("llvm");
            let _ = fs::remove_dir_all(&directory);
            fs::create_dir_all(&directory)?;
            symlink(llvm, directory.join(llvm.file_name().context("LLVM without a file name")?))?;
            let mut command = Command::new("cargo");
            command.env("RUSTC", DEBIAN_RUSTC).env("LD_LIBRARY_PATH", &directory);
            command
        }
        Route::Rustup => {
            let mut command = Command::new("rustup");
            command.args(["run", RUST, "cargo"]);
            command
        }
    };
    command.current_dir(root).args(["build", "--quiet", "--locked", "--release", "-p", "tdfs-ebpf"]);
    command.args(["--target", TARGET]).arg("--target-dir").arg(target_dir);
    if matches!(route, Route::Rustup) {
        command.args(["-Z", "build-std=core"]);
    }
    command.env("RUSTC_BOOTSTRAP", "1").env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f".as_ref()));
    // Set by the cargo that runs this program, for another toolchain.
    for stale in ["RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO"] {
        if matches!(route, Route::Rustup) || stale != "RUSTUP_TOOLCHAIN" {
            command.env_remove(stale);
        }
    }
    run_command(&mut command)?;
    let object = target_dir.join(TARGET).join("release/tdfs-ebpf");
    fs::read(&object).with_context(|| object.display().to_string())
}

/// Removes DWARF, for only BTF reaches the kernel: its sections become empty ones of type SHT_NULL, so that all section
/// and symbol numbers stay, and the others move together. (ELF-64, "Section Header": little-endian, 64 bytes each.)
fn strip(object: &[u8]) -> Result<Vec<u8>> {
    const EHDR: usize = 64;
    const SHDR: usize = 64;
    let u64_at = |at: usize| Some(u64::from_le_bytes(*object.get(at..)?.first_chunk()?) as usize);
    let u32_at = |at: usize| Some(u32::from_le_bytes(*object.get(at..)?.first_chunk()?) as usize);
    let u16_at = |at: usize| Some(u16::from_le_bytes(*object.get(at..)?.first_chunk()?) as usize);
    let stripped = || -> Option<Vec<u8>> {
        let (table, count, names) = (u64_at(40)?, u16_at(60)?, u16_at(62)?);
        let names = object.get(u64_at(table + names * SHDR + 24)?..)?;
        let mut headers = object.get(table..table + count * SHDR)?.to_vec();
        let mut out = object.get(..EHDR)?.to_vec();
        for n in 0..count {
            let header = table + n * SHDR;
            let (offset, size) = (u64_at(header + 24)?, u64_at(header + 32)?);
            let name = names.get(u32_at(header)?..)?;
            let into = &mut headers[n * SHDR..(n + 1) * SHDR];
            if name.starts_with(b".debug") || name.starts_with(b".rel.debug") {
                into[4..].fill(0);
            } else if offset != 0 {
                out.resize(out.len().next_multiple_of(8), 0);
                into[24..32].copy_from_slice(&(out.len() as u64).to_le_bytes());
                out.extend_from_slice(object.get(offset..offset + size)?);
            }
        }
        out.resize(out.len().next_multiple_of(8), 0);
        let table = out.len() as u64;
        out[40..48].copy_from_slice(&table.to_le_bytes());
        out.append(&mut headers);
        Some(out)
    };
    ensure!(object.starts_with(b"\x7fELF\x02\x01"), "the linker wrote no ELF object");
    stripped().context("the linker wrote a damaged ELF object")
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    Ok(Path::new(&std::env::var_os("HOME").context("HOME is not set")?).join(".cargo"))
}

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_owned();
    let out = command.output().with_context(|| format!("{}", name.display()))?;
    ensure!(
        out.status.success(),
        "{} failed: {}",
        name.display(),
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn run_command(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_owned();
    let status = command.status().with_context(|| format!("{}", name.display()))?;
    if !status.success() {
        bail!("{} failed ({status})", name.display());
    }
    Ok(())
}
