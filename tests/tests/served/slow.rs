//! Peers that are slow on purpose: clients of the server, and servers of a node.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBuf;
use tdfs_common::digest::Digest;
use tdfs_common::wire::REQUEST_TYPE;
use tdfs_tests::node::Node;
use tdfs_tests::proxy::{Pace, Proxy};
use tdfs_tests::server::Server;
use tempfile::TempDir;

use crate::Served;

/// Of the server.
const PATIENCE: &str = "2s";
/// Between two bytes of somebody slow: every single wait is short enough.
const DRIP: Duration = Duration::from_millis(300);
/// A guard against waiting for ever, not a measurement.
const FOR_EVER: Duration = Duration::from_mins(2);
/// Slow clients of each kind.
const EACH: usize = 20;
/// Connections that the server has at a time.
const PLACES: usize = 1024;
/// What a connection may hold: the buffers of its protocol, and what an answer has ready.
const BYTES_PER_CONNECTION: u64 = 2 << 20;

/// Something slow: what is sent at once, what byte by byte for ever, and whether the answer is read.
struct Slow {
    what: &'static str,
    at_once: String,
    drip: &'static [u8],
    reads: bool,
}

/// Does it until the server ends the connection, or `ended`; returns what the server said.
fn suffer(addr: SocketAddr, slow: &Slow, ended: &AtomicBool) -> Result<String> {
    let mut stream = TcpStream::connect(addr)?;
    setsockopt(&stream, RcvBuf, &4096)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DRIP))?;
    stream.write_all(slow.at_once.as_bytes())?;
    let (begin, mut answer, mut drip) = (Instant::now(), Vec::new(), slow.drip.iter().cycle());
    while !ended.load(Ordering::Relaxed) {
        ensure!(begin.elapsed() < FOR_EVER, "{}: the server puts up with it", slow.what);
        // A slow reader takes a byte now and then.
        let mut piece = [0; 1024];
        let room = if slow.reads { &mut piece[..] } else { &mut piece[..1] };
        if !slow.reads {
            thread::sleep(DRIP);
        }
        match stream.read(room) {
            Ok(0) => break,
            Ok(len) => answer.extend_from_slice(&room[..len]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
        if let Some(byte) = drip.next()
            && stream.write_all(&[*byte]).is_err()
        {
            // What it said before it closed.
            let _ = stream.read_to_end(&mut answer);
            break;
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn connections(server: &Server) -> Result<u64> {
    let metrics = exchange(server.addr, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("tdfs_registry_connections "));
    Ok(line.context("no such counter")?.parse()?)
}

/// One whole request.
fn exchange(addr: SocketAddr, request: &str) -> Result<String> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(FOR_EVER))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A size of a process in `/proc`, bytes.
fn memory(server: &Server, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

/// The head of a push of a blob, but for how long it is.
fn upload(blob: &[u8]) -> String {
    let digest = Digest::of(blob);
    format!("POST /v2/a/blobs/uploads/?digest={digest} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
}

#[test]
fn slow_clients_are_ended_and_others_served_meanwhile() -> Result<()> {
    let dir = TempDir::new()?;
    let server = Server::start(dir.path(), &["--patience", PATIENCE])?;
    // A blob that no buffer of the kernel holds.
    let large = vec![7; 64 << 20];
    let mut stream = TcpStream::connect(server.addr)?;
    write!(stream, "{}Content-Length: {}\r\n\r\n", upload(&large), large.len())?;
    stream.write_all(&large)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    let digest = Digest::of(&large);

    let pages = format!("POST /tdfs/v1/a/pages HTTP/1.1\r\nHost: x\r\nContent-Type: {REQUEST_TYPE}\r\n");
    let get = format!("GET /v2/a/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n");
    let slow = |what, at_once: &str, drip, reads| Slow { what, at_once: at_once.to_owned(), drip, reads };
    let kinds = [
        slow("says nothing", "", b"", true),
        slow("begins HTTP/2 and stops", "PRI * HT", b"", true),
        slow("a head byte by byte", "GET /v2/ HTTP/1.1\r\n", b"x: y\r\n", true),
        slow("a second head byte by byte", "GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\nGET ", b"/", true),
        slow(
            "an upload byte by byte",
            &format!("{}Content-Length: 1000000\r\n\r\n", upload(b"x")),
            b"x",
            true,
        ),
        slow("an upload that stops", &format!("{}Content-Length: 1000000\r\n\r\nx", upload(b"x")), b"", true),
        slow(
            "chunks byte by byte",
            &format!("{}Transfer-Encoding: chunked\r\n\r\n", upload(b"x")),
            b"1\r\nx\r\n",
            true,
        ),
        slow(
            "a request for pages byte by byte",
            &format!("{pages}Content-Length: 100000\r\n\r\n"),
            b"x",
            true,
        ),
        slow("a blob read byte by byte", &get, b"", false),
    ];
    let before = memory(&server, "VmRSS:")?;
    let ended = AtomicBool::new(false);
    let answers = thread::scope(|scope| {
        let suffering: Vec<_> = kinds
            .iter()
            .flat_map(|slow| std::iter::repeat_n(slow, EACH))
            .map(|slow| (slow, scope.spawn(|| suffer(server.addr, slow, &ended))))
            .collect();
        let outcome = others(&server, &digest, suffering.len() as u64);
        // Who does not read does not see the end either.
        ended.store(true, Ordering::Relaxed);
        let mut answers = Vec::new();
        for (slow, thread) in suffering {
            match thread.join() {
                Ok(answer) => answers.push((slow, answer?)),
                Err(_) => bail!("a client panicked"),
            }
        }
        outcome.map(|()| answers)
    })?;
    for (slow, answer) in answers {
        // Whoever sent a whole head is told.
        let expected = match slow.what {
            "an upload byte by byte"
            | "an upload that stops"
            | "chunks byte by byte"
            | "a request for pages byte by byte" => "HTTP/1.1 408",
            "a second head byte by byte" => "HTTP/1.1 200",
            _ => "",
        };
        ensure!(answer.starts_with(expected), "{}: {answer:?}", slow.what);
    }
    let grown = memory(&server, "VmHWM:")?.saturating_sub(before);
    let bound = (EACH * kinds.len()) as u64 * BYTES_PER_CONNECTION;
    ensure!(grown < bound, "{grown} bytes for slow clients");
    Ok(())
}

/// Others are served all the time, until the server has been rid of `slow` connections.
fn others(server: &Server, digest: &Digest, slow: u64) -> Result<()> {
    let range = "Connection: close\r\nRange: bytes=5-9";
    let get = format!("GET /v2/a/blobs/{digest} HTTP/1.1\r\nHost: x\r\n{range}\r\n\r\n");
    let (begin, mut most) = (Instant::now(), 0);
    for n in 0.. {
        let answer = exchange(server.addr, &get)?;
        ensure!(
            answer.starts_with("HTTP/1.1 206") && answer.ends_with("\u{7}\u{7}\u{7}\u{7}\u{7}"),
            "{answer}"
        );
        let blob = format!("blob {n}");
        let push = format!("{}Content-Length: {}\r\n\r\n{blob}", upload(blob.as_bytes()), blob.len());
        let answer = exchange(server.addr, &push)?;
        ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
        // With the one that asks.
        let open = connections(server)?;
        most = most.max(open);
        if most > slow / 2 && open == 1 {
            break;
        }
        ensure!(begin.elapsed() < FOR_EVER, "the server puts up with {open} connections");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

#[test]
fn who_comes_when_all_places_are_taken_waits_for_one() -> Result<()> {
    // Each is an open file here too.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let dir = TempDir::new()?;
    let server = Server::start(dir.path(), &["--patience", "1h"])?;
    // The kernel gives them to the server in this order.
    let mut idle = (0..PLACES).map(|_| TcpStream::connect(server.addr)).collect::<Result<Vec<_>, _>>()?;
    let mut late = TcpStream::connect(server.addr)?;
    late.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    late.set_read_timeout(Some(Duration::from_secs(1)))?;
    let early = late.read(&mut [0]).map_err(|e| e.kind());
    ensure!(matches!(early, Err(ErrorKind::WouldBlock)), "not one of {PLACES}, and yet {early:?}");
    idle.pop();
    late.set_read_timeout(Some(FOR_EVER))?;
    let mut answer = String::new();
    late.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
    // Those that wait idly are no worse off.
    for mut stream in [idle.pop(), idle.drain(..).next()].into_iter().flatten() {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        answer.clear();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_servers_are_left_or_end_the_start_with_one_error() -> Result<()> {
    let served = Served::new("nginx")?;
    let server = served.server(&[])?;
    let image = |addr: SocketAddr| format!("{addr}/{}", served.name());
    let (trickle, never) = (Duration::from_millis(20), Duration::from_hours(1));
    // The heads of answers, their bodies, pages: too slow, or not at all.
    for (n, bytes) in [0, 1000, served.tenths(0)].into_iter().enumerate() {
        for (how, pause) in [("trickle", trickle), ("stand still", never)] {
            let proxy = Proxy::start(server.addr, Pace::TrickleAfter(bytes, pause))?;
            let mut node = Node::new(&served.path(&format!("{how}-{n}")))?;
            node.options.retries = 1;
            let there = image(proxy.addr);
            let begun = node.start(&there, "nginx");
            let slow = tokio::time::timeout(FOR_EVER, begun).await.context("it waits for ever")?;
            match slow {
                // A connection that brings all metadata brings also some pages, each time it is made anew, and ranges more.
                Ok(done) => ensure!(n == 2, "{how} after {bytes}: {done:?}"),
                Err(error) => {
                    let error = error.to_string();
                    ensure!(error.contains("received for 0.7 s") && !error.contains('\n'), "{error}");
                    ensure!(error.contains(&proxy.addr.to_string()), "{error}");
                }
            }
            // As a mirror it only costs time.
            let mut node = Node::new(&served.path(&format!("{how}-mirror-{n}")))?;
            node.options.mirrors =
                [(server.addr.to_string(), vec![format!("http://{}", proxy.addr)])].into_iter().collect();
            let done = node.start(&image(server.addr), "nginx").await?;
            ensure!(done.of("mirror").failures.contains_key("stalled"), "{done:?}");
            ensure!(n == 2 || done.of("page_service").pages > 0, "{done:?}");
            // And what was begun slowly is gone on with.
            Node::new(&served.path(&format!("{how}-{n}")))?.start(&image(server.addr), "nginx").await?;
        }
    }
    Ok(())
}
