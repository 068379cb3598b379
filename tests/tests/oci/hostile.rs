//! Servers that break, lie, stall or send us elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;
use crate::server::{End, Reply, Seen, Server};

fn fast() -> ClientOptions {
    ClientOptions { backoff: Duration::from_millis(1), ..ClientOptions::default() }
}

fn store(server: &Server) -> Store {
    open(&server.image("a/b:v1"), &fast()).1
}

/// Where the blob requests started.
fn starts(server: &Server) -> Vec<Option<usize>> {
    server.seen().iter().map(|s| s.range().map(|(first, _)| first)).collect()
}

async fn range_error(reply: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> (OciError, Requests, usize) {
    let blob = noise(100_000, 1);
    let server = Server::start(reply).await;
    let store = store(&server);
    let error = match store.blob_range(&Digest::of(&blob), 100_000, 10_000..20_000).await {
        Ok(stream) => collect(stream).await.unwrap_err(),
        Err(e) => e,
    };
    (error, store.requests(), server.seen().len())
}

#[tokio::test]
async fn broken_download_goes_on_where_it_broke() {
    let blob = noise(100_000, 1);
    let content = blob.clone();
    // Every connection breaks after 30,000 bytes.
    let server = Server::start(move |seen| {
        let reply = Reply::blob(seen, &content);
        let sent = reply.body.len().min(30_000);
        let end = if sent < reply.body.len() { End::Close } else { End::Regular };
        reply.ending(sent, end)
    })
    .await;
    let descriptor = Descriptor::of(LAYER_TYPE, &blob);
    let whole = store(&server);
    assert_eq!(collect(whole.blob_stream(&descriptor).await.unwrap()).await.unwrap(), blob);
    assert_eq!(starts(&server), [None, Some(30_000), Some(60_000), Some(90_000)]);
    assert_eq!(
        whole.requests(),
        Requests { metadata_requests: 0, data_requests: 4, bytes_received: 100_000 }
    );

    let part = store(&server);
    let range = part.blob_range(&descriptor.digest, 100_000, 5_000..95_000).await.unwrap();
    assert_eq!(collect(range).await.unwrap(), blob.slice(5_000..95_000));
    assert_eq!(starts(&server)[4..], [Some(5_000), Some(35_000), Some(65_000)]);
}

#[tokio::test]
async fn download_without_progress_is_given_up() {
    let blob = noise(1000, 1);
    let content = blob.clone();
    let server = Server::start(move |seen| Reply::blob(seen, &content).ending(0, End::Close)).await;
    let options = ClientOptions { retries: 3, ..fast() };
    let (_, store) = open(&server.image("a/b:v1"), &options);
    let stream = store.blob_stream(&Descriptor::of(LAYER_TYPE, &blob)).await.unwrap();
    let error = collect(stream).await.unwrap_err();
    assert!(matches!(error, OciError::Transport { .. }), "{error}");
    assert_eq!((server.seen().len(), store.requests().data_requests), (4, 4));
}

#[tokio::test]
async fn body_without_length_that_ends_early_is_resumed() {
    let blob = noise(1000, 1);
    let content = blob.clone();
    let server = Server::start(move |seen| {
        let reply = Reply::blob(seen, &content);
        match seen.range() {
            // Neither a length nor chunks: the end of the connection is the end of the body.
            None => reply.with("connection", "close").ending(400, End::Close),
            Some(_) => reply,
        }
    })
    .await;
    let stream = store(&server).blob_stream(&Descriptor::of(LAYER_TYPE, &blob)).await.unwrap();
    assert_eq!(collect(stream).await.unwrap(), blob);
    assert_eq!(starts(&server), [None, Some(400)]);
}

#[tokio::test]
async fn range_is_refused_unless_it_is_the_one_asked_for() {
    let blob = noise(100_000, 1);
    let all = blob.clone();
    let (error, requests, asked) = range_error(move |_| Reply::new(200, all.clone())).await;
    assert!(matches!(error, OciError::Range { .. }), "{error}");
    assert!(error.to_string().contains("ignores ranges"), "{error}");
    assert_eq!((requests.bytes_received, asked), (0, 1), "aborted and not repeated");

    let right = blob.slice(10_000..20_000);
    for content_range in [
        None,
        Some("bytes 0-9999/100000"),
        Some("bytes 10000-20000/100000"),
        Some("bytes 10000-19999/100001"),
        Some("bytes */100000"),
        Some("nonsense"),
    ] {
        let body = right.clone();
        let (error, requests, _) = range_error(move |_| {
            let reply = Reply::new(206, body.clone());
            content_range.map_or(reply.clone(), |r| reply.with("content-range", r))
        })
        .await;
        assert!(matches!(error, OciError::Range { .. }), "{content_range:?}: {error}");
        assert_eq!(requests.bytes_received, 0);
    }
    let short = right.slice(..9_999);
    let (error, ..) = range_error(move |_| {
        Reply::new(206, short.clone()).with("content-range", "bytes 10000-19999/100000")
    })
    .await;
    assert!(matches!(error, OciError::Range { .. }), "{error}");
    let (error, ..) = range_error(|_| Reply::new(416, "")).await;
    assert!(matches!(error, OciError::Range { .. }), "{error}");

    // Unknown total size is legal.
    let server =
        Server::start(move |_| Reply::new(206, right.clone()).with("content-range", "bytes 10000-19999/*"))
            .await;
    let stream = store(&server).blob_range(&Digest::of(&blob), 100_000, 10_000..20_000).await.unwrap();
    assert_eq!(collect(stream).await.unwrap(), blob.slice(10_000..20_000));
}

#[tokio::test]
async fn wrong_content_is_an_error_at_the_end() {
    let (blob, other) = (noise(50_000, 1), noise(50_000, 2));
    let descriptor = Descriptor::of(LAYER_TYPE, &blob);
    let wrong = other.clone();
    let server = Server::start(move |seen| Reply::blob(seen, &wrong)).await;
    let store = store(&server);
    let mut stream = store.blob_stream(&descriptor).await.unwrap();
    let (mut bytes, mut last) = (0, None);
    while let Some(item) = stream.next().await {
        bytes += item.as_ref().map_or(0, Bytes::len);
        last = Some(item);
    }
    assert_eq!(bytes, 50_000);
    assert!(matches!(last, Some(Err(OciError::Digest { .. }))), "{last:?}");
    let error = store.blob(&descriptor, 1 << 20).await.unwrap_err();
    assert!(matches!(error, OciError::Digest { .. }), "{error}");
    let error = store.manifest(&descriptor.digest).await.unwrap_err();
    assert!(matches!(error, OciError::Digest { .. }), "{error}");
    assert_eq!(server.seen().len(), 3, "lies are not asked for twice");
    // A tag has no digest of its own, but the server names one.
    let server =
        Server::start(move |_| Reply::new(200, "{}").with("docker-content-digest", Digest::of(b"x"))).await;
    let (reference, store) = open(&server.image("a/b:v1"), &fast());
    let error = store.resolve(&reference).await.unwrap_err();
    assert!(matches!(error, OciError::Digest { .. }), "{error}");
}

#[tokio::test]
async fn too_long_and_too_short_blobs_are_errors() {
    let blob = noise(1000, 1);
    let descriptor = Descriptor::of(LAYER_TYPE, &blob);
    for served in [999usize, 1001] {
        let server = Server::start(move |_| Reply::new(200, noise(served, 1))).await;
        let store = store(&server);
        let error = match store.blob_stream(&descriptor).await {
            Ok(stream) => collect(stream).await.unwrap_err(),
            Err(e) => e,
        };
        assert!(matches!(error, OciError::Size { .. }), "{error}");
        assert!(store.blob(&descriptor, 5000).await.is_err());
    }
    // The same without an announced length, chunk by chunk.
    let mut body = b"3e9\r\n".to_vec();
    body.extend_from_slice(&noise(1001, 1));
    body.extend_from_slice(b"\r\n0\r\n\r\n");
    let server =
        Server::start(move |_| Reply::new(200, body.clone()).with("transfer-encoding", "chunked")).await;
    let store = store(&server);
    let error = collect(store.blob_stream(&descriptor).await.unwrap()).await.unwrap_err();
    assert!(matches!(error, OciError::Size { .. }), "{error}");
    assert!(matches!(store.blob(&descriptor, 5000).await, Err(OciError::TooLarge { .. })));
}

#[tokio::test]
async fn oversized_documents_are_cut_off() {
    let announced =
        Server::start(|_| Reply::new(200, "{").with("content-length", 1u64 << 40).ending(1, End::Hang)).await;
    let (reference, store) = open(&announced.image("a/b:v1"), &fast());
    assert!(matches!(store.resolve(&reference).await, Err(OciError::TooLarge { .. })));
    assert_eq!(store.requests().bytes_received, 0);
    // 8 MiB in chunks of 1 MiB, then never an end.
    let mut body = Vec::new();
    for _ in 0..8 {
        body.extend_from_slice(b"100000\r\n");
        body.resize(body.len() + (1 << 20), b' ');
        body.extend_from_slice(b"\r\n");
    }
    let endless = Server::start(move |_| {
        let len = body.len();
        Reply::new(200, body.clone()).with("transfer-encoding", "chunked").ending(len, End::Hang)
    })
    .await;
    let (reference, store) = open(&endless.image("a/b:v1"), &fast());
    assert!(matches!(store.resolve(&reference).await, Err(OciError::TooLarge { .. })));
}

#[tokio::test]
async fn hostile_documents_are_errors() {
    for body in [
        "",
        "null",
        "[]",
        "{}",
        "{\"schemaVersion\":2}",
        "<html>",
        "\u{0}",
        "{\"schemaVersion\":2,\"manifests\":[{}]}",
    ] {
        let server = Server::start(move |_| Reply::new(200, body)).await;
        let (reference, store) = open(&server.image("a/b:v1"), &fast());
        assert!(matches!(store.resolve(&reference).await, Err(OciError::Malformed { .. })), "{body:?}");
    }
    // An index that leads to an index without end.
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [] }).to_string();
    let mut documents = vec![Bytes::from(index)];
    for _ in 0..8 {
        let mut inner = Descriptor::of(INDEX_TYPE, &documents[0]);
        inner.platform = Some("linux/amd64".parse().unwrap());
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [inner] });
        documents.insert(0, index.to_string().into());
    }
    let server = Server::start(move |seen| {
        let by_digest = documents.iter().find(|d| seen.path.ends_with(&Digest::of(d).to_string()));
        Reply::new(200, by_digest.unwrap_or(&documents[0]).clone())
    })
    .await;
    let options = ClientOptions { platform: "linux/amd64".parse().unwrap(), ..fast() };
    let (reference, store) = open(&server.image("a/b:v1"), &options);
    let error = store.resolve(&reference).await.unwrap_err().to_string();
    assert!(error.contains("within each other"), "{error}");
}

