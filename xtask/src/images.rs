//! Builds real container images from Debian packages, as OCI layouts.
//!
//! Goes in: a recipe (a chain of layers, each some packages and a shell hook) and the Debian mirror that this machine
//! uses itself. Comes out: `<cache>/<image>-<compression>/`, an OCI layout that holds one image, tag `latest`. The base
//! layer is unpacked by mmdebstrap; every other layer is the upper directory of an overlay in which apt ran. A layer is
//! packed as a tar with sorted names and clamped times, so the same packages give the same digest.
//!
//! ```text
//! <cache>/lock                    held while something is built
//!         debs/ lists/            what apt downloaded
//!         layers/<name>-<key>/    upper/ (unpacked), <compression> (blob), <compression>.json (digests, sizes)
//!         <image>-<compression>/  OCI layout, its blobs hard linked
//!         <image>-<compression>.key
//!         tmp/                    work in progress, emptied by the next build
//! ```
//!
//! The key of a layer is a hash of its recipe and of its parent's key; what exists under its final name is complete.
//! Newer packages on the mirror do not change the key: delete the cache to get them.
//! A killed build leaves no mounts: everything is mounted in a namespace that dies with it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::{command, install};

mod layer;
mod recipe;

pub use recipe::{IMAGES, Image, Service};
use recipe::{LAYERS, Layer, SOURCE_DATE_EPOCH};

/// How the layers of an image are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// One gzip stream.
    Gzip,
    /// One zstd frame.
    Zstd,
    /// Many zstd frames of 4 MiB and a seek table (zstd's `contrib/seekable_format`).
    ZstdSeekable,
}

impl Compression {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::ZstdSeekable => "zstd-seekable",
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd | Self::ZstdSeekable => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// The recipe of the image called `name`.
pub fn recipe(name: &str) -> Result<&'static Image> {
    IMAGES.iter().find(|image| image.name == name).with_context(|| {
        let names: Vec<_> = IMAGES.iter().map(|image| image.name).collect();
        format!("no image {name:?}: there are {}", names.join(", "))
    })
}

/// A directory of built images and layers.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Default for Cache {
    /// `TDFS_IMAGES`, else `target/tdfs-images` of this workspace.
    fn default() -> Self {
        let root = std::env::var_os("TDFS_IMAGES").map_or_else(|| "target/tdfs-images".into(), PathBuf::from);
        Self { root: command::workspace().join(root) }
    }
}

impl Cache {
    /// The OCI layout of `image`, built first if it is not there.
    pub fn image(&self, image: &Image, compression: Compression) -> Result<PathBuf> {
        let layers = chain(image.layer)?;
        let config = config(image)?;
        let key = key(&[&layers.last().context("an image has a layer")?.key, &config.to_string()]);
        let name = format!("{}-{}", image.name, compression.name());
        let (layout, stamp) = (self.root.join(&name), self.root.join(format!("{name}.key")));
        let is_built = || fs::read_to_string(&stamp).is_ok_and(|built| built == key);
        if is_built() {
            return Ok(layout);
        }
        let build = self.lock()?;
        if is_built() {
            return Ok(layout);
        }
        let mut blobs = Vec::new();
        for (i, layer) in layers.iter().enumerate() {
            build.unpack(layer, &layers[..i])?;
            blobs.push(build.pack(layer, compression)?);
        }
        let tmp = build.tmp.join(&name);
        write_layout(&tmp, config, &blobs, compression)?;
        // The stamp says that the layout is complete: it goes first and comes back last.
        let _ = fs::remove_file(&stamp);
        let _ = fs::remove_dir_all(&layout);
        fs::rename(&tmp, &layout).with_context(|| format!("rename to {}", layout.display()))?;
        write(&build.tmp.join("key"), key.as_bytes())?;
        fs::rename(build.tmp.join("key"), &stamp).with_context(|| stamp.display().to_string())?;
        Ok(layout)
    }

