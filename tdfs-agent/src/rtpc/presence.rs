//! Which units of a sparse data file are there: durable, and never trusted further than it can be.
//!
//! A unit is whatever the owner says: a page of a zone, a span of a layer. The owner writes a unit's verified bytes
//! to its data file, then [`insert`](Presence::insert)s it, and [`commit`](Presence::commit)s now and then. A commit
//! makes the data durable first, and only then replaces the presence file (temporary file, sync, rename), so after a
//! crash at any point a unit is either present with its bytes or absent.
//!
//! ```text
//!  0  magic     8 bytes "TDFSPRES"
//!  8  version   u16 LE, 1
//! 10  reserved  6 bytes, zero
//! 16  boot id   16 bytes, of the boot that vouches for the bits
//! 32  units     u64 LE
//! 40  checksum  32 bytes, BLAKE3 of bytes 0..40 and the bitmap
//! 72  bitmap    ceil(units / 8) bytes; bit n & 7 of byte n >> 3 is unit n
//! ```
//!
//! A file that is short, long, or does not match its checksum counts as empty, with a warning.
//!
//! Bits of another boot are *suspects*: disks and file systems lie about durability when the power goes. They are
//! not present until the owner has checked the bytes against their hash and inserted the unit again. As long as a
//! suspect is left, commits keep the old boot id, so nothing is lost and nothing becomes trusted by accident.
//!
//! Threads may share one value. Processes may not write one file at once: the owner holds an exclusive `flock` on a
//! file beside it from before [`reload`](Presence::reload) until after `commit`. Opening needs no lock.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tdfs_common::bitmap::PageBitmap;
use tdfs_common::runtime_image::ZONE_PAGES_MAX;

use super::RtpcError;

const MAGIC: [u8; 8] = *b"TDFSPRES";
const VERSION: u16 = 1;
const SUM: Range<usize> = 40..72;
const HEADER_LEN: usize = 72;

type BootId = [u8; 16];

/// The set of present units beside a sparse data file.
#[derive(Debug)]
pub struct Presence {
    path: PathBuf,
    boot: BootId,
    bits: RwLock<Bits>,
    /// `Bits::changes` at the last commit; held while committing.
    committed: Mutex<u64>,
}

#[derive(Debug)]
struct Bits {
    present: PageBitmap,
    suspects: PageBitmap,
    suspect_boot: BootId,
    changes: u64,
}

impl Presence {
    /// Opens the presence file at `path`, with room for at least `units` units; a missing or damaged file is empty.
    pub fn open(path: &Path, units: u64) -> Result<Self, RtpcError> {
        let boot = boot_id()?;
        let bits = Bits {
            present: PageBitmap::new(units),
            suspects: PageBitmap::new(units),
            suspect_boot: boot,
            changes: 0,
        };
        let presence =
            Self { path: path.to_owned(), boot, bits: RwLock::new(bits), committed: Mutex::new(0) };
        presence.reload()?;
        Ok(presence)
    }

    /// Adds what another process has committed since.
    pub fn reload(&self) -> Result<(), RtpcError> {
        let Some((boot, stored)) = load(&self.path)? else { return Ok(()) };
        let mut bits = self.write();
        bits.grow(stored.len());
        if boot == self.boot {
            stored.runs().for_each(|run| bits.insert(run));
        } else {
            let fresh = stored.difference(&bits.present);
            fresh.runs().for_each(|run| bits.suspects.insert_range(run));
            bits.suspect_boot = boot;
        }
        Ok(())
    }

    /// Makes room for units below `units`; never shrinks.
    pub fn grow(&self, units: u64) {
        self.write().grow(units);
    }

    /// Whether another boot left units that nobody has verified since.
    pub fn boot_changed(&self) -> bool {
        self.read().suspects.count() > 0
    }

    /// The units another boot left: verify the bytes of each against its hash, then insert or [`remove`](Self::remove)
    /// it.
    pub fn suspects(&self) -> PageBitmap {
        self.read().suspects.clone()
    }

    /// Whether `unit` is present.
    pub fn contains(&self, unit: u64) -> bool {
        self.read().present.contains(unit)
    }

