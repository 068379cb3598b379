//! Formats and plain types of tdfs, without I/O.
//!
//! Everything that crosses a process, a disk or a network is defined here as a plain type with a `validate`
//! that a reader runs before it believes a single field. Without the `std` feature only [`abi`] remains,
//! which the probe shares.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

pub mod abi;
#[cfg(feature = "std")]
pub mod bitmap;
#[cfg(feature = "std")]
pub mod digest;
#[cfg(feature = "std")]
pub mod envelope;
#[cfg(feature = "std")]
pub mod layer_index;
#[cfg(feature = "std")]
pub mod page;
#[cfg(feature = "std")]
pub mod proof;
#[cfg(feature = "std")]
pub mod runtime_image;
#[cfg(feature = "std")]
pub mod trace;
#[cfg(feature = "std")]
pub mod tree;
#[cfg(feature = "std")]
pub mod wire;
