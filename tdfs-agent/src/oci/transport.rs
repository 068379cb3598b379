//! One HTTP request and its answer: clients, timeouts, counters. No retries, redirects or credentials here.
//!
//! Every wait ends: connecting after the connect timeout, an answer after the idle timeout, and its body when it makes
//! no progress (see `pace.rs`) for as long.
//! Environment proxies (`HTTPS_PROXY`, `NO_PROXY`, ...) apply except to loopback addresses.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{CONTENT_LENGTH, HeaderMap, HeaderName, RETRY_AFTER};
use reqwest::{Certificate, Client, Method, StatusCode, redirect};
use tokio::time::timeout;
use url::{Host, Url};

use super::{ClientOptions, OciError, Pace, Requests, manifest};

/// Uploads slower than this count as hung.
const UPLOAD_BYTES_PER_SECOND: u64 = 64 << 10;
/// Bytes of an error answer that are read.
const MESSAGE_MAX: usize = 16 << 10;
/// Characters of a server's message that are shown.
const MESSAGE_SHOWN: usize = 200;
/// HTTP/2 flow control: enough for 1 GB/s at 16 ms.
const WINDOW: u32 = 16 << 20;

/// What a request is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Metadata,
    Data,
    /// Data if it is answered, otherwise metadata.
    Pages,
}

/// A request to be sent, perhaps more than once.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    pub method: Method,
    pub url: Url,
    pub headers: HeaderMap,
    pub body: Option<Bytes>,
    pub kind: Kind,
}

