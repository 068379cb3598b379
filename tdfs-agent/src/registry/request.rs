//! What clients send, parsed. Pure functions over untrusted text: an error or a value, never a panic.
//!
//! ```text
//! /v2/                                   /v2/<name>/tags/list
//! /v2/<name>/manifests/<tag or digest>   /v2/<name>/referrers/<digest>
//! /v2/<name>/blobs/<digest>              /v2/<name>/blobs/uploads/[<upload>]
//!
//! repository:<name>:<action>[,<action>...]                                         what a token is good for
//! ```
//!
//! A name that passed is made of `[a-z0-9._/-]` with no component that begins with a dot or an underscore, so it can
//! be a part of a key in any storage.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use tdfs_common::digest::Digest;

use crate::oci::{is_repository, is_tag};

/// Bytes of a path, before it is decoded: a name, a tag and what is between.
const PATH_MAX: usize = 1024;
/// Bytes of an `Authorization` header.
const AUTHORIZATION_MAX: usize = 4096;

/// The name of a repository.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// The name of an upload session: 32 lower-case hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UploadId(String);

/// The tag or digest at the end of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ManifestName {
    /// A tag.
    Tag(String),
    /// A digest.
    Digest(Digest),
}

/// What a client may do to a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Read.
    Pull,
    /// Add blobs, manifests and tags.
    Push,
    /// Delete them.
    Delete,
}

/// Things to be done to one repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The repository.
    pub name: Name,
    /// What is done to it.
    pub actions: BTreeSet<Action>,
}

/// What a path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Whether this is a registry.
    Base,
    /// The tags of a repository.
    Tags(Name),
    /// What refers to a manifest.
    Referrers(Name, Digest),
    /// A manifest.
    Manifest(Name, ManifestName),
    /// A blob.
    Blob(Name, Digest),
    /// Where uploads begin.
    Uploads(Name),
    /// An upload session.
    Upload(Name, UploadId),
}

/// The text is none of what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// No path of the API.
    #[error("no such address")]
    Path,
    /// Not the name of a repository.
    #[error("a repository is lower-case letters, digits and separators in between, 255 bytes at most")]
    Name,
    /// Neither a tag nor a digest.
    #[error("a tag is up to 128 letters, digits, dots, dashes and underscores")]
    Tag,
    /// Not a digest that this registry knows.
    #[error("a digest is sha256:<64 lower-case hex digits>, no other algorithm is supported")]
    Digest,
    /// Not a session of this registry.
    #[error("no such upload")]
    Upload,
}

impl Name {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        if is_repository(text) { Ok(Self(text.to_owned())) } else { Err(ParseError::Name) }
    }
}

impl UploadId {
    /// The id that these random bytes make.
    pub fn new(random: [u8; 16]) -> Self {
        Self(format!("{:032x}", u128::from_be_bytes(random)))
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for UploadId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() == 32 && text.bytes().all(is_hex) {
            return Ok(Self(text.to_owned()));
        }
        Err(ParseError::Upload)
    }
}

impl FromStr for ManifestName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.contains(':') {
            return digest(text).map(Self::Digest);
        }
        if is_tag(text) { Ok(Self::Tag(text.to_owned())) } else { Err(ParseError::Tag) }
    }
}

impl fmt::Display for ManifestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

impl Action {
    const ALL: [Self; 3] = [Self::Pull, Self::Push, Self::Delete];

    fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "push",
            Self::Delete => "delete",
        }
    }
}

impl Scope {
    /// Some actions on a repository.
    pub fn new(name: Name, actions: impl IntoIterator<Item = Action>) -> Self {
        Self { name, actions: actions.into_iter().collect() }
    }

