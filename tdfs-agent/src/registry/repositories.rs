//! Repositories over a [`Storage`]: what is in them, and how a push and a collection stay out of each other's way.
//!
//! ```text
//! blobs/sha256/<2 hex>/<hex>                   content of blobs and manifests, shared by all repositories
//! repositories/<name>/_blobs/<hex>             empty: the repository has this blob
//! repositories/<name>/_manifests/<hex>         the manifest's media type
//! repositories/<name>/_tags/<tag>              {"digest": ..., "upstream": whether it was pulled through}
//! repositories/<name>/_referrers/<hex>/<hex>   of a subject and a manifest: the manifest's descriptor
//! leases/<hex>                                 empty, its time counts: a push relied on this content
//! condemned/<hex>/<run>                        empty: a collection is about to delete this content
//! uploads/<id>/...                             see `uploads`
//! ```
//!
//! Content is immutable and visible only when it has its digest. A repository has a blob if both the link and the
//! content are there, and a manifest is written only after all that it names; so whatever is killed when, nothing
//! that is visible names what is missing. The entry of a referrer is written before its manifest and counts only
//! beside it.
//!
//! **Collections.** A push relies on content that is there already: a HEAD or a mount said so, or it was pushed
//! before. [`Repositories::rely`] first writes the lease, then waits until the content is not condemned, then looks
//! whether it is there. A collection first writes `condemned`, then looks at the lease, then deletes. So either the
//! collection sees the lease and lets the content be, or the push sees that the content is condemned and finds out
//! how that ended. A manifest is checked in this way *after* it was written (and withdrawn if something is gone):
//! collections that begin later see the manifest, and one that began earlier sees the lease, which is then younger
//! than its beginning. What a collection may not delete for its age is counted from its beginning, by the clock of
//! the storage, so no two clocks need to agree.

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::time::Duration;
use tdfs_common::digest::Digest;
use tokio::time::Instant;

use super::content::Stored;
use super::keys::{self, Entry};
use super::request::Name;
use super::storage::{ObjectStream, Storage, StorageError};
use crate::oci::{Descriptor, Document};

/// Requests to the storage at a time for one request of a client.
const CONCURRENT: usize = 16;
/// A collection deletes within [`super::gc::DELETE_WITHIN`] of condemning or not at all; what is condemned for much
/// longer was left by one that was killed.
pub const CONDEMNED_MAX: Duration = Duration::from_mins(1);
/// How often to look whether content is still condemned, which takes some milliseconds.
const CONDEMNED_POLL: Duration = Duration::from_millis(20);

/// What a tag holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tag {
    /// Of the manifest.
    pub digest: Digest,
    /// Whether it was pulled through, so that it is the other registry's to take away.
    #[serde(default)]
    pub upstream: bool,
}

/// A manifest cannot be stored.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// It names something that the repository does not have.
    #[error("{0} is not in this repository")]
    Missing(Digest),
    /// The storage fails.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// All repositories. Clones share the storage.
#[derive(Clone, Debug)]
pub struct Repositories {
    storage: Storage,
}

impl Repositories {
    /// The repositories in `storage`.
    pub fn new(storage: Storage) -> Self {
        Self { storage }
    }

    /// Where they lie.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Whether something was ever pushed to a repository and is still there.
    pub async fn exists(&self, name: &Name) -> Result<bool, StorageError> {
        // Others may lie below it, whose names go on.
        let children = self.storage.children(&keys::repository(name)).await?;
        Ok(children.iter().any(|c| c.filename().is_some_and(|f| f.starts_with('_'))))
    }

    /// Bytes of a blob or manifest that a repository has.
    pub async fn size(&self, name: &Name, entry: &Entry) -> Result<Option<u64>, StorageError> {
        let (Entry::Blob(digest) | Entry::Manifest(digest)) = entry else { return Ok(None) };
        let (link, content) = (entry.key(name), keys::content(digest));
        let (link, content) = tokio::try_join!(self.storage.head(&link), self.storage.head(&content))?;
        Ok(link.and(content).map(|content| content.size))
    }

    /// The same, and no collection that keeps what is young will take it away now.
    pub async fn rely(&self, name: &Name, entry: &Entry) -> Result<Option<u64>, StorageError> {
        let (Entry::Blob(digest) | Entry::Manifest(digest)) = entry else { return Ok(None) };
        // Nothing is written for what is not there: anybody may ask for anything.
        if self.size(name, entry).await?.is_none() {
            return Ok(None);
        }
        let lease = keys::lease(digest);
        self.storage.put_volatile(&lease, Bytes::new()).await?;
        let asked = Instant::now();
        while let Some(condemned) = self.storage.list(&keys::condemned(digest)).try_next().await? {
            let Some(lease) = self.storage.head(&lease).await? else { break };
            let age = (lease.last_modified - condemned.last_modified).to_std().unwrap_or_default();
            if age + asked.elapsed() > CONDEMNED_MAX {
                break;
            }
            tokio::time::sleep(CONDEMNED_POLL).await;
        }
        self.size(name, entry).await
    }

