//! The state directory: what a node keeps between starts.
//!
//! ```text
//! resolved/   an OCI layout: manifests and configurations of the images started here (`resolve`)
//! metadata/   metadata of their runtime images, by digest (`pack::load`)
//! mounts/     file system metadata of mounts, by artifact manifest, for the next mount (`rootfs::Kept`)
//! zones/      the runtime page cache, one zone per group (`rtpc`)
//! layers/     uncompressed layers, sparse where only spans of them were read (`fetch::layers`)
//! images/     trees and layer indexes of images that were pulled whole
//! sources.json what was learnt about registries and the network (`fetch`)
//! runs/ID/    one running container or mount: mounts, bundle, overlay; removed when it ends
//! runc/       runc's own state
//! agent/      socket and lock of the daemon (`agent`)
//! ```
//!
//! Everything but `runs`, `runc` and `agent` is a cache: any of it may be removed while nothing runs. A process that dies
//! leaves its `runs/ID` behind, and the next command clears it away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tdfs_common::digest::Digest;

use super::NodeError;
use crate::rootfs::RunDir;

/// Paths below one state directory.
#[derive(Clone, Debug)]
pub struct State {
    root: PathBuf,
}

impl State {
    /// Creates the directory where it is missing.
    pub fn open(root: &Path) -> Result<Self, NodeError> {
        let err = |source: io::Error| NodeError::State { path: root.to_owned(), source };
        fs::create_dir_all(root).map_err(err)?;
        let root = root.canonicalize().map_err(err)?;
        let state = Self { root };
        fs::create_dir_all(state.runs()).map_err(err)?;
        Ok(state)
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What registries said, an OCI layout.
    pub fn resolved(&self) -> PathBuf {
        self.root.join("resolved")
    }

    /// Metadata that a mount with the runtime image `manifest` left for the next.
    pub fn kept(&self, manifest: &Digest) -> PathBuf {
        self.root.join("mounts").join(manifest.hex())
    }

    /// Directories of what runs.
    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// runc's `--root`.
    pub fn runc(&self) -> PathBuf {
        self.root.join("runc")
    }

    /// A new run directory; its name is unique on this machine.
    pub fn new_run(&self) -> Result<Arc<RunDir>, NodeError> {
        let err = |source: io::Error| NodeError::State { path: self.runs(), source };
        let dir = tempfile::Builder::new().prefix("tdfs-").tempdir_in(self.runs()).map_err(err)?.keep();
        Ok(Arc::new(RunDir::create(&dir).map_err(err)?))
    }
}
