//! A trace: the ordered set of pages a service touched up to readiness.
//!
//! Files are keyed by path and content, so that several runs, or runs of two builds of an image, merge and compare.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::digest::{ContentHash, Digest};
use crate::envelope::{Format, FormatError, ensure};
use crate::page;

/// How the pages were observed, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
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
        Ok(())
    }
}