impl Outgoing {
    pub fn new(method: Method, url: Url, kind: Kind) -> Self {
        Self { method, url, headers: HeaderMap::new(), body: None, kind }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    metadata_requests: AtomicU64,
    data_requests: AtomicU64,
    bytes_received: AtomicU64,
}

impl Counters {
    pub fn request(&self, kind: Kind) {
        let counter = match kind {
            Kind::Metadata => &self.metadata_requests,
            Kind::Data | Kind::Pages => &self.data_requests,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub fn received(&self, bytes: usize) {
        self.bytes_received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn read(&self) -> Requests {
        Requests {
            metadata_requests: self.metadata_requests.load(Ordering::Relaxed),
            data_requests: self.data_requests.load(Ordering::Relaxed),
            bytes_received: self.bytes_received.load(Ordering::Relaxed),
        }
    }
}

/// Sends requests.
#[derive(Debug)]
pub(super) struct Transport {
    /// By (TLS, loopback), made when first needed: reading the system's CA certificates takes milliseconds.
    clients: Mutex<HashMap<(bool, bool), Client>>,
    extra_roots: Vec<Certificate>,
    connect_timeout: Duration,
    idle_timeout: Duration,
    pub counters: Arc<Counters>,
}

impl Transport {
    pub fn new(options: &ClientOptions) -> Result<Self, OciError> {
        let mut extra_roots = Vec::new();
        if let Some(path) = &options.ca_file {
            let pem = std::fs::read(path).map_err(OciError::io(path))?;
            let bad = || OciError::Setup(format!("{} holds no PEM certificate", path.display()));
            extra_roots = Certificate::from_pem_bundle(&pem).map_err(|_| bad())?;
            if extra_roots.is_empty() {
                return Err(bad());
            }
        }
        Ok(Self {
            clients: Mutex::default(),
            extra_roots,
            connect_timeout: options.connect_timeout,
            idle_timeout: options.idle_timeout,
            counters: Arc::default(),
        })
    }

    fn client(&self, url: &Url) -> Result<Client, OciError> {
        let key @ (tls, loopback) = (url.scheme() == "https", is_loopback(url));
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        // An error means that a provider is installed already, which is what we want.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = Client::builder()
            .user_agent(concat!("tdfs/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .connect_timeout(self.connect_timeout)
            .http2_initial_stream_window_size(WINDOW)
            .http2_initial_connection_window_size(4 * WINDOW);
        builder = if tls {
            builder.tls_certs_merge(self.extra_roots.iter().cloned())
        } else {
            builder.tls_certs_only([])
        };
        if loopback {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|e| OciError::Setup(format!("HTTP client: {}", causes(&e))))?;
        clients.insert(key, client.clone());
        Ok(client)
    }

    /// Sends `request` once and returns the answer, whatever its status.
    pub async fn send(&self, request: &Outgoing) -> Result<Answer, OciError> {
        let url = shown(&request.url);
        let mut builder = self
            .client(&request.url)?
            .request(request.method.clone(), request.url.clone())
            .headers(request.headers.clone());
        let mut patience = self.idle_timeout;
        if let Some(body) = &request.body {
            builder = builder.body(body.clone());
            patience += Duration::from_secs(body.len() as u64 / UPLOAD_BYTES_PER_SECOND);
        }
        let sent = match timeout(patience, builder.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => Err(broken(&url, e)),
            Err(_) => Err(OciError::Idle { url: url.clone(), after: patience }),
        };
        // Being sent elsewhere or asked for credentials is not yet the data request.
        let answered = |status: StatusCode| match request.kind {
            Kind::Pages => status == StatusCode::OK,
            _ => !status.is_redirection() && status != StatusCode::UNAUTHORIZED,
        };
        let turned_away = sent.as_ref().is_ok_and(|r| !answered(r.status()));
        self.counters.request(if turned_away { Kind::Metadata } else { request.kind });
        let (pace, counters) = (Pace::new(self.idle_timeout), self.counters.clone());
        Ok(Answer { response: sent?, url, pace, counters })
    }
}

/// An answer whose body is still to be read.
#[derive(Debug)]
pub(super) struct Answer {
    response: reqwest::Response,
    /// Without query and credentials.
    pub url: String,
    pace: Pace,
    counters: Arc<Counters>,
}

impl Answer {
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    pub fn header(&self, name: impl Into<HeaderName>) -> Option<&str> {
        self.headers().get(name.into())?.to_str().ok()
    }

    /// Bytes of the body, if the server said.
    pub fn length(&self) -> Option<u64> {
        self.header(CONTENT_LENGTH)?.parse().ok()
    }

    /// The next piece of the body.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, OciError> {
        let bytes = |chunk: &Option<Bytes>| chunk.as_ref().map_or(0, Bytes::len);
        match self.pace.wait(self.response.chunk(), |chunk| chunk.as_ref().map_or(0, bytes)).await {
            Some(Ok(chunk)) => {
                self.counters.received(bytes(&chunk));
                Ok(chunk)
            }
            Some(Err(e)) => Err(broken(&self.url, e)),
            None => Err(OciError::Idle { url: self.url.clone(), after: self.pace.patience() }),
        }
    }

    /// The whole body; nothing is allocated for a body that announces more than `limit`.
    pub async fn bytes(mut self, limit: u64) -> Result<Bytes, OciError> {
        manifest::limit(&self.url, self.length().unwrap_or(0), limit)?;
        let mut body = BytesMut::new();
        while let Some(chunk) = self.chunk().await? {
            manifest::limit(&self.url, body.len() as u64 + chunk.len() as u64, limit)?;
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    }

    /// The error a status stands for, with what the server says about it.
    pub async fn fail(mut self) -> OciError {
        let (status, url) = (self.status(), self.url.clone());
        let after = self.header(RETRY_AFTER).and_then(|s| s.parse().ok()).map(Duration::from_secs);
        let mut body = Vec::new();
        while let Ok(Some(chunk)) = self.chunk().await {
            body.extend_from_slice(&chunk[..chunk.len().min(MESSAGE_MAX - body.len())]);
            if body.len() == MESSAGE_MAX {
                break;
            }
        }
        let message = message(&body).map_or_else(String::new, |m| format!(": {m}"));
        OciError::Status { url, status: status.as_u16(), message, retry_after: after }
    }
}

/// The first error of a registry's error document (distribution specification, "Error Codes"), else the text.
fn message(body: &[u8]) -> Option<String> {
    let json = serde_json::from_slice::<serde_json::Value>(body).ok();
    let text = match &json {
        Some(json) => {
            let error = &json["errors"][0];
            let said =
                [&error["code"], &error["message"], &json["error"], &json["details"], &json["message"]];
            said.iter().filter_map(|v| v.as_str()).collect::<Vec<_>>().join(" ")
        }
        None if body.starts_with(b"<") => String::new(),
        None => String::from_utf8_lossy(body).into_owned(),
    };
    let clean: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MESSAGE_SHOWN).collect();
    Some(clean.trim().to_owned()).filter(|m| !m.is_empty())
}

fn broken(url: &str, error: reqwest::Error) -> OciError {
    // The address may hold a signature; ours is clean.
    OciError::Transport { url: url.to_owned(), reason: causes(&error.without_url()) }
}

/// An error with its causes in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let text = e.to_string();
        if !line.ends_with(&text) {
            // Writing to a string cannot fail.
            let _ = write!(line, ": {text}");
        }
        cause = e.source();
    }
    line
}

/// An address fit for messages: signatures and passwords removed.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // These fail only for addresses that cannot have a user.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}

/// Whether a server at `from` may send us to `to`: nobody leads from TLS to something that others can read.
pub(super) fn is_as_secure(from: &Url, to: &Url) -> bool {
    matches!((from.scheme(), to.scheme()), (_, "https") | ("http", "http"))
}

pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_is_never_lost() {
        let allowed = |from: &str, to: &str| is_as_secure(&from.parse().unwrap(), &to.parse().unwrap());
        assert!(
            allowed("https://a", "https://b")
                && allowed("http://a", "https://b")
                && allowed("http://a", "http://b")
        );
        assert!(!allowed("https://a", "http://b") && !allowed("https://a", "http://a"));
        assert!(!allowed("http://a", "file:///x") && !allowed("https://a", "ftp://a"));
    }

    #[test]
    fn addresses_are_shown_without_secrets() {
        assert_eq!(shown(&"https://u:p@r.io:5/x?sig=hush#f".parse().unwrap()), "https://r.io:5/x");
    }

    #[test]
    fn servers_messages_are_one_short_line() {
        assert_eq!(message(br#"{"errors":[{"code":"A","message":"b\nc"}]}"#).as_deref(), Some("A b c"));
        assert_eq!(message(br#"{"details":"incorrect password"}"#).as_deref(), Some("incorrect password"));
        assert_eq!(message(b"plain \x1b[31m text").as_deref(), Some("plain  [31m text"));
        assert_eq!(message(b"<html>..."), None);
        assert_eq!(message(b""), None);
        assert_eq!(message(&[b'x'; 1000]).map(|m| m.len()), Some(MESSAGE_SHOWN));
    }

    #[test]
    fn loopback_hosts() {
        for host in ["localhost", "127.0.0.1", "127.1.2.3", "[::1]", "a.localhost"] {
            assert!(is_loopback(&format!("http://{host}:5000").parse().unwrap()), "{host}");
        }
        for host in ["localhost.example.com", "128.0.0.1", "[::2]", "10.0.0.1"] {
            assert!(!is_loopback(&format!("http://{host}:5000").parse().unwrap()), "{host}");
        }
    }
}
