//! The files of an image, and when they are needed.
//!
//! A node that has mounted an image before mounts it again from what it kept ([`crate::rootfs::Kept`]). It then needs
//! neither tree nor layer index, unless a cold page is read or somebody asks for a path: decoding and checking them is
//! most of the work of a start with everything at hand. Loading them later is the same as at once, with all its checks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tdfs_common::layer_index::LayerIndex;
use tdfs_common::tree::{Body, Tree};
use tokio::sync::OnceCell;

use super::{NodeError, State};
use crate::fetch::{FetchError, ImageLayers, LayerStats, Progress, pull_image};
use crate::oci::{Descriptor, Image, Store};
use crate::pack::FoundRuntimeImage;
use crate::record::sandbox::Accounts;
use crate::rootfs::{ColdFiles, ColdImage, ColdSource};

/// Bytes of the largest file that [`ImageFiles::read_file`] reads.
const FILE_MAX: u64 = 1 << 20;

/// The files of an image.
pub struct ImageFiles {
    /// What they are.
    pub tree: Arc<Tree>,
    /// Where their bytes are, but for those in a zone.
    pub layers: Arc<ImageLayers>,
}

/// The files of an image, here or to be loaded when they are needed.
pub enum LazyFiles {
    /// Here.
    Loaded(ImageFiles),
    /// Of a runtime image.
    Later(OnceCell<ImageFiles>, Box<FilesSource>),
}

/// Where files are loaded from.
pub struct FilesSource {
    /// The runtime image.
    pub found: FoundRuntimeImage,
    /// Its image.
    pub image: Image,
    /// Where both are.
    pub store: Store,
    /// The state directory.
    pub state: PathBuf,
}

impl LazyFiles {
    /// The files.
    pub async fn get(&self) -> Result<&ImageFiles, NodeError> {
        match self {
            Self::Loaded(files) => Ok(files),
            Self::Later(files, source) => files.get_or_try_init(|| source.load()).await,
        }
    }

    /// The layers, if they have been needed.
    fn layers(&self) -> Option<&ImageLayers> {
        match self {
            Self::Loaded(files) => Some(&files.layers),
            Self::Later(files, _) => files.get().map(|files| &*files.layers),
        }
    }

    /// What was fetched from layers so far.
    pub fn layer_stats(&self) -> LayerStats {
        self.layers().map(ImageLayers::stats).unwrap_or_default()
    }

    /// Makes what was fetched from layers durable.
    pub async fn flush(&self) -> Result<(), FetchError> {
        match self.layers() {
            Some(layers) => layers.flush().await,
            None => Ok(()),
        }
    }

    /// [`ImageFiles::accounts`], loading the files where it needs them.
    pub async fn accounts(&self, image: &Image) -> Result<(Vec<u8>, Vec<u8>), NodeError> {
        if needs_accounts(image) { self.get().await?.accounts(image).await } else { Ok(Default::default()) }
    }
}

fn needs_accounts(image: &Image) -> bool {
    let user = image.configuration.config().as_ref().and_then(|c| c.user().as_deref());
    Accounts::needed(user.unwrap_or_default())
}

impl FilesSource {
    async fn load(&self) -> Result<ImageFiles, NodeError> {
        let (loaded, ()) = self.found.clone().load(&self.store, &self.state, &self.image, |_| ()).await?;
        ImageFiles::new(&self.state, &self.store, loaded.tree, loaded.index, loaded.windows)
    }
}

impl ImageFiles {
    /// What is in `tree`, and the layers of `index`, kept below the `state` directory and fetched from `store`; `windows`
    /// is the blob with the deflate windows.
    pub(super) fn new(
        state: &Path,
        store: &Store,
        tree: Tree,
        index: LayerIndex,
        windows: Option<Descriptor>,
    ) -> Result<Self, NodeError> {
        let layers = ImageLayers::new(state, store.clone(), index, windows)?;
        Ok(Self { tree: Arc::new(tree), layers: Arc::new(layers) })
    }

    /// Pulls all layers of `image`; also returns their index and the file with the deflate windows, for packing.
    pub async fn pull(
        state: &State,
        store: &Store,
        image: &Image,
        progress: Progress<'_>,
    ) -> Result<(Self, LayerIndex, Option<PathBuf>), NodeError> {
        let pulled = pull_image(state.root(), store, image, progress).await?;
        let files = Self::new(state.root(), store, pulled.tree, pulled.index.clone(), None)?;
        Ok((files, pulled.index, pulled.windows))
    }

    /// The accounts of `image`, whose files these are, where its `User` needs them: `/etc/passwd` and `/etc/group`.
    pub async fn accounts(&self, image: &Image) -> Result<(Vec<u8>, Vec<u8>), NodeError> {
        if !needs_accounts(image) {
            return Ok(Default::default());
        }
        Ok((self.read_file("etc/passwd").await?, self.read_file("etc/group").await?))
    }

    /// The layers as the cold device reads them.
    pub fn cold_source(&self) -> Arc<dyn ColdSource> {
        Arc::new(Layers(Arc::clone(&self.layers)))
    }

    /// A file of the image of at most 1 MiB, out of its layers, since reading it through the mount would leave it in
    /// the page cache; empty where there is none.
    async fn read_file(&self, path: &str) -> Result<Vec<u8>, NodeError> {
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
}

impl ColdImage for LazyFiles {
    fn open(&self) -> BoxFuture<'_, Result<ColdFiles, i32>> {
        Box::pin(async move {
            match self.get().await {
                Ok(files) => Ok((Arc::clone(&files.tree), files.cold_source())),
                Err(error) => {
                    tracing::error!("cold read: {error}");
                    Err(libc::EIO)
                }
            }
        })
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
