//! Random access into unmodified layers: where decompression can start, and what it must yield.
//!
//! A *span* is about 4 MiB of a layer's uncompressed tar. To read one, a node fetches `in_offset..next.in_offset`
//! of the original blob (plus the byte a gzip bit offset shares), and for gzip the 32 KiB *window* before it, from
//! the windows blob:
//!
//! ```text
//! blob     |----- span 0 -----|--- span 1 ---|------ span 2 ------|
//!                             ^ in_offset, bits: `bits` high bits of the byte before belong to the span
//! tar      |<-- out_offset .. next.out_offset -->|
//! windows  [zstd(window 1)][zstd(window 2)]...     span 0 and member starts need none
//! ```
//!
//! Nothing of a span is exposed before its hash over the uncompressed bytes matched, so a wrong window, a wrong
//! offset and a wrong blob all end the same way.

use bincode::{Decode, Encode};

use crate::digest::{ContentHash, Digest};
use crate::envelope::{Format, FormatError, ensure};

/// Uncompressed bytes per span that a writer aims at.
pub const SPAN_TARGET: u64 = 4 << 20;
/// Uncompressed bytes per span that a reader accepts at most; longer spans make a layer not accessible at random.
pub const SPAN_MAX: u64 = 64 << 20;
/// Most spans of one layer (64 GiB of 4 MiB spans, with room for short zstd frames).
pub const SPANS_MAX: usize = 1 << 18;
/// Layers of one image.
pub const LAYERS_MAX: usize = 512;
/// A deflate window, bytes.
pub const WINDOW_LEN: usize = 32 << 10;

/// How a layer blob is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Compression {
    /// A plain tar.
    None,
    /// RFC 1952, one or more members.
    Gzip,
    /// RFC 8878, one or more frames.
    Zstd,
}

/// The compressed window of a span, in the windows blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Window {
    /// Offset in the windows blob, bytes.
    pub offset: u64,
    /// Length in the windows blob, bytes.
    pub len: u32,
}

/// A point where decompression can start, and what follows up to the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Span {
    /// Offset in the uncompressed layer, bytes.
    pub out_offset: u64,
    /// Offset of the first whole byte in the blob, bytes.
    pub in_offset: u64,
    /// Bits (0 to 7) of the byte before `in_offset` that belong to the span; gzip only.
    pub bits: u8,
    /// The deflate window, where one is needed.
    pub window: Option<Window>,
    /// Of the uncompressed bytes.
    pub hash: ContentHash,
}

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Layer {
    /// The blob, as the image manifest names it.
    pub blob: Digest,
    /// Bytes of the blob.
    pub blob_size: u64,
    /// sha256 of the uncompressed tar, as the image config names it.
    pub diff_id: Digest,
    /// Bytes of the uncompressed tar.
    pub size: u64,
    /// How the blob is compressed.
    pub compression: Compression,
    /// Spans covering `0..size` in order; empty when the layer must be fetched whole (one long zstd frame, say).
    pub spans: Vec<Span>,
}

/// Every layer of an image, lowest first.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct LayerIndex {
    /// In the order of the image manifest.
    pub layers: Vec<Layer>,
    /// The blob that holds the windows, and its size; absent when no span needs one.
    pub windows: Option<(Digest, u64)>,
}

impl Layer {
    /// The span that holds uncompressed offset `at`, which must lie below `size`; `None` without random access.
    pub fn span_at(&self, at: u64) -> Option<usize> {
        self.spans.partition_point(|s| s.out_offset <= at).checked_sub(1)
    }

    /// Uncompressed bytes of span `n`.
    pub fn span_out(&self, n: usize) -> std::ops::Range<u64> {
        self.spans[n].out_offset..self.spans.get(n + 1).map_or(self.size, |s| s.out_offset)
    }

    /// Bytes of the blob that span `n` is decompressed from.
    pub fn span_in(&self, n: usize) -> std::ops::Range<u64> {
        let span = &self.spans[n];
        let start = span.in_offset - u64::from(span.bits > 0);
        start..self.spans.get(n + 1).map_or(self.blob_size, |s| s.in_offset)
    }
}

impl Format for LayerIndex {
    const MAGIC: [u8; 8] = *b"TDFSLAYR";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = 128 << 20;
    const NAME: &'static str = "layer index";

    fn validate(&self) -> Result<(), FormatError> {
        let ok = |c: bool, reason: &str| ensure(c, Self::NAME, || reason.to_owned());
        ok(self.layers.len() <= LAYERS_MAX, "too many layers")?;
        let windows_size = self.windows.map_or(0, |(_, size)| size);
        for layer in &self.layers {
            ok(layer.size <= i64::MAX as u64 && layer.blob_size <= i64::MAX as u64, "layer size overflows")?;
            ok(layer.spans.len() <= SPANS_MAX, "too many spans")?;
            if let Some(first) = layer.spans.first() {
                ok(first.out_offset == 0, "first span does not start at the start")?;
            }
            for (n, span) in layer.spans.iter().enumerate() {
                let (out, blob) = (layer.span_out(n), layer.span_in_checked(n));
                ok(out.start < out.end && out.end - out.start <= SPAN_MAX, "span of no or too many bytes")?;
                let blob = blob.ok_or(FormatError::Invalid {
                    name: Self::NAME,
                    reason: "span starts before the blob".into(),
                })?;
                ok(blob.start < blob.end && blob.end <= layer.blob_size, "span outside the blob")?;
                ok(blob.end - blob.start <= 2 * SPAN_MAX, "span of too many compressed bytes")?;
                ok(span.bits < 8, "span starts at an impossible bit")?;
                ok(span.bits == 0 || layer.compression == Compression::Gzip, "bit offset outside gzip")?;
                if let Some(w) = span.window {
                    let end = w.offset.checked_add(u64::from(w.len));
                    ok(end.is_some_and(|e| e <= windows_size), "window outside the windows blob")?;
                    ok(w.len as usize <= 2 * WINDOW_LEN, "window too long")?;
                }
            }
        }
        Ok(())
    }
}

impl Layer {
    fn span_in_checked(&self, n: usize) -> Option<std::ops::Range<u64>> {
        self.spans[n].in_offset.checked_sub(u64::from(self.spans[n].bits > 0))?;
        Some(self.span_in(n))
    }
}
