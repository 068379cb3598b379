//! `tdfs registry`: the rules of the distribution specification, real clients, crashes.
#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

mod client;
mod specification;
mod tools;
