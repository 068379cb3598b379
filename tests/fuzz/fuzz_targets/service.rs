//! Any bytes as service metadata or as a zone directory: refused with an error, or segments and runs that every later
//! stage can walk without leaving the zone, and that encode to themselves.
//!
//! The input is taken as an envelope and as the payload of a sound one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tdfs_common::envelope::{Format as _, decode, encode};
use tdfs_common::runtime_image::{FILE_PAGES_MAX, Segment, Service, ZONE_PAGES_MAX, ZoneDirectory};

fuzz_target!(|data: &[u8]| {
    let _ = decode::<Service>(data);
    let _ = decode::<ZoneDirectory>(data);
    let config = bincode::config::standard().with_limit::<{ 1 << 20 }>();
    if let Ok((directory, _)) = bincode::decode_from_slice::<ZoneDirectory, _>(data, config)
        && directory.validate().is_ok()
    {
        walk(&directory.segments);
    }
    let Ok((service, _)) = bincode::decode_from_slice::<Service, _>(data, config) else { return };
    if service.validate().is_err() {
        return;
    }
    let encoded = encode(&service).expect("valid metadata");
    assert_eq!(decode::<Service>(&encoded).expect("what was encoded"), service);
    assert_eq!(service.zone_pages(), walk(&service.segments));
    let needed = service.needed();
    assert!(needed.count() <= service.file_pages() && service.file_pages() <= FILE_PAGES_MAX);
    for run in needed.runs() {
        assert!(service.segments.iter().any(|s| s.zone_range().contains(&run.start)));
    }
});

/// The end of the last segment.
fn walk(segments: &[Segment]) -> u64 {
    let mut end = 0;
    for segment in segments {
        assert!(segment.base >= end);
        let (mut page, mut byte) = (segment.base, 0);
        for frame in segment.placed() {
            assert_eq!((frame.pages.start, frame.bytes.start), (page, byte));
            (page, byte) = (frame.pages.end, frame.bytes.end);
        }
        assert_eq!((page, byte), (segment.zone_range().end, segment.size()));
        end = page;
    }
    assert!(end <= ZONE_PAGES_MAX);
    end
}