    /// The unpacked layers of `image`, the uppermost first: the `lowerdir` of an overlay mount.
    pub fn unpacked(&self, image: &Image) -> Result<Vec<PathBuf>> {
        let layers = chain(image.layer)?;
        let build = self.lock()?;
        for (i, layer) in layers.iter().enumerate() {
            build.unpack(layer, &layers[..i])?;
        }
        Ok(layers.iter().rev().map(|layer| build.directory(layer).join("upper")).collect())
    }

    fn lock(&self) -> Result<Build> {
        install::require_root("to build images")?;
        install::packages(install::IMAGE_PACKAGES)?;
        let tmp = self.root.join("tmp");
        for directory in ["layers", "debs/partial", "lists/partial"] {
            create_dir(&self.root.join(directory))?;
        }
        let path = self.root.join("lock");
        let lock = File::create(&path).with_context(|| path.display().to_string())?;
        lock.lock().with_context(|| format!("lock {}", path.display()))?;
        let _ = fs::remove_dir_all(&tmp);
        create_dir(&tmp)?;
        Ok(Build { root: self.root.clone(), tmp, _lock: lock })
    }
}

/// A link of an image's chain of layers, with the key that its recipe and its parents give it.
struct Link {
    layer: &'static Layer,
    key: String,
}

/// The layers of an image whose uppermost is `top`, the base first.
fn chain(top: &str) -> Result<Vec<Link>> {
    let layer = LAYERS.iter().find(|layer| layer.name == top).with_context(|| format!("no layer {top:?}"))?;
    let mut links = if layer.parent.is_empty() { Vec::new() } else { chain(layer.parent)? };
    let parent = links.last().map_or("", |link| &link.key);
    let key =
        key(&[parent, architecture()?, recipe::BASE, recipe::INSTALL, &layer.packages.join(" "), layer.hook]);
    links.push(Link { layer, key });
    Ok(links)
}

fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex::encode(hash.finalize())
}

/// The architecture of this machine, as OCI and Debian both call it.
fn architecture() -> Result<&'static str> {
    Ok(match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => bail!("no images for {other}"),
    })
}

/// A packed layer.
#[derive(Clone, Serialize, Deserialize)]
struct Blob {
    #[serde(skip)]
    path: PathBuf,
    digest: String,
    size: u64,
    diff_id: String,
}

/// The right to write into the cache.
struct Build {
    root: PathBuf,
    tmp: PathBuf,
    _lock: File,
}

impl Build {
    fn directory(&self, link: &Link) -> PathBuf {
        self.root.join("layers").join(format!("{}-{}", link.layer.name, &link.key[..16]))
    }

