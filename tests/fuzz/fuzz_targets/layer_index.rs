//! Any bytes as a layer index: refused with an error, or spans that tile each layer, lie in its blob, and yield an
//! error or exactly the bytes with their hash, whatever the blob and the windows hold.
//!
//! Half of the input is taken as the payload of a sound envelope; the rest stands for blob and windows.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tdfs_agent::oci::layer::read_span;
use tdfs_common::digest::ContentHash;
use tdfs_common::envelope::{Format as _, decode, encode};
use tdfs_common::layer_index::LayerIndex;

fuzz_target!(|data: &[u8]| {
    let _ = decode::<LayerIndex>(data);
    let (payload, bytes) = data.split_at(data.len() / 2);
    let config = bincode::config::standard().with_limit::<{ 1 << 20 }>();
    let Ok((index, _)) = bincode::decode_from_slice::<LayerIndex, _>(payload, config) else { return };
    if index.validate().is_err() {
        return;
    }
    let encoded = encode(&index).expect("a valid index");
    assert_eq!(decode::<LayerIndex>(&encoded).expect("what was encoded"), index);
    for layer in &index.layers {
        let mut at = 0;
        for (n, span) in layer.spans.iter().enumerate().take(64) {
            let (from, to) = (layer.span_in(n), layer.span_out(n));
            assert!(to.start == at && to.start < to.end && from.start < from.end && from.end <= layer.blob_size);
            at = to.end;
            let len = (from.end - from.start).min(1 << 20) as usize;
            let mut blob = bytes.to_vec();
            blob.resize(len, 0);
            let window = span.window.map(|w| &bytes[..(w.len as usize).min(bytes.len())]);
            if let Ok(out) = read_span(layer, n, &blob, window) {
                assert_eq!((out.len() as u64, ContentHash::of(&out)), (to.end - to.start, span.hash));
            }
        }
    }
});
