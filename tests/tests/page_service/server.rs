//! A registry with a page service on a loopback port, over layouts, which can be told to misbehave.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, RANGE, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, TryStreamExt as _};
use serde_json::json;
use tdfs_agent::oci::{ClientOptions, INDEX_TYPE};
use tdfs_agent::registry::page_service::{self, Limits};
use tdfs_agent::registry::{Content, ContentError, Upstream};

/// A piece of a ruined answer.
pub enum Piece {
    /// These bytes.
    Bytes(Vec<u8>),
    /// The connection breaks.
    Break,
    /// Nothing comes any more.
    Stall,
    /// These bytes, slowly, one by one.
    Trickle(Vec<u8>),
}

/// What becomes of the `n`th answer of the page service.
pub type Fault = Box<dyn Fn(usize, Vec<u8>) -> Vec<Piece> + Send + Sync>;

struct Shared {
    content: Arc<dyn Content>,
    fault: Mutex<Option<Arc<Fault>>>,
    /// `Authorization` that everybody must send.
    authorization: Mutex<Option<String>>,
    page_requests: AtomicUsize,
    other_requests: AtomicUsize,
}

/// The server; ends with the runtime that it was started on.
pub struct Server {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
}

impl Server {
    /// Serves the layouts below `dir`; without `pages` as a plain registry.
    pub async fn start(dir: &Path, pages: bool) -> Result<Self> {
        let content: Arc<dyn Content> = Arc::new(Upstream::layouts(dir, ClientOptions::default()));
        let shared = Arc::new(Shared {
            content: content.clone(),
            fault: Mutex::default(),
            authorization: Mutex::default(),
            page_requests: AtomicUsize::default(),
            other_requests: AtomicUsize::default(),
        });
        let plain = Router::new().fallback(plain).with_state(shared.clone());
        let router =
            if pages { page_service::router(content, &Limits::default()).merge(plain) } else { plain };
        let router = router.layer(from_fn_with_state(shared.clone(), misbehave));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let addr = listener.local_addr()?;
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { addr, shared })
    }

    /// `127.0.0.1:PORT/NAME`
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.addr)
    }

    /// Ruins the answers of the page service from now on.
    pub fn ruin(&self, fault: impl Fn(usize, Vec<u8>) -> Vec<Piece> + Send + Sync + 'static) {
        let fault: Fault = Box::new(fault);
        *self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(fault));
        self.shared.page_requests.store(0, Ordering::Relaxed);
    }

    /// Asks everybody for this user and password.
    pub fn lock(&self, user: &str, password: &str) {
        let expected = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        *self.shared.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(expected);
    }

    /// Requests to the page service and others, since this was last asked.
    pub fn requests(&self) -> (usize, usize) {
        let take = |n: &AtomicUsize| n.swap(0, Ordering::Relaxed);
        (take(&self.shared.page_requests), take(&self.shared.other_requests))
    }
}

async fn misbehave(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let expected = shared.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let sent = request.headers().get(AUTHORIZATION).and_then(|a| a.to_str().ok());
    if expected.is_some() && sent != expected.as_deref() {
        return (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Basic realm=\"test\"")]).into_response();
    }
    if !request.uri().path().starts_with("/tdfs/") {
        shared.other_requests.fetch_add(1, Ordering::Relaxed);
        return next.run(request).await;
    }
    let n = shared.page_requests.fetch_add(1, Ordering::Relaxed);
    let response = next.run(request).await;
    let fault = shared.fault.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let Some(fault) = fault.filter(|_| response.status() == StatusCode::OK) else { return response };
    let (parts, body) = response.into_parts();
    let Ok(whole) = to_bytes(body, usize::MAX).await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let pieces = stream::iter(fault(n, whole.to_vec())).flat_map(|piece| match piece {
        Piece::Bytes(bytes) => stream::iter([Ok(Bytes::from(bytes))]).boxed(),
        Piece::Break => stream::iter([Err(std::io::Error::other("broken"))]).boxed(),
        Piece::Stall => stream::pending().boxed(),
        Piece::Trickle(bytes) => stream::iter(bytes)
            .then(|byte| async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok(Bytes::from(vec![byte]))
            })
            .boxed(),
    });
    Response::from_parts(parts, Body::from_stream(pieces))
}

/// What a node reads of a registry: manifests, referrers, blobs and ranges of them.
async fn plain(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let found = answer(&*shared.content, &request.into_parts().0).await;
    found.unwrap_or_else(|error| match error {
        ContentError::NotFound(_) => StatusCode::NOT_FOUND.into_response(),
        ContentError::Unavailable { .. } => StatusCode::BAD_GATEWAY.into_response(),
    })
}

async fn answer(content: &dyn Content, request: &Parts) -> Result<Response, ContentError> {
    let unknown = || ContentError::NotFound(request.uri.to_string());
    let mut path = request.uri.path().strip_prefix("/v2/").ok_or_else(unknown)?.rsplitn(3, '/');
    let (Some(name), Some(kind), Some(repository)) = (path.next(), path.next(), path.next()) else {
        return Err(unknown());
    };
    if !matches!(request.method, Method::GET | Method::HEAD) {
        return Err(unknown());
    }
    match kind {
        "manifests" => {
            let stored = content.manifest(repository, name).await?;
            Ok(([(CONTENT_TYPE, stored.media_type)], stored.bytes).into_response())
        }
        "referrers" => {
            let subject = name.parse().map_err(|_| unknown())?;
            let manifests = content.referrers(repository, &subject).await?;
            let index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests });
            Ok(([(CONTENT_TYPE, INDEX_TYPE)], index.to_string()).into_response())
        }
        "blobs" => {
            let digest = name.parse().map_err(|_| unknown())?;
            let range = request.headers.get(RANGE).and_then(|r| r.to_str().ok()?.strip_prefix("bytes="));
            let range = range.and_then(|r| r.split_once('-'));
            if let Some((first, last)) = range {
                let (first, last): (u64, u64) =
                    (first.parse().map_err(|_| unknown())?, last.parse().map_err(|_| unknown())?);
                let body = content.blob(repository, &digest, first..last + 1).await?;
                let bytes: Vec<Bytes> = body.try_collect().await?;
                let head = [(CONTENT_RANGE, format!("bytes {first}-{last}/*"))];
                return Ok((StatusCode::PARTIAL_CONTENT, head, bytes.concat()).into_response());
            }
            // Only its length is not known: read until it ends.
            let mut whole = Vec::new();
            let mut piece = 1 << 40;
            while piece > 0 {
                let start = whole.len() as u64;
                match content.blob(repository, &digest, start..start + piece).await {
                    Ok(body) => whole.extend(body.try_collect::<Vec<Bytes>>().await?.concat()),
                    Err(ContentError::NotFound(what)) => return Err(ContentError::NotFound(what)),
                    Err(_) => piece /= 2,
                }
            }
            Ok(whole.into_response())
        }
        _ => Err(unknown()),
    }
}
