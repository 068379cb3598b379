//! The runtime page cache: what of the group data zones lies on this node, and is safe to use.
//!
//! [`Zone`] is the data zone of one group, opened for a service: what it lacks, and the file to mount. [`Writer`] adds
//! verified pages. [`Presence`] is the durable set of present units beside any sparse data file. What survives a crash
//! and why is said in each of them.

mod holdings;
mod presence;
#[cfg(test)]
mod tests;
mod zone;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use holdings::holdings;
pub use presence::Presence;
use tdfs_common::envelope::FormatError;
pub use zone::{Writer, Zone};

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
    /// A file of the cache cannot be written in its format.
    #[error("{path}: {source}")]
    Format {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// Pages offered to a zone that has no such addresses.
    #[error("{path}: no zone pages {pages:?}")]
    OutsideZone {
        /// The data file.
        path: PathBuf,
        /// The addresses.
        pages: Range<u64>,
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
            Self::Format { .. } | Self::OutsideZone { .. } => libc::EIO,
        }
    }
}
