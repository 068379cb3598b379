//! Frames out of a byte stream, while it arrives.
//!
//! Bytes come in at the speed of the wire; each wanted frame goes to a decoder, and from there to the sink, in any order.

use std::panic;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};
use tdfs_common::digest::Digest;
use tdfs_common::runtime_image::PlacedFrame;
use tokio::task::{JoinError, JoinSet};

use super::FetchError;
use super::decoders::{Decoders, Slot};
use super::frame::FrameError;
use super::plan::Request;

/// What is done with verified pages, on a blocking thread.
pub trait Sink: Send + Sync + 'static {
    /// A request for pages is sent.
    fn asked(&self) {}

    /// Whether the pages of a frame are of use; they may have come another way since the request was planned.
    fn wants(&self, _frame: &PlacedFrame) -> bool {
        true
    }

    /// Takes the verified pages of a frame.
    fn accept(&self, frame: &PlacedFrame, pages: &[u8]) -> Result<(), FetchError>;
}

/// Passes the wanted frames of `request` to `sink`, out of the stream that answers it.
///
/// On an error every frame accepted before stays accepted; none is accepted after this returns.
pub async fn receive<S, E>(
    request: &Request,
    stream: S,
    decoders: &Decoders,
    sink: &Arc<impl Sink>,
    received: impl Fn(u64),
) -> Result<(), FetchError>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    FetchError: From<E>,
{
    let mut jobs = JoinSet::new();
    let mut outcome = cut(request, stream, decoders, sink, &mut jobs, received).await;
    while let Some(job) = jobs.join_next().await {
        outcome = outcome.and(finished(job));
    }
    outcome
}

async fn cut<S, E>(
    request: &Request,
    stream: S,
    decoders: &Decoders,
    sink: &Arc<impl Sink>,
    jobs: &mut JoinSet<Result<(), FetchError>>,
    received: impl Fn(u64),
) -> Result<(), FetchError>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    FetchError: From<E>,
{
    let mut incoming = Incoming::new(stream, received);
    for planned in &request.frames {
        let slot = if planned.wanted { Some(decoders.slot().await) } else { None };
        let len = planned.placed.frame.len as usize;
        let bytes = incoming.take(len, planned.wanted).await?;
        let bytes = bytes.map_err(|got| {
            let reason = format!("the answer ends after {got} of its {len} bytes");
            FetchError::Frame { segment: request.blob, frame: planned.placed.index, reason }
        })?;
        if let Some(slot) = slot {
            jobs.spawn(accept(slot, request.blob, planned.placed.clone(), bytes, sink.clone()));
        }
        while let Some(job) = jobs.try_join_next() {
            finished(job)?;
        }
    }
    // The end of a whole blob carries the verdict on its digest.
    if incoming.take(1, false).await?.is_ok() {
        return Err(FetchError::TooLong { segment: request.blob, bytes: request.bytes.clone() });
    }
    Ok(())
}

async fn accept(
    slot: Slot,
    segment: Digest,
    placed: PlacedFrame,
    bytes: Bytes,
    sink: Arc<impl Sink>,
) -> Result<(), FetchError> {
    slot.decode(move |decoder| {
        if !sink.wants(&placed) {
            return Ok(());
        }
        let failed =
            |e: FrameError| FetchError::Frame { segment, frame: placed.index, reason: e.to_string() };
        let pages = decoder.decode(&placed.frame, &bytes).map_err(failed)?;
        sink.accept(&placed, pages)
    })
    .await
}

/// What a job came to; its panic goes on here.
pub fn finished(job: Result<Result<(), FetchError>, JoinError>) -> Result<(), FetchError> {
    match job {
        Ok(outcome) => outcome,
        Err(e) => panic::resume_unwind(e.into_panic()),
    }
}

/// A byte stream read in pieces of our choice.
pub struct Incoming<S, F> {
    stream: S,
    chunk: Bytes,
    received: F,
}

