//! From the probe's events to pages in order of first use.
//!
//! A page belongs to the set when it entered the page cache up to the cut; its place is where it was used first, or
//! where it entered if nothing used it (a program's own read-ahead). Events of pages that never entered are ignored:
//! a read reports its whole range, also what lies past the end of the file.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use tdfs_common::abi::{Event, Kind};

/// Consecutive pages of one inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The kernel's inode number.
    pub ino: u64,
    /// Page numbers in the file.
    pub pages: Range<u32>,
}

/// Ranks of the first events of a page.
#[derive(Clone, Copy, Default)]
struct First {
    added: Option<usize>,
    used: Option<usize>,
}

/// The pages of `events` with a time stamp up to `cut` (CLOCK_MONOTONIC, nanoseconds), in order of first use.
pub fn first_use(events: &[Event], cut: u64) -> Vec<PageRun> {
    let mut events: Vec<&Event> =
        events.iter().filter(|e| e.ktime <= cut && e.kind != Kind::Removed as u32).collect();
    events.sort_by_key(|e| e.ktime);
    let mut pages: HashMap<(u64, u32), First> = HashMap::new();
    for (rank, event) in events.iter().enumerate() {
        for page in event.index..event.index.saturating_add(event.count) {
            let first = pages.entry((event.ino, page)).or_default();
            let slot = if event.kind == Kind::Added as u32 { &mut first.added } else { &mut first.used };
            slot.get_or_insert(rank);
        }
    }
    let added = pages.iter().filter_map(|(&(ino, page), first)| {
        let added = first.added?;
        Some((first.used.unwrap_or(added), ino, page))
    });
    let mut order: Vec<(usize, u64, u32)> = added.collect();
    order.sort_unstable();
    runs(order.into_iter().map(|(_, ino, page)| (ino, page)))
}

/// The pages that left the page cache at `since` (CLOCK_MONOTONIC, nanoseconds) or later.
pub fn evicted(events: &[Event], since: u64) -> Vec<PageRun> {
    let removed = events.iter().filter(|e| e.kind == Kind::Removed as u32 && e.ktime >= since);
    removed.map(|e| PageRun { ino: e.ino, pages: e.index..e.index.saturating_add(e.count) }).collect()
}

/// The pages that entered the page cache and did not leave it again: what must be there after the last event. The kernel
/// may evict any page at any time, and systems with proactive reclaim do so without memory pressure.
pub fn left(events: &[Event]) -> Vec<PageRun> {
    let mut events: Vec<&Event> = events.iter().filter(|e| e.kind != Kind::Used as u32).collect();
    events.sort_by_key(|e| e.ktime);
    let mut pages = BTreeSet::new();
    for event in events {
        for page in event.index..event.index.saturating_add(event.count) {
            if event.kind == Kind::Added as u32 {
                pages.insert((event.ino, page));
            } else {
                pages.remove(&(event.ino, page));
            }
        }
    }
    runs(pages.into_iter())
}

/// Joins pages that follow each other.
pub fn runs(pages: impl Iterator<Item = (u64, u32)>) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for (ino, page) in pages {
        match runs.last_mut() {
            Some(last) if last.ino == ino && last.pages.end == page => last.pages.end += 1,
            _ => runs.push(PageRun { ino, pages: page..page + 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(ktime: u64, kind: Kind, ino: u64, index: u32, count: u32) -> Event {
        Event { ktime, ino, index, count, kind: kind as u32, tgid: 1 }
    }

    #[test]
    fn a_page_stands_where_it_was_used_first() {
        let events = [
            event(1, Kind::Added, 7, 0, 4),
            event(2, Kind::Used, 7, 2, 1),
            event(3, Kind::Added, 8, 0, 1),
            event(4, Kind::Used, 7, 0, 2),
            event(5, Kind::Used, 7, 2, 1),
        ];
        let run = |ino, pages| PageRun { ino, pages };
        let want = [run(7, 3..4), run(7, 2..3), run(8, 0..1), run(7, 0..2)];
        assert_eq!(first_use(&events, u64::MAX), want);
    }

    #[test]
    fn later_and_never_added_pages_are_left_out() {
        let events =
            [event(5, Kind::Added, 7, 1, 1), event(4, Kind::Used, 7, 0, 64), event(6, Kind::Added, 7, 2, 1)];
        assert_eq!(first_use(&events, 5), [PageRun { ino: 7, pages: 1..2 }]);
    }

    #[test]
    fn an_evicted_page_was_used_but_is_not_left() {
        let events = [
            event(1, Kind::Added, 7, 0, 4),
            event(2, Kind::Removed, 7, 1, 2),
            event(3, Kind::Added, 7, 2, 1),
            event(4, Kind::Used, 7, 1, 1),
        ];
        let run = |pages| PageRun { ino: 7, pages };
        assert_eq!(left(&events), [run(0..1), run(2..4)]);
        assert_eq!(first_use(&events, 2), [run(0..4)]);
        assert_eq!(evicted(&events, 2), [run(1..3)]);
        assert_eq!(evicted(&events, 3), []);
    }

    proptest! {
        #[test]
        fn every_added_page_comes_once(
            events in proptest::collection::vec((0u64..40, any::<bool>(), 0u64..3, 0u32..30, 1u32..9), 0..60),
            cut in 0u64..40,
        ) {
            let kind = |added| if added { Kind::Added } else { Kind::Used };
            let events: Vec<Event> = events.iter().map(|&(t, a, ino, i, n)| event(t, kind(a), ino, i, n)).collect();
            let got: Vec<(u64, u32)> =
                first_use(&events, cut).iter().flat_map(|r| r.pages.clone().map(move |p| (r.ino, p))).collect();
            let model: BTreeSet<(u64, u32)> = events
                .iter()
                .filter(|e| e.ktime <= cut && e.kind == Kind::Added as u32)
                .flat_map(|e| (e.index..e.index + e.count).map(move |p| (e.ino, p)))
                .collect();
            prop_assert_eq!(got.len(), model.len());
            prop_assert_eq!(got.into_iter().collect::<BTreeSet<_>>(), model);
        }
    }
}
