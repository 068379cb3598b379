//! The distribution specification (1.1), rule by rule.

use anyhow::{Result, ensure};
use bytes::Bytes;
use reqwest::Method;
use serde_json::{Value, json};
use tdfs_common::digest::Digest;
use tdfs_tests::server::Server;
use tempfile::TempDir;

use super::client::{
    CONFIG_TYPE, Client, INDEX_TYPE, LAYER_TYPE, MANIFEST_TYPE, descriptor, manifest, noise,
};

/// A server over an empty directory.
struct Fresh {
    client: Client,
    _server: Server,
    dir: TempDir,
}

fn fresh() -> Result<Fresh> {
    let dir = TempDir::new()?;
    let server = Server::start(dir.path(), &[])?;
    Ok(Fresh { client: Client::new(&server), _server: server, dir })
}

#[tokio::test]
async fn base_says_that_this_is_a_registry() -> Result<()> {
    let f = fresh()?;
    let answer = f.client.get("/v2/").await?.expect(200)?;
    ensure!(answer.header("docker-distribution-api-version") == "registry/2.0", "{answer:?}");
    f.client.get("/healthz").await?.expect(200)?;
    f.client.get("/v3/").await?.refused(404, "UNSUPPORTED")?;
    let answer = f.client.ask(Method::POST, "/v2/a/tags/list").await?;
    answer.refused(405, "UNSUPPORTED")?;
    ensure!(answer.header("allow") == "GET, HEAD", "{answer:?}");
    Ok(())
}

#[tokio::test]
async fn blobs_are_pushed_in_every_way() -> Result<()> {
    let f = fresh()?;
    let blob = noise(20 << 20, 1);
    let digest = Digest::of(&blob);
    let path = |name: &str| format!("/v2/{name}/blobs/{digest}");
    let stored = async |name: &str| -> Result<()> {
        let head = f.client.head(&path(name)).await?.expect(200)?;
        ensure!(head.header("content-length") == blob.len().to_string(), "{head:?}");
        ensure!(head.header("docker-content-digest") == digest.to_string(), "{head:?}");
        let got = f.client.get(&path(name)).await?.expect(200)?;
        ensure!(got.body == blob, "{name}: {} bytes came back", got.body.len());
        ensure!(got.header("content-length") == blob.len().to_string(), "{name}");
        Ok(())
    };
    // POST, then PUT with everything.
    let location = f.client.begin("a/put").await?;
    let answer = f.client.finish(&location, &digest.to_string(), blob.clone()).await?.expect(201)?;
    ensure!(answer.header("location") == path("a/put"), "{answer:?}");
    stored("a/put").await?;
    f.client.get(&location).await?.refused(404, "BLOB_UPLOAD_UNKNOWN")?;
    // One POST.
    let post = f.client.request(Method::POST, &format!("/v2/a/post/blobs/uploads/?digest={digest}"));
    f.client.send(post.body(blob.clone())).await?.expect(201)?;
    stored("a/post").await?;
    // One PATCH without a place, as docker does it, then PUT without a body.
    let location = f.client.begin("a/patch").await?;
    let answer = f.client.patch(&location, None, blob.clone()).await?.expect(202)?;
    ensure!(answer.header("range") == format!("0-{}", blob.len() - 1), "{answer:?}");
    let digest_text = digest.to_string();
    f.client.finish(answer.header("location"), &digest_text, Bytes::new()).await?.expect(201)?;
    stored("a/patch").await?;
    // Pieces, the last one with the PUT.
    let mut location = f.client.begin("a/pieces").await?;
    for (from, to) in [(0, 100), (100, 9_000_000), (9_000_000, 9_000_001)] {
        let range = format!("{from}-{}", to - 1);
        let answer = f.client.patch(&location, Some(&range), blob.slice(from..to)).await?.expect(202)?;
        ensure!(answer.header("range") == format!("0-{}", to - 1), "{answer:?}");
        location = answer.header("location").to_owned();
        let status = f.client.get(&location).await?.expect(204)?;
        ensure!(status.header("range") == format!("0-{}", to - 1), "{status:?}");
    }
    let request = f.client.request(Method::PUT, &format!("{location}?digest={digest}"));
    let request = request.header("content-range", format!("9000001-{}", blob.len() - 1));
    f.client.send(request.body(blob.slice(9_000_001..))).await?.expect(201)?;
    stored("a/pieces").await?;
    // Nothing at all.
    f.client.push_blob("a/empty", &Bytes::new()).await?;
    let empty = f.client.get(&format!("/v2/a/empty/blobs/{}", Digest::of(b""))).await?.expect(200)?;
    ensure!(empty.body.is_empty());
    // All of this is stored once, and no session is left.
    let blobs = walkdir::WalkDir::new(f.dir.path().join("blobs")).into_iter().flatten();
    ensure!(blobs.filter(|e| e.file_type().is_file()).count() == 2);
    let left = walkdir::WalkDir::new(f.dir.path().join("uploads")).into_iter().flatten();
    ensure!(left.filter(|e| e.file_type().is_file()).count() == 0);
    Ok(())
}

