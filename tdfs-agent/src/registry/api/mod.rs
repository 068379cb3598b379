//! The distribution API: requests in, answers out. Everything it says lies in the storage, nothing in the process.
//!
//! A body is read as it comes, and only while what reads it has room.

mod access;
mod blobs;
mod manifests;
mod refusal;
mod uploads;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue};
use axum::http::request::Parts;
use axum::http::{Method, Response, StatusCode};
use axum::response::IntoResponse;
use serde::Serialize;

use super::request::{ParseError, Route};
use super::uploads as sessions;
use super::{Registry, page_service, patience};
pub use access::{Guard, guard, tokens};
pub use refusal::Refusal;

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

type Answer = Result<Response<Body>, Refusal>;

/// A request without its body.
struct Head(Parts);

/// What all requests share.
#[derive(Clone)]
struct Api {
    registry: Arc<Registry>,
    patience: Duration,
}

/// Serves `registry`, with the page service beside it.
pub fn router(registry: Arc<Registry>, patience: Duration) -> Router {
    let limits = page_service::Limits { patience, ..page_service::Limits::default() };
    let pages = page_service::router(registry.clone(), &limits);
    Router::new().fallback(dispatch).with_state(Api { registry, patience }).merge(pages)
}

async fn dispatch(State(api): State<Api>, request: Request) -> Response<Body> {
    let mut response = answer(&api, request).await.unwrap_or_else(IntoResponse::into_response);
    response.headers_mut().insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    response
}

async fn answer(Api { registry, patience }: &Api, request: Request) -> Answer {
    let (parts, body) = request.into_parts();
    let method = parts.method.clone();
    let reads = matches!(method, Method::GET | Method::HEAD);
    let route = match Route::parse(parts.uri.path()) {
        // What cannot be a tag is nobody's tag.
        Err(e @ ParseError::Tag) if method != Method::PUT => return Err(Refusal::manifest_unknown(e)),
        route => route?,
    };
    if registry.read_only && !reads {
        return Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "this registry is read-only",
        ));
    }
    let (head, body) = (Head(parts), patience::body(body, *patience));
    match (route, method.as_str()) {
        (Route::Base, "GET" | "HEAD") => Ok(json(&serde_json::Map::new())),
        (Route::Tags(name), "GET" | "HEAD") => manifests::tags(registry, &name, &head).await,
        (Route::Referrers(name, subject), "GET" | "HEAD") => {
            manifests::referrers(registry, &name, &subject, &head).await
        }
        (Route::Manifest(name, reference), "GET" | "HEAD") => {
            manifests::get(registry, &name, &reference, &head).await
        }
        (Route::Manifest(name, reference), "PUT") => {
            manifests::put(registry, &name, reference, &head, body).await
        }
        (Route::Manifest(name, reference), "DELETE") => manifests::delete(registry, &name, &reference).await,
        (Route::Blob(name, digest), "GET" | "HEAD") => blobs::get(registry, &name, &digest, &head).await,
        (Route::Blob(name, digest), "DELETE") => blobs::delete(registry, &name, &digest).await,
        (Route::Uploads(name), "POST") => uploads::begin(registry, &name, &head, body).await,
        (Route::Upload(name, id), "GET" | "HEAD") => uploads::status(registry, &name, &id).await,
        (Route::Upload(name, id), "PATCH") => uploads::append(registry, &name, &id, &head, body).await,
        (Route::Upload(name, id), "PUT") => uploads::finish(registry, &name, &id, &head, body).await,
        (Route::Upload(name, id), "DELETE") => uploads::cancel(registry, &name, &id).await,
        (route, _) => {
            let allowed = match route {
                Route::Base | Route::Tags(_) | Route::Referrers(..) => "GET, HEAD",
                Route::Manifest(..) => "GET, HEAD, PUT, DELETE",
                Route::Blob(..) => "GET, HEAD, DELETE",
                Route::Uploads(_) => "POST",
                Route::Upload(..) => "GET, HEAD, PATCH, PUT, DELETE",
            };
            let message = format!("{method} is not possible here");
            Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message).with(ALLOW, allowed))
        }
    }
}

impl Head {
    fn is_head(&self) -> bool {
        self.0.method == Method::HEAD
    }

    fn header(&self, name: HeaderName) -> Option<&str> {
        self.0.headers.get(name)?.to_str().ok()
    }

    /// The first value of a parameter of the query.
    fn parameter(&self, name: &str) -> Option<String> {
        let query = self.0.uri.query()?;
        url::form_urlencoded::parse(query.as_bytes()).find(|(n, _)| n == name).map(|(_, v)| v.into_owned())
    }

    /// Bytes of the body, if the client said.
    fn length(&self) -> Option<u64> {
        self.header(CONTENT_LENGTH)?.parse().ok()
    }
}

/// An answer without a body.
fn empty(status: StatusCode, headers: impl IntoIterator<Item = (HeaderName, String)>) -> Response<Body> {
    let mut response = status.into_response();
    set(&mut response, headers);
    response
}

/// Headers that are made of names and digests, which are header values.
fn set(response: &mut Response<Body>, headers: impl IntoIterator<Item = (HeaderName, String)>) {
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
}

fn json(value: &impl Serialize) -> Response<Body> {
    // Strings, numbers and maps of strings: this cannot fail.
    let mut response = serde_json::to_string(value).unwrap_or_default().into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
