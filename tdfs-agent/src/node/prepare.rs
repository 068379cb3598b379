//! Everything of an image that must be on the node before its root file system can be mounted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tdfs_common::bitmap::PageBitmap;
use tdfs_common::digest::Digest;
use tdfs_common::runtime_image::Service;
use tokio::task::{JoinHandle, spawn_blocking};

use super::files::{ImageFiles, LazyFiles};
use super::resolve::Resolved;
use super::{NodeError, State};
use crate::fetch::{Arrivals, Progress};
use crate::rootfs::{HotPages, Keepable, Kept};
use crate::rtpc::{RtpcError, Zone};

/// An image ready to be mounted.
pub struct Prepared {
    /// Its files.
    pub files: Arc<LazyFiles>,
    /// The service whose runtime image is used, and its zone; pages may still be missing.
    pub hot: Option<(Arc<Service>, Arc<Zone>)>,
    /// Zone pages that the service needs and the zone did not have when it was opened.
    pub missing: PageBitmap,
    /// Metadata of an earlier mount with all hot pages on the zone, if none is missing.
    pub kept: Option<Kept>,
}

/// The zone of a service, being opened: that waits for the disk, and nothing else of a start needs to.
pub struct OpeningZone(JoinHandle<Result<(Zone, PageBitmap), RtpcError>>);

impl OpeningZone {
    /// Begins to open the zone of `service`.
    pub(super) fn begin(state: &State, service: &Service) -> Self {
        let (root, service) = (state.root().to_owned(), service.clone());
        Self(spawn_blocking(move || {
            let zone = Zone::open(&root, &service)?;
            let missing = zone.missing();
            Ok((zone, missing))
        }))
    }
}

impl Prepared {
    /// Waits for the zone of the runtime image or, without one, pulls all layers.
    pub async fn new(
        state: &State,
        resolved: &mut Resolved,
        progress: Progress<'_>,
    ) -> Result<Self, NodeError> {
        let store = resolved.store.clone();
        let Some(runtime) = resolved.runtime.take() else {
            let (files, ..) = ImageFiles::pull(state, &store, &resolved.image, progress).await?;
            let (files, missing) = (Arc::new(LazyFiles::Loaded(files)), PageBitmap::new(0));
            return Ok(Self { files, hot: None, missing, kept: None });
        };
        let (kept, manifest) = (state.kept(&runtime.manifest), runtime.manifest);
        let kept = spawn_blocking(move || Kept::open(&kept, manifest.as_bytes()));
        let (zone, missing) = runtime.zone.0.await??;
        let zone = Arc::new(zone);
        let read = Arc::clone(&zone);
        // Asking takes milliseconds, and nobody needs to wait: who comes before a page reads it.
        spawn_blocking(move || read.prefetch());
        let kept = if missing.count() == 0 { kept.await? } else { None };
        let hot = Some((Arc::new(runtime.service), zone));
        Ok(Self { files: Arc::new(runtime.files), hot, missing, kept })
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
}

/// Keeps what is `keepable` of a mount at `path` for the next one. Where that fails, the next one writes it again.
pub(super) async fn keep(keepable: Keepable, path: PathBuf, manifest: Digest) {
    let failed = |path: &Path, error: &dyn std::fmt::Display| {
        tracing::warn!(path = %path.display(), "metadata is not kept: {error}");
    };
    let at = path.clone();
    match spawn_blocking(move || keepable.keep(&at, manifest.as_bytes())).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => failed(&path, &error),
        Err(error) => failed(&path, &error),
    }
}
