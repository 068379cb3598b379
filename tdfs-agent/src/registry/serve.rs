//! The listener: connections in, requests to the router, everything bounded.
//!
//! A connection gets a place or waits in the kernel's queue; its head must come within [`HEAD_WITHIN`] and be small,
//! its peer must take what is sent to it within [`WRITE_STALL`]. On a signal no connection is taken any more, those
//! that are idle close, and those at work get [`GRACE`] to finish.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep};

use super::{Registry, api};

/// Connections at a time.
const CONNECTIONS_MAX: usize = 1024;
/// Requests at a time on one HTTP/2 connection.
const STREAMS_MAX: u32 = 64;
/// Header fields of a request.
const HEADERS_MAX: usize = 64;
/// Bytes of the head of a request.
const HEAD_MAX: usize = 32 << 10;
/// For the head of a request to come, also when the connection was idle.
const HEAD_WITHIN: Duration = Duration::from_secs(30);
/// For a peer to take some of what is sent to it.
const WRITE_STALL: Duration = Duration::from_mins(1);
/// For requests to finish when the server stops.
const GRACE: Duration = Duration::from_secs(20);
/// After a failure to accept, such as no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How the server is to be run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where to listen; port 0 for any.
    pub listen: String,
}

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    router: Router,
}

impl Server {
    /// Listens.
    pub async fn bind(registry: Arc<Registry>, options: &Options) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::bind(&options.listen).await?, router: api::router(registry) })
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`, and until the requests that run then are done or had time enough.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let mut server = auto::Builder::new(TokioExecutor::new());
        server
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WITHIN)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_MAX)
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_MAX)
            .max_header_list_size(HEAD_MAX as u32)
            .keep_alive_interval(HEAD_WITHIN)
            .keep_alive_timeout(HEAD_WITHIN);
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut stop = std::pin::pin!(stop);
        loop {
            let accepted = async {
                // The semaphore is never closed.
                let place = places.clone().acquire_owned().await.ok();
                self.listener.accept().await.map(|(stream, peer)| (place, stream, peer))
            };
            let (place, stream, peer) = tokio::select! {
                accepted = accepted => match accepted {
                    Ok(accepted) => accepted,
                    Err(e) => {
                        tracing::warn!("cannot accept: {e}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                () = &mut stop => break,
            };
            // Answers are written whole; only latency is at stake.
            let _ = stream.set_nodelay(true);
            let service = self.router.clone().layer(axum::Extension(ConnectInfo(peer)));
            let (server, watcher) = (server.clone(), graceful.watcher());
            tokio::spawn(async move {
                let stream = TokioIo::new(Impatient::new(stream));
                let connection =
                    server.serve_connection(stream, TowerToHyperService::new(service)).into_owned();
                if let Err(e) = watcher.watch(connection).await {
                    tracing::debug!("{peer}: {e}");
                }
                drop(place);
            });
        }
        drop(self.listener);
        if tokio::time::timeout(GRACE, graceful.shutdown()).await.is_err() {
            tracing::warn!("stopped with requests unfinished after {} s", GRACE.as_secs());
        }
    }
}

/// A connection that breaks when its peer takes nothing for [`WRITE_STALL`].
struct Impatient {
    stream: TcpStream,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn new(stream: TcpStream) -> Self {
        Self { stream, stalled: None }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = None;
            return result;
        }
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + WRITE_STALL)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.watch(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.watch(cx, result)
    }
}
