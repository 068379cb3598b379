//! Shared pieces of the end-to-end tests.

pub mod browser;
pub mod fingerprint;
pub mod images;
pub mod node;
pub mod proxy;
pub mod registry;
pub mod s3;
pub mod server;
pub mod synthetic;
pub mod tdfs;