    fn unpack(&self, link: &Link, parents: &[Link]) -> Result<()> {
        let directory = self.directory(link);
        if directory.is_dir() {
            return Ok(());
        }
        eprintln!("building layer {}", link.layer.name);
        let tmp = self.tmp.join(link.layer.name);
        for sub in ["upper", "work", "merged"] {
            create_dir(&tmp.join(sub))?;
        }
        let apt_conf = self.tmp.join("apt.conf");
        write(&apt_conf, host_apt_settings()?.as_bytes())?;
        let lower: Vec<_> = parents.iter().rev().map(|parent| self.directory(parent).join("upper")).collect();
        let lower: Vec<_> = lower.iter().map(|path| path.to_string_lossy()).collect();
        // mmdebstrap leaves files behind when it is killed: where the next build removes them. The others run in the image.
        let (script, temporary) = match parents {
            [] => (recipe::BASE, tmp.as_path()),
            _ => (recipe::INSTALL, Path::new("/tmp")),
        };
        // The mounts live in a namespace of their own and everything dies with us: a killed build leaves no mounts.
        command::output(
            Command::new("setpriv")
                .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"])
                .args(["--pid", "--fork", "--kill-child", "/bin/sh", "-ec"])
                .arg(script)
                .env("PATH", recipe::PATH)
                .env("TMPDIR", temporary)
                .env("LC_ALL", "C.UTF-8")
                .env("DEBIAN_FRONTEND", "noninteractive")
                .env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH.to_string())
                .env("SUITE", recipe::SUITE)
                .env("MIRROR", mirror())
                .env("CACHE", &self.root)
                .env("LOWER", lower.join(":"))
                .env("APT_CONF", &apt_conf)
                .env("PACKAGES", link.layer.packages.join(" "))
                .env("HOOK", link.layer.hook)
                .current_dir(&tmp),
        )
        .with_context(|| format!("build layer {}", link.layer.name))?;
        let _ = fs::remove_dir_all(tmp.join("work"));
        let _ = fs::remove_dir(tmp.join("merged"));
        fs::rename(&tmp, &directory).with_context(|| format!("rename to {}", directory.display()))
    }

    fn pack(&self, link: &Link, compression: Compression) -> Result<Blob> {
        let directory = self.directory(link);
        let path = directory.join(compression.name());
        let about = directory.join(format!("{}.json", compression.name()));
        if let Ok(json) = fs::read(&about) {
            let blob: Blob = serde_json::from_slice(&json).with_context(|| about.display().to_string())?;
            return Ok(Blob { path, ..blob });
        }
        eprintln!("packing layer {} with {}", link.layer.name, compression.name());
        let tmp = self.tmp.join("blob");
        let out = File::create(&tmp).with_context(|| tmp.display().to_string())?;
        let diff_id = layer::pack(&directory.join("upper"), compression, out)?;
        let (digest, size) = digest_file(&tmp)?;
        fs::rename(&tmp, &path).with_context(|| format!("rename to {}", path.display()))?;
        let blob = Blob { path, digest, size, diff_id };
        write(&tmp, serde_json::to_string(&blob)?.as_bytes())?;
        fs::rename(&tmp, &about).with_context(|| format!("rename to {}", about.display()))?;
        Ok(blob)
    }
}

fn config(image: &Image) -> Result<serde_json::Value> {
    Ok(json!({
        "architecture": architecture()?,
        "os": "linux",
        "created": recipe::CREATED,
        "config": {
            "Env": [format!("PATH={}", recipe::PATH)],
            "Cmd": image.services[0].command,
            "WorkingDir": "/",
            "ExposedPorts": { format!("{}/tcp", image.services[0].port): {} },
        },
    }))
}

fn write_layout(
    layout: &Path,
    mut config: serde_json::Value,
    layers: &[Blob],
    compression: Compression,
) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    create_dir(&blobs)?;
    for layer in layers {
        fs::hard_link(&layer.path, blobs.join(hex_of(&layer.digest)))
            .with_context(|| format!("link {}", layer.path.display()))?;
    }
    let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.diff_id).collect();
    config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
    let mut config = put_json(&blobs, &config)?;
    config["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| json!({ "mediaType": compression.media_type(), "digest": layer.digest, "size": layer.size }))
        .collect();
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let mut manifest = put_json(
        &blobs,
        &json!({ "schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": layers }),
    )?;
    manifest["mediaType"] = json!(manifest_type);
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    write(&layout.join("index.json"), index.to_string().as_bytes())?;
    write(&layout.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)
}

/// Writes a blob and returns its descriptor, still without a media type.
fn put_json(blobs: &Path, value: &serde_json::Value) -> Result<serde_json::Value> {
    let bytes = value.to_string();
    let digest = hex::encode(Sha256::digest(&bytes));
    write(&blobs.join(&digest), bytes.as_bytes())?;
    Ok(json!({ "digest": format!("sha256:{digest}"), "size": bytes.len() }))
}

fn digest_file(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).with_context(|| path.display().to_string())?;
        if n == 0 {
            return Ok((digest_string(hash), size));
        }
        hash.update(&buffer[..n]);
        size += n as u64;
    }
}

fn digest_string(hash: Sha256) -> String {
    format!("sha256:{}", hex::encode(hash.finalize()))
}