impl<S, E, F> Incoming<S, F>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    FetchError: From<E>,
    F: Fn(u64),
{
    /// Reads `stream` and tells `received` about every piece of it.
    pub fn new(stream: S, received: F) -> Self {
        Self { stream, chunk: Bytes::new(), received }
    }

    /// The next `len` bytes, or none of them unless they are to be kept; `Err` with the number of bytes there were
    /// before the stream ended.
    pub async fn take(&mut self, len: usize, keep: bool) -> Result<Result<Bytes, usize>, FetchError> {
        let mut kept = BytesMut::new();
        let mut got = 0;
        loop {
            let piece = self.chunk.split_to(self.chunk.len().min(len - got));
            got += piece.len();
            if keep && got == len && kept.is_empty() {
                return Ok(Ok(piece));
            }
            if keep {
                kept.reserve(len - kept.len());
                kept.extend_from_slice(&piece);
            }
            if got == len {
                return Ok(Ok(kept.freeze()));
            }
            match self.stream.next().await {
                Some(chunk) => self.chunk = chunk?,
                None => return Ok(Err(got)),
            }
            (self.received)(self.chunk.len() as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::stream;
    use proptest::prelude::*;
    use tdfs_common::page::PAGE_SIZE;
    use tdfs_common::runtime_image::{Segment, Service};

    use super::super::frame::encode;
    use super::super::plan::plan;
    use super::*;

    #[derive(Default)]
    struct Collect(Mutex<BTreeMap<u64, Vec<u8>>>);

    impl Sink for Collect {
        fn accept(&self, frame: &PlacedFrame, pages: &[u8]) -> Result<(), FetchError> {
            let mut all = self.0.lock().unwrap();
            for (page, bytes) in frame.pages.clone().zip(pages.chunks(PAGE_SIZE)) {
                assert_eq!(all.insert(page, bytes.to_vec()), None);
            }
            Ok(())
        }
    }

    /// A segment of `sizes.len()` frames at zone page 5, its blob, and its pages.
    fn segment(sizes: &[usize]) -> (Service, Vec<u8>, Vec<Vec<u8>>) {
        let (mut blob, mut pages, mut frames) = (Vec::new(), Vec::new(), Vec::new());
        for (n, &count) in sizes.iter().enumerate() {
            let mut raw = vec![n as u8; count * PAGE_SIZE];
            blake3::Hasher::new().update(&[n as u8]).finalize_xof().fill(&mut raw[..count * 1000 + 500]);
            let (frame, bytes) = encode(&raw, 1).unwrap();
            frames.push(frame);
            blob.extend(bytes);
            pages.extend(raw.chunks(PAGE_SIZE).map(<[u8]>::to_vec));
        }
        let segments = vec![Segment { blob: Digest::of(&blob), base: 5, frames }];
        let service = Service {
            group: "g".into(),
            service: "s".into(),
            image: Digest::of(b""),
            args: None,
            ready: "exit".into(),
            segments,
            runs: Vec::new(),
        };
        (service, blob, pages)
    }

    fn run(request: &Request, answer: &[u8], chunk: usize) -> (Result<(), FetchError>, Arc<Collect>, u64) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let chunks = answer.chunks(chunk).map(|c| Ok::<_, FetchError>(Bytes::copy_from_slice(c)));
        let chunks: Vec<_> = chunks.collect();
        let sink = Arc::new(Collect::default());
        let total = AtomicU64::new(0);
        let decoders = Decoders::new(1, 2);
        let count = |n| {
            total.fetch_add(n, Ordering::Relaxed);
        };
        let outcome = runtime.block_on(receive(request, stream::iter(chunks), &decoders, &sink, count));
        assert_eq!(decoders.free(), 2);
        (outcome, sink, total.into_inner())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn cuts_wanted_frames_out_of_any_chunks(
            sizes in proptest::collection::vec(1usize..=64, 1..8),
            wanted in proptest::collection::vec(any::<bool>(), 8),
            chunk in 1usize..300_000,
        ) {
            let (service, blob, pages) = segment(&sizes);
            let mut missing = tdfs_common::bitmap::PageBitmap::new(service.zone_pages());
            for (placed, _) in service.segments[0].placed().zip(&wanted).filter(|(_, w)| **w) {
                missing.insert(placed.pages.start);
            }
            let mut seen = BTreeMap::new();
            for request in plan(&service, &missing) {
                let answer = &blob[request.bytes.start as usize..request.bytes.end as usize];
                let (outcome, sink, received) = run(&request, answer, chunk);
                outcome.unwrap();
                prop_assert_eq!(received, answer.len() as u64);
                seen.append(&mut sink.0.lock().unwrap());
            }
            let expected = service.segments[0].placed().zip(&wanted).filter(|(_, w)| **w);
            let expected: BTreeMap<u64, Vec<u8>> = expected
                .flat_map(|(placed, _)| placed.pages)
                .map(|p| (p, pages[p as usize - 5].clone()))
                .collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn exposes_nothing_of_a_damaged_frame(
            sizes in proptest::collection::vec(1usize..=64, 1..6),
            at in any::<proptest::sample::Index>(),
            flip in 1u8..,
            kind in 0..4,
        ) {
            let (service, blob, pages) = segment(&sizes);
            let mut missing = tdfs_common::bitmap::PageBitmap::new(service.zone_pages());
            missing.insert_range(service.segments[0].zone_range());
            let request = &plan(&service, &missing)[0];
            let mut answer = blob.clone();
            let at = at.index(blob.len());
            match kind {
                0 => answer[at] ^= flip,
                1 => answer.truncate(at),
                2 => answer.insert(at, flip),
                _ => answer.push(flip),
            }
            let (outcome, sink, _) = run(request, &answer, 70_000);
            if let Err(e) = outcome {
                let text = e.to_string();
                prop_assert!(text.contains(&request.blob.to_string()) && !text.contains('\n'), "{}", text);
            } else {
                // A bit that zstd ignores.
                prop_assert_eq!(kind, 0);
                prop_assert_eq!(sink.0.lock().unwrap().len(), pages.len());
            }
            for (page, bytes) in &*sink.0.lock().unwrap() {
                prop_assert_eq!(bytes, &pages[*page as usize - 5]);
            }
        }
    }
}
