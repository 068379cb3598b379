//! Other people's clients.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tdfs_tests::fingerprint::Fingerprint;
use tdfs_tests::images::{self, Unpacked};
use tdfs_tests::server::Server;
use tdfs_tests::tdfs;
use tempfile::TempDir;
use xtask::command;
use xtask::containerd::Containerd;
use xtask::network::Place;

use super::client::Client;

fn skopeo(arguments: &[&str]) -> Result<String> {
    command::output(Command::new("skopeo").arg("--insecure-policy").args(arguments))
}

/// Pulls `image` into the layout `to`, for `latest`.
fn pull(image: &str, to: &Path) -> Result<()> {
    let (from, to) = (format!("docker://{image}"), format!("oci:{}:latest", to.display()));
    skopeo(&["copy", "--quiet", "--src-tls-verify=false", &from, &to]).map(drop)
}

/// Digests of what a layout holds.
fn blobs(layout: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = std::fs::read_dir(layout.join("blobs/sha256"))?
        .map(|e| Ok(e?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

#[tokio::test]
async fn skopeo_copies_both_ways_and_deletes() -> Result<()> {
    let dir = TempDir::new()?;
    let mut server = Server::start(&dir.path().join("registry"), &[])?;
    let layout = images::image("nginx")?;
    let source = format!("oci:{}:latest", layout.display());
    let image = server.image("team/nginx:v1");
    let there = format!("docker://{image}");
    for round in 0..3 {
        skopeo(&["copy", "--quiet", "--dest-tls-verify=false", &source, &there])?;
        let back = dir.path().join(format!("back-{round}"));
        pull(&image, &back)?;
        assert_eq!(blobs(&layout)?, blobs(&back)?);
        let listed = skopeo(&[
            "list-tags",
            "--tls-verify=false",
            &format!("docker://{}", server.image("team/nginx")),
        ])?;
        assert!(listed.contains("\"v1\""), "{listed}");
        skopeo(&["delete", "--tls-verify=false", &there])?;
        Client::new(&server).get("/v2/team/nginx/manifests/v1").await?.refused(404, "MANIFEST_UNKNOWN")?;
    }
    assert!(server.stop(Signal::SIGTERM)?.success());
    Ok(())
}

#[test]
fn containerd_pulls_and_pushes() -> Result<()> {
    let dir = TempDir::new()?;
    let server = Server::start(&dir.path().join("registry"), &[])?;
    let layout = images::image("nginx")?;
    let (here, there) = (server.push(&layout, "team/nginx:v1")?, server.image("other/nginx:v2"));
    let containerd = Containerd::start(dir.path(), &Place::here())?;
    let ctr = |arguments: &[&str]| command::output(containerd.ctr().args(arguments));
    ctr(&["images", "pull", "--plain-http", "--snapshotter", "native", &here])?;
    ctr(&["images", "push", "--plain-http", &there, &here])?;
    let back = dir.path().join("back");
    pull(&there, &back)?;
    assert_eq!(blobs(&layout)?, blobs(&back)?);
    Ok(())
}

/// The client of eStargz. What it makes of an image are gzip layers of many members, which tdfs reads like others.
#[test]
fn ctr_remote_pulls_converts_and_pushes() -> Result<()> {
    let dir = TempDir::new()?;
    let server = Server::start(&dir.path().join("registry"), &[])?;
    let layout = images::image("nginx")?;
    let (here, there) = (server.push(&layout, "team/nginx:v1")?, server.image("team/nginx:estargz"));
    let containerd = Containerd::start(dir.path(), &Place::here())?;
    let remote =
        |arguments: &[&str]| command::output(containerd.client("ctr-remote").arg("images").args(arguments));
    remote(&["pull", "--plain-http", "--snapshotter", "native", &here])?;
    remote(&["convert", "--estargz", "--oci", &here, &there])?;
    remote(&["push", "--plain-http", &there])?;

    let raw = skopeo(&["inspect", "--raw", "--tls-verify=false", &format!("docker://{there}")])?;
    let manifest: Value = serde_json::from_str(&raw)?;
    let layers = manifest["layers"].as_array().context("no layers")?;
    let toc = "containerd.io/snapshot/stargz/toc.digest";
    ensure!(!layers.is_empty() && layers.iter().all(|l| l["annotations"][toc].is_string()), "{manifest}");

    let back = dir.path().join("back");
    pull(&there, &back)?;
    let served = tdfs::mounted(&there, &dir.path().join("state"), Fingerprint::of)?;
    served.expect_equal(&Fingerprint::of(&Unpacked::new(&back, "latest")?.path())?)
}

#[test]
fn buildah_pulls_and_pushes() -> Result<()> {
    let dir = TempDir::new()?;
    let server = Server::start(&dir.path().join("registry"), &[])?;
    let layout = images::image("nginx")?;
    let (here, there) = (server.push(&layout, "team/nginx:v1")?, server.image("other/nginx:v2"));
    let policy = dir.path().join("policy.json");
    std::fs::write(&policy, r#"{ "default": [{ "type": "insecureAcceptAnything" }] }"#)?;
    let buildah = |verb: &str, arguments: &[&str]| {
        let mut buildah = Command::new("buildah");
        buildah.arg("--root").arg(dir.path().join("storage")).arg("--runroot").arg(dir.path().join("run"));
        buildah.args(["--storage-driver", "vfs", verb, "--tls-verify=false", "--signature-policy"]);
        command::output(buildah.arg(&policy).args(arguments))
    };
    buildah("pull", &[&format!("docker://{here}")])?;
    buildah("push", &[&here, &format!("docker://{there}")])?;
    let inspect =
        |image: &str| skopeo(&["inspect", "--config", "--tls-verify=false", &format!("docker://{image}")]);
    let (pushed, original): (Value, Value) =
        (serde_json::from_str(&inspect(&there)?)?, serde_json::from_str(&inspect(&here)?)?);
    assert_eq!(pushed["rootfs"], original["rootfs"]);
    Ok(())
}

#[test]
fn tdfs_records_into_it_and_starts_from_it() -> Result<()> {
    let dir = TempDir::new()?;
    let server = Server::start(&dir.path().join("registry"), &[])?;
    let image = server.push(&images::image("nginx")?, "team/nginx:latest")?;
    let service = &images::recipe("nginx")?.services[0];
    let state = |name: &str| dir.path().join(name).display().to_string();
    tdfs::json([
        "record",
        &image,
        "--service",
        service.name,
        "--push",
        "--ready",
        service.ready,
        "--state",
        &state("recorder"),
    ])?;
    let run = ["run", &image, "--exit-when-ready", "--network", "private", "--state", &state("node")];
    let run = run.into_iter().chain(["--start", "fetched"]);
    let cold = tdfs::json(run.clone())?;
    assert!(cold["data_requests"] == 1 && cold["pages_fetched"] == cold["pages_needed"], "{cold}");
    let warm = tdfs::json(run)?;
    assert!(warm["source"] == "resident" && warm["data_requests"] == 0, "{warm}");
    Ok(())
}
