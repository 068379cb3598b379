//! A repository of a registry (OCI distribution specification 1.1), reading side.
//!
//! ```text
//! GET  /v2/<repository>/manifests/<tag or digest>
//! GET  /v2/<repository>/blobs/<digest>              whole, or one range
//! GET  /v2/<repository>/referrers/<digest>          else the index at tag sha256-<hex>
//! ```
//!
//! A read goes to the mirrors in order, each once, and then to the registry, which gets retries with growing pauses.
//! A mirror that cannot be reached is not asked again by this store. Redirects are followed to any host, but
//! credentials stay with the one they belong to.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, HeaderName, HeaderValue, LINK, LOCATION, RANGE,
};
use reqwest::{Method, StatusCode};
use tdfs_common::digest::Digest;
use url::Url;

use super::auth::Auth;
use super::credentials::Credentials;
use super::layout::referrers_tag;
use super::manifest::{
    DESCRIPTORS_MAX, Descriptor, Document, INDEX_TYPE, Index, MANIFEST_MAX, MANIFEST_TYPES, limit,
};
use super::transport::{Answer, Kind, Outgoing, Transport, is_as_secure, is_loopback, shown};
use super::{ClientOptions, OciError};

const REDIRECTS_MAX: usize = 8;
/// Refusals of one request: without, with an expired and with a too narrow token.
const CHALLENGES_MAX: usize = 3;
/// Pages of a referrers list.
const PAGES_MAX: usize = 256;
/// The longest pause between attempts, also when the server asks for more.
const PAUSE_MAX: Duration = Duration::from_secs(30);
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A repository, and the mirrors to read it from.
#[derive(Debug)]
pub(super) struct Registry {
    /// Mirrors, then the registry itself.
    endpoints: Vec<Endpoint>,
    pub transport: Arc<Transport>,
    retries: u32,
    backoff: Duration,
    /// Held while a list of referrers is changed.
    pub listing: tokio::sync::Mutex<()>,
}

/// The repository at one address.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// Ends in `/v2/<repository>/`.
    base: Url,
    repository: String,
    auth: Auth,
    transport: Arc<Transport>,
    unreachable: AtomicBool,
}

/// A manifest as it was served.
pub(super) struct Served {
    pub media_type: Option<String>,
    pub bytes: Bytes,
}

impl Registry {
    pub fn open(host: &str, repository: &str, options: &ClientOptions) -> Result<Self, OciError> {
        let transport = Arc::new(Transport::new(options)?);
        let credentials = Credentials::new(options.auth_file.as_deref());
        let endpoint = |base: &str, plain_http: Option<bool>| {
            Endpoint::new(base, repository, plain_http, credentials.clone(), transport.clone())
        };
        let mirrors = options.mirrors.get(host).into_iter().flatten();
        let mut endpoints = mirrors.map(|mirror| endpoint(mirror, None)).collect::<Result<Vec<_>, _>>()?;
        endpoints.push(endpoint(host, options.plain_http)?);
        let (retries, backoff) = (options.retries, options.backoff);
        Ok(Self { endpoints, transport, retries, backoff, listing: tokio::sync::Mutex::default() })
    }

    /// Mirrors, then the registry itself.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The registry itself, for writing and for what must be current.
    pub fn origin(&self) -> &Endpoint {
        &self.endpoints[self.endpoints.len() - 1]
    }

