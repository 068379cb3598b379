//! OCI image layouts: a directory that holds images the way a registry does.
//!
//! ```text
//! DIR/oci-layout            {"imageLayoutVersion":"1.0.0"}; never replaced, so writers lock it (flock)
//! DIR/index.json            the manifests, each with its tag in an annotation; replaced atomically under the lock
//! DIR/blobs/sha256/<hex>    content; complete and durable before it gets its name
//! DIR/.tdfs-*               being written; left over by a crash, never read
//! ```
//!
//! All of this blocks on the disk: call it off the async threads. A layout that does not exist reads as empty and is
//! created by the first write. Entries of `index.json` that others wrote are kept with all their fields.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde_json::{Value, json};
use tdfs_common::digest::{Digest, DigestWriter};
use tempfile::NamedTempFile;

use super::manifest::{
    self, Descriptor, Document, INDEX_TYPE, Index, MANIFEST_MAX, MANIFEST_TYPES, REF_NAME,
};
use super::platform::Platform;
use super::reference::is_layout_name;
use super::{BlobSource, OciError, Reference};

const MARKER: &str = "oci-layout";
const INDEX: &str = "index.json";
const TEMPORARY: &str = ".tdfs-";
/// Bytes read or written at once.
const PIECE: usize = 1 << 20;

/// A layout directory.
#[derive(Debug)]
pub(super) struct Layout {
    dir: PathBuf,
}

impl Layout {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    fn name(&self) -> String {
        format!("oci:{}", self.dir.display())
    }

    /// Whether there is a layout; an error if there is something else.
    fn exists(&self) -> Result<bool, OciError> {
        let path = self.dir.join(MARKER);
        let Some(text) = read_file(&path, 4096)? else { return Ok(false) };
        if text.is_empty() {
            // The first writer died between creating and filling it.
            return Ok(false);
        }
        let marker: Value = serde_json::from_slice(&text).map_err(|e| malformed(&path, e))?;
        match marker["imageLayoutVersion"].as_str() {
            Some(version) if version.starts_with("1.") => Ok(true),
            _ => Err(malformed(&path, "not version 1 of the image layout")),
        }
    }

    fn index_json(&self) -> Result<Value, OciError> {
        let path = self.dir.join(INDEX);
        if !self.exists()? {
            return Ok(empty_index());
        }
        let Some(text) = read_file(&path, MANIFEST_MAX)? else { return Ok(empty_index()) };
        serde_json::from_slice(&text).map_err(|e| malformed(&path, e))
    }

    /// The manifests and indexes of `index.json`.
    fn entries(&self) -> Result<Vec<Descriptor>, OciError> {
        let path = self.dir.join(INDEX);
        let index: Index = serde_json::from_value(self.index_json()?).map_err(|e| malformed(&path, e))?;
        if index.manifests.len() > manifest::DESCRIPTORS_MAX {
            return Err(malformed(&path, "too many manifests"));
        }
        let mut entries = index.manifests;
        entries.retain(|d| MANIFEST_TYPES.contains(&d.media_type.as_str()));
        Ok(entries)
    }

