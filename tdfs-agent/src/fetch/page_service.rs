//! The page service as a node uses it: metadata and missing pages out of one answer, and again when it breaks off.
//!
//! ```text
//! metadata()  POST: reference, what all zones hold -> manifests, metadata | plan, frames...   the answer stays open
//! fetch()     frames of the open answer -> verify -> sink
//!             broken off, stalled, incomplete -> POST: image and artifact by digest, what the zone holds now
//! ```
//!
//! Sources are the page services of the mirrors, then the registry's. One that has none is not asked again for a day.
//! A failure that may pass (the connection breaks, nothing or next to nothing arrives for [`PATIENCE`], the server is
//! busy) costs another request for what is then still missing; after [`FRUITLESS_MAX`] in a row that brought nothing,
//! or [`TRIES_MAX`] in all, the source is left. One that sends a byte that is not what it should be, or a page nobody
//! asked for, is left at once and for the whole start. Whoever calls then goes on with ranges of the segments; only what
//! fails on this machine, such as a full disk, is an error.
//!
//! Bytes come in at the speed of the wire and go through the [`Decoders`]. Pages are given to the sink only when their
//! frame's hash, or a cut's proof, leads to what the service metadata says.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use tdfs_common::bitmap::PageBitmap;
use tdfs_common::digest::Digest;
use tdfs_common::envelope::encode;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::proof::{self, PageSet};
use tdfs_common::runtime_image::{Frame, PlacedFrame, Segment, Service};
use tdfs_common::wire::{
    FrameAt, HEAD_LEN, HELD_MAX, Head, Held, HeldPages, Kind, Part, Reason, Request, STREAM_HEADER_LEN,
    Wanted, blob_body, check_stream_header, cut_body,
};
use tokio::task::JoinSet;

use super::FetchError;
use super::decoders::Decoders;
use super::experience::{Experience, Sample};
use super::frame::Decoder;
use super::receive::{Incoming, Sink, finished};
use super::sources::Sources;
use crate::oci::{ByteStream, ClientOptions, OciError, Pace, PageAnswer, PageSource, Store};

/// How long a page service may make no progress.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests in a row that bring nothing.
const FRUITLESS_MAX: u32 = 3;
/// Requests to one source.
const TRIES_MAX: u32 = 16;
/// The longest pause between two requests.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Indexes of an answer.
const INDEXES_MAX: usize = 4;

/// The page services for one start; by default there are none.
#[derive(Default)]
pub struct PageService {
    /// Still to be used, the first one now.
    sources: VecDeque<PageSource>,
    experience: Experience,
    patience: Duration,
    backoff: Duration,
    /// Image and artifact.
    about: Option<(Digest, Digest)>,
    opened: Option<Answer>,
    /// What all sources of the start did.
    used: Sources,
    /// Answers that came.
    answers: u64,
    decoding: Arc<Measure>,
    waited: Arc<Measure>,
}

/// The metadata an answer brought, by digest; nothing else is verified yet.
#[derive(Default)]
pub struct Metadata {
    /// Content by digest.
    pub blobs: HashMap<Digest, Bytes>,
    /// What the reference names: the image manifest, or an index on the way to it.
    pub document: Option<Digest>,
    /// The artifact manifest of the runtime image, if there is one.
    pub artifact: Option<Digest>,
}

