//! Objects in a directory or in an S3-compatible store.
//!
//! Comes in: keys and streams. Goes out: objects, which appear whole or not at all. In a directory the crate
//! `object_store` writes `<name>#<n>` beside the place, syncs it, renames it and syncs the directory; what a process
//! that was killed left of these names is invisible, and garbage collection removes it. In an S3 store an object
//! appears when its PUT or its multipart upload is completed; parts of uploads that were never completed are the
//! business of the bucket's lifecycle rule (`AbortIncompleteMultipartUpload`).
//!
//! Two kinds of writes: *durable* ones are on the disk before they return (content, links, tags); *volatile* ones
//! (leases, pieces of uploads) survive a crash of the process but, in a directory, perhaps not one of the machine:
//! content is composed of pieces only if its digest is right. Deletions are not synced: after a crash of the
//! machine, what was deleted may be there once more.
//!
//! Blocks: every call, on the disk or the network. Nothing is locked meanwhile. Memory: a writer holds at most
//! three pieces of [`PIECE`], and at most [`WRITERS_MAX`] writers hold more than [`SMALL`]; the others wait. Who sends
//! next to nothing takes no place from them.

use std::io;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{
    GetOptions, GetRange, GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode,
    PutPayload, WriteMultipart,
};
use tdfs_common::digest::{Digest, DigestWriter};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of a piece of an upload and of a part of an object; S3 wants at least 5 MiB, and takes 10000 parts.
pub const PIECE: usize = 8 << 20;
/// Large objects that are written at a time.
const WRITERS_MAX: usize = 32;
/// Bytes of an object that may be held without a place among these.
const SMALL: usize = 256 << 10;
/// Parts on their way while the next one is filled.
const PARTS_UNDERWAY: usize = 1;
/// Bytes read from a file at a time.
const READ: usize = 256 << 10;

