//! Which bytes to ask for: missing pages to range requests, without any I/O.
//!
//! ```text
//! frames of a segment   [w][w][ ][w][ ][ ][ ][ ][ ][w]        w: holds a missing page
//! requests              |---------|              |---|        a small gap is received and dropped
//! ```
//!
//! A request costs a round trip, about 2 ms to a registry in the same data centre, and 1 Gb/s carries 250 kB in that
//! time: a gap up to [`GAP_MAX`] is cheaper to receive than to skip. On slower or farther links both sides of the
//! comparison grow alike.

use std::ops::Range;

use tdfs_common::bitmap::PageBitmap;
use tdfs_common::digest::Digest;
use tdfs_common::runtime_image::{PlacedFrame, Segment, Service};

/// Bytes between two wanted frames that are fetched rather than left out.
pub const GAP_MAX: u64 = 256 << 10;

/// Consecutive bytes of one segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The segment's blob.
    pub blob: Digest,
    /// Bytes of the whole blob.
    pub size: u64,
    /// Bytes of the blob to ask for.
    pub bytes: Range<u64>,
    /// The frames in them, in order, without gaps.
    pub frames: Vec<PlannedFrame>,
}

/// A frame of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedFrame {
    /// The frame and its place.
    pub placed: PlacedFrame,
    /// Whether a page of it is missing; otherwise it only fills a gap.
    pub wanted: bool,
}

impl Request {
    /// All of a segment.
    pub fn whole(segment: &Segment) -> Self {
        let frames = segment.placed().map(|placed| PlannedFrame { placed, wanted: true });
        let size = segment.size();
        Self { blob: segment.blob, size, bytes: 0..size, frames: frames.collect() }
    }
}

/// The requests that bring every page of `missing`, a subset of the pages `service` addresses.
pub fn plan(service: &Service, missing: &PageBitmap) -> Vec<Request> {
    plan_with_gaps(service, missing, GAP_MAX)
}

/// The same without a byte between wanted frames, for what somebody waits for.
pub fn plan_exactly(service: &Service, missing: &PageBitmap) -> Vec<Request> {
    plan_with_gaps(service, missing, 0)
}

fn plan_with_gaps(service: &Service, missing: &PageBitmap, gap_max: u64) -> Vec<Request> {
    let mut requests: Vec<Request> = Vec::new();
    for segment in service.segments.iter().filter(|s| missing.intersects(s.zone_range())) {
        let first = requests.len();
        let size = segment.size();
        let mut gap: Vec<PlannedFrame> = Vec::new();
        for placed in segment.placed() {
            let wanted = missing.intersects(placed.pages.clone());
            let frame = PlannedFrame { placed, wanted };
            if !wanted {
                gap.push(frame);
                continue;
            }
            let bytes = frame.placed.bytes.clone();
            match requests[first..].last_mut() {
                Some(request) if bytes.start - request.bytes.end <= gap_max => {
                    request.frames.append(&mut gap);
                    request.frames.push(frame);
                    request.bytes.end = bytes.end;
                }
                _ => requests.push(Request { blob: segment.blob, size, bytes, frames: vec![frame] }),
            }
            gap.clear();
        }
    }
    requests
}

