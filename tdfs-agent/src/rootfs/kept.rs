//! Kept metadata: written after a mount, for the next mount of the same image and runtime image.
//!
//! ```text
//! 0            EROFS metadata, whole blocks: every hot page on the zone, all else on the cold device
//! image_len    the kernel's inode number of each inode of the tree, u64 LE
//! ...          the hot files: inode u32 LE | length u16 LE | path
//! end - 64     footer: magic "TDFSKEPT" | image_len u64 | inodes u64 | files u32 | cold_blocks u32 | hash, 32 bytes
//! ```
//!
//! The hash is BLAKE3 over everything before it, keyed by what the metadata belongs to: a file that is damaged, cut short by
//! a crash or put in another's place is no file at all, and costs the time to write it again. The kernel mounts the file
//! itself, so that mounts share its page cache; it must not change afterwards, and never does: it is written under
//! another name and renamed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use tdfs_common::runtime_image::Run;
use tdfs_common::tree::Tree;
use tempfile::NamedTempFile;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::erofs::{self, format::BLOCK};
use super::inject::hot_paths;

const MAGIC: [u8; 8] = *b"TDFSKEPT";
/// Bytes of the largest file; metadata of larger images is written anew each time.
const FILE_MAX: u64 = 256 << 20;
const HASH_LEN: usize = 32;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Footer {
    magic: [u8; 8],
    image_len: U64,
    inodes: U64,
    files: U32,
    cold_blocks: U32,
    hash: [u8; HASH_LEN],
}

/// Kept metadata that was verified.
pub struct Kept {
    pub(super) file: File,
    pub(super) nids: Arc<[u64]>,
    pub(super) paths: Arc<HashMap<u32, Vec<u8>>>,
    pub(super) cold_blocks: u32,
}

impl Kept {
    /// Reads what is kept at `path` for `key`; `None` where there is nothing or something else.
    pub fn open(path: &Path, key: &[u8; 32]) -> Option<Self> {
        let opened = read(path, key);
        if let Err(error) = &opened
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "kept metadata is not used");
        }
        opened.ok()
    }
}

fn read(path: &Path, key: &[u8; 32]) -> io::Result<Kept> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    if len > FILE_MAX {
        return Err(damaged("too large"));
    }
    let mut footer = Footer::new_zeroed();
    let footer_at = len.checked_sub(size_of::<Footer>() as u64).ok_or_else(|| damaged("too short"))?;
    file.read_exact_at(footer.as_mut_bytes(), footer_at)?;
    // Nothing of it is believed yet but where the part begins that is needed here.
    let image_len = footer.image_len.get();
    if footer.magic != MAGIC || image_len > footer_at {
        return Err(damaged("damaged, or of something else"));
    }
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update_reader((&mut file).take(image_len))?;
    let mut bytes = Vec::with_capacity((len - image_len) as usize);
    (&mut file).take(len - image_len).read_to_end(&mut bytes)?;
    let hashed = bytes.len().checked_sub(HASH_LEN).ok_or_else(|| damaged("too short"))?;
    if *hasher.update(&bytes[..hashed]).finalize().as_bytes() != footer.hash {
        return Err(damaged("damaged, or of something else"));
    }
    let inconsistent = || damaged("inconsistent");
    // What was hashed ends with the footer.
    let rest = bytes.strip_suffix(footer.as_bytes()).ok_or_else(inconsistent)?;
    let inodes = usize::try_from(footer.inodes.get()).map_err(|_| inconsistent())?;
    let (nids, mut rest) = <[U64]>::ref_from_prefix_with_elems(rest, inodes).map_err(|_| inconsistent())?;
    let mut paths = HashMap::new();
    for _ in 0..footer.files.get() {
        let (ino, at) = rest.split_first_chunk().ok_or_else(inconsistent)?;
        let (len, at) = at.split_first_chunk().ok_or_else(inconsistent)?;
        let (path, after) = at.split_at_checked(u16::from_le_bytes(*len).into()).ok_or_else(inconsistent)?;
        paths.insert(u32::from_le_bytes(*ino), path.to_vec());
        rest = after;
    }
    if !image_len.is_multiple_of(BLOCK as u64) || !rest.is_empty() {
        return Err(inconsistent());
    }
    let nids = nids.iter().map(|nid| nid.get()).collect();
    Ok(Kept { file, nids, paths: Arc::new(paths), cold_blocks: footer.cold_blocks.get() })
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// What metadata is made of that is worth keeping: it has every hot page on the zone, also where some of them were
/// still under way for the mount that this comes from.
pub struct Keepable {
    pub(super) tree: Arc<Tree>,
    pub(super) runs: Arc<[Run]>,
    pub(super) zone_pages: u64,
}

