//! Where a page service may be, and one request to it.
//!
//! A registry's page service, if it has one, lies beside its `/v2/`, under the same credentials:
//!
//! ```text
//! https://host/prefix/v2/<repository>/...
//! https://host/prefix/tdfs/v1/<repository>/pages
//! ```

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use tdfs_common::wire::{REQUEST_TYPE, SERVICE_HEADER, STREAM_TYPE};

use super::registry::{Endpoint, Registry};
use super::transport::{Kind, Outgoing};
use super::{ByteStream, OciError};

/// A mirror or registry that may have a page service for a repository.
#[derive(Clone, Debug)]
pub struct PageSource {
    registry: Arc<Registry>,
    at: usize,
}

/// What a [`PageSource`] says to a request.
pub enum PageAnswer {
    /// The stream of a page service, not verified.
    Stream(ByteStream),
    /// There is no page service.
    Absent,
}

impl PageSource {
    /// The mirrors of a registry in order, then itself.
    pub(super) fn all(registry: &Arc<Registry>) -> Vec<Self> {
        (0..registry.endpoints().len()).map(|at| Self { registry: registry.clone(), at }).collect()
    }

    /// Names the server, to remember things about it.
    pub fn host(&self) -> String {
        self.endpoint().host()
    }

    /// Whether this is a mirror: it may know an image and not what was attached to it.
    pub fn is_mirror(&self) -> bool {
        self.at + 1 < self.registry.endpoints().len()
    }

    /// Sends one request. Errors are those of a page service, or of a server that did not answer.
    pub async fn ask(&self, body: Bytes) -> Result<PageAnswer, OciError> {
        let endpoint = self.endpoint();
        let mut request = Outgoing::new(Method::POST, endpoint.pages_url(), Kind::Pages);
        request.headers.insert(CONTENT_TYPE, HeaderValue::from_static(REQUEST_TYPE));
        request.headers.insert(ACCEPT, HeaderValue::from_static(STREAM_TYPE));
        request.body = Some(body);
        let answer = endpoint.request(request).await?;
        let known = answer.header(HeaderName::from_static(SERVICE_HEADER)).is_some();
        let status = answer.status();
        if known && status == StatusCode::OK {
            let pieces = stream::try_unfold(answer, |mut answer| async move {
                Ok(answer.chunk().await?.map(|piece| (piece, answer)))
            });
            return Ok(PageAnswer::Stream(Box::pin(pieces)));
        }
        let may_pass = status.is_server_error() || matches!(status.as_u16(), 408 | 429);
        let failure = answer.fail().await;
        if known || may_pass { Err(failure) } else { Ok(PageAnswer::Absent) }
    }

    fn endpoint(&self) -> &Endpoint {
        &self.registry.endpoints()[self.at]
    }
}
