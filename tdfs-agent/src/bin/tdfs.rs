//! tdfs
fn main() {}
