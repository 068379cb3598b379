//! Blobs as streams of pieces.
//!
//! A [`Download`] is a range of a blob; when the connection breaks it goes on at the byte reached, at the next source
//! or after a pause. [`verified`] watches a whole blob go by and replaces the end by an error when it is not the one
//! that was asked for.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, Stream, StreamExt};
use tdfs_common::digest::{Digest, DigestWriter};
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::layout::Layout;
use super::registry::{Registry, pause};
use super::transport::{Answer, Counters, Kind};
use super::{Descriptor, OciError, blocking};

/// The pieces of a blob in order. Ends at the first error.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, OciError>> + Send>>;

/// Bytes that a connection must have brought for its break not to count as another failure in a row.
const PROGRESS: u64 = 1 << 20;
/// Bytes of a piece read from a file.
const PIECE: usize = 256 << 10;

/// A range of a blob of a registry.
struct Download {
    registry: Arc<Registry>,
    digest: Digest,
    /// Of the blob, if it is known.
    size: Option<u64>,
    /// What is still to come.
    range: Range<u64>,
    answer: Option<Answer>,
    /// Bytes that `answer` brought.
    brought: u64,
    failures: u32,
}

/// Streams `range` of a blob; the first answer is checked before this returns.
pub(super) async fn download(
    registry: Arc<Registry>,
    digest: Digest,
    size: Option<u64>,
    range: Range<u64>,
) -> Result<ByteStream, OciError> {
    let mut download = Download { registry, digest, size, range, answer: None, brought: 0, failures: 0 };
    if !download.range.is_empty() {
        download.open().await?;
    }
    Ok(Box::pin(stream::try_unfold(download, |mut download| async move {
        Ok(download.next().await?.map(|piece| (piece, download)))
    })))
}

impl Download {
    async fn open(&mut self) -> Result<(), OciError> {
        let registry = self.registry.clone();
        let mut attempts = registry.attempts_anywhere();
        loop {
            match attempts.endpoint().open_blob(&self.digest, self.size, &self.range).await {
                Ok(answer) => {
                    (self.answer, self.brought) = (Some(answer), 0);
                    return Ok(());
                }
                Err(e) => attempts.failed(e).await?,
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, OciError> {
        while !self.range.is_empty() {
            let Some(answer) = &mut self.answer else {
                self.open().await?;
                continue;
            };
            let left = self.range.end - self.range.start;
            let error = match answer.chunk().await {
                Ok(Some(piece)) if piece.len() as u64 > left => {
                    let expected = self.range.end;
                    return Err(OciError::Size {
                        what: answer.url.clone(),
                        expected,
                        got: self.range.start + piece.len() as u64,
                    });
                }
                Ok(Some(piece)) => {
                    self.range.start += piece.len() as u64;
                    self.brought += piece.len() as u64;
                    return Ok(Some(piece));
                }
                Ok(None) => {
                    let reason = format!("the body ended {left} bytes early");
                    OciError::Transport { url: answer.url.clone(), reason }
                }
                Err(e) => e,
            };
            self.answer = None;
            if self.brought >= PROGRESS {
                self.failures = 0;
            }
            pause(&self.registry, &mut self.failures, error).await?;
        }
        Ok(None)
    }
}

/// Streams `range` of a blob of a layout.
pub(super) async fn read(
    layout: Arc<Layout>,
    counters: Arc<Counters>,
    digest: Digest,
    size: Option<u64>,
    range: Range<u64>,
) -> Result<ByteStream, OciError> {
    let (path, file) = blocking(move || layout.open(&digest)).await?;
    let mut file = tokio::fs::File::from_std(file);
    let found = file.metadata().await.map_err(OciError::io(&path))?.len();
    if size.map_or(found < range.end, |size| found != size) {
        let expected = size.unwrap_or(range.end);
        return Err(OciError::Size { what: path.display().to_string(), expected, got: found });
    }
    file.seek(std::io::SeekFrom::Start(range.start)).await.map_err(OciError::io(&path))?;
    counters.request(Kind::Data);
    let (end, left) = (range.end, range.end - range.start);
    Ok(Box::pin(stream::try_unfold((file, left), move |(mut file, left)| {
        let (path, counters) = (path.clone(), counters.clone());
        async move {
            if left == 0 {
                return Ok(None);
            }
            let mut piece = BytesMut::with_capacity((PIECE as u64).min(left) as usize);
            let got = (&mut file)
                .take(left.min(PIECE as u64))
                .read_buf(&mut piece)
                .await
                .map_err(OciError::io(&path))?;
            if got == 0 {
                return Err(OciError::Size {
                    what: path.display().to_string(),
                    expected: end,
                    got: end - left,
                });
            }
            counters.received(got);
            Ok(Some((piece.freeze(), (file, left - got as u64))))
        }
    })))
}

/// Passes `stream` on; its last item is an error unless the whole is what `blob` says.
pub(super) fn verified(stream: ByteStream, blob: &Descriptor) -> ByteStream {
    let (expected, size) = (blob.digest, blob.size);
    let state = (Some(stream), DigestWriter::default(), 0u64);
    Box::pin(stream::try_unfold(state, move |(stream, mut digest, mut seen)| async move {
        let Some(mut stream) = stream else { return Ok(None) };
        match stream.next().await {
            Some(piece) => {
                let piece = piece?;
                digest.update(&piece);
                seen += piece.len() as u64;
                Ok(Some((piece, (Some(stream), digest, seen))))
            }
            None if seen != size => {
                Err(OciError::Size { what: expected.to_string(), expected: size, got: seen })
            }
            None => match digest.finish() {
                got if got == expected => Ok(None),
                got => Err(OciError::Digest { what: "blob".into(), expected, got }),
            },
        }
    }))
}
