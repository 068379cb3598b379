//! Checks a runtime image against its image, byte for byte.
//!
//! Layers are pulled whole, by digest, and give the tree; everything the runtime image says is held against that: its
//! own tree, every span of its layer index (read at random from the unmodified blobs), and every page of its service
//! (fetched into a zone of its own). Nothing here trusts what it checks.

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use serde::Serialize;
use tdfs_common::digest::Digest;
use tdfs_common::page::PAGE_SIZE;

use super::{ImageFiles, NodeError, State};
use crate::fetch::{ImageLayers, PageService, Progress, fetch};
use crate::oci::{Image, Store};
use crate::pack::{self, Choice, FileRun};
use crate::rtpc::Zone;

/// What was found right.
#[derive(Clone, Debug, Serialize)]
pub struct Verified {
    /// Service.
    pub service: String,
    /// The artifact manifest.
    pub manifest: Digest,
    /// File pages.
    pub pages: u64,
    /// Spans read at random.
    pub spans: u64,
    /// Inodes of the tree.
    pub inodes: usize,
}

/// Verifies the runtime image `manifest` of `image`.
pub async fn verify(
    state: &State,
    store: &Store,
    image: &Image,
    manifest: Digest,
    progress: Progress<'_>,
) -> Result<Verified, NodeError> {
    let wrong = |reason: String| NodeError::Wrong { manifest, reason };
    let runtime = pack::load(store, state.root(), image, Choice::Pinned(manifest)).await?;
    let (whole, ..) = ImageFiles::pull(state, store, image, progress).await?;
    if runtime.tree != *whole.tree {
        return Err(wrong("its tree is not that of the image's layers".into()));
    }
    let scratch = tempfile::tempdir_in(state.root())
        .map_err(|source| NodeError::State { path: state.root().to_owned(), source })?;
    let index = runtime.index.clone();
    let layers = ImageLayers::new(scratch.path(), store.clone(), runtime.index, runtime.windows)?;
    let mut spans = 0;
    for (n, layer) in index.layers.iter().enumerate() {
        for span in 0..layer.spans.len() {
            let out = layer.span_out(span);
            let len = (out.end - out.start) as usize;
            let read = layers.read(n as u32, out.start, len).await?;
            if read != whole.layers.read(n as u32, out.start, len).await? {
                return Err(wrong(format!("span {span} of layer {n} yields other bytes")));
            }
            spans += 1;
        }
    }
    let (root, service) = (scratch.path().to_owned(), runtime.service.clone());
    let zone = tokio::task::spawn_blocking(move || Zone::open(&root, &service)).await??;
    let zone = Arc::new(zone);
    let (_, commit) = fetch(store, &mut PageService::default(), &runtime.service, &zone, progress).await?;
    commit.wait().await?;
    for run in &runtime.service.runs {
        let mut pages = vec![0; run.count as usize * PAGE_SIZE];
        zone.data_file()
            .read_exact_at(&mut pages, u64::from(run.zone_page) * PAGE_SIZE as u64)
            .map_err(|source| NodeError::State { path: zone.path().to_owned(), source })?;
        let touched = FileRun { ino: run.ino, page: run.file_page, count: run.count };
        let read = |layer, offset, len| whole.layers.read(layer, offset, len);
        if pages != pack::read_pages(&whole.tree, touched, &read).await? {
            let path = String::from_utf8_lossy(&whole.tree.paths()[run.ino as usize]).into_owned();
            return Err(wrong(format!("pages {}+{} of {path:?} are other bytes", run.file_page, run.count)));
        }
    }
    Ok(Verified {
        service: runtime.service.service.clone(),
        manifest,
        pages: runtime.service.file_pages(),
        spans,
        inodes: whole.tree.inodes.len(),
    })
}
