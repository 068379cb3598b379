//! Demands: the pages that somebody waits for overtake the rest.
//!
//! A demand becomes a request of its own for just the frames that hold its pages, unless a running answer is about to
//! bring them: then the answer gets [`NEAR_WAIT`] to do so, since it may be stuck. A demand that cannot be answered is
//! left to the planned requests, which bring every page anyway and whose failure is the fetch's.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tdfs_common::bitmap::PageBitmap;
use tdfs_common::digest::Digest;
use tdfs_common::runtime_image::Service;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::decoders::Decoders;
use super::plan::{Request, plan_exactly};
use super::receive::{Sink as _, receive};
use super::{FetchError, Ranged};
use crate::oci::Store;

/// Demanded requests under way at the same time.
const DEMANDS_AT_ONCE: usize = 8;
/// Bytes ahead of a running answer that it brings sooner than a new request would.
const NEAR: u64 = 512 << 10;
/// How long a running answer may take for that.
const NEAR_WAIT: Duration = Duration::from_millis(250);

/// The planned requests, and how far the answer to each has come.
pub struct Streams {
    planned: Vec<Stream>,
    /// Whether there is an answer that brings everything in order of first use: it may do so with any page.
    everything: bool,
}

struct Stream {
    blob: Digest,
    bytes: Range<u64>,
    received: AtomicU64,
}

impl Streams {
    /// None of `requests` has an answer yet.
    pub fn of(requests: &[Request]) -> Self {
        let stream =
            |r: &Request| Stream { blob: r.blob, bytes: r.bytes.clone(), received: AtomicU64::new(0) };
        Self { planned: requests.iter().map(stream).collect(), everything: false }
    }

    /// One answer is about to bring every page.
    pub fn of_everything() -> Self {
        Self { planned: Vec::new(), everything: true }
    }

    /// `bytes` more came for the request at `place`.
    pub fn received(&self, place: usize, bytes: u64) {
        self.planned[place].received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether a running answer has just brought what `request` asks for, or is about to.
    fn near(&self, request: &Request) -> bool {
        self.everything
            || self.planned.iter().any(|s| {
                let received = s.received.load(Ordering::Relaxed);
                let reach = s.bytes.end.min(s.bytes.start + received + NEAR);
                let inside = s.bytes.start <= request.bytes.start && request.bytes.end <= reach;
                received > 0 && s.blob == request.blob && inside
            })
    }
}

/// Answers the demands of `sink`'s arrivals for as long as it is polled.
pub async fn answer(
    store: &Store,
    service: &Service,
    sink: &Arc<Ranged>,
    streams: &Streams,
    received: &impl Fn(u64),
) -> Infallible {
    let requests = Semaphore::new(DEMANDS_AT_ONCE);
    let decoders = Decoders::new(DEMANDS_AT_ONCE, DEMANDS_AT_ONCE);
    let (requests, decoders) = (&requests, &decoders);
    let overtake = |request: Request| async move {
        let pages: Vec<Range<u64>> = request.frames.iter().map(|f| f.placed.pages.clone()).collect();
        let arrivals = &sink.injection.arrivals;
        if streams.near(&request) && timeout(NEAR_WAIT, arrivals.expect(&pages)).await.is_ok() {
            return Ok(());
        }
        // The semaphore is never closed.
        let _one_of_a_few = requests.acquire().await.ok();
        if !pages.iter().any(|p| arrivals.awaits(p.clone())) {
            return Ok(());
        }
        sink.asked();
        let bytes = store.blob_range(&request.blob, request.size, request.bytes.clone()).await?;
        receive(&request, bytes, decoders, sink, received).await
    };
    let mut asked = PageBitmap::new(service.zone_pages());
    let mut answers = FuturesUnordered::new();
    loop {
        tokio::select! {
            demands = sink.injection.arrivals.demands() => {
                let awaited = sink.injection.arrivals.awaited();
                let mut wanted = PageBitmap::new(service.zone_pages());
                demands.into_iter().flatten().filter(|p| awaited.contains(*p) && !asked.contains(*p))
                    .for_each(|page| wanted.insert(page));
                for request in plan_exactly(service, &wanted) {
                    request.frames.iter().for_each(|f| asked.insert_range(f.placed.pages.clone()));
                    answers.push(overtake(request));
                }
            }
            Some(answered) = answers.next() => {
                let answered: Result<(), FetchError> = answered;
                if let Err(error) = answered {
                    tracing::debug!("a demand is left to the planned requests: {error}");
                }
            }
        }
    }
}
