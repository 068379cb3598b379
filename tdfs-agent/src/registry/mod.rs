//! The registry side: an OCI distribution server with a page service beside it.

mod content;
pub mod page_service;
mod upstream;

pub use content::{Content, ContentError, Stored};
pub use upstream::Upstream;
