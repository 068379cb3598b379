//! A real S3-speaking server (moto) on a free loopback port.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use xtask::tools::python_tool;

/// It runs with the Python of Debian 12.
const MOTO: &str = "moto[server]==5.2.5";

/// The server and what was stored in it; gone when it is dropped.
pub struct Store {
    child: Child,
    endpoint: String,
}

impl Store {
    const BUCKET: &str = "tdfs";

    /// Starts a server with one empty bucket; the server is installed first if it was not yet.
    pub fn start() -> Result<Self> {
        let mut child = Command::new(python_tool("moto_server", MOTO)?)
            .args(["-H", "127.0.0.1", "-p", "0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start the S3 server")?;
        let mut log = BufReader::new(child.stderr.take().context("stderr is piped")?).lines();
        let address: SocketAddr = loop {
            let Some(line) = log.next().transpose()? else {
                bail!("the S3 server did not start: {}", child.wait()?)
            };
            if let Some((_, address)) = line.split_once("http://") {
                break address.trim().parse().context(line.clone())?;
            }
        };
        // Drained all the time, so that the server never blocks on it.
        thread::spawn(move || log.map_while(Result::ok).for_each(drop));
        let store = Self { child, endpoint: format!("http://{address}") };
        let mut stream = TcpStream::connect(address)?;
        let request = format!(
            "PUT /{} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            Self::BUCKET
        );
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "no bucket: {answer}");
        Ok(store)
    }

    /// The root of a registry in it.
    #[must_use]
    pub fn root(&self, prefix: &str) -> String {
        format!("s3://{}/{prefix}", Self::BUCKET)
    }

    /// What a program needs in its environment to use it.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, &str); 5] {
        [
            ("AWS_ENDPOINT", &self.endpoint),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ]
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
