//! GNU sparse files: a map of where the stored bytes belong; the rest is holes.

use super::header::number;

/// Most stored regions of one file.
const REGIONS_MAX: usize = 1 << 20;
/// Bytes of one entry in a header: offset and length, twelve bytes each.
const ENTRY: usize = 24;

/// Stored regions in ascending order, disjoint, none empty.
#[derive(Default)]
pub(super) struct Map {
    regions: Vec<(u64, u64)>,
    end: u64,
}

impl Map {
    /// Adds a region; an empty one (GNU tar ends a map with it) only has to be in order.
    pub fn push(&mut self, offset: u64, len: u64) -> Result<(), &'static str> {
        let end = offset.checked_add(len).ok_or("sparse region overflows")?;
        if offset < self.end {
            return Err("sparse regions overlap");
        }
        if self.regions.len() == REGIONS_MAX {
            return Err("too many sparse regions");
        }
        self.end = end;
        if len > 0 {
            self.regions.push((offset, len));
        }
        Ok(())
    }

    /// Adds the entries of a header or of a sparse block up to the first blank one.
    pub fn push_entries(&mut self, entries: &[u8]) -> Result<(), &'static str> {
        for entry in entries.chunks_exact(ENTRY) {
            if entry[0] == 0 {
                break;
            }
            let part = |field| number(field).and_then(|n| u64::try_from(n).ok()).ok_or("bad sparse entry");
            self.push(part(&entry[..12])?, part(&entry[12..])?)?;
        }
        Ok(())
    }

    /// The regions of a file of `size` bytes of which `stored` are in the archive.
    pub fn finish(self, size: u64, stored: u64) -> Result<Vec<(u64, u64)>, &'static str> {
        if self.end > size {
            return Err("sparse region past the end of the file");
        }
        if self.regions.iter().map(|(_, len)| len).sum::<u64>() != stored {
            return Err("sparse map does not match the stored bytes");
        }
        Ok(self.regions)
    }
}
