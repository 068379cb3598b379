//! Manifests, indexes and descriptors, parsed within hard limits.
//!
//! Both the OCI and the Docker schema 2 spelling are read. A document is what its media type says *and* must have
//! the fields of that and not of the other kind, so that no two programs can read one digest differently.

use std::collections::BTreeMap;

use bytes::Bytes;
use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Deserializer, Serialize};
use tdfs_common::digest::Digest;
use tdfs_common::layer_index::LAYERS_MAX;

use super::platform::Platform;
use super::{OciError, Reference};

/// Media type of an OCI image manifest.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI image configuration.
pub const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of the two bytes `{}`, the config of artifacts that have none.
pub const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// Annotation of an entry of a layout's `index.json`: its tag.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
const DOCKER_MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX_TYPE: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG_TYPE: &str = "application/vnd.docker.container.image.v1+json";

/// What to put into `Accept`.
pub(crate) const MANIFEST_TYPES: [&str; 4] =
    [MANIFEST_TYPE, INDEX_TYPE, DOCKER_MANIFEST_TYPE, DOCKER_INDEX_TYPE];

/// Bytes of a manifest or index: what registries must accept (distribution specification, "Pushing Manifests").
pub const MANIFEST_MAX: u64 = 4 << 20;
/// Bytes of an image configuration.
pub const CONFIG_MAX: u64 = 8 << 20;
/// Descriptors in one index.
pub const DESCRIPTORS_MAX: usize = 4096;

/// Names a blob: what it is, its digest and its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the blob.
    pub media_type: String,
    /// Of the blob.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// Of a manifest that is an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Free metadata.
    #[serde(default, deserialize_with = "null_as_empty", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// What an image manifest is built for, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// Go programs write an empty map or list as `null`.
fn null_as_empty<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Descriptor {
    /// A descriptor with the three fields each has.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            artifact_type: None,
            annotations: BTreeMap::new(),
            platform: None,
        }
    }

    /// Describes `bytes`.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }
}

/// An image manifest, also of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Its own media type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// What kind of artifact; `None` for images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Image configuration, or whatever an artifact keeps there.
    pub config: Descriptor,
    /// Layers from the bottom, or the blobs of an artifact.
    #[serde(default, deserialize_with = "null_as_empty")]
    pub layers: Vec<Descriptor>,
    /// The manifest this one refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free metadata.
    #[serde(default, deserialize_with = "null_as_empty", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// An image index, also of artifacts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// Its own media type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// What kind of artifact; `None` for images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The manifests.
    #[serde(default, deserialize_with = "null_as_empty")]
    pub manifests: Vec<Descriptor>,
    /// The manifest this one refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free metadata.
    #[serde(default, deserialize_with = "null_as_empty", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A parsed manifest or index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// An image manifest.
    Manifest(Manifest),
    /// An image index.
    Index(Index),
}

/// The fields that tell the kinds apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<u32>,
    media_type: Option<String>,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    manifests: Option<serde::de::IgnoredAny>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

fn is_index(media_type: &str) -> bool {
    matches!(media_type, INDEX_TYPE | DOCKER_INDEX_TYPE)
}

impl Document {
    /// Parses `bytes`, which the server or the descriptor called `hint`. Returns the media type as well.
    pub fn parse(what: &str, hint: Option<&str>, bytes: &[u8]) -> Result<(String, Self), OciError> {
        let bad = |reason: &str| OciError::malformed(what, reason);
        limit(what, bytes.len() as u64, MANIFEST_MAX)?;
        let shape: Shape = serde_json::from_slice(bytes).map_err(|e| OciError::malformed(what, e))?;
        if shape.schema_version == Some(1) || shape.fs_layers.is_some() {
            return Err(bad("Docker schema 1 manifests are not supported"));
        }
        if shape.schema_version != Some(2) {
            return Err(bad("not a manifest: schemaVersion is not 2"));
        }
        let known = |t: &&str| MANIFEST_TYPES.contains(t);
        let (hint, own) = (hint.filter(known), shape.media_type.as_deref());
        if let Some(own) = own.filter(|t| !known(t)) {
            return Err(bad(&format!("media type {own:?} is neither a manifest nor an index")));
        }
        if let (Some(hint), Some(own)) = (hint, own)
            && hint != own
        {
            return Err(bad(&format!("served as {hint} but says it is {own}")));
        }
        let index = match hint.or(own) {
            Some(media_type) => is_index(media_type),
            None => shape.manifests.is_some(),
        };
        let media_type = hint.or(own).unwrap_or(if index { INDEX_TYPE } else { MANIFEST_TYPE }).to_owned();
        if index {
            if shape.config.is_some() || shape.layers.is_some() {
                return Err(bad("an index with the fields of a manifest"));
            }
            let index: Index = serde_json::from_slice(bytes).map_err(|e| OciError::malformed(what, e))?;
            count(what, "manifests", index.manifests.len(), DESCRIPTORS_MAX)?;
            return Ok((media_type, Self::Index(index)));
        }
        if shape.manifests.is_some() {
            return Err(bad("a manifest with the fields of an index"));
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|e| OciError::malformed(what, e))?;
        count(what, "layers", manifest.layers.len(), LAYERS_MAX)?;
        Ok((media_type, Self::Manifest(manifest)))
    }

