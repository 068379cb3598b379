//! The real images are right before anything of ours touches them: other tools unpack and run them.

use std::path::Path;

use anyhow::{Context as _, Result};
use tdfs_tests::fingerprint::Fingerprint;
use tdfs_tests::images::{Compression, IMAGES, Unpacked, image, image_with, recipe};
use xtask::containerd::Containerd;
use xtask::network::Place;
use xtask::registry::Registry;

/// The default service of every image answers under containerd, from an image that came through a registry.
#[test]
fn run_under_containerd() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let registry = Registry::start(directory.path(), &Place::here())?;
    let containerd = Containerd::start(directory.path(), &Place::here())?;
    for recipe in IMAGES {
        let reference = registry.push(&image(recipe.name)?, recipe.name)?;
        let before = registry.traffic()?;
        containerd.start_service(&reference, &recipe.services[0]).with_context(|| recipe.name)?;
        assert!((registry.traffic()? - before).bytes > 0, "{} came from the registry", recipe.name);
    }
    Ok(())
}

/// Two services of one image, started one after the other.
#[test]
fn run_every_service_of_one_image() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let registry = Registry::start(directory.path(), &Place::here())?;
    let containerd = Containerd::start(directory.path(), &Place::here())?;
    let python = recipe("python")?;
    let reference = registry.push(&image("python")?, "python")?;
    assert!(python.services.len() > 1);
    for service in python.services {
        containerd.start_service(&reference, service).with_context(|| service.name)?;
    }
    Ok(())
}

/// umoci sees the same files whichever way the layers are compressed.
#[test]
fn unpack_alike_in_every_compression() -> Result<()> {
    let gzip = Fingerprint::of(&Unpacked::new(&image("python")?, "latest")?.path())?;
    let python = gzip.entries().get(Path::new("usr/bin/python3.11")).context("python is in it")?;
    assert_eq!(python.mode, 0o100_755);
    for compression in [Compression::Zstd, Compression::ZstdSeekable] {
        // umoci 0.4 does not know zstd: skopeo turns it into gzip.
        let directory = tempfile::tempdir()?;
        let layout = directory.path().join("gzip");
        xtask::command::output(
            std::process::Command::new("skopeo")
                .args([
                    "--insecure-policy",
                    "copy",
                    "--quiet",
                    "--dest-compress-format=gzip",
                    "--dest-compress",
                ])
                .arg(format!("oci:{}:latest", image_with("python", compression)?.display()))
                .arg(format!("oci:{}:latest", layout.display())),
        )?;
        gzip.expect_equal(&Fingerprint::of(&Unpacked::new(&layout, "latest")?.path())?)?;
    }
    Ok(())
}