/// Why an answer is of no more use.
enum Fault {
    /// Asking again may help.
    Passing(&'static str, String),
    /// It will not.
    Final(&'static str, String),
    /// Nothing is wrong with the source.
    Local(FetchError),
}

/// An answer that is being read.
struct Answer {
    incoming: Incoming<ByteStream, fn(u64)>,
}

/// Bytes, and the nanoseconds they took.
#[derive(Default)]
struct Measure {
    bytes: AtomicU64,
    nanos: AtomicU64,
}

impl PageService {
    /// The page services beside the repository of `store` that are worth asking.
    pub fn open(store: &Store, state: &Path, options: &ClientOptions) -> Self {
        if !options.page_service {
            return Self::default();
        }
        let experience = Experience::load(state);
        let sources = store.page_sources().into_iter().filter(|s| !experience.is_absent(&s.host()));
        Self {
            sources: sources.collect(),
            experience,
            patience: options.idle_timeout.min(PATIENCE),
            backoff: options.backoff,
            ..Self::default()
        }
    }

    /// Asks for an image, and reads the answer up to its pages. `None` when no source has one; the caller then finds
    /// the image in another way.
    pub async fn metadata(&mut self, wanted: &Wanted, held: &[Held]) -> Option<Metadata> {
        let mut tries = 0;
        while let Some(source) = self.sources.front() {
            let needs_artifact = source.is_mirror();
            let outcome = async {
                let mut answer = self.ask(wanted.clone(), held.to_vec()).await?;
                let (metadata, more) = answer.metadata().await?;
                if needs_artifact && metadata.artifact.is_none() {
                    return Err(Fault::Final("incomplete", "a mirror without runtime images".into()));
                }
                Ok((metadata, more.then_some(answer)))
            };
            match outcome.await {
                Ok((metadata, answer)) => {
                    self.opened = answer;
                    return Some(metadata);
                }
                Err(fault) => {
                    tries += 1;
                    match self.failed(fault, tries, FRUITLESS_MAX).await {
                        Ok(true) => tries = 0,
                        Ok(false) => {}
                        // A fault of this machine will show again where it cannot be avoided.
                        Err(_) => return None,
                    }
                }
            }
        }
        None
    }

    /// What pages are of from now on.
    pub fn about(&mut self, image: Digest, artifact: Digest) {
        self.about = Some((image, artifact));
    }

    /// The source that is used now sent something wrong.
    pub fn distrust(&mut self, error: &dyn std::fmt::Display) {
        self.opened = None;
        self.leave("wrong", &error.to_string());
    }

    /// Whether an answer is waiting to be read.
    pub fn is_open(&self) -> bool {
        self.opened.is_some()
    }

    /// What all sources of the start did.
    pub fn sources(&self) -> Sources {
        self.used.clone()
    }

    /// Answers that came, read or not.
    pub fn answers(&self) -> u64 {
        self.answers
    }

    /// How long it should take to bring `pages` bytes of pages in `stored` bytes, by what was measured in earlier starts or,
    /// without any, by how the metadata came.
    pub fn expected(&self, stored: u64, pages: u64) -> Duration {
        self.experience.expected(stored, pages, self.waited.sample())
    }

    /// Remembers what was measured.
    pub(super) fn learn(&mut self) {
        if self.answers > 0 {
            self.experience.measured(self.decoding.sample(), self.waited.sample());
        }
    }

    /// Brings pages of `service` to `sink` until `missing` says that there are none missing, or no source is left.
    pub(super) async fn fetch(
        &mut self,
        service: &Service,
        missing: impl Fn() -> PageBitmap,
        decoders: &Decoders,
        sink: &Arc<impl Sink>,
        received: &impl Fn(u64),
    ) -> Result<(), FetchError> {
        let Some((image, artifact)) = self.about else { return Ok(()) };
        let needed = service.needed();
        let frames: Vec<Vec<PlacedFrame>> = service.segments.iter().map(|s| s.placed().collect()).collect();
        let (mut tries, mut fruitless) = (0, 0);
        loop {
            let lacking = missing();
            if lacking.count() == 0 || self.sources.is_empty() {
                break;
            }
            let name = self.name();
            let expected = Expected { service, needed: &needed, frames: &frames, decoders };
            let account = Account { name, used: self.used.clone(), decoding: self.decoding.clone() };
            let outcome = async {
                let mut answer = if let Some(answer) = self.opened.take() {
                    answer
                } else {
                    let held = held(&service.segments, &needed, &lacking);
                    self.ask(Wanted::Pages { image, artifact }, held).await?
                };
                answer.pages(&expected, sink, &account, received).await?;
                if missing().count() > 0 {
                    return Err(Fault::Passing("incomplete", "an answer without all pages".into()));
                }
                Ok(())
            };
            let Err(fault) = outcome.await else { continue };
            tries += 1;
            fruitless = if missing().count() < lacking.count() { 0 } else { fruitless + 1 };
            let limit = if tries >= TRIES_MAX { 0 } else { FRUITLESS_MAX };
            if self.failed(fault, fruitless, limit).await? {
                (tries, fruitless) = (0, 0);
            }
        }
        Ok(())
    }

    /// Counts a fault, and leaves the source, which is then true, or waits before it is asked again.
    async fn failed(&mut self, fault: Fault, fruitless: u32, limit: u32) -> Result<bool, FetchError> {
        match fault {
            Fault::Local(error) => Err(error),
            Fault::Final(reason, error) => {
                self.leave(reason, &error);
                Ok(true)
            }
            Fault::Passing(reason, error) if fruitless >= limit => {
                self.leave(reason, &error);
                Ok(true)
            }
            Fault::Passing(reason, error) => {
                tracing::warn!(source = self.name(), "asking again: {error}");
                self.used.failed(self.name(), reason);
                tokio::time::sleep((self.backoff * (1 << fruitless.min(8))).min(PAUSE_MAX)).await;
                Ok(false)
            }
        }
    }

    fn leave(&mut self, reason: &'static str, error: &str) {
        if reason == "absent" {
            // Most registries have none.
            tracing::debug!(source = self.name(), "no page service: {error}");
        } else {
            tracing::warn!(source = self.name(), reason, "page service is left: {error}");
        }
        self.used.failed(self.name(), reason);
        self.sources.pop_front();
    }

    fn name(&self) -> &'static str {
        if self.sources.front().is_some_and(PageSource::is_mirror) { "mirror" } else { "page_service" }
    }

    async fn ask(&mut self, wanted: Wanted, held: Vec<Held>) -> Result<Answer, Fault> {
        let refused = |e: String| Fault::Final("refused", e);
        let Some(source) = self.sources.front().cloned() else { return Err(refused("no source".into())) };
        let request = Request { wanted, held, encoding: self.experience.encoding() };
        let body = encode(&request).map_err(|e| refused(e.to_string()))?;
        self.used.count(self.name(), |used| used.requests += 1);
        match source.ask(body.into()).await? {
            PageAnswer::Stream(stream) => {
                self.answers += 1;
                Answer::open(paced(stream, self.patience, self.waited.clone())).await
            }
            PageAnswer::Absent => {
                self.experience.absent(&source.host());
                Err(Fault::Final("absent", format!("{} has no page service", source.host())))
            }
        }
    }
}

impl From<OciError> for Fault {
    fn from(error: OciError) -> Self {
        let text = error.to_string();
        match error {
            OciError::Idle { .. } => Self::Passing("stalled", text),
            OciError::Transport { .. } => Self::Passing("broken", text),
            OciError::Status { status: 429 | 503, .. } => Self::Passing("busy", text),
            OciError::Status { status: 500.., .. } => Self::Passing("unavailable", text),
            OciError::Denied { .. } => Self::Final("denied", text),
            _ => Self::Final("refused", text),
        }
    }
}

impl From<FetchError> for Fault {
    fn from(error: FetchError) -> Self {
        match error {
            FetchError::Oci(error) => error.into(),
            FetchError::Frame { .. } => Self::Final("wrong", error.to_string()),
            error => Self::Local(error),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "errors and literals are passed as they come")]
fn wrong(error: impl ToString) -> Fault {
    Fault::Final("wrong", error.to_string())
}

/// What the answer to a request for pages may hold.
struct Expected<'a> {
    service: &'a Service,
    needed: &'a PageBitmap,
    /// Of each segment.
    frames: &'a [Vec<PlacedFrame>],
    decoders: &'a Decoders,
}

/// Where what an answer brings is counted.
#[derive(Clone)]
struct Account {
    name: &'static str,
    used: Sources,
    decoding: Arc<Measure>,
}

/// A unit with pages, to be verified.
struct Job {
    segment: Digest,
    placed: PlacedFrame,
    set: PageSet,
    /// Chaining values of a cut.
    values: usize,
    plain: bool,
    body: Bytes,
}

impl Answer {
    async fn open(stream: ByteStream) -> Result<Self, Fault> {
        let mut answer = Self { incoming: Incoming::new(stream, (|_| {}) as fn(u64)) };
        let header = answer.body(STREAM_HEADER_LEN).await?;
        let header = header.first_chunk().ok_or_else(|| wrong("no header"))?;
        check_stream_header(header).map_err(wrong)?;
        Ok(answer)
    }

