//! The stream, as fast as the node takes it.
//!
//! ```text
//! chains of the plan -> stored frame -> [cut or plain: decompress, verify, encode] -> queue -> socket
//!                                        LOOKAHEAD frames, in their order
//! ```
//!
//! Frames are encoded on blocking threads, a few ahead of the socket, by as many as all requests together may have.
//! A frame that was asked for plain goes as it is stored when all of them are busy.
//!
//! So one answer holds at most three times a frame's pages (stored, decompressed, encoded) for each frame ahead, the
//! pieces in the queue, and a piece of storage for each open range: with pieces of up to 256 KiB, 6 MiB.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tdfs_common::digest::Digest;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::proof;
use tdfs_common::runtime_image::Service;
use tdfs_common::wire::{Encoding, Head, Kind, MESSAGE_MAX, Reason, stream_header};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::plan::{Chain, Plan, Step};
use super::resolve::Resolved;
use super::{ContentError, PageService};
use crate::fetch::frame::Decoder;
use crate::oci::Descriptor;

/// Pieces between the reader of segments and the socket.
pub const QUEUE: usize = 4;
/// Frames that are encoded ahead.
const LOOKAHEAD: usize = 4;
/// zstd level of cut frames: they are made while a node waits.
const CUT_LEVEL: i32 = 1;

/// Why a stream is broken off.
pub enum Gone {
    /// The node has gone, or does not read.
    Reader,
    /// A blob that was begun cannot be read to its end.
    Content(ContentError),
}

/// Sends one answer.
pub struct Sender<'a> {
    pub service: &'a PageService,
    pub repository: &'a str,
    pub to: mpsc::Sender<Bytes>,
}

/// A unit, now or later.
enum Work {
    Done(Unit),
    Encoding(JoinHandle<Result<Unit, String>>),
}

struct Unit {
    head: Bytes,
    body: Bytes,
}

impl Sender<'_> {
    /// Sends everything; a reason that lies in the storage is sent as well.
    pub async fn send(&self, resolved: &Resolved, plan: Plan, encoding: Encoding) -> Result<(), Gone> {
        self.piece(Bytes::copy_from_slice(&stream_header())).await?;
        for (part, document) in &resolved.documents {
            let bytes = document.bytes.clone();
            let Some((head, start)) =
                Head::blob(*part, &document.media_type, &document.digest, bytes.len() as u64)
            else {
                return self.end(Reason::Damaged, &format!("{} is too large", document.digest)).await;
            };
            self.piece([&head.encode()[..], &start].concat().into()).await?;
            self.piece(bytes).await?;
        }
        for (part, blob) in &resolved.blobs {
            let Some((head, start)) = Head::blob(*part, &blob.media_type, &blob.digest, blob.size) else {
                return self.end(Reason::Damaged, &format!("{} is too large", blob.digest)).await;
            };
            match self.service.content.blob(self.repository, &blob.digest, 0..blob.size).await {
                Ok(content) => {
                    self.piece([&head.encode()[..], &start].concat().into()).await?;
                    self.blob(blob, content).await?;
                }
                Err(error) => return self.end(Reason::Unavailable, &error.to_string()).await,
            }
        }
        let (reason, message) = match &resolved.service {
            Some(service) => self.pages(service, encoding, plan).await?,
            None => (Reason::Complete, String::new()),
        };
        self.end(reason, &message).await
    }

    /// The content of a blob whose head has been sent.
    async fn blob(
        &self,
        blob: &Descriptor,
        mut content: BoxStream<'static, Result<Bytes, ContentError>>,
    ) -> Result<(), Gone> {
        let broken = |reason: &str| {
            let (what, reason) = (blob.digest.to_string(), reason.to_owned());
            Gone::Content(ContentError::Unavailable { what, reason })
        };
        let mut left = blob.size;
        while let Some(piece) = content.next().await {
            let piece = piece.map_err(Gone::Content)?;
            left = left.checked_sub(piece.len() as u64).ok_or_else(|| broken("longer than it should be"))?;
            self.piece(piece).await?;
        }
        if left == 0 { Ok(()) } else { Err(broken("shorter than it should be")) }
    }

    /// The frames of the plan, until one cannot be read.
    async fn pages(
        &self,
        service: &Service,
        encoding: Encoding,
        plan: Plan,
    ) -> Result<(Reason, String), Gone> {
        self.head(Kind::Plan(plan.announced()), 0).await?;
        let mut open: Vec<Option<Reader>> = plan.chains.iter().map(|_| None).collect();
        let mut ahead: VecDeque<Work> = VecDeque::new();
        let mut outcome = (Reason::Complete, String::new());
        for (n, step) in plan.steps.into_iter().enumerate() {
            let chain = &plan.chains[step.chain];
            let stored = self.stored(service, chain, &mut open[step.chain], &step).await;
            if chain.last_step == n {
                open[step.chain] = None;
            }
            match stored {
                Ok(bytes) => ahead.push_back(self.work(step, bytes, encoding).await),
                Err(error) => {
                    outcome = (Reason::Unavailable, error.to_string());
                    break;
                }
            }
            if ahead.len() == LOOKAHEAD
                && let Some(first) = ahead.pop_front()
                && let Err(reason) = self.unit(first).await?
            {
                return Ok((Reason::Damaged, reason));
            }
        }
        for work in ahead {
            if let Err(reason) = self.unit(work).await? {
                return Ok((Reason::Damaged, reason));
            }
        }
        Ok(outcome)
    }

    /// The bytes of a frame as they are stored.
    async fn stored(
        &self,
        service: &Service,
        chain: &Chain,
        reader: &mut Option<Reader>,
        step: &Step,
    ) -> Result<Bytes, ContentError> {
        let blob = service.segments[chain.segment].blob;
        let reader = if let Some(reader) = reader {
            reader
        } else {
            let pieces = self.service.content.blob(self.repository, &blob, chain.bytes.clone()).await?;
            reader.insert(Reader { blob, pieces, piece: Bytes::new(), at: chain.bytes.start })
        };
        reader.read(step.placed.bytes.start, step.placed.frame.len as usize).await
    }

    /// The unit for a step: at once where the frame goes as it is, otherwise by an encoder.
    async fn work(&self, step: Step, stored: Bytes, encoding: Encoding) -> Work {
        let whole = step.is_whole();
        let packed = (step.placed.frame.len as usize) < step.placed.frame.pages as usize * PAGE_SIZE;
        let encoders = self.service.encoders.clone();
        let permit = if !whole {
            // The semaphore is never closed.
            encoders.acquire_owned().await.ok()
        } else if packed && encoding == Encoding::Plain {
            encoders.try_acquire_owned().ok()
        } else {
            None
        };
        if whole && permit.is_none() {
            let kind = Kind::Frame { at: step.at, plain: false };
            return Work::Done(Unit::new(kind, &[], stored));
        }
        Work::Encoding(tokio::task::spawn_blocking(move || encode(&step, &stored, encoding, permit)))
    }

    async fn unit(&self, work: Work) -> Result<Result<(), String>, Gone> {
        let unit = match work {
            Work::Done(unit) => unit,
            Work::Encoding(task) => match task.await {
                Ok(Ok(unit)) => unit,
                Ok(Err(reason)) => return Ok(Err(reason)),
                Err(_) => return Err(Gone::Reader),
            },
        };
        self.piece(unit.head).await?;
        self.piece(unit.body).await?;
        Ok(Ok(()))
    }

    async fn end(&self, reason: Reason, message: &str) -> Result<(), Gone> {
        if reason != Reason::Complete {
            tracing::warn!(repository = self.repository, "an answer ends early: {message}");
        }
        let message = &message.as_bytes()[..message.floor_char_boundary(MESSAGE_MAX)];
        self.head(Kind::End(reason), message.len()).await?;
        self.piece(Bytes::copy_from_slice(message)).await
    }

    async fn head(&self, kind: Kind, len: usize) -> Result<(), Gone> {
        self.piece(Bytes::copy_from_slice(&Head { kind, len }.encode())).await
    }

    async fn piece(&self, piece: Bytes) -> Result<(), Gone> {
        if piece.is_empty() {
            return Ok(());
        }
        self.to.send_timeout(piece, self.service.patience).await.map_err(|_| Gone::Reader)
    }
}