impl Keepable {
    /// Writes it, and keeps it at `path` for `key`. Blocks on the disk, and leaves nothing where it fails.
    pub fn keep(&self, path: &Path, key: &[u8; 32]) -> io::Result<()> {
        let metadata = erofs::write(&self.tree, &self.runs, self.zone_pages).map_err(io::Error::other)?;
        let image_len = metadata.image.len() as u64;
        if image_len > FILE_MAX / 2 {
            return Ok(());
        }
        let mut bytes = metadata.image;
        bytes.extend(metadata.nids.iter().flat_map(|nid| nid.to_le_bytes()));
        let mut paths: Vec<_> = hot_paths(&self.tree, &self.runs).into_iter().collect();
        paths.sort_unstable();
        for (ino, path) in &paths {
            let len = u16::try_from(path.len()).map_err(io::Error::other)?;
            bytes.extend_from_slice(&ino.to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(path);
        }
        let footer = Footer {
            magic: MAGIC,
            image_len: image_len.into(),
            inodes: (metadata.nids.len() as u64).into(),
            files: u32::try_from(paths.len()).map_err(io::Error::other)?.into(),
            cold_blocks: metadata.cold.blocks().into(),
            hash: [0; HASH_LEN],
        };
        bytes.extend_from_slice(footer.as_bytes());
        let hashed = bytes.len() - HASH_LEN;
        let hash = blake3::keyed_hash(key, &bytes[..hashed]);
        bytes[hashed..].copy_from_slice(hash.as_bytes());
        let dir = path.parent().unwrap_or(path);
        fs::create_dir_all(dir)?;
        let mut file = NamedTempFile::new_in(dir)?;
        file.write_all(&bytes)?;
        file.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tdfs_common::digest::ContentHash;
    use tdfs_common::tree::{Body, DirEntry, Inode};

    use super::*;

    fn tree() -> Tree {
        let inode =
            |body| Inode { mode: 0o644, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: vec![], body };
        let entries = vec![DirEntry { name: b"\xffile".to_vec(), ino: 1 }];
        let file = Body::Regular { size: 5000, content: ContentHash::of(b""), extents: vec![] };
        Tree { inodes: vec![inode(Body::Directory(entries)), inode(file)], layer_sizes: vec![] }
    }

    #[test]
    fn what_is_kept_is_found_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kept/x");
        let runs = [Run { ino: 1, file_page: 0, zone_page: 3, count: 2 }];
        let tree = Arc::new(tree());
        let keepable = Keepable { tree: Arc::clone(&tree), runs: runs.into(), zone_pages: 5 };
        let written = erofs::write(&tree, &runs, 5).unwrap();
        let key = [9; 32];
        assert!(Kept::open(&path, &key).is_none());
        keepable.keep(&path, &key).unwrap();
        let kept = Kept::open(&path, &key).unwrap();
        assert_eq!((&*kept.nids, kept.cold_blocks), (&*written.nids, 2));
        assert_eq!(*kept.paths, HashMap::from([(1, b"\xffile".to_vec())]));
        let mut image = vec![0; written.image.len()];
        kept.file.read_exact_at(&mut image, 0).unwrap();
        assert_eq!(image, written.image);

        assert!(Kept::open(&path, &[8; 32]).is_none(), "of another runtime image");
        let good = fs::read(&path).unwrap();
        for at in (0..good.len()).step_by(61).chain(good.len() - 80..good.len()) {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert!(Kept::open(&path, &key).is_none(), "byte {at} flipped");
        }
        for len in [0, 1, 63, 64, good.len() - 1] {
            fs::write(&path, &good[..len]).unwrap();
            assert!(Kept::open(&path, &key).is_none(), "cut at {len}");
        }
        fs::write(&path, &good).unwrap();
        assert!(Kept::open(&path, &key).is_some());
    }

    #[test]
    fn a_hash_does_not_make_nonsense_right() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let key = [1; 32];
        for (image_len, inodes, files) in
            [(u64::MAX, 0, 0), (BLOCK as u64, u64::MAX, 0), (BLOCK as u64, 0, 9), (1, 0, 0), (0, 0, 0)]
        {
            let mut bytes = vec![0; BLOCK];
            let footer = Footer {
                magic: MAGIC,
                image_len: image_len.into(),
                inodes: inodes.into(),
                files: u32::into(files),
                cold_blocks: 0.into(),
                hash: [0; HASH_LEN],
            };
            bytes.extend_from_slice(footer.as_bytes());
            let hashed = bytes.len() - HASH_LEN;
            let hash = *blake3::keyed_hash(&key, &bytes[..hashed]).as_bytes();
            bytes[hashed..].copy_from_slice(&hash);
            fs::write(&path, &bytes).unwrap();
            assert!(Kept::open(&path, &key).is_none(), "{image_len} {inodes} {files}");
        }
    }
}
