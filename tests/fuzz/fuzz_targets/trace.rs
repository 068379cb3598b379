//! Any bytes as a trace: refused with an error, or one that encodes to itself and merges with itself and with a run
//! that began elsewhere to the same set of pages.
//!
//! The input is taken as an envelope and as the payload of a sound one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tdfs_agent::pack::merge_traces;
use tdfs_common::envelope::{Format as _, decode, encode};
use tdfs_common::trace::Trace;

fuzz_target!(|data: &[u8]| {
    let _ = decode::<Trace>(data);
    let config = bincode::config::standard().with_limit::<{ 1 << 20 }>();
    let Ok((trace, _)) = bincode::decode_from_slice::<Trace, _>(data, config) else { return };
    if trace.validate().is_err() {
        return;
    }
    let encoded = encode(&trace).expect("a valid trace");
    assert_eq!(decode::<Trace>(&encoded).expect("what was encoded"), trace);
    let once = merge_traces(std::slice::from_ref(&trace)).expect("one trace");
    once.validate().expect("a merged trace is a trace");
    let mut later = trace.clone();
    later.touches.reverse();
    let twice = merge_traces(&[trace, later]).expect("two runs of a service");
    assert_eq!((&once.files, &once.touches), (&twice.files, &twice.touches));
});
