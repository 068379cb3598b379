//! Servers that are killed, several of them over one storage, and garbage collection beside them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::Value;
use tdfs_common::digest::Digest;
use tdfs_tests::server::Server;
use tdfs_tests::{s3, tdfs};
use tempfile::TempDir;

use super::client::{CONFIG_TYPE, Client, LAYER_TYPE, descriptor, manifest, noise};

/// All bytes below `blobs` have the digest that they lie at.
pub fn verify(root: &Path) -> Result<()> {
    let blobs = root.join("blobs");
    if !blobs.exists() {
        return Ok(());
    }
    for entry in walkdir::WalkDir::new(blobs) {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // What the storage does not show is not there.
        if entry.file_type().is_file() && !name.contains('#') {
            ensure!(Digest::of(&std::fs::read(entry.path())?).hex() == name, "{}", entry.path().display());
        }
    }
    Ok(())
}

/// A manifest and all that it names.
pub async fn pull(client: &Client, name: &str, reference: &str) -> Result<()> {
    let answer = client.get(&format!("/v2/{name}/manifests/{reference}")).await?.expect(200)?;
    ensure!(Digest::of(&answer.body).to_string() == answer.header("docker-content-digest"));
    let manifest = answer.json();
    let layers = manifest["layers"].as_array().context("no layers")?;
    for blob in layers.iter().chain([&manifest["config"]]) {
        let digest = blob["digest"].as_str().context("no digest")?;
        let got = client.get(&format!("/v2/{name}/blobs/{digest}")).await?;
        ensure!(got.status == 200, "{name}:{reference} names {digest}: {} {:?}", got.status, got.body);
        ensure!(Digest::of(&got.body).to_string() == digest, "{digest}");
    }
    Ok(())
}

/// Pushes as clients do: only what is not there.
pub async fn push(client: &Client, name: &str, tag: &str, layers: &[Bytes]) -> Result<u16> {
    let config = Bytes::from("{}");
    for blob in layers.iter().chain([&config]) {
        let digest = Digest::of(blob);
        if client.head(&format!("/v2/{name}/blobs/{digest}")).await?.status == 200 {
            continue;
        }
        let location = client.begin(name).await?;
        let half = blob.len() / 2;
        client.patch(&location, None, blob.slice(..half)).await?.expect(202)?;
        let ended = client.finish(&location, &digest.to_string(), blob.slice(half..)).await?;
        ensure!(matches!(ended.status.as_u16(), 201 | 503), "{ended:?}");
    }
    let layers: Vec<Value> = layers.iter().map(|layer| descriptor(LAYER_TYPE, layer)).collect();
    let manifest = manifest(&descriptor(CONFIG_TYPE, &config), &layers);
    Ok(client.put_manifest(name, tag, &manifest).await?.status.as_u16())
}