#[tokio::test]
async fn pieces_come_in_order() -> Result<()> {
    let f = fresh()?;
    let blob = noise(1000, 2);
    let location = f.client.begin("a").await?;
    let status = f.client.get(&location).await?.expect(204)?;
    ensure!(status.header("range") == "0-0" && status.header("location") == location, "{status:?}");
    f.client.patch(&location, Some("0-99"), blob.slice(..100)).await?.expect(202)?;
    for range in ["0-99", "50-149", "101-200"] {
        let from: usize = range.split('-').next().unwrap().parse()?;
        let answer = f.client.patch(&location, Some(range), blob.slice(from..from + 100)).await?;
        answer.refused(416, "BLOB_UPLOAD_INVALID")?;
        ensure!(answer.header("range") == "0-99" && answer.header("location") == location, "{answer:?}");
    }
    for (range, code) in [
        ("100-", "BLOB_UPLOAD_INVALID"),
        ("bytes 100-199/1000", "BLOB_UPLOAD_INVALID"),
        ("100-150", "SIZE_INVALID"),
    ] {
        f.client.patch(&location, Some(range), blob.slice(100..200)).await?.refused(400, code)?;
    }
    ensure!(f.client.get(&location).await?.header("range") == "0-99", "what was refused is not there");
    f.client.patch(&location, Some("100-999"), blob.slice(100..)).await?.expect(202)?;
    f.client.finish(&location, &Digest::of(&blob).to_string(), Bytes::new()).await?.expect(201)?;
    Ok(())
}

#[tokio::test]
async fn what_has_another_digest_is_not_stored() -> Result<()> {
    let f = fresh()?;
    let (blob, other) = (noise(9 << 20, 3), Digest::of(b"other"));
    let location = f.client.begin("a").await?;
    f.client.finish(&location, &other.to_string(), blob.clone()).await?.refused(400, "DIGEST_INVALID")?;
    let post = f.client.request(Method::POST, &format!("/v2/a/blobs/uploads/?digest={other}"));
    f.client.send(post.body(blob.clone())).await?.refused(400, "DIGEST_INVALID")?;
    let location = f.client.begin("a").await?;
    f.client.patch(&location, None, blob.clone()).await?.expect(202)?;
    f.client.finish(&location, &other.to_string(), Bytes::new()).await?.refused(400, "DIGEST_INVALID")?;
    f.client.head(&format!("/v2/a/blobs/{other}")).await?.expect(404)?;
    for bad in
        ["", "sha256:", "sha512:00", "sha256:../../../etc/passwd", "md5:d41d8cd98f00b204e9800998ecf8427e"]
    {
        f.client.finish(&location, bad, Bytes::new()).await?.refused(400, "DIGEST_INVALID")?;
        if !bad.contains('/') {
            f.client.get(&format!("/v2/a/manifests/{bad}:")).await?.refused(400, "DIGEST_INVALID")?;
        }
    }
    f.client.ask(Method::PUT, &location).await?.refused(400, "DIGEST_INVALID")?;
    // The right one still works: nothing was lost.
    f.client.finish(&location, &Digest::of(&blob).to_string(), Bytes::new()).await?.expect(201)?;
    ensure!(f.client.get(&format!("/v2/a/blobs/{}", Digest::of(&blob))).await?.body == blob);
    Ok(())
}