    /// Attempts at the origin.
    pub fn attempts(&self) -> Attempts<'_> {
        Attempts { registry: self, at: self.endpoints.len() - 1, failures: 0 }
    }

    /// Attempts at the mirrors first.
    pub fn attempts_anywhere(&self) -> Attempts<'_> {
        let up = self.endpoints.iter().position(|e| !e.unreachable.load(Ordering::Relaxed));
        Attempts { registry: self, at: up.unwrap_or(self.endpoints.len() - 1), failures: 0 }
    }

    /// A manifest by digest, checked.
    pub async fn manifest(&self, digest: &Digest) -> Result<Served, OciError> {
        let mut attempts = self.attempts_anywhere();
        loop {
            match attempts.endpoint().manifest(&digest.to_string(), Some(digest)).await {
                Ok(served) => return Ok(served),
                Err(e) => attempts.failed(e).await?,
            }
        }
    }

    /// A manifest by tag.
    pub async fn tagged(&self, tag: &str, mut attempts: Attempts<'_>) -> Result<Served, OciError> {
        loop {
            match attempts.endpoint().manifest(tag, None).await {
                Ok(served) => return Ok(served),
                Err(e) => attempts.failed(e).await?,
            }
        }
    }

    /// The digest behind a tag at the registry itself.
    pub async fn tag_digest(&self, tag: &str) -> Result<Option<Digest>, OciError> {
        let mut attempts = self.attempts();
        let head = loop {
            match attempts.endpoint().head(&format!("manifests/{tag}")).await {
                Ok(answer) => break answer,
                Err(e) if e.is_not_found() => return Ok(None),
                Err(e) => attempts.failed(e).await?,
            }
        };
        if let Some(digest) = head.header(CONTENT_DIGEST).and_then(|d| d.parse().ok()) {
            return Ok(Some(digest));
        }
        Ok(Some(Digest::of(&self.tagged(tag, self.attempts()).await?.bytes)))
    }

    /// Whether a blob is there.
    pub async fn has_blob(&self, digest: &Digest, attempts: Attempts<'_>) -> Result<bool, OciError> {
        Ok(self.head_blob(digest, attempts).await?.is_some())
    }

    /// Bytes of a blob, if it is there.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, OciError> {
        let Some(answer) = self.head_blob(digest, self.attempts_anywhere()).await? else { return Ok(None) };
        match answer.length() {
            Some(size) => Ok(Some(size)),
            None => Err(OciError::malformed(answer.url, "a blob without a size")),
        }
    }

    async fn head_blob(
        &self,
        digest: &Digest,
        mut attempts: Attempts<'_>,
    ) -> Result<Option<Answer>, OciError> {
        loop {
            match attempts.endpoint().head(&format!("blobs/{digest}")).await {
                Ok(answer) => return Ok(Some(answer)),
                Err(e) if e.is_not_found() && attempts.is_last() => return Ok(None),
                Err(e) => attempts.failed(e).await?,
            }
        }
    }

    /// A small blob, checked.
    pub async fn blob(&self, digest: &Digest, size: u64) -> Result<Bytes, OciError> {
        let mut attempts = self.attempts_anywhere();
        loop {
            match attempts.endpoint().small_blob(digest, size).await {
                Ok(bytes) => return Ok(bytes),
                Err(e) => attempts.failed(e).await?,
            }
        }
    }

    /// What refers to `subject`.
    pub async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, OciError> {
        let mut attempts = self.attempts_anywhere();
        loop {
            match attempts.endpoint().referrers(subject, artifact_type).await {
                // A mirror may know the image and not what refers to it.
                Ok(found) if found.is_empty() && !attempts.is_last() => {
                    attempts.failed(OciError::NotFound(format!("referrers of {subject}"))).await?;
                }
                Ok(found) => return Ok(found),
                Err(e) => attempts.failed(e).await?,
            }
        }
    }
}

/// Decides after each failure where to ask next, after which pause, or to give up.
pub(super) struct Attempts<'a> {
    registry: &'a Registry,
    at: usize,
    failures: u32,
}

impl<'a> Attempts<'a> {
    pub fn endpoint(&self) -> &'a Endpoint {
        &self.registry.endpoints[self.at]
    }

    /// Whether a failure now can only be repeated at the registry itself.
    pub fn is_last(&self) -> bool {
        self.at + 1 == self.registry.endpoints.len()
    }

    /// Prepares the next attempt, or returns `error` if there is none.
    pub async fn failed(&mut self, error: OciError) -> Result<(), OciError> {
        if self.is_last() {
            pause(self.registry, &mut self.failures, error).await?;
            return Ok(());
        }
        let mirror = self.endpoint();
        if matches!(error, OciError::Transport { .. } | OciError::Idle { .. }) {
            mirror.unreachable.store(true, Ordering::Relaxed);
        }
        tracing::debug!(mirror = %shown(&mirror.base), %error, "asking the next source");
        let later = &self.registry.endpoints[self.at + 1..];
        let up = later.iter().position(|e| !e.unreachable.load(Ordering::Relaxed));
        self.at += 1 + up.unwrap_or(later.len() - 1);
        Ok(())
    }
}

