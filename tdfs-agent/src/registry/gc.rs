//! Garbage collection: mark what manifests reach, delete the rest if it is old. Runs beside servers, and beside
//! itself.
//!
//! Comes in: the whole storage, listed once. Goes out: content that no manifest of any repository reaches, with its
//! links; with `untagged`, manifests that no tag, no index and no living `subject` leads to; sessions that were left
//! alone; what killed processes left of files.
//!
//! Why nothing is lost: only what is older than the grace period, counted back from the beginning of the collection,
//! is deleted, and what a push relies on while a collection runs is protected by the protocol of the module `repositories`.
//! Here is its other side, for each digest:
//!
//! ```text
//! put condemned/<hex>/<run>; is the lease or the content younger than the beginning minus grace?
//!   yes: keep                                          no: delete content, links, lease
//! delete condemned/<hex>/<run>
//! ```
//!
//! A deletion begins within [`DELETE_WITHIN`] after the digest was condemned or not at all; servers ignore what is
//! condemned for longer than a minute. Only a collection that is stopped for a minute right between looking at
//! its watch and deleting could do harm. A run that is killed leaves content without links or links without content;
//! both are deleted by the next one, and neither is ever served.
//!
//! Times of objects may be whole seconds, so two seconds are added to the grace period.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use serde::Serialize;
use tdfs_common::digest::Digest;
use tokio::time::Instant;

use super::keys::{self, Entry};
use super::repositories::{CONDEMNED_MAX, Repositories};
use super::request::{Name, UploadId};
use super::storage::{Storage, StorageError};
use crate::oci::{Document, OciError};

/// From condemning to deleting.
pub const DELETE_WITHIN: Duration = Duration::from_secs(10);
/// Times of objects are as coarse as this, and a bit.
const CLOCK: Duration = Duration::from_secs(2);
/// A file that is still being written is touched more often than this.
const LEFTOVERS_AGE: Duration = Duration::from_hours(1);
/// Digests at a time.
const CONCURRENT: usize = 16;

/// What to delete.
#[derive(Clone, Copy, Debug)]
pub struct Collection {
    /// What is younger stays.
    pub grace: Duration,
    /// Delete manifests that nothing leads to as well.
    pub untagged: bool,
    /// Only say what would be deleted.
    pub dry_run: bool,
}

/// What was found and deleted, or would have been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Repositories that hold something.
    pub repositories: u64,
    /// Manifests that stay, counted in each repository.
    pub manifests: u64,
    /// Blobs and manifests of all repositories that stay.
    pub blobs: u64,
    /// Manifests deleted because nothing leads to them.
    pub manifests_deleted: u64,
    /// Blobs and manifests deleted because nothing reaches them.
    pub blobs_deleted: u64,
    /// Their bytes.
    pub bytes_deleted: u64,
    /// Upload sessions deleted.
    pub uploads_deleted: u64,
    /// Unfinished files deleted.
    pub leftovers_deleted: u64,
    /// Whether nothing was deleted in truth.
    pub dry_run: bool,
}

/// The storage cannot be collected.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The storage fails.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// What cannot be read may lead anywhere: nothing was deleted.
    #[error("manifest {digest} of {repository} cannot be read, so nothing is deleted: {source}")]
    Manifest {
        /// The repository.
        repository: String,
        /// The manifest.
        digest: Digest,
        /// Why.
        source: OciError,
    },
}

/// What a repository held when it was listed.
#[derive(Default)]
struct Held {
    /// With the times of their links, in milliseconds.
    manifests: BTreeMap<Digest, i64>,
    blobs: BTreeSet<Digest>,
    tags: Vec<String>,
}

/// What a manifest leads to.
struct Leads {
    to: BTreeSet<Digest>,
    subject: Option<Digest>,
    is_index: bool,
}

struct Run<'a> {
    repositories: &'a Repositories,
    options: Collection,
    /// Milliseconds; what is younger stays.
    cutoff: i64,
    /// Distinguishes this run from others.
    id: UploadId,
}

