//! Bringing what a service needs onto the node, verified.

use tdfs_common::digest::Digest;

use crate::rtpc::RtpcError;

/// Called with bytes received so far and bytes to receive.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Send + Sync);

/// Why pages or layers did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The runtime page cache failed.
    #[error(transparent)]
    Rtpc(#[from] RtpcError),
    /// A frame is not what the service metadata promises.
    #[error("segment {segment} frame {frame}: {reason}")]
    Frame {
        /// The blob.
        segment: Digest,
        /// Place of the frame in it.
        frame: usize,
        /// What is wrong.
        reason: String,
    },
}

impl FetchError {
    /// The errno to answer a kernel request with.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Rtpc(e) => e.errno(),
            Self::Frame { .. } => libc::EIO,
        }
    }
}