    /// A scope of a request for a token. `None` for one of something else; actions that are not known are left out,
    /// and `*` is all of them.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, actions) = text.strip_prefix("repository:")?.rsplit_once(':')?;
        let wanted: Vec<&str> = actions.split(',').collect();
        let is_wanted = |action: &Action| wanted.contains(&"*") || wanted.contains(&action.as_str());
        let actions = Action::ALL.into_iter().filter(is_wanted);
        Some(Self::new(name.parse().ok()?, actions))
    }

    /// What a request with this method to this path needs, if the path is one.
    pub fn needed(method: &str, path: &str, mount_from: Option<Name>) -> Vec<Self> {
        if let Some(name) = path.strip_prefix("/tdfs/v1/").and_then(|rest| rest.strip_suffix("/pages")) {
            return name.parse().ok().map(|name| Self::new(name, [Action::Pull])).into_iter().collect();
        }
        let reads = matches!(method, "GET" | "HEAD");
        let mut from = None;
        let (name, action) = match Route::parse(path) {
            Ok(Route::Tags(name) | Route::Referrers(name, _)) => (name, Action::Pull),
            Ok(Route::Manifest(name, _) | Route::Blob(name, _)) if reads => (name, Action::Pull),
            Ok(Route::Manifest(name, _) | Route::Blob(name, _)) if method == "DELETE" => {
                (name, Action::Delete)
            }
            Ok(Route::Manifest(name, _) | Route::Blob(name, _) | Route::Upload(name, _)) => {
                (name, Action::Push)
            }
            Ok(Route::Uploads(name)) => {
                from = mount_from.map(|name| Self::new(name, [Action::Pull]));
                (name, Action::Push)
            }
            Ok(Route::Base) | Err(_) => return Vec::new(),
        };
        std::iter::once(Self::new(name, [action])).chain(from).collect()
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let actions: Vec<&str> = self.actions.iter().map(|a| a.as_str()).collect();
        write!(f, "repository:{}:{}", self.name, actions.join(","))
    }
}

/// A digest of the only algorithm there is here.
pub fn digest(text: &str) -> Result<Digest, ParseError> {
    text.parse().map_err(|_| ParseError::Digest)
}

impl Route {
    /// Parses the path of a request, as it came.
    pub fn parse(path: &str) -> Result<Self, ParseError> {
        if path.len() > PATH_MAX {
            return Err(ParseError::Path);
        }
        // Some clients write the colon of a digest as %3A. What is decoded must still be a name, so nothing hides.
        let path = percent_decode(path).ok_or(ParseError::Path)?;
        let rest = path.strip_prefix("/v2").ok_or(ParseError::Path)?;
        if matches!(rest, "" | "/") {
            return Ok(Self::Base);
        }
        let rest = rest.strip_prefix('/').ok_or(ParseError::Path)?;
        let parts: Vec<&str> = rest.split('/').collect();
        let name = |parts: &[&str]| parts.join("/").parse();
        match &parts[..] {
            [n @ .., "tags", "list"] => Ok(Self::Tags(name(n)?)),
            [n @ .., "blobs", "uploads"] | [n @ .., "blobs", "uploads", ""] => Ok(Self::Uploads(name(n)?)),
            [n @ .., "blobs", "uploads", id] => Ok(Self::Upload(name(n)?, id.parse()?)),
            [n @ .., "blobs", d] => Ok(Self::Blob(name(n)?, digest(d)?)),
            [n @ .., "manifests", m] => Ok(Self::Manifest(name(n)?, m.parse()?)),
            [n @ .., "referrers", d] => Ok(Self::Referrers(name(n)?, digest(d)?)),
            _ => Err(ParseError::Path),
        }
    }
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// What of a representation a `Range` header asks for (RFC 9110, section 14).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All of it: no header, or one that may be ignored (another unit, several ranges, not the grammar).
    Whole,
    /// These bytes; never empty, never beyond the end.
    Part(Range<u64>),
    /// Bytes that it does not have.
    Unsatisfiable,
}

impl Wanted {
    /// What `header` asks for of `size` bytes.
    pub fn parse(header: Option<&str>, size: u64) -> Self {
        let parsed =
            header.and_then(|h| h.trim().strip_prefix("bytes=")).and_then(|r| r.trim().split_once('-'));
        let Some((first, last)) = parsed else { return Self::Whole };
        let number = |text: &str| -> Option<u64> {
            // Digits only: `u64::from_str` also takes a plus sign. What is too large lies behind any end.
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse().unwrap_or(u64::MAX))
        };
        let range = match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(size),
            (Some(first), None) if last.is_empty() => first..size,
            (None, Some(suffix)) if first.is_empty() => size.saturating_sub(suffix)..size,
            _ => return Self::Whole,
        };
        if range.is_empty() { Self::Unsatisfiable } else { Self::Part(range) }
    }
}

