//! What goes over the daemon's socket, or to and from a server of one mount: one request and one answer, each a line of
//! JSON.
//!
//! Both ends are of one version: a field that the other one does not know is refused, never ignored.

use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};

use crate::node::{Choice, MountReport, Pull};
use crate::oci::{ClientOptions, Platform};

/// Bytes of the longest line: some paths of 4 KiB.
const LINE_MAX: u64 = 64 << 10;

/// What the daemon is asked.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// To mount an image.
    Mount(MountRequest),
}

/// A mount. All paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    /// The image's reference.
    pub image: String,
    /// An existing directory.
    pub target: PathBuf,
    /// Which runtime image.
    pub choice: Choice,
    /// When to ask the registry.
    pub pull: Pull,
    /// How to ask it.
    pub registries: Registries,
}

/// The part of [`ClientOptions`] that people choose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registries {
    /// See [`ClientOptions::plain_http`].
    pub plain_http: Option<bool>,
    /// Mirrors of the image's own registry, in order.
    pub mirrors: Vec<String>,
    /// See [`ClientOptions::auth_file`].
    pub auth_file: Option<PathBuf>,
    /// See [`ClientOptions::ca_file`].
    pub ca_file: Option<PathBuf>,
    /// See [`ClientOptions::page_service`].
    pub page_service: bool,
    /// See [`ClientOptions::platform`].
    pub platform: Platform,
}

impl Registries {
    /// For an image at the registry `host`, if it is at one.
    pub fn options(self, host: Option<&str>) -> ClientOptions {
        ClientOptions {
            plain_http: self.plain_http,
            mirrors: host.map(|host| (host.to_owned(), self.mirrors)).into_iter().collect(),
            auth_file: self.auth_file,
            ca_file: self.ca_file,
            page_service: self.page_service,
            platform: self.platform,
            ..ClientOptions::default()
        }
    }
}

/// What the daemon answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is mounted.
    Mounted(MountReport),
    /// It is not, for a reason on one line.
    Failed(String),
}

/// Reads one line; the error is for people.
pub async fn read<T: DeserializeOwned>(from: impl AsyncRead + Unpin) -> Result<T, String> {
    let mut line = Vec::new();
    let mut from = BufReader::new(from.take(LINE_MAX));
    from.read_until(b'\n', &mut line).await.map_err(|e| e.to_string())?;
    match line.last() {
        Some(b'\n') => serde_json::from_slice(&line).map_err(|e| format!("not understood: {e}")),
        Some(_) if line.len() as u64 == LINE_MAX => Err(format!("longer than {LINE_MAX} bytes")),
        _ => Err("cut off".into()),
    }
}

/// Writes one line.
pub async fn write(mut to: impl AsyncWrite + Unpin, message: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line).await?;
    to.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        let registries = Registries {
            plain_http: Some(true),
            mirrors: vec!["mirror:5000".into()],
            auth_file: None,
            ca_file: Some("/ca.pem".into()),
            page_service: false,
            platform: Platform::host(),
        };
        Request::Mount(MountRequest {
            image: "registry.example/a:1".into(),
            target: "/mnt/a b".into(),
            choice: Choice::Service("web".into()),
            pull: Pull::Always,
            registries,
        })
    }

    #[tokio::test]
    async fn what_is_written_is_read() {
        let mut line = Vec::new();
        write(&mut line, &request()).await.unwrap();
        assert_eq!(read::<Request>(&line[..]).await.unwrap(), request());
        for cut in 0..line.len() {
            assert_eq!(read::<Request>(&line[..cut]).await.unwrap_err(), "cut off", "at {cut}");
        }
    }

    #[tokio::test]
    async fn what_is_not_known_is_refused() {
        let mut value = serde_json::to_value(request()).unwrap();
        value["mount"]["new"] = 1.into();
        let error = read::<Request>(format!("{value}\n").as_bytes()).await.unwrap_err();
        assert!(error.contains("unknown field `new`"), "{error}");
        for line in ["\n", "{}\n", "{\"unmount\":1}\n", "\u{1}\n", "[[[[[[[[\n"] {
            assert!(read::<Request>(line.as_bytes()).await.unwrap_err().starts_with("not understood"));
        }
        let endless = tokio::io::repeat(b'[');
        assert!(read::<Request>(endless).await.unwrap_err().starts_with("longer"));
    }
}