#[tokio::test]
async fn uploads_are_cancelled_and_belong_to_their_repository() -> Result<()> {
    let f = fresh()?;
    let location = f.client.begin("a").await?;
    f.client.patch(&location, None, noise(10, 1)).await?.expect(202)?;
    let elsewhere = location.replace("/v2/a/", "/v2/b/");
    f.client.get(&elsewhere).await?.refused(404, "BLOB_UPLOAD_UNKNOWN")?;
    f.client.delete(&elsewhere).await?.refused(404, "BLOB_UPLOAD_UNKNOWN")?;
    f.client.delete(&location).await?.expect(204)?;
    f.client.get(&location).await?.refused(404, "BLOB_UPLOAD_UNKNOWN")?;
    f.client.patch(&location, None, noise(10, 1)).await?.refused(404, "BLOB_UPLOAD_UNKNOWN")?;
    f.client.get("/v2/a/blobs/uploads/nonsense").await?.refused(404, "BLOB_UPLOAD_UNKNOWN")?;
    Ok(())
}

#[tokio::test]
async fn blobs_are_mounted_from_other_repositories() -> Result<()> {
    let f = fresh()?;
    let digest = f.client.push_blob("from", &noise(100, 4)).await?;
    let mount = |from: &str, digest: &str| format!("/v2/to/blobs/uploads/?mount={digest}&from={from}");
    for (from, digest) in [
        ("nowhere", digest.to_string()),
        ("from", Digest::of(b"other").to_string()),
        ("..%2F..", digest.to_string()),
        ("from", "sha256:1".to_owned()),
    ] {
        let answer = f.client.ask(Method::POST, &mount(from, &digest)).await?.expect(202)?;
        ensure!(answer.header("location").starts_with("/v2/to/blobs/uploads/"), "{answer:?}");
    }
    let path = format!("/v2/to/blobs/{digest}");
    f.client.head(&path).await?.expect(404)?;
    let answer = f.client.ask(Method::POST, &mount("from", &digest.to_string())).await?.expect(201)?;
    ensure!(answer.header("location") == path, "{answer:?}");
    f.client.get(&path).await?.expect(200)?;
    // It goes from one and stays in the other.
    f.client.delete(&format!("/v2/from/blobs/{digest}")).await?.expect(202)?;
    f.client.get(&format!("/v2/from/blobs/{digest}")).await?.refused(404, "BLOB_UNKNOWN")?;
    f.client.delete(&format!("/v2/from/blobs/{digest}")).await?.refused(404, "BLOB_UNKNOWN")?;
    f.client.get(&path).await?.expect(200)?;
    Ok(())
}

#[tokio::test]
async fn ranges_of_blobs() -> Result<()> {
    let f = fresh()?;
    let blob = noise((1 << 20) + 7, 5);
    let size = blob.len();
    let path = format!("/v2/a/blobs/{}", f.client.push_blob("a", &blob).await?);
    let ranged =
        async |range: &str| f.client.send(f.client.request(Method::GET, &path).header("range", range)).await;
    for (range, first, last) in [
        ("bytes=0-0", 0, 0),
        ("bytes=100-1048579", 100, 1_048_579),
        ("bytes=1048576-", 1 << 20, size - 1),
        ("bytes=-7", 1 << 20, size - 1),
        ("bytes=-99999999999", 0, size - 1),
        ("bytes=5-99999999999999999999", 5, size - 1),
    ] {
        let answer = ranged(range).await?.expect(206)?;
        ensure!(answer.header("content-range") == format!("bytes {first}-{last}/{size}"), "{answer:?}");
        ensure!(answer.body == blob.slice(first..=last), "{range}");
        ensure!(answer.header("docker-content-digest") == Digest::of(&blob).to_string());
    }
    for range in [format!("bytes={size}-"), "bytes=-0".into(), "bytes=99999999999999999999-".into()] {
        let answer = ranged(&range).await?;
        answer.refused(416, "SIZE_INVALID")?;
        ensure!(answer.header("content-range") == format!("bytes */{size}"), "{answer:?}");
    }
    // Ranges that nobody has to understand.
    for range in ["bytes=3-2", "lines=1-2", "bytes=0-1,5-6", "bytes"] {
        ensure!(ranged(range).await?.expect(200)?.body == blob, "{range}");
    }
    let etag = f.client.head(&path).await?.header("etag").to_owned();
    let conditional = async |name: &str, value: &str| {
        let request = f.client.request(Method::GET, &path).header("range", "bytes=1-2").header(name, value);
        f.client.send(request).await
    };
    ensure!(conditional("if-none-match", &etag).await?.status == 304);
    ensure!(conditional("if-range", &etag).await?.status == 206);
    ensure!(conditional("if-range", "\"another\"").await?.status == 200);
    Ok(())
}

