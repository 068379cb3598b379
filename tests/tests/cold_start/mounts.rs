//! Every file through a mount equals the image as another tool unpacks it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tdfs_tests::fingerprint::Fingerprint;
use tdfs_tests::images::{self, Compression, Unpacked, image_with};
use tdfs_tests::registry::{Options, Registry};
use tdfs_tests::tdfs;

use crate::{Recorded, expect_clean, number, show, text, tool};

/// `tdfs mount`, compare, `tdfs umount`.
fn compare(reference: &str, state: &Path, more: &[&str], oracle: &Fingerprint) -> Result<()> {
    let target = tempfile::tempdir()?;
    let mut arguments = text(["mount", reference]);
    arguments.extend([show(target.path()), "--state".into(), show(state)]);
    arguments.extend(more.iter().map(|m| (*m).to_owned()));
    tdfs::json(arguments)?;
    let seen = Fingerprint::of(target.path());
    tdfs::json(["umount", &show(target.path()), "--state", &show(state)])?;
    seen?.expect_equal(oracle).with_context(|| format!("{reference} {more:?}"))?;
    expect_clean(state)
}

fn every_way(name: &str) -> Result<()> {
    let recorded = Recorded::new(name, 1)?;
    let unpacked = Unpacked::new(&images::image(name)?, "latest")?;
    let oracle = Fingerprint::of(&unpacked.path())?;
    let (with, without) = (recorded.path("with"), recorded.path("without"));
    compare(&recorded.reference(), &with, &[], &oracle)?;
    compare(&recorded.reference(), &with, &[], &oracle)?;
    compare(&recorded.reference(), &without, &["--no-runtime-image"], &oracle)?;
    compare(&recorded.reference(), &without, &["--no-runtime-image"], &oracle)
}

#[test]
fn nginx_is_the_same() -> Result<()> {
    every_way("nginx")
}

#[test]
fn redis_is_the_same() -> Result<()> {
    every_way("redis")
}

#[test]
fn python_is_the_same() -> Result<()> {
    every_way("python")
}

#[test]
fn pytorch_is_the_same() -> Result<()> {
    every_way("pytorch")
}

#[test]
fn zstd_layers_are_the_same() -> Result<()> {
    for compression in [Compression::Zstd, Compression::ZstdSeekable] {
        let layout = image_with("nginx", compression)?;
        let index: serde_json::Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
        let tag = index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"].as_str();
        let tag = tag.context("no tag")?.to_owned();
        // umoci of Debian knows no zstd: the same tree, compressed with gzip, is the oracle.
        let oracle = Fingerprint::of(&Unpacked::new(&images::image("nginx")?, "latest")?.path())?;
        let dir = tempfile::tempdir()?;
        let reference = format!("oci:{}:{tag}", layout.display());
        let output = dir.path().join("layout");
        let mut record = text(["record", &reference, "--service", "web", "--ready", "tcp:80", "--output"]);
        record.extend([show(&output), "--state".into(), show(&dir.path().join("recorder"))]);
        tdfs::json(record)?;
        let reference = format!("oci:{}", output.display());
        compare(&reference, &dir.path().join("node"), &[], &oracle)?;
    }
    Ok(())
}

#[test]
fn without_its_registry_hot_pages_read_and_cold_ones_fail() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    let mut registry = Registry::start(&Options::default())?;
    let image = registry.image("nginx:latest");
    let insecure = ["--dest-tls-verify=false", "--insecure-policy"];
    let from = format!("oci:{}:latest", images::image("nginx")?.display());
    tool("skopeo", &["copy", insecure[0], insecure[1], &from, &format!("docker://{image}")])?;
    let recorder = show(&recorded.state());
    tdfs::json(["pack", &image, "--trace", &show(&recorded.trace("nginx")), "--push", "--state", &recorder])?;

    let (node, target) = (recorded.path("node"), tempfile::tempdir()?);
    let mounted = tdfs::json(["mount", &image, &show(target.path()), "--state", &show(&node)])?;
    ensure!(number(&mounted, "pages_needed")? > 0, "{mounted}");
    registry.kill();

    let unpacked = Unpacked::new(&images::image("nginx")?, "latest")?;
    let trace: tdfs_common::trace::Trace =
        tdfs_common::envelope::decode(&fs::read(recorded.trace("nginx"))?)?;
    for touch in &trace.touches {
        let path = String::from_utf8(trace.files[touch.file as usize].path.clone())?;
        let expected = fs::read(unpacked.path().join(&path))?;
        let (start, end) = (touch.page as usize * 4096, (touch.page + touch.count) as usize * 4096);
        let end = end.min(expected.len());
        let mut seen = vec![0; end - start];
        let file = File::open(target.path().join(&path))?;
        // Without read-ahead: a hot page that the kernel has evicted would come with cold neighbours, and fail with them.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        file.read_exact_at(&mut seen, start as u64)?;
        ensure!(seen == expected[start..end], "{path} {touch:?}");
    }
    // No service reads the package manager's own library.
    let cold = fs::read(target.path().join("usr/bin/apt-get"));
    let error = cold.err().context("a cold file was read without a registry")?;
    ensure!(error.raw_os_error() == Some(libc::EIO), "{error}");
    tdfs::json(["umount", &show(target.path()), "--state", &show(&node)])?;
    expect_clean(&node)
}
