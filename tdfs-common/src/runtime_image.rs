//! The runtime image of a service: which pages it needs, and where the group data zone holds them.
//!
//! ```text
//! service metadata                         group data zone (page addresses of the whole group)
//!   files: ino -> runs of pages  ------->  |  segment 0  |  segment 1  | ...
//!   segments: blob, base, frames           each segment is one blob:
//!                                          [frame 0][frame 1]...[frame n]   no header, no gaps
//! ```
//!
//! The zone is append-only: a service of a group names the segments of earlier services at their old base and adds
//! at most one. A frame is up to [`FRAME_PAGES`] pages; its hash is over the uncompressed pages.
//!
//! A node that holds pages of a zone remembers in a [`ZoneDirectory`] which segments they belong to.

use std::ops::Range;

use bincode::{Decode, Encode};

use crate::bitmap::PageBitmap;
use crate::digest::{ContentHash, Digest};
use crate::envelope::{Format, FormatError, ensure};
use crate::page::PAGE_SIZE;

/// `artifactType` of a runtime image.
pub const ARTIFACT_TYPE: &str = "application/vnd.tdfs.runtime-image.v1";
/// Media type of the service metadata blob.
pub const SERVICE_TYPE: &str = "application/vnd.tdfs.service.v1";
/// Media type of the tree blob.
pub const TREE_TYPE: &str = "application/vnd.tdfs.tree.v1";
/// Media type of the layer index blob.
pub const LAYER_INDEX_TYPE: &str = "application/vnd.tdfs.layer-index.v1";
/// Media type of the windows blob (gzip checkpoints).
pub const WINDOWS_TYPE: &str = "application/vnd.tdfs.windows.v1";
/// Media type of a zone segment.
pub const SEGMENT_TYPE: &str = "application/vnd.tdfs.segment.v1";
/// `artifactType` of a group's index.
pub const GROUP_TYPE: &str = "application/vnd.tdfs.group.v1";
/// Annotation with the service name, on the artifact manifest and its referrer descriptor.
pub const SERVICE_ANNOTATION: &str = "dev.tdfs.service";
/// Annotation with the group name.
pub const GROUP_ANNOTATION: &str = "dev.tdfs.group";

/// Pages of a frame at most; a frame ends early where its segment ends or where pages of other services begin.
pub const FRAME_PAGES: u32 = 64;
/// Pages of a group data zone: 1 TiB.
pub const ZONE_PAGES_MAX: u64 = 1 << 28;
/// File pages of one service: 256 GiB. Files may share zone pages, so without this limit a few bytes of page table
/// could claim any number of them.
pub const FILE_PAGES_MAX: u64 = 1 << 26;
/// Segments of a group data zone.
pub const SEGMENTS_MAX: usize = 4096;

/// An independently compressed run of zone pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Frame {
    /// Bytes in the segment blob; equal to the uncompressed length when stored uncompressed.
    pub len: u32,
    /// Pages.
    pub pages: u32,
    /// Of the uncompressed pages.
    pub hash: ContentHash,
}

/// An immutable run of zone pages, stored as one blob.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Segment {
    /// The blob.
    pub blob: Digest,
    /// First zone page.
    pub base: u64,
    /// In the order they lie in the blob.
    pub frames: Vec<Frame>,
}

/// A frame and where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedFrame {
    /// Place in [`Segment::frames`].
    pub index: usize,
    /// The frame.
    pub frame: Frame,
    /// Its zone pages.
    pub pages: Range<u64>,
    /// Its bytes in the blob.
    pub bytes: Range<u64>,
}

/// Consecutive pages of a file that lie on consecutive zone pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Run {
    /// Index into [`Tree::inodes`](crate::tree::Tree::inodes).
    pub ino: u32,
    /// First page in the file.
    pub file_page: u32,
    /// First zone page.
    pub zone_page: u32,
    /// Pages.
    pub count: u32,
}

/// Service metadata.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Service {
    /// Group name.
    pub group: String,
    /// Service name.
    pub service: String,
    /// The image manifest this was recorded from.
    pub image: Digest,
    /// Arguments that replace the image's, if recorded with any.
    pub args: Option<Vec<String>>,
    /// The readiness probe, as on the command line.
    pub ready: String,
    /// Zone segments in ascending order of `base`; all that the group had when this service was packed and that it
    /// uses, so bases may leave gaps.
    pub segments: Vec<Segment>,
    /// Page table, in order of first use; no page of a file twice.
    pub runs: Vec<Run>,
}

