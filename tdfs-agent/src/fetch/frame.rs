//! One frame: pages in, compressed bytes out, and back under verification.
//!
//! A frame is a zstd frame (RFC 8878) of its pages, or the pages themselves where zstd does not make them smaller;
//! the lengths tell which. The decoder never writes more than the announced pages, so a frame that claims to expand
//! to terabytes costs nothing, and gives pages out only when their hash matches.

use std::io;

use blake3::hazmat::ChainingValue;
use tdfs_common::digest::ContentHash;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::proof::{self, PageSet};
use tdfs_common::runtime_image::{FRAME_PAGES, Frame};
use zstd::bulk::{Compressor, Decompressor};

/// Why bytes are not the frame they should be.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Another number of bytes than announced.
    #[error("{got} bytes where {want} were announced")]
    Length {
        /// Bytes received or decompressed.
        got: usize,
        /// Bytes announced.
        want: usize,
    },
    /// zstd refuses, because the data is damaged or larger than announced.
    #[error("does not decompress: {0}")]
    Zstd(io::Error),
    /// The pages are not the recorded ones.
    #[error("hash mismatch")]
    Hash,
}

/// Decodes frames one after the other, reusing its memory.
pub struct Decoder {
    zstd: Decompressor<'static>,
    pages: Vec<u8>,
}

impl Decoder {
    /// A decoder; errors when memory is short.
    pub fn new() -> io::Result<Self> {
        Ok(Self { zstd: Decompressor::new()?, pages: vec![0; FRAME_PAGES as usize * PAGE_SIZE] })
    }

    /// The verified pages of `frame`, which must come from validated metadata, stored as `bytes`.
    pub fn decode<'a>(&'a mut self, frame: &Frame, bytes: &'a [u8]) -> Result<&'a [u8], FrameError> {
        let want = frame.len as usize;
        if bytes.len() != want {
            return Err(FrameError::Length { got: bytes.len(), want });
        }
        let raw = frame.pages as usize * PAGE_SIZE;
        let pages = if want == raw {
            bytes
        } else {
            let pages = &mut self.pages[..raw];
            let got = self.zstd.decompress_to_buffer(bytes, pages).map_err(FrameError::Zstd)?;
            if got != raw {
                return Err(FrameError::Length { got, want: raw });
            }
            pages
        };
        if ContentHash::of(pages) == frame.hash { Ok(pages) } else { Err(FrameError::Hash) }
    }

    /// The verified pages in `set` of `frame`, sent as `bytes`, which are `plain` or one zstd frame. The chaining
    /// `values` prove that they belong to it.
    pub fn cut<'a>(
        &'a mut self,
        frame: &Frame,
        set: PageSet,
        values: &[ChainingValue],
        plain: bool,
        bytes: &'a [u8],
    ) -> Result<&'a [u8], FrameError> {
        let want = set.count_ones() as usize * PAGE_SIZE;
        let pages = if plain {
            bytes
        } else {
            let pages = &mut self.pages[..want];
            let got = self.zstd.decompress_to_buffer(bytes, pages).map_err(FrameError::Zstd)?;
            &pages[..got]
        };
        if pages.len() != want {
            return Err(FrameError::Length { got: pages.len(), want });
        }
        if proof::root(frame.pages, set, pages, values) == Some(frame.hash) {
            Ok(pages)
        } else {
            Err(FrameError::Hash)
        }
    }
}

