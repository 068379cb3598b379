//! Zstandard (RFC 8878): every frame is a place to start.
//!
//! Frames of seekable archives and of image builders that compress each file alone are short, so neighbours
//! are read as one span. Skippable frames yield nothing and belong to whichever span they follow.

use std::io::Read;

use tdfs_common::layer_index::WINDOW_LEN;
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::LayerError;
use super::scan::{Cut, Input, Output};

/// Decompresses every frame of `input`. Windows over 128 MiB (`--long=28` and more) are refused.
pub(super) fn decode<R: Read>(input: &mut Input<R>, out: &mut Output) -> Result<(), LayerError> {
    let mut decoder = Decoder::new().map_err(|e| input.damaged(e.to_string()))?;
    let mut buf = vec![0; 4 * WINDOW_LEN];
    let mut between_frames = true;
    let mut first = true;
    loop {
        if between_frames {
            if input.fill()?.is_empty() {
                return if first { Err(input.damaged("not a zstd stream")) } else { Ok(()) };
            }
            if first || out.wants_cut() {
                out.cut(Cut { in_offset: input.offset(), bits: 0, window: None });
            }
            first = false;
        }
        let (wrote, ended) = step(&mut decoder, input, &mut buf)?;
        out.write(&buf[..wrote])?;
        between_frames = ended;
    }
}

/// Decompresses exactly `len` bytes from a frame's start.
pub(super) fn read<R: Read>(input: &mut Input<R>, len: usize) -> Result<Vec<u8>, LayerError> {
    let mut decoder = Decoder::new().map_err(|e| input.damaged(e.to_string()))?;
    let mut buf = vec![0; len];
    let mut pos = 0;
    while pos < len {
        pos += step(&mut decoder, input, &mut buf[pos..])?.0;
    }
    Ok(buf)
}

/// Decompresses some bytes into `buf`; says how many, and whether a frame ended with them.
fn step<R: Read>(
    decoder: &mut Decoder<'_>,
    input: &mut Input<R>,
    buf: &mut [u8],
) -> Result<(usize, bool), LayerError> {
    let bytes = input.fill()?;
    let ended = bytes.is_empty();
    let mut from = InBuffer::around(bytes);
    let mut to = OutBuffer::around(buf);
    let left = decoder.run(&mut from, &mut to);
    let (used, wrote) = (from.pos(), to.pos());
    let left = left.map_err(|e| input.damaged(e.to_string()))?;
    input.consume(used);
    if ended && wrote == 0 {
        return Err(input.damaged("zstd frame is truncated"));
    }
    Ok((wrote, left == 0))
}
