//! What to send in which order, and which bytes of the segments to read for it. No I/O.
//!
//! ```text
//! order of first use      a b | x | c d | y z         frames of two places of a segment, used by turns
//! chains                  a b . . c d                 each is read as one range, frame by frame,
//!                             x . . . y z             up to CHAINS_OPEN of them at the same time
//! ```

use std::collections::VecDeque;
use std::ops::Range;

use tdfs_common::bitmap::PageBitmap;
use tdfs_common::proof::{self, PageSet};
use tdfs_common::runtime_image::{PlacedFrame, Service};
use tdfs_common::wire::{self, FrameAt, Request};

/// Ranges that are read at the same time.
pub const CHAINS_OPEN: usize = 8;
/// Bytes between two wanted frames that are read and dropped rather than asked for apart.
const GAP_MAX: u64 = 64 << 10;

/// What to send, in order.
#[derive(Debug, Default)]
pub struct Plan {
    pub steps: Vec<Step>,
    /// What is read for the steps.
    pub chains: Vec<Chain>,
}

/// A frame, or a cut of it.
#[derive(Debug)]
pub struct Step {
    pub at: FrameAt,
    pub placed: PlacedFrame,
    /// The pages to send.
    pub set: PageSet,
    /// Place of the range it is read from in [`Plan::chains`].
    pub chain: usize,
}

/// Bytes of a segment that hold frames one after the other, in the order they are sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    /// Place in [`Service::segments`].
    pub segment: usize,
    pub bytes: Range<u64>,
    /// Place of the last step that reads from it.
    pub last_step: usize,
}

impl Step {
    /// Whether all pages of the frame are sent.
    pub fn is_whole(&self) -> bool {
        self.set == proof::all(self.placed.frame.pages)
    }
}

impl Plan {
    /// What is announced to the node. A cut is taken to compress like its frame.
    pub fn announced(&self) -> wire::Plan {
        let share = |s: &Step| {
            u64::from(s.placed.frame.len) * u64::from(s.set.count_ones()) / u64::from(s.placed.frame.pages)
        };
        wire::Plan {
            frames: self.steps.len() as u32,
            pages: self.steps.iter().map(|s| u64::from(s.set.count_ones())).sum(),
            bytes: self.steps.iter().map(share).sum(),
        }
    }
}