/// `FIRST-LAST`, the place of a piece in an upload (distribution specification, "Pushing a blob in chunks").
pub fn content_range(header: &str) -> Option<Range<u64>> {
    let (first, last) = header.trim().split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(first) || !digits(last) {
        return None;
    }
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some(first..last.checked_add(1)?)
}

/// User and password of an `Authorization` header (RFC 7617).
pub fn basic_credentials(header: &str) -> Option<(String, String)> {
    if header.len() > AUTHORIZATION_MAX {
        return None;
    }
    let (scheme, token) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(STANDARD.decode(token.trim()).ok()?).ok()?;
    let (user, password) = text.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn scopes() {
        let parsed = |text: &str| Scope::parse(text).map(|s| s.to_string());
        for (text, scope) in [
            ("repository:a/b:push,pull", Some("repository:a/b:pull,push")),
            ("repository:a:*", Some("repository:a:pull,push,delete")),
            ("repository:a:fly,pull", Some("repository:a:pull")),
            ("repository:a:", Some("repository:a:")),
            ("repository:a", None),
            ("repository:../a:pull", None),
            ("registry:catalog:*", None),
            ("", None),
        ] {
            assert_eq!(parsed(text).as_deref(), scope, "{text}");
        }
        let upload = "/v2/a/blobs/uploads/00112233445566778899aabbccddeeff";
        let (blob, manifest) = (format!("/v2/a/blobs/{D}"), "/v2/a/manifests/t");
        for (method, path, needed) in [
            ("GET", "/v2/", ""),
            ("GET", "/nowhere", ""),
            ("GET", "/v2/a/tags/list", "repository:a:pull"),
            ("GET", &format!("/v2/a/referrers/{D}"), "repository:a:pull"),
            ("HEAD", &blob, "repository:a:pull"),
            ("DELETE", &blob, "repository:a:delete"),
            ("GET", manifest, "repository:a:pull"),
            ("PUT", manifest, "repository:a:push"),
            ("DELETE", manifest, "repository:a:delete"),
            ("POST", "/v2/a/blobs/uploads/", "repository:a:push repository:c:pull"),
            ("GET", upload, "repository:a:push"),
            ("DELETE", upload, "repository:a:push"),
            ("POST", "/tdfs/v1/a/b/pages", "repository:a/b:pull"),
        ] {
            let scopes = Scope::needed(method, path, "c".parse().ok());
            let scopes: Vec<String> = scopes.iter().map(Scope::to_string).collect();
            assert_eq!(scopes.join(" "), needed, "{method} {path}");
        }
    }

    #[test]
    fn paths() {
        let name = |n: &str| n.parse::<Name>().unwrap();
        let d: Digest = D.parse().unwrap();
        for (path, route) in [
            ("/v2", Route::Base),
            ("/v2/", Route::Base),
            ("/v2/a/tags/list", Route::Tags(name("a"))),
            ("/v2/a/b/manifests/v1.0", Route::Manifest(name("a/b"), ManifestName::Tag("v1.0".into()))),
            (&format!("/v2/a/manifests/{D}"), Route::Manifest(name("a"), ManifestName::Digest(d))),
            (&format!("/v2/a/blobs/{}", D.replace(':', "%3A")), Route::Blob(name("a"), d)),
            (&format!("/v2/a/referrers/{D}"), Route::Referrers(name("a"), d)),
            ("/v2/a/blobs/uploads/", Route::Uploads(name("a"))),
            ("/v2/a/blobs/uploads", Route::Uploads(name("a"))),
            // The last words decide: a repository may be called after the API.
            ("/v2/blobs/uploads/tags/list", Route::Tags(name("blobs/uploads"))),
            (
                "/v2/a/blobs/uploads/00112233445566778899aabbccddeeff",
                Route::Upload(name("a"), "00112233445566778899aabbccddeeff".parse().unwrap()),
            ),
        ] {
            assert_eq!(Route::parse(path), Ok(route), "{path}");
        }
    }

    #[test]
    fn hostile_paths() {
        let long = format!("/v2/{}/tags/list", "a/".repeat(400));
        let longer_name = format!("/v2/{}/tags/list", "a".repeat(256));
        for (path, error) in [
            ("/", ParseError::Path),
            ("/v3/", ParseError::Path),
            ("/v2a", ParseError::Path),
            ("/v2/a", ParseError::Path),
            ("/v2/%", ParseError::Path),
            ("/v2/%ff/tags/list", ParseError::Path),
            (&long, ParseError::Name),
            (&longer_name, ParseError::Name),
            ("/v2//tags/list", ParseError::Name),
            ("/v2/tags/list", ParseError::Name),
            ("/v2/../tags/list", ParseError::Name),
            ("/v2/%2e%2e/tags/list", ParseError::Name),
            ("/v2/a%2f..%2fb/tags/list", ParseError::Name),
            ("/v2/A/tags/list", ParseError::Name),
            ("/v2/_blobs/tags/list", ParseError::Name),
            ("/v2/a%00/tags/list", ParseError::Name),
            ("/v2/a/manifests/..", ParseError::Tag),
            ("/v2/a/manifests/", ParseError::Tag),
            ("/v2/a/manifests/sha256:00", ParseError::Digest),
            ("/v2/a/blobs/sha512:00", ParseError::Digest),
            ("/v2/a/blobs/uploads/../../x", ParseError::Path),
            ("/v2/a/blobs/uploads/0", ParseError::Upload),
        ] {
            assert_eq!(Route::parse(path), Err(error), "{path}");
        }
    }

    #[test]
    fn ranges() {
        for (header, wanted) in [
            (None, Wanted::Whole),
            (Some("bytes=0-0"), Wanted::Part(0..1)),
            (Some("bytes=2-"), Wanted::Part(2..10)),
            (Some("bytes=-3"), Wanted::Part(7..10)),
            (Some("bytes=-30"), Wanted::Part(0..10)),
            (Some("bytes=5-99999999999999999999999"), Wanted::Part(5..10)),
            (Some("bytes=10-"), Wanted::Unsatisfiable),
            (Some("bytes=99999999999999999999999-"), Wanted::Unsatisfiable),
            (Some("bytes=-0"), Wanted::Unsatisfiable),
            (Some("bytes=0-1,3-4"), Wanted::Whole),
            (Some("bytes=3-2"), Wanted::Whole),
            (Some("bytes=+1-2"), Wanted::Whole),
            (Some("bytes=-"), Wanted::Whole),
            (Some("lines=1-2"), Wanted::Whole),
        ] {
            assert_eq!(Wanted::parse(header, 10), wanted, "{header:?}");
        }
        assert_eq!(Wanted::parse(Some("bytes=0-"), 0), Wanted::Unsatisfiable);
        assert_eq!(content_range("0-9"), Some(0..10));
        for bad in ["", "-", "1", "2-1", "+1-2", "bytes 0-9/10", "0-18446744073709551615"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn credentials() {
        let header = format!("basic {}", STANDARD.encode("me:a:b"));
        assert_eq!(basic_credentials(&header), Some(("me".into(), "a:b".into())));
        for bad in ["", "Basic", "Basic !", "Bearer bTp4", "Basic bWU="] {
            assert_eq!(basic_credentials(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_passed_can_be_a_key(path in r"/v2/[a-z0-9._%/:A-Z-]{0,60}/(tags/list|manifests/[a-z._:]{1,9})") {
            if let Ok(Route::Tags(name) | Route::Manifest(name, _)) = Route::parse(&path) {
                for part in name.as_str().split('/') {
                    prop_assert!(part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b)));
                    prop_assert!(part.starts_with(|c: char| c.is_ascii_alphanumeric()));
                }
            }
        }

        #[test]
        fn a_part_lies_within(header in "bytes=[0-9]{0,20}-[0-9]{0,20}", size: u64) {
            if let Wanted::Part(range) = Wanted::parse(Some(&header), size) {
                prop_assert!(range.start < range.end && range.end <= size);
            }
        }
    }
}
