//! What happened during a start, moment by moment: the file that `tdfs run --events` writes.
//!
//! ```text
//! stages ----\
//! arrivals ---+--> Recording --timeline()--> Timeline, one JSON object
//! reads -----/
//! ```
//!
//! All times are milliseconds since the command began. Nothing is recorded unless a start is asked to, and what is
//! kept is bounded: arrivals are thinned out, reads beyond the first some thousands are counted as lost.
//!
//! Readers ignore fields that they do not know and refuse a version that they do not know.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tdfs_common::runtime_image::Service;
use tdfs_common::tree::{Body, Tree};

use super::StartReport;
use crate::rootfs::{ReadLog, Reads};

/// The version that is written.
pub const VERSION: u32 = 1;
/// Points of the arrivals that are kept.
const SAMPLES_MAX: usize = 2048;

/// A start, moment by moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// [`VERSION`].
    pub version: u32,
    /// When the command began, RFC 3339.
    pub began: String,
    /// The image as it was named.
    pub reference: String,
    /// What `tdfs run --json` prints.
    pub start: serde_json::Value,
    /// Until when reads and arrivals were recorded.
    pub until_ms: f64,
    /// In the order they began; a fetch goes on beside the others.
    pub stages: Vec<Stage>,
    /// Arrivals from the network.
    pub arrivals: Arrived,
    /// The files of the reads.
    pub files: Vec<ReadFile>,
    /// Reads that came before their pages of the runtime image had arrived.
    pub waits: FileReads,
    /// Reads of pages that are not in the runtime image.
    pub cold: FileReads,
}

/// An interval of a start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// `resolve`, `diff`, `pull` (all layers, without a runtime image), `fetch`, `mount`, `create` or `ready`.
    pub name: String,
    /// When it began.
    pub begin_ms: f64,
    /// When it ended; a fetch that was not over ends here when the container was ready.
    pub end_ms: f64,
}

/// Arrivals from the network over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Arrived {
    /// Pages that were missing.
    pub pages_missing: u64,
    /// Compressed bytes to receive.
    pub bytes_missing: u64,
    /// What had arrived, in order of time; thinned out to some thousands, the last one is exact.
    pub samples: Vec<Sample>,
}

/// What had arrived at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The moment.
    pub ms: f64,
    /// Verified pages.
    pub pages: u64,
    /// Compressed bytes.
    pub bytes: u64,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReadFile {
    /// Path in the image, without a leading slash; what is not UTF-8 is replaced.
    pub path: String,
    /// Pages of the file.
    pub pages: u64,
    /// Of these, in the runtime image.
    pub recorded_pages: u64,
    /// The layer that its first byte lies in, counted from the lowest.
    pub layer: Option<u32>,
}

/// Reads of one kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FileReads {
    /// In the order they ended.
    pub reads: Vec<FileRead>,
    /// How many more there were, which are only in the sums.
    pub lost: u64,
    /// Pages of all reads.
    pub pages: u64,
    /// How long all of them took together; several may wait at a time.
    pub took_ms: f64,
}

/// One read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileRead {
    /// When it came.
    pub ms: f64,
    /// How long it took.
    pub took_ms: f64,
    /// Index into [`Timeline::files`].
    pub file: u32,
    /// First page of the file in it.
    pub page: u32,
    /// Its pages that were waited for.
    pub pages: u64,
    /// The errno that the reader got.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<i32>,
}

/// The stages of a start, on its clock.
#[derive(Debug)]
pub(super) struct Stages {
    begin: Instant,
    list: Vec<Stage>,
}

impl Stages {
    /// On the clock that starts at `begin`.
    pub fn new(begin: Instant) -> Self {
        Self { begin, list: Vec::new() }
    }

    /// Adds a stage that began at `since` and took `ms` milliseconds.
    pub fn add(&mut self, name: &str, since: Instant, ms: f64) {
        let begin_ms = since.saturating_duration_since(self.begin).as_secs_f64() * 1000.0;
        self.list.push(Stage { name: name.to_owned(), begin_ms, end_ms: begin_ms + ms });
    }
}

/// What a start writes down while it goes on, if it was asked to.
#[derive(Clone, Debug)]
pub(super) struct Moments {
    begin: Instant,
    wall: SystemTime,
    pub reads: Arc<ReadLog>,
    arrived: Arc<Mutex<Arrived>>,
}

impl Moments {
    /// On the clock that starts at `begin`, which is now.
    pub fn new(begin: Instant) -> Self {
        Self { begin, wall: SystemTime::now(), reads: Arc::default(), arrived: Arc::default() }
    }

    /// So many pages are missing.
    pub fn missing(&self, pages: u64) {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner).pages_missing = pages;
    }

    /// Now `pages` and `bytes` of `total` bytes have arrived.
    pub fn arrived(&self, pages: u64, bytes: u64, total: u64) {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        arrived.bytes_missing = total;
        arrived.add(Sample { ms: self.begin.elapsed().as_secs_f64() * 1000.0, pages, bytes });
    }

    /// The recording of a start that has come to ready.
    pub fn recording(
        self,
        reference: String,
        report: &StartReport,
        stages: Stages,
        tree: Arc<Tree>,
        service: Option<Arc<Service>>,
    ) -> Recording {
        let start = serde_json::to_value(report).unwrap_or_default();
        let mut stages = stages.list;
        stages.sort_by(|a, b| a.begin_ms.total_cmp(&b.begin_ms));
        Recording { moments: self, reference, start, stages, tree, service }
    }
}