/// What a node's zone file holds pages of.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ZoneDirectory {
    /// Group name.
    pub group: String,
    /// In ascending order of `base`, disjoint.
    pub segments: Vec<Segment>,
}

/// The name of a group where only `[A-Za-z0-9._-]` may be used (directory, tag): the name itself if it is like that,
/// at most 64 characters, and starts with a letter or digit; otherwise `_` and the sha256 of the name.
pub fn group_key(group: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    let starts_well = group.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if group.len() <= 64 && starts_well && group.bytes().all(plain) {
        group.to_owned()
    } else {
        format!("_{}", Digest::of(group.as_bytes()).hex())
    }
}

impl Segment {
    /// Zone pages of the segment.
    pub fn zone_range(&self) -> Range<u64> {
        self.base..self.base + self.pages()
    }

    /// Every frame with the zone pages it holds and where it lies in the blob.
    pub fn placed(&self) -> impl Iterator<Item = PlacedFrame> + '_ {
        let (mut page, mut offset) = (self.base, 0);
        self.frames.iter().enumerate().map(move |(index, &frame)| {
            let placed = PlacedFrame {
                index,
                frame,
                pages: page..page + u64::from(frame.pages),
                bytes: offset..offset + u64::from(frame.len),
            };
            (page, offset) = (placed.pages.end, placed.bytes.end);
            placed
        })
    }

    /// Pages of the segment.
    pub fn pages(&self) -> u64 {
        self.frames.iter().map(|f| u64::from(f.pages)).sum()
    }

    /// Bytes of the blob.
    pub fn size(&self) -> u64 {
        self.frames.iter().map(|f| u64::from(f.len)).sum()
    }
}

/// A frame of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsedFrame {
    /// Place in [`Service::segments`].
    pub segment: usize,
    /// The frame.
    pub placed: PlacedFrame,
}

impl Service {
    /// The frames that hold a page the service needs, in order of the first use of any of their pages. The service is
    /// a validated one.
    pub fn frames_by_first_use(&self) -> Vec<UsedFrame> {
        let segments = self.segments.iter().enumerate();
        let mut frames: Vec<Option<UsedFrame>> = segments
            .flat_map(|(n, s)| s.placed().map(move |placed| Some(UsedFrame { segment: n, placed })))
            .collect();
        let ends: Vec<u64> = frames.iter().flatten().map(|f| f.placed.pages.end).collect();
        let mut ordered = Vec::new();
        for run in &self.runs {
            let (mut page, stop) =
                (u64::from(run.zone_page), u64::from(run.zone_page) + u64::from(run.count));
            let mut at = ends.partition_point(|end| *end <= page);
            while page < stop && at < ends.len() {
                ordered.extend(frames[at].take());
                page = ends[at];
                at += 1;
            }
        }
        ordered
    }

    /// Zone pages below this are addressed.
    pub fn zone_pages(&self) -> u64 {
        self.segments.last().map_or(0, |s| s.base + s.pages())
    }

    /// The zone pages the service needs.
    pub fn needed(&self) -> PageBitmap {
        let mut needed = PageBitmap::new(self.zone_pages());
        for run in &self.runs {
            let start = u64::from(run.zone_page);
            needed.insert_range(start..start + u64::from(run.count));
        }
        needed
    }

    /// Number of file pages the service needs (two files may share a zone page).
    pub fn file_pages(&self) -> u64 {
        self.runs.iter().map(|r| u64::from(r.count)).sum()
    }
}

impl Format for Service {
    const MAGIC: [u8; 8] = *b"TDFSSERV";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = 128 << 20;
    const NAME: &'static str = "service metadata";

