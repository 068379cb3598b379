//! Where everything lies in the storage.

use object_store::path::Path;
use tdfs_common::digest::Digest;

use super::request::{Name, UploadId};

/// Content of all repositories.
pub const BLOBS: &str = "blobs";
/// What repositories hold.
pub const REPOSITORIES: &str = "repositories";
/// Sessions.
pub const UPLOADS: &str = "uploads";
/// When pushes last relied on content.
pub const LEASES: &str = "leases";
/// Content that a collection is about to delete.
pub const CONDEMNED: &str = "condemned";

/// A blob's or manifest's bytes.
pub fn content(digest: &Digest) -> Path {
    let hex = digest.hex();
    Path::from_iter([BLOBS, "sha256", &hex[..2], &hex])
}

/// When a push last relied on content.
pub fn lease(digest: &Digest) -> Path {
    Path::from_iter([LEASES, &digest.hex()])
}

/// Not empty while content is being deleted: one object for each collection that does so.
pub fn condemned(digest: &Digest) -> Path {
    Path::from_iter([CONDEMNED, &digest.hex()])
}

/// An upload session.
pub fn upload(id: &UploadId) -> Path {
    Path::from_iter([UPLOADS, id.as_str()])
}

/// The repository of an upload session.
pub fn session(id: &UploadId) -> Path {
    upload(id).join("session")
}

/// The bytes of an upload session from `offset` on.
pub fn piece(id: &UploadId, offset: u64) -> Path {
    upload(id).join(format!("{offset:020}"))
}

/// All of a repository, and of those whose names begin with its own and a slash.
pub fn repository(name: &Name) -> Path {
    [REPOSITORIES].into_iter().chain(name.as_str().split('/')).collect()
}

/// All tags of a repository.
pub fn tags(name: &Name) -> Path {
    repository(name).join("_tags")
}

/// All that refers to `subject`.
pub fn referrers(name: &Name, subject: &Digest) -> Path {
    repository(name).join("_referrers").join(subject.hex())
}

/// One object of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The repository has this blob.
    Blob(Digest),
    /// The repository has this manifest.
    Manifest(Digest),
    /// A tag.
    Tag(String),
    /// The second refers to the first.
    Referrer(Digest, Digest),
}

impl Entry {
    /// The key of this entry of `name`.
    pub fn key(&self, name: &Name) -> Path {
        let repository = repository(name);
        match self {
            Self::Blob(digest) => repository.join("_blobs").join(digest.hex()),
            Self::Manifest(digest) => repository.join("_manifests").join(digest.hex()),
            Self::Tag(tag) => tags(name).join(tag.as_str()),
            Self::Referrer(subject, digest) => referrers(name, subject).join(digest.hex()),
        }
    }

    /// The repository and the entry of a key; `None` for what is not ours.
    pub fn parse(key: &Path) -> Option<(Name, Self)> {
        let (name, entry) = key.as_ref().strip_prefix(REPOSITORIES)?.strip_prefix('/')?.split_once("/_")?;
        let (kind, rest) = entry.split_once('/')?;
        let entry = match kind {
            "blobs" => Self::Blob(hex_digest(rest)?),
            "manifests" => Self::Manifest(hex_digest(rest)?),
            "tags" => Self::Tag(Some(rest).filter(|tag| crate::oci::is_tag(tag))?.to_owned()),
            "referrers" => {
                let (subject, digest) = rest.split_once('/')?;
                Self::Referrer(hex_digest(subject)?, hex_digest(digest)?)
            }
            _ => return None,
        };
        Some((name.parse().ok()?, entry))
    }
}

/// The digest at the end of a key.
pub fn digest_of(key: &Path) -> Option<Digest> {
    hex_digest(key.filename()?)
}

fn hex_digest(hex: &str) -> Option<Digest> {
    format!("sha256:{hex}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_round_trip() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let name: Name = "team/app_1.x".parse().unwrap();
        for entry in [Entry::Blob(a), Entry::Manifest(a), Entry::Tag("_V1.0-x".into()), Entry::Referrer(a, b)]
        {
            assert_eq!(Entry::parse(&entry.key(&name)), Some((name.clone(), entry)));
        }
        assert_eq!(digest_of(&content(&a)), Some(a));
        for other in ["repositories/a/_tags", "repositories/a/_x/y", "repositories/_tags/a", "blobs/sha256/x"]
        {
            assert_eq!(Entry::parse(&Path::from(other)), None, "{other}");
        }
    }
}
