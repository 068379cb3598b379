//! Starts from a real `tdfs registry` when things go wrong on the way: the server is killed, the peer is slow or not
//! the one that it should be.

mod killed;
mod slow;
mod tls;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tdfs_tests::fingerprint::Fingerprint;
use tdfs_tests::images::{self, Unpacked, recipe};
use tdfs_tests::proxy::{Pace, Proxy};
use tdfs_tests::server::Server;
use tdfs_tests::tdfs;
use tempfile::TempDir;

/// A directory that servers serve: a real image and the runtime image of its first service.
struct Served {
    dir: TempDir,
    image: &'static str,
    /// The files of the image, as another tool unpacks it.
    oracle: Fingerprint,
    /// Of an answer of the page service to an empty node: bytes of page data.
    data: u64,
    /// All others.
    metadata: u64,
}

impl Served {
    fn new(image: &'static str) -> Result<Self> {
        let dir = TempDir::with_prefix("tdfs-served-")?;
        let oracle = Fingerprint::of(&Unpacked::new(&images::image(image)?, "latest")?.path())?;
        let mut served = Self { dir, image, oracle, data: 0, metadata: 0 };
        let server = served.server(&[])?;
        let reference = server.push(&images::image(image)?, &served.name())?;
        let (service, state) = (&recipe(image)?.services[0], served.show("recorder"));
        let record = ["record", &reference, "--service", service.name, "--ready", service.ready, "--push"];
        tdfs::json(record.into_iter().chain(["--state", &state]))?;
        let proxy = Proxy::start(server.addr, Pace::BytesPerSecond(1 << 30))?;
        let report = tdfs::json(served.run(proxy.addr, "measured", &["--start", "fetched"]))?;
        served.data = number(&report, "bytes_fetched")?;
        ensure!(source(&report, "page_service")["requests"] == 1, "{report}");
        // All pages are there now, and who only mounts reads no cold ones.
        for known in ["metadata", "resolved"] {
            std::fs::remove_dir_all(served.path("measured").join(known))?;
        }
        let proxy = Proxy::start(server.addr, Pace::BytesPerSecond(1 << 30))?;
        served.mounted(proxy.addr, "measured", |_| Ok(()))?;
        served.metadata = proxy.passed();
        Ok(served)
    }

    /// A server over the directory.
    fn server(&self, arguments: &[&str]) -> Result<Server> {
        Server::start(&self.path("root"), arguments)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn show(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn name(&self) -> String {
        format!("team/{}:latest", self.image)
    }

    /// Bytes of an answer of which so many tenths of the page data are through.
    fn tenths(&self, tenths: u64) -> u64 {
        self.metadata + self.data * tenths / 10
    }

    /// Arguments of a start on `node` of the image at `address`.
    fn run(&self, address: SocketAddr, node: &str, more: &[&str]) -> Vec<String> {
        let (image, state) = (format!("{address}/{}", self.name()), self.show(node));
        let run = ["run", &image, "--state", &state, "--network", "private", "--exit-when-ready"];
        run.iter().chain(more).map(|a| (*a).to_owned()).collect()
    }

    /// Looks at the files of the image at `address` as a node sees them.
    fn mounted(&self, address: SocketAddr, node: &str, look: impl Fn(&Path) -> Result<()>) -> Result<()> {
        tdfs::mounted(&format!("{address}/{}", self.name()), &self.path(node), look)
    }

    /// Fails unless the files that a node sees are those of the image, with what it has fetched and what `address` serves.
    fn expect_right(&self, address: SocketAddr, node: &str) -> Result<()> {
        self.mounted(address, node, |root| Fingerprint::of(root)?.expect_equal(&self.oracle))?;
        expect_clean(&self.path(node))
    }
}

/// A number of a report.
fn number(report: &Value, field: &str) -> Result<u64> {
    report[field].as_u64().with_context(|| format!("{field} is no number in {report}"))
}

/// What a source did for a start; null if it was not used.
fn source<'a>(report: &'a Value, name: &str) -> &'a Value {
    let sources = report["sources"].as_array().map_or(&[][..], Vec::as_slice);
    sources.iter().find(|s| s["source"] == name).unwrap_or(&Value::Null)
}

/// Nothing of a node is mounted any more.
fn expect_clean(node: &Path) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let left: Vec<&str> = mounts.lines().filter(|l| l.contains(&node.display().to_string())).collect();
    ensure!(left.is_empty(), "left mounted: {left:?}");
    Ok(())
}