    /// Bytes of content.
    pub async fn read(
        &self,
        digest: &Digest,
        range: Range<u64>,
    ) -> Result<Option<ObjectStream>, StorageError> {
        self.storage.read(&keys::content(digest), range).await
    }

    /// Gives content to a repository. False if a collection was quicker and the content is gone.
    pub async fn link(&self, name: &Name, digest: &Digest) -> Result<bool, StorageError> {
        let entry = Entry::Blob(*digest);
        self.storage.put(&entry.key(name), Bytes::new()).await?;
        Ok(self.rely(name, &entry).await?.is_some())
    }

    /// A manifest that a repository has.
    pub async fn manifest(&self, name: &Name, digest: &Digest) -> Result<Option<Stored>, StorageError> {
        let (link, content) = (Entry::Manifest(*digest).key(name), keys::content(digest));
        let read = tokio::try_join!(self.storage.get(&link), self.storage.get(&content))?;
        let (Some(media_type), Some(bytes)) = read else { return Ok(None) };
        if Digest::of(&bytes) != *digest {
            let reason = "it does not have this digest".to_owned();
            return Err(StorageError::Damaged { key: content.to_string(), reason });
        }
        let media_type = String::from_utf8_lossy(&media_type).into_owned();
        Ok(Some(Stored { media_type, digest: *digest, bytes }))
    }

