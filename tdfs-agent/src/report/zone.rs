//! The data zone of a group as a map: its pages in order, some to a cell.

use std::collections::BTreeMap;

use serde::Serialize;
use tdfs_common::digest::Digest;
use tdfs_common::runtime_image::{Segment, Service};

use super::recording::SERVICES_SHOWN;

/// Cells of a map.
const CELLS_MAX: u64 = 1536;

/// The zone of one group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ZoneMap {
    /// Group name.
    pub group: String,
    /// Pages of the address space.
    pub pages: u64,
    /// Zone pages of each cell; the last one may have less.
    pub cell_pages: u64,
    /// The segments, in order.
    pub segments: Vec<ZoneSegment>,
    /// For each cell, how many pages all services of the group need in it, each service counted.
    pub uses: Vec<u64>,
    /// Services, as many as the report tells apart.
    pub services: Vec<ZoneUse>,
}

/// A segment of the zone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ZoneSegment {
    /// Its blob.
    pub digest: Digest,
    /// First zone page.
    pub base: u64,
    /// Its pages.
    pub pages: u64,
    /// Its frames.
    pub frames: usize,
    /// Compressed.
    pub bytes: u64,
    /// How many services name it.
    pub services: usize,
}

/// What a service needs of the zone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ZoneUse {
    /// Service name.
    pub service: String,
    /// For each cell, how many of its pages the service needs.
    pub needed: Vec<u64>,
    /// For each cell, how many file pages of the service were used before the first one in it; `None` where it needs
    /// none.
    pub first: Vec<Option<u64>>,
}

/// The zones of the groups of `services`, by name.
pub fn maps(services: &[Service]) -> Vec<ZoneMap> {
    let mut groups: BTreeMap<&str, Vec<&Service>> = BTreeMap::new();
    for service in services {
        groups.entry(&service.group).or_default().push(service);
    }
    groups.into_iter().map(|(group, services)| map(group, &services)).collect()
}

fn map(group: &str, services: &[&Service]) -> ZoneMap {
    let pages = services.iter().map(|s| s.zone_pages()).max().unwrap_or_default();
    let cell_pages = pages.div_ceil(CELLS_MAX).max(1);
    let cells = pages.div_ceil(cell_pages) as usize;
    let mut segments: BTreeMap<u64, (&Segment, usize)> = BTreeMap::new();
    for segment in services.iter().flat_map(|s| &s.segments) {
        segments.entry(segment.base).or_insert((segment, 0)).1 += 1;
    }
    let segments = segments.into_values().map(|(segment, services)| ZoneSegment {
        digest: segment.blob,
        base: segment.base,
        pages: segment.pages(),
        frames: segment.frames.len(),
        bytes: segment.size(),
        services,
    });
    let mut uses = vec![0; cells];
    let mut told_apart = Vec::new();
    for service in services {
        let needed = needed(service, cell_pages, cells);
        for (all, needed) in uses.iter_mut().zip(&needed) {
            *all += needed;
        }
        if told_apart.len() < SERVICES_SHOWN {
            let first = first_uses(service, cell_pages, cells);
            told_apart.push(ZoneUse { service: service.service.clone(), needed, first });
        }
    }
    ZoneMap {
        group: group.to_owned(),
        pages,
        cell_pages,
        segments: segments.collect(),
        uses,
        services: told_apart,
    }
}

/// Pages that `service` needs of each cell.
fn needed(service: &Service, cell_pages: u64, cells: usize) -> Vec<u64> {
    let mut needed = vec![0; cells];
    for run in service.needed().runs() {
        for cell in run.start / cell_pages..=(run.end - 1) / cell_pages {
            let begin = run.start.max(cell * cell_pages);
            needed[cell as usize] += run.end.min((cell + 1) * cell_pages) - begin;
        }
    }
    needed
}

/// For each cell, how many file pages were used before its first one.
fn first_uses(service: &Service, cell_pages: u64, cells: usize) -> Vec<Option<u64>> {
    let mut first = vec![None; cells];
    let mut before = 0;
    for run in &service.runs {
        let (start, count) = (u64::from(run.zone_page), u64::from(run.count));
        for cell in start / cell_pages..=(start + count - 1) / cell_pages {
            first[cell as usize].get_or_insert(before + (cell * cell_pages).saturating_sub(start));
        }
        before += count;
    }
    first
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::report::recording::tests::service;

    proptest! {
        #[test]
        fn equals_a_count_page_by_page(
            runs in prop::collection::vec((0u32..9900, 1u32..80), 1..60), frames in 156u32..200,
        ) {
            let service = service("web", &runs, frames);
            let maps = maps(std::slice::from_ref(&service));
            let [map] = &maps[..] else { panic!("one group") };
            prop_assert_eq!(map.pages, u64::from(frames) * 64);
            prop_assert!(map.uses.len() as u64 <= CELLS_MAX);
            let pages: BTreeSet<u32> = runs.iter().flat_map(|&(start, count)| start..start + count).collect();
            let mut needed = vec![0; map.uses.len()];
            for page in pages {
                needed[(u64::from(page) / map.cell_pages) as usize] += 1;
            }
            let mut first = vec![None; map.uses.len()];
            for (at, page) in runs.iter().flat_map(|&(start, count)| start..start + count).enumerate() {
                first[(u64::from(page) / map.cell_pages) as usize].get_or_insert(at as u64);
            }
            prop_assert_eq!(&map.services[0].needed, &needed);
            prop_assert_eq!(&map.services[0].first, &first);
            prop_assert_eq!(&map.uses, &map.services[0].needed);
            prop_assert_eq!(map.uses.iter().sum::<u64>(), service.needed().count());
        }
    }
}
