//! The envelope of every metadata blob: who wrote it, whether this reader may read it, and how large it gets.
//!
//! ```text
//!  0  magic       8 bytes, one per format
//!  8  version     u16 LE, of the format
//! 10  reserved    u16, zero
//! 12  compat      u32 LE, features a reader may ignore
//! 16  incompat    u32 LE, features a reader must know
//! 20  raw_len     u32 LE, bytes of the payload before compression
//! 24  payload     one zstd frame of a bincode 2 value (little endian, variable-length integers)
//! ```
//!
//! A reader survives any bytes: lengths are checked against [`Format::MAX_BYTES`] before anything is allocated,
//! bincode runs under the same limit, and [`Format::validate`] has the last word.

use bincode::config::{Configuration, LittleEndian, Varint};
use bincode::{Decode, Encode};

/// Bytes before the payload.
pub const HEADER_LEN: usize = 24;

/// No format decodes to more than this many bytes.
pub const LIMIT: usize = 256 << 20;

const CONFIG: Configuration<LittleEndian, Varint, bincode::config::Limit<LIMIT>> =
    bincode::config::standard().with_limit::<LIMIT>();

/// A value that travels in an envelope.
pub trait Format: Encode + Decode<()> {
    /// The first eight bytes.
    const MAGIC: [u8; 8];
    /// The version this code writes and the only one it reads.
    const VERSION: u16;
    /// Largest payload before compression, at most [`LIMIT`].
    const MAX_BYTES: usize;
    /// Human name, for messages.
    const NAME: &'static str;

    /// Checks everything that code after the decoder relies on.
    fn validate(&self) -> Result<(), FormatError>;
}

/// Why bytes are not the value they should be.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// Shorter than a header, or another magic.
    #[error("not a tdfs {0}")]
    Magic(&'static str),
    /// Written by a newer tdfs.
    #[error("{name} version {version} is not supported (this tdfs reads {supported})")]
    Version {
        /// What was read.
        name: &'static str,
        /// The version found.
        version: u16,
        /// The version known.
        supported: u16,
    },
    /// Needs a feature this tdfs lacks.
    #[error("{name} needs features {flags:#x} that this tdfs does not know")]
    Incompatible {
        /// What was read.
        name: &'static str,
        /// The unknown flags.
        flags: u32,
    },
    /// Larger than any honest value.
    #[error("{name} of {bytes} bytes is over the limit of {limit}")]
    TooLarge {
        /// What was read or written.
        name: &'static str,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The compression or encoding is damaged.
    #[error("{name} is damaged: {reason}")]
    Damaged {
        /// What was read.
        name: &'static str,
        /// What the decoder said.
        reason: String,
    },
    /// Well encoded, but contradicts itself.
    #[error("{name} is invalid: {reason}")]
    Invalid {
        /// What was read.
        name: &'static str,
        /// The rule it breaks.
        reason: String,
    },
}

/// Encodes `value` with its envelope.
pub fn encode<T: Format>(value: &T) -> Result<Vec<u8>, FormatError> {
    let damaged = |reason: String| FormatError::Damaged { name: T::NAME, reason };
    let raw = bincode::encode_to_vec(value, CONFIG).map_err(|e| damaged(e.to_string()))?;
    if raw.len() > T::MAX_BYTES.min(LIMIT) {
        return Err(too_large::<T>(raw.len() as u64));
    }
    let payload = zstd::bulk::compress(&raw, 15).map_err(|e| damaged(e.to_string()))?;
    let mut out = Vec::with_capacity(HEADER_LEN + payload.len());
    out.extend_from_slice(&T::MAGIC);
    out.extend_from_slice(&T::VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 10]);
    out.extend_from_slice(&(raw.len() as u32).to_le_bytes());
    out.extend_from_slice(&payload);
    Ok(out)
}

/// Decodes and validates a value.
pub fn decode<T: Format>(bytes: &[u8]) -> Result<T, FormatError> {
    let damaged = |reason: String| FormatError::Damaged { name: T::NAME, reason };
    let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(FormatError::Magic(T::NAME))?;
    if header[..8] != T::MAGIC {
        return Err(FormatError::Magic(T::NAME));
    }
    let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let version = u16::from_le_bytes([header[8], header[9]]);
    if version != T::VERSION {
        return Err(FormatError::Version { name: T::NAME, version, supported: T::VERSION });
    }
    if u32_at(16) != 0 {
        return Err(FormatError::Incompatible { name: T::NAME, flags: u32_at(16) });
    }
    let raw_len = u32_at(20) as usize;
    if raw_len > T::MAX_BYTES.min(LIMIT) {
        return Err(too_large::<T>(raw_len as u64));
    }
    let raw = zstd::bulk::decompress(&bytes[HEADER_LEN..], raw_len).map_err(|e| damaged(e.to_string()))?;
    if raw.len() != raw_len {
        return Err(damaged(format!("{} bytes where {raw_len} were announced", raw.len())));
    }
    let (value, used) =
        bincode::decode_from_slice::<T, _>(&raw, CONFIG).map_err(|e| damaged(e.to_string()))?;
    if used != raw_len {
        return Err(damaged(format!("{} bytes after the end", raw_len - used)));
    }
    value.validate()?;
    Ok(value)
}

