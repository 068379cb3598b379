//! Getting in: passwords, tokens and certificates against docker-registry.

use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SigningKey};
use tdfs_tests::registry::TOKEN_SERVICE;

use super::*;
use crate::server::{Reply, Server};

fn with_auth(file: PathBuf) -> ClientOptions {
    ClientOptions { auth_file: Some(file), ..ClientOptions::default() }
}

fn auth_file(dir: &Path, host: &str, user: &str, password: &str) -> PathBuf {
    let file = dir.join(format!("{user}-{password}.json"));
    let auth = STANDARD.encode(format!("{user}:{password}"));
    fs::write(&file, json!({ "auths": { host: { "auth": auth } } }).to_string()).unwrap();
    file
}

#[tokio::test]
async fn basic_auth() -> Result<()> {
    let registry =
        Registry::start(&Options { basic_auth: Some(("me".into(), "pa:ss".into())), ..Options::default() })?;
    let dir = tempfile::tempdir()?;
    let host = registry.addr.to_string();
    let right = auth_file(dir.path(), &host, "me", "pa:ss");
    let (reference, store) = open(&registry.image("app:v1"), &with_auth(right.clone()));
    exercise(&reference, &store).await?;
    for file in [auth_file(dir.path(), &host, "me", "wrong"), dir.path().join("absent")] {
        let (_, store) = open(&registry.image("app:v1"), &with_auth(file));
        let error = store.resolve(&reference).await.unwrap_err();
        assert!(matches!(error, OciError::Denied { .. }), "{error}");
        assert_eq!(store.requests().data_requests, 0);
    }
    // The file is the one that skopeo uses.
    let source = format!("docker://{}", registry.image("app:v1"));
    skopeo(&["inspect", "--tls-verify=false", "--authfile", path(&right), &source]);
    Ok(())
}

/// A CA certificate, and certificate and key for loopback names, as PEM files.
fn certificates(dir: &Path) -> Result<(PathBuf, (PathBuf, PathBuf))> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let leaf = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()])?.signed_by(&key, &ca)?;
    let file = |name: &str, content: String| -> Result<PathBuf> {
        fs::write(dir.join(name), content)?;
        Ok(dir.join(name))
    };
    Ok((
        file("ca.crt", ca.pem())?,
        (file("leaf.pem", leaf.pem())?, file("leaf-key.pem", key.serialize_pem())?),
    ))
}

#[tokio::test]
async fn tls() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (ca, tls) = certificates(dir.path())?;
    let registry = Registry::start(&Options { tls: Some(tls), ..Options::default() })?;
    let trusting =
        ClientOptions { plain_http: Some(false), ca_file: Some(ca), retries: 0, ..ClientOptions::default() };
    let (reference, store) = open(&registry.image("app:v1"), &trusting);
    let image = exercise(&reference, &store).await?;
    let cert_dir = format!("--src-cert-dir={}", path(dir.path()));
    let source = format!("docker://{}", registry.image("app:v1"));
    let copy = format!("oci:{}:v1", path(&dir.path().join("copy")));
    skopeo(&["copy", "--quiet", &cert_dir, &source, &copy]);
    let (reference_of_copy, layout) = open(&copy, &trusting);
    assert_eq!(layout.resolve(&reference_of_copy).await?.digest, image.digest);

    let by_name = format!("localhost:{}/app:v1", registry.addr.port());
    let (by_name, store) = open(&by_name, &trusting);
    assert_eq!(store.resolve(&by_name).await?.digest, image.digest);

    // Without the CA, and in plain HTTP.
    let strange = ClientOptions { ca_file: None, ..trusting.clone() };
    let error =
        open(&registry.image("app:v1"), &strange).1.resolve(&reference).await.unwrap_err().to_string();
    assert!(error.contains("ertificate"), "{error}");
    let plain = ClientOptions { plain_http: None, ..trusting.clone() };
    assert!(open(&registry.image("app:v1"), &plain).1.resolve(&reference).await.is_err());
    // As a mirror.
    let mirrored = ClientOptions {
        mirrors: [("nowhere.example".into(), vec![format!("https://{}", registry.addr)])].into(),
        ..trusting.clone()
    };
    let (elsewhere, store) = open("nowhere.example/app:v1", &mirrored);
    assert_eq!(store.resolve(&elsewhere).await?.digest, image.digest);

    for (file, content) in
        [("empty.pem", ""), ("broken.pem", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----")]
    {
        fs::write(dir.path().join(file), content)?;
        let broken = ClientOptions { ca_file: Some(dir.path().join(file)), ..trusting.clone() };
        let result = match Store::open(&reference, &broken) {
            Ok(store) => store.resolve(&reference).await.map(drop),
            Err(e) => Err(e),
        };
        assert!(matches!(result, Err(OciError::Setup(_))), "{file}: {result:?}");
    }
    Ok(())
}

/// Issues tokens the way registries expect them: a JWT (RFC 7519) with the scopes the user may have.
struct Issuer {
    key: KeyPair,
    certificate: rcgen::Certificate,
}

impl Issuer {
    fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec!["issuer".into()])?.self_signed(&key)?;
        Ok(Self { key, certificate })
    }

    fn token(&self, access: &serde_json::Value) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let header =
            json!({ "typ": "JWT", "alg": "ES256", "x5c": [STANDARD.encode(self.certificate.der())] });
        let claims = json!({
            "iss": TOKEN_SERVICE, "aud": TOKEN_SERVICE, "sub": "me", "jti": "1",
            "iat": now, "nbf": now - 10, "exp": now + 600, "access": access
        });
        let encode = |v: &serde_json::Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let signature = self.key.sign(signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(raw_signature(&signature)))
    }
}