    async fn body(&mut self, len: usize) -> Result<Bytes, Fault> {
        let body = self.incoming.take(len, true).await?;
        body.map_err(|_| Fault::Passing("broken", "the answer has no end".into()))
    }

    async fn head(&mut self) -> Result<Head, Fault> {
        let bytes = self.body(HEAD_LEN).await?;
        let bytes = bytes.first_chunk().ok_or_else(|| wrong("no head"))?;
        Head::decode(bytes).map_err(wrong)
    }

    async fn end(&mut self, reason: Reason, len: usize) -> Result<(), Fault> {
        let message = self.body(len).await?;
        match reason {
            Reason::Complete => Ok(()),
            // Ranges of the same storage may still be readable.
            Reason::Unavailable | Reason::Damaged => {
                Err(Fault::Final("stopped", String::from_utf8_lossy(&message).replace('\n', " ")))
            }
        }
    }

    /// The blobs before the pages, and whether pages follow.
    async fn metadata(&mut self) -> Result<(Metadata, bool), Fault> {
        let mut metadata = Metadata::default();
        let mut seen: Vec<Part> = Vec::new();
        loop {
            let head = self.head().await?;
            let (part, media_type_len) = match head.kind {
                Kind::Blob { part, media_type_len } => (part, media_type_len),
                Kind::Plan(_) => return Ok((metadata, true)),
                Kind::End(reason) => {
                    self.end(reason, head.len).await?;
                    return Ok((metadata, false));
                }
                Kind::Frame { .. } | Kind::Cut { .. } => return Err(wrong("pages before their plan")),
            };
            let times = seen.iter().filter(|p| **p == part).count();
            if times >= if part == Part::Index { INDEXES_MAX } else { 1 } {
                return Err(wrong("a blob twice"));
            }
            seen.push(part);
            let body = self.body(head.len).await?;
            let (expected, _, content) = blob_body(media_type_len, &body).map_err(wrong)?;
            let content = body.slice_ref(content);
            let hashed = content.clone();
            let got = super::joined(tokio::task::spawn_blocking(move || Digest::of(&hashed))).await;
            if got != expected {
                return Err(wrong(format!("{expected}: content has digest {got}")));
            }
            metadata.blobs.insert(got, content);
            match part {
                Part::Index | Part::Image => metadata.document = metadata.document.or(Some(got)),
                Part::Artifact => metadata.artifact = Some(got),
                _ => {}
            }
        }
    }

