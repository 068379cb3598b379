//! What a report shows: plain data, small enough for a page.

use std::collections::BTreeMap;

use serde::Serialize;
use tdfs_common::digest::Digest;

use super::{Recording, ReportError};
use crate::node::Timeline;
use crate::node::timeline::{FileReads, VERSION};

/// Points of a curve, and reads of a kind, that a page draws.
const POINTS_MAX: usize = 4096;
/// Files that are told apart in a table of reads.
const READ_FILES_MAX: usize = 40;

/// A recording, a start, or both of one image.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The image as it was named.
    pub reference: String,
    /// What was recorded.
    pub recording: Option<Recording>,
    /// What happened in a start.
    pub start: Option<Start>,
}

/// A start and what it read.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Start {
    /// Moment by moment.
    pub timeline: Timeline,
    /// Waits by file.
    pub waits: Vec<FileSum>,
    /// Cold reads by file.
    pub cold: Vec<FileSum>,
}

/// The reads of a file, or of all files that have no line of their own.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FileSum {
    /// The file, an index into the timeline's; `None` for all the others and what was not kept.
    pub file: Option<u32>,
    /// Files in this line; those of reads that were not kept are unknown.
    pub files: u64,
    /// Reads.
    pub reads: u64,
    /// Pages that were waited for.
    pub pages: u64,
    /// How long they took together, milliseconds.
    pub took_ms: f64,
    /// When the first one came, milliseconds.
    pub first_ms: Option<f64>,
    /// Reads that came before the container was ready.
    pub before_ready: u64,
}

impl Report {
    /// Of a recording, a start, or both, which must be of the same image.
    pub fn new(
        reference: Option<String>,
        recording: Option<Recording>,
        events: Option<Timeline>,
    ) -> Result<Self, ReportError> {
        if let (Some(recording), Some(events)) = (&recording, &events) {
            let image = events.start["image"].as_str().unwrap_or("unknown");
            if image.parse::<Digest>().ok() != Some(recording.image) {
                return Err(ReportError::OtherImage { events: image.to_owned(), image: recording.image });
            }
        }
        let start = events.map(Start::new).transpose()?;
        let named = start.as_ref().map(|s| s.timeline.reference.clone());
        Ok(Self { reference: reference.or(named).unwrap_or_default(), recording, start })
    }
}

impl Start {
    fn new(mut timeline: Timeline) -> Result<Self, ReportError> {
        let wrong = |reason: &str| Err(ReportError::Events(reason.to_owned()));
        if timeline.version != VERSION {
            return wrong(&format!("version {} is unknown", timeline.version));
        }
        if !timeline.start.is_object() {
            return wrong("the start is no object");
        }
        let files = timeline.files.len();
        let kinds = [&timeline.waits, &timeline.cold];
        if kinds.iter().flat_map(|k| &k.reads).any(|read| read.file as usize >= files) {
            return wrong("a read of no file");
        }
        let times = timeline.stages.iter().flat_map(|s| [s.begin_ms, s.end_ms - s.begin_ms]);
        let times = times.chain(kinds.iter().flat_map(|k| &k.reads).flat_map(|r| [r.ms, r.took_ms]));
        let mut times =
            times.chain(timeline.arrivals.samples.iter().map(|s| s.ms)).chain([timeline.until_ms]);
        // A century; everything is computed in doubles.
        if !times.all(|ms| (0.0..4e12).contains(&ms)) {
            return wrong("a time that is none");
        }
        if files > 2 * POINTS_MAX
            || timeline.stages.len() > POINTS_MAX
            || timeline.arrivals.samples.len() > POINTS_MAX
        {
            return wrong("more files, stages or samples than a start has");
        }
        if !timeline.arrivals.samples.is_sorted_by(|a, b| a.ms <= b.ms) {
            return wrong("samples out of order");
        }
        let ready = timeline.start["total_ms"].as_f64().unwrap_or(f64::MAX);
        let (waits, cold) = (by_file(&timeline.waits, ready), by_file(&timeline.cold, ready));
        for reads in [&mut timeline.waits, &mut timeline.cold] {
            let more = reads.reads.len().saturating_sub(POINTS_MAX);
            reads.reads.truncate(POINTS_MAX);
            reads.lost = reads.lost.saturating_add(more as u64);
        }
        Ok(Self { timeline, waits, cold })
    }
}

