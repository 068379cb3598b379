//! What a start tells: the `--json` object of `tdfs run`.

use serde::Serialize;
use tdfs_common::digest::Digest;

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
    /// Reference to manifests and metadata.
    pub resolve_ms: f64,
    /// rt_diff against the runtime page cache.
    pub diff_ms: f64,
    /// Missing pages: from the request to the last verified page.
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
    /// Of these, fetched now.
    pub pages_fetched: u64,
    /// Bytes of page data on the wire (compressed).
    pub bytes_fetched: u64,
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
}

impl StartReport {
    /// The report as lines for a person.
    pub fn text(&self) -> String {
        let service = self.service.as_deref().unwrap_or("no runtime image");
        format!(
            "ready in {:.0} ms ({service}, {})\n  resolve {:.0} ms, diff {:.1} ms, fetch {:.0} ms, mount {:.0} ms, \
             start {:.0} ms, ready {:.0} ms\n  pages: {} needed, {} present, {} fetched ({:.1} MB in {} requests); \
             {} cold in {} reads",
            self.total_ms,
            self.source,
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
        )
    }
}
