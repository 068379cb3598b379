//! From a request to the image, the runtime image and the service metadata it is about.
//!
//! The policy is that of [`pack::load`](crate::pack::load): through indexes to the platform, then the newest runtime
//! image of the service. Whatever is sent is verified by the node; here only the service metadata is, because it is
//! decoded.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use tdfs_common::digest::Digest;
use tdfs_common::envelope::decode;
use tdfs_common::runtime_image::{
    ARTIFACT_TYPE, LAYER_INDEX_TYPE, SERVICE_ANNOTATION, SERVICE_TYPE, Service, TREE_TYPE,
};
use tdfs_common::wire::{Choice, Part, Reference, Request, Wanted};

use super::services::Services;
use super::{Content, Refusal, blocking};
use crate::oci::{self, Descriptor, Document, Manifest, Platform};
use crate::pack::{self, Available};
use crate::registry::Stored;

/// Indexes within indexes that are followed.
const NESTING_MAX: usize = 4;
/// Manifests that are read because a list of referrers does not say which service they are of.
const DESCRIBED_MAX: usize = 64;
/// Bytes of a service metadata blob that is answered for; a node gets larger ones with the blobs of its registry.
const SERVICE_MAX: u64 = 16 << 20;

/// What a request is about.
pub struct Resolved {
    /// Documents on the way to the runtime image, in the order they verify each other.
    pub documents: Vec<(Part, Stored)>,
    /// Blobs they name that the node lacks.
    pub blobs: Vec<(Part, Descriptor)>,
    /// What pages are needed; `None` for an image without runtime image.
    pub service: Option<Arc<Service>>,
}

/// Finds what `request` is about.
pub async fn resolve(
    content: &dyn Content,
    services: &Services,
    repository: &str,
    request: &Request,
) -> Result<Resolved, Refusal> {
    let found = Finder { content, services, repository };
    match &request.wanted {
        Wanted::Pages { image, artifact } => {
            let (_, manifest) = found.artifact(artifact).await?;
            if manifest.subject.as_ref().is_none_or(|s| s.digest != *image) {
                return Err(Refusal::NoRuntimeImage(format!("{artifact} belongs to another image")));
            }
            let service = found.service(part(&manifest, artifact, SERVICE_TYPE)?).await?;
            Ok(Resolved { documents: Vec::new(), blobs: Vec::new(), service: Some(service) })
        }
        Wanted::Image { reference, platform, choice, known } => {
            let platform: Platform =
                platform.parse().map_err(|_| Refusal::Name(format!("{platform:?}, no platform")))?;
            let (mut documents, image, config) = found.image(reference, &platform).await?;
            let mut blobs = vec![(Part::Config, config)];
            let mut service = None;
            if let Some(artifact) = found.choose(&image, choice).await? {
                let (stored, manifest) = found.artifact(&artifact).await?;
                documents.push((Part::Artifact, stored));
                let metadata = [
                    (Part::Service, SERVICE_TYPE),
                    (Part::Tree, TREE_TYPE),
                    (Part::LayerIndex, LAYER_INDEX_TYPE),
                ];
                for (kind, media_type) in metadata {
                    blobs.push((kind, part(&manifest, &artifact, media_type)?.clone()));
                }
                service = Some(found.service(part(&manifest, &artifact, SERVICE_TYPE)?).await?);
            }
            blobs.retain(|(_, blob)| !known.contains(&blob.digest));
            Ok(Resolved { documents, blobs, service })
        }
    }
}

struct Finder<'a> {
    content: &'a dyn Content,
    services: &'a Services,
    repository: &'a str,
}

