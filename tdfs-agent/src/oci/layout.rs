//! OCI image layouts: a directory that holds images the way a registry does.
//!
//! ```text
//! DIR/oci-layout            {"imageLayoutVersion":"1.0.0"}; never replaced, so writers lock it (flock)
//! DIR/index.json            the manifests, each with its tag in an annotation; replaced atomically under the lock
//! DIR/blobs/sha256/<hex>    content; complete and durable before it gets its name
//! DIR/.tdfs-*               being written, and locked as long as the writer lives; never read
//! ```
//!
//! All of this blocks on the disk: call it off the async threads. A layout that does not exist reads as empty and is
//! created by the first write. Entries of `index.json` that others wrote are kept with all their fields.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
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
        let lock = self.lock()?;
        let file = self.temporary()?;
        drop(lock);
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
        // Asked again: another first writer, whose marker comes before everything else, may have come in between.
        let is_empty = || Ok(fs::read_dir(&self.dir).map_err(OciError::io(&self.dir))?.next().is_none());
        if !path.exists() && !is_empty()? && !path.exists() {
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
        self.sweep()?;
        fs::create_dir_all(&blobs).map_err(OciError::io(&blobs))?;
        let index = self.dir.join(INDEX);
        if !index.exists() {
            self.replace(&index, empty_index().to_string().as_bytes())?;
        }
        Ok(marker)
    }

    /// Call under the layout's lock: without it, a sweep could come between creating and locking.
    fn temporary(&self) -> Result<NamedTempFile, OciError> {
        let file = tempfile::Builder::new()
            .prefix(OsStr::new(TEMPORARY))
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(&self.dir)
            .map_err(OciError::io(&self.dir))?;
        file.as_file().lock().map_err(OciError::io(file.path()))?;
        Ok(file)
    }

    /// Removes what writers left that did not live to name or remove it.
    fn sweep(&self) -> Result<(), OciError> {
        for entry in fs::read_dir(&self.dir).map_err(OciError::io(&self.dir))? {
            let path = entry.map_err(OciError::io(&self.dir))?.path();
            let temporary =
                path.file_name().is_some_and(|name| name.as_bytes().starts_with(TEMPORARY.as_bytes()));
            if temporary && open_file(&path)?.is_some_and(|file| file.try_lock().is_ok()) {
                match fs::remove_file(&path) {
                    // Its writer gave it its name just now.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    other => other.map_err(OciError::io(&path))?,
                }
            }
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::oci::{CONFIG_TYPE, MANIFEST_TYPE};

    fn layout() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(&dir.path().join("l"));
        (dir, layout)
    }

    fn put(
        layout: &Layout,
        media_type: &str,
        value: &Value,
        tag: Option<&str>,
    ) -> Result<Descriptor, OciError> {
        let bytes = Bytes::from(value.to_string());
        let (_, document) = Document::parse("test", Some(media_type), &bytes)?;
        layout.put_manifest(media_type, &document, &bytes, tag)
    }

    /// An image, or with `more` fields something else; `name` makes it unlike others.
    fn manifest(name: &str, more: Value) -> Value {
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": Descriptor::of(CONFIG_TYPE, name.as_bytes()),
            "layers": []
        });
        if let (Some(manifest), Value::Object(more)) = (manifest.as_object_mut(), more) {
            manifest.extend(more);
        }
        manifest
    }

    fn find(layout: &Layout, tag: Option<&str>) -> Result<Digest, String> {
        let mut reference = Reference::layout(&layout.dir);
        if let Some(tag) = tag {
            reference = reference.with_tag(tag).unwrap();
        }
        let wanted = "linux/amd64".parse().unwrap();
        layout.find(&reference, &wanted).map(|d| d.digest).map_err(|e| e.to_string())
    }

    fn edit_index(layout: &Layout, edit: impl FnOnce(&mut Vec<Value>)) {
        let mut index = layout.index_json().unwrap();
        edit(index["manifests"].as_array_mut().unwrap());
        fs::write(layout.dir.join(INDEX), index.to_string()).unwrap();
    }

    #[test]
    fn only_image_is_found_among_artifacts_and_attestations() {
        let (_dir, layout) = layout();
        let image = put(&layout, MANIFEST_TYPE, &manifest("a", json!({})), Some("v1")).unwrap();
        let artifact =
            put(&layout, MANIFEST_TYPE, &manifest("b", json!({ "artifactType": "x/y" })), None).unwrap();
        let list = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [artifact] });
        put(&layout, INDEX_TYPE, &list, Some(&referrers_tag(&image.digest))).unwrap();
        put(&layout, MANIFEST_TYPE, &manifest("c", json!({})), None).unwrap();
        edit_index(&layout, |entries| {
            // As a program writes them that knows nothing of artifacts.
            entries[1].as_object_mut().unwrap().remove("artifactType");
            entries[3]["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
        });
        assert_eq!(find(&layout, None), Ok(image.digest));
        // Two tags of one image are no choice to make.
        put(&layout, MANIFEST_TYPE, &manifest("a", json!({})), Some("v2")).unwrap();
        assert_eq!(find(&layout, None), Ok(image.digest));
        assert_eq!(find(&layout, Some("v2")), Ok(image.digest));
        put(&layout, MANIFEST_TYPE, &manifest("d", json!({})), None).unwrap();
        let error = find(&layout, None).unwrap_err();
        assert!(error.contains("holds 2 images, name one: v1, sha256:"), "{error}");
        assert!(find(&layout, Some("v3")).unwrap_err().ends_with("l:v3 not found"));
    }

    #[test]
    fn platform_decides_between_entries_of_one_tag() {
        let (_dir, layout) = layout();
        let arm = put(&layout, MANIFEST_TYPE, &manifest("arm", json!({})), Some("v1")).unwrap();
        let amd = put(&layout, MANIFEST_TYPE, &manifest("amd", json!({})), Some("v2")).unwrap();
        edit_index(&layout, |entries| {
            entries[1]["annotations"][REF_NAME] = json!("v1");
            entries[0]["platform"] = json!({ "os": "linux", "architecture": "arm64" });
            entries[1]["platform"] = json!({ "os": "linux", "architecture": "amd64" });
        });
        assert_ne!(arm.digest, amd.digest);
        assert_eq!(find(&layout, Some("v1")), Ok(amd.digest));
        assert_eq!(find(&layout, None), Ok(amd.digest));
        edit_index(&layout, |entries| entries.truncate(1));
        assert_eq!(find(&layout, Some("v1")), Ok(arm.digest), "a single entry is taken as it is");
    }

    #[test]
    fn entries_of_others_keep_their_fields() {
        let (_dir, layout) = layout();
        put(&layout, MANIFEST_TYPE, &manifest("a", json!({})), Some("v1")).unwrap();
        edit_index(&layout, |entries| {
            entries[0]["urls"] = json!(["https://example.com"]);
            entries
                .push(json!({ "mediaType": "x/y", "digest": Digest::of(b"z"), "size": 1, "data": "eg==" }));
        });
        put(&layout, MANIFEST_TYPE, &manifest("b", json!({})), Some("v2")).unwrap();
        let entries = layout.index_json().unwrap()["manifests"].clone();
        assert_eq!(entries[0]["urls"][0], "https://example.com");
        assert_eq!(entries[1]["data"], "eg==");
        assert_eq!(layout.entries().unwrap().len(), 2);
    }

    #[test]
    fn tag_of_a_document_does_not_tag_its_entry() {
        let (_dir, layout) = layout();
        let image = put(&layout, MANIFEST_TYPE, &manifest("a", json!({})), Some("v1")).unwrap();
        let thief =
            json!({ "artifactType": "x/y", "annotations": { REF_NAME: "v1", "k": "v" }, "subject": image });
        put(&layout, MANIFEST_TYPE, &manifest("b", thief), None).unwrap();
        assert_eq!(layout.tag_digest("v1").unwrap(), Some(image.digest));
        let found = layout.referrers(&image.digest).unwrap();
        assert_eq!((found.len(), found[0].annotations["k"].as_str()), (1, "v"));
    }

    #[test]
    fn referrers_are_found_through_a_copied_list() {
        let (_dir, layout) = layout();
        let subject = Descriptor::of(MANIFEST_TYPE, b"subject");
        let referring = manifest("a", json!({ "artifactType": "x/y", "subject": subject }));
        let artifact = put(&layout, MANIFEST_TYPE, &referring, None).unwrap();
        let gone = Descriptor::of(MANIFEST_TYPE, b"not copied");
        let list = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [artifact, gone] });
        put(&layout, INDEX_TYPE, &list, Some(&referrers_tag(&subject.digest))).unwrap();
        edit_index(&layout, |entries| drop(entries.remove(0)));
        assert_eq!(layout.referrers(&subject.digest).unwrap(), [artifact]);
        assert_eq!(layout.referrers(&gone.digest).unwrap(), []);
    }

    #[test]
    fn foreign_directories_are_left_alone() {
        let (_dir, layout) = layout();
        fs::create_dir_all(&layout.dir).unwrap();
        fs::write(layout.dir.join("precious"), "x").unwrap();
        let bytes = BlobSource::Bytes(Bytes::from("x"));
        let error = layout.put(&bytes, &Digest::of(b"x")).unwrap_err().to_string();
        assert!(error.contains("neither empty nor an OCI layout"), "{error}");
        assert_eq!(fs::read_dir(&layout.dir).unwrap().count(), 1);
        for (marker, ok) in
            [("", true), (r#"{"imageLayoutVersion":"2.0"}"#, false), ("{}", false), ("nonsense", false)]
        {
            fs::write(layout.dir.join(MARKER), marker).unwrap();
            let written = put(&layout, MANIFEST_TYPE, &manifest(marker, json!({})), None);
            assert_eq!(written.is_ok(), ok, "{marker}");
            assert_eq!(layout.entries().is_ok(), ok, "{marker}");
        }
    }

    #[test]
    fn wrong_content_never_gets_a_name() {
        let (_dir, layout) = layout();
        let digest = Digest::of(b"right");
        for source in [BlobSource::Bytes(Bytes::from("wrong")), BlobSource::File("/nonexistent".into())] {
            assert!(layout.put(&source, &digest).is_err());
        }
        assert_eq!(layout.size(&digest).unwrap(), None);
        assert!(layout.read(&digest, 100).unwrap_err().is_not_found());
        layout.put(&BlobSource::Bytes(Bytes::from("right")), &digest).unwrap();
        assert_eq!(layout.read(&digest, 100).unwrap(), "right");
        assert!(matches!(layout.read(&digest, 4), Err(OciError::TooLarge { .. })));
        fs::write(layout.blob_path(&digest), "wrong").unwrap();
        assert!(matches!(layout.read(&digest, 100), Err(OciError::Digest { .. })));
        // A truncated blob is written again.
        fs::write(layout.blob_path(&digest), "rig").unwrap();
        layout.put(&BlobSource::Bytes(Bytes::from("right")), &digest).unwrap();
        assert_eq!(layout.read(&digest, 100).unwrap(), "right");
    }

    #[test]
    fn leftovers_of_dead_writers_are_removed() {
        let (_dir, layout) = layout();
        let mut alive = layout.writer().unwrap();
        fs::write(layout.dir.join(".tdfs-dead"), "half").unwrap();
        put(&layout, MANIFEST_TYPE, &manifest("a", json!({})), None).unwrap();
        assert!(!layout.dir.join(".tdfs-dead").exists());
        alive.write(b"content").unwrap();
        alive.commit(&Digest::of(b"content")).unwrap();
        assert_eq!(layout.read(&Digest::of(b"content"), 100).unwrap(), "content");
    }

    #[test]
    fn hostile_layouts_are_errors() {
        let (_dir, layout) = layout();
        let image = put(&layout, MANIFEST_TYPE, &manifest("a", json!({})), Some("v1")).unwrap();
        let index = layout.dir.join(INDEX);
        let good = fs::read(&index).unwrap();
        for text in [
            "",
            "null",
            "[]",
            "7",
            r#"{"schemaVersion":2,"manifests":{}}"#,
            &"[".repeat(100_000),
            &" ".repeat(5 << 20),
        ] {
            fs::write(&index, text).unwrap();
            let shown = &text[..text.len().min(50)];
            assert!(find(&layout, None).is_err(), "{shown}");
            assert!(put(&layout, MANIFEST_TYPE, &manifest("b", json!({})), None).is_err(), "{shown}");
        }
        fs::write(&index, good).unwrap();
        // A FIFO that nobody writes to, and a link to itself.
        let blob = layout.blob_path(&image.digest);
        fs::remove_file(&blob).unwrap();
        nix::unistd::mkfifo(&blob, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(layout.read(&image.digest, 100).is_err() && layout.open(&image.digest).is_err());
        fs::remove_file(&blob).unwrap();
        std::os::unix::fs::symlink(&blob, &blob).unwrap();
        assert!(layout.read(&image.digest, 100).is_err() && layout.size(&image.digest).is_err());
    }

    #[test]
    fn concurrent_writers_lose_nothing() {
        let (_dir, layout) = layout();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let layout = Layout::new(&layout.dir);
                scope.spawn(move || {
                    for n in 0..8 {
                        let name = format!("{thread}-{n}");
                        put(&layout, MANIFEST_TYPE, &manifest(&name, json!({})), Some(&name)).unwrap();
                    }
                });
            }
        });
        let tags: BTreeMap<_, _> = layout
            .entries()
            .unwrap()
            .into_iter()
            .map(|d| (d.annotations[REF_NAME].clone(), d.digest))
            .collect();
        assert_eq!(tags.len(), 64);
        assert!(tags.values().all(|digest| layout.read(digest, 10_000).is_ok()));
        assert_eq!(fs::read_dir(&layout.dir).unwrap().count(), 3);
    }
}
