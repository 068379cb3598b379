//! Image references.
//!
//! ```text
//! nginx                              docker.io/library/nginx:latest
//! host:5000/team/app:1.2             a host has a dot, a colon or an upper-case letter, or is localhost
//! host/app@sha256:<64 hex>           by digest; a tag beside it is kept for people, the digest decides
//! oci:DIR  oci:DIR:tag  oci:DIR@sha256:<64 hex>     an OCI layout; DIR ends at the first colon
//! ```

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use tdfs_common::digest::Digest;

use super::OciError;

const DOCKER_IO: &str = "docker.io";
/// Of a registry reference without tag and digest.
const DEFAULT_TAG: &str = "latest";
/// Bytes of host and repository together, and of a name in a layout (distribution reference grammar).
const NAME_MAX: usize = 255;
/// Bytes of a tag (distribution specification, "Pulling manifests").
const TAG_MAX: usize = 128;

/// Names an image, or a repository or layout by way of an image in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    location: Location,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Where an image lies.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Location {
    /// A repository of a registry.
    Registry {
        /// `host` or `host:port`; `docker.io` for Docker Hub.
        host: String,
        /// Path of the repository.
        repository: String,
    },
    /// A directory with an OCI image layout.
    Layout(PathBuf),
}

impl Reference {
    /// The registry repository or the layout directory.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The tag; of a layout any `org.opencontainers.image.ref.name`. `None` only beside a digest or for a layout.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The manifest digest, which decides when there is a tag as well.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same place, this tag.
    pub fn with_tag(&self, tag: &str) -> Result<Self, OciError> {
        let valid = match self.location {
            Location::Registry { .. } => is_tag(tag),
            Location::Layout(_) => is_layout_name(tag),
        };
        if !valid {
            return Err(error(tag, "bad tag"));
        }
        Ok(Self { location: self.location.clone(), tag: Some(tag.to_owned()), digest: None })
    }

    /// The same place, this digest.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { location: self.location.clone(), tag: None, digest: Some(digest) }
    }

    /// The same, whatever becomes the current directory.
    pub fn absolute(mut self) -> std::io::Result<Self> {
        if let Location::Layout(dir) = &mut self.location {
            *dir = std::path::absolute(&*dir)?;
        }
        Ok(self)
    }

    /// The layout in `dir`, whatever the path holds.
    pub fn layout(dir: impl Into<PathBuf>) -> Self {
        Self { location: Location::Layout(dir.into()), tag: None, digest: None }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry { host, repository } => write!(f, "{host}/{repository}"),
            Self::Layout(dir) => write!(f, "oci:{}", dir.display()),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.location.fmt(f)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = OciError;

    fn from_str(text: &str) -> Result<Self, OciError> {
        let bad = |reason| error(text, reason);
        if text.contains(|c: char| c.is_control()) {
            return Err(bad("control character"));
        }
        let (name, digest) = match text.rsplit_once('@') {
            // A path may hold an '@'; only a digest ends a layout reference.
            Some((name, digest)) if !text.starts_with("oci:") || digest.starts_with("sha256:") => {
                let digest =
                    digest.parse().map_err(|_| bad("the digest is not sha256:<64 lower-case hex digits>"))?;
                (name, Some(digest))
            }
            _ => (text, None),
        };
        if let Some(path) = name.strip_prefix("oci:") {
            return parse_layout(path, digest).map_err(bad);
        }
        parse_registry(name, digest).map_err(bad)
    }
}

fn error(text: &str, reason: &'static str) -> OciError {
    OciError::Reference { text: text.chars().take(100).collect(), reason }
}

fn parse_layout(path: &str, digest: Option<Digest>) -> Result<Reference, &'static str> {
    let (dir, tag) = match path.split_once(':') {
        Some((dir, tag)) => (dir, Some(tag)),
        None => (path, None),
    };
    if dir.is_empty() {
        return Err("no directory");
    }
    if tag.is_some_and(|tag| !is_layout_name(tag)) {
        return Err("bad tag");
    }
    Ok(Reference { location: Location::Layout(dir.into()), tag: tag.map(str::to_owned), digest })
}

fn parse_registry(name: &str, digest: Option<Digest>) -> Result<Reference, &'static str> {
    if name.is_empty() {
        return Err("no name");
    }
    if name.contains("://") {
        return Err("write it without a scheme, as host/repository:tag");
    }
    let (host, rest) = match name.split_once('/') {
        Some((first, rest)) if names_host(first) => (first, rest),
        _ => (DOCKER_IO, name),
    };
    if !is_host(host) {
        return Err("bad registry host");
    }
    let (repository, tag) = match rest.split_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err("bad tag");
    }
    if repository.is_empty() {
        return Err("no repository");
    }
    if !is_repository(repository) {
        return Err("a repository is lower-case letters, digits and separators in between");
    }
    if repository.len() == 64 && repository.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("64 hex digits are an identifier, not a name");
    }
    let hub = matches!(host, DOCKER_IO | "index.docker.io");
    let host = if hub { DOCKER_IO } else { host }.to_owned();
    let repository = if hub && !repository.contains('/') {
        format!("library/{repository}")
    } else {
        repository.to_owned()
    };
    if host.len() + 1 + repository.len() > NAME_MAX {
        return Err("name longer than 255 bytes");
    }
    let tag = match (tag, digest) {
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(Reference { location: Location::Registry { host, repository }, tag, digest })
}

/// Whether the part before the first slash can only be a host.
fn names_host(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':', '[']) || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        // The colons inside the brackets of an IPv6 address are no port.
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (host, None),
    };
    if port
        .is_some_and(|p| p.is_empty() || !p.bytes().all(|b| b.is_ascii_digit()) || p.parse::<u16>().is_err())
    {
        return false;
    }
    if let Some(address) = name.strip_prefix('[') {
        return address.strip_suffix(']').is_some_and(|a| a.parse::<std::net::Ipv6Addr>().is_ok());
    }
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    name.split('.').all(label)
}

