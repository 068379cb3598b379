//! A real registry (Debian's docker-registry) on a free loopback port with storage of its own.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// How the registry is to be started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Ask everybody for this user and password.
    pub basic_auth: Option<(String, String)>,
    /// Ask for tokens of this realm (an address), signed by a key whose certificate is in this PEM file.
    pub token_auth: Option<(String, PathBuf)>,
    /// PEM files of the certificate and the key to speak TLS with.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Be a mirror of the registry at this address.
    pub proxy: Option<String>,
}

/// The running registry; killed on drop.
#[derive(Debug)]
pub struct Registry {
    /// `127.0.0.1:PORT`.
    pub addr: SocketAddr,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    _dir: TempDir,
}

/// Token service and issuer name of [`Options::token_auth`].
pub const TOKEN_SERVICE: &str = "tdfs-test-registry";

impl Registry {
    /// Starts a registry and waits until it listens.
    pub fn start(options: &Options) -> Result<Self> {
        let dir = TempDir::new()?;
        let root = dir.path().join("storage");
        let mut config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:0\n",
            root.display()
        );
        if let Some((certificate, key)) = &options.tls {
            let (certificate, key) = (certificate.display(), key.display());
            write!(config, "  tls:\n    certificate: {certificate}\n    key: {key}\n")?;
        }
        if let Some((user, password)) = &options.basic_auth {
            let out = Command::new("htpasswd").args(["-nbB", user, password]).output().context("htpasswd")?;
            let path = dir.path().join("htpasswd");
            fs::write(&path, out.stdout)?;
            write!(config, "auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path.display())?;
        }
        if let Some((realm, certificate)) = &options.token_auth {
            let certificate = certificate.display();
            write!(
                config,
                "auth:\n  token:\n    realm: {realm}\n    service: {TOKEN_SERVICE}\n    issuer: {TOKEN_SERVICE}\n    rootcertbundle: {certificate}\n"
            )?;
        }
        if let Some(upstream) = &options.proxy {
            write!(config, "proxy:\n  remoteurl: {upstream}\n")?;
        }
        let path = dir.path().join("config.yml");
        fs::write(&path, config)?;
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("docker-registry")?;
        let mut lines = BufReader::new(child.stderr.take().context("no log")?).lines();
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut seen = Vec::new();
        let addr = loop {
            let Some(line) = lines.next().transpose()? else {
                child.wait()?;
                bail!("docker-registry did not start:\n{}", seen.join("\n"));
            };
            if let Some((_, rest)) = line.split_once("listening on ") {
                let end =
                    rest.find(|c: char| c != '.' && c != ':' && !c.is_ascii_digit()).unwrap_or(rest.len());
                break rest[..end].parse().with_context(|| line.clone())?;
            }
            seen.push(line);
        };
        let kept = Arc::clone(&log);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Self { addr, child, log, _dir: dir })
    }

    /// `127.0.0.1:PORT/NAME`, for references.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.addr)
    }

    /// Log lines so far that contain `text`. The registry logs a request after it answered.
    pub fn logged(&self, text: &str) -> usize {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).iter().filter(|l| l.contains(text)).count()
    }

    /// Stops the registry now; connections break.
    pub fn kill(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.kill();
    }
}
