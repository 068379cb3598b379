//! Other people's clients.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use nix::sys::signal::Signal;
use tdfs_tests::images;
use tdfs_tests::server::Server;
use tempfile::TempDir;
use xtask::command;

use super::client::Client;

fn skopeo(arguments: &[&str]) -> Result<String> {
    command::output(Command::new("skopeo").arg("--insecure-policy").args(arguments))
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
    let there = format!("docker://{}", server.image("team/nginx:v1"));
    for round in 0..3 {
        skopeo(&["copy", "--quiet", "--dest-tls-verify=false", &source, &there])?;
        let back = dir.path().join(format!("back-{round}"));
        let target = format!("oci:{}:latest", back.display());
        skopeo(&["copy", "--quiet", "--src-tls-verify=false", &there, &target])?;
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