    /// What the document refers to.
    pub fn subject(&self) -> Option<&Descriptor> {
        match self {
            Self::Manifest(m) => m.subject.as_ref(),
            Self::Index(i) => i.subject.as_ref(),
        }
    }

    /// The artifact type, by the rule for referrers: that of the document, else the config's media type unless it is
    /// an image's (distribution specification, "Listing Referrers").
    pub fn artifact_type(&self) -> Option<&str> {
        match self {
            Self::Index(i) => i.artifact_type.as_deref(),
            Self::Manifest(m) => m.artifact_type.as_deref().or_else(|| {
                let config = m.config.media_type.as_str();
                (!matches!(config, CONFIG_TYPE | DOCKER_CONFIG_TYPE)).then_some(config)
            }),
        }
    }

    /// Its annotations.
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        match self {
            Self::Manifest(m) => &m.annotations,
            Self::Index(i) => &i.annotations,
        }
    }

    /// The descriptor a referrers list or a layout's index holds for this document with these bytes.
    pub(super) fn describe(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
        let artifact_type = self.artifact_type().map(str::to_owned);
        let annotations = if artifact_type.is_some() { self.annotations().clone() } else { BTreeMap::new() };
        Descriptor { artifact_type, annotations, ..Descriptor::of(media_type, bytes) }
    }
}

/// One image of one platform, checked against its digests.
#[derive(Clone, Debug)]
pub struct Image {
    /// Of the manifest.
    pub digest: Digest,
    /// Of the manifest.
    pub media_type: String,
    /// The manifest as stored.
    pub manifest: Bytes,
    /// Of the configuration.
    pub config_descriptor: Descriptor,
    /// The configuration as stored.
    pub config: Bytes,
    /// The configuration, parsed.
    pub configuration: ImageConfiguration,
    /// From the bottom.
    pub layers: Vec<Descriptor>,
    /// Digests of the uncompressed layers, one for each of `layers`.
    pub diff_ids: Vec<Digest>,
}

impl Image {
    /// Names the manifest, for a `subject`.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(&self.media_type, self.digest, self.manifest.len() as u64)
    }

    /// Compressed bytes of all layers.
    pub fn size(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size))
    }

    pub(super) fn assemble(
        what: &Reference,
        media_type: String,
        bytes: Bytes,
        manifest: Manifest,
        config: Bytes,
    ) -> Result<Self, OciError> {
        let bad = |reason: String| OciError::Malformed { what: what.to_string(), reason };
        let configuration: ImageConfiguration =
            serde_json::from_slice(&config).map_err(|e| bad(format!("image configuration: {e}")))?;
        let diff_ids = configuration.rootfs().diff_ids();
        if diff_ids.len() != manifest.layers.len() {
            return Err(bad(format!("{} layers but {} diff ids", manifest.layers.len(), diff_ids.len())));
        }
        let diff_ids = diff_ids
            .iter()
            .map(|text| text.parse().map_err(|e| bad(format!("diff id: {e}"))))
            .collect::<Result<Vec<Digest>, OciError>>()?;
        Ok(Self {
            digest: Digest::of(&bytes),
            media_type,
            manifest: bytes,
            config_descriptor: manifest.config,
            config,
            configuration,
            layers: manifest.layers,
            diff_ids,
        })
    }
}

/// Fails when `size` is above `limit`.
pub(super) fn limit(what: &str, size: u64, limit: u64) -> Result<(), OciError> {
    if size <= limit {
        return Ok(());
    }
    Err(OciError::TooLarge { what: what.to_owned(), size, limit })
}

