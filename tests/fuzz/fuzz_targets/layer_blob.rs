//! Any bytes as a compressed layer (the first says how): refused with an error, or every span read alone equals its
//! part of the straight decompression.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tdfs_agent::oci::layer::{index_layer, read_span};
use tdfs_common::layer_index::Compression;

fuzz_target!(|data: &[u8]| {
    let Some((kind, blob)) = data.split_first() else { return };
    let compression = if kind % 2 == 0 { Compression::Gzip } else { Compression::Zstd };
    let (mut tar, mut windows) = (Vec::new(), Vec::new());
    let Ok(indexed) = index_layer(blob, compression, &mut tar, &mut windows) else { return };
    let layer = indexed.layer;
    for (n, span) in layer.spans.iter().enumerate() {
        let (from, to) = (layer.span_in(n), layer.span_out(n));
        let window = span.window.map(|w| &windows[w.offset as usize..][..w.len as usize]);
        let bytes = read_span(&layer, n, &blob[from.start as usize..from.end as usize], window);
        assert!(bytes.expect("a span of its own blob") == tar[to.start as usize..to.end as usize]);
    }
});
