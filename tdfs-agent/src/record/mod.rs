//! Records what a service touches until it is ready.

pub mod sandbox;