/// Waits before another attempt after `error`, or returns it if there shall be none.
pub(super) async fn pause(registry: &Registry, failures: &mut u32, error: OciError) -> Result<(), OciError> {
    if !error.is_transient() || *failures >= registry.retries {
        return Err(error);
    }
    let mut wait = registry.backoff.saturating_mul(1 << (*failures).min(16));
    // Between half and all of it, so that many nodes do not come back at the same moment.
    let jitter = RandomState::new().hash_one(*failures) % 512;
    wait = wait.saturating_mul(512 + jitter as u32) / 1024;
    if let OciError::Status { retry_after: Some(after), .. } = error {
        wait = wait.max(after);
    }
    *failures += 1;
    tracing::warn!(%error, attempt = *failures, "trying again");
    tokio::time::sleep(wait.min(PAUSE_MAX)).await;
    Ok(())
}

impl Endpoint {
    /// `base` is `host[:port]` or, for mirrors, an address with a scheme and perhaps a path.
    fn new(
        base: &str,
        repository: &str,
        plain_http: Option<bool>,
        credentials: Credentials,
        transport: Arc<Transport>,
    ) -> Result<Self, OciError> {
        let bad = || OciError::Setup(format!("{base:?} is not the address of a registry"));
        let full = if base.contains("://") { base.to_owned() } else { format!("https://{base}") };
        let mut url = Url::parse(&full).map_err(|_| bad())?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() || url.query().is_some() {
            return Err(bad());
        }
        let plain_http = plain_http.unwrap_or_else(|| is_loopback(&url));
        if !base.contains("://") && plain_http {
            // Parsed anew: a port that is the default of one scheme is not that of the other.
            url = Url::parse(&format!("http://{base}")).map_err(|_| bad())?;
        }
        let address = base.split_once("://").map_or(base, |(_, rest)| rest);
        let host = address.split('/').next().unwrap_or(address).to_owned();
        if host == "docker.io" {
            url.set_host(Some("registry-1.docker.io")).map_err(|_| bad())?;
        }
        let path = format!("{}/v2/{repository}/", url.path().trim_end_matches('/').trim_end_matches("/v2"));
        url.set_path(&path);
        Ok(Self {
            base: url,
            repository: repository.to_owned(),
            auth: Auth::new(&host, repository, credentials),
            transport,
            unreachable: AtomicBool::new(false),
        })
    }

    /// The address of `path` in the repository.
    pub fn url(&self, path: &str) -> Result<Url, OciError> {
        self.base.join(path).map_err(|e| OciError::malformed(format!("path {path:?}"), e))
    }

    /// The address of the page service for the repository.
    pub fn pages_url(&self) -> Url {
        let mut url = self.base.clone();
        let path = url.path();
        // The repository may hold a `/v2/` itself, and so may what is before it.
        let at = path.len() - self.repository.len() - "/v2/".len() - "/".len();
        let path = format!("{}/tdfs/v1/{}/pages", &path[..at], self.repository);
        url.set_path(&path);
        url
    }

    /// Host and port.
    pub fn host(&self) -> String {
        let port = self.base.port().map_or_else(String::new, |port| format!(":{port}"));
        format!("{}{port}", self.base.host_str().unwrap_or_default())
    }

    fn name(&self) -> String {
        shown(&self.base).trim_end_matches('/').replacen("/v2/", "/", 1)
    }

