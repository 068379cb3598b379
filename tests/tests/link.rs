//! The links of the benchmark: what they promise of time and bytes.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use xtask::install;
use xtask::network::{Link, Rate, Side, inside};

/// Runs `work` at one end of a link.
fn at<T: Send>(link: &Link, side: Side, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let place = link.place(side);
    inside(Path::new(place.namespace().context("a link has namespaces")?), work)
}

#[test]
fn a_round_trip_takes_as_long_as_it_should_and_every_byte_arrives() -> Result<()> {
    install::packages(install::NETWORK_PACKAGES)?;
    let rtt = Duration::from_millis(40);
    let link = Link::new(201, rtt)?;
    link.shape(Some(Rate { bits: 400_000_000 }))?;
    let content: Vec<u8> = (0..8_u32 << 20).map(|n| (n ^ n >> 9) as u8).collect();
    let before = link.passed()?;
    let listener = at(&link, Side::Registry, || Ok(TcpListener::bind((link.address(Side::Registry), 0))?))?;
    let port = listener.local_addr()?.port();
    let received = std::thread::scope(|scope| {
        scope.spawn(|| -> Result<()> { Ok(listener.accept()?.0.write_all(&content)?) });
        at(&link, Side::Node, || {
            let begin = Instant::now();
            let mut stream = TcpStream::connect((link.address(Side::Registry), port))?;
            ensure!(begin.elapsed() >= rtt, "connected after {:?}", begin.elapsed());
            let mut received = Vec::new();
            stream.read_to_end(&mut received)?;
            Ok(received)
        })
    })?;
    ensure!(received == content, "{} of {} bytes, or others", received.len(), content.len());
    let passed = (link.passed()? - before).bytes;
    ensure!(passed >= content.len() as u64, "only {passed} bytes are counted");
    Ok(())
}
