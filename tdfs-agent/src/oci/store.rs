//! One type for a repository of a registry and for an OCI layout.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use tdfs_common::digest::Digest;
use tokio::sync::mpsc;

use super::layout::{BlobWriter, Layout};
use super::manifest::{CONFIG_MAX, Descriptor, Document, Image, MANIFEST_MAX, limit};
use super::pages::PageSource;
use super::platform::Platform;
use super::reference::{Location, is_layout_name, is_tag};
use super::registry::Registry;
use super::stream::{self, ByteStream};
use super::transport::{Counters, Kind};
use super::{BlobSource, ClientOptions, OciError, Reference, Requests, blocking, check};

/// Indexes within indexes that are followed.
const NESTING_MAX: usize = 4;

/// Where images come from and go to. Clones share connections, tokens and counters.
#[derive(Clone, Debug)]
pub struct Store {
    backend: Backend,
    location: Location,
    platform: Platform,
    at_hand: Arc<HashMap<Digest, Bytes>>,
}

#[derive(Clone, Debug)]
enum Backend {
    Registry(Arc<Registry>),
    Layout { layout: Arc<Layout>, counters: Arc<Counters> },
}

impl Store {
    /// The repository or layout of `reference`. Nothing is contacted or created yet.
    pub fn open(reference: &Reference, options: &ClientOptions) -> Result<Self, OciError> {
        let backend = match reference.location() {
            Location::Registry { host, repository } => {
                Backend::Registry(Arc::new(Registry::open(host, repository, options)?))
            }
            Location::Layout(dir) => {
                Backend::Layout { layout: Arc::new(Layout::new(dir)), counters: Arc::default() }
            }
        };
        let (location, platform) = (reference.location().clone(), options.platform.clone());
        Ok(Self { backend, location, platform, at_hand: Arc::default() })
    }

    /// The repository or the directory.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The same store, which is not asked for small blobs and manifests that are in `blobs`, by their digest.
    #[must_use]
    pub fn with_blobs(&self, blobs: HashMap<Digest, Bytes>) -> Self {
        Self { at_hand: Arc::new(blobs), ..self.clone() }
    }

    /// Where page services of the repository may be; none for a layout.
    pub fn page_sources(&self) -> Vec<PageSource> {
        match &self.backend {
            Backend::Registry(registry) => PageSource::all(registry),
            Backend::Layout { .. } => Vec::new(),
        }
    }

    /// Requests made so far. Reads of a layout count like those of a registry.
    pub fn requests(&self) -> Requests {
        match &self.backend {
            Backend::Registry(registry) => registry.transport.counters.read(),
            Backend::Layout { counters, .. } => counters.read(),
        }
    }

    /// The image that `reference` names; through an index, the one for the platform.
    pub async fn resolve(&self, reference: &Reference) -> Result<Image, OciError> {
        if reference.location() != &self.location {
            return Err(OciError::Setup(format!("{reference} does not lie in {}", self.location)));
        }
        let what = reference.to_string();
        let (mut descriptor, mut bytes, mut document) = self.named(reference).await?;
        for _ in 0..NESTING_MAX {
            let index = match document {
                Document::Manifest(manifest) => {
                    if let Some(kind) = Document::Manifest(manifest.clone()).artifact_type() {
                        return Err(OciError::malformed(
                            what,
                            format_args!("not an image but an artifact of type {kind}"),
                        ));
                    }
                    let config = self.blob(&manifest.config, CONFIG_MAX).await?;
                    return Image::assemble(reference, descriptor.media_type, bytes, manifest, config);
                }
                Document::Index(index) => index,
            };
            let chosen = self.platform.choose(&what, &index.manifests)?;
            (descriptor, bytes, document) = self.document(&chosen.digest).await?;
            if descriptor.size != chosen.size {
                let what = chosen.digest.to_string();
                return Err(OciError::Size { what, expected: chosen.size, got: descriptor.size });
            }
        }
        Err(OciError::malformed(what, format_args!("more than {NESTING_MAX} indexes within each other")))
    }

    async fn named(&self, reference: &Reference) -> Result<(Descriptor, Bytes, Document), OciError> {
        if let Some(digest) = reference.digest() {
            return self.document(digest).await;
        }
        match (&self.backend, reference.tag()) {
            (Backend::Registry(registry), Some(tag)) => {
                let served = registry.tagged(tag, registry.attempts_anywhere()).await?;
                parsed(&reference.to_string(), served.media_type.as_deref(), served.bytes)
            }
            (Backend::Registry(_), None) => {
                Err(OciError::Setup(format!("{reference} names neither a tag nor a digest")))
            }
            (Backend::Layout { layout, .. }, _) => {
                let (layout, reference, platform) =
                    (layout.clone(), reference.clone(), self.platform.clone());
                let entry = blocking(move || layout.find(&reference, &platform)).await?;
                self.document(&entry.digest).await
            }
        }
    }

