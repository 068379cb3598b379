//! The pass over the layers: hash every touched page, then write the new ones as a segment.

use std::collections::HashMap;
use std::fs::File;
use std::future::Future;
use std::io::{BufWriter, Write as _};
use std::panic;
use std::path::Path;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tdfs_common::digest::{ContentHash, Digest, DigestWriter};
use tdfs_common::envelope::Format as _;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::{FRAME_PAGES, Segment, Service, ZONE_PAGES_MAX};
use tdfs_common::trace::Trace;
use tdfs_common::tree::{Body, Tree};
use tempfile::{NamedTempFile, TempPath};

use super::PackError;
use super::layout::{Layout, NewPage, Placed};
use super::trace::{FileRun, resolve};
use crate::fetch::{FetchError, frame};

/// zstd level of frames. On 256 KiB of shared libraries and byte code, 12 saves 0.6 % more for five times the time, and
/// 15 saves 4 % for ten times; they all decompress equally fast.
const LEVEL: i32 = 9;

/// What a group's zone already holds.
#[derive(Clone, Debug, Default)]
pub struct Group {
    /// In ascending order of `base`, disjoint.
    pub segments: Vec<Segment>,
    /// Where each page content lies.
    pub pages: HashMap<ContentHash, u32>,
    /// Where the next segment begins: addresses are never given out twice, also not those of dropped segments.
    pub end: u64,
}

/// One service to pack.
#[derive(Clone, Debug)]
pub struct ServiceInput {
    /// What it touched, of all runs.
    pub trace: Trace,
    /// Arguments that replace the image's, if it was recorded with any.
    pub args: Option<Vec<String>>,
}

/// What to pack.
pub struct Pack<'a> {
    /// The image manifest.
    pub image: Digest,
    /// Its tree.
    pub tree: &'a Tree,
    /// Group name.
    pub group: &'a str,
    /// What the group has already.
    pub existing: &'a Group,
    /// Services of the image, at most 64; packed together they share one segment.
    pub services: Vec<ServiceInput>,
    /// Accept traces that missed events or name files of another build.
    pub allow_incomplete: bool,
    /// Where the segment is written.
    pub scratch: &'a Path,
}

/// A new segment, not pushed yet.
#[derive(Debug)]
pub struct SegmentFile {
    /// What the service metadata says of it.
    pub segment: Segment,
    /// The blob; deleted when dropped.
    pub path: TempPath,
}

/// Service metadata and the segment they share.
#[derive(Debug)]
pub struct Packed {
    /// In the order of the input.
    pub services: Vec<Service>,
    /// Absent when the group has every page already.
    pub segment: Option<SegmentFile>,
    /// Numbers for people.
    pub report: Report,
}

/// What packing did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// File pages of all services.
    pub pages: u64,
    /// Of these, pages whose content the group had already.
    pub reused_pages: u64,
    /// Pages of the new segment.
    pub new_pages: u64,
    /// Bytes of the new segment.
    pub segment_bytes: u64,
    /// Touched pages in holes of files, which need no data.
    pub hole_pages: u64,
    /// Touched pages of files that the image does not hold; only with `allow_incomplete`.
    pub dropped_pages: u64,
}

