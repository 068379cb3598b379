//! Where pages go: first use, dedup, sharing sets, page tables; no I/O.
//!
//! A page is a place in the zone only once, whichever services and files use it. New pages lie in the new segment by
//! *sharing set*, the services that use them, so that a service fetches few pages of others; inside a set by first use,
//! so that a prefix of the download is what the service touches first. A frame never mixes two sets: what a service
//! fetches after another one is exactly what that one did not bring.

use std::collections::HashMap;

use tdfs_common::digest::ContentHash;
use tdfs_common::runtime_image::{FRAME_PAGES, Run, Segment};

use super::trace::FileRun;

/// A page that the group does not have yet, and where to read it.
#[derive(Clone, Copy, Debug)]
pub struct NewPage {
    /// Inode of a file that holds it.
    pub ino: u32,
    /// Page in that file.
    pub page: u32,
    /// Bit n: service n uses it.
    sharing: u64,
}

#[derive(Clone, Copy)]
enum Place {
    Known(u32),
    New(usize),
}

/// Collects the pages of the services, in order of first use.
pub struct Layout<'a> {
    known: &'a HashMap<ContentHash, u32>,
    index: HashMap<ContentHash, usize>,
    new: Vec<NewPage>,
    services: Vec<Vec<(FileRun, Vec<Place>)>>,
}

/// The layout once every page is known.
pub struct Placed {
    /// New pages in zone order.
    pub pages: Vec<NewPage>,
    /// Pages of each frame of the new segment.
    pub frames: Vec<u32>,
    /// Page table of each service, without regard to segments.
    pub tables: Vec<Vec<Run>>,
}

impl<'a> Layout<'a> {
    /// A layout beside the pages `known` at their zone addresses.
    pub fn new(known: &'a HashMap<ContentHash, u32>) -> Self {
        Self { known, index: HashMap::new(), new: Vec::new(), services: Vec::new() }
    }

    /// Starts the next service; there may be 64.
    pub fn service(&mut self) {
        self.services.push(Vec::new());
    }

    /// The current service touches `run` next, whose pages have these hashes.
    pub fn touch(&mut self, run: FileRun, hashes: &[ContentHash]) {
        let Some(bit) = self.services.len().checked_sub(1) else { return };
        let place = |(page, hash): (u32, &ContentHash)| {
            if let Some(&zone_page) = self.known.get(hash) {
                return Place::Known(zone_page);
            }
            let new = *self.index.entry(*hash).or_insert_with(|| {
                self.new.push(NewPage { ino: run.ino, page, sharing: 0 });
                self.new.len() - 1
            });
            self.new[new].sharing |= 1 << bit;
            Place::New(new)
        };
        let places = (run.page..).zip(hashes).map(place).collect();
        self.services[bit].push((run, places));
    }

    /// Number of pages the new segment will have.
    pub fn new_pages(&self) -> usize {
        self.new.len()
    }

    /// Gives every new page its address from `base` on; `segments` are those that hold the known pages.
    pub fn place(self, base: u32, segments: &[Segment]) -> Placed {
        let mut order: Vec<usize> = (0..self.new.len()).collect();
        order.sort_by_key(|&n| gray_rank(self.new[n].sharing));
        let pages: Vec<NewPage> = order.iter().map(|&n| self.new[n]).collect();
        let sets = pages.chunk_by(|a, b| a.sharing == b.sharing);
        let frames = sets.flat_map(|set| set.chunks(FRAME_PAGES as usize)).map(|f| f.len() as u32).collect();

        let mut address = vec![0; order.len()];
        for (zone_page, &n) in (base..).zip(&order) {
            address[n] = zone_page;
        }
        let mut starts: Vec<u32> = segments.iter().map(|s| s.base as u32).collect();
        starts.push(base);
        starts.sort_unstable();
        let table = |touched: Vec<(FileRun, Vec<Place>)>| {
            let mut runs: Vec<Run> = Vec::new();
            for (touch, places) in touched {
                for (file_page, place) in (touch.page..).zip(places) {
                    let zone_page = match place {
                        Place::Known(zone_page) => zone_page,
                        Place::New(n) => address[n],
                    };
                    match runs.last_mut() {
                        Some(last)
                            if (last.ino, last.file_page + last.count) == (touch.ino, file_page)
                                && last.zone_page + last.count == zone_page
                                && starts.binary_search(&zone_page).is_err() =>
                        {
                            last.count += 1;
                        }
                        _ => runs.push(Run { ino: touch.ino, file_page, zone_page, count: 1 }),
                    }
                }
            }
            runs
        };
        let tables = self.services.into_iter().map(table).collect();
        Placed { pages, frames, tables }
    }
}

