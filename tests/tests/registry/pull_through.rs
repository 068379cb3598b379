//! In front of another registry.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use nix::sys::signal::Signal;
use tdfs_common::digest::Digest;
use tdfs_tests::registry::{Options, Registry};
use tdfs_tests::server::Server;
use tempfile::TempDir;

use super::client::{CONFIG_TYPE, Client, LAYER_TYPE, descriptor, manifest, noise};

fn in_front_of(root: &Path, upstream: &str) -> Result<(Server, Client)> {
    let server = Server::start(root, &["--upstream", upstream])?;
    let client = Client::new(&server);
    Ok((server, client))
}

#[tokio::test]
async fn what_was_pulled_through_stays() -> Result<()> {
    let mut upstream = Registry::start(&Options::default())?;
    let address = format!("http://{}", upstream.addr);
    let origin = Client::at(&address, &[]);
    let layers = [noise(12 << 20, 1), noise(1000, 2)];
    let first = origin.push_image("team/app", Some("v1"), &layers).await?;
    let dir = TempDir::new()?;
    let (server, client) = in_front_of(dir.path(), &address)?;

    let tagged = client.get("/v2/team/app/manifests/v1").await?.expect(200)?;
    ensure!(tagged.header("docker-content-digest") == first.to_string(), "{tagged:?}");
    let large = format!("/v2/team/app/blobs/{}", Digest::of(&layers[0]));
    ensure!(client.head(&large).await?.expect(200)?.header("content-length") == layers[0].len().to_string());
    // Many at once, some of them only a part.
    let read = async |n: usize| -> Result<()> {
        let request = client.request(reqwest::Method::GET, &large);
        if n.is_multiple_of(2) {
            ensure!(client.send(request).await?.expect(200)?.body == layers[0], "{n}");
        } else {
            let answer = client.send(request.header("range", "bytes=9000000-9000099")).await?.expect(206)?;
            ensure!(answer.body == layers[0].slice(9_000_000..9_000_100), "{n}");
        }
        Ok(())
    };
    try_join_all((0..16).map(read)).await?;
    let metrics = client.get("/metrics").await?.expect(200)?.body;
    let metrics = String::from_utf8_lossy(&metrics);
    ensure!(metrics.lines().any(|l| l == "tdfs_registry_upstream_fetches_total 1"), "{metrics}");
    client
        .get(&format!("/v2/team/app/blobs/{}", Digest::of(b"absent")))
        .await?
        .refused(404, "BLOB_UNKNOWN")?;
    client.get("/v2/team/app/manifests/absent").await?.refused(404, "MANIFEST_UNKNOWN")?;

    // A tag moves there, and one goes away.
    let second = origin.push_image("team/app", Some("v1"), &[noise(10, 3)]).await?;
    let tagged = client.get("/v2/team/app/manifests/v1").await?.expect(200)?;
    ensure!(tagged.header("docker-content-digest") == second.to_string(), "{tagged:?}");
    origin.push_image("team/app", Some("gone"), &[noise(10, 4)]).await?;
    client.get("/v2/team/app/manifests/gone").await?.expect(200)?;
    let gone = client.get("/v2/team/app/manifests/gone").await?.header("docker-content-digest").to_owned();
    origin.delete(&format!("/v2/team/app/manifests/{gone}")).await?.expect(202)?;
    client.get("/v2/team/app/manifests/gone").await?.refused(404, "MANIFEST_UNKNOWN")?;

    // What is pushed here may consist of what lies there, and stays here.
    let config = descriptor(CONFIG_TYPE, b"{}");
    client.push_blob("team/app", &"{}".into()).await?;
    let own = manifest(&config, &[descriptor(LAYER_TYPE, &layers[1])]);
    client.put_manifest("team/app", "own", &own).await?.expect(201)?;

    // The other registry goes away: what is here is served, by a server that never saw it too.
    upstream.kill();
    drop(server);
    let (_server, client) = in_front_of(dir.path(), &address)?;
    client.get("/v2/team/app/manifests/v1").await?.expect(200)?;
    client.get(&format!("/v2/team/app/manifests/{first}")).await?.expect(200)?;
    client.get("/v2/team/app/manifests/own").await?.expect(200)?;
    for layer in &layers {
        let path = format!("/v2/team/app/blobs/{}", Digest::of(layer));
        ensure!(client.get(&path).await?.expect(200)?.body == *layer);
    }
    client.get("/v2/team/app/manifests/absent").await?.refused(503, "UNAVAILABLE")
}

/// A registry whose disk lies.
#[tokio::test]
async fn what_is_wrong_there_is_never_whole_here() -> Result<()> {
    let (origin_dir, dir) = (TempDir::new()?, TempDir::new()?);
    let mut upstream = Server::start(origin_dir.path(), &[])?;
    let origin = Client::new(&upstream);
    let blob = noise(3 << 20, 7);
    let digest = origin.push_blob("a", &blob).await?;
    let hex = digest.hex();
    let stored = origin_dir.path().join("blobs/sha256").join(&hex[..2]).join(&hex);
    let mut bytes = std::fs::read(&stored)?;
    bytes[1 << 20] ^= 1;
    std::fs::write(&stored, &bytes)?;
    let (server, client) = in_front_of(dir.path(), &format!("http://{}", upstream.addr))?;
    let path = format!("/v2/a/blobs/{digest}");
    for _ in 0..3 {
        ensure!(client.get(&path).await.is_err(), "a wrong blob came through whole");
    }
    let here = dir.path().join("blobs/sha256").join(&hex[..2]).join(&hex);
    ensure!(!here.exists());
    // Mended, it is fetched anew.
    bytes[1 << 20] ^= 1;
    std::fs::write(&stored, &bytes)?;
    ensure!(client.get(&path).await?.expect(200)?.body == blob);
    ensure!(here.exists());
    upstream.stop(Signal::SIGKILL)?;
    ensure!(client.get(&path).await?.expect(200)?.body == blob);
    server.log().iter().find(|line| line.contains("digest")).context("the log tells of it")?;
    Ok(())
}
