//! Any bytes as a tar: refused with an error, or entries whose files lie inside the archive with the content that
//! their hash says, and which merge (alone, and on top of themselves) into a valid tree or are refused.
//!
//! Input that does not start with a header's checksum in order would never get past it, so checksums are put right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tdfs_agent::oci::layer::{EntryKind, index_layer, merge};
use tdfs_common::digest::ContentHash;
use tdfs_common::envelope::Format as _;
use tdfs_common::layer_index::Compression;
use tdfs_common::tree::Body;

fuzz_target!(|data: &[u8]| {
    let mut tar = data.to_vec();
    for block in tar.as_chunks_mut::<512>().0 {
        if block[257..262] == *b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    let mut out = Vec::new();
    let Ok(indexed) = index_layer(&tar[..], Compression::None, &mut out, &mut std::io::sink()) else { return };
    assert!(out == tar);
    for entry in &indexed.entries {
        let EntryKind::Inode(inode) = &entry.kind else { continue };
        if let Body::Regular { size, content, extents } = &inode.body
            && *size < 1 << 20
        {
            let mut file = vec![0; *size as usize];
            for e in extents {
                let from = &tar[e.layer_offset as usize..][..e.len as usize];
                file[e.file_offset as usize..][..e.len as usize].copy_from_slice(from);
            }
            assert_eq!(ContentHash::of(&file), *content);
        }
    }
    for layers in [vec![indexed.clone()], vec![indexed.clone(), indexed]] {
        if let Ok(tree) = merge(&layers) {
            tree.validate().expect("merge promises a valid tree");
        }
    }
});
