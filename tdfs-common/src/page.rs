//! Pages: 4096 bytes of a regular file at a 4096-aligned offset, the tail zero-padded.

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// Pages that hold `bytes` bytes.
pub const fn count(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE as u64)
}
