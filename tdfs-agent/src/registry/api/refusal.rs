//! What the server says instead of doing what it was asked (distribution specification, "Error Codes").

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;
use serde_json::json;

use super::super::content::ContentError;
use super::super::repositories::PushError;
use super::super::request::ParseError;
use super::super::storage::StorageError;
use super::super::uploads::{BodyError, UploadError};

/// A status, a code and one line.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refusal {
    #[expect(clippy::needless_pass_by_value, reason = "errors and literals are passed as they come")]
    pub fn new(status: StatusCode, code: &'static str, message: impl ToString) -> Self {
        Self { status, code, message: message.to_string(), headers: Vec::new() }
    }

    /// Adds a header; one whose value is no header value is left out.
    pub fn with(mut self, name: HeaderName, value: &str) -> Self {
        self.headers.extend(HeaderValue::from_str(value).ok().map(|value| (name, value)));
        self
    }

    pub fn blob_unknown(what: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", format_args!("{what} is not in this repository"))
    }

    pub fn manifest_unknown(what: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", format_args!("{what} is not in this repository"))
    }

    pub fn upload_unknown() -> Self {
        Self::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", ParseError::Upload)
    }

    pub fn digest_invalid(reason: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", reason)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response<Body> {
        let body = json!({ "errors": [{ "code": self.code, "message": self.message }] });
        let mut response = (self.status, body.to_string()).into_response();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response.headers_mut().extend(self.headers);
        response
    }
}

impl From<ParseError> for Refusal {
    fn from(error: ParseError) -> Self {
        let (status, code) = match error {
            ParseError::Path => (StatusCode::NOT_FOUND, "UNSUPPORTED"),
            ParseError::Name => (StatusCode::BAD_REQUEST, "NAME_INVALID"),
            ParseError::Tag => (StatusCode::BAD_REQUEST, "MANIFEST_INVALID"),
            ParseError::Digest => (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
            ParseError::Upload => (StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
        };
        Self::new(status, code, error)
    }
}

impl From<StorageError> for Refusal {
    fn from(error: StorageError) -> Self {
        // What the storage says may name places that are nobody's business.
        tracing::error!("{error}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "the storage of this registry fails")
    }
}

impl From<ContentError> for Refusal {
    fn from(error: ContentError) -> Self {
        tracing::error!("{error}");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", "this cannot be read now")
    }
}

impl From<BodyError> for Refusal {
    fn from(error: BodyError) -> Self {
        let status = match error {
            BodyError::Broken(_) => StatusCode::BAD_REQUEST,
            BodyError::Idle(_) => StatusCode::REQUEST_TIMEOUT,
        };
        Self::new(status, "BLOB_UPLOAD_INVALID", error)
    }
}

impl From<UploadError> for Refusal {
    fn from(error: UploadError) -> Self {
        match error {
            UploadError::Body(e) => e.into(),
            UploadError::Storage(e) => e.into(),
            UploadError::Length(_) => Self::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", error),
            UploadError::Overtaken => {
                Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", error)
            }
            UploadError::Digest(_) => Self::digest_invalid(error),
        }
    }
}

impl From<PushError> for Refusal {
    fn from(error: PushError) -> Self {
        match error {
            PushError::Missing(_) => Self::new(StatusCode::BAD_REQUEST, "MANIFEST_BLOB_UNKNOWN", error),
            PushError::Storage(e) => e.into(),
        }
    }
}