    /// What a tag stands for.
    pub async fn tag(&self, name: &Name, tag: &str) -> Result<Option<Tag>, StorageError> {
        let key = Entry::Tag(tag.to_owned()).key(name);
        let Some(bytes) = self.storage.get(&key).await? else { return Ok(None) };
        let damaged =
            |e: serde_json::Error| StorageError::Damaged { key: key.to_string(), reason: e.to_string() };
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    /// Sets a tag.
    pub async fn set_tag(&self, name: &Name, tag: &str, to: &Tag) -> Result<(), StorageError> {
        let key = Entry::Tag(tag.to_owned()).key(name);
        let text = format!(r#"{{"digest":"{}","upstream":{}}}"#, to.digest, to.upstream);
        self.storage.put(&key, text).await
    }

    /// Stores a manifest whose content, except for its subject, the repository has.
    pub async fn push(
        &self,
        name: &Name,
        media_type: &str,
        document: &Document,
        bytes: Bytes,
    ) -> Result<Digest, PushError> {
        let named = named(document);
        self.all(name, &named, false).await?;
        loop {
            let digest = self.put(name, media_type, document, bytes.clone()).await?;
            if let Err(error) = self.all(name, &named, true).await {
                self.remove(name, &digest, document.subject().map(|s| &s.digest)).await?;
                return Err(error);
            }
            // A collection that was about to delete it as nobody's may just have done so.
            if self.rely(name, &Entry::Manifest(digest)).await?.is_some() {
                return Ok(digest);
            }
        }
    }

    /// Stores a manifest, whether or not what it names is here.
    pub async fn put(
        &self,
        name: &Name,
        media_type: &str,
        document: &Document,
        bytes: Bytes,
    ) -> Result<Digest, StorageError> {
        let digest = Digest::of(&bytes);
        let size = bytes.len() as u64;
        self.storage.put(&keys::content(&digest), bytes).await?;
        if let Some(subject) = document.subject() {
            let descriptor = Descriptor {
                artifact_type: artifact_type(document).map(str::to_owned),
                annotations: document.annotations().clone(),
                ..Descriptor::new(media_type, digest, size)
            };
            let text = serde_json::to_string(&descriptor)
                .map_err(|e| StorageError::Damaged { key: digest.to_string(), reason: e.to_string() })?;
            self.storage.put(&Entry::Referrer(subject.digest, digest).key(name), text).await?;
        }
        self.storage.put(&Entry::Manifest(digest).key(name), media_type.to_owned()).await?;
        Ok(digest)
    }

    /// Fails unless the repository has one of each.
    async fn all(&self, name: &Name, named: &[Vec<Entry>], rely: bool) -> Result<(), PushError> {
        let checks = named.iter().map(|alternatives| self.one(name, alternatives, rely));
        // The futures are made before they are polled: the compiler cannot follow a closure that makes them.
        stream::iter(checks.collect::<Vec<_>>()).buffer_unordered(CONCURRENT).try_collect().await
    }

    /// Fails unless the repository has one of them.
    async fn one(&self, name: &Name, alternatives: &[Entry], rely: bool) -> Result<(), PushError> {
        for entry in alternatives {
            let size = if rely { self.rely(name, entry).await? } else { self.size(name, entry).await? };
            if size.is_some() {
                return Ok(());
            }
        }
        match alternatives.first() {
            Some(Entry::Blob(digest) | Entry::Manifest(digest)) => Err(PushError::Missing(*digest)),
            _ => Ok(()),
        }
    }

    /// Removes a manifest from a repository, not its tags.
    pub async fn remove(
        &self,
        name: &Name,
        digest: &Digest,
        subject: Option<&Digest>,
    ) -> Result<(), StorageError> {
        self.storage.delete(&Entry::Manifest(*digest).key(name)).await?;
        if let Some(subject) = subject {
            self.storage.delete(&Entry::Referrer(*subject, *digest).key(name)).await?;
        }
        Ok(())
    }

    /// Deletes a manifest and the tags that stand for it. False if there is none.
    pub async fn delete_manifest(&self, name: &Name, digest: &Digest) -> Result<bool, StorageError> {
        let Some(stored) = self.manifest(name, digest).await? else { return Ok(false) };
        let tags = self.tags(name).await?;
        let untagged = tags.iter().map(|tag| self.untag(name, tag, digest)).collect::<Vec<_>>();
        stream::iter(untagged).buffer_unordered(CONCURRENT).try_collect::<()>().await?;
        let document = Document::parse("manifest", Some(&stored.media_type), &stored.bytes).ok();
        let subject = document.as_ref().and_then(|(_, d)| d.subject()).map(|s| s.digest);
        self.remove(name, digest, subject.as_ref()).await?;
        Ok(true)
    }

    /// Deletes a tag if it stands for `digest`.
    async fn untag(&self, name: &Name, tag: &str, digest: &Digest) -> Result<(), StorageError> {
        if self.tag(name, tag).await?.is_some_and(|t| t.digest == *digest) {
            self.delete_tag(name, tag).await?;
        }
        Ok(())
    }

    /// Deletes a tag. False if there is none.
    pub async fn delete_tag(&self, name: &Name, tag: &str) -> Result<bool, StorageError> {
        let key = Entry::Tag(tag.to_owned()).key(name);
        let is_there = self.storage.head(&key).await?.is_some();
        self.storage.delete(&key).await?;
        Ok(is_there)
    }

    /// Takes a blob from a repository. False if it has none such.
    pub async fn delete_blob(&self, name: &Name, digest: &Digest) -> Result<bool, StorageError> {
        let entry = Entry::Blob(*digest);
        let is_there = self.size(name, &entry).await?.is_some();
        self.storage.delete(&entry.key(name)).await?;
        Ok(is_there)
    }

    /// All tags of a repository, in the order in which they are listed.
    pub async fn tags(&self, name: &Name) -> Result<Vec<String>, StorageError> {
        let mut tags: Vec<String> = self
            .storage
            .list(&keys::tags(name))
            .try_filter_map(|meta| async move { Ok(meta.location.filename().map(str::to_owned)) })
            .try_collect()
            .await?;
        tags.sort_by_cached_key(|tag| order(tag));
        Ok(tags)
    }

    /// The manifests of a repository that refer to `subject`, the oldest first.
    pub async fn referrers(&self, name: &Name, subject: &Digest) -> Result<Vec<Descriptor>, StorageError> {
        let mut listed: Vec<_> = self.storage.list(&keys::referrers(name, subject)).try_collect().await?;
        listed.sort_by(|a, b| (a.last_modified, &a.location).cmp(&(b.last_modified, &b.location)));
        let found: Vec<Option<Descriptor>> = stream::iter(listed)
            .map(|meta| async move {
                let Some(digest) = keys::digest_of(&meta.location) else { return Ok(None) };
                let manifest = Entry::Manifest(digest).key(name);
                let read = tokio::try_join!(self.storage.head(&manifest), self.storage.get(&meta.location))?;
                let (Some(_), Some(entry)) = read else { return Ok(None) };
                let key = meta.location;
                serde_json::from_slice(&entry)
                    .map(Some)
                    .map_err(|e| StorageError::Damaged { key: key.to_string(), reason: e.to_string() })
            })
            .buffered(CONCURRENT)
            .try_collect()
            .await?;
        Ok(found.into_iter().flatten().collect())
    }
}

/// Lexical as the specification has it: without regard to case ("Listing Tags").
pub fn order(tag: &str) -> (String, String) {
    (tag.to_ascii_lowercase(), tag.to_owned())
}

/// What a referrer is listed as: a manifest without a type of its own by its config's, an image's included
/// (distribution specification, "Listing Referrers").
fn artifact_type(document: &Document) -> Option<&str> {
    let own = match document {
        Document::Manifest(m) => m.artifact_type.as_deref(),
        Document::Index(i) => i.artifact_type.as_deref(),
    };
    own.filter(|t| !t.is_empty()).or(match document {
        Document::Manifest(m) => Some(m.config.media_type.as_str()),
        Document::Index(_) => None,
    })
}

/// What has to be there for a manifest: one of each. An index may hold blobs as well as manifests.
fn named(document: &Document) -> Vec<Vec<Entry>> {
    match document {
        Document::Manifest(m) => {
            let layers = m.layers.iter().filter(|layer| !is_elsewhere(&layer.media_type));
            let all = std::iter::once(&m.config).chain(layers);
            all.map(|d| vec![Entry::Blob(d.digest)]).collect()
        }
        Document::Index(i) => {
            let either = |d: &Descriptor| vec![Entry::Manifest(d.digest), Entry::Blob(d.digest)];
            i.manifests.iter().map(either).collect()
        }
    }
}

/// Layers that must not be pushed lie where their descriptor says.
fn is_elsewhere(media_type: &str) -> bool {
    media_type.contains(".nondistributable.") || media_type.contains(".foreign.")
}