    /// Whether credentials may go there.
    fn is_ours(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// Sends a request: authorized, and following redirects if it only reads. Any status may come back except 401.
    pub async fn request(&self, mut request: Outgoing) -> Result<Answer, OciError> {
        let mut trusted = self.is_ours(&request.url);
        let mut challenges = 0;
        let mut redirects = 0;
        loop {
            let used = if trusted { self.auth.header().await } else { None };
            request.headers.remove(AUTHORIZATION);
            if let Some(header) = &used {
                request.headers.insert(AUTHORIZATION, header.clone());
            }
            let answer = self.transport.send(&request).await?;
            if answer.status() == StatusCode::UNAUTHORIZED && trusted {
                challenges += 1;
                let headers = answer.headers().clone();
                // Reading the refusal to its end keeps the connection for the next attempt.
                let refusal = answer.fail().await;
                if challenges <= CHALLENGES_MAX
                    && self.auth.challenged(&self.transport, &request.url, &headers, used.as_ref()).await?
                {
                    continue;
                }
                return Err(self.auth.denied(refusal).await);
            }
            let reads = request.method == Method::GET || request.method == Method::HEAD;
            let Some(target) = answer.header(LOCATION).filter(|_| answer.status().is_redirection() && reads)
            else {
                return Ok(answer);
            };
            let bad =
                |reason: &str| OciError::malformed(format!("redirect from {}", shown(&request.url)), reason);
            let target = request.url.join(target).map_err(|_| bad("no address"))?;
            answer.fail().await;
            redirects += 1;
            if redirects > REDIRECTS_MAX {
                return Err(bad("too many redirects"));
            }
            if !is_as_secure(&request.url, &target) {
                return Err(bad("leads to something less secure"));
            }
            // Who was once sent elsewhere could be sent back to a place of the other host's choice.
            trusted = trusted && self.is_ours(&target);
            request.url = target;
        }
    }

    /// Turns every status but the expected ones into an error.
    pub async fn expect(
        &self,
        answer: Answer,
        expected: &[StatusCode],
        what: &str,
    ) -> Result<Answer, OciError> {
        let status = answer.status();
        if expected.contains(&status) {
            return Ok(answer);
        }
        let failure = answer.fail().await;
        match status {
            StatusCode::NOT_FOUND => Err(OciError::NotFound(format!("{what} in {}", self.name()))),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.auth.denied(failure).await),
            _ => Err(failure),
        }
    }

    async fn head(&self, path: &str) -> Result<Answer, OciError> {
        let mut request = Outgoing::new(Method::HEAD, self.url(path)?, Kind::Metadata);
        accept_manifests(&mut request);
        self.expect(self.request(request).await?, &[StatusCode::OK], path).await
    }

    async fn manifest(&self, name: &str, digest: Option<&Digest>) -> Result<Served, OciError> {
        let mut request = Outgoing::new(Method::GET, self.url(&format!("manifests/{name}"))?, Kind::Metadata);
        accept_manifests(&mut request);
        let answer = self.expect(self.request(request).await?, &[StatusCode::OK], name).await?;
        let what = answer.url.clone();
        let media_type = media_type(&answer);
        let promised = match digest {
            Some(digest) => Some(*digest),
            None => answer.header(CONTENT_DIGEST).and_then(|d| d.parse().ok()),
        };
        let bytes = answer.bytes(MANIFEST_MAX).await?;
        let got = Digest::of(&bytes);
        match promised {
            Some(expected) if expected != got => Err(OciError::Digest { what, expected, got }),
            _ => Ok(Served { media_type, bytes }),
        }
    }

    async fn small_blob(&self, digest: &Digest, size: u64) -> Result<Bytes, OciError> {
        let request = Outgoing::new(Method::GET, self.url(&format!("blobs/{digest}"))?, Kind::Metadata);
        let answer =
            self.expect(self.request(request).await?, &[StatusCode::OK], &digest.to_string()).await?;
        let what = answer.url.clone();
        let bytes = answer.bytes(size).await?;
        super::check(&what, &bytes, digest, size)?;
        Ok(bytes)
    }

