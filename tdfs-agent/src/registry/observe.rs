//! One line per request on standard error, and the counters, when the last byte of the answer is out or the client
//! went away.
//!
//! ```text
//! {"time":"2026-01-02T03:04:05.678Z","remote":"10.0.0.1:4711","method":"GET","path":"/v2/a/tags/list","status":200,
//!  "bytes":17,"received":0,"seconds":0.001,"user_agent":"skopeo/1.9","complete":true}
//! ```
//!
//! `bytes` and `received` count bodies. An answer is complete when its body was handed to the connection whole.

use std::io::Write as _;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Instant, SystemTime};

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::HeaderValue;
use axum::http::header::{CONNECTION, CONTENT_LENGTH, USER_AGENT};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use serde_json::json;

use super::metrics::Metrics;

/// Bytes of a path or user agent that are worth a log line.
const SHOWN: usize = 512;

/// What is known of a request before it is over.
struct Record {
    metrics: Arc<Metrics>,
    began: Instant,
    remote: Option<SocketAddr>,
    method: String,
    path: String,
    user_agent: String,
    status: u16,
    received: Arc<AtomicU64>,
    sent: u64,
    /// Bytes of the answer's body, if it is known from the beginning.
    announced: Option<u64>,
    /// Nothing of it is left.
    is_at_end: bool,
}

/// Logs and counts what passes.
pub async fn observe(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let text = |value: &str| value.chars().take(SHOWN).collect::<String>();
    let user_agent = parts.headers.get(USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let received = Arc::new(AtomicU64::new(0));
    metrics.running.inc();
    let mut record = Record {
        metrics,
        began: Instant::now(),
        remote: parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|info| info.0),
        method: text(parts.method.as_str()),
        path: text(parts.uri.path()),
        user_agent: text(user_agent),
        status: 0,
        received: received.clone(),
        sent: 0,
        announced: None,
        is_at_end: false,
    };
    let is_read = Arc::new(AtomicBool::new(body.is_end_stream()));
    let watcher = Received { bytes: received, is_read: is_read.clone() };
    let body = Body::new(Watched { body, watcher });
    let response = next.run(Request::from_parts(parts, body)).await;
    record.status = response.status().as_u16();
    let (mut parts, body) = response.into_parts();
    if !is_read.load(Ordering::Relaxed) {
        // The connection ends with an answer that comes before the whole request: the client must not use it again.
        parts.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    record.announced = parts.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    record.is_at_end = body.is_end_stream();
    Response::from_parts(parts, Body::new(Watched { body, watcher: record }))
}

impl Drop for Record {
    fn drop(&mut self) {
        // Nobody asks for the end of a body whose length is known.
        let is_complete = self.is_at_end || self.announced == Some(self.sent);
        let (took, received) = (self.began.elapsed(), self.received.load(Ordering::Relaxed));
        self.metrics.running.dec();
        self.metrics.request(&self.method, self.status, self.sent, received, took);
        let line = json!({
            "time": humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            "remote": self.remote,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "bytes": self.sent,
            "received": received,
            "seconds": took.as_secs_f64(),
            "user_agent": self.user_agent,
            "complete": is_complete,
        });
        // A log that nobody reads must not stop the server.
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    }
}

/// A body, and who is told of every frame and of the end.
struct Watched<W> {
    body: Body,
    watcher: W,
}

trait Watch: Unpin {
    /// So many bytes passed; `is_over`: they were the last.
    fn passed(&mut self, bytes: u64, is_over: bool);
}

impl<W: Watch> http_body::Body for Watched<W> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
        let bytes = data.map_or(0, |data| data.len() as u64);
        let is_over = frame.is_none() || self.body.is_end_stream();
        self.watcher.passed(bytes, is_over);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Of an answer.
impl Watch for Record {
    fn passed(&mut self, bytes: u64, is_over: bool) {
        self.sent += bytes;
        self.is_at_end = is_over;
    }
}

/// Of the body of a request.
struct Received {
    bytes: Arc<AtomicU64>,
    is_read: Arc<AtomicBool>,
}

impl Watch for Received {
    fn passed(&mut self, bytes: u64, is_over: bool) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if is_over {
            self.is_read.store(true, Ordering::Relaxed);
        }
    }
}
