//! A node in this process: everything of a start but the container.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tdfs_agent::fetch::{SourceUse, fetch};
use tdfs_agent::node::{Choice, Prepared, Pull, State, resolve};
use tdfs_agent::oci::{ClientOptions, Reference};
use tdfs_common::digest::ContentHash;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::Segment;

/// The node.
pub struct Node {
    state: State,
    /// How it reaches registries: impatiently, unless told otherwise.
    pub options: ClientOptions,
}

/// What a start did.
#[derive(Debug)]
pub struct Done {
    /// By source.
    pub sources: Vec<SourceUse>,
    /// Pages that were there before.
    pub present: u64,
}

impl Done {
    /// What one source did.
    #[must_use]
    pub fn of(&self, source: &str) -> SourceUse {
        self.sources.iter().find(|s| s.source == source).cloned().unwrap_or_default()
    }
}

impl Node {
    /// A node whose state lies in `dir`.
    pub fn new(dir: &Path) -> Result<Self> {
        let options = ClientOptions {
            idle_timeout: Duration::from_millis(700),
            backoff: Duration::from_millis(5),
            ..ClientOptions::default()
        };
        Ok(Self { state: State::open(dir)?, options })
    }

    /// Resolves and fetches, and reads every page back.
    pub async fn start(&self, image: &str, service: &str) -> Result<Done> {
        let reference: Reference = image.parse()?;
        let choice = Choice::Service(service.to_owned());
        let mut resolved = resolve(&self.state, &reference, &choice, Pull::Missing, &self.options).await?;
        let prepared = Prepared::new(&self.state, &mut resolved, &|_, _| {}).await?;
        let (service, zone) = prepared.hot.as_ref().context("no runtime image")?;
        let mut pages = std::mem::take(&mut resolved.pages);
        let fetched = fetch(&resolved.store, &mut pages, service, zone, &|_, _| {}).await;
        let missing = zone.missing();
        // Whatever is present is right, also after an error.
        let needed = service.needed();
        for frame in service.segments.iter().flat_map(Segment::placed) {
            if frame.pages.clone().all(|p| needed.contains(p) && !missing.contains(p)) {
                let mut bytes = vec![0; frame.frame.pages as usize * PAGE_SIZE];
                zone.data_file().read_exact_at(&mut bytes, frame.pages.start * PAGE_SIZE as u64)?;
                ensure!(ContentHash::of(&bytes) == frame.frame.hash, "wrong bytes in frame {}", frame.index);
            }
        }
        let (stats, commit) = fetched?;
        commit.wait().await?;
        ensure!(missing.count() == 0, "{} pages are missing", missing.count());
        resolved.remembered().await;
        Ok(Done { sources: pages.sources().list(), present: stats.pages_present })
    }
}
