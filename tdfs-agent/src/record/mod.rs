//! Records what a service touches until it is ready.

mod offsets;
pub mod order;
pub mod residency;
pub mod sandbox;
pub mod tracer;

pub use tracer::{Tracer, TracerError, TracerOptions};