#[tokio::test]
async fn a_killed_server_leaves_nothing_wrong() -> Result<()> {
    let dir = TempDir::new()?;
    let finished = Arc::new(AtomicU64::new(0));
    let noise_of_all = noise(10 << 20, 1);
    for round in 0..12_u64 {
        let mut server = Server::start(dir.path(), &[])?;
        let client = Client::new(&server);
        let pushing = (0..4_u64).map(|task| {
            let (client, finished, all) = (client.clone(), finished.clone(), noise_of_all.clone());
            tokio::spawn(async move {
                for n in 0.. {
                    // Each another one, of more than one piece.
                    let large = all.slice(((round * 4 + task) * 100 + n) as usize..(9 << 20) + (n as usize));
                    let layers = [large, noise(1000, round * 100 + task * 10 + n)];
                    // It fails when the server dies.
                    if push(&client, "a", &format!("t-{round}-{task}-{n}"), &layers).await.is_err() {
                        return;
                    }
                    finished.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        let pushing: Vec<_> = pushing.collect();
        let before = finished.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(50 + u64::from(noise(1, round)[0]) * 2)).await;
        // Now and then at the end of a push.
        while round % 3 == 2 && finished.load(Ordering::Relaxed) == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        server.stop(Signal::SIGKILL)?;
        for task in pushing {
            task.await?;
        }
        verify(dir.path())?;
        let server = Server::start(dir.path(), &[])?;
        let client = Client::new(&server);
        let tags = client.get("/v2/a/tags/list").await?.json();
        for tag in tags["tags"].as_array().into_iter().flatten() {
            pull(&client, "a", tag.as_str().context("a tag")?).await?;
        }
    }
    // Collected, all that is tagged is still there.
    let report = tdfs::json(["registry", "gc", "--root", &dir.path().display().to_string(), "--grace", "0"])?;
    ensure!(report["blobs"].as_u64() > Some(0), "{report}");
    let server = Server::start(dir.path(), &[])?;
    let client = Client::new(&server);
    let tags = client.get("/v2/a/tags/list").await?.json();
    let tags = tags["tags"].as_array().context("no tags")?;
    let finished = finished.load(Ordering::Relaxed);
    ensure!(finished > 0 && tags.len() as u64 >= finished, "{} tags, {finished} pushes", tags.len());
    for tag in tags {
        pull(&client, "a", tag.as_str().context("a tag")?).await?;
    }
    Ok(())
}

/// What is begun at one server is finished at the other.
/// `atomic`: the storage really makes an object only if there is none. moto asks first and then writes.
async fn two_servers(one: &Server, two: &Server, atomic: bool) -> Result<()> {
    let (one, two) = (Client::new(one), Client::new(two));
    let blob = noise(20 << 20, 1);
    let digest = Digest::of(&blob);
    let location = one.begin("a").await?;
    one.patch(&location, Some("0-99"), blob.slice(..100)).await?.expect(202)?;
    two.patch(&location, Some("0-99"), blob.slice(..100)).await?.refused(416, "BLOB_UPLOAD_INVALID")?;
    let range = format!("100-{}", (10 << 20) - 1);
    two.patch(&location, Some(&range), blob.slice(100..10 << 20)).await?.expect(202)?;
    let status = one.get(&location).await?.expect(204)?;
    ensure!(status.header("range") == format!("0-{}", (10 << 20) - 1), "{status:?}");
    two.finish(&location, &digest.to_string(), blob.slice(10 << 20..)).await?.expect(201)?;
    ensure!(one.get(&format!("/v2/a/blobs/{digest}")).await?.expect(200)?.body == blob);
    let ranged = one.request(Method::GET, &format!("/v2/a/blobs/{digest}")).header("range", "bytes=-5");
    ensure!(one.send(ranged).await?.expect(206)?.body == blob.slice(blob.len() - 5..));
    one.get(&location).await?.refused(404, "BLOB_UPLOAD_UNKNOWN")?;
    // Both append at the same place at once: one of them may, and nothing is mixed.
    let location = one.begin("a").await?;
    let (a, b) = (noise(9 << 20, 2), noise(9 << 20, 3));
    let at_once =
        tokio::try_join!(one.patch(&location, None, a.clone()), two.patch(&location, None, b.clone()))?;
    let winners = [at_once.0.status == 202, at_once.1.status == 202];
    ensure!(!atomic || winners != [true, true], "{at_once:?}");
    if winners != [true, true]
        && let Some(winner) = winners.iter().position(|w| *w)
    {
        let expected = Digest::of([&a, &b][winner]).to_string();
        two.finish(&location, &expected, Bytes::new()).await?.expect(201)?;
    }
    // Images, tags and deletions of one are seen by the other.
    let image = one.push_image("b", Some("t"), &[blob]).await?;
    pull(&two, "b", "t").await?;
    two.delete(&format!("/v2/b/manifests/{image}")).await?.expect(202)?;
    one.get("/v2/b/manifests/t").await?.refused(404, "MANIFEST_UNKNOWN")?;
    ensure!(push(&one, "c", "t", &[noise(10, 1)]).await? == 201);
    pull(&two, "c", "t").await
}

#[tokio::test]
async fn two_servers_over_one_directory_are_one() -> Result<()> {
    let dir = TempDir::new()?;
    two_servers(&Server::start(dir.path(), &[])?, &Server::start(dir.path(), &[])?, true).await
}

#[tokio::test]
async fn two_servers_over_one_bucket_are_one() -> Result<()> {
    let store = s3::Store::start()?;
    let (root, environment) = (store.root("some/where"), store.environment());
    let start = || Server::start_over(&root, &[], &environment);
    two_servers(&start()?, &start()?, false).await?;
    // Collected over S3 as well; what is younger than its clock is coarse stays.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut gc = tdfs::command(["--json", "registry", "gc", "--root", &root, "--grace", "0", "--untagged"])?;
    let output = gc.envs(environment).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(report["blobs_deleted"].as_u64() > Some(0) && report["manifests"] == 1, "{report}");
    pull(&Client::new(&start()?), "c", "t").await
}

#[tokio::test]
async fn collections_delete_what_nothing_reaches() -> Result<()> {
    let dir = TempDir::new()?;
    let root = dir.path().display().to_string();
    let gc = |arguments: &[&str]| tdfs::json([&["registry", "gc", "--root", &root][..], arguments].concat());
    let server = Server::start(dir.path(), &[])?;
    let client = Client::new(&server);
    let blob = |n: u64| noise(1000, n);
    client.push_image("a", Some("t"), &[blob(1), blob(2)]).await?;
    let untagged = client.push_image("a", None, &[blob(2), blob(3)]).await?;
    let lone = client.push_blob("a", &blob(4)).await?;
    // One that refers to a tagged image, one that refers to it, and one that refers to what is not tagged.
    let mut referrers: Vec<String> = Vec::new();
    client.push_blob("a", &Bytes::from("{}")).await?;
    let tagged = client.head("/v2/a/manifests/t").await?.header("docker-content-digest").to_owned();
    for subject in [tagged.clone(), String::new(), untagged.to_string()] {
        let subject = if subject.is_empty() { referrers[0].clone() } else { subject };
        let mut artifact = manifest(&descriptor("a/b", b"{}"), &[]);
        artifact["subject"] = serde_json::json!({ "mediaType": "a/b", "digest": subject, "size": 1 });
        let digest = Digest::of(artifact.to_string().as_bytes()).to_string();
        client.put_manifest("a", &digest, &artifact).await?.expect(201)?;
        referrers.push(digest);
    }
    let location = client.begin("a").await?;
    client.patch(&location, None, blob(5)).await?.expect(202)?;
    let manifest_is = async |digest: &str, status: u16| -> Result<()> {
        client.get(&format!("/v2/a/manifests/{digest}")).await?.expect(status).map(drop)
    };
    let young = gc(&["--untagged"])?;
    ensure!(young["blobs_deleted"] == 0 && young["manifests_deleted"] == 0, "{young}");
    ensure!(young["uploads_deleted"] == 0, "{young}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let dry = gc(&["--grace", "0", "--untagged", "--dry-run"])?;
    client.head(&format!("/v2/a/blobs/{lone}")).await?.expect(200)?;
    // A client that was told that the blob is there may count on it.
    let leased = gc(&["--grace", "0"])?;
    ensure!(leased["blobs_deleted"] == 0 && leased["uploads_deleted"] == 1, "{leased}");
    client.get(&location).await?.refused(404, "BLOB_UPLOAD_UNKNOWN")?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let tidy = gc(&["--grace", "0"])?;
    ensure!(
        tidy["blobs_deleted"] == 1 && tidy["bytes_deleted"] == 1000 && tidy["manifests_deleted"] == 0,
        "{tidy}"
    );
    client.get(&format!("/v2/a/blobs/{lone}")).await?.refused(404, "BLOB_UNKNOWN")?;
    manifest_is(&untagged.to_string(), 200).await?;
    let all = gc(&["--grace", "0", "--untagged"])?;
    // The image, its layer that is in no other, what referred to it.
    ensure!(all["manifests_deleted"] == 2 && all["blobs_deleted"] == 3, "{all}");
    ensure!(dry["manifests_deleted"] == 2 && dry["blobs_deleted"] == 4 && dry["dry_run"] == true, "{dry}");
    manifest_is(&untagged.to_string(), 404).await?;
    manifest_is(&referrers[0], 200).await?;
    manifest_is(&referrers[1], 200).await?;
    manifest_is(&referrers[2], 404).await?;
    pull(&client, "a", "t").await?;
    let listed = client.get(&format!("/v2/a/referrers/{untagged}")).await?.json();
    ensure!(listed["manifests"].as_array().is_some_and(Vec::is_empty), "{listed}");
    verify(dir.path())
}