    /// Opens `range` of a blob, of `size` bytes if that is known. The answer's body is the range, at least by what its
    /// head says.
    pub async fn open_blob(
        &self,
        digest: &Digest,
        size: Option<u64>,
        range: &Range<u64>,
    ) -> Result<Answer, OciError> {
        let whole = size.is_some_and(|size| *range == (0..size));
        let last = range.end - 1;
        let mut request = Outgoing::new(Method::GET, self.url(&format!("blobs/{digest}"))?, Kind::Data);
        if !whole {
            let value = HeaderValue::from_str(&format!("bytes={}-{last}", range.start));
            request.headers.insert(RANGE, value.map_err(|e| OciError::malformed("range", e))?);
        }
        let answer = self.request(request).await?;
        let wrong = |got: String| OciError::Range { url: answer.url.clone(), start: range.start, last, got };
        match answer.status() {
            StatusCode::OK if whole => match answer.length() {
                Some(got) if got != range.end => {
                    Err(OciError::Size { what: answer.url, expected: range.end, got })
                }
                _ => Ok(answer),
            },
            StatusCode::OK => Err(wrong("the whole blob: this server ignores ranges".into())),
            StatusCode::RANGE_NOT_SATISFIABLE => Err(wrong("status 416: no such range".into())),
            StatusCode::PARTIAL_CONTENT => {
                let content_range = answer.header(CONTENT_RANGE).unwrap_or("no Content-Range");
                let right = parse_content_range(content_range).is_some_and(|(first, end, whole)| {
                    let same_size = size.is_none() || whole.is_none() || whole == size;
                    (first, end) == (range.start, last) && same_size
                });
                if !right {
                    let of = size.map_or_else(String::new, |size| format!(" of {size} bytes"));
                    return Err(wrong(format!("{content_range:?}{of}")));
                }
                match answer.length() {
                    Some(length) if length != range.end - range.start => {
                        Err(wrong(format!("{length} bytes")))
                    }
                    _ => Ok(answer),
                }
            }
            _ => self.expect(answer, &[], &digest.to_string()).await,
        }
    }

    async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, OciError> {
        let mut url = self.url(&format!("referrers/{subject}"))?;
        if let Some(artifact_type) = artifact_type {
            url.query_pairs_mut().append_pair("artifactType", artifact_type);
        }
        let mut next = Some(url);
        let mut found = Vec::new();
        for page in 0..PAGES_MAX {
            let Some(url) = next.take() else { break };
            let mut request = Outgoing::new(Method::GET, url.clone(), Kind::Metadata);
            request.headers.insert(ACCEPT, HeaderValue::from_static(INDEX_TYPE));
            let answer = self.request(request).await?;
            if page == 0 && lacks_referrers(&answer) {
                return Ok(filtered(self.referrers_by_tag(subject).await?, artifact_type));
            }
            let answer = self.expect(answer, &[StatusCode::OK], "referrers").await?;
            // The next page must be here as well: nobody may send us, and our credentials, around.
            next = answer
                .header(LINK)
                .and_then(next_link)
                .and_then(|l| url.join(&l).ok())
                .filter(|u| self.is_ours(u));
            let what = answer.url.clone();
            let index = parse_index(&what, &answer.bytes(MANIFEST_MAX).await?)?;
            limit(
                &format!("{what}: list of referrers"),
                (found.len() + index.len()) as u64,
                DESCRIPTORS_MAX as u64,
            )?;
            found.extend(index);
        }
        Ok(filtered(found, artifact_type))
    }

    /// The list of referrers that clients keep where the registry does not.
    pub async fn referrers_by_tag(&self, subject: &Digest) -> Result<Vec<Descriptor>, OciError> {
        match self.manifest(&referrers_tag(subject), None).await {
            Ok(served) => parse_index(&referrers_tag(subject), &served.bytes),
            Err(e) if e.is_not_found() => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }
}

/// The API is optional: registries without it answer 404, and some another complaint.
fn lacks_referrers(answer: &Answer) -> bool {
    let status = answer.status();
    matches!(status.as_u16(), 400 | 404 | 405 | 406 | 410 | 501)
        // A server for people answers every address with a page.
        || (status == StatusCode::OK && media_type(answer).is_some_and(|t| t == "text/html"))
}

/// Servers may ignore the filter, and lists kept by clients have none.
fn filtered(found: Vec<Descriptor>, artifact_type: Option<&str>) -> Vec<Descriptor> {
    let mut seen = BTreeSet::new();
    let wanted = |d: &Descriptor| artifact_type.is_none_or(|t| d.artifact_type.as_deref() == Some(t));
    found.into_iter().filter(|d| wanted(d) && seen.insert(d.digest)).collect()
}

fn parse_index(what: &str, bytes: &[u8]) -> Result<Vec<Descriptor>, OciError> {
    match Document::parse(what, Some(INDEX_TYPE), bytes)?.1 {
        Document::Index(Index { manifests, .. }) => Ok(manifests),
        Document::Manifest(_) => Err(OciError::malformed(what, "not a list of referrers")),
    }
}

fn accept_manifests(request: &mut Outgoing) {
    for media_type in MANIFEST_TYPES {
        request.headers.append(ACCEPT, HeaderValue::from_static(media_type));
    }
}

fn media_type(answer: &Answer) -> Option<String> {
    let text = answer.header(CONTENT_TYPE)?;
    Some(text.split(';').next().unwrap_or(text).trim().to_ascii_lowercase())
}

/// `bytes FIRST-LAST/SIZE` or `bytes FIRST-LAST/*` (RFC 9110, section 14.4).
fn parse_content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, size) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let size = if size == "*" { None } else { Some(size.parse().ok()?) };
    Some((first.parse().ok()?, last.parse().ok()?, size))
}

