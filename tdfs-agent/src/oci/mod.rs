//! oci
pub mod layer;