#[tokio::test]
async fn hung_servers_end_as_errors() {
    let blob = noise(1000, 1);
    let content = blob.clone();
    let options = ClientOptions { idle_timeout: Duration::from_millis(100), retries: 1, ..fast() };
    let silent = Server::start(|_| Reply::new(200, "").with("content-length", 5).ending(0, End::Hang)).await;
    let (reference, store) = open(&silent.image("a/b:v1"), &options);
    assert!(matches!(store.resolve(&reference).await, Err(OciError::Idle { .. })));
    assert_eq!(silent.seen().len(), 2);
    let stalling = Server::start(move |seen| Reply::blob(seen, &content).ending(1, End::Hang)).await;
    let (_, store) = open(&stalling.image("a/b:v1"), &options);
    let stream = store.blob_stream(&Descriptor::of(LAYER_TYPE, &blob)).await.unwrap();
    assert!(matches!(collect(stream).await, Err(OciError::Idle { .. })));
    assert_eq!(starts(&stalling), [None, Some(1)]);
}

#[tokio::test]
async fn garbage_and_refused_connections_are_errors() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let (reference, store) = open(&format!("{addr}/a/b:v1"), &fast());
    let error = store.resolve(&reference).await.unwrap_err();
    assert!(matches!(error, OciError::Transport { .. }) && !error.is_not_found(), "{error}");
    assert_eq!(store.requests().metadata_requests, 6, "one attempt and five retries");
    assert!(!error.to_string().contains('\n'));

    let server = Server::start(|_| Reply::new(200, "").with("x\r\n\u{1}garbage", "")).await;
    let (reference, store) = open(&server.image("a/b:v1"), &fast());
    assert!(matches!(store.resolve(&reference).await, Err(OciError::Transport { .. })));
}

