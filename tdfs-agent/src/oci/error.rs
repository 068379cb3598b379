//! What can go wrong between an image reference and its bytes.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tdfs_common::digest::Digest;

/// An error of [`oci`](super). Every message is one line and holds no secret: addresses are without query.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The text is no image reference.
    #[error("{text:?} is not an image reference: {reason}")]
    Reference {
        /// At most 100 characters of the text.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The text is no platform.
    #[error("{0:?} is not a platform of the form os/architecture[/variant]")]
    ParsePlatform(String),
    /// No such repository, manifest, tag or blob.
    #[error("{0} not found")]
    NotFound(String),
    /// The registry wants credentials, or refuses those it got.
    #[error("{host} refuses access to {repository}: {reason}")]
    Denied {
        /// Registry host.
        host: String,
        /// Repository on it.
        repository: String,
        /// What it said, and where the credentials came from.
        reason: String,
    },
    /// The server answered with a status that is no success.
    #[error("{url}: {status}{message}")]
    Status {
        /// Address without query.
        url: String,
        /// HTTP status code.
        status: u16,
        /// Empty, or `: ` and what the server said.
        message: String,
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// No answer, or a broken one.
    #[error("{url}: {reason}")]
    Transport {
        /// Address without query.
        url: String,
        /// The chain of causes.
        reason: String,
    },
    /// The server sent nothing, or next to nothing, for this long.
    #[error("{url}: nothing or too little received for {} s", .after.as_secs_f32())]
    Idle {
        /// Address without query.
        url: String,
        /// The limit that was reached.
        after: Duration,
    },
    /// A server ignored or misread the range it was asked for.
    #[error("{url}: asked for bytes {start}-{last}, got {got}")]
    Range {
        /// Address without query.
        url: String,
        /// First byte.
        start: u64,
        /// Last byte.
        last: u64,
        /// What came instead.
        got: String,
    },
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The content breaks its format.
    #[error("{what}: {reason}")]
    Malformed {
        /// Which document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Larger than anything honest.
    #[error("{what} has {size} bytes, the limit is {limit}")]
    TooLarge {
        /// Which document.
        what: String,
        /// Bytes announced or received.
        size: u64,
        /// Bytes accepted.
        limit: u64,
    },
    /// The content is not what its digest promised.
    #[error("{what}: content has digest {got}, not {expected}")]
    Digest {
        /// Which document.
        what: String,
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        got: Digest,
    },
    /// The content is longer or shorter than its descriptor says.
    #[error("{what}: content has {got} bytes, not {expected}")]
    Size {
        /// Which document.
        what: String,
        /// Bytes promised.
        expected: u64,
        /// Bytes that came; a lower bound when there were too many.
        got: u64,
    },
    /// The image is not for this platform.
    #[error("{image} has nothing for {wanted}; it holds {available}")]
    Platform {
        /// The image.
        image: String,
        /// Platform asked for.
        wanted: String,
        /// Platforms there are.
        available: String,
    },
    /// A reference without a tag, and several images to choose from.
    #[error("{layout} holds {count} images, name one: {names}")]
    Ambiguous {
        /// The layout.
        layout: String,
        /// How many images it holds.
        count: usize,
        /// Their tags or digests.
        names: String,
    },
    /// The client cannot be set up as it is configured.
    #[error("{0}")]
    Setup(String),
}

impl OciError {
    /// True when what was asked for does not exist (as opposed to: could not be reached).
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound(_))
    }

    /// Whether asking again may help.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Transport { .. } | Self::Idle { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// For `map_err` on operations on `path`.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    #[expect(clippy::needless_pass_by_value, reason = "errors and literals are passed as they come")]
    pub(super) fn malformed(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Malformed { what: what.into(), reason: reason.to_string() }
    }
}