/// Components with slashes between them, 255 bytes at most.
pub(crate) fn is_repository(text: &str) -> bool {
    text.len() <= NAME_MAX && text.split('/').all(is_component)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends =
        bytes.first().is_some_and(|&b| alphanumeric(b)) && bytes.last().is_some_and(|&b| alphanumeric(b));
    ends && text
        .split(|c: char| c.is_ascii() && alphanumeric(c as u8))
        .all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

/// `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`
pub(crate) fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= TAG_MAX
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// Names in a layout are freer than tags: `org.opencontainers.image.ref.name` may be a whole reference.
pub(super) fn is_layout_name(text: &str) -> bool {
    text.len() <= NAME_MAX
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:@+/".contains(&b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_completed_as_docker_does() {
        let digest = format!("@sha256:{HEX}");
        for (text, full) in [
            ("nginx", "docker.io/library/nginx:latest".to_owned()),
            ("nginx:1.25", "docker.io/library/nginx:1.25".to_owned()),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest".to_owned()),
            ("team/app", "docker.io/team/app:latest".to_owned()),
            ("localhost/app", "localhost/app:latest".to_owned()),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c".to_owned()),
            ("[::1]:5000/a", "[::1]:5000/a:latest".to_owned()),
            ("[::1]/a", "[::1]/a:latest".to_owned()),
            ("Host/a", "Host/a:latest".to_owned()),
            ("ghcr.io/a/b__c/d--e.f", "ghcr.io/a/b__c/d--e.f:latest".to_owned()),
            (&format!("a/b{digest}"), format!("docker.io/a/b{digest}")),
            (&format!("r.io/b:1{digest}"), format!("r.io/b:1{digest}")),
            ("oci:dir", "oci:dir".to_owned()),
            ("oci:/a b/c:v1", "oci:/a b/c:v1".to_owned()),
            ("oci:x@y", "oci:x@y".to_owned()),
            ("oci:d:docker.io/library/nginx:1", "oci:d:docker.io/library/nginx:1".to_owned()),
            (&format!("oci:dir{digest}"), format!("oci:dir{digest}")),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), full, "{text}");
        }
    }

    #[test]
    fn digest_comes_without_a_default_tag() {
        let r: Reference = format!("r.io/app@sha256:{HEX}").parse().unwrap();
        assert_eq!((r.tag(), r.digest().unwrap().hex()), (None, HEX.to_owned()));
        assert_eq!(r.with_tag("x").unwrap().to_string(), "r.io/app:x");
        assert!(r.with_tag("a/b").is_err());
    }

    #[test]
    fn other_spellings_are_refused() {
        let (long, tag) = ("a".repeat(251), "t".repeat(129));
        for text in [
            "",
            "/",
            ":",
            "@",
            "a:",
            ":a",
            "a@",
            "A",
            "a//b",
            "/a",
            "a/",
            "a b",
            "a\n",
            "a/../b",
            "..",
            "a_-b",
            "a___b",
            "-a",
            "a-",
            "r.io/",
            "r.io:/a",
            "r.io:99999/a",
            "r.io:5x/a",
            "[::1/a",
            "[x]:1/a",
            "-r.io/a",
            "r..io/a",
            "https://r.io/a",
            "docker://a",
            "a:b:c",
            "a@sha256:00",
            "a@sha512:00",
            HEX,
            "oci:",
            "oci::tag",
            "oci:d:",
            "oci:d:t g",
            "oci:d@sha256:zz",
            &format!("r.io/{long}"),
            &format!("a:{tag}"),
            &format!("a@sha256:{}", HEX.to_uppercase()),
            "r.io/a:.b",
            "r.io/\u{e4}",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_to_itself(
            host in "([a-z][a-z0-9]{0,5}\\.){1,2}[a-z]{2}(:[1-9][0-9]{0,3})?",
            repository in "[a-z0-9]{1,8}([._/-][a-z0-9]{1,8}){0,3}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9._-]{0,20}"),
            content in proptest::option::of(any::<u8>()),
        ) {
            let mut text = format!("{host}/{repository}");
            if let Some(tag) = &tag { text.extend([":", tag]); }
            if let Some(content) = content { text.extend(["@", &Digest::of(&[content]).to_string()]); }
            let parsed: Reference = text.parse().unwrap();
            prop_assert_eq!(parsed.location(), &Location::Registry { host, repository });
            prop_assert_eq!(parsed.digest().copied(), content.map(|c| Digest::of(&[c])));
            let default = if content.is_none() { Some("latest") } else { None };
            prop_assert_eq!(parsed.tag(), tag.as_deref().or(default));
            prop_assert_eq!(parsed.to_string().parse::<Reference>().unwrap(), parsed);
        }

        #[test]
        fn any_text_parses_or_fails(text in ".{0,300}") {
            if let Ok(parsed) = text.parse::<Reference>() {
                prop_assert_eq!(parsed.to_string().parse::<Reference>().unwrap(), parsed);
            }
        }

        #[test]
        fn hostile_pieces_never_reach_a_url(text in "[a-z./:@%?#\\[\\]-]{0,40}") {
            if let Ok(parsed) = text.parse::<Reference>()
                && let Location::Registry { host, repository } = parsed.location()
            {
                let url = url::Url::parse(&format!("https://{host}/v2/{repository}/tags")).unwrap();
                prop_assert_eq!(url.path(), format!("/v2/{repository}/tags"));
                prop_assert!(url.username().is_empty() && url.query().is_none() && url.fragment().is_none());
            }
        }
    }
}
