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
    /// Bits (0 to 7) of the byte before `in_offset` that belong to the span; 0 without a window.
    pub bits: u8,
    /// The deflate window, where decompression starts inside a gzip member.
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
            let fits = |bytes: u64| i64::try_from(bytes).is_ok();
            ok(fits(layer.size) && fits(layer.blob_size), "layer size overflows")?;
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
                let gzip = layer.compression == Compression::Gzip;
                ok(gzip || span.window.is_none(), "window outside gzip")?;
                ok(span.window.is_some() || span.bits == 0, "bit offset without a window")?;
                ok(layer.compression != Compression::None || blob == out, "plain span moves")?;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::envelope::{decode, encode};

    const WINDOW: Option<Window> = Some(Window { offset: 10, len: 100 });

    fn span(out_offset: u64, in_offset: u64, bits: u8, window: Option<Window>) -> Span {
        Span { out_offset, in_offset, bits, window, hash: ContentHash::of(b"") }
    }

    fn layer(compression: Compression, spans: Vec<Span>) -> Layer {
        let digest = Digest::of(b"");
        Layer { blob: digest, blob_size: 4000, diff_id: digest, size: 10_000, compression, spans }
    }

    fn index(layer: Layer) -> LayerIndex {
        LayerIndex { layers: vec![layer], windows: Some((Digest::of(b"w"), 110)) }
    }

    fn gzip() -> Layer {
        layer(
            Compression::Gzip,
            vec![span(0, 0, 0, None), span(4000, 1500, 3, WINDOW), span(9000, 3000, 0, WINDOW)],
        )
    }

    #[test]
    fn spans_tile_the_layer() {
        let layer = gzip();
        index(layer.clone()).validate().unwrap();
        assert_eq!(
            (0..3).map(|n| layer.span_out(n)).collect::<Vec<_>>(),
            [0..4000, 4000..9000, 9000..10_000]
        );
        // The byte at 1499 is shared.
        assert_eq!((0..3).map(|n| layer.span_in(n)).collect::<Vec<_>>(), [0..1500, 1499..3000, 3000..4000]);
        let at = |offset| layer.span_at(offset);
        assert_eq!([at(0), at(3999), at(4000), at(9999)], [Some(0), Some(0), Some(1), Some(2)]);
        assert_eq!(Layer { spans: vec![], ..layer }.span_at(5), None);
    }

    #[test]
    fn rules_of_spans() {
        use Compression::{Gzip, None as Plain, Zstd};
        index(layer(Plain, vec![])).validate().unwrap();
        index(layer(Zstd, vec![span(0, 0, 0, None), span(5000, 20, 0, None)])).validate().unwrap();
        let with = |change: &dyn Fn(&mut Layer)| {
            let mut layer = gzip();
            change(&mut layer);
            index(layer)
        };
        for (bad, reason) in [
            (with(&|l| l.spans[0].out_offset = 1), "does not start at the start"),
            (with(&|l| l.spans[1].out_offset = 0), "no or too many bytes"),
            (with(&|l| l.spans[2].out_offset = 10_000), "no or too many bytes"),
            (with(&|l| l.spans[2].out_offset = 10_001), "no or too many bytes"),
            (with(&|l| l.spans[2].out_offset = 3000), "no or too many bytes"),
            (with(&|l| l.size = 9000 + SPAN_MAX + 1), "no or too many bytes"),
            (with(&|l| l.size = u64::MAX), "overflows"),
            (with(&|l| l.blob_size = u64::MAX), "overflows"),
            (with(&|l| l.blob_size = 2999), "outside the blob"),
            (with(&|l| l.blob_size = 3000), "outside the blob"),
            (with(&|l| l.blob_size = 3001 + 2 * SPAN_MAX), "too many compressed bytes"),
            (with(&|l| l.spans[2].in_offset = u64::MAX), "outside the blob"),
            (with(&|l| l.spans[0] = span(0, 0, 3, WINDOW)), "before the blob"),
            (with(&|l| l.spans[1].bits = 8), "impossible bit"),
            (with(&|l| l.spans[1].window = None), "without a window"),
            (
                with(&|l| l.spans[1].window = Some(Window { offset: 11, len: 100 })),
                "outside the windows blob",
            ),
            (
                with(&|l| l.spans[1].window = Some(Window { offset: u64::MAX, len: 1 })),
                "outside the windows blob",
            ),
            (index(layer(Zstd, vec![span(0, 0, 0, WINDOW)])), "window outside gzip"),
            (index(layer(Plain, vec![span(0, 0, 0, None)])), "plain span moves"),
            (LayerIndex { windows: None, ..index(gzip()) }, "outside the windows blob"),
            (
                LayerIndex { layers: vec![layer(Gzip, vec![]); LAYERS_MAX + 1], windows: None },
                "too many layers",
            ),
        ] {
            let message = bad.validate().expect_err(reason).to_string();
            assert!(message.contains(reason), "{message}, not {reason}");
        }
        let mut long = index(gzip());
        long.windows = Some((Digest::of(b"w"), 1 << 20));
        long.layers[0].spans[1].window = Some(Window { offset: 0, len: 2 * WINDOW_LEN as u32 + 1 });
        assert!(long.validate().unwrap_err().to_string().contains("window too long"));
    }

    proptest! {
        #[test]
        fn decoding_survives_flipped_bytes(flips in proptest::collection::vec((0usize..4096, any::<u8>()), 1..4)) {
            let mut bad = bincode::encode_to_vec(index(gzip()), bincode::config::standard()).unwrap();
            let len = bad.len();
            for (at, value) in &flips {
                bad[at % len] ^= value;
            }
            let mut bytes = encode(&index(gzip())).unwrap()[..20].to_vec();
            bytes.extend_from_slice(&(len as u32).to_le_bytes());
            bytes.extend(zstd::bulk::compress(&bad, 1).unwrap());
            if let Ok(index) = decode::<LayerIndex>(&bytes) {
                for layer in &index.layers {
                    let mut at = 0;
                    for n in 0..layer.spans.len() {
                        prop_assert_eq!(layer.span_out(n).start, at);
                        at = layer.span_out(n).end;
                        prop_assert!(layer.span_in(n).end <= layer.blob_size);
                    }
                    prop_assert!(layer.spans.is_empty() || at == layer.size);
                }
            }
        }
    }
}
