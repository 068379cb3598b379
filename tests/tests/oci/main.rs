//! The registry client and OCI layouts against docker-registry and skopeo.
#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

mod access;
mod hostile;
mod server;

use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::StreamExt;
use serde_json::json;
use tdfs_agent::oci::{
    ByteStream, CONFIG_TYPE, ClientOptions, Descriptor, EMPTY_TYPE, INDEX_TYPE, Image, MANIFEST_TYPE,
    OciError, REF_NAME, Reference, Requests, Store,
};
use tdfs_common::digest::Digest;
use tdfs_tests::registry::{Options, Registry};

const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ARTIFACT_TYPE: &str = "application/vnd.example.thing.v1";

/// Bytes without a pattern that a truncation or a shift could repeat.
fn noise(len: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// As layers are stored.
fn gzip(bytes: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap().into()
}

/// An image for `architecture` whose uncompressed layers are `layers`. Nobody unpacks them, so they are no archives.
async fn push_image(
    store: &Store,
    layers: &[Bytes],
    architecture: &str,
    tag: Option<&str>,
) -> Result<Descriptor> {
    let mut descriptors = Vec::new();
    for layer in layers {
        let blob = gzip(layer);
        descriptors.push(Descriptor::of(LAYER_TYPE, &blob));
        store.push_blob(blob.clone(), &Digest::of(&blob)).await?;
    }
    let diff_ids: Vec<Digest> = layers.iter().map(|l| Digest::of(l)).collect();
    let config = json!({
        "architecture": architecture, "os": "linux", "config": { "Cmd": ["/bin/true"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids }
    });
    let config = Bytes::from(config.to_string());
    store.push_blob(config.clone(), &Digest::of(&config)).await?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
        "config": Descriptor::of(CONFIG_TYPE, &config), "layers": descriptors
    });
    Ok(store.push_manifest(MANIFEST_TYPE, manifest.to_string().into(), tag).await?)
}

async fn push_artifact(store: &Store, subject: &Descriptor, name: &str) -> Result<Descriptor> {
    store.push_blob(Bytes::from("{}"), &Digest::of(b"{}")).await?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE,
        "config": Descriptor::of(EMPTY_TYPE, b"{}"), "layers": [Descriptor::of(EMPTY_TYPE, b"{}")],
        "subject": subject, "annotations": { "name": name }
    });
    Ok(store.push_manifest(MANIFEST_TYPE, manifest.to_string().into(), None).await?)
}

async fn collect(mut stream: ByteStream) -> Result<Bytes, OciError> {
    let mut all = Vec::new();
    while let Some(piece) = stream.next().await {
        all.extend_from_slice(&piece?);
    }
    Ok(all.into())
}

fn open(text: &str, options: &ClientOptions) -> (Reference, Store) {
    let reference: Reference = text.parse().unwrap();
    let store = Store::open(&reference, options).unwrap();
    (reference, store)
}