    /// Number of present units.
    pub fn count(&self) -> u64 {
        self.read().present.count()
    }

    /// The units of `needed` that are not present.
    pub fn missing(&self, needed: &PageBitmap) -> PageBitmap {
        needed.difference(&self.read().present)
    }

    /// Marks `units` present, at once for this process, for others and after a crash with the next
    /// [`commit`](Self::commit). Their verified bytes must be in the data file.
    pub fn insert(&self, units: Range<u64>) {
        self.write().insert(units);
    }

    /// Marks `units` absent.
    pub fn remove(&self, units: Range<u64>) {
        let mut bits = self.write();
        bits.present.remove_range(units.clone());
        bits.suspects.remove_range(units);
        bits.changes += 1;
    }

    /// Makes `data` durable, then the units inserted before this call. Blocks on the disk; nothing to do costs nothing.
    pub fn commit(&self, data: &File) -> Result<(), RtpcError> {
        let mut committed = lock(&self.committed);
        let (bytes, changes) = {
            let bits = self.read();
            if bits.changes == *committed {
                return Ok(());
            }
            let mut all = bits.present.clone();
            bits.suspects.runs().for_each(|run| all.insert_range(run));
            let boot = if bits.suspects.count() > 0 { bits.suspect_boot } else { self.boot };
            (encode(boot, &all), bits.changes)
        };
        data.sync_data().map_err(RtpcError::at(&self.path))?;
        replace(&self.path, &bytes)?;
        *committed = changes;
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, Bits> {
        self.bits.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Bits> {
        self.bits.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bits {
    fn grow(&mut self, units: u64) {
        self.present.grow(units);
        self.suspects.grow(units);
    }

    fn insert(&mut self, units: Range<u64>) {
        self.present.insert_range(units.clone());
        self.suspects.remove_range(units);
        self.changes += 1;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Replaces the file at `path` so that a crash leaves the old or the new bytes.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), RtpcError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let mut file = File::create(&temporary).map_err(RtpcError::at(&temporary))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(RtpcError::at(&temporary))?;
    fs::rename(&temporary, path).map_err(RtpcError::at(path))?;
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir).and_then(|d| d.sync_all()).map_err(RtpcError::at(dir))
}

fn encode(boot: BootId, bits: &PageBitmap) -> Vec<u8> {
    let bitmap = bits.to_bytes();
    let mut out = Vec::with_capacity(HEADER_LEN + bitmap.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 6]);
    out.extend_from_slice(&boot);
    out.extend_from_slice(&bits.len().to_le_bytes());
    out.extend_from_slice(&[0; SUM.end - SUM.start]);
    out.extend_from_slice(&bitmap);
    let sum = checksum(&out);
    out[SUM].copy_from_slice(&sum);
    out
}

fn checksum(file: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&file[..SUM.start]).update(&file[HEADER_LEN..]);
    *hasher.finalize().as_bytes()
}

/// Who vouches for the file and what it says; `None` when it is missing or damaged.
fn load(path: &Path) -> Result<Option<(BootId, PageBitmap)>, RtpcError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(RtpcError::at(path)(e)),
    };
    let limit = HEADER_LEN as u64 + ZONE_PAGES_MAX / 8 + 1;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).map_err(RtpcError::at(path))?;
    let decoded = decode(&bytes);
    if decoded.is_none() {
        tracing::warn!(path = %path.display(), "presence file is damaged; what it covers is fetched again");
    }
    Ok(decoded)
}

fn decode(bytes: &[u8]) -> Option<(BootId, PageBitmap)> {
    let header: &[u8; HEADER_LEN] = bytes.first_chunk()?;
    let units = u64::from_le_bytes(header[32..40].try_into().ok()?);
    let known = header[..8] == MAGIC && header[8..10] == VERSION.to_le_bytes();
    let whole = units <= ZONE_PAGES_MAX && bytes.len() == HEADER_LEN + units.div_ceil(8) as usize;
    if !known || !whole || header[SUM] != checksum(bytes) {
        return None;
    }
    Some((header[16..32].try_into().ok()?, PageBitmap::from_bytes(&bytes[HEADER_LEN..], units)))
}