/// Encodes up to [`FRAME_PAGES`] whole pages at zstd `level`.
pub fn encode(pages: &[u8], level: i32) -> io::Result<(Frame, Vec<u8>)> {
    let compressed = Compressor::new(level)?.compress(pages)?;
    let bytes = if compressed.len() < pages.len() { compressed } else { pages.to_vec() };
    let count = (pages.len() / PAGE_SIZE) as u32;
    Ok((Frame { len: bytes.len() as u32, pages: count, hash: ContentHash::of(pages) }, bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pages that compress (`random` false) or do not.
    fn pages(count: usize, seed: u8, random: bool) -> Vec<u8> {
        let mut out = vec![seed; count * PAGE_SIZE];
        if random {
            blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
        }
        out
    }

    #[test]
    fn a_bomb_is_refused_without_expanding_it() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        let frame = Frame { len: bomb.len() as u32, pages: 64, hash: ContentHash::of(&pages(64, 0, false)) };
        assert!(matches!(Decoder::new().unwrap().decode(&frame, &bomb), Err(FrameError::Zstd(_))));
    }

    #[test]
    fn pages_of_another_frame_are_refused() {
        let mut decoder = Decoder::new().unwrap();
        let (a, a_bytes) = encode(&pages(2, 1, false), 3).unwrap();
        let (b, b_bytes) = encode(&pages(2, 2, false), 3).unwrap();
        assert_eq!(a.len, b.len);
        assert!(matches!(decoder.decode(&a, &b_bytes), Err(FrameError::Hash)));
        assert!(matches!(decoder.decode(&b, &a_bytes), Err(FrameError::Hash)));
        let (short, short_bytes) = encode(&pages(1, 1, false), 3).unwrap();
        let lying = Frame { pages: 2, ..short };
        assert!(matches!(decoder.decode(&lying, &short_bytes), Err(FrameError::Length { .. })));
    }

    proptest! {
        #[test]
        fn cut_pages_are_given_out_only_with_their_proof(
            count in 1u32..=64,
            set in any::<u64>(),
            plain in any::<bool>(),
            at in any::<proptest::sample::Index>(),
            flip in 1u8..,
        ) {
            let set = set & proof::all(count);
            prop_assume!(set != 0);
            let mut decoder = Decoder::new().unwrap();
            let pages = pages(count as usize, 3, true);
            let (frame, _) = encode(&pages, 1).unwrap();
            let values = proof::prove(&pages, set).unwrap();
            let chosen = pages.chunks(PAGE_SIZE).enumerate().filter(|(n, _)| set >> n & 1 == 1);
            let cut: Vec<u8> = chosen.flat_map(|(_, page)| page).copied().collect();
            let sent = if plain { cut.clone() } else { zstd::bulk::compress(&cut, 1).unwrap() };
            prop_assert_eq!(decoder.cut(&frame, set, &values, plain, &sent).unwrap(), &cut[..]);
            let mut damaged = sent.clone();
            damaged[at.index(sent.len())] ^= flip;
            if let Ok(pages) = decoder.cut(&frame, set, &values, plain, &damaged) {
                prop_assert_eq!(pages, &cut[..]);
            }
            prop_assert!(decoder.cut(&frame, set, &values, plain, &sent[..at.index(sent.len())]).is_err());
            if let Some((_, fewer)) = values.split_first() {
                prop_assert!(decoder.cut(&frame, set, fewer, plain, &sent).is_err());
            }
            if set & 1 == 0 {
                prop_assert!(decoder.cut(&frame, set >> 1, &values, plain, &sent).is_err());
            }
        }

        #[test]
        fn round_trips_and_notices_any_damage(
            count in 1usize..=64,
            seed in any::<u8>(),
            random in any::<bool>(),
            at in any::<proptest::sample::Index>(),
            flip in 1u8..,
        ) {
            let mut decoder = Decoder::new().unwrap();
            let pages = pages(count, seed, random);
            let (frame, bytes) = encode(&pages, 3).unwrap();
            prop_assert_eq!(frame.len as usize == pages.len(), random);
            prop_assert_eq!(decoder.decode(&frame, &bytes).unwrap(), &pages[..]);
            let at = at.index(bytes.len());
            prop_assert!(decoder.decode(&frame, &bytes[..at]).is_err());
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            // zstd ignores a bit or two of its header: then the pages are still the right ones.
            if let Ok(decoded) = decoder.decode(&frame, &damaged) {
                prop_assert_eq!(decoded, &pages[..]);
            }
            prop_assert_eq!(decoder.decode(&frame, &bytes).unwrap(), &pages[..]);
        }
    }
}
