//! Finding the runtime image of a service, and believing it only when it fits its image.
//!
//! Policy: a runtime image counts when the caller pins its manifest, or when it lies in the image's own repository as
//! a referrer, so whoever may push there may attach. Everything is named by digest from that manifest down; then the
//! parts are held against each other and against the image, so that no later stage meets a run of an inode that is no
//! file, or a layer that the image does not have.
//!
//! Metadata blobs are kept in `STATE/metadata/HEX`, checked against their digest when read: a second start asks the
//! registry for the list of referrers only.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryFutureExt as _, TryStreamExt as _, stream};
use tdfs_common::digest::Digest;
use tdfs_common::envelope::{Format, decode};
use tdfs_common::layer_index::LayerIndex;
use tdfs_common::page;
use tdfs_common::runtime_image::{
    ARTIFACT_TYPE, GROUP_ANNOTATION, LAYER_INDEX_TYPE, SEGMENT_TYPE, SERVICE_ANNOTATION, SERVICE_TYPE,
    Service, TREE_TYPE, WINDOWS_TYPE,
};
use tdfs_common::tree::{Body, Tree};
use tempfile::NamedTempFile;

use super::PackError;
use super::attach::{CREATED_ANNOTATION, artifact_manifest, layer};
use super::segment::blocking;
use crate::oci::{Descriptor, Image, Manifest, Store};

/// Which runtime image of an image to use.
#[derive(Clone, Copy, Debug)]
pub enum Choice<'a> {
    /// The only service there is.
    Only,
    /// The newest of this service.
    Service(&'a str),
    /// This artifact manifest.
    Pinned(Digest),
}

/// A runtime image as the list of referrers shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available {
    /// Service name.
    pub service: String,
    /// Group name.
    pub group: String,
    /// When it was attached, RFC 3339.
    pub created: String,
    /// The artifact manifest.
    pub manifest: Descriptor,
}

/// A runtime image that fits its image.
#[derive(Clone, Debug)]
pub struct LoadedRuntimeImage {
    /// Of the artifact manifest.
    pub manifest: Digest,
    /// The artifact manifest as stored.
    pub artifact: Bytes,
    /// Page table and segments.
    pub service: Service,
    /// The image's files.
    pub tree: Tree,
    /// Random access into the image's layers.
    pub index: LayerIndex,
    /// The blob with the deflate windows.
    pub windows: Option<Descriptor>,
}

/// The runtime images attached to `image`, the newest of each service, by name.
pub async fn list(store: &Store, image: &Image) -> Result<Vec<Available>, PackError> {
    let found = store.referrers(&image.digest, Some(ARTIFACT_TYPE)).await?;
    let all: Vec<Available> =
        stream::iter(found).map(|manifest| describe(store, manifest)).buffered(8).try_collect().await?;
    Ok(newest(all))
}

/// The newest runtime image of each service, by name.
pub(crate) fn newest(all: Vec<Available>) -> Vec<Available> {
    let mut newest: BTreeMap<String, Available> = BTreeMap::new();
    for available in all {
        let age = |a: &Available| (a.created.clone(), a.manifest.digest);
        match newest.get(&available.service) {
            Some(known) if age(known) >= age(&available) => {}
            _ => drop(newest.insert(available.service.clone(), available)),
        }
    }
    newest.into_values().collect()
}

impl Available {
    /// What a manifest with these annotations is.
    pub(crate) fn new(manifest: Descriptor, annotations: &BTreeMap<String, String>) -> Self {
        let get = |key| annotations.get(key).cloned().unwrap_or_default();
        let (service, group) = (get(SERVICE_ANNOTATION), get(GROUP_ANNOTATION));
        Self { service, group, created: get(CREATED_ANNOTATION), manifest }
    }
}

/// Registries should copy a manifest's annotations into the list; where one does not, the manifest tells.
async fn describe(store: &Store, manifest: Descriptor) -> Result<Available, PackError> {
    let annotations = if manifest.annotations.contains_key(SERVICE_ANNOTATION) {
        manifest.annotations.clone()
    } else {
        artifact_manifest(store, &manifest.digest).await?.1.annotations
    };
    Ok(Available::new(manifest, &annotations))
}