impl Unit {
    fn new(kind: Kind, before: &[u8], pages: Bytes) -> Self {
        let len = before.len() + pages.len();
        let head = [&Head { kind, len }.encode()[..], before].concat();
        Self { head: head.into(), body: pages }
    }
}

/// Decompresses and verifies a stored frame and takes out the pages of the step.
fn encode(
    step: &Step,
    stored: &[u8],
    encoding: Encoding,
    _permit: Option<OwnedSemaphorePermit>,
) -> Result<Unit, String> {
    let frame = &step.placed.frame;
    let failed = |e: String| format!("segment {} frame {}: {e}", step.at.segment, step.at.frame);
    let mut decoder = Decoder::new().map_err(|e| failed(e.to_string()))?;
    let pages = decoder.decode(frame, stored).map_err(|e| failed(e.to_string()))?;
    if step.is_whole() {
        let kind = Kind::Frame { at: step.at, plain: true };
        return Ok(Unit::new(kind, &[], Bytes::copy_from_slice(pages)));
    }
    let proof = proof::prove(pages, step.set).ok_or_else(|| failed("no such pages".into()))?;
    let chosen = pages.chunks_exact(PAGE_SIZE).enumerate().filter(|(n, _)| step.set >> n & 1 == 1);
    let cut: Vec<u8> = chosen.flat_map(|(_, page)| page).copied().collect();
    let packed = match encoding {
        Encoding::Stored => zstd::bulk::compress(&cut, CUT_LEVEL).ok().filter(|p| p.len() < cut.len()),
        Encoding::Plain => None,
    };
    let plain = packed.is_none();
    let kind = Kind::Cut { at: step.at, set: step.set, values: proof.len(), plain };
    Ok(Unit::new(kind, proof.as_flattened(), packed.unwrap_or(cut).into()))
}

/// A range of a segment, read forward.
struct Reader {
    blob: Digest,
    pieces: BoxStream<'static, Result<Bytes, ContentError>>,
    piece: Bytes,
    at: u64,
}

impl Reader {
    /// `len` bytes of the blob from `start`, which is not before what was read already.
    async fn read(&mut self, start: u64, len: usize) -> Result<Bytes, ContentError> {
        let mut skip = (start - self.at) as usize;
        let mut bytes = BytesMut::new();
        loop {
            let skipped = self.piece.split_to(skip.min(self.piece.len()));
            skip -= skipped.len();
            let taken = self.piece.split_to((len - bytes.len()).min(self.piece.len()));
            self.at += (skipped.len() + taken.len()) as u64;
            if taken.len() == len {
                return Ok(taken);
            }
            bytes.extend_from_slice(&taken);
            if bytes.len() == len {
                return Ok(bytes.freeze());
            }
            self.piece = self.pieces.next().await.unwrap_or_else(|| {
                let reason = format!("ends at {}", self.at);
                Err(ContentError::Unavailable { what: self.blob.to_string(), reason })
            })?;
        }
    }
}
