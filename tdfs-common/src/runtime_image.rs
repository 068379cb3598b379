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

use bincode::{Decode, Encode};

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

/// Pages of a frame, except that the last of a segment may be shorter.
pub const FRAME_PAGES: u32 = 64;
/// Pages of a group data zone: 1 TiB.
pub const ZONE_PAGES_MAX: u64 = 1 << 28;
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

impl Segment {
    /// Pages of the segment.
    pub fn pages(&self) -> u64 {
        self.frames.iter().map(|f| u64::from(f.pages)).sum()
    }

    /// Bytes of the blob.
    pub fn size(&self) -> u64 {
        self.frames.iter().map(|f| u64::from(f.len)).sum()
    }
}

impl Service {
    /// Zone pages below this are addressed.
    pub fn zone_pages(&self) -> u64 {
        self.segments.last().map_or(0, |s| s.base + s.pages())
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
        ok(self.segments.len() <= SEGMENTS_MAX, "too many segments")?;
        let mut end = 0;
        for segment in &self.segments {
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
        let mut at = 0;
        let mut ordered: Vec<&Run> = self.runs.iter().collect();
        ordered.sort_unstable_by_key(|r| r.zone_page);
        for run in &ordered {
            ok(run.count > 0, "empty run")?;
            ok(run.file_page.checked_add(run.count).is_some(), "run past the largest file")?;
            let (start, stop) = (u64::from(run.zone_page), u64::from(run.zone_page) + u64::from(run.count));
            while at < self.segments.len() && self.segments[at].base + self.segments[at].pages() <= start {
                at += 1;
            }
            let inside = self.segments.get(at).is_some_and(|s| s.base <= start && stop <= s.base + s.pages());
            ok(inside, "run outside the segments")?;
        }
        ordered.sort_unstable_by_key(|r| (r.ino, r.file_page));
        let disjoint = |a: &&Run, b: &&Run| a.ino != b.ino || a.file_page + a.count <= b.file_page;
        ok(ordered.is_sorted_by(disjoint), "page of a file twice")
    }
}