/// JWT wants the two numbers of an ECDSA signature side by side, not in DER.
fn raw_signature(der: &[u8]) -> Vec<u8> {
    let number = |at: usize| {
        let len = der[at + 1] as usize;
        (&der[at + 2..at + 2 + len], at + 2 + len)
    };
    let (r, next) = number(2);
    let (s, _) = number(next);
    let fixed = |n: &[u8]| {
        let n = &n[n.iter().position(|&b| b != 0).unwrap_or(n.len())..];
        let mut padded = vec![0; 32 - n.len()];
        padded.extend_from_slice(n);
        padded
    };
    [fixed(r), fixed(s)].concat()
}

#[tokio::test]
async fn bearer_tokens() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let issuer = Issuer::new()?;
    let certificate = dir.path().join("issuer.pem");
    fs::write(&certificate, issuer.certificate.pem())?;
    // Anybody may pull, me may push.
    let me = format!("Basic {}", STANDARD.encode("me:secret"));
    let tokens = Server::start(move |seen| {
        let query = url::form_urlencoded::parse(seen.path.split_once('?').map_or("", |(_, q)| q).as_bytes());
        let access = query
            .filter(|(name, _)| name == "scope")
            .map(|(_, scope)| {
                let [kind, name, actions] = scope.split(':').collect::<Vec<_>>()[..] else {
                    panic!("{scope}")
                };
                let may = |action: &&str| *action == "pull" || seen.header("authorization") == Some(&me);
                let actions: Vec<&str> = actions.split(',').filter(may).collect();
                json!({ "type": kind, "name": name, "actions": actions })
            })
            .collect();
        Reply::new(200, json!({ "token": issuer.token(&access) }).to_string())
    })
    .await;
    let realm = format!("http://{}/token", tokens.addr);
    let registry =
        Registry::start(&Options { token_auth: Some((realm, certificate)), ..Options::default() })?;
    let file = auth_file(dir.path(), &registry.addr.to_string(), "me", "secret");
    let (reference, store) = open(&registry.image("team/app:v1"), &with_auth(file));
    let image = exercise(&reference, &store).await?;
    assert!(tokens.seen().len() <= 3, "{} tokens for one repository", tokens.seen().len());

    let anonymous = with_auth(dir.path().join("absent"));
    let (_, store) = open(&registry.image("team/app:v1"), &anonymous);
    assert_eq!(store.resolve(&reference).await?.digest, image.digest);
    let error = push_artifact(&store, &image.descriptor(), "x").await.unwrap_err();
    assert!(matches!(error.downcast_ref(), Some(OciError::Denied { .. })), "{error}");
    Ok(())
}

#[tokio::test]
async fn mirror_of_a_registry() -> Result<()> {
    let origin = Registry::start(&Options::default())?;
    let (reference, store) = open(&origin.image("app:v1"), &ClientOptions::default());
    let image = exercise(&reference, &store).await?;
    let proxy = format!("http://{}", origin.addr);
    let mirror = Registry::start(&Options { proxy: Some(proxy), ..Options::default() })?;
    let options = ClientOptions {
        mirrors: [(origin.addr.to_string(), vec![mirror.addr.to_string()])].into(),
        ..ClientOptions::default()
    };
    let (_, store) = open(&origin.image("app:v1"), &options);
    let before = origin.logged("blobs/");
    assert_eq!(store.resolve(&reference).await?.digest, image.digest);
    assert_eq!(store.referrers(&image.digest, Some(ARTIFACT_TYPE)).await?.len(), 2);
    for layer in &image.layers {
        assert_eq!(Digest::of(&collect(store.blob_stream(layer).await?).await?), layer.digest);
    }
    assert!(mirror.logged("blobs/") > 0);
    drop(mirror);
    // The mirror is gone, its store goes on with the registry.
    let layer = &image.layers[0];
    assert_eq!(Digest::of(&collect(store.blob_stream(layer).await?).await?), layer.digest);
    assert!(origin.logged("blobs/") > before);
    Ok(())
}
