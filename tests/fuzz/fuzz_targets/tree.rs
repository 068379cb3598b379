//! Any bytes as a tree: refused with an error, or one whose every inode has a path that leads back to it, whose links
//! resolve or end, and which encodes to itself.
//!
//! The input is taken as an envelope and as the payload of a sound one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tdfs_common::envelope::{Format as _, decode, encode};
use tdfs_common::tree::{Body, Tree};

fuzz_target!(|data: &[u8]| {
    let _ = decode::<Tree>(data);
    let config = bincode::config::standard().with_limit::<{ 1 << 20 }>();
    let Ok((tree, _)) = bincode::decode_from_slice::<Tree, _>(data, config) else { return };
    if tree.validate().is_err() {
        return;
    }
    let encoded = encode(&tree).expect("a valid tree");
    assert_eq!(decode::<Tree>(&encoded).expect("what was encoded"), tree);
    let links = tree.link_counts();
    for (ino, path) in tree.paths().iter().enumerate() {
        assert_eq!(tree.lookup(path), Some(ino as u32));
        assert!(links[ino] > 0);
        if let Body::Symlink(target) = &tree.inodes[ino].body {
            let _ = tree.resolve(target);
        }
        let _ = tree.resolve(path);
    }
});
