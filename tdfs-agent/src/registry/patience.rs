//! Peers that are slow on purpose: every wait for one ends.
//!
//! ```text
//! TLS handshake, head of a request    come within the patience             `serve`, hyper
//! body of a request                   makes progress (see `oci::pace`)     body
//! answer                              is taken with progress               Impatient
//! ```
//!
//! Whatever a peer does or leaves undone, it keeps one connection and what one request holds: the buffers of hyper,
//! some pieces of storage, and for pages what the module `page_service` says. That is why HTTP/2 is not spoken, with
//! which a peer could leave any number of answers unread.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use futures_util::stream::{self, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::uploads::{self, BodyError};
use crate::oci::Pace;

/// A connection that breaks when its peer does not take what is sent to it.
pub struct Impatient<S> {
    stream: S,
    taken: Pace,
    /// Since when the peer takes nothing, and when that is too long.
    blocked: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl<S> Impatient<S> {
    pub fn new(stream: S, patience: Duration) -> Self {
        Self { stream, taken: Pace::new(patience), blocked: None }
    }

    /// Counts what the peer took.
    fn watch<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
        bytes: impl FnOnce(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(result) = result {
            let waited = self.blocked.take().map_or(Duration::ZERO, |(since, _)| since.elapsed());
            self.taken.moved(waited, result.as_ref().map_or(0, bytes) as u64);
            return Poll::Ready(result);
        }
        let left = self.taken.left();
        let (_, late) = self.blocked.get_or_insert_with(|| (Instant::now(), Box::pin(sleep(left))));
        ready!(late.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, result, |bytes| *bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, result, |bytes| *bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.watch(cx, result, |()| 0)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.watch(cx, result, |()| 0)
    }
}

/// What a client sends, until it makes no progress for `patience`.
pub fn body(body: Body, patience: Duration) -> uploads::Body {
    type Reading = Option<(BodyDataStream, Pace)>;
    let reading: Reading = Some((body.into_data_stream(), Pace::new(patience)));
    stream::unfold(reading, |reading| async move {
        let (mut body, mut pace) = reading?;
        match pace.next(&mut body).await {
            Some(Some(Ok(bytes))) => Some((Ok(bytes), Some((body, pace)))),
            Some(Some(Err(e))) => Some((Err(BodyError::Broken(e.to_string())), None)),
            Some(None) => None,
            None => Some((Err(BodyError::Idle(pace.patience())), None)),
        }
    })
    .boxed()
}
