//! Traces and a tree in, a runtime image out.
//!
//! ```text
//! traces of a service --merge--> trace --resolve in the tree--> file pages, in order of first use
//!     --read from the layers, hash, dedup against the group--> new pages --lay out, compress--> one segment
//!                                                              page tables --> service metadata
//! ```
//!
//! Everything here runs in CI or on a developer's machine. It blocks on the layers and on the processor; memory holds
//! a hash per page and a few frames, never the pages. Until [`attach`] has pushed the manifest nothing is visible.

mod attach;
mod layout;
mod load;
mod segment;
mod sharing;
#[cfg(test)]
pub(crate) mod tests;
mod trace;

use std::io;
use std::path::{Path, PathBuf};

use tdfs_common::digest::Digest;
use tdfs_common::envelope::FormatError;

use crate::fetch::FetchError;
use crate::oci::OciError;

pub(crate) use attach::layer;
pub use attach::{Attached, attach, read_group};
pub use load::{Available, Choice, FoundRuntimeImage, LoadedRuntimeImage, find, known, list, load};
pub(crate) use load::{choose, newest};
pub(crate) use segment::read_pages;
pub use segment::{Group, Pack, Packed, Report, SegmentFile, ServiceInput};
pub use sharing::{Sharing, SharingSet, sharing};
pub(crate) use trace::FileRun;
pub use trace::merge_traces;

/// Why there is no runtime image.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Nothing to merge.
    #[error("no trace given")]
    NoTrace,
    /// Traces of different services do not merge.
    #[error("traces of two services, {first:?} and {second:?}, do not merge")]
    Services {
        /// One name.
        first: String,
        /// The other.
        second: String,
    },
    /// The recorder missed something.
    #[error(
        "the trace of {service:?} is incomplete ({lost_events} lost events): record it again, or allow it"
    )]
    Incomplete {
        /// Service name.
        service: String,
        /// Events the kernel could not deliver.
        lost_events: u64,
    },
    /// The trace names files that the image does not hold.
    #[error(
        "the trace of {service:?} was recorded from {recorded}: {files} of its files, {path:?} for one, are not \
         in {image} with that content"
    )]
    OtherImage {
        /// Service name.
        service: String,
        /// The image manifest of the trace.
        recorded: Digest,
        /// The image manifest to pack for.
        image: Digest,
        /// How many files differ.
        files: u64,
        /// One of them.
        path: String,
    },
    /// More services than one segment can be laid out for.
    #[error("{0} services in one go, 64 are possible")]
    TooManyServices(usize),
    /// The zone has no addresses left.
    #[error("the data zone of the group is full")]
    ZoneFull,
    /// The layers could not be read.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// A layer holds fewer bytes than the tree says.
    #[error("layer {layer} gave {got} bytes at offset {offset} where {want} are expected")]
    ShortRead {
        /// Layer, counted from the lowest.
        layer: u32,
        /// Offset in the uncompressed layer.
        offset: u64,
        /// Bytes asked for.
        want: usize,
        /// Bytes received.
        got: usize,
    },
    /// Metadata that cannot be written or read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The registry or layout failed.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// A runtime image or group contradicts itself or its image.
    #[error("{what}: {reason}")]
    Damaged {
        /// Which.
        what: String,
        /// The rule it breaks.
        reason: String,
    },
    /// Nothing was recorded for the image.
    #[error("{image} has no runtime image")]
    NoRuntimeImage {
        /// The image manifest.
        image: Digest,
    },
    /// The service was not recorded for the image.
    #[error("no runtime image of service {service:?}; there are: {available}")]
    NoService {
        /// The name asked for.
        service: String,
        /// The names there are.
        available: String,
    },
    /// Several services to choose from.
    #[error("the image has runtime images of several services, name one: {available}")]
    Ambiguous {
        /// Their names.
        available: String,
    },
    /// A temporary file failed.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PackError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