/// The reads by file, those that took longest first; the last line holds the others.
fn by_file(reads: &FileReads, ready: f64) -> Vec<FileSum> {
    let mut sums: BTreeMap<u32, FileSum> = BTreeMap::new();
    for read in &reads.reads {
        let sum = sums.entry(read.file).or_default();
        (sum.file, sum.files) = (Some(read.file), 1);
        sum.reads += 1;
        sum.pages = sum.pages.saturating_add(read.pages);
        sum.took_ms += read.took_ms;
        sum.first_ms = Some(sum.first_ms.map_or(read.ms, |first| first.min(read.ms)));
        sum.before_ready += u64::from(read.ms < ready);
    }
    let mut sums: Vec<FileSum> = sums.into_values().collect();
    sums.sort_by(|a, b| b.took_ms.total_cmp(&a.took_ms));
    let mut others =
        FileSum { reads: reads.lost, pages: reads.pages, took_ms: reads.took_ms, ..FileSum::default() };
    for (n, sum) in sums.iter().enumerate() {
        if n < READ_FILES_MAX {
            others.pages = others.pages.saturating_sub(sum.pages);
            others.took_ms = (others.took_ms - sum.took_ms).max(0.0);
        } else {
            others.files += 1;
            others.reads = others.reads.saturating_add(sum.reads);
            others.before_ready += sum.before_ready;
        }
    }
    sums.truncate(READ_FILES_MAX);
    if others.reads > 0 {
        sums.push(others);
    }
    sums
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::node::timeline::{Arrived, FileRead, ReadFile, Sample, Stage};

    pub fn read(ms: f64, took_ms: f64, file: u32) -> FileRead {
        FileRead { ms, took_ms, file, page: 3, pages: 2, error: None }
    }

    fn file(n: u32) -> ReadFile {
        ReadFile { path: format!("usr/lib/{n}"), pages: 9, recorded_pages: u64::from(n % 2), layer: Some(0) }
    }

    /// A start of half a second with these reads of a hundred files.
    pub fn timeline(waits: Vec<FileRead>, cold: Vec<FileRead>) -> Timeline {
        let reads = |reads: Vec<FileRead>| FileReads {
            lost: 0,
            pages: reads.iter().map(|r| r.pages).sum(),
            took_ms: reads.iter().map(|r| r.took_ms).sum(),
            reads,
        };
        let stage = |name: &str, begin_ms, end_ms| Stage { name: name.to_owned(), begin_ms, end_ms };
        Timeline {
            version: VERSION,
            began: "2026-01-01T00:00:00.000Z".into(),
            reference: "oci:web".into(),
            start: json!({ "image": Digest::of(b"image"), "service": "web", "total_ms": 500.0 }),
            until_ms: 900.0,
            stages: vec![
                stage("resolve", 0.0, 100.0),
                stage("diff", 100.0, 101.5),
                stage("fetch", 101.5, 500.0),
                stage("mount", 101.5, 120.0),
                stage("create", 120.0, 200.0),
                stage("ready", 200.0, 500.0),
            ],
            arrivals: Arrived {
                pages_missing: 10,
                bytes_missing: 1000,
                samples: vec![
                    Sample { ms: 102.0, pages: 0, bytes: 0 },
                    Sample { ms: 499.0, pages: 10, bytes: 1000 },
                ],
            },
            files: (0..100).map(file).collect(),
            waits: reads(waits),
            cold: reads(cold),
        }
    }

    #[test]
    fn what_no_start_writes_is_refused() {
        let good = timeline(vec![read(1.0, 2.0, 0)], vec![read(3.0, 4.0, 99)]);
        assert!(Start::new(good.clone()).is_ok());
        let refused = |change: &dyn Fn(&mut Timeline)| {
            let mut bad = good.clone();
            change(&mut bad);
            Start::new(bad).expect_err("an error").to_string()
        };
        assert!(refused(&|t| t.version = 2).contains("version 2"));
        assert!(refused(&|t| t.start = json!(3)).contains("no object"));
        assert!(refused(&|t| t.cold.reads[0].file = 100).contains("no file"));
        assert!(refused(&|t| t.cold.reads[0].took_ms = -1.0).contains("time"));
        assert!(refused(&|t| t.waits.reads[0].ms = f64::NAN).contains("time"));
        assert!(refused(&|t| t.stages[1].end_ms = 0.0).contains("time"));
        assert!(refused(&|t| t.until_ms = f64::INFINITY).contains("time"));
        assert!(refused(&|t| t.arrivals.samples.reverse()).contains("out of order"));
        assert!(refused(&|t| t.arrivals.samples = vec![Sample::default(); 5000]).contains("more"));
    }

    proptest! {
        #[test]
        fn lines_add_up_to_all_reads(
            reads in prop::collection::vec((0u32..900, 0u32..50, 0u32..100), 0..300), lost in 0u64..9,
        ) {
            let reads: Vec<_> = reads.iter().map(|&(ms, took, f)| read(ms.into(), took.into(), f)).collect();
            let mut timeline = timeline(Vec::new(), reads.clone());
            timeline.cold.lost = lost;
            timeline.cold.pages += lost * 7;
            let all = timeline.cold.clone();
            let start = Start::new(timeline).unwrap();
            prop_assert!(start.cold.len() <= READ_FILES_MAX + 1);
            prop_assert_eq!(start.cold.iter().map(|s| s.reads).sum::<u64>(), reads.len() as u64 + lost);
            prop_assert_eq!(start.cold.iter().map(|s| s.pages).sum::<u64>(), all.pages);
            prop_assert!((start.cold.iter().map(|s| s.took_ms).sum::<f64>() - all.took_ms).abs() < 1e-6);
            let early = reads.iter().filter(|r| r.ms < 500.0).count() as u64;
            prop_assert_eq!(start.cold.iter().map(|s| s.before_ready).sum::<u64>(), early);
        }
    }
}
