//! Through a real registry, with the tools that people use beside tdfs.

use std::net::TcpStream;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tdfs_tests::images::{self, recipe};
use tdfs_tests::registry::{Options, Registry};
use tdfs_tests::tdfs::{self, Running};
use xtask::containerd::Containerd;
use xtask::network::Place;

use crate::{expect_clean, number, run, show, text, tool};

const PLAIN: [&str; 3] = ["--insecure-policy", "--src-tls-verify=false", "--dest-tls-verify=false"];

fn copy(from: &str, to: &str) -> Result<()> {
    tool("skopeo", &[&["copy"], &PLAIN[..], &[from, to]].concat()).map(drop)
}

/// Pushes the real image and records its services into the registry.
pub fn pushed(registry: &Registry, name: &str, state: &std::path::Path) -> Result<String> {
    let image = registry.image(&format!("{name}:latest"));
    copy(&format!("oci:{}:latest", images::image(name)?.display()), &format!("docker://{image}"))?;
    let services = recipe(name)?.services;
    for service in services {
        let mut arguments = text(["record", &image, "--service", service.name, "--group", "g", "--push"]);
        arguments.extend(text(["--ready", service.ready, "--state"]));
        arguments.push(show(state));
        if service.name != services[0].name {
            arguments.push("--".into());
            arguments.extend(service.command.iter().map(|c| (*c).to_owned()));
        }
        tdfs::json(arguments)?;
    }
    Ok(image)
}

#[test]
fn the_image_stays_as_it_was_and_its_runtime_images_coexist() -> Result<()> {
    let registry = Registry::start(&Options::default())?;
    let dir = tempfile::tempdir()?;
    let image = pushed(&registry, "python", &dir.path().join("recorder"))?;
    let layout = images::image("python")?;
    let index: Value = serde_json::from_slice(&std::fs::read(layout.join("index.json"))?)?;
    let digest = index["manifests"][0]["digest"].as_str().context("no digest")?;
    let seen = tool(
        "skopeo",
        &["inspect", "--tls-verify=false", "--format={{.Digest}}", &format!("docker://{image}")],
    )?;
    ensure!(seen.trim() == digest, "the image's digest changed: {seen} {digest}");

    let (whole, artifacts) = (dir.path().join("whole"), dir.path().join("artifacts"));
    std::fs::create_dir(&artifacts)?;
    copy(&format!("docker://{image}"), &format!("oci:{}:latest", whole.display()))?;
    let containerd = Containerd::start(dir.path(), &Place::here())?;
    containerd.start_service(&image, &recipe("python")?.services[0]).context("containerd")?;
    let inspected = tdfs::json(["inspect", &image, "--state", &show(&dir.path().join("node"))])?;
    let runtime_images = inspected["runtime_images"].as_array().context("none")?;
    ensure!(runtime_images.len() == 2 && inspected["image"] == digest, "{inspected}");
    let repository = image.trim_end_matches(":latest");
    for runtime_image in runtime_images {
        let manifest = runtime_image["manifest"].as_str().context("no manifest")?;
        let to = artifacts.join(runtime_image["service"].as_str().context("no name")?);
        copy(&format!("docker://{repository}@{manifest}"), &format!("oci:{}:artifact", to.display()))?;
    }
    let node = dir.path().join("node");
    for service in ["http", "tls"] {
        let report = run(&image, &node, &["--service", service, "--start", "fetched"])?;
        ensure!(report["service"] == service && number(&report, "data_requests")? == 1, "{report}");
    }
    expect_clean(&node)
}

