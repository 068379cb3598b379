//! Upload sessions. They live in the storage, so any server over it can go on with one.
//!
//! ```text
//! uploads/<id>/session            the repository's name
//! uploads/<id>/<offset>           bytes of the upload from this offset on (20 digits), 8 MiB or what there was
//! ```
//!
//! The body of a PATCH is cut into pieces that are stored as they come in: when a connection breaks, what came before
//! is kept, and a client goes on from there. A piece is created, never replaced: of two servers that append at the
//! same offset one fails. The upload's length is where the pieces, in order, have their first gap. The last PUT
//! streams the pieces and its own body through the hash into the blob's place, where the blob appears if the digest
//! is right. A PUT or POST of a whole blob goes there directly.
//!
//! A session that was left alone is removed by garbage collection.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use tdfs_common::digest::Digest;

use super::keys;
use super::request::{Name, UploadId};
use super::storage::{PIECE, Storage, StorageError};

/// What a client sends, piece by piece.
pub type Body = BoxStream<'static, Result<Bytes, BodyError>>;

/// A client does not send what it began to send.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection broke.
    #[error("the body broke off: {0}")]
    Broken(String),
    /// Nothing, or next to nothing, came for this long.
    #[error("nothing or too little was sent for {} s", .0.as_secs_f32())]
    Idle(Duration),
}

/// An upload does not go on.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The client stopped.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The storage fails.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// More or fewer bytes than were announced.
    #[error("the body has not the {0} bytes that were announced")]
    Length(u64),
    /// Somebody else appended meanwhile.
    #[error("somebody else goes on with this upload")]
    Overtaken,
    /// Not the digest that was announced.
    #[error("the content has digest {0}")]
    Digest(Digest),
}

/// A session, as it was when it was looked at.
#[derive(Debug)]
pub struct Upload {
    /// Its id.
    pub id: UploadId,
    /// Bytes that it holds.
    pub offset: u64,
    /// Their keys in order, with their lengths.
    pieces: Vec<(Path, u64)>,
}

impl UploadId {
    /// A new one, which nobody can guess.
    pub fn random() -> Result<Self, StorageError> {
        let mut random = [0; 16];
        let source = rustls::crypto::ring::default_provider().secure_random;
        source.fill(&mut random).map_err(|_| StorageError::Random)?;
        Ok(Self::new(random))
    }
}

impl Upload {
    /// Begins a session.
    pub async fn begin(storage: &Storage, name: &Name) -> Result<Self, StorageError> {
        let id = UploadId::random()?;
        storage.put_volatile(&keys::session(&id), name.as_str().to_owned()).await?;
        Ok(Self { id, offset: 0, pieces: Vec::new() })
    }

    /// The session `id` of a repository.
    pub async fn find(storage: &Storage, name: &Name, id: &UploadId) -> Result<Option<Self>, StorageError> {
        let prefix = keys::upload(id);
        let (session, listed) = (keys::session(id), storage.list(&prefix).try_collect::<Vec<_>>());
        let (session, listed) = tokio::try_join!(storage.get(&session), listed)?;
        if session.is_none_or(|session| session != name.as_str()) {
            return Ok(None);
        }
        let mut found: Vec<(u64, Path, u64)> = listed
            .into_iter()
            .filter_map(|meta| Some((meta.location.filename()?.parse().ok()?, meta.location, meta.size)))
            .collect();
        found.sort();
        let mut upload = Self { id: id.clone(), offset: 0, pieces: Vec::new() };
        for (offset, key, size) in found {
            if offset != upload.offset {
                break;
            }
            upload.offset += size;
            upload.pieces.push((key, size));
        }
        Ok(Some(upload))
    }

    /// Appends a body, which has `announced` bytes if that is known. What came before an error is kept.
    pub async fn append(
        &mut self,
        storage: &Storage,
        mut body: Body,
        announced: Option<u64>,
    ) -> Result<(), UploadError> {
        let mut place = storage.place();
        let (mut pending, mut total) = (BytesMut::new(), 0u64);
        let ended = loop {
            match body.next().await {
                Some(Ok(bytes)) => {
                    total += bytes.len() as u64;
                    if announced.is_some_and(|announced| total > announced) {
                        break Err(UploadError::Length(announced.unwrap_or_default()));
                    }
                    place.hold(pending.len() + bytes.len()).await;
                    // Copied: small pieces would hold on to the buffers that they came in.
                    pending.extend_from_slice(&bytes);
                    if pending.len() >= PIECE {
                        self.store(storage, pending.split().freeze()).await?;
                    }
                }
                Some(Err(e)) => break Err(e.into()),
                None => break Ok(()),
            }
        };
        if !pending.is_empty() {
            self.store(storage, pending.freeze()).await?;
        }
        ended?;
        match announced {
            Some(announced) if announced != total => Err(UploadError::Length(announced)),
            _ => Ok(()),
        }
    }

    async fn store(&mut self, storage: &Storage, bytes: Bytes) -> Result<(), UploadError> {
        let (key, length) = (keys::piece(&self.id, self.offset), bytes.len() as u64);
        if !storage.create_volatile(&key, bytes.into()).await? {
            return Err(UploadError::Overtaken);
        }
        self.offset += length;
        self.pieces.push((key, length));
        Ok(())
    }

    /// All that came, and then `body`, becomes the blob `digest`, if that is its digest.
    pub async fn finish(&self, storage: &Storage, body: Body, digest: &Digest) -> Result<u64, UploadError> {
        let pieces = stream::iter(self.pieces.clone()).then(|(key, size)| {
            let storage = storage.clone();
            async move {
                let missing = || StorageError::Damaged { key: key.to_string(), reason: "it is gone".into() };
                storage.read(&key, 0..size).await?.ok_or_else(missing)
            }
        });
        let stored = pieces.try_flatten().map_err(UploadError::from);
        store(storage, stored.chain(body.map_err(UploadError::from)).boxed(), digest).await
    }

    /// Removes the session.
    pub async fn remove(self, storage: &Storage) -> Result<(), StorageError> {
        storage.delete(&keys::session(&self.id)).await?;
        for (key, _) in &self.pieces {
            storage.delete(key).await?;
        }
        Ok(())
    }
}

/// Stores a blob of all repositories, if it has this digest.
pub async fn store(
    storage: &Storage,
    mut content: BoxStream<'_, Result<Bytes, UploadError>>,
    digest: &Digest,
) -> Result<u64, UploadError> {
    let mut writer = storage.writer(keys::content(digest), *digest);
    while let Some(bytes) = content.next().await {
        writer.write(bytes?).await?;
    }
    writer.commit().await?.map_err(UploadError::Digest)
}
