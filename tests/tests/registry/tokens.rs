//! Tokens, as other people's clients, ours and two servers use them; and podman with and without them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use tdfs_common::digest::Digest;
use tdfs_tests::images;
use tdfs_tests::server::Server;
use tdfs_tests::tdfs;
use tempfile::TempDir;
use xtask::command;

use super::client::{Answer, Client, noise};

/// A directory with users and a key.
struct Guarded {
    dir: TempDir,
}

impl Guarded {
    fn new() -> Result<Self> {
        let dir = TempDir::new()?;
        let hashed = command::output(Command::new("htpasswd").args(["-nbB", "me", "secret"]))?;
        std::fs::write(dir.path().join("users"), hashed)?;
        std::fs::write(dir.path().join("key"), noise(32, 1))?;
        Ok(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn show(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn server(&self, more: &[&str]) -> Result<Server> {
        let users = self.show("users");
        Server::start(&self.path("root"), &[&["--htpasswd", &users][..], more].concat())
    }

    /// With tokens.
    fn issuer(&self, more: &[&str]) -> Result<Server> {
        self.server(&[&["--token-key", &self.show("key")][..], more].concat())
    }

    /// A file with the credentials for a server.
    fn credentials(&self, server: &Server) -> Result<String> {
        use base64::Engine as _;
        let auth = base64::engine::general_purpose::STANDARD.encode("me:secret");
        let path = self.path(&format!("{}.json", server.addr.port()));
        let auths = json!({ "auths": { server.addr.to_string(): { "auth": auth } } });
        std::fs::write(&path, auths.to_string())?;
        Ok(path.display().to_string())
    }
}

/// A parameter of a challenge.
fn parameter(challenge: &str, name: &str) -> Option<String> {
    let (_, rest) = challenge.split_once(&format!("{name}=\""))?;
    Some(rest.split_once('"')?.0.to_owned())
}

async fn token(client: &Client, scope: &str, user: Option<(&str, &str)>) -> Result<Answer> {
    let mut request = client.request(Method::GET, &format!("/tdfs/v1/token?service=x&scope={scope}"));
    if let Some((user, password)) = user {
        request = request.basic_auth(user, Some(password));
    }
    client.send(request).await
}

const ME: Option<(&str, &str)> = Some(("me", "secret"));

#[tokio::test]
async fn a_token_is_good_for_what_it_was_asked_for_at_every_server() -> Result<()> {
    let guarded = Guarded::new()?;
    let (one, two) = (guarded.issuer(&[])?, guarded.issuer(&["--anonymous-pull"])?);
    let (at_one, at_two) = (Client::new(&one), Client::new(&two));
    let digest = Digest::of(b"x");
    let upload = format!("/v2/a/blobs/uploads/?digest={digest}");
    let challenged = at_one.send(at_one.request(Method::POST, &upload).body("x")).await?;
    challenged.refused(401, "UNAUTHORIZED")?;
    let challenge = challenged.header("www-authenticate").to_owned();
    ensure!(challenge.starts_with("Bearer "), "{challenge}");
    ensure!(parameter(&challenge, "realm") == Some(one.url("tdfs/v1/token")), "{challenge}");
    ensure!(parameter(&challenge, "scope").as_deref() == Some("repository:a:pull,push"), "{challenge}");
    ensure!(parameter(&challenge, "error").is_none(), "{challenge}");

    for user in [None, Some(("me", "wrong")), Some(("you", "secret"))] {
        let answer = token(&at_one, "repository:a:pull", user).await?;
        answer.refused(401, "UNAUTHORIZED")?;
        ensure!(answer.header("www-authenticate").starts_with("Basic "), "{answer:?}");
    }
    token(&at_one, &"repository:a:pull%20".repeat(9), ME).await?.refused(400, "UNSUPPORTED")?;
    let issued = token(&at_one, "repository:a:pull,push", ME).await?.expect(200)?;
    ensure!(issued.header("cache-control") == "no-store", "{issued:?}");
    let pushing = issued.json()["token"].as_str().context("no token")?.to_owned();
    let pulling = token(&at_one, "repository:a:pull", ME).await?.expect(200)?.json();
    let pulling = pulling["access_token"].as_str().context("no token")?.to_owned();
    let ask = async |client: &Client, method: &Method, path: &str, token: &str| -> Result<Answer> {
        client.send(client.request(method.clone(), path).bearer_auth(token).body("x")).await
    };
    for (n, client) in [&at_one, &at_two].into_iter().enumerate() {
        ask(client, &Method::POST, &upload, &pushing).await?.expect(201)?;
        let blob = format!("/v2/a/blobs/{digest}");
        for token in [&pushing, &pulling] {
            ask(client, &Method::GET, &blob, token).await?.expect(200)?;
            ask(client, &Method::GET, "/v2/", token).await?.expect(200)?;
        }
        let mount = format!("/v2/a/blobs/uploads/?mount={digest}&from=b");
        for (method, path, token) in [
            (Method::POST, upload.as_str(), &pulling),
            (Method::DELETE, &blob, &pushing),
            (Method::GET, "/v2/b/tags/list", &pushing),
            (Method::POST, "/v2/b/blobs/uploads/", &pushing),
            (Method::POST, &mount, &pushing),
            (Method::POST, "/tdfs/v1/b/pages", &pushing),
        ] {
            let answer = ask(client, &method, path, token).await?;
            answer.refused(401, "UNAUTHORIZED").with_context(|| format!("{n}: {method} {path}"))?;
            ensure!(
                answer.header("www-authenticate").ends_with("error=\"insufficient_scope\""),
                "{answer:?}"
            );
        }
        let changed =
            [&pulling[..pulling.len() - 1], if pulling.ends_with('A') { "E" } else { "A" }].concat();
        ask(client, &Method::GET, &blob, &changed).await?.refused(401, "UNAUTHORIZED")?;
        // A password goes as well.
        let plain = client.request(Method::DELETE, "/v2/a/manifests/absent").basic_auth("me", Some("secret"));
        client.send(plain).await?.refused(404, "MANIFEST_UNKNOWN")?;
    }
    // Everybody may read where everybody may read, and no more.
    let anonymous = token(&at_two, "repository:a:pull,push", None).await?.expect(200)?.json();
    let anonymous = anonymous["token"].as_str().context("no token")?;
    ask(&at_two, &Method::GET, &format!("/v2/a/blobs/{digest}"), anonymous).await?.expect(200)?;
    ask(&at_two, &Method::POST, &upload, anonymous).await?.refused(401, "UNAUTHORIZED")?;
    at_two.get(&format!("/v2/a/blobs/{digest}")).await?.expect(200)?;
    Ok(())
}

#[test]
fn skopeo_gets_tokens() -> Result<()> {
    let guarded = Guarded::new()?;
    let skopeo =
        |arguments: &[&str]| command::output(Command::new("skopeo").arg("--insecure-policy").args(arguments));
    let layout = images::image("nginx")?;
    let source = format!("oci:{}:latest", layout.display());
    for anonymous in [false, true] {
        let server = guarded.issuer(if anonymous { &["--anonymous-pull"] } else { &[] })?;
        let there = format!("docker://{}", server.image("team/nginx:v1"));
        let with = ["copy", "--quiet", "--dest-tls-verify=false", "--dest-creds"];
        ensure!(skopeo(&[&with[..], &["me:wrong", &source, &there]].concat()).is_err());
        skopeo(&[&with[..], &["me:secret", &source, &there]].concat())?;
        let inspect = ["inspect", "--tls-verify=false"];
        ensure!(skopeo(&[&inspect[..], &[&there]].concat()).is_ok() == anonymous);
        skopeo(&[&inspect[..], &["--creds", "me:secret", &there]].concat())?;
        // Layers of one repository are mounted into another.
        let (from, to) = (server.image("team/nginx:v1"), server.image("other/nginx:v1"));
        let (from, to) = (format!("docker://{from}"), format!("docker://{to}"));
        let both = ["copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"];
        let credentials = ["--src-creds", "me:secret", "--dest-creds", "me:secret"];
        skopeo(&[&both[..], &credentials, &[&from, &to]].concat())?;
        skopeo(&["delete", "--tls-verify=false", "--creds", "me:secret", &to])?;
        ensure!(skopeo(&[&inspect[..], &["--creds", "me:secret", &to]].concat()).is_err());
        ensure!(server.log().iter().any(|line| line.contains("/tdfs/v1/token")), "no token was asked for");
    }
    Ok(())
}

#[test]
fn tdfs_gets_tokens() -> Result<()> {
    let guarded = Guarded::new()?;
    let open = Server::start(&guarded.path("root"), &[])?;
    open.push(&images::image("nginx")?, "team/nginx:latest")?;
    let server = guarded.issuer(&[])?;
    let (image, credentials) = (server.image("team/nginx:latest"), guarded.credentials(&server)?);
    let service = &images::recipe("nginx")?.services[0];
    let recorder = guarded.show("recorder");
    let record = ["record", &image, "--service", service.name, "--push", "--ready", service.ready];
    tdfs::json(record.into_iter().chain(["--authfile", &credentials, "--state", &recorder]))?;
    let run = ["run", &image, "--exit-when-ready", "--network", "private", "--start", "fetched", "--state"];
    let cold = tdfs::json(run.into_iter().chain([&*guarded.show("node"), "--authfile", &credentials]))?;
    ensure!(cold["pages_fetched"] == cold["pages_needed"], "{cold}");
    // The challenge, the token, and the answer with everything.
    ensure!(cold["data_requests"] == 1 && cold["metadata_requests"] == 2, "{cold}");
    let stranger = tdfs::error(run.into_iter().chain([&*guarded.show("stranger")]))?;
    ensure!(stranger.contains("credentials") && stranger.contains("/tdfs/v1/token"), "{stranger}");
    Ok(())
}

/// podman with storage of its own.
struct Podman<'a> {
    dir: &'a Path,
    policy: PathBuf,
    auth: PathBuf,
}

impl Podman<'_> {
    fn run(&self, arguments: &[&str]) -> Result<String> {
        let mut podman = Command::new("podman");
        podman.arg("--root").arg(self.dir.join("storage")).arg("--runroot").arg(self.dir.join("run"));
        podman.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none"]);
        command::output(podman.env("REGISTRY_AUTH_FILE", &self.auth).args(arguments))
    }

    /// A transfer without TLS and without signatures.
    fn transfer(&self, verb: &str, arguments: &[&str]) -> Result<String> {
        let policy = self.policy.display().to_string();
        let how = [verb, "--quiet", "--tls-verify=false", "--signature-policy", &policy];
        self.run(&[&how[..], arguments].concat())
    }
}

#[test]
fn podman_logs_in_pushes_and_pulls() -> Result<()> {
    let layout = images::image("nginx")?;
    for has_tokens in [false, true] {
        let guarded = Guarded::new()?;
        let open = Server::start(&guarded.path("root"), &[])?;
        open.push(&layout, "team/nginx:v1")?;
        let server = if has_tokens { guarded.issuer(&[])? } else { guarded.server(&[])? };
        let (policy, auth) = (guarded.path("policy.json"), guarded.path("podman.json"));
        std::fs::write(&policy, r#"{ "default": [{ "type": "insecureAcceptAnything" }] }"#)?;
        let podman = Podman { dir: guarded.dir.path(), policy, auth };
        let (here, there) = (server.image("team/nginx:v1"), server.image("other/nginx:v2"));
        ensure!(podman.transfer("pull", &[&here]).is_err(), "without a password");
        let address = server.addr.to_string();
        let login = ["login", "--tls-verify=false", "--username", "me", "--password"];
        ensure!(podman.run(&[&login[..], &["wrong", &address]].concat()).is_err());
        podman.run(&[&login[..], &["secret", &address]].concat())?;
        podman.transfer("pull", &[&here])?;
        let digest = |image: &str| -> Result<String> {
            let inspected: Value = serde_json::from_str(&podman.run(&["image", "inspect", image])?)?;
            Ok(inspected[0]["Digest"].as_str().context("no digest")?.to_owned())
        };
        let index: Value = serde_json::from_slice(&std::fs::read(layout.join("index.json"))?)?;
        ensure!(index["manifests"][0]["digest"] == digest(&here)?, "the image as it was pushed");
        let pushed = guarded.show("digest");
        podman.transfer("push", &["--digestfile", &pushed, &here, &format!("docker://{there}")])?;
        podman.run(&["image", "rm", "--all", "--force"])?;
        podman.transfer("pull", &[&there])?;
        ensure!(std::fs::read_to_string(&pushed)? == digest(&there)?, "the image as podman pushed it");
        let asked = server.log().iter().any(|line| line.contains("/tdfs/v1/token"));
        ensure!(asked == has_tokens);
    }
    Ok(())
}
