//! HTTP without any help: what the tests ask is what goes over the wire.

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tdfs_common::digest::Digest;
use tdfs_tests::server::Server;

pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
pub const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
pub const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// Asks one server.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The code of the error.
    pub fn code(&self) -> String {
        self.json()["errors"][0]["code"].as_str().unwrap_or_default().to_owned()
    }

    /// Fails unless this is an error with this status and code.
    pub fn refused(&self, status: u16, code: &str) -> Result<()> {
        ensure!(self.status == status && self.code() == code, "expected {status} {code}: {self:?}");
        ensure!(self.header("content-type") == "application/json", "{self:?}");
        Ok(())
    }

    /// Fails unless it has this status.
    pub fn expect(self, status: u16) -> Result<Self> {
        ensure!(self.status == status, "expected {status}: {self:?}");
        Ok(self)
    }
}

impl Client {
    pub fn new(server: &Server) -> Self {
        Self::at(&format!("http://{}", server.addr), &[])
    }

    /// With a CA certificate to trust.
    pub fn at(base: &str, roots: &[reqwest::Certificate]) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = reqwest::Client::builder().no_proxy().retry(reqwest::retry::never());
        let http = builder.tls_certs_only(roots.iter().cloned()).build().unwrap();
        Self { http, base: base.to_owned() }
    }

    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let url = if path.starts_with("http") { path.to_owned() } else { format!("{}{path}", self.base) };
        self.http.request(method, url)
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> Result<Answer> {
        let response = request.send().await?;
        let (status, headers) = (response.status(), response.headers().clone());
        Ok(Answer { status, headers, body: response.bytes().await? })
    }

    pub async fn ask(&self, method: Method, path: &str) -> Result<Answer> {
        self.send(self.request(method, path)).await
    }

    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.ask(Method::GET, path).await
    }

    pub async fn head(&self, path: &str) -> Result<Answer> {
        self.ask(Method::HEAD, path).await
    }

    pub async fn delete(&self, path: &str) -> Result<Answer> {
        self.ask(Method::DELETE, path).await
    }

    /// Begins an upload; returns where it goes on.
    pub async fn begin(&self, name: &str) -> Result<String> {
        let answer = self.ask(Method::POST, &format!("/v2/{name}/blobs/uploads/")).await?.expect(202)?;
        Ok(answer.header("location").to_owned())
    }

    /// Sends a piece of an upload.
    pub async fn patch(&self, location: &str, range: Option<&str>, body: Bytes) -> Result<Answer> {
        let mut request = self.request(Method::PATCH, location).body(body);
        if let Some(range) = range {
            request = request.header("content-range", range);
        }
        self.send(request).await
    }

    /// Ends an upload.
    pub async fn finish(&self, location: &str, digest: &str, body: Bytes) -> Result<Answer> {
        let separator = if location.contains('?') { '&' } else { '?' };
        let path = format!("{location}{separator}digest={digest}");
        self.send(self.request(Method::PUT, &path).body(body)).await
    }

    /// Pushes a blob in one request, or in two where one does not suffice.
    pub async fn push_blob(&self, name: &str, blob: &Bytes) -> Result<Digest> {
        let digest = Digest::of(blob);
        let path = format!("/v2/{name}/blobs/uploads/?digest={digest}");
        let answer = self.send(self.request(Method::POST, &path).body(blob.clone())).await?;
        if answer.status == 202 {
            let location = answer.header("location");
            self.finish(location, &digest.to_string(), blob.clone()).await?.expect(201)?;
            return Ok(digest);
        }
        answer.expect(201)?;
        Ok(digest)
    }

    pub async fn put_manifest(&self, name: &str, reference: &str, manifest: &Value) -> Result<Answer> {
        let media_type = manifest["mediaType"].as_str().context("no media type")?;
        let path = format!("/v2/{name}/manifests/{reference}");
        let request = self.request(Method::PUT, &path).header(CONTENT_TYPE, media_type);
        self.send(request.body(manifest.to_string())).await
    }

    /// Pushes an image of these layers; returns its manifest's digest.
    pub async fn push_image(&self, name: &str, reference: Option<&str>, layers: &[Bytes]) -> Result<Digest> {
        let mut descriptors = Vec::new();
        for layer in layers {
            self.push_blob(name, layer).await?;
            descriptors.push(descriptor(LAYER_TYPE, layer));
        }
        let config = Bytes::from(json!({ "rootfs": { "type": "layers", "diff_ids": [] } }).to_string());
        self.push_blob(name, &config).await?;
        let manifest = manifest(&descriptor(CONFIG_TYPE, &config), &descriptors);
        let digest = Digest::of(manifest.to_string().as_bytes());
        let reference = reference.map_or_else(|| digest.to_string(), str::to_owned);
        self.put_manifest(name, &reference, &manifest).await?.expect(201)?;
        Ok(digest)
    }
}

pub fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len() })
}

pub fn manifest(config: &Value, layers: &[Value]) -> Value {
    json!({ "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": layers })
}

/// Bytes without a pattern that a truncation or a shift could repeat.
pub fn noise(len: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}