fn hex_of(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}

/// The mirror of [`recipe::SUITE`] that this machine installs from, else Debian's own.
fn mirror() -> String {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let mut texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
    texts
        .find_map(|text| mirror_in(&text, recipe::SUITE))
        .unwrap_or_else(|| "http://deb.debian.org/debian".to_owned())
}

/// The first address that `sources` (sources.list(5), either format) gives for component `main` of `suite`.
fn mirror_in(sources: &str, suite: &str) -> Option<String> {
    let has = |words: &str, word: &str| words.split_whitespace().any(|other| other == word);
    for line in sources.lines() {
        // One-line format: deb [options] address suite component…
        let Some(rest) = line.trim().strip_prefix("deb ") else { continue };
        let rest = rest.trim_start();
        let rest = if rest.starts_with('[') { rest.split_once(']')?.1 } else { rest };
        let mut words = rest.split_whitespace();
        if let (Some(address), Some(of)) = (words.next(), words.next())
            && of == suite
            && words.any(|component| component == "main")
        {
            return Some(address.to_owned());
        }
    }
    for stanza in sources.split("\n\n") {
        let field = |name: &str| {
            stanza.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let (Some(types), Some(addresses), Some(suites), Some(components)) =
            (field("Types"), field("URIs"), field("Suites"), field("Components"))
        else {
            continue;
        };
        if has(types, "deb")
            && has(suites, suite)
            && has(components, "main")
            && field("Enabled") != Some("no")
        {
            return addresses.split_whitespace().next().map(str::to_owned);
        }
    }
    None
}

/// This machine's apt settings that decide how the mirror is reached and trusted, for apt inside the image.
fn host_apt_settings() -> Result<String> {
    let settings = command::output(Command::new("apt-config").arg("dump"))?;
    let matters = |line: &&str| {
        let name = line.split_whitespace().next().unwrap_or_default();
        name.starts_with("Acquire::")
            && (name.contains("::Proxy") && !name.contains("Auto")
                || name.contains("::Check-")
                || name.ends_with("::Retries"))
    };
    Ok(settings
        .lines()
        .filter(matters)
        .flat_map(|line| {
            [
                line, "
",
            ]
        })
        .collect())
}

fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| path.display().to_string())
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

/// Passes bytes on and hashes them.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_mirror_in_both_formats() {
        let line = "# comment\ndeb-src http://src/ bookworm main\n\
                    deb [arch=amd64 signed-by=/k] http://one/debian bookworm main contrib\n";
        assert_eq!(mirror_in(line, "bookworm").as_deref(), Some("http://one/debian"));
        assert_eq!(mirror_in(line, "trixie"), None);
        let stanzas = "Types: deb\nURIs: https://other\nSuites: nodistro\nComponents: main\n\n\
                       Types: deb deb-src\nURIs: http://two/debian\nSuites: bookworm bookworm-updates\n\
                       Components: main contrib\n";
        assert_eq!(mirror_in(stanzas, "bookworm").as_deref(), Some("http://two/debian"));
        assert_eq!(mirror_in(&stanzas.replace("main contrib", "contrib"), "bookworm"), None);
    }

    #[test]
    fn a_key_depends_on_every_part_and_on_the_parents() {
        assert_ne!(key(&["a", "bc"]), key(&["ab", "c"]));
        let nginx = chain("nginx").unwrap();
        let python = chain("python").unwrap();
        assert_eq!(nginx[0].key, python[0].key, "one base");
        assert_ne!(nginx[1].key, python[1].key);
        let pytorch: Vec<_> = chain("pytorch").unwrap().iter().map(|link| link.layer.name).collect();
        assert_eq!(pytorch, ["base", "python", "pytorch"]);
    }

    #[test]
    fn every_image_has_its_layers_and_a_default_service() {
        for image in IMAGES {
            assert!(!chain(image.layer).unwrap().is_empty());
            assert!(!image.services[0].command.is_empty());
        }
    }
}
