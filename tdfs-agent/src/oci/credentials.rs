//! Where credentials come from: the configuration files of docker and of podman/skopeo, and credential helpers.
//!
//! ```text
//! {"auths": {"host[:port][/path]": {"auth": base64("user:password"), "identitytoken": ..., "registrytoken": ...}},
//!  "credHelpers": {"host": "NAME"},        host's credentials come from the program docker-credential-NAME
//!  "credsStore": "NAME"}                   everybody's do
//! ```
//!
//! A helper is started as `docker-credential-NAME get`, reads the server's name on its standard input and prints
//! `{"Username": ..., "Secret": ...}`. Files are read when a registry asks for credentials, not before.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::OciError;
use super::manifest::limit;

/// Bytes of a configuration file or of a helper's answer.
const FILE_MAX: u64 = 1 << 20;
/// A helper may ask a remote service, hardly a person.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
/// Docker Hub's name in configuration files, for historical reasons.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// What proves who we are.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Secret {
    Password {
        user: String,
        password: String,
    },
    /// Exchanged for a token at the token endpoint.
    Identity(String),
    /// A registry token, used as it is.
    Token(String),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// The configuration files, in the order they are asked.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    files: Vec<PathBuf>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: BTreeMap<String, AuthEntry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase", default)]
struct AuthEntry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

impl Credentials {
    /// `file` alone, or the files that docker, podman and skopeo use.
    pub fn new(file: Option<&Path>) -> Self {
        let files =
            file.map_or_else(|| standard_files(|name| std::env::var_os(name)), |f| vec![f.to_owned()]);
        Self { files }
    }

    /// The credentials for a repository, from the first file that has any.
    pub async fn find(&self, host: &str, repository: &str) -> Result<Option<Secret>, OciError> {
        for path in &self.files {
            let config = match read(path) {
                Ok(Some(config)) => config,
                Ok(None) => continue,
                Err(e) => return Err(e),
            };
            if let Some(secret) = config.find(path, host, repository).await? {
                return Ok(Some(secret));
            }
        }
        Ok(None)
    }
}

fn standard_files(var: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let path =
        |name: &str, below: &str| var(name).filter(|v| !v.is_empty()).map(|v| Path::new(&v).join(below));
    let docker = path("DOCKER_CONFIG", "config.json").or_else(|| path("HOME", ".docker/config.json"));
    let explicit = var("REGISTRY_AUTH_FILE").filter(|v| !v.is_empty()).map(PathBuf::from);
    let runtime = path("XDG_RUNTIME_DIR", "containers/auth.json")
        .or_else(|| Some(format!("/run/containers/{}/auth.json", nix::unistd::getuid()).into()));
    let home = path("XDG_CONFIG_HOME", "containers/auth.json")
        .or_else(|| path("HOME", ".config/containers/auth.json"));
    [explicit, docker, runtime, home].into_iter().flatten().collect()
}

fn read(path: &Path) -> Result<Option<Config>, OciError> {
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut text)) {
        Ok(size) => limit(&path.display().to_string(), size as u64, FILE_MAX)?,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(OciError::io(path)(e)),
    }
    // The parser's message could quote a password, so only its place is passed on.
    let bad = |e: serde_json::Error| {
        format!("not a registry configuration (line {} column {})", e.line(), e.column())
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| OciError::malformed(path.display().to_string(), bad(e)))
}

impl Config {
    async fn find(&self, path: &Path, host: &str, repository: &str) -> Result<Option<Secret>, OciError> {
        let server = if host == "docker.io" { HUB_KEY } else { host };
        if let Some((_, name)) = self.cred_helpers.iter().find(|(key, _)| normal(key) == host) {
            return ask_helper(name, server).await;
        }
        for key in keys(host, repository) {
            let entry = self.auths.iter().find(|(k, _)| normal(k) == key);
            if let Some(secret) = entry.map(|(_, e)| e.secret(path)).transpose()?.flatten() {
                return Ok(Some(secret));
            }
        }
        match self.creds_store.as_deref().filter(|s| !s.is_empty()) {
            Some(name) => ask_helper(name, server).await,
            None => Ok(None),
        }
    }
}

