//! Real images and how another tool unpacks them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use xtask::command;
pub use xtask::images::{Compression, IMAGES, Image, Service, recipe};

/// The OCI layout of the real image `name` with gzip layers, built first if it was not yet.
pub fn image(name: &str) -> Result<PathBuf> {
    image_with(name, Compression::Gzip)
}

/// The same image with its layers compressed in another way.
pub fn image_with(name: &str, compression: Compression) -> Result<PathBuf> {
    xtask::images::Cache::default().image(recipe(name)?, compression)
}

/// An image unpacked by umoci, the oracle for what our mounts must show.
pub struct Unpacked {
    directory: TempDir,
}

impl Unpacked {
    /// Unpacks the image `tag` of `layout`.
    pub fn new(layout: &Path, tag: &str) -> Result<Self> {
        let directory = TempDir::with_prefix("tdfs-umoci-")?;
        let image = format!("{}:{tag}", layout.display());
        command::output(Command::new("umoci").args(["unpack", "--image", &image]).arg(directory.path()))
            .context("unpack the oracle")?;
        Ok(Self { directory })
    }

    /// Its root.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }
}