    fn validate(&self) -> Result<(), FormatError> {
        let ok = |c: bool, reason: &str| ensure(c, Self::NAME, || reason.to_owned());
        validate_segments(&self.segments, Self::NAME)?;
        ok(self.file_pages() <= FILE_PAGES_MAX, "too many pages")?;
        // Summed up once: a segment may have as many frames as there are runs.
        let mut segments = self.segments.iter().map(Segment::zone_range).peekable();
        let mut ordered: Vec<&Run> = self.runs.iter().collect();
        ordered.sort_unstable_by_key(|r| r.zone_page);
        for run in &ordered {
            ok(run.count > 0, "empty run")?;
            ok(run.file_page.checked_add(run.count).is_some(), "run past the largest file")?;
            let (start, stop) = (u64::from(run.zone_page), u64::from(run.zone_page) + u64::from(run.count));
            while segments.next_if(|s| s.end <= start).is_some() {}
            let inside = segments.peek().is_some_and(|s| s.start <= start && stop <= s.end);
            ok(inside, "run outside the segments")?;
        }
        ordered.sort_unstable_by_key(|r| (r.ino, r.file_page));
        let disjoint = |a: &&Run, b: &&Run| a.ino != b.ino || a.file_page + a.count <= b.file_page;
        ok(ordered.is_sorted_by(disjoint), "page of a file twice")
    }
}

impl Format for ZoneDirectory {
    const MAGIC: [u8; 8] = *b"TDFSZDIR";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = 256 << 20;
    const NAME: &'static str = "zone directory";

    fn validate(&self) -> Result<(), FormatError> {
        validate_segments(&self.segments, Self::NAME)
    }
}

