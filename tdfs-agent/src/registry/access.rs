//! Who may do what: users of an htpasswd file, by basic authentication or with a token that they got by it. A user may
//! do everything, a token what it was issued for.
//!
//! Only bcrypt hashes are taken (`htpasswd -B`). Checking one takes some ten milliseconds of a processor, on purpose;
//! what was right is remembered as a keyed hash, and only two are checked at a time, so that wrong passwords do not
//! take the processors from everybody else.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::Semaphore;

use super::request::{Action, Scope, basic_credentials};
use super::token::{KEY_MIN, Tokens};

/// Passwords checked at a time.
const CHECKS: usize = 2;
/// Right passwords that are remembered.
const REMEMBERED: usize = 1024;
/// Of no password, at the default cost: an unknown user takes as long as a wrong password.
const NOBODY: &str = "$2y$05$abcdefghijklmnopqrstuuE7kG0dXUwJnEh0rG7BX0o8jz1a0jB4y";

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line is not `user:bcrypt hash`.
    #[error("{path}: line {line} is not user:hash with a bcrypt hash, as `htpasswd -B` writes them")]
    Line {
        /// The file.
        path: String,
        /// Counted from 1.
        line: usize,
    },
    /// Not a key for tokens.
    #[error("{path}: a key has at least {KEY_MIN} bytes")]
    Key {
        /// The file.
        path: String,
    },
    /// The system gives no random numbers.
    #[error("no random numbers")]
    Random,
}

/// The users.
#[derive(Debug)]
pub struct Access {
    users: HashMap<String, String>,
    anonymous_pull: bool,
    tokens: Option<Tokens>,
    key: [u8; 32],
    right: Mutex<HashSet<[u8; 32]>>,
    checks: Arc<Semaphore>,
}

/// Who sends a request.
enum Caller {
    User(String),
    Nobody,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may go on.
    Allowed,
    /// Its token is good, but for something else.
    Insufficient,
    /// It has no credentials, or wrong ones.
    Unknown,
}

impl Access {
    /// Reads an htpasswd file. With `anonymous_pull` everybody may read; with the key in a file, users get tokens.
    pub fn load(path: &Path, anonymous_pull: bool, token_key: Option<&Path>) -> Result<Self, AccessError> {
        let read = |path: &Path| {
            let failed = |source| AccessError::Read { path: path.display().to_string(), source };
            std::fs::read(path).map_err(failed)
        };
        let shown = || path.display().to_string();
        let text = String::from_utf8_lossy(&read(path)?).into_owned();
        let tokens = token_key.map(|path| match read(path)? {
            key if key.len() < KEY_MIN => Err(AccessError::Key { path: path.display().to_string() }),
            key => Ok(Tokens::new(&key)),
        });
        let tokens = tokens.transpose()?;
        let mut users = HashMap::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let user = line.split_once(':').filter(|(user, hash)| !user.is_empty() && is_bcrypt(hash));
            let (user, hash) = user.ok_or_else(|| AccessError::Line { path: shown(), line: number + 1 })?;
            users.insert(user.to_owned(), hash.to_owned());
        }
        let mut key = [0; 32];
        let random = rustls::crypto::ring::default_provider().secure_random;
        random.fill(&mut key).map_err(|_| AccessError::Random)?;
        let (right, checks) = (Mutex::default(), Arc::new(Semaphore::new(CHECKS)));
        Ok(Self { users, anonymous_pull, tokens, key, right, checks })
    }

    /// Whether users get tokens.
    pub fn has_tokens(&self) -> bool {
        self.tokens.is_some()
    }

    /// A token for `scopes`, or for what everybody may do of them; `None` for who may not have any.
    pub async fn token(&self, authorization: Option<&str>, mut scopes: Vec<Scope>) -> Option<String> {
        let tokens = self.tokens.as_ref()?;
        let user = match self.caller(authorization).await? {
            Caller::User(user) => user,
            Caller::Nobody if self.anonymous_pull => {
                for scope in &mut scopes {
                    scope.actions.retain(|action| *action == Action::Pull);
                }
                String::new()
            }
            Caller::Nobody => return None,
        };
        Some(tokens.issue(&user, &scopes, SystemTime::now()))
    }

    /// Whether a request with this `Authorization` header may go on. `is_pull`: it only reads content. `needed`: what a
    /// token must be good for.
    pub async fn allows(&self, authorization: Option<&str>, is_pull: bool, needed: &[Scope]) -> Verdict {
        if let (Some(tokens), Some(token)) = (&self.tokens, authorization.and_then(bearer)) {
            return match tokens.allows(token, needed, SystemTime::now()) {
                Some(true) => Verdict::Allowed,
                Some(false) => Verdict::Insufficient,
                None => Verdict::Unknown,
            };
        }
        match self.caller(authorization).await {
            Some(Caller::User(_)) => Verdict::Allowed,
            Some(Caller::Nobody) if is_pull && self.anonymous_pull => Verdict::Allowed,
            _ => Verdict::Unknown,
        }
    }

    /// Who sends this `Authorization` header. Wrong credentials are wrong also where none are needed: the client should
    /// hear of it.
    async fn caller(&self, authorization: Option<&str>) -> Option<Caller> {
        let Some(authorization) = authorization else { return Some(Caller::Nobody) };
        let (user, password) = basic_credentials(authorization)?;
        if user.is_empty() && password.is_empty() {
            // How skopeo and podman say that they have none.
            return Some(Caller::Nobody);
        }
        self.knows(&user, password).await.then_some(Caller::User(user))
    }

    async fn knows(&self, user: &str, password: String) -> bool {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&(user.len() as u64).to_le_bytes()).update(user.as_bytes()).update(password.as_bytes());
        let fingerprint = *hasher.finalize().as_bytes();
        if self.right.lock().unwrap_or_else(PoisonError::into_inner).contains(&fingerprint) {
            return true;
        }
        // The semaphore is never closed.
        let Ok(_permit) = self.checks.clone().acquire_owned().await else { return false };
        let known = self.users.get(user).cloned();
        let is_known = known.is_some();
        let check = move || bcrypt::verify(password, known.as_deref().unwrap_or(NOBODY)).unwrap_or(false);
        let is_right = tokio::task::spawn_blocking(check).await.unwrap_or(false) && is_known;
        if is_right {
            let mut right = self.right.lock().unwrap_or_else(PoisonError::into_inner);
            if right.len() == REMEMBERED {
                right.clear();
            }
            right.insert(fingerprint);
        }
        is_right
    }
}

