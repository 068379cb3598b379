//! Platforms, and the choice of one manifest of an image index.
//!
//! Operating system and architecture must be equal. Among variants the highest that is not above the wanted one
//! wins, because they are supersets of each other; a missing variant means the architecture's baseline
//! (image index specification, "Platform Variants").

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::OciError;
use super::manifest::Descriptor;

/// What an image is built for, in Go's words (GOOS, GOARCH).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// Operating system, such as `linux`.
    pub os: String,
    /// CPU, such as `amd64`.
    pub architecture: String,
    /// CPU generation, such as `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// The platform this program was built for.
    pub fn host() -> Self {
        Self::new("linux", std::env::consts::ARCH, None)
    }

    fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let architecture = match architecture {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self { os: os.into(), architecture: architecture.into(), variant: variant.map(Into::into) }
    }

    /// The variant as a number that orders variants of one architecture: major and minor version.
    fn level(&self) -> Option<(u32, u32)> {
        let Some(variant) = self.variant.as_deref().filter(|v| !v.is_empty()) else {
            return Some(match self.architecture.as_str() {
                "arm64" => (8, 0),
                "arm" => (7, 0),
                _ => (1, 0),
            });
        };
        let (major, minor) = match variant.strip_prefix('v')?.split_once('.') {
            Some((major, minor)) => (major, minor),
            None => (&variant[1..], "0"),
        };
        Some((major.parse().ok()?, minor.parse().ok()?))
    }

    /// How well `other` runs here: `None` not at all, else higher is better.
    fn rank(&self, other: &Self) -> Option<(u32, u32)> {
        if self.os != other.os || self.architecture != other.architecture {
            return None;
        }
        if self.variant == other.variant {
            return Some((u32::MAX, 0));
        }
        let (wanted, offered) = (self.level()?, other.level()?);
        (offered <= wanted).then_some(offered)
    }

    /// The manifest for this platform out of an index; of equally good ones the first. Entries without a platform
    /// count only if there is exactly one image and nothing to choose.
    pub(crate) fn choose<'a>(
        &self,
        image: &str,
        entries: &'a [Descriptor],
    ) -> Result<&'a Descriptor, OciError> {
        let images: Vec<&Descriptor> = entries.iter().filter(|d| is_image(d)).collect();
        let ranked = images.iter().filter_map(|d| Some((self.rank(d.platform.as_ref()?)?, *d)));
        // `max_by_key` takes the last of equals; reversed, that is the first in the index.
        if let Some((_, best)) = ranked.rev().max_by_key(|(rank, _)| *rank) {
            return Ok(best);
        }
        match images[..] {
            [only] if only.platform.is_none() => Ok(only),
            _ => Err(OciError::Platform {
                image: image.to_owned(),
                wanted: self.to_string(),
                available: available(&images),
            }),
        }
    }
}

/// Not an artifact beside the images, such as a build attestation.
fn is_image(entry: &Descriptor) -> bool {
    entry.artifact_type.is_none() && entry.platform.as_ref().is_none_or(|p| p.os != "unknown")
}

fn available(images: &[&Descriptor]) -> String {
    const NAMED: usize = 12;
    if images.is_empty() {
        return "no image".into();
    }
    let name =
        |d: &&Descriptor| d.platform.as_ref().map_or_else(|| "any platform".into(), Platform::to_string);
    let mut names: Vec<String> = images.iter().take(NAMED).map(name).collect();
    if images.len() > NAMED {
        names.push(format!("and {} more", images.len() - NAMED));
    }
    names.join(", ")
}

impl Default for Platform {
    fn default() -> Self {
        Self::host()
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().filter(|v| !v.is_empty()).try_for_each(|v| write!(f, "/{v}"))
    }
}

impl FromStr for Platform {
    type Err = OciError;

    fn from_str(text: &str) -> Result<Self, OciError> {
        let bad = || OciError::ParsePlatform(text.chars().take(100).collect());
        let parts: Vec<&str> = text.split('/').collect();
        let word =
            |p: &&str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        match parts[..] {
            [os, architecture, ref variant @ ..] if variant.len() <= 1 && parts.iter().all(word) => {
                Ok(Self::new(os, architecture, variant.first().copied()))
            }
            _ => Err(bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tdfs_common::digest::Digest;

    use super::*;

    fn entry(platform: Option<&str>) -> Descriptor {
        let mut d = Descriptor::new("application/vnd.oci.image.manifest.v1+json", Digest::of(b""), 0);
        d.platform = platform.map(|p| p.parse().unwrap());
        d
    }

    fn chosen(wanted: &str, offered: &[Option<&str>]) -> Result<usize, String> {
        let entries: Vec<Descriptor> =
            offered.iter().enumerate().map(|(n, p)| Descriptor { size: n as u64, ..entry(*p) }).collect();
        let wanted: Platform = wanted.parse().unwrap();
        wanted.choose("x", &entries).map(|d| d.size as usize).map_err(|e| e.to_string())
    }

    #[test]
    fn best_variant_wins() {
        let arm = [Some("linux/arm/v5"), Some("linux/arm/v6"), Some("linux/arm/v7"), Some("linux/arm64/v8")];
        assert_eq!(chosen("linux/arm/v6", &arm), Ok(1));
        assert_eq!(chosen("linux/arm", &arm), Ok(2));
        assert_eq!(chosen("linux/arm/v8", &arm), Ok(2));
        assert_eq!(chosen("linux/aarch64", &arm), Ok(3));
        assert_eq!(chosen("linux/arm64/v9.2", &arm), Ok(3));
        let amd = [Some("linux/amd64/v3"), Some("linux/amd64"), Some("linux/amd64")];
        assert_eq!(chosen("linux/x86_64", &amd), Ok(1));
        assert_eq!(chosen("linux/amd64/v2", &amd), Ok(1));
        assert_eq!(chosen("linux/amd64/v4", &amd), Ok(0));
    }

    #[test]
    fn no_match_names_what_there_is() {
        let error =
            chosen("linux/s390x", &[Some("linux/amd64"), Some("windows/amd64"), Some("unknown/unknown")]);
        assert_eq!(error.unwrap_err(), "x has nothing for linux/s390x; it holds linux/amd64, windows/amd64");
        assert_eq!(
            chosen("linux/amd64", &[]).unwrap_err(),
            "x has nothing for linux/amd64; it holds no image"
        );
        assert!(chosen("linux/amd64", &[Some("linux/amd64/v2")]).is_err());
        assert!(chosen("linux/amd64", &[Some("linux/amd64/baseline")]).is_err());
    }

    #[test]
    fn entry_without_platform_counts_only_alone() {
        assert_eq!(chosen("linux/amd64", &[None]), Ok(0));
        assert_eq!(chosen("linux/amd64", &[Some("unknown/unknown"), None]), Ok(1));
        assert_eq!(chosen("linux/amd64", &[None, Some("linux/amd64")]), Ok(1));
        assert!(chosen("linux/amd64", &[None, None]).is_err());
    }

    #[test]
    fn artifacts_are_never_chosen() {
        let artifact = Descriptor { artifact_type: Some("a/b".into()), ..entry(Some("linux/amd64")) };
        let wanted: Platform = "linux/amd64".parse().unwrap();
        assert!(wanted.choose("x", &[artifact]).is_err());
    }

    #[test]
    fn text_round_trips() {
        for text in ["linux/amd64", "linux/arm/v7", "windows/amd64"] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), text);
        }
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/amd 64", "linux//v7"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
        assert!(
            Platform { os: "linux".into(), architecture: "arm".into(), variant: Some("\u{e4}7".into()) }
                .level()
                .is_none()
        );
    }
}
