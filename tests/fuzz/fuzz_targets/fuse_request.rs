//! Any bytes as a request of the kernel: answered within the protocol's limits, or too short to say which it is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tdfs_agent::rootfs::fuse::protocol::{Answer, READ_PAGES_MAX, answer};

fuzz_target!(|data: &[u8]| {
    let Some((size, request)) = data.split_first_chunk::<8>() else { return };
    let Some((unique, answer)) = answer(request, u64::from_le_bytes(*size)) else {
        assert!(request.len() < 40);
        return;
    };
    assert_eq!(unique.to_ne_bytes(), request[8..16]);
    match answer {
        Answer::Read { len, .. } => assert!(len <= usize::from(READ_PAGES_MAX) * 4096),
        Answer::Error(errno) => assert!((1..512).contains(&errno)),
        Answer::Body(body) => assert!(body.len() <= 104),
        Answer::Nothing => {}
    }
});
