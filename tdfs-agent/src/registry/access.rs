//! Who may do what: users of an htpasswd file, by basic authentication.
//!
//! Only bcrypt hashes are taken (`htpasswd -B`). Checking one takes some ten milliseconds of a processor, on purpose;
//! what was right is remembered as a keyed hash, and only two are checked at a time, so that wrong passwords do not
//! take the processors from everybody else.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Semaphore;

use super::request::basic_credentials;

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
    /// The system gives no random numbers.
    #[error("no random numbers")]
    Random,
}

/// The users.
#[derive(Debug)]
pub struct Access {
    users: HashMap<String, String>,
    anonymous_pull: bool,
    key: [u8; 32],
    right: Mutex<HashSet<[u8; 32]>>,
    checks: Arc<Semaphore>,
}

impl Access {
    /// Reads an htpasswd file. With `anonymous_pull` everybody may read.
    pub fn load(path: &Path, anonymous_pull: bool) -> Result<Self, AccessError> {
        let shown = || path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|source| AccessError::Read { path: shown(), source })?;
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
        Ok(Self { users, anonymous_pull, key, right, checks })
    }

    /// Whether a request with this `Authorization` header may go on. `is_pull`: it only reads content.
    pub async fn allows(&self, authorization: Option<&str>, is_pull: bool) -> bool {
        let is_open = is_pull && self.anonymous_pull;
        let Some(authorization) = authorization else { return is_open };
        // Wrong credentials are wrong also where none are needed: the client should hear of it.
        let Some((user, password)) = basic_credentials(authorization) else { return false };
        if user.is_empty() && password.is_empty() {
            // How skopeo and podman say that they have none.
            return is_open;
        }
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&(user.len() as u64).to_le_bytes()).update(user.as_bytes()).update(password.as_bytes());
        let fingerprint = *hasher.finalize().as_bytes();
        if self.right.lock().unwrap_or_else(PoisonError::into_inner).contains(&fingerprint) {
            return true;
        }
        // The semaphore is never closed.
        let Ok(_permit) = self.checks.clone().acquire_owned().await else { return false };
        let known = self.users.get(&user).cloned();
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
        for anonymous in [false, true] {
            let access = Access::load(file.path(), anonymous).unwrap();
            for _ in 0..2 {
                assert!(access.allows(Some(&basic("me:secret")), false).await);
                for bad in [basic("me:wrong"), basic("you:secret"), basic("me:"), "Bearer x".into()] {
                    assert!(!access.allows(Some(&bad), true).await, "{bad}");
                }
            }
            for nobody in [None, Some(basic(":"))] {
                assert_eq!(access.allows(nobody.as_deref(), true).await, anonymous);
                assert!(!access.allows(nobody.as_deref(), false).await);
            }
        }
        for bad in ["me", ":x", "me:{SHA}fEqNCco3Yq9h5ZUglD3CZJT4lBs=", "me:plain"] {
            std::fs::write(file.path(), bad).unwrap();
            assert!(
                matches!(Access::load(file.path(), false), Err(AccessError::Line { line: 1, .. })),
                "{bad}"
            );
        }
        // So that checking against it takes its time.
        assert!(bcrypt::verify("x", NOBODY).is_ok());
    }
}
