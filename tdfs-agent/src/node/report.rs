//! What a start tells: the `--json` object of `tdfs run`.

use serde::Serialize;
use tdfs_common::digest::Digest;

use crate::fetch::SourceUse;

/// One start, stage by stage. Times are milliseconds; `*_ms` of a stage is how long the stage itself took, and
/// stages overlap (mounting and creating the container go on while pages arrive), so they may add up to more than
/// `total_ms`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct StartReport {
    /// The image manifest.
    pub image: Option<Digest>,
    /// The service whose runtime image was used.
    pub service: Option<String>,
    /// Where the pages needed at the start came from: `resident`, `fetched` or `layers` (no runtime image).
    pub source: &'static str,
    /// `resident` (nothing was missing), `fetched` (the process started when all pages were there), `streaming` (it
    /// started while they were on their way) or `layers` (no runtime image).
    pub start_mode: &'static str,
    /// Why.
    pub start_reason: String,
    /// Reference to manifests and metadata.
    pub resolve_ms: f64,
    /// rt_diff against the runtime page cache.
    pub diff_ms: f64,
    /// Missing pages: from the request to the last verified page, or until ready if that came before.
    pub fetch_ms: f64,
    /// EROFS metadata, cold device, mounts.
    pub mount_ms: f64,
    /// Container created and its process started.
    pub start_ms: f64,
    /// From the process started to ready.
    pub ready_ms: f64,
    /// From the command to ready.
    pub total_ms: f64,
    /// Zone pages the service needs.
    pub pages_needed: u64,
    /// Of these, on this node before.
    pub pages_present: u64,
    /// Of these, fetched until ready.
    pub pages_fetched: u64,
    /// Of these, still on the wire when ready.
    pub pages_awaited: u64,
    /// Bytes of page data on the wire (compressed).
    pub bytes_fetched: u64,
    /// Bytes of everything that was received until ready: page data, metadata, layers, without protocol headers.
    pub bytes_received: u64,
    /// Requests for page data.
    pub data_requests: u64,
    /// Requests for manifests, configuration and metadata.
    pub metadata_requests: u64,
    /// Cold pages read before ready.
    pub cold_pages: u64,
    /// Reads of the cold device before ready.
    pub cold_requests: u64,
    /// Bytes of layers fetched for them or, without a runtime image, all layers.
    pub layer_bytes: u64,
    /// Pages in reads of the container that came before their pages of the runtime image had arrived.
    pub waited_pages: u64,
    /// These reads.
    pub waited_requests: u64,
    /// How long they waited before ready, all together: several threads may wait at a time.
    pub waited_ms: f64,
    /// What each source did, in the order they were used.
    pub sources: Vec<SourceUse>,
}

impl StartReport {
    /// The report as lines for a person.
    pub fn text(&self) -> String {
        let service = self.service.as_deref().unwrap_or("no runtime image");
        format!(
            "ready in {:.0} ms ({service}, {}: {})\n  resolve {:.0} ms, diff {:.1} ms, fetch {:.0} ms, mount {:.0} ms, \
             start {:.0} ms, ready {:.0} ms\n  pages: {} needed, {} present, {} fetched ({:.1} MB in {} requests); \
             {} cold in {} reads; {} reads waited {:.0} ms; {} pages still on their way",
            self.total_ms,
            self.start_mode,
            self.start_reason,
            self.resolve_ms,
            self.diff_ms,
            self.fetch_ms,
            self.mount_ms,
            self.start_ms,
            self.ready_ms,
            self.pages_needed,
            self.pages_present,
            self.pages_fetched,
            self.bytes_fetched as f64 / 1e6,
            self.data_requests,
            self.cold_pages,
            self.cold_requests,
            self.waited_requests,
            self.waited_ms,
            self.pages_awaited,
        )
    }
}
