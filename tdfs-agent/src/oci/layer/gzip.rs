//! gzip (RFC 1952) with deflate (RFC 1951) that can stop and start at block boundaries.
//!
//! Between two deflate blocks a decoder's whole state is the last 32 KiB of output and up to seven bits of the
//! input byte it stopped in. That is a checkpoint. The start of a gzip member is one too, without a window.
//! CRC-32 and length of every member are checked while indexing. Bytes after the last member that are not a
//! member are ignored, as gzip(1) does; the blob's digest covers them.

use std::io::Read;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{BlockBoundaryState, DecompressorOxide, decompress};
use tdfs_common::layer_index::WINDOW_LEN;

use super::LayerError;
use super::scan::{Cut, Input, Output};

/// Output buffer: the window and this much.
const ROOM: usize = 256 << 10;

const FHCRC: u8 = 1 << 1;
const FEXTRA: u8 = 1 << 2;
const FNAME: u8 = 1 << 3;
const FCOMMENT: u8 = 1 << 4;
const RESERVED: u8 = 0b1110_0000;

/// Decompresses every member of `input`.
pub(super) fn decode<R: Read>(input: &mut Input<R>, out: &mut Output) -> Result<(), LayerError> {
    let mut state = Box::new(DecompressorOxide::new());
    let mut buf = vec![0; WINDOW_LEN + ROOM];
    let mut first = true;
    loop {
        let start = input.offset();
        if !header(input)? {
            return if first { Err(input.damaged("not a gzip stream")) } else { Ok(()) };
        }
        if first || out.wants_cut() {
            out.cut(Cut { in_offset: start, bits: 0, window: None });
        }
        first = false;
        let expected = member(input, out, &mut state, &mut buf)?;
        if trailer(input)? != expected {
            return Err(input.damaged("gzip checksum or length does not match"));
        }
    }
}

/// Decompresses the deflate stream of one member; returns the trailer it should have.
fn member<R: Read>(
    input: &mut Input<R>,
    out: &mut Output,
    state: &mut DecompressorOxide,
    buf: &mut [u8],
) -> Result<[u8; 8], LayerError> {
    const FLAGS: u32 = TINFL_FLAG_HAS_MORE_INPUT
        | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY
        | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let mut crc = flate2::Crc::new();
    state.init();
    let mut pos = 0;
    loop {
        let bytes = input.fill()?;
        let ended = bytes.is_empty();
        let (status, used, wrote) = decompress(state, bytes, buf, pos, FLAGS);
        input.consume(used);
        let new = &buf[pos..pos + wrote];
        crc.update(new);
        out.write(new)?;
        pos += wrote;
        match status {
            TINFLStatus::Done => break,
            TINFLStatus::BlockBoundary if pos > 0 && out.wants_cut() => {
                let bits = state.block_boundary_state().map_or(0, |s| s.num_bits);
                let window = Some(buf[pos.saturating_sub(WINDOW_LEN)..pos].to_vec());
                out.cut(Cut { in_offset: input.offset(), bits, window });
            }
            TINFLStatus::NeedsMoreInput if ended => return Err(input.damaged("deflate stream is truncated")),
            TINFLStatus::BlockBoundary | TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput => {}
            _ => return Err(input.damaged("invalid deflate data")),
        }
        if pos == buf.len() {
            buf.copy_within(pos - WINDOW_LEN.., 0);
            pos = WINDOW_LEN;
        }
    }
    let mut expected = [0; 8];
    expected[..4].copy_from_slice(&crc.sum().to_le_bytes());
    expected[4..].copy_from_slice(&crc.amount().to_le_bytes());
    Ok(expected)
}

/// Decompresses exactly `len` bytes: from a member's start without `window`, else from the high `bits` bits of the
/// first byte on.
pub(super) fn read<R: Read>(
    input: &mut Input<R>,
    bits: u8,
    window: Option<&[u8]>,
    len: usize,
) -> Result<Vec<u8>, LayerError> {
    const FLAGS: u32 = TINFL_FLAG_HAS_MORE_INPUT | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let mut state = Box::new(DecompressorOxide::new());
    if window.is_none() {
        start(input)?;
    } else {
        let byte = if bits > 0 { must(input)? } else { 0 };
        let num_bits = bits & 7;
        let bit_buf = (u16::from(byte) >> (8 - num_bits)) as u8;
        *state = DecompressorOxide::from_block_boundary_state(&BlockBoundaryState {
            num_bits,
            bit_buf,
            ..BlockBoundaryState::default()
        });
    }
    let history = window.unwrap_or_default();
    let mut buf = vec![0; history.len() + len];
    buf[..history.len()].copy_from_slice(history);
    let mut pos = history.len();
    while pos < buf.len() {
        let bytes = input.fill()?;
        let ended = bytes.is_empty();
        let (status, used, wrote) = decompress(&mut state, bytes, &mut buf, pos, FLAGS);
        input.consume(used);
        pos += wrote;
        match status {
            TINFLStatus::Done if pos < buf.len() => {
                trailer(input)?;
                start(input)?;
                state.init();
            }
            TINFLStatus::NeedsMoreInput if ended => return Err(input.damaged("deflate stream is truncated")),
            TINFLStatus::Done | TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput => {}
            _ => return Err(input.damaged("invalid deflate data")),
        }
    }
    buf.drain(..history.len());
    Ok(buf)
}

fn start<R: Read>(input: &mut Input<R>) -> Result<(), LayerError> {
    if header(input)? { Ok(()) } else { Err(input.damaged("not a gzip stream")) }
}

/// Consumes a member's header (RFC 1952, 2.3); false when something else, or nothing, is there.
fn header<R: Read>(input: &mut Input<R>) -> Result<bool, LayerError> {
    if input.byte()? != Some(0x1f) || input.byte()? != Some(0x8b) {
        return Ok(false);
    }
    let mut crc = flate2::Crc::new();
    crc.update(&[0x1f, 0x8b]);
    let mut next = || {
        let byte = must(input)?;
        crc.update(&[byte]);
        Ok::<u8, LayerError>(byte)
    };
    let method = next()?;
    let flags = next()?;
    for _ in 0..6 {
        next()?; // time, extra flags, system
    }
    if flags & FEXTRA != 0 {
        for _ in 0..u16::from_le_bytes([next()?, next()?]) {
            next()?;
        }
    }
    for flag in [FNAME, FCOMMENT] {
        while flags & flag != 0 && next()? != 0 {}
    }
    if flags & FHCRC != 0 {
        let sum = crc.sum() as u16;
        if u16::from_le_bytes([must(input)?, must(input)?]) != sum {
            return Err(input.damaged("gzip header checksum does not match"));
        }
    }
    if method != 8 || flags & RESERVED != 0 {
        return Err(input.damaged("gzip header asks for features that do not exist"));
    }
    Ok(true)
}

fn trailer<R: Read>(input: &mut Input<R>) -> Result<[u8; 8], LayerError> {
    let mut trailer = [0; 8];
    for byte in &mut trailer {
        *byte = must(input)?;
    }
    Ok(trailer)
}

fn must<R: Read>(input: &mut Input<R>) -> Result<u8, LayerError> {
    input.byte()?.ok_or_else(|| input.damaged("gzip stream is truncated"))
}