/// The pages `service` needs and the node does not hold.
pub fn plan(service: &Service, request: &Request) -> Plan {
    let mut missing = service.needed();
    for segment in &service.segments {
        let held: PageBitmap = request.held_of(&segment.blob, segment.pages());
        for run in held.runs() {
            missing.remove_range(segment.base + run.start..segment.base + run.end);
        }
    }
    let mut plan = Plan::default();
    let mut open: VecDeque<usize> = VecDeque::new();
    for used in service.frames_by_first_use() {
        let placed = used.placed;
        let pages = placed.pages.clone().enumerate().filter(|(_, page)| missing.contains(*page));
        let set = pages.fold(0, |set, (n, _)| set | 1 << n);
        if set == 0 {
            continue;
        }
        let bytes = placed.bytes.clone();
        let follows = |chain: &Chain| {
            chain.segment == used.segment
                && bytes.start >= chain.bytes.end
                && bytes.start - chain.bytes.end <= GAP_MAX
        };
        let step = plan.steps.len();
        let chain = if let Some(at) = open.iter().rposition(|n| follows(&plan.chains[*n])) {
            let chain = open.remove(at).unwrap_or_default();
            plan.chains[chain].bytes.end = bytes.end;
            plan.chains[chain].last_step = step;
            chain
        } else {
            if open.len() == CHAINS_OPEN {
                open.pop_front();
            }
            plan.chains.push(Chain { segment: used.segment, bytes, last_step: step });
            plan.chains.len() - 1
        };
        open.push_back(chain);
        let at = FrameAt { segment: used.segment as u32, frame: placed.index as u32 };
        plan.steps.push(Step { at, placed, set, chain });
    }
    plan
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use tdfs_common::digest::{ContentHash, Digest};
    use tdfs_common::envelope::Format as _;
    use tdfs_common::runtime_image::{Frame, Run, Segment};
    use tdfs_common::wire::{Encoding, Held, HeldPages, Wanted};

    use super::*;

    fn service(segments: &[Vec<(u32, u32)>], picks: &[(usize, u32, u32)]) -> Service {
        let mut base = 0;
        let segments: Vec<Segment> = segments
            .iter()
            .enumerate()
            .map(|(n, frames)| {
                let frame = |&(pages, len)| Frame { pages, len, hash: ContentHash::of(b"") };
                let frames = frames.iter().map(frame).collect();
                let segment = Segment { blob: Digest::of(&[n as u8]), base, frames };
                base = segment.zone_range().end + 3;
                segment
            })
            .collect();
        let mut runs = Vec::new();
        for (ino, &(segment, page, count)) in picks.iter().enumerate() {
            let zone = segments[segment % segments.len()].zone_range();
            let start = zone.start + u64::from(page) % (zone.end - zone.start);
            let count = u64::from(count).min(zone.end - start);
            runs.push(Run { ino: ino as u32, file_page: 0, zone_page: start as u32, count: count as u32 });
        }
        let service = Service {
            group: "g".into(),
            service: "s".into(),
            image: Digest::of(b""),
            args: None,
            ready: "exit".into(),
            segments,
            runs,
        };
        service.validate().unwrap();
        service
    }

    fn request(held: Vec<Held>) -> Request {
        let wanted = Wanted::Pages { image: Digest::of(b""), artifact: Digest::of(b"") };
        Request { wanted, held, encoding: Encoding::Stored }
    }

    #[test]
    fn frames_of_two_places_used_by_turns_are_two_ranges() {
        let far = (64, 200_000);
        let s = service(
            &[vec![(64, 10), (64, 10), far, (64, 10), (64, 10)]],
            &[(0, 0, 64), (0, 192, 64), (0, 64, 64), (0, 256, 1)],
        );
        let plan = plan(&s, &request(Vec::new()));
        let order: Vec<_> = plan.steps.iter().map(|s| (s.at.frame, s.chain, s.is_whole())).collect();
        assert_eq!(order, [(0, 0, true), (3, 1, true), (1, 0, true), (4, 1, false)]);
        assert_eq!(plan.chains[0], Chain { segment: 0, bytes: 0..20, last_step: 2 });
        assert_eq!(plan.chains[1], Chain { segment: 0, bytes: 200_020..200_040, last_step: 3 });
        let announced = plan.announced();
        assert_eq!((announced.frames, announced.pages, announced.bytes), (4, 193, 30));
    }

    proptest! {
        #[test]
        fn sends_exactly_the_set_difference_in_readable_ranges(
            segments in proptest::collection::vec(
                proptest::collection::vec((1u32..=64, 1u32..4096), 1..30), 1..4),
            picks in proptest::collection::vec((0usize..4, 0u32..2000, 1u32..200), 0..30),
            held in proptest::collection::vec((0usize..5, proptest::option::of(proptest::collection::vec(any::<u8>(), 0..100))), 0..4),
        ) {
            let s = service(&segments, &picks);
            let held: BTreeMap<usize, Option<Vec<u8>>> = held.into_iter().collect();
            let held: Vec<Held> = held
                .into_iter()
                .map(|(n, bits)| Held {
                    segment: Digest::of(&[n as u8]),
                    pages: bits.map_or(HeldPages::All, HeldPages::Some),
                })
                .collect();
            let mut expected: BTreeSet<u64> = s.needed().iter().collect();
            for held in &held {
                if let Some(segment) = s.segments.iter().find(|g| g.blob == held.segment) {
                    expected.retain(|page| {
                        let Some(n) = page.checked_sub(segment.base).filter(|n| *n < segment.pages()) else { return true };
                        match &held.pages {
                            HeldPages::All => false,
                            HeldPages::Some(bits) => bits.get(n as usize / 8).is_none_or(|b| b >> (n % 8) & 1 == 0),
                        }
                    });
                }
            }
            let plan = plan(&s, &request(held));
            let mut sent = BTreeSet::new();
            let mut reached: Vec<u64> = plan.chains.iter().map(|c| c.bytes.start).collect();
            let mut most_open = 0;
            for (n, step) in plan.steps.iter().enumerate() {
                let segment = &s.segments[step.at.segment as usize];
                prop_assert_eq!(segment.placed().nth(step.at.frame as usize).unwrap(), step.placed.clone());
                for (bit, page) in step.placed.pages.clone().enumerate() {
                    if step.set >> bit & 1 == 1 {
                        prop_assert!(sent.insert(page), "page sent twice");
                    }
                }
                // Each range is read forward, without long gaps, and closed after its last step.
                let chain = &plan.chains[step.chain];
                prop_assert_eq!(chain.segment, step.at.segment as usize);
                let gap = step.placed.bytes.start.checked_sub(reached[step.chain]);
                prop_assert!(gap.is_some_and(|g| g <= GAP_MAX));
                reached[step.chain] = step.placed.bytes.end;
                prop_assert!(n <= chain.last_step);
                let open = |c: usize| {
                    let first = plan.steps.iter().position(|s| s.chain == c).unwrap();
                    (first..=plan.chains[c].last_step).contains(&n)
                };
                most_open = most_open.max((0..plan.chains.len()).filter(|c| open(*c)).count());
            }
            prop_assert!(most_open <= CHAINS_OPEN);
            prop_assert_eq!(reached, plan.chains.iter().map(|c| c.bytes.end).collect::<Vec<_>>());
            prop_assert_eq!(plan.announced().pages, expected.len() as u64);
            prop_assert_eq!(sent, expected);
        }
    }
}