    async fn document(&self, digest: &Digest) -> Result<(Descriptor, Bytes, Document), OciError> {
        if let Some(bytes) = self.at_hand.get(digest) {
            return parsed(&digest.to_string(), None, bytes.clone());
        }
        match &self.backend {
            Backend::Registry(registry) => {
                let served = registry.manifest(digest).await?;
                parsed(&digest.to_string(), served.media_type.as_deref(), served.bytes)
            }
            Backend::Layout { .. } => {
                parsed(&digest.to_string(), None, self.layout_blob(digest, MANIFEST_MAX).await?)
            }
        }
    }

    async fn layout_blob(&self, digest: &Digest, limit: u64) -> Result<Bytes, OciError> {
        let Backend::Layout { layout, counters } = &self.backend else {
            return Err(OciError::NotFound(digest.to_string()));
        };
        let (layout, digest) = (layout.clone(), *digest);
        counters.request(Kind::Metadata);
        let bytes = blocking(move || layout.read(&digest, limit)).await?;
        counters.received(bytes.len());
        Ok(bytes)
    }

    /// A manifest or index by digest, checked.
    pub async fn manifest(&self, digest: &Digest) -> Result<(Descriptor, Bytes), OciError> {
        self.document(digest).await.map(|(descriptor, bytes, _)| (descriptor, bytes))
    }

    /// A small blob of at most `limit` bytes, checked. Counts as metadata.
    pub async fn blob(&self, blob: &Descriptor, limit_bytes: u64) -> Result<Bytes, OciError> {
        limit(&format!("{} {}", blob.media_type, blob.digest), blob.size, limit_bytes)?;
        if let Some(bytes) = self.at_hand.get(&blob.digest) {
            check(&blob.digest.to_string(), bytes, &blob.digest, blob.size)?;
            return Ok(bytes.clone());
        }
        match &self.backend {
            Backend::Registry(registry) => registry.blob(&blob.digest, blob.size).await,
            Backend::Layout { .. } => {
                let bytes = self.layout_blob(&blob.digest, limit_bytes).await?;
                check(&blob.digest.to_string(), &bytes, &blob.digest, blob.size)?;
                Ok(bytes)
            }
        }
    }

    /// A whole blob. The last item is an error unless size and digest were right. Counts as data.
    pub async fn blob_stream(&self, blob: &Descriptor) -> Result<ByteStream, OciError> {
        let stream = self.blob_range(&blob.digest, blob.size, 0..blob.size).await?;
        Ok(stream::verified(stream, blob))
    }

    /// Bytes `range` of a blob of `size` bytes: exactly as many, or an error. They are *not verified*. Counts as data.
    pub async fn blob_range(
        &self,
        digest: &Digest,
        size: u64,
        range: Range<u64>,
    ) -> Result<ByteStream, OciError> {
        if range.start > range.end || range.end > size {
            let what = digest.to_string();
            return Err(OciError::malformed(what, format_args!("no bytes {range:?}, it has {size}")));
        }
        match &self.backend {
            Backend::Registry(registry) => {
                stream::download(registry.clone(), *digest, Some(size), range).await
            }
            Backend::Layout { layout, counters } => {
                stream::read(layout.clone(), counters.clone(), *digest, Some(size), range).await
            }
        }
    }

    /// The same of a blob whose size is not known.
    pub async fn blob_part(&self, digest: &Digest, range: Range<u64>) -> Result<ByteStream, OciError> {
        if range.start > range.end {
            return Err(OciError::malformed(digest.to_string(), format_args!("no bytes {range:?}")));
        }
        match &self.backend {
            Backend::Registry(registry) => stream::download(registry.clone(), *digest, None, range).await,
            Backend::Layout { layout, counters } => {
                stream::read(layout.clone(), counters.clone(), *digest, None, range).await
            }
        }
    }

    /// Manifests whose `subject` is `subject`; with `artifact_type`, those of it.
    ///
    /// Only a verified manifest proves the relation: the list itself has no digest.
    pub async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, OciError> {
        match &self.backend {
            Backend::Registry(registry) => registry.referrers(subject, artifact_type).await,
            Backend::Layout { layout, counters } => {
                let (layout, subject) = (layout.clone(), *subject);
                counters.request(Kind::Metadata);
                let mut found = blocking(move || layout.referrers(&subject)).await?;
                found.retain(|d| artifact_type.is_none_or(|t| d.artifact_type.as_deref() == Some(t)));
                Ok(found)
            }
        }
    }

    /// Whether a blob is there.
    pub async fn has_blob(&self, digest: &Digest) -> Result<bool, OciError> {
        match &self.backend {
            Backend::Registry(registry) => registry.has_blob(digest, registry.attempts_anywhere()).await,
            Backend::Layout { layout, .. } => {
                let (layout, digest) = (layout.clone(), *digest);
                Ok(blocking(move || layout.size(&digest)).await?.is_some())
            }
        }
    }

