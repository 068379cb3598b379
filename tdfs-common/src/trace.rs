//! A trace: the ordered set of pages a service touched up to readiness.
//!
//! Files are keyed by path and content, so that several runs, or runs of two builds of an image, merge and compare.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::digest::{ContentHash, Digest};
use crate::envelope::{Format, FormatError, ensure};
use crate::page;

/// How the pages were observed, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// BTF-typed tracepoints.
    TpBtf,
    /// Classic tracepoints.
    Tracepoint,
    /// Page-cache residency after the run, without BPF: exact pages, order unknown.
    Residency,
}

/// A file the service touched.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TraceFile {
    /// Path in the image, bytes, without a leading slash.
    pub path: Vec<u8>,
    /// Bytes.
    pub size: u64,
    /// BLAKE3 of the content.
    pub content: ContentHash,
}

/// Consecutive pages of one file, first touched one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Touch {
    /// Index into [`Trace::files`].
    pub file: u32,
    /// First page of the run.
    pub page: u32,
    /// Pages in the run.
    pub count: u32,
}

/// What one or several runs of a service touched.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Trace {
    /// The image manifest that ran.
    pub image: Digest,
    /// Service name.
    pub service: String,
    /// The readiness probe, as on the command line.
    pub ready: String,
    /// How the pages were observed; of several runs, the weakest.
    pub method: Method,
    /// Whether every event arrived and every page is accounted for.
    pub complete: bool,
    /// Events the kernel could not deliver.
    pub lost_events: u64,
    /// Runs merged into this trace.
    pub runs: u32,
    /// Touched files.
    pub files: Vec<TraceFile>,
    /// In order of first use, no page twice.
    pub touches: Vec<Touch>,
}

impl Trace {
    /// Number of touched pages.
    pub fn pages(&self) -> u64 {
        self.touches.iter().map(|t| u64::from(t.count)).sum()
    }
}

impl Format for Trace {
    const MAGIC: [u8; 8] = *b"TDFSTRAC";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = 128 << 20;
    const NAME: &'static str = "trace";

    fn validate(&self) -> Result<(), FormatError> {
        let ok = |c: bool, reason: &str| ensure(c, Self::NAME, || reason.to_owned());
        for touch in &self.touches {
            let file = self.files.get(touch.file as usize);
            let pages = file.map_or(0, |f| page::count(f.size));
            let end = u64::from(touch.page) + u64::from(touch.count);
            ok(touch.count > 0 && end <= pages, "touch outside its file")?;
        }
        let mut ordered: Vec<&Touch> = self.touches.iter().collect();
        ordered.sort_unstable_by_key(|t| (t.file, t.page));
        let end = |t: &Touch| u64::from(t.page) + u64::from(t.count);
        let disjoint = |a: &&Touch, b: &&Touch| a.file != b.file || end(a) <= u64::from(b.page);
        ok(ordered.is_sorted_by(disjoint), "page of a file twice")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::envelope::{decode, encode};

    fn trace(touches: Vec<Touch>) -> Trace {
        let file = |path: &str, size| TraceFile {
            path: path.as_bytes().to_vec(),
            size,
            content: ContentHash::of(path.as_bytes()),
        };
        Trace {
            image: Digest::of(b"image"),
            service: "web".into(),
            ready: "tcp:80".into(),
            method: Method::TpBtf,
            complete: true,
            lost_events: 0,
            runs: 1,
            files: vec![file("bin/a", 40960), file("lib/b", 4097), file("huge", u64::MAX)],
            touches,
        }
    }

    fn touch(file: u32, page: u32, count: u32) -> Touch {
        Touch { file, page, count }
    }

    #[test]
    fn round_trips() {
        let t = trace(vec![touch(1, 1, 1), touch(0, 4, 6), touch(0, 0, 4), touch(2, u32::MAX, 1)]);
        assert_eq!(t.pages(), 12);
        assert_eq!(decode::<Trace>(&encode(&t).unwrap()).unwrap(), t);
    }

    #[test]
    fn refuses_what_no_recorder_writes() {
        for bad in [
            vec![touch(3, 0, 1)],
            vec![touch(0, 0, 0)],
            vec![touch(0, 9, 2)],
            vec![touch(1, 2, 1)],
            vec![touch(0, 0, 3), touch(1, 0, 1), touch(0, 2, 1)],
            vec![touch(2, 7, u32::MAX), touch(2, u32::MAX, 1)],
        ] {
            let bytes = encode(&trace(bad.clone())).unwrap();
            let refused = matches!(decode::<Trace>(&bytes), Err(FormatError::Invalid { .. }));
            assert!(refused, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn survives_any_touches(raw in proptest::collection::vec(any::<(u32, u32, u32)>(), 0..20)) {
            let t = trace(raw.iter().map(|&(f, p, c)| touch(f % 4, p, c)).collect());
            let outcome = decode::<Trace>(&encode(&t).unwrap());
            prop_assert!(outcome.is_err() || outcome.unwrap() == t);
        }
    }
}