impl Arrived {
    /// Adds a sample in place of one that lies too close before it. Where there are too many, half of them go.
    fn add(&mut self, sample: Sample) {
        let samples = &mut self.samples;
        if samples.len() >= SAMPLES_MAX {
            let mut n = 0;
            samples.retain(|_| {
                n += 1;
                n % 2 == 1
            });
        }
        let [.., before, last] = &mut samples[..] else { return samples.push(sample) };
        if last.ms - before.ms < sample.ms / (SAMPLES_MAX / 2) as f64 {
            *last = sample;
        } else {
            samples.push(sample);
        }
    }
}

/// The recording of a start: it goes on until its container has ended.
#[derive(Debug)]
pub struct Recording {
    moments: Moments,
    reference: String,
    start: serde_json::Value,
    stages: Vec<Stage>,
    tree: Arc<Tree>,
    service: Option<Arc<Service>>,
}

impl Recording {
    /// What was recorded so far.
    pub fn timeline(&self) -> Timeline {
        let (waits, cold) = (self.moments.reads.waits(), self.moments.reads.cold());
        let mut files = Files::new(&self.tree, self.service.as_deref());
        let arrivals = self.moments.arrived.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Timeline {
            version: VERSION,
            began: humantime::format_rfc3339_millis(self.moments.wall).to_string(),
            reference: self.reference.clone(),
            start: self.start.clone(),
            until_ms: self.moments.begin.elapsed().as_secs_f64() * 1000.0,
            stages: self.stages.clone(),
            arrivals,
            waits: self.reads(&waits, &mut files),
            cold: self.reads(&cold, &mut files),
            files: files.list,
        }
    }

    fn reads(&self, reads: &Reads, files: &mut Files<'_>) -> FileReads {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let kept = reads.kept.iter().map(|read| FileRead {
            ms: ms(read.begin.saturating_duration_since(self.moments.begin)),
            took_ms: ms(read.took),
            file: files.index(read.ino),
            page: read.page,
            pages: read.pages,
            error: read.error,
        });
        FileReads { reads: kept.collect(), lost: reads.lost, pages: reads.pages, took_ms: ms(reads.took) }
    }
}

/// Collects the files that reads name.
struct Files<'a> {
    tree: &'a Tree,
    paths: Vec<Vec<u8>>,
    recorded: HashMap<u32, u64>,
    known: HashMap<u32, u32>,
    list: Vec<ReadFile>,
}

impl<'a> Files<'a> {
    fn new(tree: &'a Tree, service: Option<&Service>) -> Self {
        let mut recorded = HashMap::new();
        for run in service.into_iter().flat_map(|s| &s.runs) {
            *recorded.entry(run.ino).or_default() += u64::from(run.count);
        }
        Self { tree, paths: tree.paths(), recorded, known: HashMap::new(), list: Vec::new() }
    }

    fn index(&mut self, ino: u32) -> u32 {
        *self.known.entry(ino).or_insert_with(|| {
            let inode = &self.tree.inodes[ino as usize];
            let layer = match &inode.body {
                Body::Regular { extents, .. } => extents.first().map(|e| e.layer),
                _ => None,
            };
            self.list.push(ReadFile {
                path: String::from_utf8_lossy(&self.paths[ino as usize]).into_owned(),
                pages: tdfs_common::page::count(inode.file_size()),
                recorded_pages: self.recorded.get(&ino).copied().unwrap_or_default(),
                layer,
            });
            self.list.len() as u32 - 1
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn arrivals_are_thinned_out_and_end_exactly(steps in prop::collection::vec((1.0f64..50.0, 1u64..9), 1..9000)) {
            let mut arrived = Arrived::default();
            let mut all = vec![Sample::default()];
            for (ms, pages) in steps {
                let last = all[all.len() - 1];
                all.push(Sample { ms: last.ms + ms, pages: last.pages + pages, bytes: 0 });
            }
            for sample in &all {
                arrived.add(*sample);
            }
            let kept = &arrived.samples;
            prop_assert!(kept.len() <= SAMPLES_MAX);
            let end = all[all.len() - 1].ms;
            let covered = all.iter().all(|s| {
                let after = kept.partition_point(|k| k.ms < s.ms);
                kept[after].ms - s.ms <= end / 8.0 || after > 0 && s.ms - kept[after - 1].ms <= end / 8.0
            });
            prop_assert!(covered);
            prop_assert_eq!((kept.first(), kept.last()), (all.first(), all.last()));
            prop_assert!(kept.is_sorted_by(|a, b| a.ms <= b.ms && a.pages < b.pages));
        }
    }
}