/// Collects garbage.
pub async fn collect(repositories: &Repositories, options: Collection) -> Result<Collected, CollectError> {
    let storage = repositories.storage();
    let id = UploadId::random()?;
    let clock = Path::from_iter([keys::LEASES, "clock"]);
    storage.put_volatile(&clock, Bytes::new()).await?;
    let now = storage.head(&clock).await?.map_or(i64::MIN, |meta| meta.last_modified.timestamp_millis());
    let grace = i64::try_from((options.grace + CLOCK).as_millis()).unwrap_or(i64::MAX);
    let run = Run { repositories, options, cutoff: now.saturating_sub(grace), id };
    let mut collected = Collected { dry_run: options.dry_run, ..Collected::default() };
    run.forget_the_dead(now).await?;
    let held = run.list().await?;
    collected.repositories = held.len() as u64;
    let mut reached = HashSet::new();
    let mut links: HashMap<Digest, Vec<Path>> = HashMap::new();
    for (name, held) in &held {
        let alive = run.mark(name, held, &mut collected).await?;
        collected.manifests += alive.len() as u64;
        for (digest, leads) in alive {
            reached.insert(digest);
            reached.extend(leads.to);
        }
        for digest in &held.blobs {
            links.entry(*digest).or_default().push(Entry::Blob(*digest).key(name));
        }
    }
    run.sweep(&reached, links, &mut collected).await?;
    collected.uploads_deleted = run.sessions(storage).await?;
    let age = options.grace.max(LEFTOVERS_AGE);
    collected.leftovers_deleted = storage.remove_leftovers(age, options.dry_run).await?;
    Ok(collected)
}