    /// Bytes of a blob, if it is there.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, OciError> {
        match &self.backend {
            Backend::Registry(registry) => registry.blob_size(digest).await,
            Backend::Layout { layout, .. } => {
                let (layout, digest) = (layout.clone(), *digest);
                blocking(move || layout.size(&digest)).await
            }
        }
    }

    /// The digest of the manifest at `tag`, as the registry itself (no mirror) has it now.
    pub async fn tag_digest(&self, tag: &str) -> Result<Option<Digest>, OciError> {
        match &self.backend {
            Backend::Registry(_) if !is_tag(tag) => Err(bad_tag(tag)),
            Backend::Registry(registry) => registry.tag_digest(tag).await,
            Backend::Layout { layout, .. } => {
                let (layout, tag) = (layout.clone(), tag.to_owned());
                blocking(move || layout.tag_digest(&tag)).await
            }
        }
    }

    /// Stores a blob, unless it is there.
    pub async fn push_blob(&self, source: impl Into<BlobSource>, digest: &Digest) -> Result<(), OciError> {
        let source = source.into();
        match &self.backend {
            Backend::Registry(registry) => registry.push_blob(&source, digest).await,
            Backend::Layout { layout, .. } => {
                let (layout, digest) = (layout.clone(), *digest);
                blocking(move || layout.put(&source, &digest)).await
            }
        }
    }

    /// Stores a manifest or index whose blobs are there, under `tag` or by its digest alone. With a `subject` it
    /// shows up among the referrers of that.
    pub async fn push_manifest(
        &self,
        media_type: &str,
        bytes: Bytes,
        tag: Option<&str>,
    ) -> Result<Descriptor, OciError> {
        let (_, document) = Document::parse("manifest to be stored", Some(media_type), &bytes)?;
        match &self.backend {
            Backend::Registry(registry) => {
                tag.filter(|t| !is_tag(t)).map_or(Ok(()), |t| Err(bad_tag(t)))?;
                registry.push_manifest(media_type, &document, &bytes, tag).await
            }
            Backend::Layout { layout, .. } => {
                tag.filter(|t| !is_layout_name(t)).map_or(Ok(()), |t| Err(bad_tag(t)))?;
                let (layout, media_type, tag) =
                    (layout.clone(), media_type.to_owned(), tag.map(str::to_owned));
                blocking(move || layout.put_manifest(&media_type, &document, &bytes, tag.as_deref())).await
            }
        }
    }

    /// Copies an image of this store, byte for byte, to another, and tags it there.
    pub async fn copy_image(&self, image: &Image, to: &Self, tag: Option<&str>) -> Result<(), OciError> {
        for layer in &image.layers {
            if !to.has_blob(&layer.digest).await? {
                self.copy_blob(layer, to).await?;
            }
        }
        to.push_blob(image.config.clone(), &image.config_descriptor.digest).await?;
        to.push_manifest(&image.media_type, image.manifest.clone(), tag).await?;
        Ok(())
    }

    /// Copies through a file, which is the blob itself when the target is a layout.
    async fn copy_blob(&self, blob: &Descriptor, to: &Self) -> Result<(), OciError> {
        let stream = self.blob_stream(blob).await?;
        let digest = blob.digest;
        match &to.backend {
            Backend::Layout { layout, .. } => {
                let layout = layout.clone();
                let writer = blocking(move || layout.writer()).await?;
                let writer = fill(writer, stream).await?;
                blocking(move || writer.commit(&digest)).await
            }
            Backend::Registry(registry) => {
                let writer = fill(blocking(BlobWriter::anonymous).await?, stream).await?;
                registry.push_blob(&BlobSource::File(writer.path().to_owned()), &digest).await
            }
        }
    }
}

/// Writes a stream to the end, the disk beside the network.
async fn fill(mut writer: BlobWriter, mut stream: ByteStream) -> Result<BlobWriter, OciError> {
    const QUEUE: usize = 16;
    let (sender, mut receiver) = mpsc::channel::<Bytes>(QUEUE);
    let writing = tokio::task::spawn_blocking(move || {
        while let Some(piece) = receiver.blocking_recv() {
            writer.write(&piece)?;
        }
        Ok(writer)
    });
    let mut broken = None;
    while let Some(piece) = stream.next().await {
        match piece {
            // A failed send means that writing has failed, and it tells why.
            Ok(piece) => {
                if sender.send(piece).await.is_err() {
                    break;
                }
            }
            Err(e) => {
                broken = Some(e);
                break;
            }
        }
    }
    drop(sender);
    let written = super::joined(writing.await)?;
    broken.map_or(Ok(written), Err)
}

fn parsed(what: &str, hint: Option<&str>, bytes: Bytes) -> Result<(Descriptor, Bytes, Document), OciError> {
    let (media_type, document) = Document::parse(what, hint, &bytes)?;
    Ok((document.describe(&media_type, &bytes), bytes, document))
}

fn bad_tag(tag: &str) -> OciError {
    OciError::Reference { text: tag.chars().take(100).collect(), reason: "bad tag" }
}
