//! What a node says it holds when it does not know yet what an image needs: the segments of all its zones.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use tdfs_common::bitmap::PageBitmap;
use tdfs_common::wire::{HELD_MAX, Held, HeldPages};

use super::Presence;
use super::zone::read_directory;

/// Zones that are looked at.
const ZONES_MAX: usize = 64;
/// Bytes of all bitmaps.
const BITS_MAX: usize = 1 << 20;

/// The pages that lie durably in the zones below the state directory, segment by segment, those that were changed last
/// first. What cannot be read is not held. Blocks on the disk.
pub fn holdings(state: &Path) -> Vec<Held> {
    let mut zones = Vec::new();
    for group in fs::read_dir(state.join("zones")).into_iter().flatten().flatten() {
        for zone in fs::read_dir(group.path()).into_iter().flatten().flatten() {
            let presence = zone.path().join("presence");
            if let Ok(changed) = fs::metadata(&presence).and_then(|m| m.modified()) {
                zones.push((changed, zone.path(), presence));
            }
        }
    }
    zones.sort_by_key(|(changed, ..): &(SystemTime, _, _)| std::cmp::Reverse(*changed));
    let mut all = Vec::new();
    let mut bits = 0;
    for (_, zone, presence) in zones.into_iter().take(ZONES_MAX) {
        let (Some(segments), Ok(presence)) = (read_directory(&zone), Presence::open(&presence, 0)) else {
            continue;
        };
        let mut zone = PageBitmap::new(segments.last().map_or(0, |s| s.zone_range().end));
        for segment in &segments {
            zone.insert_range(segment.zone_range());
        }
        let missing = presence.missing(&zone);
        for segment in segments {
            let mut pages = PageBitmap::new(segment.pages());
            let held = segment.zone_range().filter(|page| !missing.contains(*page));
            held.for_each(|page| pages.insert(page - segment.base));
            let pages = match pages.count() {
                0 => continue,
                count if count == segment.pages() => HeldPages::All,
                _ => HeldPages::Some(pages.to_bytes()),
            };
            if let HeldPages::Some(bytes) = &pages {
                bits += bytes.len();
            }
            if bits > BITS_MAX || all.len() == HELD_MAX {
                return all;
            }
            // A segment may lie in several lineages of a group: the last used one counts.
            if !all.iter().any(|h: &Held| h.segment == segment.blob) {
                all.push(Held { segment: segment.blob, pages });
            }
        }
    }
    all
}
