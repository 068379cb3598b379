//! A node: from an image reference to a running container or a mount.
//!
//! ```text
//! reference -> resolve -> image + runtime image     (resolve.rs; cached, so a second start asks nobody)
//!           -> diff -> fetch -> inject              (rtpc, fetch)      |  at the same time
//!           -> EROFS + cold device + overlay        (rootfs)           |  at the same time
//!           -> container -> ready                   (container.rs, start.rs)
//! ```
//!
//! Without a runtime image all layers are fetched first and every page comes from them.

mod container;
mod fetching;
mod files;
mod mount;
mod prepare;
mod recover;
mod report;
mod resolve;
mod start;
mod state;
pub mod timeline;
mod verify;

use std::io;
use std::path::PathBuf;

use tdfs_common::digest::Digest;

pub use fetching::Rest;
pub use files::{FilesSource, ImageFiles, LazyFiles};
pub use mount::{MountOptions, MountReport, MountServer, Mounts, umount};
pub use prepare::Prepared;
pub use recover::recover;
pub use report::StartReport;
pub use resolve::{Choice, Pull, Resolved, resolve};
pub use start::{Running, StartMode, StartOptions, start};
pub use state::State;
pub use timeline::{Recording, Timeline};
pub use verify::{Verified, verify};

use crate::fetch::FetchError;
use crate::oci::OciError;
use crate::pack::PackError;
use crate::record::sandbox::SandboxError;
use crate::record::{ProbeError, ReadyError};
use crate::rootfs::RootfsError;
use crate::rtpc::RtpcError;

/// Why a node cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The state directory.
    #[error("state directory {}: {source}", path.display())]
    State {
        /// The path in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image or its blobs.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// The runtime image.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// Page data or layers.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The runtime page cache.
    #[error(transparent)]
    Rtpc(#[from] RtpcError),
    /// The mounts.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// The container.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Readiness.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// The recorded probe.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The mount point of `tdfs mount`.
    #[error("{}: {reason}", path.display())]
    Target {
        /// The mount point.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A runtime image contradicts its image.
    #[error("runtime image {manifest} is wrong: {reason}")]
    Wrong {
        /// The artifact manifest.
        manifest: Digest,
        /// What differs.
        reason: String,
    },
    /// A part of the start panicked.
    #[error("internal error: {0}")]
    Task(#[from] tokio::task::JoinError),
}