fn too_large<T: Format>(bytes: u64) -> FormatError {
    FormatError::TooLarge { name: T::NAME, bytes, limit: T::MAX_BYTES.min(LIMIT) as u64 }
}

/// `Err(Invalid)` unless `condition`.
pub(crate) fn ensure(
    condition: bool,
    name: &'static str,
    reason: impl FnOnce() -> String,
) -> Result<(), FormatError> {
    if condition { Ok(()) } else { Err(FormatError::Invalid { name, reason: reason() }) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq, Encode, Decode)]
    struct Sample {
        numbers: Vec<u64>,
        text: String,
    }

    impl Format for Sample {
        const MAGIC: [u8; 8] = *b"TDFSTEST";
        const VERSION: u16 = 3;
        const MAX_BYTES: usize = 4096;
        const NAME: &'static str = "sample";

        fn validate(&self) -> Result<(), FormatError> {
            ensure(self.text != "refuse", Self::NAME, || "refused".into())
        }
    }

    fn sample() -> Vec<u8> {
        encode(&Sample { numbers: (0..100).collect(), text: "hello".into() }).unwrap()
    }

    proptest! {
        #[test]
        fn round_trips(numbers in proptest::collection::vec(any::<u64>(), 0..100), text in ".{0,40}") {
            let value = Sample { numbers, text };
            prop_assert_eq!(decode::<Sample>(&encode(&value).unwrap()).unwrap(), value);
        }

        #[test]
        fn any_bytes_end_in_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Sample>(&bytes);
            let mut framed = sample()[..HEADER_LEN].to_vec();
            framed.extend(bytes);
            prop_assert!(decode::<Sample>(&framed).is_err());
        }
    }

    #[test]
    fn each_header_field_is_checked() {
        let with = |at: usize, value: u8| {
            let mut bytes = sample();
            bytes[at] = value;
            decode::<Sample>(&bytes).unwrap_err()
        };
        assert!(matches!(with(0, b'X'), FormatError::Magic("sample")));
        assert!(matches!(with(8, 4), FormatError::Version { version: 4, supported: 3, .. }));
        assert!(matches!(with(16, 2), FormatError::Incompatible { flags: 2, .. }));
        assert!(matches!(with(22, 1), FormatError::TooLarge { .. }));
        assert!(matches!(with(20, 1), FormatError::Damaged { .. }));
        assert!(matches!(decode::<Sample>(&sample()[..20]).unwrap_err(), FormatError::Magic(_)));
        let mut unknown_compat = sample();
        unknown_compat[12] = 1;
        assert!(decode::<Sample>(&unknown_compat).is_ok(), "a compatible feature is ignored");
    }

    #[test]
    fn every_truncation_and_appended_garbage_is_refused() {
        let bytes = sample();
        for len in 0..bytes.len() {
            assert!(decode::<Sample>(&bytes[..len]).is_err(), "{len}");
        }
        assert!(decode::<Sample>(&[bytes.as_slice(), b"x"].concat()).is_err());
    }

    #[test]
    fn a_length_bomb_is_refused_before_allocation() {
        // A vector of 2^60 numbers, in eleven honest-looking bytes.
        let raw: Vec<u8> = [&[253u8][..], &(1u64 << 60).to_le_bytes(), &[0]].concat();
        let mut bytes = sample()[..20].to_vec();
        bytes.extend((raw.len() as u32).to_le_bytes());
        bytes.extend(zstd::bulk::compress(&raw, 1).unwrap());
        assert!(matches!(decode::<Sample>(&bytes).unwrap_err(), FormatError::Damaged { .. }));
    }

    #[test]
    fn invalid_values_and_oversized_values_are_refused() {
        let refused = encode(&Sample { numbers: vec![], text: "refuse".into() }).unwrap();
        assert!(matches!(decode::<Sample>(&refused).unwrap_err(), FormatError::Invalid { .. }));
        let big = Sample { numbers: vec![u64::MAX; 4096], text: String::new() };
        assert!(matches!(encode(&big).unwrap_err(), FormatError::TooLarge { .. }));
    }
}