fn skopeo(args: &[&str]) -> String {
    let out = Command::new("skopeo").args(args).output().unwrap();
    assert!(out.status.success(), "skopeo {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn path(dir: &Path) -> &str {
    dir.to_str().unwrap()
}

/// Everything a store does, the same for a registry and a layout.
async fn exercise(reference: &Reference, store: &Store) -> Result<Image> {
    let tag = reference.tag();
    let layers = [noise(3 << 20, 1), noise(100, 2), noise(0, 3)];
    let pushed = push_image(store, &layers, "amd64", tag).await?;
    assert_eq!(store.tag_digest(tag.unwrap()).await?, Some(pushed.digest));
    assert_eq!(store.tag_digest("absent").await?, None);

    let image = store.resolve(reference).await?;
    assert_eq!(image.digest, pushed.digest);
    assert_eq!(image.layers.len(), 3);
    assert_eq!(image.diff_ids[1], Digest::of(&layers[1]));
    assert_eq!(store.resolve(&reference.with_digest(pushed.digest)).await?.manifest, image.manifest);
    assert!(store.resolve(&reference.with_tag("absent")?).await.unwrap_err().is_not_found());

    let blobs: Vec<Bytes> = layers.iter().map(|l| gzip(l)).collect();
    for (layer, bytes) in image.layers.iter().zip(&blobs) {
        assert!(store.has_blob(&layer.digest).await?);
        assert_eq!(store.blob(layer, 4 << 20).await?, bytes);
        assert_eq!(collect(store.blob_stream(layer).await?).await?, bytes);
    }
    let (large, bytes) = (&image.layers[0], &blobs[0]);
    assert!(matches!(store.blob(large, 100).await, Err(OciError::TooLarge { .. })));
    for range in [0..1, 0..large.size, 5..5, 1_000_000..2_500_001, large.size - 1..large.size] {
        let before = store.requests();
        let got = collect(store.blob_range(&large.digest, large.size, range.clone()).await?).await?;
        assert_eq!(got, bytes.slice(range.start as usize..range.end as usize), "{range:?}");
        let after = store.requests();
        assert_eq!(after.metadata_requests, before.metadata_requests);
        assert_eq!(after.bytes_received - before.bytes_received, range.end - range.start);
        assert!(after.data_requests - before.data_requests <= 1);
    }
    assert!(store.blob_range(&large.digest, large.size, 0..large.size + 1).await.is_err());
    let absent = Digest::of(b"absent");
    assert!(!store.has_blob(&absent).await?);
    assert!(store.blob_range(&absent, 10, 0..5).await.err().unwrap().is_not_found());
    // A descriptor that lies about the size.
    let lying = Descriptor { size: large.size - 1, ..large.clone() };
    assert!(store.blob(&lying, 4 << 20).await.is_err());
    let lied_to = match store.blob_stream(&lying).await {
        Ok(stream) => collect(stream).await,
        Err(e) => Err(e),
    };
    assert!(lied_to.is_err());

    assert_eq!(store.referrers(&image.digest, None).await?, []);
    let one = push_artifact(store, &image.descriptor(), "one").await?;
    let two = push_artifact(store, &image.descriptor(), "two").await?;
    assert_eq!(push_artifact(store, &image.descriptor(), "one").await?, one);
    let found = store.referrers(&image.digest, Some(ARTIFACT_TYPE)).await?;
    assert_eq!(found, [one.clone(), two]);
    assert_eq!(found[0].annotations["name"], "one");
    assert_eq!(store.referrers(&image.digest, Some("other/type")).await?, []);
    assert_eq!(store.manifest(&one.digest).await?.0, one);
    let not_an_image = store.resolve(&reference.with_digest(one.digest)).await.unwrap_err();
    assert!(not_an_image.to_string().contains(ARTIFACT_TYPE), "{not_an_image}");
    Ok(image)
}

#[tokio::test]
async fn store_on_a_registry() -> Result<()> {
    let registry = Registry::start(&Options::default())?;
    let (reference, store) = open(&registry.image("team/app:v1"), &ClientOptions::default());
    let image = exercise(&reference, &store).await?;

    let dir = tempfile::tempdir()?;
    let copy = format!("oci:{}:v1", path(dir.path()));
    let source = format!("docker://{}", registry.image("team/app:v1"));
    skopeo(&["copy", "--quiet", "--src-tls-verify=false", &source, &copy]);
    let (reference, layout) = open(&copy, &ClientOptions::default());
    assert_eq!(layout.resolve(&reference).await?.digest, image.digest);

    // The same in Docker's own media types.
    let docker = format!("docker://{}", registry.image("team/app:docker"));
    skopeo(&[
        "copy",
        "--quiet",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        "--format=v2s2",
        &source,
        &docker,
    ]);
    let (reference, store) = open(&registry.image("team/app:docker"), &ClientOptions::default());
    let converted = store.resolve(&reference).await?;
    assert_eq!(converted.media_type, "application/vnd.docker.distribution.manifest.v2+json");
    assert_eq!(converted.diff_ids, image.diff_ids);
    Ok(())
}

#[tokio::test]
async fn store_on_a_layout() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path().join("new");
    let (reference, store) = open(&format!("oci:{}:v1", path(&dir)), &ClientOptions::default());
    assert!(store.resolve(&reference).await.unwrap_err().is_not_found());
    assert!(!dir.exists(), "reading creates nothing");
    let image = exercise(&reference, &store).await?;

    // The artifacts beside it leave exactly one image.
    let untagged = Reference::layout(&dir);
    assert_eq!(store.resolve(&untagged).await?.digest, image.digest);
    let leftovers: Vec<_> = std::fs::read_dir(&dir)?.map(|e| e.unwrap().file_name()).collect();
    assert_eq!(leftovers.len(), 3, "{leftovers:?}");
    let index: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("index.json"))?)?;
    assert_eq!(index["manifests"].as_array().unwrap().len(), 3);
    assert_eq!(index["manifests"][0]["annotations"][REF_NAME], "v1");

    // skopeo reads it, artifact and all, and what it writes is read back.
    let copy = tempfile::tempdir()?;
    skopeo(&["copy", "--quiet", &format!("oci:{}:v1", path(&dir)), &format!("oci:{}:v1", path(copy.path()))]);
    let (reference, other) = open(&format!("oci:{}", path(copy.path())), &ClientOptions::default());
    assert_eq!(other.resolve(&reference).await?.manifest, image.manifest);

    let second = push_image(&store, &[noise(10, 9)], "amd64", Some("v2")).await?;
    let several = store.resolve(&untagged).await.unwrap_err().to_string();
    assert!(several.contains("v1, v2"), "{several}");
    // A tag moves.
    push_image(&store, &[noise(11, 9)], "amd64", Some("v2")).await?;
    assert_ne!(store.tag_digest("v2").await?, Some(second.digest));
    let tags = std::fs::read_to_string(dir.join("index.json"))?.matches("\"v2\"").count();
    assert_eq!(tags, 1);
    Ok(())
}

