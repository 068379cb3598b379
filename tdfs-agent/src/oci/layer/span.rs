//! Reading one span: any bytes in, the right bytes or an error out.

use tdfs_common::digest::ContentHash;
use tdfs_common::layer_index::{Compression, Layer, SPAN_MAX, WINDOW_LEN};

use super::scan::Input;
use super::{LayerError, gzip, zstd};

/// Decompresses span `n` of a validated `layer`.
///
/// `compressed` is [`Layer::span_in`] of the blob, `window` what [`Span::window`](tdfs_common::layer_index::Span)
/// names in the windows blob. Neither is trusted: the result has the length and the hash that the index says.
/// Memory: the span, a deflate window, and for zstd at most 128 MiB.
pub fn read_span(
    layer: &Layer,
    n: usize,
    compressed: &[u8],
    window: Option<&[u8]>,
) -> Result<Vec<u8>, LayerError> {
    let failed = |reason: String| LayerError::Span { span: n, layer: layer.blob.to_string(), reason };
    let Some(span) = layer.spans.get(n) else {
        return Err(failed("no such span".into()));
    };
    let (from, to) = (layer.span_in(n), layer.span_out(n));
    let len = to.end - to.start;
    if compressed.len() as u64 != from.end - from.start || window.is_some() != span.window.is_some() {
        return Err(failed("wrong number of compressed bytes, or no window".into()));
    }
    if len > SPAN_MAX {
        return Err(failed("too long".into()));
    }
    let window = match window {
        None => None,
        Some(packed) => {
            let raw = ::zstd::bulk::decompress(packed, WINDOW_LEN);
            Some(raw.map_err(|e| failed(format!("window: {e}")))?)
        }
    };
    let mut input = Input::new(compressed);
    let bytes = match layer.compression {
        Compression::None => Ok(compressed.to_vec()),
        Compression::Gzip => gzip::read(&mut input, span.bits, window.as_deref(), len as usize),
        Compression::Zstd => zstd::read(&mut input, len as usize),
    };
    let bytes = bytes.map_err(|e| failed(e.to_string()))?;
    if bytes.len() as u64 != len || ContentHash::of(&bytes) != span.hash {
        return Err(failed("content does not match its hash".into()));
    }
    Ok(bytes)
}
