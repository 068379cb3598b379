//! Pushing runtime images, and reading back what their group has.
//!
//! ```text
//! image manifest <--subject-- artifact manifest      one per service, found by its subject
//!                               config  {}
//!                               layers  service metadata, tree, layer index, windows, segments by base
//!                                  ^
//! tag tdfs-group-KEY ---> index ---+                 the newest artifact of each service of the group
//!                           dev.tdfs.zone-pages      zone addresses below this were given out
//! ```
//!
//! Blobs go first, then manifests, then the group's index: an interrupted push leaves blobs for the garbage collector
//! and nothing that names a missing one. No registry can compare and swap a tag, so of two pushes at the same time one
//! service is left out of the index: it works, its pages are just not shared with the next. The image itself is not
//! touched.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tdfs_common::digest::Digest;
use tdfs_common::envelope::{Format as _, decode, encode};
use tdfs_common::layer_index::LayerIndex;
use tdfs_common::runtime_image::{
    ARTIFACT_TYPE, GROUP_ANNOTATION, GROUP_TYPE, LAYER_INDEX_TYPE, SEGMENT_TYPE, SERVICE_ANNOTATION,
    SERVICE_TYPE, Segment, Service, TREE_TYPE, WINDOWS_TYPE, group_key,
};
use tdfs_common::tree::Tree;

use super::PackError;
use super::segment::{Group, Packed};
use crate::fetch::{Progress, page_hashes};
use crate::oci::{
    BlobSource, Descriptor, Document, EMPTY_TYPE, INDEX_TYPE, Image, Index, MANIFEST_TYPE, Manifest, Store,
};

/// When a manifest was made (OCI image specification, "Pre-Defined Annotation Keys").
pub(super) const CREATED_ANNOTATION: &str = "org.opencontainers.image.created";
/// Where the next segment of a group begins, zone pages.
const ZONE_PAGES_ANNOTATION: &str = "dev.tdfs.zone-pages";
/// Reads of small blobs under way at the same time.
const READS_AT_ONCE: usize = 8;

/// A runtime image in its repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Service name.
    pub service: String,
    /// The artifact manifest.
    pub manifest: Descriptor,
}

/// Pushes the services of `packed` beside `image`, which `store` holds already, and enters them into their group.
///
/// `windows` is the blob that `index` names; it may be left out when `store` has it already.
pub async fn attach(
    store: &Store,
    image: &Image,
    packed: &Packed,
    tree: &Tree,
    index: &LayerIndex,
    windows: Option<BlobSource>,
) -> Result<Vec<Attached>, PackError> {
    let mut common = vec![
        push_metadata(store, TREE_TYPE, encode(tree)?).await?,
        push_metadata(store, LAYER_INDEX_TYPE, encode(index)?).await?,
    ];
    if let Some((digest, size)) = &index.windows {
        if let Some(windows) = windows {
            store.push_blob(windows, digest).await?;
        }
        common.push(Descriptor::new(WINDOWS_TYPE, *digest, *size));
    }
    if let Some(new) = &packed.segment {
        store.push_blob(new.path.to_path_buf(), &new.segment.blob).await?;
    }
    let config = push_metadata(store, EMPTY_TYPE, b"{}".to_vec()).await?;
    let created = rfc3339(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
    let mut attached = Vec::new();
    for service in &packed.services {
        let mut layers = vec![push_metadata(store, SERVICE_TYPE, encode(service)?).await?];
        layers.extend(common.iter().cloned());
        let segments = service.segments.iter();
        layers.extend(segments.map(|s| Descriptor::new(SEGMENT_TYPE, s.blob, s.size())));
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(MANIFEST_TYPE.into()),
            artifact_type: Some(ARTIFACT_TYPE.into()),
            config: config.clone(),
            layers,
            subject: Some(image.descriptor()),
            annotations: annotations(&[
                (SERVICE_ANNOTATION, &service.service),
                (GROUP_ANNOTATION, &service.group),
                (CREATED_ANNOTATION, &created),
            ]),
        };
        let mut descriptor = push_json(store, MANIFEST_TYPE, &manifest, None).await?;
        descriptor.artifact_type = manifest.artifact_type;
        descriptor.annotations = manifest.annotations;
        attached.push(Attached { service: service.service.clone(), manifest: descriptor });
    }
    if let Some(first) = packed.services.first() {
        let end = packed.services.iter().map(Service::zone_pages).max().unwrap_or_default();
        enter(store, &first.group, &attached, end).await?;
    }
    Ok(attached)
}

/// Puts the artifacts into the index of their group, in place of older ones of the same services.
async fn enter(store: &Store, group: &str, attached: &[Attached], end: u64) -> Result<(), PackError> {
    let old = group_index(store, group).await?;
    let end = end.max(old.as_ref().map_or(0, zone_pages));
    let mut manifests = old.map_or_else(Vec::new, |index| index.manifests);
    let name = |d: &Descriptor| d.annotations.get(SERVICE_ANNOTATION).cloned();
    manifests.retain(|d| attached.iter().all(|a| Some(&a.service) != name(d).as_ref()));
    manifests.extend(attached.iter().map(|a| a.manifest.clone()));
    let index = Index {
        schema_version: 2,
        media_type: Some(INDEX_TYPE.into()),
        artifact_type: Some(GROUP_TYPE.into()),
        manifests,
        subject: None,
        annotations: annotations(&[(GROUP_ANNOTATION, group), (ZONE_PAGES_ANNOTATION, &end.to_string())]),
    };
    push_json(store, INDEX_TYPE, &index, Some(&group_tag(group))).await?;
    Ok(())
}