    /// The entry `reference` names: by its tag, or the only image there is.
    pub fn find(&self, reference: &Reference, platform: &Platform) -> Result<Descriptor, OciError> {
        if !self.exists()? {
            return Err(OciError::NotFound(format!("OCI layout {}", self.dir.display())));
        }
        let entries = self.entries()?;
        let candidates = match reference.tag() {
            Some(tag) => entries.into_iter().filter(|d| tag_of(d) == Some(tag)).collect(),
            None => self.images(entries)?,
        };
        match &candidates[..] {
            [] => Err(OciError::NotFound(match reference.tag() {
                Some(_) => reference.to_string(),
                None => format!("image in {}", self.name()),
            })),
            [only] => Ok(only.clone()),
            several if reference.tag().is_some() || several.iter().all(|d| d.platform.is_some()) => {
                platform.choose(&reference.to_string(), several).cloned()
            }
            several => Err(OciError::Ambiguous {
                layout: self.name(),
                count: several.len(),
                names: several
                    .iter()
                    .take(12)
                    .map(|d| tag_of(d).map_or_else(|| d.digest.to_string(), str::to_owned))
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
        }
    }

    /// Those entries that are images, each digest once.
    fn images(&self, entries: Vec<Descriptor>) -> Result<Vec<Descriptor>, OciError> {
        let mut seen = BTreeSet::new();
        let mut images = Vec::new();
        for entry in entries {
            let attestation = entry.platform.as_ref().is_some_and(|p| p.os == "unknown");
            let referrers = tag_of(&entry).is_some_and(is_referrers_tag);
            if attestation || referrers || entry.artifact_type.is_some() || !seen.insert(entry.digest) {
                continue;
            }
            // Copying programs drop `artifactType` from the entry, the document still has it.
            let (_, document) = self.document(&entry.digest)?;
            if document.artifact_type().is_none() {
                images.push(entry);
            }
        }
        Ok(images)
    }

    fn document(&self, digest: &Digest) -> Result<(Bytes, Document), OciError> {
        let bytes = self.read(digest, MANIFEST_MAX)?;
        let (_, document) = Document::parse(&digest.to_string(), None, &bytes)?;
        Ok((bytes, document))
    }

    pub fn tag_digest(&self, tag: &str) -> Result<Option<Digest>, OciError> {
        Ok(self.entries()?.iter().find(|d| tag_of(d) == Some(tag)).map(|d| d.digest))
    }

    /// Entries whose `subject` is `subject`, directly or through a referrers index another program copied here.
    pub fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, OciError> {
        let fallback = referrers_tag(subject);
        let mut entries = self.entries()?;
        if let Some(index) = entries.iter().find(|d| tag_of(d) == Some(&fallback))
            && let (_, Document::Index(index)) = self.document(&index.digest)?
        {
            entries.extend(index.manifests);
        }
        let mut seen = BTreeSet::new();
        let mut found = Vec::new();
        for entry in entries {
            if !seen.insert(entry.digest) {
                continue;
            }
            let (bytes, document) = match self.document(&entry.digest) {
                Err(e) if e.is_not_found() => continue,
                other => other?,
            };
            if document.subject().is_some_and(|s| s.digest == *subject) {
                found.push(document.describe(&entry.media_type, &bytes));
            }
        }
        Ok(found)
    }

    /// Size of a blob that is there.
    pub fn size(&self, digest: &Digest) -> Result<Option<u64>, OciError> {
        let path = self.blob_path(digest);
        match open_file(&path)? {
            Some(file) => Ok(Some(file.metadata().map_err(OciError::io(&path))?.len())),
            None => Ok(None),
        }
    }

    /// A blob of at most `limit` bytes, checked against its digest.
    pub fn read(&self, digest: &Digest, limit: u64) -> Result<Bytes, OciError> {
        let path = self.blob_path(digest);
        let Some(bytes) = read_file(&path, limit)? else {
            return Err(OciError::NotFound(format!("{digest} in {}", self.name())));
        };
        let got = Digest::of(&bytes);
        if got != *digest {
            return Err(OciError::Digest { what: path.display().to_string(), expected: *digest, got });
        }
        Ok(bytes.into())
    }

    /// A blob to be read piece by piece.
    pub fn open(&self, digest: &Digest) -> Result<(PathBuf, File), OciError> {
        let path = self.blob_path(digest);
        match open_file(&path)? {
            Some(file) => Ok((path, file)),
            None => Err(OciError::NotFound(format!("{digest} in {}", self.name()))),
        }
    }

    /// Stores a blob durably, unless one of its size is there.
    pub fn put(&self, source: &BlobSource, digest: &Digest) -> Result<(), OciError> {
        if self.size(digest)? == Some(source.size()?) {
            return Ok(());
        }
        let mut writer = self.writer()?;
        match source {
            BlobSource::Bytes(bytes) => writer.write(bytes)?,
            BlobSource::File(path) => {
                let mut file = File::open(path).map_err(OciError::io(path))?;
                let mut piece = vec![0; PIECE];
                loop {
                    match file.read(&mut piece).map_err(OciError::io(path))? {
                        0 => break,
                        n => writer.write(&piece[..n])?,
                    }
                }
            }
        }
        writer.commit(digest)
    }

    /// Starts a new blob.
    pub fn writer(&self) -> Result<BlobWriter, OciError> {
        drop(self.lock()?);
        let file = self.temporary()?;
        Ok(BlobWriter { blobs: self.dir.join("blobs/sha256"), file, digest: DigestWriter::default() })
    }

    /// Stores a manifest or an index and enters it into `index.json`, taking the tag from any other.
    pub fn put_manifest(
        &self,
        media_type: &str,
        document: &Document,
        bytes: &Bytes,
        tag: Option<&str>,
    ) -> Result<Descriptor, OciError> {
        if tag.is_some_and(|tag| !is_layout_name(tag)) {
            return Err(malformed(&self.dir, format_args!("bad tag {tag:?}")));
        }
        let descriptor = document.describe(media_type, bytes);
        self.put(&BlobSource::Bytes(bytes.clone()), &descriptor.digest)?;
        let mut entry = descriptor.clone();
        entry.annotations.remove(REF_NAME);
        entry.annotations.extend(tag.map(|tag| (REF_NAME.to_owned(), tag.to_owned())));
        let _lock = self.lock()?;
        let path = self.dir.join(INDEX);
        let mut index = self.index_json()?;
        let entries = index.get_mut("manifests").and_then(Value::as_array_mut);
        let entries = entries.ok_or_else(|| malformed(&path, "no list of manifests"))?;
        let digest = Value::String(descriptor.digest.to_string());
        let tagged = |entry: &Value| entry["annotations"][REF_NAME].as_str().map(str::to_owned);
        if tag.is_none() && entries.iter().any(|e| e["digest"] == digest) {
            return Ok(descriptor);
        }
        entries.retain(|e| match tagged(e) {
            Some(other) => Some(other.as_str()) != tag,
            None => e["digest"] != digest,
        });
        entries.push(json!(entry));
        self.replace(&path, index.to_string().as_bytes())?;
        Ok(descriptor)
    }

    /// Creates the layout if need be and locks it against other writers until the file is dropped.
    fn lock(&self) -> Result<File, OciError> {
        let path = self.dir.join(MARKER);
        let blobs = self.dir.join("blobs/sha256");
        fs::create_dir_all(&self.dir).map_err(OciError::io(&self.dir))?;
        if !path.exists() && fs::read_dir(&self.dir).map_err(OciError::io(&self.dir))?.next().is_some() {
            return Err(OciError::Setup(format!(
                "{} is neither empty nor an OCI layout",
                self.dir.display()
            )));
        }
        let io = || OciError::io(&path);
        let mut marker = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(io())?;
        marker.lock().map_err(io())?;
        if marker.metadata().map_err(io())?.len() == 0 {
            marker.write_all(br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(io())?;
            marker.sync_all().map_err(io())?;
        } else {
            self.exists()?;
        }
        fs::create_dir_all(&blobs).map_err(OciError::io(&blobs))?;
        let index = self.dir.join(INDEX);
        if !index.exists() {
            self.replace(&index, empty_index().to_string().as_bytes())?;
        }
        Ok(marker)
    }

    fn temporary(&self) -> Result<NamedTempFile, OciError> {
        tempfile::Builder::new()
            .prefix(OsStr::new(TEMPORARY))
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(&self.dir)
            .map_err(OciError::io(&self.dir))
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), OciError> {
        let mut file = self.temporary()?;
        file.write_all(bytes).map_err(OciError::io(path))?;
        publish(file, path)
    }
}

/// A blob on its way into a layout.
pub(super) struct BlobWriter {
    blobs: PathBuf,
    file: NamedTempFile,
    digest: DigestWriter,
}

impl BlobWriter {
    /// A blob that stays a temporary file, outside of any layout.
    pub fn anonymous() -> Result<Self, OciError> {
        let dir = std::env::temp_dir();
        let file = NamedTempFile::new_in(&dir).map_err(OciError::io(&dir))?;
        Ok(Self { blobs: dir, file, digest: DigestWriter::default() })
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), OciError> {
        self.digest.update(bytes);
        self.file.write_all(bytes).map_err(OciError::io(self.file.path()))
    }

    /// Gives the blob its name, if it is the expected one.
    pub fn commit(self, expected: &Digest) -> Result<(), OciError> {
        let path = self.blobs.join(expected.hex());
        let got = self.digest.finish();
        if got != *expected {
            return Err(OciError::Digest { what: path.display().to_string(), expected: *expected, got });
        }
        publish(self.file, &path)
    }
}

/// Makes `file` durable, then visible as `path`, then makes that durable.
fn publish(file: NamedTempFile, path: &Path) -> Result<(), OciError> {
    file.as_file().sync_all().map_err(OciError::io(path))?;
    file.persist(path).map_err(|e| OciError::io(path)(e.error))?;
    let parent = path.parent().unwrap_or(path);
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(OciError::io(parent))
}

/// A regular file, `None` if there is nothing. Opening a FIFO would wait for ever, so the kind is asked first.
fn open_file(path: &Path) -> Result<Option<File>, OciError> {
    let opened =
        fs::metadata(path).and_then(|m| if m.is_file() { File::open(path).map(Some) } else { Ok(None) });
    match opened {
        Ok(Some(file)) => Ok(Some(file)),
        Ok(None) => Err(malformed(path, "not a file")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(OciError::io(path)(e)),
    }
}

/// The whole file, `None` if there is none.
fn read_file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, OciError> {
    let Some(file) = open_file(path)? else { return Ok(None) };
    let size = file.metadata().map_err(OciError::io(path))?.len();
    manifest::limit(&path.display().to_string(), size, limit)?;
    let mut bytes = Vec::with_capacity(size as usize);
    file.take(limit + 1).read_to_end(&mut bytes).map_err(OciError::io(path))?;
    manifest::limit(&path.display().to_string(), bytes.len() as u64, limit)?;
    Ok(Some(bytes))
}

fn empty_index() -> Value {
    json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [] })
}

fn malformed(path: &Path, reason: impl ToString) -> OciError {
    OciError::malformed(path.display().to_string(), reason)
}

fn tag_of(entry: &Descriptor) -> Option<&str> {
    entry.annotations.get(REF_NAME).map(String::as_str)
}

/// Tag of the index of referrers where the API is missing (distribution specification, "Referrers Tag Schema").
pub(super) fn referrers_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

fn is_referrers_tag(tag: &str) -> bool {
    tag.strip_prefix("sha256-")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}