    /// Passes the pages to `sink`. On an error every page accepted before stays accepted; none is accepted after this
    /// returns.
    async fn pages(
        &mut self,
        expected: &Expected<'_>,
        sink: &Arc<impl Sink>,
        account: &Account,
        received: &impl Fn(u64),
    ) -> Result<(), Fault> {
        let mut jobs = JoinSet::new();
        let mut outcome = self.units(expected, sink, account, received, &mut jobs).await;
        while let Some(job) = jobs.join_next().await {
            let job = finished(job).map_err(Fault::from);
            // That bytes were wrong says more than that they ended.
            outcome =
                if matches!(outcome, Err(Fault::Passing(..))) { job.and(outcome) } else { outcome.and(job) };
        }
        outcome
    }

    async fn units(
        &mut self,
        expected: &Expected<'_>,
        sink: &Arc<impl Sink>,
        account: &Account,
        received: &impl Fn(u64),
        jobs: &mut JoinSet<Result<(), FetchError>>,
    ) -> Result<(), Fault> {
        let mut seen = HashSet::new();
        loop {
            let head = self.head().await?;
            let (at, cut, plain) = match head.kind {
                Kind::Frame { at, plain } => (at, None, plain),
                Kind::Cut { at, set, values, plain } => (at, Some((set, values)), plain),
                Kind::Plan(_) => continue,
                Kind::Blob { .. } => return Err(wrong("a blob among pages")),
                Kind::End(reason) => return self.end(reason, head.len).await,
            };
            let (segment, placed, set) = expected.unit(at, cut.map(|(set, _)| set))?;
            if !seen.insert(at) {
                return Err(wrong("a frame twice"));
            }
            let slot = expected.decoders.slot().await;
            let body = self.body(head.len).await?;
            received(head.len as u64);
            account.used.count(account.name, |used| used.bytes += head.len as u64);
            let values = cut.map_or(0, |(_, values)| values);
            let job = Job { segment, placed, set, values, plain, body };
            let (sink, account) = (sink.clone(), account.clone());
            jobs.spawn(slot.decode(move |decoder| job.run(decoder, &*sink, &account)));
            while let Some(job) = jobs.try_join_next() {
                finished(job)?;
            }
        }
    }
}

impl Expected<'_> {
    /// The frame at `at` of which `cut`, or everything, is sent; an error where the service does not need all that.
    fn unit(&self, at: FrameAt, cut: Option<PageSet>) -> Result<(Digest, PlacedFrame, PageSet), Fault> {
        let frames = self.frames.get(at.segment as usize).ok_or_else(|| wrong("no such segment"))?;
        let placed = frames.get(at.frame as usize).ok_or_else(|| wrong("no such frame"))?;
        let all = proof::all(placed.frame.pages);
        let set = cut.unwrap_or(all);
        let wanted = |(n, page): (usize, u64)| set >> n & 1 == 0 || self.needed.contains(page);
        if set & !all != 0 || !placed.pages.clone().enumerate().all(wanted) {
            return Err(wrong("pages nobody asked for"));
        }
        Ok((self.service.segments[at.segment as usize].blob, placed.clone(), set))
    }
}

