//! Everything of an image that must be on the node before its root file system can be mounted.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tdfs_common::layer_index::LayerIndex;
use tdfs_common::runtime_image::Service;
use tdfs_common::tree::{Body, Tree};

use super::resolve::Resolved;
use super::{NodeError, State};
use crate::fetch::{Arrivals, ImageLayers, LayerStats, Progress, pull_image};
use crate::oci::{Image, Store};
use crate::record::sandbox::Accounts;
use crate::rootfs::{ColdSource, HotPages};
use crate::rtpc::Zone;

/// Bytes of the largest file that [`Prepared::read_file`] reads.
const FILE_MAX: u64 = 1 << 20;

/// An image ready to be mounted.
pub struct Prepared {
    /// Its files.
    pub tree: Arc<Tree>,
    /// Its layers, for everything that is not in the zone.
    pub layers: Arc<ImageLayers>,
    /// The service whose runtime image is used, and its zone; pages may still be missing.
    pub hot: Option<(Arc<Service>, Arc<Zone>)>,
}

impl Prepared {
    /// Opens the zone of the runtime image or, without one, pulls all layers.
    pub async fn new(
        state: &State,
        resolved: &mut Resolved,
        progress: Progress<'_>,
    ) -> Result<Self, NodeError> {
        let store = resolved.store.clone();
        let Some(runtime) = resolved.runtime.take() else {
            let (prepared, ..) = Self::pull(state, &store, &resolved.image, progress).await?;
            return Ok(prepared);
        };
        let root = state.root().to_owned();
        let service = runtime.service;
        let (service, zone) = tokio::task::spawn_blocking(move || {
            let zone = Zone::open(&root, &service)?;
            zone.prefetch();
            Ok::<_, NodeError>((Arc::new(service), Arc::new(zone)))
        })
        .await??;
        let layers = ImageLayers::new(state.root(), store, runtime.index, runtime.windows)?;
        Ok(Self { tree: Arc::new(runtime.tree), layers: Arc::new(layers), hot: Some((service, zone)) })
    }

    /// Pulls all layers of `image`; also returns their index and the file with the deflate windows, for packing.
    pub async fn pull(
        state: &State,
        store: &Store,
        image: &Image,
        progress: Progress<'_>,
    ) -> Result<(Self, LayerIndex, Option<PathBuf>), NodeError> {
        let pulled = pull_image(state.root(), store, image, progress).await?;
        let layers = ImageLayers::new(state.root(), store.clone(), pulled.index.clone(), None)?;
        let prepared = Self { tree: Arc::new(pulled.tree), layers: Arc::new(layers), hot: None };
        Ok((prepared, pulled.index, pulled.windows))
    }

    /// The pages for the mount, all present or under way with these `arrivals`.
    pub fn hot_pages<'a>(&'a self, arrivals: Option<&'a Arc<Arrivals>>) -> Option<HotPages<'a>> {
        self.hot.as_ref().map(|(service, zone)| HotPages {
            zone: zone.data_file(),
            zone_pages: service.zone_pages(),
            runs: &service.runs,
            arrivals,
        })
    }

    /// The layers as the cold device reads them.
    pub fn cold_source(&self) -> Arc<dyn ColdSource> {
        Arc::new(Layers(Arc::clone(&self.layers)))
    }

    /// What was fetched from layers so far.
    pub fn layer_stats(&self) -> LayerStats {
        self.layers.stats()
    }

    /// A file of the image of at most 1 MiB, out of its layers, since reading it through the mount would leave it in
    /// the page cache; empty where there is none.
    pub async fn read_file(&self, path: &str) -> Result<Vec<u8>, NodeError> {
        let ino = self.tree.resolve(path.as_bytes());
        let Some(Body::Regular { size: size @ ..=FILE_MAX, extents, .. }) =
            ino.map(|ino| &self.tree.inodes[ino as usize].body)
        else {
            return Ok(Vec::new());
        };
        let mut bytes = vec![0; *size as usize];
        for extent in extents {
            let data = self.layers.read(extent.layer, extent.layer_offset, extent.len as usize).await?;
            bytes[extent.file_offset as usize..][..data.len()].copy_from_slice(&data);
        }
        Ok(bytes)
    }

    /// The accounts of the image, where its `User` needs them: `/etc/passwd` and `/etc/group`.
    pub async fn accounts(&self, image: &Image) -> Result<(Vec<u8>, Vec<u8>), NodeError> {
        let user = image.configuration.config().as_ref().and_then(|c| c.user().as_deref());
        if !Accounts::needed(user.unwrap_or_default()) {
            return Ok(Default::default());
        }
        Ok((self.read_file("etc/passwd").await?, self.read_file("etc/group").await?))
    }
}

struct Layers(Arc<ImageLayers>);

impl ColdSource for Layers {
    fn read(&self, layer: u32, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, i32>> {
        Box::pin(async move {
            self.0.read(layer, offset, len).await.map_err(|error| {
                tracing::error!(layer, offset, len, "cold read: {error}");
                error.errno()
            })
        })
    }
}