/// The place of `set` in the order of Gray's code, in which neighbours differ in one service: `{A} {A,B} {B}`, so that
/// the sets of one service lie together as far as a line allows.
fn gray_rank(set: u64) -> u64 {
    (0..6).fold(set, |rank, shift| rank ^ (rank >> (1 << shift)))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashSet};

    use proptest::prelude::*;
    use tdfs_common::digest::Digest;
    use tdfs_common::runtime_image::Frame;

    use super::*;

    fn hash(content: u32) -> ContentHash {
        ContentHash::of(&content.to_le_bytes())
    }

    #[test]
    fn gray_order_keeps_sets_of_a_service_together() {
        let mut sets: Vec<u64> = (1..8).collect();
        sets.sort_by_key(|&s| gray_rank(s));
        assert_eq!(sets, [0b001, 0b011, 0b010, 0b110, 0b111, 0b101, 0b100]);
        assert_eq!(gray_rank(1 << 63), u64::MAX);
    }

    #[test]
    fn runs_end_where_a_segment_ends() {
        let known: HashMap<ContentHash, u32> = (0..4).map(|n| (hash(n), n)).collect();
        let frame = Frame { len: 1, pages: 2, hash: hash(0) };
        let segment = |base| Segment { blob: Digest::of(b""), base, frames: vec![frame] };
        let mut layout = Layout::new(&known);
        layout.service();
        let hashes: Vec<ContentHash> = (0..6).map(hash).collect();
        layout.touch(FileRun { ino: 9, page: 3, count: 6 }, &hashes);
        let placed = layout.place(4, &[segment(0), segment(2)]);
        let run = |file_page, zone_page| Run { ino: 9, file_page, zone_page, count: 2 };
        assert_eq!(placed.tables, [[run(3, 0), run(5, 2), run(7, 4)]]);
        assert_eq!(placed.frames, [2]);
    }

    proptest! {
        /// Against the plain meaning: every file page finds its content, contents are unique, frames do not mix sets.
        #[test]
        fn every_page_finds_its_content(
            services in proptest::collection::vec(
                proptest::collection::vec((0u32..4, 0u32..40, 1u32..9, 0u32..60), 0..12), 1..5),
            known in proptest::collection::btree_set(0u32..70, 0..20),
        ) {
            let known: Vec<u32> = known.into_iter().collect();
            let known_at: HashMap<ContentHash, u32> = known.iter().zip(0..).map(|(&c, n)| (hash(c), n)).collect();
            let base = 100;
            let mut layout = Layout::new(&known_at);
            let mut wanted: Vec<Vec<(u32, u32, u32)>> = Vec::new();
            let mut contents: HashMap<(u32, u32), u32> = HashMap::new();
            for touches in services {
                layout.service();
                let mut mine = Vec::new();
                let mut seen = HashSet::new();
                for (ino, page, count, content) in touches {
                    for page in page..page + count {
                        if seen.insert((ino, page)) {
                            let content = *contents.entry((ino, page)).or_insert(content + page % 7);
                            layout.touch(FileRun { ino, page, count: 1 }, &[hash(content)]);
                            mine.push((ino, page, content));
                        }
                    }
                }
                wanted.push(mine);
            }
            let new = layout.new_pages();
            let placed = layout.place(base, &[]);
            prop_assert_eq!(placed.pages.len(), new);
            prop_assert_eq!(placed.frames.iter().sum::<u32>() as usize, new);
            let content_at = |zone_page: u32| if zone_page < base {
                known[zone_page as usize]
            } else {
                let page = placed.pages[(zone_page - base) as usize];
                contents[&(page.ino, page.page)]
            };
            let unique: BTreeSet<u32> = (base..base + new as u32).map(content_at).collect();
            prop_assert_eq!(unique.len(), new);
            prop_assert!(unique.iter().all(|c| !known.contains(c)));
            for (table, wanted) in placed.tables.iter().zip(&wanted) {
                let got: Vec<(u32, u32, u32)> = table.iter().flat_map(|r| {
                    (0..r.count).map(|n| (r.ino, r.file_page + n, content_at(r.zone_page + n)))
                }).collect();
                prop_assert_eq!(&got, wanted);
            }
            let users = |content: u32| -> Vec<bool> {
                wanted.iter().map(|w| w.iter().any(|(_, _, c)| *c == content)).collect()
            };
            let mut at = base;
            for &frame in &placed.frames {
                prop_assert!(frame > 0 && frame <= FRAME_PAGES);
                let sets: BTreeSet<Vec<bool>> = (at..at + frame).map(|z| users(content_at(z))).collect();
                prop_assert_eq!(sets.len(), 1);
                at += frame;
            }
        }
    }
}