fn count(what: &str, items: &str, count: usize, limit: usize) -> Result<(), OciError> {
    if count <= limit {
        return Ok(());
    }
    Err(OciError::malformed(what, format_args!("{count} {items}, the limit is {limit}")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const D: &str = r#"{"mediaType":"x/y","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0}"#;

    fn parse(hint: Option<&str>, text: &str) -> Result<(String, Document), String> {
        Document::parse("it", hint, text.as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn kinds_are_told_apart() {
        let manifest = format!(r#"{{"schemaVersion":2,"config":{D},"layers":[{D}]}}"#);
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{D}],"annotations":null}}"#);
        assert!(matches!(parse(None, &manifest), Ok((t, Document::Manifest(_))) if t == MANIFEST_TYPE));
        assert!(matches!(parse(None, &index), Ok((t, Document::Index(_))) if t == INDEX_TYPE));
        let docker = parse(Some(DOCKER_MANIFEST_TYPE), &manifest);
        assert!(matches!(docker, Ok((t, Document::Manifest(_))) if t == DOCKER_MANIFEST_TYPE));
        // Servers call anything `application/octet-stream`, or add parameters.
        assert!(matches!(parse(Some("application/json"), &index), Ok((t, _)) if t == INDEX_TYPE));
        let empty = format!(r#"{{"schemaVersion":2,"config":{D},"layers":null}}"#);
        assert!(matches!(parse(None, &empty), Ok((_, Document::Manifest(m))) if m.layers.is_empty()));
    }

    #[test]
    fn documents_of_two_kinds_are_refused() {
        let both = format!(r#"{{"schemaVersion":2,"config":{D},"layers":[],"manifests":[]}}"#);
        for hint in [None, Some(MANIFEST_TYPE), Some(INDEX_TYPE)] {
            assert!(parse(hint, &both).unwrap_err().contains("fields of"), "{hint:?}");
        }
        let typed = format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX_TYPE}","manifests":[]}}"#);
        assert!(parse(Some(MANIFEST_TYPE), &typed).unwrap_err().contains("served as"));
        assert!(parse(Some(MANIFEST_TYPE), r#"{"schemaVersion":2,"manifests":[]}"#).is_err());
        assert!(parse(None, r#"{"schemaVersion":1,"fsLayers":[]}"#).unwrap_err().contains("schema 1"));
        assert!(parse(None, r#"{"schemaVersion":2,"mediaType":"a/b"}"#).unwrap_err().contains("neither"));
        assert!(parse(None, "[]").is_err() && parse(None, "").is_err() && parse(None, "{}").is_err());
    }

    #[test]
    fn limits_hold() {
        let layers = vec![D; LAYERS_MAX + 1].join(",");
        let many = format!(r#"{{"schemaVersion":2,"config":{D},"layers":[{layers}]}}"#);
        assert!(parse(None, &many).unwrap_err().contains("513 layers"));
        let manifests = vec![D; DESCRIPTORS_MAX + 1].join(",");
        let many = format!(r#"{{"schemaVersion":2,"manifests":[{manifests}]}}"#);
        assert!(parse(None, &many).unwrap_err().contains("4097 manifests"));
        let large = format!(r#"{{"schemaVersion":2,"manifests":[]{}}}"#, " ".repeat(MANIFEST_MAX as usize));
        assert!(parse(None, &large).unwrap_err().contains("limit"));
        assert!(parse(None, &"[".repeat(1 << 20)).is_err());
    }

    #[test]
    fn artifact_type_falls_back_to_the_config() {
        let of = |config: &str, own: &str| {
            let config = D.replace("x/y", config);
            let text = format!(r#"{{"schemaVersion":2{own},"config":{config},"layers":[]}}"#);
            parse(None, &text).unwrap().1.artifact_type().map(str::to_owned)
        };
        assert_eq!(of(CONFIG_TYPE, ""), None);
        assert_eq!(of(DOCKER_CONFIG_TYPE, ""), None);
        assert_eq!(of("a/config", ""), Some("a/config".into()));
        assert_eq!(of(CONFIG_TYPE, r#","artifactType":"a/b""#), Some("a/b".into()));
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in r#"[\{\}\[\]",:a-z0-9]{0,200}"#) {
            // Must return, whatever it returns.
            let _ = Document::parse("it", None, &bytes);
            let _ = Document::parse("it", Some(INDEX_TYPE), text.as_bytes());
        }
    }
}