#[tokio::test]
async fn manifests_are_kept_as_they_were_pushed() -> Result<()> {
    let f = fresh()?;
    let config = Bytes::from("{}");
    f.client.push_blob("a", &config).await?;
    // Odd spacing and unknown fields survive; each type of OCI and of docker's is served as what it is.
    for (tag, media_type, field) in [
        ("oci", MANIFEST_TYPE, "config"),
        ("oci-index", INDEX_TYPE, "manifests"),
        ("docker", "application/vnd.docker.distribution.manifest.v2+json", "config"),
        ("docker-list", "application/vnd.docker.distribution.manifest.list.v2+json", "manifests"),
    ] {
        let content = if field == "config" { descriptor(CONFIG_TYPE, &config) } else { json!([]) };
        let text = format!("{{ \"schemaVersion\" : 2,\n\n\"x\":[1.0], \"{field}\": {content}}}\n");
        let digest = Digest::of(text.as_bytes());
        let path = format!("/v2/a/manifests/{tag}");
        let request = f.client.request(Method::PUT, &path).header("content-type", media_type);
        let answer = f.client.send(request.body(text.clone())).await?.expect(201)?;
        ensure!(answer.header("location") == format!("/v2/a/manifests/{digest}"), "{answer:?}");
        ensure!(answer.header("docker-content-digest") == digest.to_string(), "{answer:?}");
        for reference in [tag.to_owned(), digest.to_string()] {
            let path = format!("/v2/a/manifests/{reference}");
            for answer in [f.client.get(&path).await?.expect(200)?, f.client.head(&path).await?.expect(200)?]
            {
                ensure!(answer.header("content-type") == media_type, "{answer:?}");
                ensure!(answer.header("docker-content-digest") == digest.to_string(), "{answer:?}");
                ensure!(answer.header("content-length") == text.len().to_string(), "{answer:?}");
                ensure!(answer.body.is_empty() || answer.body == text, "{answer:?}");
            }
        }
    }
    f.client.get("/v2/a/manifests/absent").await?.refused(404, "MANIFEST_UNKNOWN")?;
    f.client.get("/v2/b/manifests/oci").await?.refused(404, "MANIFEST_UNKNOWN")?;
    f.client.get("/v2/a/manifests/.bad").await?.refused(404, "MANIFEST_UNKNOWN")?;
    f.client.get(&format!("/v2/a/manifests/{}", Digest::of(b""))).await?.refused(404, "MANIFEST_UNKNOWN")
}

#[tokio::test]
async fn bad_manifests_are_refused() -> Result<()> {
    let f = fresh()?;
    let config = Bytes::from("{}");
    f.client.push_blob("a", &config).await?;
    let good = manifest(&descriptor(CONFIG_TYPE, &config), &[]);
    let other = Digest::of(b"other").to_string();
    f.client.put_manifest("a", &other, &good).await?.refused(400, "DIGEST_INVALID")?;
    f.client.put_manifest("a", "sha512:00", &good).await?.refused(400, "DIGEST_INVALID")?;
    f.client.put_manifest("a", ".tag", &good).await?.refused(400, "MANIFEST_INVALID")?;
    let missing = manifest(&descriptor(CONFIG_TYPE, &config), &[descriptor(LAYER_TYPE, b"absent")]);
    f.client.put_manifest("a", "t", &missing).await?.refused(400, "MANIFEST_BLOB_UNKNOWN")?;
    // A blob of another repository is not one of this.
    f.client.put_manifest("b", "t", &good).await?.refused(400, "MANIFEST_BLOB_UNKNOWN")?;
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [descriptor(MANIFEST_TYPE, b"absent")] });
    f.client.put_manifest("a", "t", &index).await?.refused(400, "MANIFEST_BLOB_UNKNOWN")?;
    let put = async |media_type: &str, body: Vec<u8>| {
        let request = f.client.request(Method::PUT, "/v2/a/manifests/t").header("content-type", media_type);
        f.client.send(request.body(body)).await
    };
    for body in [&b""[..], b"{", b"[]", b"{}", br#"{"schemaVersion":1}"#, b"\xff"] {
        put(MANIFEST_TYPE, body.to_vec()).await?.refused(400, "MANIFEST_INVALID")?;
    }
    let good = good.to_string().into_bytes();
    put("text/plain", good.clone()).await?.refused(400, "MANIFEST_INVALID")?;
    put(INDEX_TYPE, good.clone()).await?.refused(400, "MANIFEST_INVALID")?;
    let padding = vec![b' '; 4 << 20];
    put(MANIFEST_TYPE, [good, padding].concat()).await?.refused(413, "SIZE_INVALID")?;
    put(MANIFEST_TYPE, vec![b' '; 100 << 20]).await.map_or(Ok(()), |a| a.refused(413, "SIZE_INVALID"))?;
    f.client.get("/v2/a/tags/list").await?.expect(200)?;
    ensure!(f.client.get("/v2/a/tags/list").await?.json()["tags"] == json!([]));
    Ok(())
}