/// The target with `rel="next"` of a `Link` header (RFC 8288).
fn next_link(header: &str) -> Option<String> {
    header.split(',').find_map(|link| {
        let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = |p: &str| matches!(p.trim(), r#"rel="next""# | "rel=next");
        parameters.split(';').any(is_next).then(|| target.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(address: &str, plain_http: Option<bool>) -> Result<String, String> {
        let transport = Arc::new(Transport::new(&ClientOptions::default()).unwrap());
        Endpoint::new(address, "a/b", plain_http, Credentials::new(None), transport)
            .map(|e| e.url("blobs/x").unwrap().to_string())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn scheme_follows_from_the_host() {
        for (address, plain_http, url) in [
            ("r.io", None, "https://r.io/v2/a/b/blobs/x"),
            ("r.io:80", None, "https://r.io:80/v2/a/b/blobs/x"),
            ("r.io:443", Some(true), "http://r.io:443/v2/a/b/blobs/x"),
            ("docker.io", None, "https://registry-1.docker.io/v2/a/b/blobs/x"),
            ("localhost:5000", None, "http://localhost:5000/v2/a/b/blobs/x"),
            ("127.8.0.1", None, "http://127.8.0.1/v2/a/b/blobs/x"),
            ("[::1]:5", None, "http://[::1]:5/v2/a/b/blobs/x"),
            ("[::1]:5", Some(false), "https://[::1]:5/v2/a/b/blobs/x"),
            ("https://127.0.0.1:5", None, "https://127.0.0.1:5/v2/a/b/blobs/x"),
            ("http://m.io/proxy/v2/", None, "http://m.io/proxy/v2/a/b/blobs/x"),
        ] {
            assert_eq!(base(address, plain_http).as_deref(), Ok(url));
        }
        for bad in ["ftp://r.io", "http://", "http://r.io?x", "1.2.3.999"] {
            assert!(base(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_page_service_lies_beside_the_registry() {
        for (address, repository, url) in [
            ("r.io", "a/b", "https://r.io/tdfs/v1/a/b/pages"),
            ("localhost:5000", "v2/v2", "http://localhost:5000/tdfs/v1/v2/v2/pages"),
            ("http://m.io/v2/x", "v2/a", "http://m.io/v2/x/tdfs/v1/v2/a/pages"),
        ] {
            let transport = Arc::new(Transport::new(&ClientOptions::default()).unwrap());
            let endpoint =
                Endpoint::new(address, repository, None, Credentials::new(None), transport).unwrap();
            assert_eq!(endpoint.pages_url().to_string(), url);
        }
    }

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 0-9/100"), Some((0, 9, Some(100))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, 9, None)));
        for bad in [
            "",
            "bytes",
            "bytes */100",
            "0-9/100",
            "bytes 0-9",
            "bytes -1-9/10",
            "bytes 0-99999999999999999999/1",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn links() {
        let header = r#"</v2/x?last=a>; rel="prev", </v2/x?last=b>; title=y; rel="next""#;
        assert_eq!(next_link(header).as_deref(), Some("/v2/x?last=b"));
        assert_eq!(next_link("</a>; rel=last"), None);
        assert_eq!(next_link("next"), None);
    }
}