impl Job {
    /// Verifies the pages and gives them to `sink`.
    fn run(self, decoder: &mut Decoder, sink: &impl Sink, account: &Account) -> Result<(), FetchError> {
        let failed =
            |reason: String| FetchError::Frame { segment: self.segment, frame: self.placed.index, reason };
        let begin = Instant::now();
        let frame = &self.placed.frame;
        let whole = self.set == proof::all(frame.pages) && self.values == 0;
        let pages = if whole && !self.plain {
            decoder.decode(frame, &self.body)
        } else {
            let (values, bytes) = cut_body(self.values, &self.body).map_err(|e| failed(e.to_string()))?;
            decoder.cut(frame, self.set, &values, self.plain, bytes)
        };
        let pages = pages.map_err(|e| failed(e.to_string()))?;
        if !self.plain {
            account.decoding.add(pages.len() as u64, begin.elapsed());
        }
        // Counted first: with the last page the fetch is over.
        account.used.count(account.name, |used| used.pages += u64::from(self.set.count_ones()));
        let mut rest = pages;
        for run in runs(self.set) {
            let (bytes, after) = rest.split_at((run.end - run.start) as usize * PAGE_SIZE);
            rest = after;
            let first = self.placed.pages.start + u64::from(run.start);
            let pages = run.end - run.start;
            let part = PlacedFrame {
                frame: Frame { pages, ..self.placed.frame },
                pages: first..first + u64::from(pages),
                ..self.placed.clone()
            };
            sink.accept(&part, bytes)?;
        }
        Ok(())
    }
}

/// The set as runs of consecutive pages.
fn runs(set: PageSet) -> impl Iterator<Item = std::ops::Range<u32>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = set.checked_shr(at).filter(|rest| *rest != 0)?;
        let start = at + rest.trailing_zeros();
        at = start + (set >> start).trailing_ones();
        Some(start..at)
    })
}

/// What is needed of `segments` and not missing.
fn held(segments: &[Segment], needed: &PageBitmap, missing: &PageBitmap) -> Vec<Held> {
    let held = |segment: &Segment| {
        let mut pages = PageBitmap::new(segment.pages());
        let here = segment.zone_range().filter(|page| needed.contains(*page) && !missing.contains(*page));
        here.for_each(|page| pages.insert(page - segment.base));
        (pages.count() > 0).then(|| Held { segment: segment.blob, pages: HeldPages::Some(pages.to_bytes()) })
    };
    segments.iter().filter_map(held).take(HELD_MAX).collect()
}

/// `stream`, ended by an error when it makes no progress for `patience`.
fn paced(stream: ByteStream, patience: Duration, waited: Arc<Measure>) -> ByteStream {
    let state = (stream, Pace::new(patience));
    Box::pin(stream::try_unfold(state, move |(mut stream, mut pace)| {
        let waited = waited.clone();
        async move {
            let begin = Instant::now();
            let Some(piece) = pace.next(&mut stream).await else {
                return Err(OciError::Idle { url: "page service".into(), after: patience });
            };
            let Some(piece) = piece.transpose()? else { return Ok(None) };
            waited.add(piece.len() as u64, begin.elapsed());
            Ok(Some((piece, (stream, pace))))
        }
    }))
}

impl Measure {
    fn add(&self, bytes: u64, time: Duration) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.nanos.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    fn sample(&self) -> Sample {
        let seconds = self.nanos.load(Ordering::Relaxed) as f64 / 1e9;
        Sample { bytes: self.bytes.load(Ordering::Relaxed), seconds }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_the_set(set in prop_oneof![any::<u64>(), Just(u64::MAX), Just(1 << 63), Just(0)]) {
            let all: Vec<_> = runs(set).collect();
            let united = all.iter().cloned().flatten().fold(0u64, |bits, n| bits | 1 << n);
            prop_assert_eq!(united, set);
            prop_assert!(all.windows(2).all(|w| w[0].end < w[1].start));
        }
    }
}