#[tokio::test]
async fn index_is_resolved_by_platform() -> Result<()> {
    let registry = Registry::start(&Options::default())?;
    let (reference, store) = open(&registry.image("multi:v1"), &ClientOptions::default());
    let mut entries = Vec::new();
    for architecture in ["amd64", "arm64"] {
        let mut entry = push_image(&store, &[Bytes::from(architecture)], architecture, None).await?;
        entry.platform = Some(format!("linux/{architecture}").parse()?);
        entries.push(entry);
    }
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries });
    store.push_manifest(INDEX_TYPE, index.to_string().into(), Some("v1")).await?;
    for (n, platform) in ["linux/amd64", "linux/arm64/v8"].into_iter().enumerate() {
        let options = ClientOptions { platform: platform.parse()?, ..ClientOptions::default() };
        let (reference, store) = open(&registry.image("multi:v1"), &options);
        assert_eq!(store.resolve(&reference).await?.digest, entries[n].digest);
    }
    let options = ClientOptions { platform: "linux/s390x".parse()?, ..ClientOptions::default() };
    let error = Store::open(&reference, &options)?.resolve(&reference).await.unwrap_err().to_string();
    assert!(error.contains("linux/amd64, linux/arm64"), "{error}");
    Ok(())
}

#[tokio::test]
async fn images_are_copied_between_stores() -> Result<()> {
    let registry = Registry::start(&Options::default())?;
    let (reference, source) = open(&registry.image("from:v1"), &ClientOptions::default());
    // Larger than one upload piece.
    let pushed = push_image(&source, &[noise((17 << 20) + 5, 1), noise(5, 2)], "amd64", Some("v1")).await?;
    let image = source.resolve(&reference).await?;
    let dir = tempfile::tempdir()?;
    let (in_layout, layout) = open(&format!("oci:{}:v2", path(dir.path())), &ClientOptions::default());
    let (from, to, moved) = (source.clone(), layout.clone(), image.clone());
    tokio::spawn(async move { from.copy_image(&moved, &to, Some("v2")).await }).await??;
    assert_eq!(layout.resolve(&in_layout).await?.digest, pushed.digest);
    let (back, target) = open(&registry.image("to:v3"), &ClientOptions::default());
    layout.copy_image(&image, &target, Some("v3")).await?;
    let image = target.resolve(&back).await?;
    assert_eq!(image.digest, pushed.digest);
    assert_eq!(
        Digest::of(&collect(target.blob_stream(&image.layers[0]).await?).await?),
        image.layers[0].digest
    );
    Ok(())
}