/// The token of an `Authorization` header (RFC 6750).
fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn is_bcrypt(hash: &str) -> bool {
    ["$2y$", "$2b$", "$2a$"].iter().any(|prefix| hash.starts_with(prefix)) && hash.len() == 60
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    #[tokio::test]
    async fn users_and_everybody() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let hash = bcrypt::hash("secret", 4).unwrap();
        std::fs::write(file.path(), format!("# people\n\nme:{hash}\n")).unwrap();
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        let allows = async |access: &Access, authorization: Option<&str>, is_pull| {
            access.allows(authorization, is_pull, &[]).await == Verdict::Allowed
        };
        for anonymous in [false, true] {
            let access = Access::load(file.path(), anonymous, None).unwrap();
            for _ in 0..2 {
                assert!(allows(&access, Some(&basic("me:secret")), false).await);
                for bad in [basic("me:wrong"), basic("you:secret"), basic("me:"), "Bearer x".into()] {
                    assert!(!allows(&access, Some(&bad), true).await, "{bad}");
                }
            }
            for nobody in [None, Some(basic(":"))] {
                assert_eq!(allows(&access, nobody.as_deref(), true).await, anonymous);
                assert!(!allows(&access, nobody.as_deref(), false).await);
            }
            assert!(access.token(Some(&basic("me:secret")), Vec::new()).await.is_none());
        }
        for bad in ["me", ":x", "me:{SHA}fEqNCco3Yq9h5ZUglD3CZJT4lBs=", "me:plain"] {
            std::fs::write(file.path(), bad).unwrap();
            assert!(
                matches!(Access::load(file.path(), false, None), Err(AccessError::Line { line: 1, .. })),
                "{bad}"
            );
        }
        std::fs::write(file.path(), [b'x'; KEY_MIN - 1]).unwrap();
        let users = tempfile::NamedTempFile::new().unwrap();
        let short = Access::load(users.path(), false, Some(file.path()));
        assert!(matches!(short, Err(AccessError::Key { .. })));
        // So that checking against it takes its time.
        assert!(bcrypt::verify("x", NOBODY).is_ok());
    }

    #[tokio::test]
    async fn tokens() {
        let (users, key) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
        std::fs::write(users.path(), format!("me:{}\n", bcrypt::hash("secret", 4).unwrap())).unwrap();
        std::fs::write(key.path(), [7; KEY_MIN]).unwrap();
        let me = format!("Basic {}", STANDARD.encode("me:secret"));
        let wrong = format!("Basic {}", STANDARD.encode("me:wrong"));
        let scope = |text: &str| vec![Scope::parse(text).unwrap()];
        let (pull, push) = (scope("repository:a:pull"), scope("repository:a:push"));
        for anonymous in [false, true] {
            let access = Access::load(users.path(), anonymous, Some(key.path())).unwrap();
            let verdict = async |token: &str, needed| {
                access.allows(Some(&format!("Bearer {token}")), false, needed).await
            };
            assert!(access.token(Some(&wrong), pull.clone()).await.is_none());
            let token = access.token(Some(&me), push.clone()).await.unwrap();
            assert_eq!(verdict(&token, &push).await, Verdict::Allowed);
            assert_eq!(verdict(&token, &pull).await, Verdict::Insufficient);
            assert_eq!(verdict("x", &[]).await, Verdict::Unknown);
            let token = access.token(None, scope("repository:a:pull,push,delete")).await;
            assert_eq!(token.is_some(), anonymous);
            if let Some(token) = token {
                assert_eq!(verdict(&token, &pull).await, Verdict::Allowed);
                assert_eq!(verdict(&token, &push).await, Verdict::Insufficient);
            }
            assert_eq!(access.allows(Some(&me), false, &push).await, Verdict::Allowed);
        }
    }
}