/// A runtime image that belongs to its image, as far as its manifest says.
#[derive(Clone, Debug)]
pub struct FoundRuntimeImage {
    /// Of the artifact manifest.
    pub manifest: Digest,
    /// The artifact manifest as stored.
    pub artifact: Bytes,
    parsed: Manifest,
}

/// Finds a runtime image of `image`.
pub async fn find(store: &Store, image: &Image, choice: Choice<'_>) -> Result<FoundRuntimeImage, PackError> {
    let manifest = match choice {
        Choice::Pinned(digest) => digest,
        Choice::Only | Choice::Service(_) => choose(&list(store, image).await?, &image.digest, choice)?,
    };
    let (artifact, parsed) = artifact_manifest(store, &manifest).await?;
    let found = FoundRuntimeImage { manifest, artifact, parsed };
    if found.parsed.subject.as_ref().map(|s| s.digest) != Some(image.digest) {
        return Err(found.damaged("belongs to another image"));
    }
    Ok(found)
}

/// Loads a runtime image of `image`, keeping its metadata in the `state` directory.
pub async fn load(
    store: &Store,
    state: &Path,
    image: &Image,
    choice: Choice<'_>,
) -> Result<LoadedRuntimeImage, PackError> {
    find(store, image, choice).await?.load(store, state, image, |_| ()).await.map(|(loaded, ())| loaded)
}

impl FoundRuntimeImage {
    /// All of it, and what `early` makes of the page table as soon as that is there, before it is known whether the rest
    /// fits.
    pub async fn load<T>(
        self,
        store: &Store,
        state: &Path,
        image: &Image,
        early: impl FnOnce(&Service) -> T,
    ) -> Result<(LoadedRuntimeImage, T), PackError> {
        let cache = state.join("metadata");
        let service = self.service(store, state).map_ok(|service| (early(&service), service));
        let ((early, service), tree, index) = tokio::try_join!(
            service,
            metadata::<Tree>(store, &cache, self.part(TREE_TYPE)?),
            metadata::<LayerIndex>(store, &cache, self.part(LAYER_INDEX_TYPE)?),
        )?;
        let windows = match index.windows {
            Some(named) => {
                let windows = self.part(WINDOWS_TYPE)?;
                if (windows.digest, windows.size) != named {
                    return Err(self.damaged("holds the windows of another layer index"));
                }
                Some(windows.clone())
            }
            None => None,
        };
        let Self { manifest, artifact, parsed } = self;
        let loaded = LoadedRuntimeImage { manifest, artifact, service, tree, index, windows };
        match loaded.check(image, &parsed) {
            Ok(()) => Ok((loaded, early)),
            Err(reason) => Err(PackError::Damaged { what: manifest.to_string(), reason: reason.to_owned() }),
        }
    }

    /// Its page table alone. Whoever uses it without the rest must know that all of it fits the image.
    pub async fn service(&self, store: &Store, state: &Path) -> Result<Service, PackError> {
        metadata(store, &state.join("metadata"), self.part(SERVICE_TYPE)?).await
    }

    fn part(&self, kind: &str) -> Result<&Descriptor, PackError> {
        layer(&self.parsed, &self.manifest, kind)
    }

    fn damaged(&self, reason: &str) -> PackError {
        PackError::Damaged { what: self.manifest.to_string(), reason: reason.to_owned() }
    }
}

/// The artifact manifest of the runtime image that `choice` means, of those `available` for the image.
pub(crate) fn choose(
    available: &[Available],
    image: &Digest,
    choice: Choice<'_>,
) -> Result<Digest, PackError> {
    let names = || available.iter().map(|a| a.service.as_str()).collect::<Vec<_>>().join(", ");
    let chosen = match (choice, available) {
        (_, []) => return Err(PackError::NoRuntimeImage { image: *image }),
        (Choice::Service(name), all) => all
            .iter()
            .find(|a| a.service == name)
            .ok_or_else(|| PackError::NoService { service: name.to_owned(), available: names() })?,
        (_, [only]) => only,
        _ => return Err(PackError::Ambiguous { available: names() }),
    };
    Ok(chosen.manifest.digest)
}

