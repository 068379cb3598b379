//! `tdfs registry`: the rules of the distribution specification, real clients, crashes.
#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

mod access;
mod client;
mod crash;
mod pull_through;
mod soak;
mod specification;
mod tokens;
mod tools;
