//! Layers out of an OCI layout: on demand, whole, damaged, after a reboot, by several at once.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use futures_util::future::{join_all, try_join_all};
use tdfs_common::digest::ContentHash;
use tdfs_common::layer_index::{Compression, Layer};
use tempfile::TempDir;

use super::*;
use crate::oci::layer::{IndexedLayer, index_layer, rebase_windows};
use crate::oci::{CONFIG_TYPE, ClientOptions, Image, MANIFEST_TYPE, Reference};

/// Uncompressed bytes of a layer: several spans.
const LEN: usize = 10 << 20;

/// A layout with one image, and an empty state directory.
struct Fixture {
    dir: TempDir,
    store: Store,
    image: Image,
    index: LayerIndex,
    windows: Option<Descriptor>,
    tars: Vec<Vec<u8>>,
}

fn tar(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut file = Vec::with_capacity(LEN + 64);
    while file.len() < LEN {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        file.extend_from_slice(format!("{} line {}\n", state >> 33, file.len()).as_bytes());
    }
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(file.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, format!("file{seed}"), &file[..]).unwrap();
    tar.into_inner().unwrap()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// The same layers as gzip, as zstd frames and as a plain tar.
async fn fixture() -> Fixture {
    let tars: Vec<Vec<u8>> = (1..=3).map(tar).collect();
    let frames = tars[1].chunks(1 << 20).flat_map(|c| zstd::bulk::compress(c, 1).unwrap()).collect();
    let blobs = [
        (Compression::Gzip, "tar+gzip", gzip(&tars[0])),
        (Compression::Zstd, "tar+zstd", frames),
        (Compression::None, "tar", tars[2].clone()),
    ];
    let dir = tempfile::tempdir().unwrap();
    let reference: Reference = format!("oci:{}/image:test", dir.path().display()).parse().unwrap();
    let store = Store::open(&reference, &ClientOptions::default()).unwrap();
    let (mut layers, mut descriptors, mut all_windows) = (Vec::new(), Vec::new(), Vec::new());
    for (compression, kind, blob) in &blobs {
        let mut windows = Vec::new();
        let IndexedLayer { mut layer, .. } =
            index_layer(&blob[..], *compression, std::io::sink(), &mut windows).unwrap();
        assert!(layer.spans.len() > 1);
        rebase_windows(&mut layer, all_windows.len() as u64);
        all_windows.extend(windows);
        let media_type = format!("application/vnd.oci.image.layer.v1.{kind}");
        descriptors.push(push(&store, &media_type, blob.clone()).await);
        layers.push(layer);
    }
    let windows = push(&store, "windows", all_windows).await;
    let index = LayerIndex { layers, windows: Some((windows.digest, windows.size)) };
    let diff_ids: Vec<String> = index.layers.iter().map(|l| l.diff_id.to_string()).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}
    });
    let config = push(&store, CONFIG_TYPE, config.to_string().into_bytes()).await;
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": descriptors
    });
    store.push_manifest(MANIFEST_TYPE, manifest.to_string().into(), Some("test")).await.unwrap();
    let image = store.resolve(&reference).await.unwrap();
    Fixture { dir, store, image, index, windows: Some(windows), tars }
}

async fn push(store: &Store, media_type: &str, bytes: Vec<u8>) -> Descriptor {
    let descriptor = Descriptor::of(media_type, &bytes);
    store.push_blob(bytes, &descriptor.digest).await.unwrap();
    descriptor
}

impl Fixture {
    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn layers(&self) -> ImageLayers {
        self.layers_of(self.index.clone())
    }

    fn layers_of(&self, index: LayerIndex) -> ImageLayers {
        ImageLayers::new(&self.state(), self.store.clone(), index, self.windows.clone()).unwrap()
    }

    async fn pull(&self) -> Result<PulledImage, FetchError> {
        pull_image(&self.state(), &self.store, &self.image, &|_, _| {}).await
    }

    fn blob(&self, layer: usize) -> PathBuf {
        self.dir.path().join("image/blobs/sha256").join(self.index.layers[layer].blob.hex())
    }

    fn layer_dir(&self, layer: usize) -> PathBuf {
        cache::directory(&self.state(), &self.index.layers[layer].diff_id)
    }

    fn spans_dir(&self, layer: usize) -> PathBuf {
        let dirs = fs::read_dir(self.layer_dir(layer)).unwrap().map(|e| e.unwrap().path());
        let mut dirs: Vec<_> = dirs.filter(|p| p.is_dir()).collect();
        assert_eq!(dirs.len(), 1);
        dirs.remove(0)
    }

    /// Reads all of every layer in pieces of an odd size and compares.
    async fn check(&self, layers: &ImageLayers) {
        for (n, tar) in self.tars.iter().enumerate() {
            for (i, piece) in tar.chunks(1_234_567).enumerate().rev() {
                let read = layers.read(n as u32, i as u64 * 1_234_567, piece.len()).await.unwrap();
                assert!(read == piece, "layer {n} piece {i}");
            }
        }
    }

    fn spans(&self) -> u64 {
        self.index.layers.iter().map(|l| l.spans.len() as u64).sum()
    }
}

