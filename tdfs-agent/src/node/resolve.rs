//! From a reference to an image and its runtime image.
//!
//! What a registry said is remembered in `resolved/`, an OCI layout with manifests and configurations only: images
//! under the hash of their reference, runtime images under the hash of image and choice. A page service says all of it
//! in one answer, which stays open for the pages to follow; what it says is believed as little as any registry, by the
//! same code. With [`Pull::Missing`] a
//! second start therefore asks nobody. Metadata blobs are remembered by [`pack::load`]. All of it is checked against
//! its digest when it is read, so a damaged memory costs requests, not correctness.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tdfs_common::digest::Digest;
use tdfs_common::runtime_image::Service;
use tdfs_common::wire;
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;

use super::files::{FilesSource, ImageFiles, LazyFiles};
use super::prepare::OpeningZone;
use super::{NodeError, State};
use crate::fetch::{Metadata, PageService};
use crate::oci::{ClientOptions, Image, Location, MANIFEST_TYPE, OciError, Reference, Requests, Store};
use crate::pack::{self, PackError};
use crate::rtpc::holdings;

/// Which runtime image a start uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// The only one there is; none if there is none.
    Any,
    /// That of this service.
    Service(String),
    /// This artifact manifest.
    Pinned(Digest),
    /// None: every page comes from the layers.
    Without,
}

/// When to ask the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pull {
    /// Only for what is not known here.
    Missing,
    /// Always.
    Always,
}

/// A runtime image that fits its image.
pub struct Runtime {
    /// The artifact manifest.
    pub manifest: Digest,
    /// The artifact manifest as stored.
    pub artifact: Bytes,
    /// Page table and segments.
    pub service: Service,
    /// Their zone.
    pub zone: OpeningZone,
    /// The image's files.
    pub files: LazyFiles,
}

/// An image, and where its bytes are.
pub struct Resolved {
    /// The image.
    pub image: Image,
    /// Its runtime image, if one is used.
    pub runtime: Option<Runtime>,
    /// The registry or layout that the reference names.
    pub store: Store,
    /// The page services to fetch from; one may be about to send what is missing.
    pub pages: PageService,
    remembering: Option<JoinHandle<Result<(), OciError>>>,
}

/// Resolves `reference` and the runtime image `choice` names.
pub async fn resolve(
    state: &State,
    reference: &Reference,
    choice: &Choice,
    pull: Pull,
    options: &ClientOptions,
) -> Result<Resolved, NodeError> {
    let store = Store::open(reference, options)?;
    if matches!(reference.location(), Location::Layout(_)) {
        let image = store.resolve(reference).await?;
        let runtime = load(state, &store, &image, choice).await?;
        return Ok(Resolved { image, runtime, store, pages: PageService::default(), remembering: None });
    }
    let memory = Memory::open(state, options)?;
    let mut pages = PageService::open(&store, state.root(), options);
    if pull == Pull::Missing
        && let Some((image, runtime)) = memory.recall(state, &store, reference, choice).await
    {
        about(&mut pages, &image, runtime.as_ref());
        return Ok(Resolved { image, runtime, store, pages, remembering: None });
    }
    let served = served(&mut pages, state, &store, reference, choice, options).await?;
    let (image, runtime) = if let Some(found) = served {
        found
    } else {
        let image = store.resolve(reference).await?;
        let runtime = load(state, &store, &image, choice).await?;
        (image, runtime)
    };
    about(&mut pages, &image, runtime.as_ref());
    // Nobody waits for the disk: a start that is not remembered costs the next one some requests.
    let artifact = runtime.as_ref().map(|r| r.artifact.clone());
    let (reference, choice, known) = (reference.clone(), choice.clone(), image.clone());
    let remembering = tokio::spawn(async move { memory.keep(&reference, &choice, &known, artifact).await });
    Ok(Resolved { image, runtime, store, pages, remembering: Some(remembering) })
}

/// Says which pages are meant from now on.
fn about(pages: &mut PageService, image: &Image, runtime: Option<&Runtime>) {
    if let Some(runtime) = runtime {
        pages.about(image.digest, runtime.manifest);
    }
}

/// What a page service knows, if there is one that can be believed.
async fn served(
    pages: &mut PageService,
    state: &State,
    store: &Store,
    reference: &Reference,
    choice: &Choice,
    options: &ClientOptions,
) -> Result<Option<(Image, Option<Runtime>)>, NodeError> {
    let choice_sent = match choice {
        Choice::Without => return Ok(None),
        Choice::Any => wire::Choice::Any,
        Choice::Service(name) => wire::Choice::Service(name.clone()),
        Choice::Pinned(digest) => wire::Choice::Pinned(*digest),
    };
    let named = match (reference.digest(), reference.tag()) {
        (Some(digest), _) => wire::Reference::Digest(*digest),
        (None, Some(tag)) => wire::Reference::Tag(tag.to_owned()),
        (None, None) => return Ok(None),
    };
    let root = state.root().to_owned();
    let at_hand = move || (holdings(&root), pack::known(&root, wire::KNOWN_MAX));
    let (held, known) = tokio::task::spawn_blocking(at_hand).await?;
    let platform = options.platform.to_string();
    let wanted = wire::Wanted::Image { reference: named, platform, choice: choice_sent, known };
    while let Some(metadata) = pages.metadata(&wanted, &held).await {
        match believe(state, store, reference, choice, metadata).await {
            Ok(found) => return Ok(Some(found)),
            Err(error) => pages.distrust(&error),
        }
    }
    Ok(None)
}