impl Pack<'_> {
    /// Packs the services. `read` gives bytes `offset..offset + len` of an uncompressed layer.
    ///
    /// Reads every touched page once and every new one twice; hashes and compresses on all cores.
    pub async fn run<R, F>(self, read: R) -> Result<Packed, PackError>
    where
        R: Fn(u32, u64, usize) -> F,
        F: Future<Output = Result<Bytes, FetchError>>,
    {
        if self.services.len() > 64 {
            return Err(PackError::TooManyServices(self.services.len()));
        }
        let mut report = Report::default();
        let mut layout = Layout::new(&self.existing.pages);
        for input in &self.services {
            layout.service();
            let resolved = resolve(&input.trace, self.tree, &self.image, self.allow_incomplete)?;
            report.hole_pages += resolved.hole_pages;
            report.dropped_pages += resolved.dropped_pages;
            let pieces = resolved.runs.iter().flat_map(pieces);
            let mut hashed = stream::iter(pieces)
                .map(|piece| {
                    let pages = read_pages(self.tree, piece, &read);
                    async move {
                        let pages = pages.await?;
                        let hash = move || pages.chunks(PAGE_SIZE).map(ContentHash::of).collect::<Vec<_>>();
                        Ok::<_, PackError>((piece, blocking(hash).await))
                    }
                })
                .buffered(parallelism());
            while let Some((piece, hashes)) = hashed.try_next().await? {
                report.pages += hashes.len() as u64;
                report.reused_pages +=
                    hashes.iter().filter(|h| self.existing.pages.contains_key(h)).count() as u64;
                layout.touch(piece, &hashes);
            }
        }
        report.new_pages = layout.new_pages() as u64;
        let base = self.existing.end;
        if base.saturating_add(report.new_pages) > ZONE_PAGES_MAX {
            return Err(PackError::ZoneFull);
        }
        let placed = layout.place(base as u32, &self.existing.segments);
        let segment =
            if placed.pages.is_empty() { None } else { Some(self.write(base, &placed, &read).await?) };
        report.segment_bytes = segment.as_ref().map_or(0, |s| s.segment.size());
        let mut segments = self.existing.segments.clone();
        segments.extend(segment.as_ref().map(|s| s.segment.clone()));
        let mut services = Vec::new();
        for (input, runs) in self.services.into_iter().zip(placed.tables) {
            let mut service = Service {
                group: self.group.to_owned(),
                service: input.trace.service,
                image: self.image,
                args: input.args,
                ready: input.trace.ready,
                segments: segments.clone(),
                runs,
            };
            let needed = service.needed();
            service.segments.retain(|s| needed.intersects(s.zone_range()));
            service.validate()?;
            services.push(service);
        }
        Ok(Packed { services, segment, report })
    }

    /// Reads and compresses the new pages, frame by frame in zone order.
    async fn write<R, F>(&self, base: u64, placed: &Placed, read: &R) -> Result<SegmentFile, PackError>
    where
        R: Fn(u32, u64, usize) -> F,
        F: Future<Output = Result<Bytes, FetchError>>,
    {
        let file = NamedTempFile::new_in(self.scratch).map_err(PackError::at(self.scratch))?;
        let mut out = SegmentWriter {
            file: BufWriter::new(file.reopen().map_err(PackError::at(file.path()))?),
            digest: DigestWriter::default(),
        };
        let mut rest = placed.pages.as_slice();
        let groups = placed.frames.iter().map(|&count| {
            let (group, others) = rest.split_at(count as usize);
            rest = others;
            group
        });
        let mut encoded = stream::iter(groups)
            .map(|group| async move {
                let pages = gather(self.tree, group, read).await?;
                blocking(move || frame::encode(&pages, LEVEL)).await.map_err(PackError::at(self.scratch))
            })
            .buffered(parallelism());
        let mut frames = Vec::new();
        while let Some((frame, bytes)) = encoded.try_next().await? {
            frames.push(frame);
            out = blocking(move || out.write(&bytes)).await.map_err(PackError::at(file.path()))?;
        }
        let blob = blocking(move || out.finish()).await.map_err(PackError::at(file.path()))?;
        Ok(SegmentFile { segment: Segment { blob, base, frames }, path: file.into_temp_path() })
    }
}

struct SegmentWriter {
    file: BufWriter<File>,
    digest: DigestWriter,
}

impl SegmentWriter {
    fn write(mut self, bytes: &[u8]) -> std::io::Result<Self> {
        self.digest.update(bytes);
        self.file.write_all(bytes)?;
        Ok(self)
    }

    fn finish(mut self) -> std::io::Result<Digest> {
        self.file.flush()?;
        Ok(self.digest.finish())
    }
}

/// A run in pieces of at most a frame, so that one read is bounded.
fn pieces(run: &FileRun) -> impl Iterator<Item = FileRun> + use<> {
    let run = *run;
    (0..run.count).step_by(FRAME_PAGES as usize).map(move |at| FileRun {
        ino: run.ino,
        page: run.page + at,
        count: (run.count - at).min(FRAME_PAGES),
    })
}

/// The pages of a frame, read with as few reads as their places in files allow.
async fn gather<R, F>(tree: &Tree, pages: &[NewPage], read: &R) -> Result<Vec<u8>, PackError>
where
    R: Fn(u32, u64, usize) -> F,
    F: Future<Output = Result<Bytes, FetchError>>,
{
    let mut out = Vec::with_capacity(pages.len() * PAGE_SIZE);
    for run in pages.chunk_by(|a, b| a.ino == b.ino && a.page.checked_add(1) == Some(b.page)) {
        let run = FileRun { ino: run[0].ino, page: run[0].page, count: run.len() as u32 };
        out.append(&mut read_pages(tree, run, read).await?);
    }
    Ok(out)
}

/// The content of file pages: extents from the layers, zeros in holes and past the end.
pub(crate) async fn read_pages<R, F>(tree: &Tree, run: FileRun, read: &R) -> Result<Vec<u8>, PackError>
where
    R: Fn(u32, u64, usize) -> F,
    F: Future<Output = Result<Bytes, FetchError>>,
{
    let mut out = vec![0; run.count as usize * PAGE_SIZE];
    let start = u64::from(run.page) * PAGE_SIZE as u64;
    let end = start + out.len() as u64;
    let Body::Regular { extents, .. } = &tree.inodes[run.ino as usize].body else { return Ok(out) };
    let first = extents.partition_point(|e| e.file_offset + e.len <= start);
    for extent in extents[first..].iter().take_while(|e| e.file_offset < end) {
        let from = extent.file_offset.max(start);
        let want = ((extent.file_offset + extent.len).min(end) - from) as usize;
        let offset = extent.layer_offset + (from - extent.file_offset);
        let bytes = read(extent.layer, offset, want).await?;
        if bytes.len() != want {
            return Err(PackError::ShortRead { layer: extent.layer, offset, want, got: bytes.len() });
        }
        let at = (from - start) as usize;
        out[at..at + want].copy_from_slice(&bytes);
    }
    Ok(out)
}

/// Frames in work at a time: enough to keep every core busy while the next is read.
fn parallelism() -> usize {
    2 * std::thread::available_parallelism().map_or(1, usize::from)
}

pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(e) => panic::resume_unwind(e.into_panic()),
    }
}
