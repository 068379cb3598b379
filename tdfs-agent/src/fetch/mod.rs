//! Bringing what a service needs onto the node, verified.
//!
//! ```text
//! service, zone --diff--> missing pages -+-> page service: one answer ----------> frames, cuts --verify--> inject
//!                                        +-> plan --> range requests --receive--> frames ------/
//! ```
//!
//! Sources in their order: what is here, the page service of a mirror, that of the registry, ranges, whole segments.
//! Which of them brought what, and why one was left, is in [`Sources`].
//!
//! [`fetch`] is exclusive per zone among all processes: a second one waits and then finds the pages there. It returns
//! when the pages are usable; making them durable goes on in the background, see [`Commit`]. A crash at any point
//! leaves a zone that lacks pages but has no wrong ones. While it runs, [`Arrivals`] tells which pages are there, and
//! readers of others wait with it.

mod arrivals;
mod decoders;
mod demand;
mod experience;
pub mod frame;
mod layers;
mod page_service;
mod plan;
mod receive;
mod sources;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tdfs_common::bitmap::PageBitmap;
use tdfs_common::digest::{ContentHash, Digest};
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::{PlacedFrame, Segment, Service};
use tokio::task::JoinHandle;

use crate::oci::layer::LayerError;
use crate::oci::{OciError, Store};
use crate::rtpc::{RtpcError, Writer, Zone};
pub use arrivals::{Arrivals, News};
pub use decoders::Decoders;
use demand::Streams;
pub use layers::{ImageLayers, LayerStats, PulledImage, pull_image};
pub use page_service::{Metadata, PageService};
use plan::{Request, plan, plan_whole};
use receive::{Sink, receive};
pub use sources::{SourceUse, Sources};

/// Requests under way at the same time: enough to keep a link busy while another answer starts.
const REQUESTS_AT_ONCE: usize = 4;

/// Called with bytes received so far and bytes to receive.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Send + Sync);

/// Why pages or layers did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The runtime page cache failed.
    #[error(transparent)]
    Rtpc(#[from] RtpcError),
    /// The registry or layout failed.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// A frame is not what the service metadata promises.
    #[error("segment {segment} frame {frame}: {reason}")]
    Frame {
        /// The blob.
        segment: Digest,
        /// Place of the frame in it.
        frame: usize,
        /// What is wrong.
        reason: String,
    },
    /// A layer is damaged, or not what its index says.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A layer unpacks to something else than the image says.
    #[error("layer {blob} uncompresses to {got}, not to {expected}")]
    DiffId {
        /// The blob.
        blob: Digest,
        /// What the image says.
        expected: Digest,
        /// What came out.
        got: Digest,
    },
    /// No such compression or packing.
    #[error("layers of type {0:?} are not supported")]
    LayerType(String),
    /// The runtime image lacks the blob with the deflate windows.
    #[error("layer {layer}: the deflate windows are missing")]
    NoWindows {
        /// The blob.
        layer: Digest,
    },
    /// Somebody else's fetch, which this reader waited for, failed.
    #[error(transparent)]
    Shared(Arc<FetchError>),
    /// Nobody asks for that who has a valid tree.
    #[error("layer {layer} has no {len} bytes at {offset}")]
    OutsideLayer {
        /// Layer, counted from the lowest.
        layer: u32,
        /// Offset in the uncompressed layer.
        offset: u64,
        /// Bytes.
        len: usize,
    },
    /// A file of the layer cache.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no memory for a decoder.
    #[error("no decoder: {0}")]
    Decoder(io::Error),
    /// The answer goes on after its last frame.
    #[error("segment {segment} bytes {bytes:?}: the answer is too long")]
    TooLong {
        /// The blob.
        segment: Digest,
        /// Bytes asked for.
        bytes: Range<u64>,
    },
}

impl FetchError {
    /// The errno to answer a kernel request with.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Rtpc(e) => e.errno(),
            Self::Layer(e) => e.errno(),
            Self::Io { source, .. } | Self::Decoder(source) => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Shared(e) => e.errno(),
            _ => libc::EIO,
        }
    }

    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// What a fetch found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct FetchStats {
    /// Zone pages the service needs; files may share one.
    pub pages_needed: u64,
    /// Of these, pages that were on the node.
    pub pages_present: u64,
    /// Pages of the frames that were fetched. Frames come whole, so there may be some that were not asked for.
    pub pages_fetched: u64,
    /// Bytes of the blobs received.
    pub bytes_fetched: u64,
    /// Requests for them; a range that breaks off and is resumed is one.
    pub data_requests: u64,
}

/// Fetched pages becoming durable. Dropping it changes nothing: they still do, unless the process ends first, and then
/// they are fetched again some day.
#[derive(Debug)]
#[must_use = "a short-lived process waits for it before it ends"]
pub struct Commit(Option<JoinHandle<Result<(), RtpcError>>>);

