//! What a file tree looks like to a program: compared between a mount of ours and the same image unpacked by another
//! tool.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Debug, Write as _};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};
use walkdir::WalkDir;

/// Differences worth showing when two trees are not equal.
const SHOWN: usize = 30;

/// Everything below the root of a tree, by path relative to it. The root itself is left out: most images say nothing
/// about it and every tool chooses for itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Fingerprint {
    entries: BTreeMap<PathBuf, Entry>,
}

/// One inode as one of its names shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names of the inode; 0 for directories, whose count each file system defines in its own way.
    pub nlink: u64,
    /// Its first name in path order: equal for all names of one inode.
    pub first_name: PathBuf,
    /// Time of last change, in seconds and nanoseconds since 1970.
    pub mtime: (i64, i64),
    /// Device number; 0 unless it is a device.
    pub rdev: u64,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Where a symbolic link points.
    pub target: Option<PathBuf>,
    /// Bytes of a regular file or symbolic link, else 0.
    pub size: u64,
    /// SHA-256 of a regular file.
    pub sha256: Option<String>,
}

impl Fingerprint {
    /// Walks `root` without leaving its file system and reads every file.
    pub fn of(root: &Path) -> Result<Self> {
        let mut entries = BTreeMap::new();
        let mut names = HashMap::new();
        for found in WalkDir::new(root).min_depth(1).same_file_system(true).sort_by_file_name() {
            let found = found?;
            let path = found.path();
            let name = path.strip_prefix(root)?.to_owned();
            let metadata = found.metadata()?;
            let first_name = names.entry(metadata.ino()).or_insert_with(|| name.clone()).clone();
            let kind = metadata.file_type();
            let entry = Entry {
                mode: metadata.mode(),
                uid: metadata.uid(),
                gid: metadata.gid(),
                nlink: if kind.is_dir() { 0 } else { metadata.nlink() },
                first_name,
                mtime: (metadata.mtime(), metadata.mtime_nsec()),
                rdev: metadata.rdev(),
                xattrs: xattrs(path).with_context(|| format!("attributes of {}", path.display()))?,
                target: if kind.is_symlink() { Some(fs::read_link(path)?) } else { None },
                size: if kind.is_file() || kind.is_symlink() { metadata.len() } else { 0 },
                sha256: if kind.is_file() { Some(sha256(path)?) } else { None },
            };
            entries.insert(name, entry);
        }
        Ok(Self { entries })
    }

    /// Entries by path relative to the root.
    #[must_use]
    pub fn entries(&self) -> &BTreeMap<PathBuf, Entry> {
        &self.entries
    }

    /// One line for every attribute in which the trees differ.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (path, ours) in &self.entries {
            match other.entries.get(path) {
                Some(theirs) => ours.compare(theirs, path, &mut lines),
                None => lines.push(format!("{}: only on the left", path.display())),
            }
        }
        for path in other.entries.keys().filter(|path| !self.entries.contains_key(*path)) {
            lines.push(format!("{}: only on the right", path.display()));
        }
        lines
    }

    /// Fails with a readable list unless both trees are equal and not empty.
    pub fn expect_equal(&self, other: &Self) -> Result<()> {
        let lines = self.differences(other);
        if lines.is_empty() && !self.entries.is_empty() {
            return Ok(());
        }
        let mut message = format!("{} differences in {} entries", lines.len(), self.entries.len());
        for line in lines.iter().take(SHOWN) {
            let _ = write!(message, "\n    {line}");
        }
        bail!(message)
    }
}

impl FromIterator<(PathBuf, Entry)> for Fingerprint {
    fn from_iter<I: IntoIterator<Item = (PathBuf, Entry)>>(entries: I) -> Self {
        Self { entries: entries.into_iter().collect() }
    }
}

impl Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint of {} entries", self.entries.len())
    }
}

