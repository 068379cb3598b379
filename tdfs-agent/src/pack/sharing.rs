//! What the services of a group have in common: every zone page lies in the zone once, however many use it.

use std::collections::BTreeMap;

use serde::Serialize;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::Service;

/// Pages of some services of one group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sharing {
    /// Group name.
    pub group: String,
    /// File pages that the services need, each counted for every service and every file.
    pub file_pages: u64,
    /// Zone pages that hold them.
    pub unique_pages: u64,
    /// Of these, pages that more than one service needs.
    pub shared_pages: u64,
    /// Uncompressed bytes that are neither stored nor fetched a second time.
    pub saved_bytes: u64,
    /// Zone pages by who needs them, the largest number first.
    pub sets: Vec<SharingSet>,
}

/// Services that need the same zone pages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct SharingSet {
    /// Zone pages that just these services need.
    pub pages: u64,
    /// Their names, in order.
    pub services: Vec<String>,
}

/// The sharing within each group, by its name.
pub fn sharing<'a>(services: impl IntoIterator<Item = &'a Service>) -> Vec<Sharing> {
    let mut groups: BTreeMap<&str, Vec<&Service>> = BTreeMap::new();
    for service in services {
        groups.entry(&service.group).or_default().push(service);
    }
    groups.into_iter().map(|(group, services)| of_group(group, &services)).collect()
}

fn of_group(group: &str, services: &[&Service]) -> Sharing {
    // Where runs of needed pages begin and end: between two such places the set of services is the same.
    let mut edges: Vec<(u64, usize, bool)> = Vec::new();
    for (n, service) in services.iter().enumerate() {
        for run in service.needed().runs() {
            edges.extend([(run.start, n, true), (run.end, n, false)]);
        }
    }
    edges.sort_unstable();
    let mut sets: BTreeMap<Vec<bool>, u64> = BTreeMap::new();
    let mut using = vec![false; services.len()];
    let mut at = 0;
    for (page, n, begins) in edges {
        if page > at && using.contains(&true) {
            *sets.entry(using.clone()).or_default() += page - at;
        }
        at = page;
        using[n] = begins;
    }
    let file_pages = services.iter().map(|s| s.file_pages()).sum();
    let unique_pages: u64 = sets.values().sum();
    let several = |set: &[bool]| set.iter().filter(|uses| **uses).count() > 1;
    let shared_pages = sets.iter().filter(|(set, _)| several(set)).map(|(_, pages)| pages).sum();
    let named = |set: &[bool]| {
        let mut names: Vec<_> =
            services.iter().zip(set).filter(|(_, uses)| **uses).map(|(s, _)| s.service.clone()).collect();
        names.sort_unstable();
        names
    };
    let mut sets: Vec<SharingSet> =
        sets.iter().map(|(set, &pages)| SharingSet { pages, services: named(set) }).collect();
    sets.sort_unstable_by(|a, b| b.cmp(a));
    let saved_bytes = (file_pages - unique_pages) * PAGE_SIZE as u64;
    Sharing { group: group.to_owned(), file_pages, unique_pages, shared_pages, saved_bytes, sets }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use tdfs_common::digest::{ContentHash, Digest};
    use tdfs_common::runtime_image::{Frame, Run, Segment};

    use super::*;

    fn service(group: &str, name: &str, runs: &[(u32, u32)]) -> Service {
        let frame = Frame { len: 1, pages: 64, hash: ContentHash::of(b"") };
        let run = |(ino, &(zone_page, count)): (usize, &(u32, u32))| Run {
            ino: ino as u32,
            file_page: 0,
            zone_page,
            count,
        };
        Service {
            group: group.into(),
            service: name.into(),
            image: Digest::of(b""),
            args: None,
            ready: "exit".into(),
            segments: vec![Segment { blob: Digest::of(b""), base: 0, frames: vec![frame; 4] }],
            runs: runs.iter().enumerate().map(run).collect(),
        }
    }

    #[test]
    fn pages_of_several_services_count_once() {
        let services = [
            service("g", "b", &[(0, 100)]),
            service("g", "a", &[(50, 100), (50, 10)]),
            service("other", "c", &[(0, 7)]),
        ];
        let found = sharing(&services);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].file_pages, found[0].unique_pages, found[0].shared_pages), (210, 150, 50));
        assert_eq!(found[0].saved_bytes, 60 * 4096);
        let set = |pages, names: &[&str]| SharingSet {
            pages,
            services: names.iter().map(|n| (*n).into()).collect(),
        };
        assert_eq!(found[0].sets, [set(50, &["b"]), set(50, &["a", "b"]), set(50, &["a"])]);
        assert_eq!(found[1].sets, [set(7, &["c"])]);
        assert_eq!(sharing(&[]), []);
    }

    proptest! {
        #[test]
        fn equals_a_count_page_by_page(
            all in prop::collection::vec(prop::collection::vec((0u32..200, 1u32..50), 0..5), 0..5),
        ) {
            let services: Vec<_> =
                all.iter().enumerate().map(|(n, runs)| service("g", &n.to_string(), runs)).collect();
            let mut users: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
            for (n, runs) in all.iter().enumerate() {
                for page in runs.iter().flat_map(|&(start, count)| start..start + count) {
                    users.entry(page).or_default().insert(n.to_string());
                }
            }
            let mut sets: BTreeMap<Vec<String>, u64> = BTreeMap::new();
            for names in users.values() {
                *sets.entry(names.iter().cloned().collect()).or_default() += 1;
            }
            let found = sharing(&services);
            prop_assert_eq!(found.is_empty(), all.is_empty());
            for sharing in found {
                prop_assert_eq!(sharing.unique_pages, users.len() as u64);
                let shared = users.values().filter(|names| names.len() > 1).count() as u64;
                prop_assert_eq!(sharing.shared_pages, shared);
                let got: BTreeMap<_, _> = sharing.sets.into_iter().map(|s| (s.services, s.pages)).collect();
                prop_assert_eq!(got, sets.clone());
            }
        }
    }
}