/// A metadata blob, out of the cache or into it, decoded on a thread of its own.
async fn metadata<T>(store: &Store, cache: &Path, blob: &Descriptor) -> Result<T, PackError>
where
    T: Format + Send + 'static,
{
    let path = cache.join(blob.digest.hex());
    let (cached, digest) = (path.clone(), blob.digest);
    let known = blocking(move || read_cached(&cached, &digest)).await;
    let (bytes, fresh) = match known {
        Some(bytes) => (bytes, false),
        None => (store.blob(blob, T::MAX_BYTES as u64).await?, true),
    };
    blocking(move || {
        let value = decode(&bytes)?;
        if fresh {
            keep(&path, &bytes);
        }
        Ok(value)
    })
    .await
}

/// Metadata blobs that are kept in the `state` directory, at most `count`, the last written first.
pub fn known(state: &Path, count: usize) -> Vec<Digest> {
    let entries = fs::read_dir(state.join("metadata")).into_iter().flatten().flatten();
    let written = |e: &fs::DirEntry| e.metadata().and_then(|m| m.modified()).ok();
    let mut all: Vec<_> = entries
        .filter_map(|e| Some((written(&e)?, format!("sha256:{}", e.file_name().to_str()?).parse().ok()?)))
        .collect();
    all.sort_unstable_by(|a, b| b.cmp(a));
    all.into_iter().take(count).map(|(_, digest)| digest).collect()
}

fn read_cached(path: &Path, digest: &Digest) -> Option<Bytes> {
    let bytes = fs::read(path).ok()?;
    (Digest::of(&bytes) == *digest).then(|| bytes.into())
}

/// Readers check the digest, so a file that a crash cut short only costs a request, as does one that is not written.
fn keep(path: &Path, bytes: &[u8]) {
    let dir = path.parent().unwrap_or(path);
    let written = fs::create_dir_all(dir).and_then(|()| {
        let mut file = NamedTempFile::new_in(dir)?;
        file.write_all(bytes)?;
        Ok(file.persist(path)?)
    });
    if let Err(e) = written {
        tracing::warn!(path = %path.display(), "metadata is not kept: {e}");
    }
}

impl LoadedRuntimeImage {
    /// Holds the parts against the image and against each other.
    fn check(&self, image: &Image, manifest: &Manifest) -> Result<(), &'static str> {
        let ok = |good: bool, reason| if good { Ok(()) } else { Err(reason) };
        let service = &self.service;
        ok(service.image == image.digest, "its service metadata belongs to another image")?;
        let named = manifest.annotations.get(SERVICE_ANNOTATION);
        ok(named.is_none_or(|n| *n == service.service), "its service metadata is of another service")?;
        for segment in &service.segments {
            let listed = |l: &Descriptor| (l.digest, l.size) == (segment.blob, segment.size());
            let mut blobs = manifest.layers.iter().filter(|l| l.media_type == SEGMENT_TYPE);
            ok(blobs.any(listed), "a segment is not among its blobs")?;
        }
        let layers = image.layers.iter().map(|l| (l.digest, l.size)).zip(image.diff_ids.iter().copied());
        let indexed = self.index.layers.iter().map(|l| ((l.blob, l.blob_size), l.diff_id));
        ok(indexed.eq(layers), "its layer index is of another image")?;
        let sizes = self.index.layers.iter().map(|l| l.size);
        ok(sizes.eq(self.tree.layer_sizes.iter().copied()), "its tree is of other layers")?;
        for run in &service.runs {
            let inode = self.tree.inodes.get(run.ino as usize);
            let Some(Body::Regular { size, .. }) = inode.map(|i| &i.body) else {
                return Err("a page of something that is no file");
            };
            let end = u64::from(run.file_page) + u64::from(run.count);
            ok(end <= page::count(*size), "a page past the end of its file")?;
        }
        Ok(())
    }
}
