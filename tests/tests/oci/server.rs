//! An HTTP server that misbehaves as told: what no real registry shows on demand.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// With the query.
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Bytes,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// First and last byte asked for.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    }
}

/// What happens after the body, or the part of it that is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The next request is awaited.
    Regular,
    /// The connection is closed.
    Close,
    /// Nothing happens any more.
    Hang,
}

/// An answer, right or wrong.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    /// `content-length` is added unless the body's end is told in another way.
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    /// Bytes of the body that are really sent.
    pub sent: usize,
    pub end: End,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        Self { status, headers: Vec::new(), sent: body.len(), body, end: End::Regular }
    }

    #[expect(clippy::needless_pass_by_value, reason = "numbers and literals are passed as they come")]
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    /// Sends `sent` bytes of the body and then ends so.
    pub fn ending(mut self, sent: usize, end: End) -> Self {
        (self.sent, self.end) = (sent, end);
        self
    }

    /// A blob, or the range of it that was asked for.
    pub fn blob(seen: &Seen, blob: &Bytes) -> Self {
        match seen.range() {
            None => Self::new(200, blob.clone()),
            Some((first, last)) => Self::new(206, blob.slice(first..=last))
                .with("content-range", format!("bytes {first}-{last}/{}", blob.len())),
        }
    }
}

/// The running server; it ends with this.
pub struct Server {
    pub addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Server {
    /// Starts a server that asks `handler` what to answer.
    pub async fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (handler, log) = (Arc::new(handler), seen.clone());
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (handler, log) = (handler.clone(), log.clone());
                // A client that goes away is no concern of the server.
                tokio::spawn(async move { serve(stream, &*handler, &log).await });
            }
        });
        Self { addr, seen, task }
    }

    /// `127.0.0.1:PORT/NAME`, for references.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.addr)
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    stream: TcpStream,
    handler: &(impl Fn(&Seen) -> Reply + Sync),
    log: &Mutex<Vec<Seen>>,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace().map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).await?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let len = headers.get("content-length").map_or(0, |l: &String| l.parse().unwrap());
        let mut body = vec![0; len];
        reader.read_exact(&mut body).await?;
        let seen = Seen { method, path, headers, body: body.into() };
        log.lock().unwrap().push(seen.clone());
        let mut reply = handler(&seen);
        let framed = |(name, _): &(String, String)| {
            matches!(&**name, "content-length" | "transfer-encoding" | "connection")
        };
        if !reply.headers.iter().any(framed) {
            let len = reply.body.len();
            reply = reply.with("content-length", len);
        }
        let mut head = format!("HTTP/1.1 {} Told\r\n", reply.status);
        for (name, value) in &reply.headers {
            head.extend([name, ": ", value, "\r\n"]);
        }
        head += "\r\n";
        writer.write_all(head.as_bytes()).await?;
        if seen.method != "HEAD" {
            writer.write_all(&reply.body[..reply.sent]).await?;
        }
        match reply.end {
            End::Regular => {}
            End::Close => return Ok(()),
            // The client closes the connection when it has lost patience.
            End::Hang => return reader.read_to_end(&mut Vec::new()).await.map(drop),
        }
    }
}