/// `host/a/b`, `host/a`, `host`: the closest first.
fn keys(host: &str, repository: &str) -> impl Iterator<Item = String> {
    let full = format!("{host}/{repository}");
    let ends: Vec<usize> = full.match_indices('/').map(|(at, _)| at).chain([full.len()]).collect();
    ends.into_iter().rev().map(move |end| full[..end].to_owned())
}

/// A key of a configuration file as `host[:port][/path]`.
fn normal(key: &str) -> String {
    let bare = key.split_once("://").map_or(key, |(_, rest)| rest).trim_end_matches('/');
    let bare = bare.strip_suffix("/v1").or_else(|| bare.strip_suffix("/v2")).unwrap_or(bare);
    match bare {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

impl AuthEntry {
    fn secret(&self, path: &Path) -> Result<Option<Secret>, OciError> {
        if !self.registrytoken.is_empty() {
            return Ok(Some(Secret::Token(self.registrytoken.clone())));
        }
        if !self.identitytoken.is_empty() {
            return Ok(Some(Secret::Identity(self.identitytoken.clone())));
        }
        if !self.auth.is_empty() {
            let bad = || {
                OciError::malformed(
                    path.display().to_string(),
                    "an auth entry that is not base64 of user:password",
                )
            };
            let text = STANDARD
                .decode(self.auth.trim())
                .ok()
                .and_then(|b| String::from_utf8(b).ok())
                .ok_or_else(bad)?;
            let (user, password) = text.split_once(':').ok_or_else(bad)?;
            let password = password.trim_end_matches('\0');
            return Ok(Some(Secret::Password { user: user.to_owned(), password: password.to_owned() }));
        }
        if self.username.is_empty() {
            return Ok(None);
        }
        Ok(Some(Secret::Password { user: self.username.clone(), password: self.password.clone() }))
    }
}

async fn ask_helper(name: &str, server: &str) -> Result<Option<Secret>, OciError> {
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(OciError::Setup(format!("bad name of a credential helper: {name:?}")));
    }
    run_helper(Path::new(&format!("docker-credential-{name}")), server).await
}

async fn run_helper(program: &Path, server: &str) -> Result<Option<Secret>, OciError> {
    let failed =
        |reason: String| OciError::Setup(format!("credential helper {}: {reason}", program.display()));
    let run = async {
        let mut child = Command::new(program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that does not read its input may still answer.
            let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        }
        let mut output = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(FILE_MAX).read_to_end(&mut output).await?;
        }
        Ok::<_, io::Error>((child.wait().await?, output))
    };
    let (status, output) = tokio::time::timeout(HELPER_TIMEOUT, run)
        .await
        .map_err(|_| failed(format!("no answer within {} s", HELPER_TIMEOUT.as_secs())))?
        .map_err(|e| failed(e.to_string()))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&output).trim().replace(char::is_control, " ");
        if said.contains("credentials not found") {
            return Ok(None);
        }
        return Err(failed(format!("{status}: {}", said.chars().take(200).collect::<String>())));
    }
    // The parser's message could quote the secret, so it is not passed on.
    let answer: HelperAnswer =
        serde_json::from_slice(&output).map_err(|_| failed("unreadable answer".into()))?;
    Ok(match answer {
        HelperAnswer { username, secret } if username == "<token>" => Some(Secret::Identity(secret)),
        HelperAnswer { username, secret } if username.is_empty() && secret.is_empty() => None,
        HelperAnswer { username, secret } => Some(Secret::Password { user: username, password: secret }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(user: &str, password: &str) -> Secret {
        Secret::Password { user: user.into(), password: password.into() }
    }

    async fn find(text: &str, host: &str, repository: &str) -> Result<Option<Secret>, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(&file, text).unwrap();
        Credentials::new(Some(&file)).find(host, repository).await.map_err(|e| e.to_string())
    }

    #[tokio::test]
    async fn entries_are_found_by_host_and_path() {
        let text = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "aHViOnBhOnNz"},
            "r.io": {"username": "u", "password": "p"},
            "r.io/team/app": {"identitytoken": "refresh"},
            "http://plain:5000/v2/": {"registrytoken": "t"},
            "empty.io": {}
        }}"#;
        assert_eq!(find(text, "docker.io", "library/nginx").await, Ok(Some(password("hub", "pa:ss"))));
        assert_eq!(find(text, "r.io", "other").await, Ok(Some(password("u", "p"))));
        assert_eq!(find(text, "r.io", "team/app/x").await, Ok(Some(Secret::Identity("refresh".into()))));
        assert_eq!(find(text, "r.io", "team/application").await, Ok(Some(password("u", "p"))));
        assert_eq!(find(text, "plain:5000", "x").await, Ok(Some(Secret::Token("t".into()))));
        assert_eq!(find(text, "empty.io", "x").await, Ok(None));
        assert_eq!(find(text, "xr.io", "x").await, Ok(None));
    }

    #[tokio::test]
    async fn bad_files_are_errors_without_secrets() {
        for text in [r#"{"auths": {"r": {"auth": "c2VjcmV0"}}}"#, r#"{"auths": "secret"}"#, "secret"] {
            let error = find(text, "r", "x").await.unwrap_err();
            assert!(!error.contains("secret") && !error.contains("c2Vj"), "{error}");
        }
        let missing = Credentials::new(Some(Path::new("/nonexistent/config.json")));
        assert_eq!(missing.find("r", "x").await.unwrap(), None);
    }

    #[test]
    fn standard_places() {
        let env = |vars: &'static [(&str, &str)]| {
            standard_files(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()))
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
        };
        let run = format!("/run/containers/{}/auth.json", nix::unistd::getuid());
        assert_eq!(
            env(&[("HOME", "/h")]),
            ["/h/.docker/config.json", &run, "/h/.config/containers/auth.json"]
        );
        assert_eq!(
            env(&[
                ("HOME", "/h"),
                ("DOCKER_CONFIG", "/d"),
                ("XDG_RUNTIME_DIR", "/r"),
                ("REGISTRY_AUTH_FILE", "/a")
            ]),
            ["/a", "/d/config.json", "/r/containers/auth.json", "/h/.config/containers/auth.json"]
        );
        assert_eq!(env(&[]), [run]);
    }

    /// A helper that checks what it is asked, and answers with `answer` and `status`.
    fn helper(dir: &Path, answer: &str, status: u8) -> PathBuf {
        let path = dir.join("docker-credential-x");
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = get ] && read server && [ \"$server\" = r.io:5000 ] || exit 9\ncat <<'E'\n{answer}\nE\nexit {status}\n"
        );
        // Written by another process: were the file open for writing here, a fork of another test's thread could hold
        // it open and make it busy (ETXTBSY).
        let write = r#"printf %s "$1" >"$0" && chmod 755 "$0""#;
        let written = std::process::Command::new("sh").args(["-c", write]).arg(&path).arg(script).status();
        assert!(written.unwrap().success());
        path
    }

    #[tokio::test]
    async fn helpers_are_asked() {
        let dir = tempfile::tempdir().unwrap();
        for (answer, status, expected) in [
            (r#"{"ServerURL":"r.io:5000","Username":"u","Secret":"s"}"#, 0, Ok(Some(password("u", "s")))),
            (r#"{"Username":"<token>","Secret":"s"}"#, 0, Ok(Some(Secret::Identity("s".into())))),
            ("credentials not found in native keychain", 1, Ok(None)),
            ("the vault is sealed", 1, Err("the vault is sealed")),
            (r#"{"Secret":"hush""#, 0, Err("unreadable answer")),
        ] {
            let program = helper(dir.path(), answer, status);
            match (run_helper(&program, "r.io:5000").await, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected),
                (Err(e), Err(part)) => {
                    assert!(e.to_string().contains(part) && !e.to_string().contains("hush"), "{e}");
                }
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        }
        assert!(run_helper(&dir.path().join("none"), "r.io").await.is_err());
        assert!(ask_helper("../evil", "r.io").await.is_err());
    }
}