/// The storage fails.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The root is none, or cannot be opened.
    #[error("{root}: {reason}")]
    Root {
        /// As it was given.
        root: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An operation failed.
    #[error("storage: {0}")]
    Object(#[from] object_store::Error),
    /// A file operation failed.
    #[error("storage: {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The system gives no random numbers.
    #[error("no random numbers")]
    Random,
    /// An object is not what its key says: the disk lost or changed bytes.
    #[error("storage: {key} is damaged: {reason}")]
    Damaged {
        /// The object.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Pieces of an object.
pub type ObjectStream = BoxStream<'static, Result<Bytes, StorageError>>;

/// Where everything lies. Clones share it.
#[derive(Clone, Debug)]
pub struct Storage {
    durable: Arc<dyn ObjectStore>,
    volatile: Arc<dyn ObjectStore>,
    directory: Option<PathBuf>,
    writers: Arc<Semaphore>,
}

/// Nothing, or what is there.
fn found<T>(result: object_store::Result<T>) -> Result<Option<T>, StorageError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

impl Storage {
    /// Opens a directory, which is created, or `s3://bucket[/prefix]`, whose endpoint and keys the environment
    /// tells (`AWS_ENDPOINT`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, ...).
    pub fn open(root: &str) -> Result<Self, StorageError> {
        let bad = |reason: String| StorageError::Root { root: root.to_owned(), reason };
        let writers = Arc::new(Semaphore::new(WRITERS_MAX));
        if let Some(rest) = root.strip_prefix("s3://") {
            // An error means that a provider is installed already, which is what we want.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let store = AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .build()
                .map_err(|e| bad(e.to_string()))?;
            let prefix = Path::parse(prefix).map_err(|e| bad(e.to_string()))?;
            let store: Arc<dyn ObjectStore> = Arc::new(PrefixStore::new(store, prefix));
            return Ok(Self { durable: store.clone(), volatile: store, directory: None, writers });
        }
        if root.contains("://") {
            return Err(bad("neither a directory nor s3://bucket/prefix".into()));
        }
        std::fs::create_dir_all(root).map_err(|e| bad(e.to_string()))?;
        let directory = FilePath::new(root).canonicalize().map_err(|e| bad(e.to_string()))?;
        let open = |sync| {
            LocalFileSystem::new_with_prefix(&directory)
                .map(|store| Arc::new(store.with_automatic_cleanup(true).with_fsync(sync)))
                .map_err(|e| bad(e.to_string()))
        };
        Ok(Self { durable: open(true)?, volatile: open(false)?, directory: Some(directory), writers })
    }

    /// Size and time of an object.
    pub async fn head(&self, key: &Path) -> Result<Option<ObjectMeta>, StorageError> {
        found(self.durable.head(key).await)
    }

    /// A small object. It is ours, so it is as small as we wrote it.
    pub async fn get(&self, key: &Path) -> Result<Option<Bytes>, StorageError> {
        let Some(result) = found(self.durable.get(key).await)? else { return Ok(None) };
        Ok(Some(result.bytes().await?))
    }

    /// Bytes of an object, read as they are taken; an error at the end where there are fewer.
    pub async fn read(&self, key: &Path, range: Range<u64>) -> Result<Option<ObjectStream>, StorageError> {
        if range.is_empty() {
            return Ok(self.head(key).await?.map(|_| stream::empty().boxed()));
        }
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let Some(result) = found(self.durable.get_opts(key, options).await)? else { return Ok(None) };
        if result.range != range {
            let reason = format!("it has no bytes {range:?}");
            return Err(StorageError::Damaged { key: key.to_string(), reason });
        }
        Ok(Some(match result.payload {
            GetResultPayload::File(file, path) => read_file(file, path, range).boxed(),
            GetResultPayload::Stream(stream) => stream.map_err(StorageError::from).boxed(),
        }))
    }

    /// Stores a small object.
    pub async fn put(&self, key: &Path, bytes: impl Into<PutPayload>) -> Result<(), StorageError> {
        self.durable.put(key, bytes.into()).await?;
        Ok(())
    }

    /// Stores an object that a crash of the machine may take.
    pub async fn put_volatile(&self, key: &Path, bytes: impl Into<PutPayload>) -> Result<(), StorageError> {
        self.volatile.put(key, bytes.into()).await?;
        Ok(())
    }

    /// Stores an object that is not there yet and that a crash of the machine may take; false if it is there.
    pub async fn create_volatile(&self, key: &Path, payload: PutPayload) -> Result<bool, StorageError> {
        match self.volatile.put_opts(key, payload, PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Deletes an object if it is there.
    pub async fn delete(&self, key: &Path) -> Result<(), StorageError> {
        found(self.durable.delete(key).await)?;
        Ok(())
    }

    /// All objects below a key.
    pub fn list(&self, prefix: &Path) -> BoxStream<'static, Result<ObjectMeta, StorageError>> {
        self.durable.list(Some(prefix)).map_err(StorageError::from).boxed()
    }

    /// The names right below a key that have objects below them.
    pub async fn children(&self, prefix: &Path) -> Result<Vec<Path>, StorageError> {
        Ok(self.durable.list_with_delimiter(Some(prefix)).await?.common_prefixes)
    }

    /// For somebody who holds what is to be stored.
    pub fn place(&self) -> Place {
        Place { all: self.writers.clone(), taken: None }
    }

    /// Begins a large object, which will have to be `digest`.
    pub fn writer(&self, key: Path, digest: Digest) -> Writer {
        Writer {
            store: self.durable.clone(),
            key,
            expected: digest,
            digest: DigestWriter::default(),
            size: 0,
            first: BytesMut::new(),
            upload: None,
            place: self.place(),
        }
    }

    /// Removes what killed processes left of objects in a directory and did not touch for `age`; returns how much.
    pub async fn remove_leftovers(&self, age: Duration, dry_run: bool) -> Result<u64, StorageError> {
        let Some(directory) = self.directory.clone() else { return Ok(0) };
        let work = move || {
            let mut removed = 0;
            let mut directories = vec![directory];
            while let Some(directory) = directories.pop() {
                removed += leftovers(&directory, age, dry_run, &mut directories)
                    .map_err(|source| StorageError::Io { path: directory, source })?;
            }
            Ok(removed)
        };
        tokio::task::spawn_blocking(work).await.map_err(|e| StorageError::Object(e.into()))?
    }
}

fn leftovers(
    directory: &FilePath,
    age: Duration,
    dry_run: bool,
    directories: &mut Vec<PathBuf>,
) -> io::Result<u64> {
    let mut removed = 0;
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        // Emptied and removed meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            directories.push(entry.path());
            continue;
        }
        let name = entry.file_name();
        let is_staged = name
            .to_str()
            .and_then(|name| name.rsplit_once('#'))
            .is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
        let is_old = |m: std::fs::Metadata| {
            let elapsed = m.modified().ok().and_then(|t| SystemTime::now().duration_since(t).ok());
            elapsed.is_some_and(|elapsed| elapsed > age)
        };
        if is_staged && entry.metadata().is_ok_and(is_old) {
            removed += 1;
            if !dry_run {
                std::fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(removed)
}

/// Larger pieces than the crate's own reader takes.
fn read_file(
    file: std::fs::File,
    path: PathBuf,
    range: Range<u64>,
) -> impl futures_util::Stream<Item = Result<Bytes, StorageError>> {
    let failed = |path: &FilePath| {
        let path = path.to_owned();
        move |source| StorageError::Io { path, source }
    };
    let state = (tokio::fs::File::from_std(file), false, range.end - range.start);
    stream::try_unfold(state, move |(mut file, mut is_there, left)| {
        let path = path.clone();
        async move {
            if left == 0 {
                return Ok(None);
            }
            if !is_there {
                file.seek(io::SeekFrom::Start(range.start)).await.map_err(failed(&path))?;
                is_there = true;
            }
            let most = left.min(READ as u64);
            let mut piece = BytesMut::with_capacity(most as usize);
            let got = (&mut file).take(most).read_buf(&mut piece).await.map_err(failed(&path))?;
            if got == 0 {
                let reason = format!("it ends {left} bytes early");
                return Err(StorageError::Damaged { key: path.display().to_string(), reason });
            }
            Ok(Some((piece.freeze(), (file, is_there, left - got as u64))))
        }
    })
}

/// A place among those who hold much.
pub struct Place {
    all: Arc<Semaphore>,
    taken: Option<OwnedSemaphorePermit>,
}

impl Place {
    /// Waits for a place if `bytes` are more than may be held without one.
    pub async fn hold(&mut self, bytes: usize) {
        if bytes > SMALL && self.taken.is_none() {
            // The semaphore is never closed.
            self.taken = self.all.clone().acquire_owned().await.ok();
        }
    }
}

/// An object that is being written. Dropped before it is committed, it leaves nothing.
pub struct Writer {
    store: Arc<dyn ObjectStore>,
    key: Path,
    expected: Digest,
    digest: DigestWriter,
    size: u64,
    /// Until there is more than one piece.
    first: BytesMut,
    upload: Option<WriteMultipart>,
    place: Place,
}

impl Writer {
    /// Adds bytes.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), StorageError> {
        self.digest.update(&bytes);
        self.size += bytes.len() as u64;
        if let Some(upload) = &mut self.upload {
            upload.wait_for_capacity(PARTS_UNDERWAY).await?;
            // Copied: small pieces would hold on to the buffers that they came in.
            upload.write(&bytes);
            return Ok(());
        }
        self.place.hold(self.first.len() + bytes.len()).await;
        self.first.extend_from_slice(&bytes);
        if self.size > PIECE as u64 {
            let upload = self.store.put_multipart(&self.key).await?;
            let upload = self.upload.insert(WriteMultipart::new_with_chunk_size(upload, PIECE));
            upload.put(std::mem::take(&mut self.first).freeze());
        }
        Ok(())
    }

    /// Makes the object visible if it has the digest that it was to have; else says which it has. Returns its size.
    pub async fn commit(mut self) -> Result<Result<u64, Digest>, StorageError> {
        let got = std::mem::take(&mut self.digest).finish();
        if got != self.expected {
            return Ok(Err(got));
        }
        match self.upload.take() {
            Some(upload) => upload.finish().await?,
            None => self.store.put(&self.key, self.first.split().freeze().into()).await?,
        };
        Ok(Ok(self.size))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // A file goes with its writer; the parts in an S3 store have to be told.
        if let (Some(upload), Ok(runtime)) = (self.upload.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(upload.abort());
        }
    }
}