impl Entry {
    fn compare(&self, other: &Self, path: &Path, lines: &mut Vec<String>) {
        let mut line = |what: &str, ours: String, theirs: String| {
            if ours != theirs {
                lines.push(format!("{}: {what} {ours}, on the right {theirs}", path.display()));
            }
        };
        line("mode", format!("{:o}", self.mode), format!("{:o}", other.mode));
        line("uid", self.uid.to_string(), other.uid.to_string());
        line("gid", self.gid.to_string(), other.gid.to_string());
        line("nlink", self.nlink.to_string(), other.nlink.to_string());
        line("first name", self.first_name.display().to_string(), other.first_name.display().to_string());
        line("mtime", format!("{:?}", self.mtime), format!("{:?}", other.mtime));
        line("rdev", format!("{:#x}", self.rdev), format!("{:#x}", other.rdev));
        line("xattrs", format!("{:?}", self.xattrs), format!("{:?}", other.xattrs));
        line("target", format!("{:?}", self.target), format!("{:?}", other.target));
        line("size", self.size.to_string(), other.size.to_string());
        line("sha256", format!("{:?}", self.sha256), format!("{:?}", other.sha256));
    }
}

fn xattrs(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut all = BTreeMap::new();
    for name in xattr::list(path)? {
        let value = xattr::get(path, &name)?.unwrap_or_default();
        all.insert(name.to_string_lossy().into_owned(), value);
    }
    Ok(all)
}

fn sha256(path: &Path) -> Result<String> {
    let failed = || format!("read {}", path.display());
    let mut file = File::open(path).with_context(failed)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = file.read(&mut buffer).with_context(failed)?;
        if n == 0 {
            return Ok(hex::encode(hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn tree() -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        let at = |name: &str| tree.path().join(name);
        fs::create_dir(at("d")).unwrap();
        fs::write(at("d/a"), b"one").unwrap();
        fs::hard_link(at("d/a"), at("d/b")).unwrap();
        symlink("a", at("d/s")).unwrap();
        for name in ["d/a", "d"] {
            File::open(at(name)).unwrap().set_modified(UNIX_EPOCH + Duration::new(5, 7)).unwrap();
        }
        tree
    }

    /// The lines about `change` to a tree; symbolic links of two trees differ in their time, which is not settable here.
    fn lines(change: impl FnOnce(&Path)) -> Vec<String> {
        let (left, right) = (tree(), tree());
        change(right.path());
        let right = Fingerprint::of(right.path()).unwrap();
        let mut lines = Fingerprint::of(left.path()).unwrap().differences(&right);
        lines.retain(|line| !line.starts_with("d/s: mtime") && !line.starts_with("d: mtime"));
        lines
    }

    #[test]
    fn equal_trees_have_no_differences() {
        assert_eq!(lines(|_| ()), Vec::<String>::new());
        let tree = tree();
        let fingerprint = Fingerprint::of(tree.path()).unwrap();
        fingerprint.expect_equal(&fingerprint).unwrap();
        assert_eq!(fingerprint.entries()[Path::new("d/b")].first_name, Path::new("d/a"));
        assert_eq!(fingerprint.entries()[Path::new("d/a")].mtime, (5, 7));
    }

    #[test]
    fn shows_each_kind_of_difference() {
        let write = |root: &Path| {
            fs::write(root.join("d/a"), b"two").unwrap();
            File::open(root.join("d/a")).unwrap().set_modified(UNIX_EPOCH + Duration::new(5, 7)).unwrap();
        };
        assert!(lines(write).iter().all(|line| line.contains("sha256")));
        assert_eq!(lines(write).len(), 2, "both names of the inode");

        let mode =
            |root: &Path| fs::set_permissions(root.join("d"), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(lines(mode), ["d: mode 40755, on the right 40700"]);

        let split = lines(|root| {
            fs::remove_file(root.join("d/b")).unwrap();
            fs::copy(root.join("d/a"), root.join("d/b")).unwrap();
        });
        assert!(split.contains(&"d/a: nlink 2, on the right 1".to_owned()), "{split:?}");
        assert!(split.contains(&"d/b: first name d/a, on the right d/b".to_owned()), "{split:?}");

        assert_eq!(lines(|root| fs::write(root.join("new"), b"").unwrap()), ["new: only on the right"]);
        assert!(
            lines(|root| fs::remove_file(root.join("d/s")).unwrap())
                .contains(&"d/s: only on the left".to_owned())
        );
    }
}
