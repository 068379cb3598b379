//! The runtime page cache: what of the group data zones lies on this node, and is safe to use.
//!
//! [`Presence`] is the durable set of present units beside any sparse data file.

mod presence;

use std::io;
use std::path::{Path, PathBuf};

pub use presence::Presence;

/// Why the runtime page cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RtpcError {
    /// A file or directory of the cache failed.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl RtpcError {
    pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    /// The errno to answer a kernel request with.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}