#[test]
fn the_registry_sees_one_request_for_a_segment_and_none_the_second_time() -> Result<()> {
    let registry = Registry::start(&Options::default())?;
    let dir = tempfile::tempdir()?;
    let image = pushed(&registry, "nginx", &dir.path().join("recorder"))?;
    let node = dir.path().join("node");
    let inspected = tdfs::json(["inspect", &image, "--state", &show(&dir.path().join("other"))])?;
    let segments = inspected["runtime_images"][0]["segments"].as_array().context("no segments")?;
    ensure!(segments.len() == 1, "{inspected}");
    let blob = format!("/blobs/{}", segments[0]["digest"].as_str().context("no digest")?);
    let asked = || registry.logged(&blob);
    let before = asked();

    let cold = run(&image, &node, &["--start", "fetched"])?;
    ensure!(cold["source"] == "fetched" && number(&cold, "data_requests")? == 1, "{cold}");
    ensure!(number(&cold, "bytes_fetched")? == number(&segments[0], "bytes")?, "{cold}");
    let all = registry.logged("/v2/");
    ensure!(asked() > before, "the registry logs requests for blobs: {blob}");
    let per_request = asked() - before;

    let warm = run(&image, &node, &[])?;
    ensure!(number(&warm, "data_requests")? + number(&warm, "metadata_requests")? == 0, "{warm}");
    ensure!(asked() - before == per_request && registry.logged("/v2/") == all, "a second start asks nobody");

    // By digest and anew, the registry is asked for metadata only.
    let anew = run(&image, &node, &["--pull", "always"])?;
    ensure!(number(&anew, "metadata_requests")? > 0 && number(&anew, "data_requests")? == 0, "{anew}");
    ensure!(asked() - before == per_request);
    expect_clean(&node)
}

#[test]
fn a_service_goes_on_when_its_registry_is_gone() -> Result<()> {
    let mut registry = Registry::start(&Options::default())?;
    let dir = tempfile::tempdir()?;
    let image = pushed(&registry, "nginx", &dir.path().join("recorder"))?;
    let node = dir.path().join("node");
    let mut arguments = text(["run", &image, "--network", "host", "--state"]);
    arguments.push(show(&node));
    let running = Running::start(arguments)?;
    registry.kill();
    for _ in 0..20 {
        use std::io::{Read as _, Write as _};
        let mut stream = TcpStream::connect(("127.0.0.1", 80))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let status = running.stop(Signal::SIGTERM)?;
    ensure!(status.code().is_some(), "{status}");
    expect_clean(&node)?;
    // And it starts again, from what is here.
    let again = run(&image, &node, &[])?;
    ensure!(again["source"] == "resident", "{again}");
    Ok(())
}

#[test]
fn errors_are_one_clear_line() -> Result<()> {
    let registry = Registry::start(&Options::default())?;
    let dir = tempfile::tempdir()?;
    let state = show(&dir.path().join("node"));
    let missing = tdfs::error(["run", &registry.image("nothing:here"), "--state", &state])?;
    ensure!(missing.contains("not found") && missing.contains("nothing"), "{missing}");
    let nobody = tdfs::error(["run", "127.0.0.1:1/x:y", "--state", &state])?;
    ensure!(nobody.contains("127.0.0.1:1"), "{nobody}");
    let no_layout = tdfs::error(["run", "oci:/nowhere/at/all", "--state", &state])?;
    ensure!(no_layout.contains("/nowhere/at/all"), "{no_layout}");
    let nginx = format!("oci:{}", images::image("nginx")?.display());
    let late = tdfs::error([
        "record",
        &nginx,
        "--service",
        "s",
        "--ready",
        "tcp:9",
        "--timeout",
        "2s",
        "--state",
        &state,
    ])?;
    ensure!(late.contains("not ready after 2 s") && late.contains("tcp:9"), "{late}");
    let dead = tdfs::error([
        "record",
        &nginx,
        "--service",
        "s",
        "--ready",
        "tcp:9",
        "--state",
        &state,
        "--",
        "false",
    ])?;
    ensure!(dead.contains("exit code 1"), "{dead}");
    let no_program = tdfs::error(["run", &nginx, "--state", &state, "--", "no-such-program"])?;
    ensure!(no_program.contains("no-such-program"), "{no_program}");
    expect_clean(&dir.path().join("node"))
}
