//! The page service: one request with what a node holds, one stream of everything else it needs to start.
//!
//! ```text
//! POST /tdfs/v1/REPOSITORY/pages
//!
//! request -> resolve: reference -> image -> runtime image -> service metadata    (resolve.rs, services.rs)
//!         -> plan: needed pages minus held pages -> frames in order of first use (plan.rs)
//!         -> send: metadata, then frames, out of the segment blobs               (send.rs)
//! ```
//!
//! The formats are those of [`wire`](tdfs_common::wire). Nothing is kept between requests but decoded service metadata, so any number of
//! servers may answer for one storage. Whole frames pass through as they are stored; where a node lacks a part of a
//! frame, and where it asked for plain pages, the frame is decompressed and verified here.
//!
//! Everything a request may use is bounded, see [`Limits`]: requests over the number at once are told to come back, a
//! body that is too large or too slow is refused, a reader that stalls is dropped. A request under way holds at most
//! its plan and 6 MiB of page data (see `send.rs`), whatever it asks for; the socket sets the pace. No lock is held
//! across I/O. Hostile requests end in a 4xx answer with an error document in the style of the OCI distribution
//! specification, hostile storage in a stream that ends with a reason.

mod plan;
mod resolve;
mod send;
mod services;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, State};
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde_json::json;
use tdfs_common::envelope::{FormatError, decode};
use tdfs_common::wire::{Encoding, REQUEST_MAX, REQUEST_TYPE, Request, SERVICE_HEADER, STREAM_TYPE};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::content::{Content, ContentError};
use services::Services;

/// How much a page service does at once.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Requests under way; more are answered 503.
    pub requests: usize,
    /// Frames that are decompressed at the same time for cuts and plain pages, over all requests.
    pub encoders: usize,
    /// Bytes of decoded service metadata that are kept.
    pub service_cache: usize,
    /// How long a client may take to send its request, or to take the next piece of the answer.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            requests: 256,
            encoders: thread::available_parallelism().map_or(1, usize::from),
            service_cache: 64 << 20,
            patience: Duration::from_secs(30),
        }
    }
}

/// What all requests share.
struct PageService {
    content: Arc<dyn Content>,
    services: Services,
    requests: Arc<Semaphore>,
    encoders: Arc<Semaphore>,
    patience: Duration,
}

/// The page service over `content`.
pub fn router(content: Arc<dyn Content>, limits: &Limits) -> Router {
    let service = PageService {
        content,
        services: Services::new(limits.service_cache),
        requests: Arc::new(Semaphore::new(limits.requests)),
        encoders: Arc::new(Semaphore::new(limits.encoders.max(1))),
        patience: limits.patience,
    };
    Router::new().route("/tdfs/v1/{*path}", post(pages)).with_state(Arc::new(service))
}

async fn pages(
    State(service): State<Arc<PageService>>,
    Path(path): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let outcome = service.answer(&path, &headers, body).await;
    let mut response = outcome.unwrap_or_else(Refusal::into_response);
    response.headers_mut().insert(HeaderName::from_static(SERVICE_HEADER), HeaderValue::from_static("1"));
    response
}

impl PageService {
    async fn answer(
        self: &Arc<Self>,
        path: &str,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<Response, Refusal> {
        let repository = path.strip_suffix("/pages").ok_or(Refusal::NoSuchPath)?;
        if headers.get(CONTENT_TYPE).is_none_or(|t| t != REQUEST_TYPE) {
            return Err(Refusal::ContentType);
        }
        let permit = self.requests.clone().try_acquire_owned().map_err(|_| Refusal::Busy)?;
        let body = timeout(self.patience, to_bytes(body, REQUEST_MAX)).await.map_err(|_| Refusal::Slow)?;
        let body = body.map_err(|_| Refusal::TooLarge)?;
        let request: Request = blocking(move || decode(&body)).await??;
        let resolved = resolve::resolve(&*self.content, &self.services, repository, &request).await?;
        let (service, encoding) = (resolved.service.clone(), request.encoding);
        let plan = blocking(move || service.map(|s| plan::plan(&s, &request))).await?.unwrap_or_default();
        let body = self.clone().stream(repository.to_owned(), resolved, plan, encoding, permit);
        Ok(([(CONTENT_TYPE, STREAM_TYPE)], body).into_response())
    }

    /// A body that is made as fast as it is taken.
    fn stream(
        self: Arc<Self>,
        repository: String,
        resolved: resolve::Resolved,
        plan: plan::Plan,
        encoding: Encoding,
        permit: OwnedSemaphorePermit,
    ) -> Body {
        let (to, mut pieces) = tokio::sync::mpsc::channel(send::QUEUE);
        tokio::spawn(async move {
            let _permit = permit;
            let sender = send::Sender { service: &self, repository: &repository, to };
            match sender.send(&resolved, plan, encoding).await {
                Ok(()) => {}
                Err(send::Gone::Reader) => {
                    tracing::debug!(repository, "a node left in the middle of its pages");
                }
                Err(send::Gone::Content(error)) => {
                    tracing::warn!(repository, "pages cannot be sent: {error}");
                }
            }
        });
        // A stream that is broken off lacks its end, which tells the node.
        Body::from_stream(futures_util::stream::poll_fn(move |context| {
            pieces.poll_recv(context).map(|piece| piece.map(Ok::<_, std::convert::Infallible>))
        }))
    }
}

/// Why a request is not answered with a stream.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("there is no such path")]
    NoSuchPath,
    #[error("the body must be {REQUEST_TYPE}")]
    ContentType,
    #[error("too many requests at once")]
    Busy,
    #[error("the request did not arrive in time")]
    Slow,
    #[error("the body is over {REQUEST_MAX} bytes or broken off")]
    TooLarge,
    #[error(transparent)]
    Request(#[from] FormatError),
    #[error("{0} is no repository and tag")]
    Name(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    NoRuntimeImage(String),
    #[error("{0}")]
    Damaged(String),
    #[error("{0}")]
    Unavailable(String),
}

impl From<ContentError> for Refusal {
    fn from(error: ContentError) -> Self {
        match error {
            ContentError::NotFound(_) => Self::NotFound(error.to_string()),
            ContentError::Unavailable { .. } => Self::Unavailable(error.to_string()),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, code) = match self {
            Self::NoSuchPath => (StatusCode::NOT_FOUND, "UNSUPPORTED"),
            Self::ContentType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "UNSUPPORTED"),
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "TOOMANYREQUESTS"),
            Self::Slow => (StatusCode::REQUEST_TIMEOUT, "REQUEST_INVALID"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID"),
            Self::Request(_) => (StatusCode::BAD_REQUEST, "REQUEST_INVALID"),
            Self::Name(_) => (StatusCode::BAD_REQUEST, "NAME_INVALID"),
            Self::NotFound(_) => (StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN"),
            Self::NoRuntimeImage(_) => (StatusCode::NOT_FOUND, "RUNTIME_IMAGE_UNKNOWN"),
            Self::Damaged(_) => (StatusCode::BAD_GATEWAY, "MANIFEST_INVALID"),
            Self::Unavailable(_) => (StatusCode::BAD_GATEWAY, "UNAVAILABLE"),
        };
        let body = json!({ "errors": [{ "code": code, "message": self.to_string() }] }).to_string();
        let mut response = (status, [(CONTENT_TYPE, "application/json")], body).into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// Runs work for the CPU off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    let ended = |_| Refusal::Unavailable("the server is shutting down".into());
    tokio::task::spawn_blocking(work).await.map_err(ended)
}
