//! The check on the probe: recorded pages against what is in the page cache of the private mount.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use serde::Serialize;
use tdfs_common::bitmap::PageBitmap;
use tdfs_common::tree::{Body, Tree};

use super::order::PageRun;
use super::residency;
use crate::rootfs::RootFs;

/// How the recorded pages compare with the resident ones, all of them up to the moment the container was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Oracle {
    /// Share of recorded pages, without the evicted ones, that are resident.
    pub precision: f64,
    /// Share of resident pages that are recorded; less than 1 if the probe missed some.
    pub recall: f64,
    /// Recorded pages.
    pub recorded: u64,
    /// Recorded pages that the kernel evicted before the comparison, and said so.
    pub evicted: u64,
    /// Resident pages.
    pub resident: u64,
}

/// Resident pages of every regular file of the mount that has any, by the tree's inode number.
pub(super) fn resident(rootfs: &RootFs, tree: &Tree) -> io::Result<HashMap<u32, PageBitmap>> {
    let paths = tree.paths();
    let mut found = HashMap::new();
    for (ino, inode) in tree.inodes.iter().enumerate() {
        if !matches!(inode.body, Body::Regular { size: 1.., .. }) {
            continue;
        }
        let path = rootfs.path().join(super::os_path(&paths[ino]));
        let failed = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let pages = residency::resident(&File::open(&path).map_err(failed)?).map_err(failed)?;
        if pages.count() > 0 {
            found.insert(ino as u32, pages);
        }
    }
    Ok(found)
}

/// Takes out pages that the kernel evicted while they were looked for: they may have been found or not.
pub(super) fn forget(resident: &mut HashMap<u32, PageBitmap>, evicted: &[(u32, PageRun)]) {
    for (ino, run) in evicted {
        if let Some(bitmap) = resident.get_mut(ino) {
            bitmap.remove_range(run.pages.start.into()..run.pages.end.into());
        }
    }
}

/// Compares the pages that must be `left` of `recorded` ones, each no page twice, with what is resident.
pub(super) fn compare(
    recorded: &[(u32, PageRun)],
    left: &[(u32, PageRun)],
    resident: &HashMap<u32, PageBitmap>,
) -> Oracle {
    let recorded: u64 = recorded.iter().map(|(_, run)| run.pages.len() as u64).sum();
    let (mut pages, mut both) = (0, 0);
    for (ino, run) in left {
        pages += run.pages.len() as u64;
        if let Some(bitmap) = resident.get(ino) {
            both += run.pages.clone().filter(|p| bitmap.contains(u64::from(*p))).count() as u64;
        }
    }
    let found: u64 = resident.values().map(PageBitmap::count).sum();
    let share = |of: u64| if of == 0 { 1.0 } else { both as f64 / of as f64 };
    Oracle {
        precision: share(pages),
        recall: share(found),
        recorded,
        evicted: recorded - pages,
        resident: found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_surplus_pages_lower_the_shares() {
        let run = |ino, pages| (ino, PageRun { ino: u64::from(ino), pages });
        let mut pages = PageBitmap::new(10);
        pages.insert_range(0..4);
        let resident = HashMap::from([(1, pages)]);
        let recorded = [run(1, 0..2), run(2, 0..1)];
        let oracle = compare(&[run(1, 0..2), run(2, 0..3)], &recorded, &resident);
        assert_eq!((oracle.recorded, oracle.evicted, oracle.resident), (5, 2, 4));
        assert!((oracle.precision - 2.0 / 3.0).abs() < 1e-9 && (oracle.recall - 0.5).abs() < 1e-9);
        assert!((compare(&[run(1, 0..4)], &[run(1, 0..4)], &resident).recall - 1.0).abs() < 1e-9);
        assert!((compare(&[], &[], &HashMap::new()).recall - 1.0).abs() < 1e-9);
    }

    #[test]
    fn pages_evicted_meanwhile_count_for_nothing() {
        let run = |ino, pages| (ino, PageRun { ino: u64::from(ino), pages });
        let mut pages = PageBitmap::new(4);
        pages.insert_range(0..3);
        let mut resident = HashMap::from([(1, pages)]);
        forget(&mut resident, &[run(1, 2..4), run(2, 0..1)]);
        let oracle = compare(&[run(1, 0..3), run(2, 0..1)], &[run(1, 0..2)], &resident);
        assert_eq!((oracle.precision, oracle.recall), (1.0, 1.0));
        assert_eq!((oracle.recorded, oracle.evicted, oracle.resident), (4, 2, 2));
    }
}