/// The kernel's random id of this boot.
fn boot_id() -> Result<BootId, RtpcError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(RtpcError::at(path))?;
    let id = u128::from_str_radix(&text.trim().replace('-', ""), 16)
        .map_err(|e| RtpcError::at(path)(io::Error::new(io::ErrorKind::InvalidData, e)))?;
    Ok(id.to_be_bytes())
}

/// Rewrites the file as another boot would have left it.
#[cfg(test)]
pub(super) fn age(path: &Path) {
    let Some((mut boot, bits)) = load(path).expect("readable") else { return };
    boot[3] ^= 1;
    fs::write(path, encode(boot, &bits)).expect("writable");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn data(dir: &Path) -> File {
        File::create(dir.join("data")).unwrap()
    }

    fn units(p: &Presence, n: u64) -> Vec<u64> {
        (0..n).filter(|u| p.contains(*u)).collect()
    }

    #[test]
    fn committed_units_survive_and_others_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("presence");
        let p = Presence::open(&path, 100).unwrap();
        p.insert(3..5);
        p.insert(99..100);
        p.commit(&data(dir.path())).unwrap();
        p.insert(50..60);
        let q = Presence::open(&path, 100).unwrap();
        assert_eq!(units(&q, 100), [3, 4, 99]);
        assert!(!q.boot_changed());
        q.remove(3..4);
        q.grow(200);
        q.insert(150..151);
        q.commit(&data(dir.path())).unwrap();
        assert_eq!(units(&Presence::open(&path, 10).unwrap(), 200), [4, 99, 150]);
        p.reload().unwrap();
        assert!(p.contains(150) && p.contains(55));
    }

    #[test]
    fn units_of_another_boot_are_absent_until_verified() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("presence");
        let p = Presence::open(&path, 10).unwrap();
        p.insert(0..6);
        p.commit(&data(dir.path())).unwrap();
        age(&path);

        let p = Presence::open(&path, 10).unwrap();
        assert!(p.boot_changed());
        assert_eq!(p.count(), 0);
        assert_eq!(p.suspects().iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        p.insert(0..2);
        p.insert(8..9);
        p.commit(&data(dir.path())).unwrap();

        // Three suspects are left, so even the verified ones are asked for again: none is lost.
        let p = Presence::open(&path, 10).unwrap();
        assert_eq!(p.suspects().iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 8]);
        p.insert(0..5);
        p.insert(8..9);
        p.remove(5..6);
        assert!(!p.boot_changed());
        p.commit(&data(dir.path())).unwrap();
        assert_eq!(units(&Presence::open(&path, 10).unwrap(), 10), [0, 1, 2, 3, 4, 8]);
    }

    #[test]
    fn a_leftover_temporary_file_is_harmless() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("presence");
        fs::write(dir.path().join("presence.tmp"), vec![0xff; 5000]).unwrap();
        let p = Presence::open(&path, 10).unwrap();
        p.insert(1..2);
        p.commit(&data(dir.path())).unwrap();
        assert_eq!(units(&Presence::open(&path, 10).unwrap(), 10), [1]);
    }

    proptest! {
        #[test]
        fn a_damaged_file_counts_as_empty(
            set in proptest::collection::btree_set(0u64..500, 1..50),
            at in any::<proptest::sample::Index>(),
            flip in 1u8..,
            cut in any::<bool>(),
        ) {
            let mut bits = PageBitmap::new(500);
            for &u in &set {
                bits.insert(u);
            }
            let mut bytes = encode([7; 16], &bits);
            prop_assert_eq!(decode(&bytes), Some(([7; 16], bits)));
            let at = at.index(bytes.len());
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] ^= flip;
            }
            // The reserved bytes are under the checksum as well.
            prop_assert_eq!(decode(&bytes), None);
            let mut longer = encode([7; 16], &PageBitmap::new(500));
            longer.push(0);
            prop_assert_eq!(decode(&longer), None);
        }
    }
}