impl Commit {
    /// Waits until a crash cannot take the pages away.
    pub async fn wait(self) -> Result<(), FetchError> {
        match self.0 {
            Some(task) => Ok(joined(task).await?),
            None => Ok(()),
        }
    }
}

/// Brings every page that `service` lacks into its `zone`: from the page services in `pages`, and by ranges from `store`
/// what they do not bring.
///
/// What was verified before an error stays usable.
pub async fn fetch(
    store: &Store,
    pages: &mut PageService,
    service: &Service,
    zone: &Arc<Zone>,
    progress: Progress<'_>,
) -> Result<(FetchStats, Commit), FetchError> {
    let arrivals = Arc::new(Arrivals::new(zone.missing()));
    fetch_announced(store, pages, service, zone, &arrivals, &Decoders::everywhere(), progress).await
}

/// Does what [`fetch`] does and tells `arrivals`, made of the pages that `zone` lacks, about every page; what they
/// demand comes first. Cancelled through them it ends early, without an error. However it ends, also by being
/// dropped, nobody waits any more.
pub async fn fetch_announced(
    store: &Store,
    pages: &mut PageService,
    service: &Service,
    zone: &Arc<Zone>,
    arrivals: &Arc<Arrivals>,
    decoders: &Decoders,
    progress: Progress<'_>,
) -> Result<(FetchStats, Commit), FetchError> {
    let _over = Over(arrivals);
    let pages_needed = zone.needed().count();
    let mut stats = FetchStats { pages_needed, pages_present: pages_needed, ..FetchStats::default() };
    if zone.missing().count() == 0 {
        return Ok((stats, Commit(None)));
    }
    let opened = zone.clone();
    let writer = tokio::select! {
        writer = joined(tokio::task::spawn_blocking(move || opened.writer())) => writer?,
        () = arrivals.cancelled() => return Ok((stats, Commit(None))),
    };
    let missing = writer.missing();
    stats.pages_present -= missing.count();
    for brought_by_another in arrivals.awaited().difference(&missing).runs() {
        arrivals.arrive(brought_by_another);
    }
    // An answer that is open was asked for before.
    let sources = pages.sources();
    let before = sources.requests() - u64::from(pages.is_open());
    let received = AtomicU64::new(0);
    let total = plan(service, &missing).iter().map(|r| r.bytes.end - r.bytes.start).sum();
    let count = |bytes| {
        let so_far = received.fetch_add(bytes, Ordering::Relaxed) + bytes;
        progress(so_far.min(total), total);
    };
    let injection = Arc::new(Injection {
        writer,
        arrivals: arrivals.clone(),
        pages: AtomicU64::new(0),
        sources: sources.clone(),
    });
    let answered = bring(store, pages, service, decoders, &injection, &count);
    let outcome = tokio::select! {
        biased;
        outcome = answered => outcome,
        // Demands may bring the last page while a planned answer is stuck.
        () = arrivals.complete() => Ok(()),
        () = arrivals.cancelled() => Ok(()),
    };
    pages.learn();
    stats.pages_fetched = injection.pages.load(Ordering::Relaxed);
    stats.bytes_fetched = received.into_inner();
    stats.data_requests = sources.requests() - before;
    let commit = Commit(Some(tokio::task::spawn_blocking(move || injection.writer.commit())));
    if let Err(error) = outcome {
        arrivals.fail(error.errno());
        // Whoever sees the error may end the process; the next one shall find what is here.
        commit.wait().await?;
        return Err(error);
    }
    Ok((stats, commit))
}

/// Bytes that a fetch of the `missing` pages would receive.
pub fn bytes_missing(service: &Service, missing: &PageBitmap) -> u64 {
    plan(service, missing).iter().map(|r| r.bytes.end - r.bytes.start).sum()
}

/// Ends every wait for pages that have not arrived.
struct Over<'a>(&'a Arrivals);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.fail(libc::EIO);
    }
}

/// Where fetched pages go: into the zone, and then to whoever waits for them.
struct Injection {
    writer: Writer,
    arrivals: Arc<Arrivals>,
    pages: AtomicU64,
    sources: Sources,
}

/// Pages that are brought by ranges or in whole segments, and counted as such.
struct Ranged {
    injection: Arc<Injection>,
    name: &'static str,
}

impl Sink for Ranged {
    fn asked(&self) {
        self.injection.sources.count(self.name, |used| used.requests += 1);
    }

    fn wants(&self, frame: &PlacedFrame) -> bool {
        self.injection.wants(frame)
    }

    fn accept(&self, frame: &PlacedFrame, pages: &[u8]) -> Result<(), FetchError> {
        if self.wants(frame) {
            self.injection.sources.count(self.name, |used| used.pages += u64::from(frame.frame.pages));
        }
        self.injection.accept(frame, pages)
    }
}