#[tokio::test]
async fn busy_servers_are_asked_again() {
    let blob = noise(1000, 1);
    let (content, calls) = (blob.clone(), AtomicUsize::new(0));
    let server = Server::start(move |seen| match calls.fetch_add(1, Ordering::Relaxed) % 4 {
        0 => Reply::new(429, r#"{"errors":[{"code":"TOOMANYREQUESTS"}]}"#).with("retry-after", 0),
        1 => Reply::new(503, "busy"),
        2 => Reply::new(500, ""),
        _ => Reply::blob(seen, &content),
    })
    .await;
    let store = store(&server);
    let descriptor = Descriptor::of(LAYER_TYPE, &blob);
    assert_eq!(store.blob(&descriptor, 1000).await.unwrap(), blob);
    assert_eq!(collect(store.blob_stream(&descriptor).await.unwrap()).await.unwrap(), blob);
    assert_eq!((store.requests().metadata_requests, store.requests().data_requests), (4, 4));

    let failing =
        Server::start(|_| Reply::new(500, r#"{"errors":[{"code":"UNKNOWN","message":"disk\nfull"}]}"#)).await;
    let (reference, store) = open(&failing.image("a/b:v1"), &fast());
    let error = store.resolve(&reference).await.unwrap_err().to_string();
    assert!(error.ends_with("500: UNKNOWN disk full"), "{error}");
    assert_eq!(failing.seen().len(), 6);
    let refusing = Server::start(|_| Reply::new(400, "no")).await;
    let (reference, store) = open(&refusing.image("a/b:v1"), &fast());
    assert!(store.resolve(&reference).await.is_err());
    assert_eq!(refusing.seen().len(), 1, "repeating a bad request does not make it better");
}

fn auth_file(dir: &Path, host: &str) -> std::path::PathBuf {
    let file = dir.join("auth.json");
    // user:pass
    std::fs::write(&file, json!({ "auths": { host: { "auth": "dXNlcjpwYXNz" } } }).to_string()).unwrap();
    file
}

fn wants_basic(seen: &Seen, reply: Reply) -> Reply {
    match seen.header("authorization") {
        Some("Basic dXNlcjpwYXNz") => reply,
        _ => Reply::new(401, "").with("www-authenticate", "Basic realm=\"x\""),
    }
}

#[tokio::test]
async fn credentials_stay_with_their_host() {
    let blob = noise(1000, 1);
    let content = blob.clone();
    let elsewhere = Server::start(move |seen| Reply::blob(seen, &content)).await;
    let target = format!("http://{}/signed?signature=hush", elsewhere.addr);
    let server =
        Server::start(move |seen| wants_basic(seen, Reply::new(307, "").with("location", &target))).await;
    let dir = tempfile::tempdir().unwrap();
    let options =
        ClientOptions { auth_file: Some(auth_file(dir.path(), &server.addr.to_string())), ..fast() };
    let (_, store) = open(&server.image("a/b:v1"), &options);
    let descriptor = Descriptor::of(LAYER_TYPE, &blob);
    assert_eq!(collect(store.blob_stream(&descriptor).await.unwrap()).await.unwrap(), blob);
    let range = store.blob_range(&descriptor.digest, 1000, 10..20).await.unwrap();
    assert_eq!(collect(range).await.unwrap(), blob.slice(10..20));
    let seen = elsewhere.seen();
    assert_eq!(seen.len(), 2);
    assert!(seen.iter().all(|s| s.header("authorization").is_none()), "{seen:?}");
    assert_eq!(seen[1].range(), Some((10, 19)));
    assert_eq!(store.requests(), Requests { metadata_requests: 3, data_requests: 2, bytes_received: 1010 });
}

#[tokio::test]
async fn host_that_was_not_asked_cannot_ask_for_credentials() {
    let greedy = Server::start(|seen| wants_basic(seen, Reply::new(500, "got them"))).await;
    let target = format!("http://{}/x?signature=hush", greedy.addr);
    let server = Server::start(move |_| Reply::new(302, "").with("location", &target)).await;
    let dir = tempfile::tempdir().unwrap();
    // Even for a host that we have credentials for: it was the other server's choice to ask it.
    let options =
        ClientOptions { auth_file: Some(auth_file(dir.path(), &greedy.addr.to_string())), ..fast() };
    let (reference, store) = open(&server.image("a/b:v1"), &options);
    let error = store.resolve(&reference).await.unwrap_err();
    assert!(matches!(error, OciError::Denied { .. }), "{error}");
    assert!(!error.to_string().contains("hush"));
    assert_eq!(greedy.seen().len(), 1);
    // Back at the own host by way of another, a request stays without credentials.
    let home = Arc::new(std::sync::OnceLock::<String>::new());
    let back = home.clone();
    let detour = Server::start(move |_| {
        Reply::new(302, "").with("location", format!("{}/chosen", back.get().unwrap()))
    })
    .await;
    let away = format!("http://{}/x", detour.addr);
    let server = Server::start(move |seen| match seen.path.as_str() {
        "/chosen" => Reply::new(404, ""),
        _ => wants_basic(seen, Reply::new(302, "").with("location", &away)),
    })
    .await;
    home.set(format!("http://{}", server.addr)).unwrap();
    let options =
        ClientOptions { auth_file: Some(auth_file(dir.path(), &server.addr.to_string())), ..fast() };
    let (reference, store) = open(&server.image("a/b:v1"), &options);
    assert!(store.resolve(&reference).await.unwrap_err().is_not_found());
    let seen = server.seen();
    assert_eq!(
        seen.iter().map(|s| s.header("authorization").is_some()).collect::<Vec<_>>(),
        [false, true, false]
    );
}

#[tokio::test]
async fn redirects_end() {
    let server = Server::start(|seen| Reply::new(302, "").with("location", &seen.path)).await;
    let (reference, store) = open(&server.image("a/b:v1"), &fast());
    let error = store.resolve(&reference).await.unwrap_err().to_string();
    assert!(error.contains("too many redirects"), "{error}");
    for target in ["file:///etc/passwd", "ftp://x/y", "http://"] {
        let server = Server::start(move |_| Reply::new(302, "").with("location", target)).await;
        let (reference, store) = open(&server.image("a/b:v1"), &fast());
        assert!(matches!(store.resolve(&reference).await, Err(OciError::Malformed { .. })), "{target}");
    }
}

#[tokio::test]
async fn token_is_fetched_once_and_again_when_it_expires() {
    let (blob, epoch) = (noise(100, 1), Arc::new(AtomicUsize::new(0)));
    let (content, now) = (blob.clone(), epoch.clone());
    let server = Server::start(move |seen| {
        let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
        if path == "/token" {
            assert_eq!(query, "service=the+service&scope=repository%3Aa%2Fb%3Apull&client_id=tdfs");
            return wants_basic(
                seen,
                Reply::new(
                    200,
                    json!({ "access_token": format!("t{}", now.load(Ordering::SeqCst)) }).to_string(),
                ),
            );
        }
        let valid = format!("Bearer t{}", now.load(Ordering::SeqCst));
        if seen.header("authorization") == Some(&valid) {
            return Reply::blob(seen, &content);
        }
        let realm = format!("http://{}/token", seen.header("host").unwrap());
        Reply::new(401, "")
            .with("www-authenticate", format!("Bearer realm=\"{realm}\",service=\"the service\""))
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let options =
        ClientOptions { auth_file: Some(auth_file(dir.path(), &server.addr.to_string())), ..fast() };
    let (_, store) = open(&server.image("a/b:v1"), &options);
    let descriptor = Descriptor::of(LAYER_TYPE, &blob);
    let tokens = |server: &Server| server.seen().iter().filter(|s| s.path.starts_with("/token")).count();
    let get = || async { store.blob(&descriptor, 100).await };
    let (a, b, c) = tokio::join!(get(), get(), get());
    assert_eq!([a.unwrap(), b.unwrap(), c.unwrap()], [blob.clone(), blob.clone(), blob.clone()]);
    assert_eq!(tokens(&server), 1, "concurrent requests share one token");
    get().await.unwrap();
    assert_eq!(tokens(&server), 1);
    epoch.fetch_add(1, Ordering::SeqCst);
    get().await.unwrap();
    assert_eq!(tokens(&server), 2);
}

#[tokio::test]
async fn identity_token_is_exchanged() {
    let server = Server::start(|seen| {
        if seen.path == "/token" {
            assert_eq!(seen.method, "POST");
            let form = String::from_utf8(seen.body.to_vec()).unwrap();
            assert!(form.contains("grant_type=refresh_token&refresh_token=re%26fresh"), "{form}");
            return Reply::new(200, r#"{"token":"short"}"#);
        }
        if seen.header("authorization") == Some("Bearer short") {
            return Reply::new(404, "");
        }
        let realm = format!("http://{}/token", seen.header("host").unwrap());
        Reply::new(401, "").with("www-authenticate", format!("Bearer realm=\"{realm}\",scope=\"a:b:c\""))
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("auth.json");
    let host = server.addr.to_string();
    std::fs::write(&file, json!({ "auths": { host: { "identitytoken": "re&fresh" } } }).to_string()).unwrap();
    let (reference, store) =
        open(&server.image("a/b:v1"), &ClientOptions { auth_file: Some(file), ..fast() });
    assert!(store.resolve(&reference).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn refusals_name_the_reason() {
    let none = ClientOptions { auth_file: Some("/nonexistent".into()), ..fast() };
    let server = Server::start(|seen| wants_basic(seen, Reply::new(200, ""))).await;
    let (reference, store) = open(&server.image("a/b:v1"), &none);
    let error = store.resolve(&reference).await.unwrap_err().to_string();
    assert!(error.contains("refuses access to a/b") && error.contains("none are configured"), "{error}");
    let forbidding =
        Server::start(|_| Reply::new(403, r#"{"errors":[{"code":"DENIED","message":"go away"}]}"#)).await;
    let (reference, store) = open(&forbidding.image("a/b:v1"), &none);
    let error = store.resolve(&reference).await.unwrap_err().to_string();
    assert!(error.contains("DENIED go away"), "{error}");
    // A token endpoint that refuses, and tokens that never satisfy.
    for (status, body) in [(401, "{}"), (200, "{}"), (200, "secret"), (200, r#"{"token":"useless"}"#)] {
        let server = Server::start(move |seen| {
            if seen.path.starts_with("/token") {
                return Reply::new(status, body);
            }
            let realm = format!("http://{}/token", seen.header("host").unwrap());
            Reply::new(401, "").with("www-authenticate", format!("Bearer realm=\"{realm}\""))
        })
        .await;
        let (reference, store) = open(&server.image("a/b:v1"), &none);
        let error = store.resolve(&reference).await.unwrap_err().to_string();
        assert!(!error.contains("secret") && !error.contains("useless"), "{error}");
        assert!(server.seen().len() <= 4, "{}", server.seen().len());
    }
}

fn referrer(name: &str, artifact_type: &str) -> Descriptor {
    Descriptor { artifact_type: Some(artifact_type.into()), ..Descriptor::of(MANIFEST_TYPE, name.as_bytes()) }
}

fn list(referrers: &[Descriptor]) -> String {
    json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": referrers }).to_string()
}

#[tokio::test]
async fn referrers_are_listed_over_pages_and_filtered() {
    let subject = Digest::of(b"subject");
    let server = Server::start(|seen| {
        assert!(seen.path.starts_with("/v2/a/b/referrers/sha256:"), "{}", seen.path);
        if seen.path.contains("page=2") {
            // What leads elsewhere is not followed.
            Reply::new(200, list(&[referrer("3", ARTIFACT_TYPE), referrer("1", ARTIFACT_TYPE)]))
                .with("link", "<http://127.0.0.1:1/x>; rel=\"next\"")
        } else {
            Reply::new(200, list(&[referrer("1", ARTIFACT_TYPE), referrer("2", "other/type")]))
                .with("link", format!("<{}&page=2>; rel=\"next\"", seen.path))
        }
    })
    .await;
    let found = store(&server).referrers(&subject, Some(ARTIFACT_TYPE)).await.unwrap();
    assert_eq!(found, [referrer("1", ARTIFACT_TYPE), referrer("3", ARTIFACT_TYPE)]);
    // Pages without end.
    let server = Server::start(|seen| {
        Reply::new(200, list(&[])).with("link", format!("<{}>; rel=\"next\"", seen.path))
    })
    .await;
    assert_eq!(store(&server).referrers(&subject, None).await.unwrap(), []);
    assert_eq!(server.seen().len(), 256);
}

#[tokio::test]
async fn referrers_fall_back_to_the_tag() {
    let subject = Digest::of(b"subject");
    let tag = format!("/v2/a/b/manifests/sha256-{}", subject.hex());
    for (status, body, media_type) in [
        (404, "404 page not found", "text/plain"),
        (405, "", "text/plain"),
        (200, "<html>", "text/html; charset=utf-8"),
    ] {
        let tag = tag.clone();
        let server = Server::start(move |seen| {
            if seen.path == tag {
                Reply::new(200, list(&[referrer("1", ARTIFACT_TYPE), referrer("2", "other/type")]))
            } else {
                Reply::new(status, body).with("content-type", media_type)
            }
        })
        .await;
        let found = store(&server).referrers(&subject, Some(ARTIFACT_TYPE)).await.unwrap();
        assert_eq!(found, [referrer("1", ARTIFACT_TYPE)]);
    }
    // Not being allowed, or a failure, is no absence.
    for status in [403, 500] {
        let server = Server::start(move |_| Reply::new(status, "")).await;
        assert!(store(&server).referrers(&subject, None).await.is_err(), "{status}");
    }
    let hostile = Server::start(|_| Reply::new(200, "[]")).await;
    assert!(store(&hostile).referrers(&subject, None).await.is_err());
}

#[tokio::test]
async fn registry_that_indexes_subjects_needs_no_list() {
    let subject = Descriptor::of(MANIFEST_TYPE, b"subject");
    let digest = subject.digest;
    let server = Server::start(move |seen| match seen.method.as_str() {
        "HEAD" => Reply::new(200, ""),
        _ => Reply::new(201, "").with("oci-subject", digest),
    })
    .await;
    push_artifact(&store(&server), &subject, "x").await.unwrap();
    let puts: Vec<_> = server.seen().into_iter().filter(|s| s.method == "PUT").collect();
    assert_eq!(puts.len(), 1);
    assert!(puts[0].path.starts_with("/v2/a/b/manifests/sha256:"));
}

#[tokio::test]
async fn uploads_survive_failures_and_keep_credentials_home() {
    let blob = noise(1000, 1);
    let storage = Server::start(|_| Reply::new(201, "")).await;
    let target = format!("http://{}/put?state=s", storage.addr);
    let posts = AtomicUsize::new(0);
    let server = Server::start(move |seen| {
        let reply = match seen.method.as_str() {
            "HEAD" => Reply::new(404, ""),
            "POST" if posts.fetch_add(1, Ordering::Relaxed) < 2 => Reply::new(503, ""),
            _ => Reply::new(202, "").with("location", &target),
        };
        wants_basic(seen, reply)
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let options =
        ClientOptions { auth_file: Some(auth_file(dir.path(), &server.addr.to_string())), ..fast() };
    let (_, store) = open(&server.image("a/b:v1"), &options);
    store.push_blob(blob.clone(), &Digest::of(&blob)).await.unwrap();
    let seen = storage.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].body, blob);
    assert!(seen[0].header("authorization").is_none());
    assert!(seen[0].path.starts_with("/put?state=s&digest=sha256%3A"), "{}", seen[0].path);
    let lost = Server::start(|seen| Reply::new(if seen.method == "HEAD" { 404 } else { 202 }, "")).await;
    let error =
        open(&lost.image("a/b:v1"), &fast()).1.push_blob(blob.clone(), &Digest::of(&blob)).await.unwrap_err();
    assert!(error.to_string().contains("without a place"), "{error}");
}

#[tokio::test]
async fn mirrors_come_first_and_the_registry_last() {
    let (blob, other) = (noise(1000, 1), noise(1000, 2));
    let (right, wrong) = (blob.clone(), other.clone());
    let dead = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let lying = Server::start(move |seen| Reply::blob(seen, &wrong)).await;
    let empty = Server::start(|_| Reply::new(404, "")).await;
    let origin = Server::start(move |seen| {
        if seen.path.contains("blobs") {
            Reply::blob(seen, &right)
        } else {
            Reply::new(200, list(&[referrer("1", ARTIFACT_TYPE)]))
        }
    })
    .await;
    let mirrors = vec![dead.to_string(), format!("http://{}", lying.addr), empty.addr.to_string()];
    let options = ClientOptions { mirrors: [(origin.addr.to_string(), mirrors)].into(), ..fast() };
    let (_, store) = open(&origin.image("a/b:v1"), &options);
    let descriptor = Descriptor::of(LAYER_TYPE, &blob);
    for _ in 0..2 {
        assert_eq!(store.blob(&descriptor, 1000).await.unwrap(), blob);
    }
    // The dead mirror was tried once.
    assert_eq!(store.requests().metadata_requests, 1 + 2 * 3);
    assert_eq!((lying.seen().len(), empty.seen().len(), origin.seen().len()), (2, 2, 2));
    // Referrers: the empty mirror's list is not the last word.
    let just_empty =
        ClientOptions { mirrors: [(origin.addr.to_string(), vec![empty.addr.to_string()])].into(), ..fast() };
    let (_, store) = open(&origin.image("a/b:v1"), &just_empty);
    assert_eq!(store.referrers(&descriptor.digest, None).await.unwrap(), [referrer("1", ARTIFACT_TYPE)]);
    assert!(store.has_blob(&descriptor.digest).await.unwrap());
    let range = store.blob_range(&descriptor.digest, 1000, 5..10).await.unwrap();
    assert_eq!(collect(range).await.unwrap(), blob.slice(5..10));
}