#[tokio::test]
async fn names_are_checked() -> Result<()> {
    let f = fresh()?;
    let long = "a".repeat(256);
    for name in ["A", "a//b", "-a", "a-", "a/_blobs", "a%2f..", long.as_str(), "a%00b"] {
        f.client.get(&format!("/v2/{name}/tags/list")).await?.refused(400, "NAME_INVALID")?;
        let post = format!("/v2/{name}/blobs/uploads/");
        f.client.ask(Method::POST, &post).await?.refused(400, "NAME_INVALID")?;
    }
    f.client.get("/v2/a/tags/list").await?.refused(404, "NAME_UNKNOWN")?;
    Ok(())
}

#[tokio::test]
async fn tags_are_listed_in_pages() -> Result<()> {
    let f = fresh()?;
    let tags = ["V1", "a", "b-1", "B.2", "c", "latest", "z_9"];
    for tag in tags.iter().rev() {
        f.client.push_image("team/app", Some(tag), &[]).await?;
    }
    // Neither shows up in the other.
    f.client.push_image("team/app/below", Some("other"), &[]).await?;
    let sorted = ["a", "b-1", "B.2", "c", "latest", "V1", "z_9"];
    let list = async |query: &str| f.client.get(&format!("/v2/team/app/tags/list{query}")).await;
    ensure!(list("").await?.expect(200)?.json() == json!({ "name": "team/app", "tags": sorted }));
    let mut next = "/v2/team/app/tags/list?n=3".to_owned();
    let mut pages = Vec::new();
    loop {
        let answer = f.client.get(&next).await?.expect(200)?;
        pages.push(answer.json()["tags"].clone());
        let Some(target) = answer.header("link").strip_suffix(">; rel=\"next\"") else { break };
        next = target.trim_start_matches('<').to_owned();
    }
    ensure!(pages == [json!(sorted[..3]), json!(sorted[3..6]), json!(sorted[6..])], "{pages:?}");
    ensure!(list("?last=b-1").await?.json()["tags"] == json!(sorted[2..]));
    ensure!(list("?last=bb&n=1").await?.json()["tags"] == json!(["c"]));
    let none = list("?n=0").await?.expect(200)?;
    ensure!(none.json()["tags"] == json!([]) && none.header("link").is_empty(), "{none:?}");
    list("?n=x").await?.refused(400, "UNSUPPORTED")
}

#[tokio::test]
async fn tags_move_and_go() -> Result<()> {
    let f = fresh()?;
    let one = f.client.push_image("a", Some("t"), &[noise(10, 1)]).await?;
    f.client.push_image("a", Some("u"), &[noise(10, 1)]).await?;
    let two = f.client.push_image("a", Some("t"), &[noise(10, 2)]).await?;
    let digest = async |reference: &str| -> Result<String> {
        let answer = f.client.head(&format!("/v2/a/manifests/{reference}")).await?;
        Ok(answer.header("docker-content-digest").to_owned())
    };
    ensure!(digest("t").await? == two.to_string() && digest("u").await? == one.to_string());
    f.client.delete("/v2/a/manifests/t").await?.expect(202)?;
    f.client.delete("/v2/a/manifests/t").await?.refused(404, "MANIFEST_UNKNOWN")?;
    f.client.get(&format!("/v2/a/manifests/{two}")).await?.expect(200)?;
    // A manifest takes its tags with it.
    f.client.delete(&format!("/v2/a/manifests/{one}")).await?.expect(202)?;
    f.client.get("/v2/a/manifests/u").await?.refused(404, "MANIFEST_UNKNOWN")?;
    f.client.get(&format!("/v2/a/manifests/{one}")).await?.refused(404, "MANIFEST_UNKNOWN")?;
    f.client.delete(&format!("/v2/a/manifests/{one}")).await?.refused(404, "MANIFEST_UNKNOWN")?;
    // And comes back.
    f.client.push_image("a", Some("u"), &[noise(10, 1)]).await?;
    ensure!(digest("u").await? == one.to_string());
    Ok(())
}

