//! Any valid tree with any hot runs: refused with an error, or metadata of whole blocks in which every inode has a place
//! of its own, and a cold device in which every block belongs to its file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tdfs_agent::rootfs::erofs::{self, format::BLOCK};
use tdfs_common::envelope::Format as _;
use tdfs_common::page;
use tdfs_common::runtime_image::Run;
use tdfs_common::tree::Tree;

fuzz_target!(|data: &[u8]| {
    let config = bincode::config::standard().with_limit::<{ 1 << 20 }>();
    let Ok((tree, used)) = bincode::decode_from_slice::<Tree, _>(data, config) else { return };
    if tree.validate().is_err() {
        return;
    }
    let runs: Vec<Run> = data[used..]
        .chunks_exact(16)
        .map(|c| {
            let [ino, file_page, zone_page, count] =
                [0, 4, 8, 12].map(|at| u32::from_le_bytes([c[at], c[at + 1], c[at + 2], c[at + 3]]));
            // Small numbers hit the tree's few inodes and pages.
            Run { ino: ino % 64, file_page: file_page % 4096, zone_page, count: count % 4096 }
        })
        .collect();
    // Tables of huge files are sound and slow.
    if runs.iter().any(|r| tree.inodes.get(r.ino as usize).is_some_and(|i| i.file_size() > 1 << 30)) {
        return;
    }
    let Ok(metadata) = erofs::write(&tree, &runs, u64::from(u32::MAX)) else { return };
    assert!(metadata.image.len() % BLOCK == 0);
    assert_eq!(metadata.nids.len(), tree.inodes.len());
    assert!(metadata.nids.is_sorted_by(|a, b| a < b));
    assert!(metadata.nids.last().is_some_and(|nid| nid * 32 + 64 <= metadata.image.len() as u64));
    for (ino, inode) in (0u32..).zip(&tree.inodes) {
        let pages = page::count(inode.file_size());
        let Some(start) = metadata.cold.start_of(ino) else {
            assert_eq!(pages, 0);
            continue;
        };
        let last = (pages - 1) as u32;
        assert_eq!(metadata.cold.locate(start), Some((ino, 0)));
        assert_eq!(metadata.cold.locate(start + last), Some((ino, last)));
    }
});
