//! Bearer tokens, by the token authentication that the clients of registries know.
//!
//! ```text
//! client -> /v2/...           401, WWW-Authenticate: Bearer realm="https://host/tdfs/v1/token",service=...,scope=...
//!        -> /tdfs/v1/token    user and password, scopes  ->  {"token": ..., "expires_in": ...}
//!        -> /v2/...           Authorization: Bearer TOKEN
//! ```
//!
//! A token is a JSON Web Token (RFC 7519), signed with HMAC-SHA256 under the key in a file. It holds all that is needed
//! to judge it, so servers that share the file take each other's tokens. It lives for [`LIFETIME`]; a user who is
//! removed from the list can act until then.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use serde::{Deserialize, Serialize};

use super::request::{Action, Scope};

/// How long a token is good for.
pub const LIFETIME: Duration = Duration::from_mins(5);
/// Who the tokens are for.
pub const SERVICE: &str = "tdfs registry";
/// Bytes of a key, at least.
pub const KEY_MIN: usize = 32;
/// The only header of a token. One that says something else, such as another algorithm, is none of ours.
const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

/// Signs and judges tokens.
#[derive(Debug)]
pub struct Tokens(hmac::Key);

/// What a token says.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    aud: String,
    /// The user; empty for everybody.
    sub: String,
    /// Seconds since 1970.
    iat: u64,
    exp: u64,
    access: Vec<Access>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Access {
    #[serde(rename = "type")]
    kind: String,
    name: String,
    actions: Vec<Action>,
}

impl Tokens {
    /// Tokens under a key of at least [`KEY_MIN`] bytes.
    pub fn new(key: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// A token that lets `user` do what the scopes say.
    pub fn issue(&self, user: &str, scopes: &[Scope], now: SystemTime) -> String {
        let iat = seconds(now);
        let access = |scope: &Scope| Access {
            kind: "repository".to_owned(),
            name: scope.name.to_string(),
            actions: scope.actions.iter().copied().collect(),
        };
        let access = scopes.iter().map(access).collect();
        let exp = iat + LIFETIME.as_secs();
        let claims = Claims { aud: SERVICE.to_owned(), sub: user.to_owned(), iat, exp, access };
        // Strings and numbers: this cannot fail.
        let claims = serde_json::to_vec(&claims).unwrap_or_default();
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(HEADER), URL_SAFE_NO_PAD.encode(claims));
        let signature = hmac::sign(&self.0, signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// Whether a token allows everything in `scopes`; `None` if it is no valid token.
    pub fn allows(&self, token: &str, scopes: &[Scope], now: SystemTime) -> Option<bool> {
        let (signed, signature) = token.rsplit_once('.')?;
        hmac::verify(&self.0, signed.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).ok()?).ok()?;
        let (header, claims) = signed.split_once('.')?;
        if header != URL_SAFE_NO_PAD.encode(HEADER) {
            return None;
        }
        let claims: Claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
        if claims.aud != SERVICE || claims.exp <= seconds(now) {
            return None;
        }
        let has = |name: &str, action: &Action| {
            let mut of_name = claims.access.iter().filter(|a| a.kind == "repository" && a.name == name);
            of_name.any(|a| a.actions.contains(action))
        };
        Some(scopes.iter().all(|s| s.actions.iter().all(|action| has(s.name.as_str(), action))))
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scopes(text: &str) -> Vec<Scope> {
        text.split(' ').filter_map(Scope::parse).collect()
    }

    #[test]
    fn a_token_allows_what_it_says_for_a_while() {
        let (tokens, now) = (Tokens::new(&[7; 32]), SystemTime::now());
        let token = tokens.issue("me", &scopes("repository:a/b:pull,push repository:c:pull"), now);
        for (wanted, allowed) in [
            ("", true),
            ("repository:a/b:pull", true),
            ("repository:a/b:push repository:c:pull", true),
            ("repository:c:push", false),
            ("repository:a/b:delete", false),
            ("repository:a:pull", false),
            ("repository:a/b:pull repository:d:pull", false),
        ] {
            assert_eq!(tokens.allows(&token, &scopes(wanted), now), Some(allowed), "{wanted}");
        }
        assert_eq!(tokens.allows(&token, &[], now + LIFETIME - Duration::from_secs(1)), Some(true));
        assert_eq!(tokens.allows(&token, &[], now + LIFETIME), None);
        // Another server with the key takes it, one without does not.
        assert_eq!(Tokens::new(&[7; 32]).allows(&token, &[], now), Some(true));
        assert_eq!(Tokens::new(&[8; 32]).allows(&token, &[], now), None);
    }

    #[test]
    fn what_nobody_signed_is_no_token() {
        let (tokens, now) = (Tokens::new(&[7; 32]), SystemTime::now());
        let token = tokens.issue("me", &[], now);
        let [header, claims, signature] = token.split('.').collect::<Vec<_>>()[..] else { panic!("{token}") };
        let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
        let more = scopes("repository:a:pull,push,delete");
        let other = tokens.issue("me", &more, now);
        let other = other.split('.').nth(1).unwrap();
        for forged in [
            String::new(),
            "..".to_owned(),
            format!("{none}.{claims}."),
            format!("{none}.{claims}.{signature}"),
            format!("{header}.{other}.{signature}"),
            format!("{header}.{claims}."),
            format!("{header}.{claims}.{signature}."),
        ] {
            assert_eq!(tokens.allows(&forged, &[], now), None, "{forged}");
        }
        // Signed with the key, but not by us.
        for (header, claims) in [(none.as_str(), claims), (header, "e30"), (header, "bm9uZQ")] {
            let signed = format!("{header}.{claims}");
            let signature = URL_SAFE_NO_PAD.encode(hmac::sign(&tokens.0, signed.as_bytes()));
            assert_eq!(tokens.allows(&format!("{signed}.{signature}"), &[], now), None, "{signed}");
        }
    }

    proptest! {
        #[test]
        fn a_changed_byte_is_no_token(at in any::<proptest::sample::Index>(), byte in 0u8..128) {
            let (tokens, now) = (Tokens::new(&[7; 32]), SystemTime::now());
            let token = tokens.issue("me", &scopes("repository:a:pull"), now);
            let mut changed = token.clone().into_bytes();
            let at = at.index(changed.len());
            changed[at] = byte;
            let changed = String::from_utf8(changed).unwrap();
            prop_assert_eq!(tokens.allows(&changed, &[], now).is_some(), changed == token);
        }

        #[test]
        fn any_text_is_judged(text in ".{0,200}") {
            prop_assert_eq!(Tokens::new(&[7; 32]).allows(&text, &[], SystemTime::now()), None);
        }
    }
}