fn validate_segments(segments: &[Segment], name: &'static str) -> Result<(), FormatError> {
    let ok = |c: bool, reason: &str| ensure(c, name, || reason.to_owned());
    ok(segments.len() <= SEGMENTS_MAX, "too many segments")?;
    let mut end = 0;
    for segment in segments {
        ok(segment.base >= end, "segments overlap")?;
        ok(!segment.frames.is_empty(), "segment without frames")?;
        for frame in &segment.frames {
            ok(frame.pages > 0 && frame.pages <= FRAME_PAGES, "frame of no or too many pages")?;
            let raw = frame.pages as usize * PAGE_SIZE;
            ok(frame.len > 0 && frame.len as usize <= raw, "frame longer than its pages")?;
        }
        end = segment.base.saturating_add(segment.pages());
        ok(end <= ZONE_PAGES_MAX, "zone too large")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::envelope::{decode, encode};

    fn frame(pages: u32, len: u32) -> Frame {
        Frame { len, pages, hash: ContentHash::of(&pages.to_le_bytes()) }
    }

    fn segment(base: u64, pages: u32) -> Segment {
        let full = std::iter::repeat_n(frame(64, 9000), pages as usize / 64);
        let rest = (!pages.is_multiple_of(64)).then(|| frame(pages % 64, 4096));
        Segment { blob: Digest::of(&base.to_le_bytes()), base, frames: full.chain(rest).collect() }
    }

    fn run(ino: u32, file_page: u32, zone_page: u32, count: u32) -> Run {
        Run { ino, file_page, zone_page, count }
    }

    fn service(segments: Vec<Segment>, runs: Vec<Run>) -> Service {
        Service {
            group: "python".into(),
            service: "web".into(),
            image: Digest::of(b"image"),
            args: Some(vec!["-m".into()]),
            ready: "tcp:80".into(),
            segments,
            runs,
        }
    }

    #[test]
    fn round_trips_and_counts() {
        let s = service(
            vec![segment(0, 100), segment(200, 10)],
            vec![run(7, 0, 200, 10), run(3, 5, 40, 60), run(7, 20, 90, 2), run(8, 0, 90, 1)],
        );
        assert_eq!(decode::<Service>(&encode(&s).unwrap()).unwrap(), s);
        assert_eq!((s.zone_pages(), s.file_pages(), s.needed().count()), (210, 73, 70));
        let placed: Vec<_> = s.segments[0].placed().map(|p| (p.pages, p.bytes)).collect();
        assert_eq!(placed, [(0..64, 0..9000), (64..100, 9000..13096)]);
        let d = ZoneDirectory { group: "python".into(), segments: s.segments };
        assert_eq!(decode::<ZoneDirectory>(&encode(&d).unwrap()).unwrap(), d);
    }

    #[test]
    fn many_runs_in_many_frames_are_validated_in_one_pass() {
        let pages = 200_000;
        let frames = Segment { frames: vec![frame(1, 9); pages as usize], ..segment(0, 1) };
        let runs = (0..pages).map(|n| run(n % 100, n, n, 1)).collect();
        service(vec![frames], runs).validate().unwrap();
    }

    #[test]
    fn frames_come_in_order_of_first_use() {
        let s = service(
            vec![segment(0, 200), segment(300, 64)],
            vec![run(1, 0, 300, 1), run(1, 1, 130, 20), run(2, 0, 60, 100), run(3, 0, 310, 2)],
        );
        let order: Vec<_> =
            s.frames_by_first_use().into_iter().map(|f| (f.segment, f.placed.index)).collect();
        assert_eq!(order, [(1, 0), (0, 2), (0, 0), (0, 1)]);
    }

    #[test]
    fn refuses_contradictions() {
        let two = || vec![segment(0, 100), segment(100, 10)];
        let with = |f: Frame| vec![Segment { frames: vec![f], ..segment(0, 1) }];
        let bad = [
            (vec![segment(0, 100), segment(99, 10)], vec![]),
            (vec![segment(100, 10), segment(0, 10)], vec![]),
            (vec![segment(0, 0)], vec![]),
            (vec![segment(u64::MAX, 1)], vec![]),
            (vec![segment(ZONE_PAGES_MAX, 1)], vec![]),
            (with(frame(65, 1)), vec![]),
            (with(frame(0, 1)), vec![]),
            (with(frame(1, 0)), vec![]),
            (with(frame(1, 4097)), vec![]),
            (two(), vec![run(0, 0, 0, 0)]),
            (two(), vec![run(0, 0, 99, 2)]),
            (two(), vec![run(0, 0, 105, 6)]),
            (two(), vec![run(0, 0, u32::MAX, u32::MAX)]),
            (two(), vec![run(0, u32::MAX, 0, 1)]),
            (two(), vec![run(0, 0, 0, 5), run(1, 0, 5, 5), run(0, 4, 20, 1)]),
            (vec![], vec![run(0, 0, 0, 1)]),
            (vec![segment(0, 1 << 20)], (0..65).map(|ino| run(ino, 0, 0, 1 << 20)).collect()),
        ];
        for (segments, runs) in bad {
            let s = service(segments, runs);
            let refused = decode::<Service>(&encode(&s).unwrap());
            assert!(matches!(refused, Err(FormatError::Invalid { .. })), "{s:?}");
        }
    }

    #[test]
    fn group_keys_are_safe_and_distinct() {
        assert_eq!(group_key("python-3.11_x"), "python-3.11_x");
        let long = "x".repeat(65);
        let strange = ["", ".", "..", "../../etc", "a/b", "_a", "-a", "ä", "a b", "a\0b", &long];
        let keys: std::collections::BTreeSet<String> = strange.iter().map(|g| group_key(g)).collect();
        assert_eq!(keys.len(), strange.len());
        for key in keys {
            assert!(key.len() == 65 && key.starts_with('_'), "{key}");
            assert_ne!(group_key(&key), key);
        }
    }

    proptest! {
        #[test]
        fn survives_any_numbers(
            bases in proptest::collection::vec((0u64..400, 0u32..200), 0..4),
            runs in proptest::collection::vec((0u32..3, 0u32..300, 0u32..600, 0u32..80), 0..8),
        ) {
            let segments = bases.into_iter().map(|(b, p)| segment(b, p)).collect();
            let s = service(segments, runs.into_iter().map(|(i, f, z, c)| run(i, f, z, c)).collect());
            if let Ok(read) = decode::<Service>(&encode(&s).unwrap()) {
                prop_assert!(read.needed().count() <= read.file_pages());
                // The frames of the model: every needed page, run by run.
                let mut order = Vec::new();
                for page in read.runs.iter().flat_map(|r| r.zone_page..r.zone_page + r.count).map(u64::from) {
                    let n = read.segments.iter().position(|s| s.zone_range().contains(&page)).unwrap();
                    let placed = read.segments[n].placed().find(|f| f.pages.contains(&page)).unwrap();
                    let frame = UsedFrame { segment: n, placed };
                    if !order.contains(&frame) {
                        order.push(frame);
                    }
                }
                prop_assert_eq!(read.frames_by_first_use(), order);
                prop_assert_eq!(read, s);
            }
        }
    }
}