/// Holds what a page service said against the digests that it must have, and its parts against each other.
async fn believe(
    state: &State,
    store: &Store,
    reference: &Reference,
    choice: &Choice,
    metadata: Metadata,
) -> Result<(Image, Option<Runtime>), NodeError> {
    let answered = store.with_blobs(metadata.blobs);
    // A tag is what the server says it is; a digest is not.
    let named = match (reference.digest(), metadata.document) {
        (None, Some(document)) => reference.with_digest(document),
        _ => reference.clone(),
    };
    let image = answered.resolve(&named).await?;
    let Some(artifact) = metadata.artifact else {
        return match choice {
            Choice::Any => Ok((image, None)),
            _ => Err(PackError::NoRuntimeImage { image: image.digest }.into()),
        };
    };
    let runtime = find(state, &answered, store, &image, pack::Choice::Pinned(artifact)).await?;
    let asked_for = match choice {
        Choice::Service(name) => runtime.service.service == *name,
        Choice::Pinned(digest) => artifact == *digest,
        Choice::Any | Choice::Without => true,
    };
    if !asked_for {
        let reason = "not the one that was asked for".to_owned();
        return Err(NodeError::Wrong { manifest: artifact, reason });
    }
    Ok((image, Some(runtime)))
}

async fn load(
    state: &State,
    store: &Store,
    image: &Image,
    choice: &Choice,
) -> Result<Option<Runtime>, NodeError> {
    let wanted = match choice {
        Choice::Without => return Ok(None),
        Choice::Any => pack::Choice::Only,
        Choice::Service(name) => pack::Choice::Service(name),
        Choice::Pinned(digest) => pack::Choice::Pinned(*digest),
    };
    match find(state, store, store, image, wanted).await {
        Err(NodeError::Pack(PackError::NoRuntimeImage { .. })) if *choice == Choice::Any => Ok(None),
        found => Ok(Some(found?)),
    }
}

/// A runtime image with its page table and, unless it was mounted here before, with its files; what is not known here
/// is in `metadata`, the layers are in `store`.
async fn find(
    state: &State,
    metadata: &Store,
    store: &Store,
    image: &Image,
    choice: pack::Choice<'_>,
) -> Result<Runtime, NodeError> {
    let found = pack::find(metadata, image, choice).await?;
    let (manifest, artifact) = (found.manifest, found.artifact.clone());
    if state.kept(&manifest).exists() {
        // What is kept was made of parts that fitted each other and the image, and all of them are named by digest.
        let service = found.service(metadata, state.root()).await?;
        let zone = OpeningZone::begin(state, &service);
        let (image, store, state) = (image.clone(), store.clone(), state.root().to_owned());
        let source = FilesSource { found, image, store, state };
        let files = LazyFiles::Later(OnceCell::new(), Box::new(source));
        return Ok(Runtime { manifest, artifact, service, zone, files });
    }
    let open = |service: &Service| OpeningZone::begin(state, service);
    let (loaded, zone) = found.load(metadata, state.root(), image, open).await?;
    let files = ImageFiles::new(state.root(), store, loaded.tree, loaded.index, loaded.windows)?;
    Ok(Runtime { manifest, artifact, service: loaded.service, zone, files: LazyFiles::Loaded(files) })
}

/// The layout `resolved/`.
struct Memory {
    store: Store,
    reference: Reference,
    platform: String,
}

impl Memory {
    fn open(state: &State, options: &ClientOptions) -> Result<Self, NodeError> {
        let reference = Reference::layout(state.resolved());
        let store = Store::open(&reference, options)?;
        Ok(Self { store, reference, platform: options.platform.to_string() })
    }

    /// What is known; `None` where anything is missing or damaged, which the registry then tells anew.
    async fn recall(
        &self,
        state: &State,
        store: &Store,
        reference: &Reference,
        choice: &Choice,
    ) -> Option<(Image, Option<Runtime>)> {
        let known = self.reference.with_tag(&self.image_tag(reference)).ok()?;
        let image = self.store.resolve(&known).await.ok()?;
        if *choice == Choice::Without {
            return Some((image, None));
        }
        let artifact = self.store.tag_digest(&runtime_tag(&image, choice)).await.ok()??;
        if artifact == image.digest {
            // It was looked for and not there.
            return Some((image, None));
        }
        let pinned = pack::Choice::Pinned(artifact);
        let runtime = find(state, &self.store, store, &image, pinned).await.ok()?;
        Some((image, Some(runtime)))
    }

    async fn keep(
        &self,
        reference: &Reference,
        choice: &Choice,
        image: &Image,
        artifact: Option<Bytes>,
    ) -> Result<(), OciError> {
        self.store.push_blob(image.config.clone(), &image.config_descriptor.digest).await?;
        let tag = self.image_tag(reference);
        self.store.push_manifest(&image.media_type, image.manifest.clone(), Some(&tag)).await?;
        if *choice == Choice::Without {
            return Ok(());
        }
        let (media_type, bytes) = match artifact {
            Some(artifact) => (MANIFEST_TYPE, artifact),
            None => (image.media_type.as_str(), image.manifest.clone()),
        };
        self.store.push_manifest(media_type, bytes, Some(&runtime_tag(image, choice))).await?;
        Ok(())
    }

    fn image_tag(&self, reference: &Reference) -> String {
        Digest::of(format!("{} {reference}", self.platform).as_bytes()).hex()
    }
}

fn runtime_tag(image: &Image, choice: &Choice) -> String {
    Digest::of(format!("{} {choice:?}", image.digest).as_bytes()).hex()
}

impl Resolved {
    /// Requests made for this start so far.
    pub fn requests(&self) -> Requests {
        self.store.requests()
    }

    /// Waits until the resolution is remembered.
    pub async fn remembered(self) {
        let Some(task) = self.remembering else { return };
        let done = task.await.unwrap_or_else(|e| Err(OciError::Setup(e.to_string())));
        if let Err(error) = done {
            tracing::warn!("the image is not remembered: {error}");
        }
    }
}
