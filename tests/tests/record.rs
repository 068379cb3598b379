//! The recorder against known page sets.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tdfs_agent::record::order::first_use;
use tdfs_agent::record::tracer::Events;
use tdfs_agent::record::{Tracer, TracerOptions, residency};
use tdfs_common::trace::Method;
use tempfile::TempDir;

const TOUCHER: &str = env!("CARGO_BIN_EXE_toucher");
const PAGES: u64 = 3000;

/// A private EROFS mount with read-ahead 0: `a` and `b` hold PAGES pages each and a bit more, `toucher` is the program.
struct Mount {
    dir: TempDir,
}

impl Mount {
    fn new() -> Result<Self> {
        let dir = TempDir::new()?;
        let (files, image) = (dir.path().join("files"), dir.path().join("image"));
        fs::create_dir(&files)?;
        for name in ["a", "b"] {
            let bytes: Vec<u8> = (0..PAGES * 4096 + 100).map(|n| (n % 251) as u8).collect();
            fs::write(files.join(name), bytes)?;
        }
        fs::copy(TOUCHER, files.join("toucher"))?;
        run(Command::new("mkfs.erofs").arg("--quiet").arg(&image).arg(&files))?;
        fs::create_dir(dir.path().join("mount"))?;
        let mount = Self { dir };
        run(Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(&image).arg(mount.path()))?;
        let (major, minor) = mount.device()?;
        fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), "0")?;
        Ok(mount)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mount")
    }

    fn device(&self) -> Result<(u32, u32)> {
        let dev = fs::metadata(self.path())?.dev();
        Ok((nix::sys::stat::major(dev) as u32, nix::sys::stat::minor(dev) as u32))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    fn options(&self, method: Method) -> Result<TracerOptions> {
        let sizes = [PAGES * 4096 + 100, PAGES * 4096 + 100, fs::metadata(TOUCHER)?.len()];
        Ok(TracerOptions { method: Some(method), ..TracerOptions::new(self.device()?, sizes.into_iter()) })
    }

    /// Pages of the file in the page cache.
    fn resident(&self, name: &str) -> Result<BTreeSet<u32>> {
        Ok(residency::resident(&File::open(self.file(name))?)?.iter().map(|p| p as u32).collect())
    }

    /// Recorded pages of the file in order of first use.
    fn recorded(&self, events: &Events, name: &str) -> Result<Vec<u32>> {
        let ino = fs::metadata(self.file(name))?.ino();
        let runs = first_use(&events.pages, u64::MAX);
        Ok(runs.into_iter().filter(|r| r.ino == ino).flat_map(|r| r.pages).collect())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

fn run(command: &mut Command) -> Result<()> {
    let out = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// `n` distinct pages in a random order that `seed` determines.
fn random_pages(seed: u64, n: usize) -> Vec<u32> {
    let mut state = seed * 2 + 1;
    let mut pages = Vec::new();
    while pages.len() < n {
        // Knuth's MMIX generator.
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let page = (state >> 33) as u32 % PAGES as u32;
        if !pages.contains(&page) {
            pages.push(page);
        }
    }
    pages
}

fn step(how: &str, path: &Path, pages: &[u32]) -> String {
    let pages: Vec<String> = pages.iter().map(u32::to_string).collect();
    format!("{how}:{}:{}", path.display(), pages.join(","))
}

const WAYS: [&str; 9] =
    ["read", "pread", "readv", "mmap", "populate", "sendfile", "splice", "uring", "willneed"];

#[test]
fn every_way_to_touch_a_page_is_recorded_exactly() -> Result<()> {
    for method in [Method::TpBtf, Method::Tracepoint] {
        for (n, how) in WAYS.into_iter().enumerate() {
            let mount = Mount::new()?;
            let tracer = Tracer::attach(&mount.options(method)?)?;
            let pages = random_pages(n as u64, 120);
            run(Command::new(TOUCHER).arg(step(how, &mount.file("a"), &pages)))?;
            let events = tracer.finish()?;
            assert_eq!(events.lost, 0);
            assert_eq!(
                mount.recorded(&events, "a")?,
                pages,
                "{how} by {method:?}: pages in order of first use"
            );
            let known: BTreeSet<u32> = pages.into_iter().collect();
            assert_eq!(mount.resident("a")?, known, "{how}: residency");
            assert!(mount.recorded(&events, "b")?.is_empty());
        }
    }
    Ok(())
}
