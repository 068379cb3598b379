//! The registry side: an OCI distribution server with a page service beside it.

mod content;

pub use content::{Content, ContentError, Stored};