impl Finder<'_> {
    /// The indexes and the image manifest behind `reference`, the image's digest and its configuration.
    async fn image(
        &self,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<(Vec<(Part, Stored)>, Digest, Descriptor), Refusal> {
        let mut name = self.name(reference)?;
        let mut documents = Vec::new();
        for _ in 0..=NESTING_MAX {
            let (stored, document) = self.document(&name).await?;
            match document {
                Document::Manifest(manifest) => {
                    if Document::Manifest(manifest.clone()).artifact_type().is_some() {
                        return Err(Refusal::NotFound(format!("{name} is not an image")));
                    }
                    let digest = stored.digest;
                    documents.push((Part::Image, stored));
                    return Ok((documents, digest, manifest.config));
                }
                Document::Index(index) => {
                    let chosen = platform.choose(&name, &index.manifests);
                    name = chosen.map_err(|e| Refusal::NotFound(e.to_string()))?.digest.to_string();
                    documents.push((Part::Index, stored));
                }
            }
        }
        Err(Refusal::Damaged(format!("more than {NESTING_MAX} indexes within each other")))
    }

    /// The reference as storage takes it; only well-formed names get that far.
    fn name(&self, reference: &Reference) -> Result<String, Refusal> {
        let name = match reference {
            Reference::Tag(tag) => tag.clone(),
            Reference::Digest(digest) => digest.to_string(),
        };
        let separator = if matches!(reference, Reference::Tag(_)) { ':' } else { '@' };
        let full = format!("localhost/{}{separator}{name}", self.repository);
        let shown = || Refusal::Name(format!("{:?}", full.chars().skip(10).take(300).collect::<String>()));
        let parsed: oci::Reference = full.parse().map_err(|_| shown())?;
        if parsed.to_string() == full { Ok(name) } else { Err(shown()) }
    }

    async fn document(&self, name: &str) -> Result<(Stored, Document), Refusal> {
        let stored = self.content.manifest(self.repository, name).await?;
        let parsed = Document::parse(name, Some(&stored.media_type), &stored.bytes);
        let (_, document) = parsed.map_err(|e| Refusal::Damaged(e.to_string()))?;
        Ok((stored, document))
    }

    async fn artifact(&self, digest: &Digest) -> Result<(Stored, Manifest), Refusal> {
        self.name(&Reference::Digest(*digest))?;
        match self.document(&digest.to_string()).await? {
            (stored, Document::Manifest(m)) if m.artifact_type.as_deref() == Some(ARTIFACT_TYPE) => {
                Ok((stored, m))
            }
            _ => Err(Refusal::NoRuntimeImage(format!("{digest} is not a runtime image"))),
        }
    }

    /// The artifact manifest of the runtime image of `image` to use, if there is one.
    async fn choose(&self, image: &Digest, choice: &Choice) -> Result<Option<Digest>, Refusal> {
        let choice = match choice {
            Choice::Pinned(digest) => return Ok(Some(*digest)),
            Choice::Any => pack::Choice::Only,
            Choice::Service(name) => pack::Choice::Service(name),
        };
        let mut found = self.content.referrers(self.repository, image).await?;
        found.retain(|d| d.artifact_type.as_deref() == Some(ARTIFACT_TYPE));
        let mut available = Vec::new();
        let mut described = 0;
        for manifest in found {
            let annotations = if manifest.annotations.contains_key(SERVICE_ANNOTATION) {
                manifest.annotations.clone()
            } else {
                described += 1;
                if described > DESCRIBED_MAX {
                    return Err(Refusal::Damaged("too many runtime images without a name".into()));
                }
                self.artifact(&manifest.digest).await?.1.annotations
            };
            available.push(Available::new(manifest, &annotations));
        }
        if available.is_empty() && matches!(choice, pack::Choice::Only) {
            return Ok(None);
        }
        let chosen = pack::choose(&pack::newest(available), image, choice);
        chosen.map(Some).map_err(|e| Refusal::NoRuntimeImage(e.to_string()))
    }

    async fn service(&self, blob: &Descriptor) -> Result<Arc<Service>, Refusal> {
        if let Some(service) = self.services.get(&blob.digest) {
            return Ok(service);
        }
        if blob.size > SERVICE_MAX {
            return Err(Refusal::NoRuntimeImage(format!(
                "service metadata of {} bytes is fetched as a blob",
                blob.size
            )));
        }
        let bytes = self.read(blob).await?;
        let expected = blob.digest;
        let decoded = blocking(move || {
            let digest = Digest::of(&bytes);
            if digest != expected {
                return Err(format!("{expected}: content has digest {digest}"));
            }
            decode::<Service>(&bytes).map_err(|e| format!("{expected}: {e}"))
        });
        let service = Arc::new(decoded.await?.map_err(Refusal::Damaged)?);
        self.services.insert(blob.digest, &service);
        Ok(service)
    }

    async fn read(&self, blob: &Descriptor) -> Result<Bytes, Refusal> {
        let mut pieces = self.content.blob(self.repository, &blob.digest, 0..blob.size).await?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = pieces.next().await {
            bytes.extend_from_slice(&piece?);
            if bytes.len() as u64 > blob.size {
                return Err(Refusal::Damaged(format!("{} is longer than {} bytes", blob.digest, blob.size)));
            }
        }
        Ok(bytes.freeze())
    }
}

fn part<'a>(manifest: &'a Manifest, artifact: &Digest, media_type: &str) -> Result<&'a Descriptor, Refusal> {
    pack::layer(manifest, artifact, media_type).map_err(|e| Refusal::Damaged(e.to_string()))
}