impl Sink for Injection {
    fn wants(&self, frame: &PlacedFrame) -> bool {
        self.arrivals.awaits(frame.pages.clone())
    }

    fn accept(&self, frame: &PlacedFrame, pages: &[u8]) -> Result<(), FetchError> {
        self.writer.inject(frame.pages.start, pages)?;
        // Counted first: with the last page the fetch is over.
        if self.wants(frame) {
            self.pages.fetch_add(frame.frame.pages.into(), Ordering::Relaxed);
        }
        self.arrivals.arrive(frame.pages.clone());
        Ok(())
    }
}

/// Brings what is missing: out of page services, by ranges, in whole segments, as far as each of them can. Beside the
/// first two, what a reader waits for is asked for apart.
async fn bring(
    store: &Store,
    pages: &mut PageService,
    service: &Service,
    decoders: &Decoders,
    injection: &Arc<Injection>,
    count: &impl Fn(u64),
) -> Result<(), FetchError> {
    let sink = |name| Arc::new(Ranged { injection: injection.clone(), name });
    let ranges = sink("ranges");
    let received = |bytes| {
        injection.sources.count("ranges", |used| used.bytes += bytes);
        count(bytes);
    };
    let missing = || injection.writer.missing();
    let streams = Streams::of_everything();
    tokio::select! {
        outcome = pages.fetch(service, missing, decoders, injection, count) => outcome?,
        never = demand::answer(store, service, &ranges, &streams, &received) => match never {},
    }
    let planned = plan(service, &missing());
    if planned.is_empty() {
        return Ok(());
    }
    let streams = Streams::of(&planned);
    let counted = |request, bytes| {
        streams.received(request, bytes);
        received(bytes);
    };
    let outcome = tokio::select! {
        outcome = answer_all(store, planned, decoders, &ranges, counted) => outcome,
        never = demand::answer(store, service, &ranges, &streams, &received) => match never {},
    };
    if !matches!(outcome, Err(FetchError::Oci(OciError::Range { .. }))) {
        return outcome;
    }
    tracing::warn!("the registry does not serve ranges: fetching whole segments");
    injection.sources.failed("ranges", "no_ranges");
    let counted = |_, bytes| {
        injection.sources.count("segments", |used| used.bytes += bytes);
        count(bytes);
    };
    answer_all(store, plan_whole(service, &missing()), decoders, &sink("segments"), counted).await
}

/// Reads `segments` from `store` as a whole, verifies every frame, and returns where each page content lies; of equal
/// pages, the first.
pub async fn page_hashes(
    store: &Store,
    segments: &[Segment],
    progress: Progress<'_>,
) -> Result<HashMap<ContentHash, u32>, FetchError> {
    #[derive(Default)]
    struct Hashes(Mutex<HashMap<ContentHash, u32>>);

    impl Sink for Hashes {
        fn accept(&self, frame: &PlacedFrame, pages: &[u8]) -> Result<(), FetchError> {
            let hashes: Vec<ContentHash> = pages.chunks(PAGE_SIZE).map(ContentHash::of).collect();
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            for (page, hash) in frame.pages.clone().zip(hashes) {
                let page = page as u32;
                all.entry(hash).and_modify(|first| *first = page.min(*first)).or_insert(page);
            }
            Ok(())
        }
    }

    let hashes = Arc::new(Hashes::default());
    let total = segments.iter().map(Segment::size).sum();
    let received = AtomicU64::new(0);
    let count = |_, bytes| progress(received.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
    answer_all(store, segments.iter().map(Request::whole).collect(), &Decoders::everywhere(), &hashes, count)
        .await?;
    let mut all = hashes.0.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(std::mem::take(&mut *all))
}

/// Sends the requests, a few at a time, and passes the frames they want to `sink`; tells `received` the place of a
/// request and the bytes that came for it.
async fn answer_all(
    store: &Store,
    requests: Vec<Request>,
    decoders: &Decoders,
    sink: &Arc<impl Sink>,
    received: impl Fn(usize, u64),
) -> Result<(), FetchError> {
    let received = &received;
    stream::iter(requests.iter().enumerate())
        .map(Ok)
        .try_for_each_concurrent(REQUESTS_AT_ONCE, |(place, request)| async move {
            sink.asked();
            let bytes = store.blob_range(&request.blob, request.size, request.bytes.clone()).await?;
            receive(request, bytes, decoders, sink, |bytes| received(place, bytes)).await
        })
        .await
}

async fn joined<T>(task: JoinHandle<T>) -> T {
    match task.await {
        Ok(value) => value,
        Err(e) => panic::resume_unwind(e.into_panic()),
    }
}