/// An artifact about `subject`.
fn artifact(subject: &Digest, artifact_type: Option<&str>, config: &str, name: &str) -> Value {
    let mut artifact = manifest(&descriptor(config, b"{}"), &[]);
    artifact["subject"] = json!({ "mediaType": MANIFEST_TYPE, "digest": subject, "size": 1 });
    artifact["annotations"] = json!({ "name": name });
    if let Some(artifact_type) = artifact_type {
        artifact["artifactType"] = json!(artifact_type);
    }
    artifact
}

#[tokio::test]
async fn referrers_are_listed() -> Result<()> {
    let f = fresh()?;
    let list = async |subject: &Digest, query: &str| -> Result<Value> {
        let answer = f.client.get(&format!("/v2/a/referrers/{subject}{query}")).await?.expect(200)?;
        ensure!(answer.header("content-type") == INDEX_TYPE, "{answer:?}");
        ensure!(answer.header("oci-filters-applied") == if query.is_empty() { "" } else { "artifactType" });
        let index = answer.json();
        ensure!(index["schemaVersion"] == 2 && index["mediaType"] == INDEX_TYPE, "{index}");
        Ok(index["manifests"].clone())
    };
    // Nothing is known of the repository, and nothing refers to anything.
    let nobody = Digest::of(b"nobody");
    ensure!(list(&nobody, "").await? == json!([]));
    f.client.get("/v2/a/referrers/sha256:1").await?.refused(400, "DIGEST_INVALID")?;
    f.client.push_blob("a", &Bytes::from("{}")).await?;
    let image = f.client.push_image("a", Some("t"), &[]).await?;
    let mut expected = Vec::new();
    for (artifact_type, config, name, listed_as) in [
        (Some("a/one"), "application/vnd.oci.empty.v1+json", "1", "a/one"),
        (None, "a/config", "2", "a/config"),
        (Some("a/one"), "a/config", "3", "a/one"),
        (None, CONFIG_TYPE, "4", CONFIG_TYPE),
    ] {
        let artifact = artifact(&image, artifact_type, config, name);
        let text = artifact.to_string();
        let answer = f.client.put_manifest("a", &Digest::of(text.as_bytes()).to_string(), &artifact).await?;
        ensure!(answer.expect(201)?.header("oci-subject") == image.to_string());
        let mut listed = descriptor(MANIFEST_TYPE, text.as_bytes());
        listed["artifactType"] = json!(listed_as);
        listed["annotations"] = json!({ "name": name });
        expected.push(listed);
    }
    ensure!(list(&image, "").await? == json!(expected));
    ensure!(list(&image, "?artifactType=a/one").await? == json!([expected[0], expected[2]]));
    ensure!(list(&image, "?artifactType=a/none").await? == json!([]));
    // The subject may come later, or never; an index refers as well.
    let mut index =
        json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [], "artifactType": "a/index" });
    index["subject"] = json!({ "mediaType": MANIFEST_TYPE, "digest": nobody, "size": 1 });
    let answer = f.client.put_manifest("a", "index", &index).await?.expect(201)?;
    ensure!(answer.header("oci-subject") == nobody.to_string());
    ensure!(list(&nobody, "").await?[0]["artifactType"] == "a/index");
    // Deleted, it is listed no more; pushed again, it is.
    let first = expected[0]["digest"].as_str().unwrap();
    f.client.delete(&format!("/v2/a/manifests/{first}")).await?.expect(202)?;
    ensure!(list(&image, "").await? == json!(expected[1..]));
    let again = artifact(&image, Some("a/one"), "application/vnd.oci.empty.v1+json", "1");
    f.client.put_manifest("a", first, &again).await?.expect(201)?;
    ensure!(list(&image, "?artifactType=a/one").await? == json!([expected[2], expected[0]]));
    Ok(())
}
