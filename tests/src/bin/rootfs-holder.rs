//! Holds mounts of the hostile synthetic tree until it is killed: `rootfs-holder DIR RARITY [hang]`.
//!
//! With `hang` the cold device never answers.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use tdfs_agent::rootfs::{ColdSource, Overlay, RootFs, RunDir};
use tdfs_tests::synthetic::{Synthetic, Zone};

struct Hang;

impl ColdSource for Hang {
    fn read(&self, _: u32, _: u64, _: usize) -> BoxFuture<'_, Result<Bytes, i32>> {
        Box::pin(std::future::pending())
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let dir = Path::new(arguments.first().context("a directory")?);
    let rarity = arguments.get(1).context("a rarity")?.parse()?;
    let (tree, layers) = Synthetic::hostile().tree();
    let zone = Zone::random(dir, &tree, &layers, rarity, rarity)?;
    let source: Arc<dyn ColdSource> =
        if arguments.get(2).is_some() { Arc::new(Hang) } else { Arc::new(layers) };
    let runtime = tokio::runtime::Handle::current();
    let held = Arc::new(RunDir::create(&dir.join("held"))?);
    let rootfs = RootFs::mount(held, Arc::new(tree), Some(zone.hot()), source, &runtime)?;
    let _overlay = Overlay::mount(rootfs.path(), &rootfs.dir().join("container"))?;
    println!("mounted");
    std::io::stdout().flush()?;
    std::future::pending().await
}