/// What the zone of `group` holds in this repository, read back and verified page by page; empty for a new group.
pub async fn read_group(store: &Store, group: &str, progress: Progress<'_>) -> Result<Group, PackError> {
    let Some(index) = group_index(store, group).await? else { return Ok(Group::default()) };
    let services: Vec<Service> = stream::iter(&index.manifests)
        .map(|manifest| read_service(store, &manifest.digest))
        .buffered(READS_AT_ONCE)
        .try_collect()
        .await?;
    let mut segments: Vec<Segment> = services.into_iter().flat_map(|s| s.segments).collect();
    segments.sort_by_key(|s| (s.base, s.blob));
    segments.dedup();
    if !segments.is_sorted_by(|a, b| a.zone_range().end <= b.base) {
        return Err(PackError::Damaged {
            what: format!("group {group:?}"),
            reason: "its services disagree about the zone".into(),
        });
    }
    let pages = page_hashes(store, &segments, progress).await?;
    let end = segments.last().map_or(0, |s| s.zone_range().end).max(zone_pages(&index));
    Ok(Group { segments, pages, end })
}

async fn read_service(store: &Store, artifact: &Digest) -> Result<Service, PackError> {
    let (_, manifest) = artifact_manifest(store, artifact).await?;
    let blob = layer(&manifest, artifact, SERVICE_TYPE)?;
    Ok(decode(&store.blob(blob, Service::MAX_BYTES as u64).await?)?)
}

/// The manifest of a runtime image, as stored and parsed.
pub(super) async fn artifact_manifest(
    store: &Store,
    artifact: &Digest,
) -> Result<(Bytes, Manifest), PackError> {
    let (descriptor, bytes) = store.manifest(artifact).await?;
    match Document::parse(&artifact.to_string(), Some(&descriptor.media_type), &bytes)?.1 {
        Document::Manifest(m) if m.artifact_type.as_deref() == Some(ARTIFACT_TYPE) => Ok((bytes, m)),
        _ => Err(PackError::Damaged { what: artifact.to_string(), reason: "not a runtime image".into() }),
    }
}

/// The only layer of `media_type`.
pub(crate) fn layer<'a>(
    manifest: &'a Manifest,
    artifact: &Digest,
    media_type: &str,
) -> Result<&'a Descriptor, PackError> {
    let mut found = manifest.layers.iter().filter(|l| l.media_type == media_type);
    match (found.next(), found.next()) {
        (Some(layer), None) => Ok(layer),
        (first, _) => {
            let reason = format!("{} {media_type}", if first.is_none() { "no" } else { "more than one" });
            Err(PackError::Damaged { what: artifact.to_string(), reason })
        }
    }
}

async fn group_index(store: &Store, group: &str) -> Result<Option<Index>, PackError> {
    let tag = group_tag(group);
    let Some(digest) = store.tag_digest(&tag).await? else { return Ok(None) };
    let (descriptor, bytes) = store.manifest(&digest).await?;
    let (_, document) = Document::parse(&tag, Some(&descriptor.media_type), &bytes)?;
    match document {
        Document::Index(index)
            if index.artifact_type.as_deref() == Some(GROUP_TYPE)
                && index.annotations.get(GROUP_ANNOTATION).is_some_and(|g| g == group) =>
        {
            Ok(Some(index))
        }
        _ => Err(PackError::Damaged {
            what: format!("tag {tag}"),
            reason: "not the index of the group".into(),
        }),
    }
}

fn zone_pages(index: &Index) -> u64 {
    index.annotations.get(ZONE_PAGES_ANNOTATION).and_then(|n| n.parse().ok()).unwrap_or_default()
}

fn group_tag(group: &str) -> String {
    format!("tdfs-group-{}", group_key(group))
}

fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

async fn push_metadata(store: &Store, media_type: &str, bytes: Vec<u8>) -> Result<Descriptor, PackError> {
    let descriptor = Descriptor::of(media_type, &bytes);
    store.push_blob(bytes, &descriptor.digest).await?;
    Ok(descriptor)
}

async fn push_json(
    store: &Store,
    media_type: &str,
    document: &impl serde::Serialize,
    tag: Option<&str>,
) -> Result<Descriptor, PackError> {
    let bytes = serde_json::to_vec(document)
        .map_err(|e| PackError::Damaged { what: media_type.to_owned(), reason: e.to_string() })?;
    Ok(store.push_manifest(media_type, Bytes::from(bytes), tag).await?)
}

/// A point in time since 1970 as RFC 3339 in UTC with milliseconds, so that later is greater as text too.
fn rfc3339(since: Duration) -> String {
    let seconds = since.as_secs();
    let (mut year, mut day) = (1970, seconds / 86400);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let days_in = |y| if leap(y) { 366 } else { 365 };
    while day >= days_in(year) {
        day -= days_in(year);
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z", day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_like_date_writes_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_102_444_800, "2100-01-01T00:00:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(Duration::from_secs(seconds)), text);
        }
        assert_eq!(rfc3339(Duration::from_millis(1_700_000_000_042)), "2023-11-14T22:13:20.042Z");
    }
}