/// The same for a server that does not serve ranges: whole segments, as far as a page of them is missing.
pub fn plan_whole(service: &Service, missing: &PageBitmap) -> Vec<Request> {
    let touched = service.segments.iter().filter(|s| missing.intersects(s.zone_range()));
    let request = |segment: &Segment| {
        let mut request = Request::whole(segment);
        for frame in &mut request.frames {
            frame.wanted = missing.intersects(frame.placed.pages.clone());
        }
        request
    };
    touched.map(request).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use tdfs_common::digest::ContentHash;
    use tdfs_common::runtime_image::{Frame, Run};

    use super::*;

    fn service(segments: &[(u64, Vec<(u32, u32)>)]) -> Service {
        let mut base = 0;
        let mut out = Vec::new();
        for (skip, frames) in segments {
            base += skip;
            let frames = frames.iter().map(|&(pages, len)| Frame { len, pages, hash: ContentHash::of(&[]) });
            let segment =
                Segment { blob: Digest::of(&base.to_le_bytes()), base, frames: frames.collect::<Vec<_>>() };
            base += segment.pages();
            out.push(segment);
        }
        Service {
            group: "g".into(),
            service: "s".into(),
            image: Digest::of(b""),
            args: None,
            ready: "exit".into(),
            segments: out,
            runs: Vec::new(),
        }
    }

    /// Pages of the wanted frames.
    fn pages(request: &Request) -> u64 {
        request.frames.iter().filter(|f| f.wanted).map(|f| u64::from(f.placed.frame.pages)).sum()
    }

    #[test]
    fn one_request_for_a_segment_of_which_nothing_is_here() {
        let s = service(&[(0, vec![(64, 200_000); 100]), (7, vec![(64, 1), (3, 900)])]);
        let mut missing = PageBitmap::new(s.zone_pages());
        s.segments.iter().for_each(|g| missing.insert_range(g.zone_range()));
        let requests = plan(&s, &missing);
        assert_eq!(requests.len(), 2);
        assert!(requests.iter().all(|r| r.bytes == (0..r.size)));
        assert_eq!(requests.iter().map(pages).sum::<u64>(), 6467);
        assert_eq!(plan(&s, &PageBitmap::new(s.zone_pages())), []);
    }

    #[test]
    fn a_gap_is_received_up_to_the_cost_of_a_round_trip() {
        let gap = GAP_MAX as u32 / 2;
        for (between, requests) in [(vec![(64, gap); 2], 1), (vec![(64, gap), (64, gap + 1)], 2)] {
            let frames: Vec<_> = [(64, 10)].into_iter().chain(between).chain([(64, 10)]).collect();
            let s = service(&[(0, frames)]);
            let mut missing = PageBitmap::new(s.zone_pages());
            missing.insert(63);
            missing.insert(192);
            let plan = plan(&s, &missing);
            assert_eq!(plan.len(), requests);
            assert_eq!(plan.iter().map(pages).sum::<u64>(), 128);
        }
    }

    proptest! {
        #[test]
        fn covers_exactly_the_frames_with_missing_pages(
            segments in proptest::collection::vec(
                (0u64..100, proptest::collection::vec((1u32..=64, 1u32..200_000), 1..20)), 1..4),
            picks in proptest::collection::vec(any::<proptest::sample::Index>(), 0..30),
        ) {
            let s = service(&segments);
            let pages: Vec<u64> = s.segments.iter().flat_map(Segment::zone_range).collect();
            let mut missing = PageBitmap::new(s.zone_pages());
            for pick in picks {
                missing.insert(pages[pick.index(pages.len())]);
            }
            let mut covered = BTreeSet::new();
            let mut last: Option<(Digest, u64)> = None;
            for request in plan(&s, &missing) {
                let first = &request.frames[0];
                let final_ = &request.frames[request.frames.len() - 1];
                prop_assert!(first.wanted && final_.wanted);
                prop_assert_eq!(first.placed.bytes.start..final_.placed.bytes.end, request.bytes.clone());
                prop_assert!(request.bytes.end <= request.size);
                let mut gap = 0;
                for pair in request.frames.windows(2) {
                    prop_assert_eq!(pair[0].placed.bytes.end, pair[1].placed.bytes.start);
                    prop_assert_eq!(pair[0].placed.pages.end, pair[1].placed.pages.start);
                }
                for frame in &request.frames {
                    let bytes = u64::from(frame.placed.frame.len);
                    gap = if frame.wanted { 0 } else { gap + bytes };
                    prop_assert!(gap <= GAP_MAX);
                    let hit = frame.placed.pages.clone().any(|p| missing.contains(p));
                    prop_assert_eq!(hit, frame.wanted);
                    if frame.wanted {
                        covered.extend(frame.placed.pages.clone());
                    }
                }
                if let Some((blob, end)) = last && blob == request.blob {
                    prop_assert!(request.bytes.start - end > GAP_MAX);
                }
                last = Some((request.blob, request.bytes.end));
            }
            prop_assert!(missing.iter().all(|p| covered.contains(&p)));
            let mut whole = BTreeSet::new();
            for request in plan_whole(&s, &missing) {
                prop_assert!(request.bytes == (0..request.size));
                let wanted = request.frames.into_iter().filter(|f| f.wanted);
                whole.extend(wanted.flat_map(|f| f.placed.pages));
            }
            prop_assert_eq!(whole, covered);
        }
    }

    #[test]
    fn needed_pages_of_a_service_are_what_its_runs_name() {
        let mut s = service(&[(0, vec![(64, 10), (10, 10)])]);
        s.runs = vec![
            Run { ino: 1, file_page: 0, zone_page: 70, count: 2 },
            Run { ino: 2, file_page: 9, zone_page: 71, count: 1 },
        ];
        let plan = plan(&s, &s.needed());
        assert_eq!(plan.len(), 1);
        assert_eq!((plan[0].bytes.clone(), pages(&plan[0])), (10..20, 10));
    }
}
