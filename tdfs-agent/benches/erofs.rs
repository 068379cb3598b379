//! EROFS metadata of an image with 100,000 files, all cold and with 30,000 hot pages.

use criterion::{Criterion, criterion_group, criterion_main};
use tdfs_agent::rootfs::erofs;
use tdfs_common::digest::ContentHash;
use tdfs_common::runtime_image::Run;
use tdfs_common::tree::{Body, DirEntry, Extent, Inode, Tree, Xattr};

const DIRECTORIES: u32 = 5_000;
const FILES: u32 = 100_000;

fn inode(body: Body) -> Inode {
    Inode { mode: 0o755, uid: 0, gid: 0, mtime: 1_700_000_000, mtime_nsec: 0, xattrs: vec![], body }
}

/// Directories in the root, files evenly in them: 80 KiB each, every hundredth with an attribute.
fn tree() -> Tree {
    let names = |inos: std::ops::Range<u32>| {
        inos.map(|ino| DirEntry { name: format!("a-usual-name-{ino:07}.py").into_bytes(), ino }).collect()
    };
    let first_file = 1 + DIRECTORIES;
    let mut inodes = vec![inode(Body::Directory(names(1..first_file)))];
    for n in 0..DIRECTORIES {
        let from = first_file + n * (FILES / DIRECTORIES);
        inodes.push(inode(Body::Directory(names(from..from + FILES / DIRECTORIES))));
    }
    for n in 0..FILES {
        let size = 80 << 10;
        let extent = Extent { file_offset: 0, len: size, layer: 0, layer_offset: u64::from(n) * size };
        let mut file = inode(Body::Regular { size, content: ContentHash::of(b""), extents: vec![extent] });
        if n % 100 == 0 {
            file.xattrs.push(Xattr { name: b"security.capability".to_vec(), value: vec![1; 20] });
        }
        inodes.push(file);
    }
    Tree { inodes, layer_sizes: vec![u64::from(FILES) * (80 << 10)] }
}

fn write(c: &mut Criterion) {
    let tree = tree();
    let first_file = 1 + DIRECTORIES;
    let hot: Vec<Run> = (0..10_000)
        .map(|n| Run { ino: first_file + n * 7 % FILES, file_page: n % 10, zone_page: n * 3, count: 3 })
        .collect();
    c.bench_function("erofs, 100,000 files, cold", |b| b.iter(|| erofs::write(&tree, &[], 0)));
    c.bench_function("erofs, 100,000 files, 30,000 hot pages", |b| {
        b.iter(|| erofs::write(&tree, &hot, 30_000));
    });
}

criterion_group!(benches, write);
criterion_main!(benches);