/// Makes a presence file look like another boot's.
fn reboot(presence: PathBuf) {
    let mut bytes = fs::read(&presence).unwrap();
    bytes[16..32].fill(7);
    let sum = blake3::Hasher::new().update(&bytes[..40]).update(&bytes[72..]).finalize();
    bytes[40..72].copy_from_slice(sum.as_bytes());
    fs::write(presence, bytes).unwrap();
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_on_demand_equal_the_layers_and_happen_once() {
    let f = fixture().await;
    let layers = f.layers();
    f.check(&layers).await;
    assert_eq!(layers.stats().spans, f.spans());
    let requests = f.store.requests();
    f.check(&layers).await;
    for cache in &layers.layers {
        cache.commit().unwrap();
    }
    // Another process, so to speak.
    let again = f.layers();
    f.check(&again).await;
    assert_eq!((again.stats(), f.store.requests()), (LayerStats::default(), requests));
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_outside_a_layer_are_refused() {
    let f = fixture().await;
    let layers = f.layers();
    let size = f.index.layers[0].size;
    assert_eq!(layers.read(0, size, 0).await.unwrap().len(), 0);
    for (layer, offset, len) in [(3, 0, 1), (0, size, 1), (0, size - 1, 2), (0, u64::MAX, 2)] {
        let error = layers.read(layer, offset, len).await.unwrap_err();
        assert!(matches!(error, FetchError::OutsideLayer { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_readers_share_one_fetch() {
    let f = fixture().await;
    let layers = f.layers();
    let reads = (0..50).map(|n| layers.read(0, n * 1000, 1000));
    let read = try_join_all(reads).await.unwrap();
    assert!(read.concat() == f.tars[0][..50_000]);
    assert_eq!(layers.stats().spans, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_readers_share_one_failure_and_the_next_one_tries_again() {
    let f = fixture().await;
    let layers = f.layers();
    let blob = fs::read(f.blob(0)).unwrap();
    flip(&f.blob(0), 5000);
    for outcome in join_all((0..20).map(|n| layers.read(0, n, 10))).await {
        let error = outcome.unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        assert!(error.to_string().contains("span 0"), "{error}");
    }
    assert_eq!(layers.stats().spans, 0);
    fs::write(f.blob(0), blob).unwrap();
    assert!(layers.read(0, 0, 10).await.unwrap() == f.tars[0][..10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_without_spans_is_fetched_whole_once() {
    let f = fixture().await;
    let mut index = f.index.clone();
    index.layers.iter_mut().for_each(|l| l.spans.clear());
    let layers = f.layers_of(index.clone());
    let reads = (0..20).map(|n| layers.read(1, n * 400_000, 1000));
    for (n, read) in try_join_all(reads).await.unwrap().into_iter().enumerate() {
        assert!(read == f.tars[1][n * 400_000..][..1000]);
    }
    f.check(&layers).await;
    assert_eq!(layers.stats().spans, 3);

    // What the blob uncompresses to is not what the index says.
    let mut wrong = index;
    wrong.layers[0].diff_id = Digest::of(b"something else");
    let layers = f.layers_of(wrong);
    let error = layers.read(0, 0, 1).await.unwrap_err();
    assert!(error.to_string().contains("uncompresses to"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_lies_reaches_only_its_own_readers() {
    let f = fixture().await;
    f.check(&f.layers()).await;
    // Same layer, same spans, another blob and its hashes: a forged index.
    let forged_tar = tar(99);
    let mut forged = f.index.clone();
    let blob = push(&f.store, "layer", forged_tar.clone()).await;
    let (diff_id, size) = (f.index.layers[2].diff_id, forged_tar.len() as u64);
    let spans = index_layer(&forged_tar[..], Compression::None, std::io::sink(), &mut Vec::new());
    let spans = spans.unwrap().layer.spans;
    let (blob, blob_size) = (blob.digest, size);
    forged.layers[2] = Layer { blob, blob_size, diff_id, size, compression: Compression::None, spans };
    let victim = f.layers_of(forged.clone());
    for unit in 0..forged.layers[2].spans.len() {
        let at = forged.layers[2].span_out(unit).start;
        assert!(victim.read(2, at, 1000).await.unwrap() == forged_tar[at as usize..][..1000]);
    }
    f.check(&f.layers()).await;
    f.pull().await.unwrap();
    f.check(&f.layers()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_of_another_boot_are_checked_before_use() {
    let f = fixture().await;
    let layers = f.layers();
    f.check(&layers).await;
    layers.layers.iter().for_each(|l| l.commit().unwrap());
    drop(layers);
    let spans = f.spans_dir(0);
    flip(&spans.join("tar"), 100);
    reboot(spans.join("present"));
    let layers = f.layers();
    assert!(!layers.layers[0].contains(1));
    f.check(&layers).await;
    assert_eq!(layers.stats().spans, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bits_without_a_file_count_for_nothing() {
    let f = fixture().await;
    let layers = f.layers();
    f.check(&layers).await;
    layers.layers.iter().for_each(|l| l.commit().unwrap());
    fs::remove_file(f.spans_dir(0).join("tar")).unwrap();
    f.check(&f.layers()).await;
    f.pull().await.unwrap();
    fs::remove_file(f.layer_dir(0).join("tar")).unwrap();
    f.check(&f.layers()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_is_complete_and_happens_once() {
    let f = fixture().await;
    let seen = AtomicU64::new(0);
    let progress = |at, total| {
        assert!(at <= total);
        seen.fetch_max(at, Ordering::Relaxed);
    };
    let pulled = pull_image(&f.state(), &f.store, &f.image, &progress).await.unwrap();
    assert_eq!(seen.into_inner(), f.image.size());
    assert_eq!(pulled.index, f.index);
    let windows = fs::read(pulled.windows.as_ref().unwrap()).unwrap();
    assert_eq!(Some((Digest::of(&windows), windows.len() as u64)), f.index.windows);
    assert_eq!(pulled.tree.paths(), [&b""[..], b"file1", b"file2", b"file3"]);
    for n in 0..3 {
        assert!(fs::read(f.layer_dir(n).join("tar")).unwrap() == f.tars[n]);
    }
    let requests = f.store.requests();
    assert_eq!(f.pull().await.unwrap().tree, pulled.tree);
    // A lost summary comes back from the layers' own directories.
    fs::remove_dir_all(f.state().join("images")).unwrap();
    let again = f.pull().await.unwrap();
    assert_eq!((&again.tree, &again.index), (&pulled.tree, &pulled.index));
    let layers = f.layers();
    f.check(&layers).await;
    assert_eq!((layers.stats(), f.store.requests()), (LayerStats::default(), requests));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_layer_of_another_boot_is_checked_before_use() {
    let f = fixture().await;
    f.pull().await.unwrap();
    flip(&f.layer_dir(0).join("tar"), 100);
    for n in 0..3 {
        reboot(f.layer_dir(n).join("complete"));
    }
    // Spans that are right come from the disk, the wrong one from the store.
    let layers = f.layers();
    f.check(&layers).await;
    assert_eq!(layers.stats().spans, 1);
    let before = f.store.requests().bytes_received;
    f.pull().await.unwrap();
    assert_eq!(f.store.requests().bytes_received - before, f.index.layers[0].blob_size);
    f.check(&f.layers()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_of_wrong_bytes_leaves_nothing_that_counts() {
    let f = fixture().await;
    let blob = fs::read(f.blob(1)).unwrap();
    for at in [0, blob.len() / 2, blob.len() - 1] {
        flip(&f.blob(1), at);
        let error = f.pull().await.err().expect("an error").to_string();
        assert!(!error.is_empty());
        assert!(!f.layer_dir(1).join("tar").exists());
        fs::write(f.blob(1), &blob).unwrap();
    }
    fs::write(f.blob(1), &blob[..blob.len() - 9]).unwrap();
    assert!(f.pull().await.is_err());
    fs::write(f.blob(1), &blob).unwrap();
    f.pull().await.unwrap();
    f.check(&f.layers()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_that_lies_about_a_layer_is_refused() {
    let mut f = fixture().await;
    f.image.diff_ids.swap(0, 1);
    let error = f.pull().await.err().expect("an error");
    assert!(matches!(error, FetchError::DiffId { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_and_reads_of_several_at_once_agree() {
    let f = fixture().await;
    let (one, two) = (f.layers(), f.layers());
    let pulls = async { tokio::try_join!(f.pull(), f.pull()).map(|(a, b)| assert_eq!(a.tree, b.tree)) };
    let (pulled, (), ()) = tokio::join!(pulls, f.check(&one), f.check(&two));
    pulled.unwrap();
    f.check(&f.layers()).await;
    // The second pull found the first one's layers, and what a crash left is gone.
    let left: Vec<_> = fs::read_dir(f.layer_dir(0)).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|n| n.to_string_lossy().starts_with(".part-")), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn leftovers_of_a_killed_pull_are_removed_by_the_next() {
    let f = fixture().await;
    fs::create_dir_all(f.layer_dir(0)).unwrap();
    let left = f.layer_dir(0).join(".part-crashed");
    fs::write(&left, b"half a layer").unwrap();
    f.pull().await.unwrap();
    assert!(!left.exists());
}

#[test]
fn content_hashes_name_the_directory() {
    // Two indexes that differ in one hash must not meet on disk.
    let tar = tar(5);
    let layer = index_layer(&tar[..], Compression::None, std::io::sink(), &mut Vec::new()).unwrap().layer;
    let state = tempfile::tempdir().unwrap();
    let mut other = layer.clone();
    other.spans[1].hash = ContentHash::of(b"x");
    let (a, b) =
        (LayerCache::open(state.path(), &layer).unwrap(), LayerCache::open(state.path(), &other).unwrap());
    a.insert(0, &[1; 10]).unwrap();
    assert_eq!((a.contains(0), b.contains(0)), (true, false));
    assert_eq!((a.read(0, 1).unwrap()[0], b.read(0, 1).unwrap()[0]), (1, 0));
}
