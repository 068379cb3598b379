//! Pictures of a recording and of a start.
//!
//! ```text
//! image + runtime images --recording--> Recording --\              /--html--> one page, all inside
//!                                                    +--> Report --+
//! Timeline (run --events) ---------checked--------> Timeline       \--perfetto--> trace events
//! ```
//!
//! A report is bounded whatever it is made of: the largest parts are kept, the others summed up in one line that says
//! how many they are, so that sums stay right. Names in it are those of an image, bytes that anybody chose: the page
//! shows them as text and runs nothing but its own script.

mod html;
mod model;
mod order;
mod perfetto;
mod recording;
mod zone;

use tdfs_common::digest::Digest;

pub use html::page;
pub use model::Report;
pub use perfetto::trace;
pub use recording::Recording;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Not what `tdfs run --events` writes.
    #[error("no events of a start: {0}")]
    Events(String),
    /// The start was one of something else.
    #[error("the events are of image {events}, not of {image}")]
    OtherImage {
        /// The image that was started.
        events: String,
        /// The image that was named.
        image: Digest,
    },
    /// Runtime images of one image that disagree about its files.
    #[error("the runtime images of services {first:?} and {second:?} disagree about the files of the image")]
    Trees {
        /// One service.
        first: String,
        /// The other.
        second: String,
    },
    /// There is nothing to draw.
    #[error("{0} has no runtime image")]
    NoRuntimeImage(Digest),
}
