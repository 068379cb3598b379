//! Users, TLS, limits, what is logged and counted.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use reqwest::Method;
use serde_json::Value;
use tdfs_common::digest::Digest;
use tdfs_tests::server::Server;
use tempfile::TempDir;
use xtask::command;

use super::client::{Client, noise};

#[tokio::test]
async fn users_push_and_everybody_pulls() -> Result<()> {
    let dir = TempDir::new()?;
    let users = dir.path().join("users");
    let hashed = command::output(Command::new("htpasswd").args(["-nbB", "me", "secret"]))?;
    std::fs::write(&users, hashed)?;
    let (root, users) = (dir.path().join("root"), users.display().to_string());
    for anonymous in [false, true] {
        let mut arguments = vec!["--htpasswd", users.as_str()];
        arguments.extend(anonymous.then_some("--anonymous-pull"));
        let server = Server::start(&root, &arguments)?;
        let client = Client::new(&server);
        let digest = Digest::of(b"x");
        let upload = format!("/v2/a/blobs/uploads/?digest={digest}");
        let push = || client.request(Method::POST, &upload).body("x");
        client.send(push().basic_auth("me", Some("secret"))).await?.expect(201)?;
        for wrong in
            [push(), push().basic_auth("me", Some("wrong")), push().basic_auth("you", Some("secret"))]
        {
            let answer = client.send(wrong).await?;
            answer.refused(401, "UNAUTHORIZED")?;
            ensure!(answer.header("www-authenticate").starts_with("Basic realm="), "{answer:?}");
        }
        for (method, path) in [
            (Method::PUT, "/v2/a/manifests/t".to_owned()),
            (Method::DELETE, "/v2/a/manifests/t".to_owned()),
            (Method::DELETE, format!("/v2/a/blobs/{digest}")),
            (Method::PATCH, "/v2/a/blobs/uploads/00000000000000000000000000000000".to_owned()),
            (Method::GET, "/v2/".to_owned()),
        ] {
            client.ask(method, &path).await?.refused(401, "UNAUTHORIZED")?;
        }
        let pulled = client.get(&format!("/v2/a/blobs/{digest}")).await?;
        ensure!(pulled.status == if anonymous { 200 } else { 401 }, "{pulled:?}");
        client.get("/healthz").await?.expect(200)?;
        client.get("/metrics").await?.expect(200)?;
        let credentials = ["--creds", "me:secret"];
        let there = format!("docker://{}", server.image("team/x:1"));
        let layout = tdfs_tests::images::image("nginx")?;
        let source = format!("oci:{}:latest", layout.display());
        let skopeo = |arguments: &[&str]| {
            command::output(Command::new("skopeo").arg("--insecure-policy").args(arguments))
        };
        let with = [
            &["copy", "--quiet", "--dest-tls-verify=false", "--dest-creds", "me:secret"][..],
            &[&source, &there],
        ];
        skopeo(&with.concat())?;
        let without = [&["inspect", "--tls-verify=false"][..], &[&there]].concat();
        ensure!(skopeo(&without).is_ok() == anonymous);
        skopeo(&[&["inspect", "--tls-verify=false"][..], &credentials[..], &[&there]].concat())?;
    }
    Ok(())
}

#[tokio::test]
async fn tls_and_read_only() -> Result<()> {
    let dir = TempDir::new()?;
    let root = dir.path().join("root");
    let server = Server::start(&root, &[])?;
    let digest = Client::new(&server).push_blob("a", &noise(100, 1)).await?;
    drop(server);
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&certificate, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    let (certificate, key) = (certificate.display().to_string(), key.display().to_string());
    let server = Server::start(&root, &["--tls-cert", &certificate, "--tls-key", &key, "--read-only"])?;
    let trusted = reqwest::Certificate::from_pem(made.cert.pem().as_bytes())?;
    let client = Client::at(&format!("https://127.0.0.1:{}", server.addr.port()), &[trusted]);
    let path = format!("/v2/a/blobs/{digest}");
    ensure!(client.get(&path).await?.expect(200)?.body == noise(100, 1));
    client.head(&path).await?.expect(200)?;
    for (method, path) in
        [(Method::POST, "/v2/a/blobs/uploads/"), (Method::PUT, "/v2/a/manifests/t"), (Method::DELETE, &path)]
    {
        client.ask(method, path).await?.refused(405, "UNSUPPORTED")?;
    }
    ensure!(Client::new(&server).get(&path).await.is_err(), "no plain HTTP where TLS is spoken");
    Ok(())
}

