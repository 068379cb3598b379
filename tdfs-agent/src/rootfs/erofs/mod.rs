//! EROFS: the kernel's read-only file system, of which we write the metadata.

pub mod format;
#[cfg(test)]
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub(super) use writer::check_runs;
pub use writer::{ErofsError, Metadata, write};
