//! Any bytes as a request to a page service and as its answer: refused with an error, or what they say they are.
//!
//! The answer is read the way a node does: header, then unit by unit, each body no longer than its head may say.
#![no_main]

use bincode::config;
use libfuzzer_sys::fuzz_target;
use tdfs_common::digest::{ContentHash, Digest};
use tdfs_common::envelope::{Format, decode, encode};
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::wire::{HEAD_LEN, Head, Kind, Request, blob_body, check_stream_header, cut_body};
use tdfs_common::{proof, wire};

fuzz_target!(|data: &[u8]| {
    let _ = decode::<Request>(data);
    // The same past the envelope, which no fuzzer guesses.
    if let Ok((request, _)) =
        bincode::decode_from_slice::<Request, _>(data, config::standard().with_limit::<65536>())
        && request.validate().is_ok()
    {
        let bytes = encode(&request).expect("smaller than the limit");
        assert_eq!(decode::<Request>(&bytes).expect("its own request"), request);
        let segment = request.held.first().map_or(Digest::of(b""), |h| h.segment);
        assert!(request.held_of(&segment, 1000).count() <= 1000);
    }
    if let Some(header) = data.first_chunk() {
        let _ = check_stream_header(header);
    }
    let mut rest = data;
    while let Some((head, body)) = rest.split_first_chunk::<HEAD_LEN>() {
        let Ok(decoded) = Head::decode(head) else { break };
        assert_eq!(decoded.encode(), *head);
        let Some((body, after)) = body.split_at_checked(decoded.len) else { break };
        rest = after;
        match decoded.kind {
            Kind::Blob { part, media_type_len } => {
                if let Ok((_, _, content)) = blob_body(media_type_len, body) {
                    assert!(content.len() <= part.limit());
                }
            }
            Kind::Cut { set, values, plain: true, .. } => {
                let (values, pages) = cut_body(values, body).expect("as long as its head says");
                assert_eq!(pages.len(), set.count_ones() as usize * PAGE_SIZE);
                for count in 1..=64 {
                    let root = proof::root(count, set, pages, &values);
                    assert!(root.is_none() || set <= proof::all(count));
                    if set == proof::all(count) {
                        assert!(root.is_none_or(|r| r == ContentHash::of(pages)));
                    }
                }
            }
            _ => assert!(decoded.len <= wire::MESSAGE_MAX.max(64 * PAGE_SIZE + 64 * 32)),
        }
    }
});