#[tokio::test]
async fn requests_are_logged_and_counted() -> Result<()> {
    let dir = TempDir::new()?;
    let mut server = Server::start(dir.path(), &["--metrics-listen", "127.0.0.1:0"])?;
    let client = Client::new(&server);
    let digest = client.push_blob("a", &noise(1000, 1)).await?;
    client.get(&format!("/v2/a/blobs/{digest}")).await?.expect(200)?;
    client.get("/v2/a/manifests/absent").await?.expect(404)?;
    client.get("/metrics").await?.expect(404)?;
    let metrics = server.report["metrics_listen"].as_str().context("no address")?.to_owned();
    let text = client.get(&format!("http://{metrics}/metrics")).await?.expect(200)?.body;
    let text = String::from_utf8_lossy(&text).into_owned();
    for line in [
        r#"tdfs_registry_requests_total{method="GET",status="200"} 1"#,
        r#"tdfs_registry_requests_total{method="POST",status="201"} 1"#,
        "tdfs_registry_received_bytes_total 1000",
    ] {
        ensure!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    // Stopped, so that the log is whole.
    ensure!(server.stop(Signal::SIGTERM)?.success());
    let log = server.log();
    let requests: Vec<Value> = log.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let got = requests.iter().find(|r| r["method"] == "GET" && r["status"] == 200).context("no line")?;
    ensure!(got["path"] == format!("/v2/a/blobs/{digest}") && got["bytes"] == 1000, "{got}");
    ensure!(
        got["complete"] == true && got["remote"].as_str().unwrap_or_default().starts_with("127."),
        "{got}"
    );
    ensure!(got["time"].as_str().unwrap_or_default().ends_with('Z') && got["seconds"].is_number(), "{got}");
    let pushed = requests.iter().find(|r| r["method"] == "POST").context("no line")?;
    ensure!(pushed["received"] == 1000 && pushed["status"] == 201, "{pushed}");
    Ok(())
}

#[test]
fn as_many_files_may_be_open_as_the_system_allows() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    ensure!(hard > 256);
    // Servers inherit it; this process runs this test alone.
    setrlimit(Resource::RLIMIT_NOFILE, 256, hard)?;
    let dir = TempDir::new()?;
    let server = Server::start(dir.path(), &[])?;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid()))?;
    let files = limits.lines().find(|line| line.starts_with("Max open files")).context("no such line")?;
    let soft = files.split_whitespace().nth(3).context("no number")?;
    ensure!(soft.parse::<u64>()? == hard, "{files}");
    Ok(())
}

#[tokio::test]
async fn running_requests_are_finished() -> Result<()> {
    let dir = TempDir::new()?;
    let mut server = Server::start(dir.path(), &[])?;
    let client = Client::new(&server);
    let blob = noise(1 << 20, 1);
    let digest = Digest::of(&blob);
    let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(1);
    let body = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|bytes| (Ok::<_, std::io::Error>(bytes), receiver))
    });
    let request = client.request(Method::POST, &format!("/v2/a/blobs/uploads/?digest={digest}"));
    let request = request.body(reqwest::Body::wrap_stream(body));
    let sending = tokio::spawn({
        let client = client.clone();
        async move { client.send(request).await }
    });
    sender.send(blob.slice(..1000)).await?;
    sender.send(blob.slice(1000..2000)).await?;
    // It and the request that asks.
    let both = "tdfs_registry_running_requests 2\n";
    while !String::from_utf8_lossy(&client.get("/metrics").await?.expect(200)?.body).contains(both) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    kill(server.pid(), Signal::SIGTERM)?;
    // It takes no new connections from now on.
    while TcpStream::connect(server.addr).is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    sender.send(blob.slice(2000..)).await?;
    drop(sender);
    sending.await??.expect(201)?;
    ensure!(server.stop(Signal::SIGTERM).map_or(true, |status| status.success()));
    Ok(())
}

/// What comes back for these bytes until the server closes the connection.
fn raw(address: SocketAddr, request: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    // The server may refuse before it has everything.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn hostile_requests_are_refused() -> Result<()> {
    let dir = TempDir::new()?;
    std::fs::write(dir.path().join("secret"), "secret")?;
    let server = Server::start(&dir.path().join("root"), &[])?;
    let get = |target: &str, headers: &str| {
        raw(
            server.addr,
            format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n").as_bytes(),
        )
    };
    for target in [
        "/v2/../../secret",
        "/../secret",
        "/v2/%2e%2e/%2e%2e/secret/manifests/x",
        "/v2/a/manifests/..%2f..%2f..%2fsecret",
        "/v2/a/blobs/sha256:../../secret",
        "/v2/a/blobs/uploads/..%2f..%2fsecret",
        "/v2/a%00/tags/list",
        "//secret",
    ] {
        let answer = get(target, "")?;
        ensure!(answer.starts_with("HTTP/1.1 40") && !answer.contains("secret\n"), "{target}: {answer}");
    }
    let flood = "x: y\r\n".repeat(10_000);
    let wide = format!("x: {}\r\n", "y".repeat(1 << 20));
    for headers in [flood, wide] {
        let answer = get("/v2/", &headers)?;
        ensure!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
    for garbage in [&b"\0\0\0\0"[..], b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", &[0xff; 1000]] {
        let answer = raw(server.addr, garbage)?;
        ensure!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    // A body that is not what it says.
    let upload = "POST /v2/a/blobs/uploads/?digest=sha256:00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
    let answer = raw(server.addr, format!("{upload}Transfer-Encoding: chunked\r\n\r\nZZ\r\n").as_bytes())?;
    ensure!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    Client::new(&server).get("/v2/").await?.expect(200)?;
    Ok(())
}