impl Run<'_> {
    fn storage(&self) -> &Storage {
        self.repositories.storage()
    }

    /// Removes what runs that were killed had condemned.
    async fn forget_the_dead(&self, now: i64) -> Result<(), StorageError> {
        let condemned = Path::from(keys::CONDEMNED);
        let dead = now.saturating_sub(CONDEMNED_MAX.as_millis() as i64);
        let mut listed = self.storage().list(&condemned);
        while let Some(meta) = listed.try_next().await? {
            if meta.last_modified.timestamp_millis() < dead && !self.options.dry_run {
                self.storage().delete(&meta.location).await?;
            }
        }
        Ok(())
    }

    async fn list(&self) -> Result<BTreeMap<Name, Held>, StorageError> {
        let mut all: BTreeMap<Name, Held> = BTreeMap::new();
        let mut listed = self.storage().list(&Path::from(keys::REPOSITORIES));
        while let Some(meta) = listed.try_next().await? {
            let Some((name, entry)) = Entry::parse(&meta.location) else { continue };
            let held = all.entry(name).or_default();
            match entry {
                Entry::Blob(digest) => {
                    held.blobs.insert(digest);
                }
                Entry::Manifest(digest) => {
                    held.manifests.insert(digest, meta.last_modified.timestamp_millis());
                }
                Entry::Tag(tag) => held.tags.push(tag),
                Entry::Referrer(..) => {}
            }
        }
        Ok(all)
    }

    async fn leads(&self, name: &Name, digest: Digest) -> Result<Option<(Digest, Leads)>, CollectError> {
        let Some(stored) = self.repositories.manifest(name, &digest).await? else { return Ok(None) };
        let parsed = Document::parse("manifest", Some(&stored.media_type), &stored.bytes);
        let (_, document) = parsed.map_err(|source| CollectError::Manifest {
            repository: name.to_string(),
            digest,
            source,
        })?;
        let to = match &document {
            Document::Manifest(m) => m.layers.iter().chain([&m.config]).map(|d| d.digest).collect(),
            Document::Index(i) => i.manifests.iter().map(|d| d.digest).collect(),
        };
        let is_index = matches!(document, Document::Index(_));
        Ok(Some((digest, Leads { to, subject: document.subject().map(|s| s.digest), is_index })))
    }

    /// The manifests of a repository that stay. The others are deleted.
    async fn mark(
        &self,
        name: &Name,
        held: &Held,
        collected: &mut Collected,
    ) -> Result<BTreeMap<Digest, Leads>, CollectError> {
        let reading: Vec<_> = held.manifests.keys().map(|digest| self.leads(name, *digest)).collect();
        let read: Vec<_> = stream::iter(reading).buffer_unordered(CONCURRENT).try_collect().await?;
        let mut all: BTreeMap<Digest, Leads> = read.into_iter().flatten().collect();
        if !self.options.untagged {
            return Ok(all);
        }
        let mut roots: Vec<Digest> =
            held.manifests.iter().filter(|(_, time)| **time >= self.cutoff).map(|(d, _)| *d).collect();
        for tag in &held.tags {
            roots.extend(self.repositories.tag(name, tag).await?.map(|tag| tag.digest));
        }
        for digest in all.keys() {
            if self.is_young(&keys::lease(digest)).await? {
                roots.push(*digest);
            }
        }
        let mut alive = BTreeSet::new();
        spread(roots, &all, &mut alive);
        // What leads to others goes before them: if it turns out to be needed, so are they.
        let mut dead: Vec<(u32, bool, Digest)> = all
            .iter()
            .filter(|(digest, _)| !alive.contains(*digest))
            .map(|(digest, leads)| (depth(digest, &all), !leads.is_index, *digest))
            .collect();
        dead.sort();
        for (_, _, digest) in dead {
            if alive.contains(&digest) {
                continue;
            }
            if self.delete_manifest(name, &digest, &all).await? {
                all.remove(&digest);
                collected.manifests_deleted += 1;
            } else {
                spread(vec![digest], &all, &mut alive);
            }
        }
        Ok(all)
    }

    async fn delete_manifest(
        &self,
        name: &Name,
        digest: &Digest,
        all: &BTreeMap<Digest, Leads>,
    ) -> Result<bool, StorageError> {
        if self.options.dry_run {
            return Ok(true);
        }
        let condemned = keys::condemned(digest).join(self.id.as_str());
        self.storage().put_volatile(&condemned, Bytes::new()).await?;
        let since = Instant::now();
        let young = self.is_young(&keys::lease(digest)).await?
            || self.is_young(&Entry::Manifest(*digest).key(name)).await?;
        let delete = !young && since.elapsed() < DELETE_WITHIN;
        if delete {
            let subject = all.get(digest).and_then(|leads| leads.subject);
            self.repositories.remove(name, digest, subject.as_ref()).await?;
        }
        self.storage().delete(&condemned).await?;
        Ok(delete)
    }

    async fn is_young(&self, key: &Path) -> Result<bool, StorageError> {
        let meta = self.storage().head(key).await?;
        Ok(meta.is_some_and(|meta| meta.last_modified.timestamp_millis() >= self.cutoff))
    }

    /// Deletes content that nothing reaches, links without content and leases without content.
    async fn sweep(
        &self,
        reached: &HashSet<Digest>,
        mut links: HashMap<Digest, Vec<Path>>,
        collected: &mut Collected,
    ) -> Result<(), StorageError> {
        let mut unreached: Vec<(Digest, Option<u64>)> = Vec::new();
        let mut listed = self.storage().list(&Path::from(keys::BLOBS));
        let mut dangling: HashSet<Digest> = links.keys().copied().collect();
        let mut present: HashSet<Digest> = HashSet::new();
        while let Some(meta) = listed.try_next().await? {
            let Some(digest) = keys::digest_of(&meta.location) else { continue };
            dangling.remove(&digest);
            present.insert(digest);
            if !reached.contains(&digest) && meta.last_modified.timestamp_millis() < self.cutoff {
                unreached.push((digest, Some(meta.size)));
            } else {
                collected.blobs += 1;
            }
        }
        unreached.extend(dangling.into_iter().map(|digest| (digest, None)));
        let deleting: Vec<_> = unreached
            .into_iter()
            .map(|(digest, size)| {
                let links = links.remove(&digest).unwrap_or_default();
                self.delete(digest, size, links)
            })
            .collect();
        let mut deleted = stream::iter(deleting).buffer_unordered(CONCURRENT);
        while let Some((size, is_deleted)) = deleted.try_next().await? {
            // Links without content are not worth counting.
            match size {
                Some(size) if is_deleted => {
                    collected.blobs_deleted += 1;
                    collected.bytes_deleted += size;
                }
                Some(_) => collected.blobs += 1,
                None => {}
            }
        }
        // What was leased and is gone: nobody can rely on it, and who stores it anew makes it young.
        let mut listed = self.storage().list(&Path::from(keys::LEASES));
        while let Some(meta) = listed.try_next().await? {
            let is_orphan = keys::digest_of(&meta.location).is_some_and(|digest| !present.contains(&digest));
            if is_orphan && meta.last_modified.timestamp_millis() < self.cutoff && !self.options.dry_run {
                self.storage().delete(&meta.location).await?;
            }
        }
        Ok(())
    }

    /// Deletes content, if it has a size, and its links, unless something young speaks for them.
    async fn delete(
        &self,
        digest: Digest,
        size: Option<u64>,
        links: Vec<Path>,
    ) -> Result<(Option<u64>, bool), StorageError> {
        let (content, lease) = (keys::content(&digest), keys::lease(&digest));
        if self.options.dry_run {
            return Ok((size, !self.is_young(&lease).await?));
        }
        let condemned = keys::condemned(&digest).join(self.id.as_str());
        self.storage().put_volatile(&condemned, Bytes::new()).await?;
        let since = Instant::now();
        let mut young = self.is_young(&lease).await? || self.is_young(&content).await?;
        for link in &links {
            young = young || self.is_young(link).await?;
        }
        let delete = !young && since.elapsed() < DELETE_WITHIN;
        if delete {
            self.storage().delete(&content).await?;
            for link in &links {
                self.storage().delete(link).await?;
            }
            self.storage().delete(&lease).await?;
        }
        self.storage().delete(&condemned).await?;
        Ok((size, delete))
    }

    async fn sessions(&self, storage: &Storage) -> Result<u64, StorageError> {
        // By session, whether something is young, and all keys.
        let mut sessions: BTreeMap<String, (bool, Vec<Path>)> = BTreeMap::new();
        let mut listed = storage.list(&Path::from(keys::UPLOADS));
        while let Some(meta) = listed.try_next().await? {
            let Some(id) = meta.location.as_ref().split('/').nth(1) else { continue };
            let (is_young, keys) = sessions.entry(id.to_owned()).or_default();
            *is_young |= meta.last_modified.timestamp_millis() >= self.cutoff;
            keys.push(meta.location);
        }
        let mut deleted = 0;
        for (_, keys) in sessions.into_values().filter(|(is_young, _)| !is_young) {
            deleted += 1;
            for key in keys {
                if !self.options.dry_run {
                    storage.delete(&key).await?;
                }
            }
        }
        Ok(deleted)
    }
}

/// Adds to `alive` what is reached from `roots`: what they lead to, and what refers to them.
fn spread(roots: Vec<Digest>, all: &BTreeMap<Digest, Leads>, alive: &mut BTreeSet<Digest>) {
    let mut referrers: HashMap<Digest, Vec<Digest>> = HashMap::new();
    for (digest, leads) in all {
        if let Some(subject) = leads.subject {
            referrers.entry(subject).or_default().push(*digest);
        }
    }
    let mut next = roots;
    while let Some(digest) = next.pop() {
        let Some(leads) = all.get(&digest) else { continue };
        if alive.insert(digest) {
            next.extend(&leads.to);
            next.extend(referrers.get(&digest).into_iter().flatten());
        }
    }
}

/// How many subjects lie behind a manifest. Digests cannot form a circle.
fn depth(digest: &Digest, all: &BTreeMap<Digest, Leads>) -> u32 {
    let mut depth = 0;
    let mut at = *digest;
    while let Some(subject) = all.get(&at).and_then(|leads| leads.subject) {
        depth += 1;
        at = subject;
    }
    depth
}
