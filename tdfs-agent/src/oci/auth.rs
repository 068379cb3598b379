//! Answers to `WWW-Authenticate`: basic credentials or a bearer token.
//!
//! ```text
//! request -> 401, challenge -> credentials of this registry -> Basic: sent as they are
//!                                                           -> Bearer: token endpoint -> token
//! ```
//!
//! One `Authorization` value is kept per repository and sent until the registry refuses it, which is also how an
//! expired token or one that may not push is replaced. Concurrent requests that are refused share one token request.
//! Credentials go to the registry itself and to the token endpoint it names, and to nobody else.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use tokio::sync::Mutex;
use url::Url;
use url::form_urlencoded::Serializer;

use super::OciError;
use super::credentials::{Credentials, Secret};
use super::transport::{Kind, Outgoing, Transport, is_as_secure};

/// Bytes of a token endpoint's answer.
const TOKEN_MAX: u64 = 1 << 20;
/// Name of this program at token endpoints.
const CLIENT_ID: &str = "tdfs";

/// Authorization for one repository.
#[derive(Debug)]
pub(super) struct Auth {
    host: String,
    repository: String,
    credentials: Credentials,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    header: Option<HeaderValue>,
    /// Looked up at the first challenge.
    secret: Option<Result<Option<Secret>, String>>,
}

impl Auth {
    pub fn new(host: &str, repository: &str, credentials: Credentials) -> Self {
        Self {
            host: host.to_owned(),
            repository: repository.to_owned(),
            credentials,
            state: Mutex::default(),
        }
    }

    /// What to send as `Authorization`.
    pub async fn header(&self) -> Option<HeaderValue> {
        self.state.lock().await.header.clone()
    }

    /// After a 401 to a request that carried `used`: gets something better. False when there is nothing better.
    pub async fn challenged(
        &self,
        transport: &Transport,
        url: &Url,
        answer: &HeaderMap,
        used: Option<&HeaderValue>,
    ) -> Result<bool, OciError> {
        let mut state = self.state.lock().await;
        if state.header.as_ref() != used {
            // Another request was quicker.
            return Ok(state.header.is_some());
        }
        let challenges: Vec<Challenge> = answer
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .flat_map(parse_challenges)
            .collect();
        if state.secret.is_none() {
            let found = self.credentials.find(&self.host, &self.repository).await;
            state.secret = Some(found.map_err(|e| e.to_string()));
        }
        let secret = state.secret.as_ref().and_then(|s| s.as_ref().ok()).and_then(Option::as_ref);
        let header = if let Some(bearer) = challenges.iter().find(|c| c.scheme == "bearer") {
            let token = match secret {
                Some(Secret::Token(token)) => token.clone(),
                _ => self.token(transport, url, bearer, secret).await?,
            };
            header_value(&format!("Bearer {token}"))?
        } else if let (true, Some(Secret::Password { user, password })) =
            (challenges.iter().any(|c| c.scheme == "basic"), secret)
        {
            basic(user, password)?
        } else {
            return Ok(false);
        };
        let better = used != Some(&header);
        state.header = Some(header);
        Ok(better)
    }

    /// The error for a request that was refused for good.
    pub async fn denied(&self, refusal: OciError) -> OciError {
        let OciError::Status { status, message, .. } = refusal else { return refusal };
        let known = match &self.state.lock().await.secret {
            Some(Ok(Some(_))) => "with the credentials configured for it".to_owned(),
            Some(Ok(None)) => "without credentials, none are configured for it".to_owned(),
            Some(Err(e)) => format!("without credentials, because {e}"),
            None => "without being asked for credentials".to_owned(),
        };
        let (host, repository) = (self.host.clone(), self.repository.clone());
        OciError::Denied { host, repository, reason: format!("status {status}{message} ({known})") }
    }

    /// Docker token authentication: GET with basic credentials, or the OAuth2 POST for an identity token.
    async fn token(
        &self,
        transport: &Transport,
        url: &Url,
        challenge: &Challenge,
        secret: Option<&Secret>,
    ) -> Result<String, OciError> {
        let bad = |reason: &str| OciError::malformed(format!("challenge of {}", self.host), reason);
        let realm = challenge.parameter("realm").ok_or_else(|| bad("no realm"))?;
        let mut realm: Url = realm.parse().map_err(|_| bad("the realm is not an address"))?;
        if !is_as_secure(url, &realm) {
            return Err(bad("the realm is less secure than the registry"));
        }
        let own_scope = format!("repository:{}:pull", self.repository);
        let scope = challenge.parameter("scope").unwrap_or(&own_scope);
        let service = challenge.parameter("service");
        let request = if let Some(Secret::Identity(refresh)) = secret {
            let mut form = Serializer::new(String::new());
            form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", refresh);
            form.append_pair("client_id", CLIENT_ID).append_pair("scope", scope);
            form.append_pair("service", service.unwrap_or_default());
            let mut request = Outgoing::new(Method::POST, realm, Kind::Metadata);
            request
                .headers
                .insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
            request.body = Some(Bytes::from(form.finish()));
            request
        } else {
            {
                let mut query = realm.query_pairs_mut();
                query.extend_pairs(service.map(|s| ("service", s)));
                // Several scopes are several parameters.
                query.extend_pairs(scope.split(' ').filter(|s| !s.is_empty()).map(|s| ("scope", s)));
                query.append_pair("client_id", CLIENT_ID);
            }
            let mut request = Outgoing::new(Method::GET, realm, Kind::Metadata);
            if let Some(Secret::Password { user, password }) = secret {
                request.headers.insert(AUTHORIZATION, basic(user, password)?);
            }
            request
        };
        let answer = transport.send(&request).await?;
        let what = answer.url.clone();
        match answer.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::BAD_REQUEST
            | StatusCode::NOT_FOUND => {
                let OciError::Status { status, message, .. } = answer.fail().await else {
                    return Err(bad("no token"));
                };
                let with = if secret.is_some() { "the configured credentials" } else { "no credentials" };
                let reason = format!("no token from {what} with {with}: status {status}{message}");
                let (host, repository) = (self.host.clone(), self.repository.clone());
                return Err(OciError::Denied { host, repository, reason });
            }
            _ => return Err(answer.fail().await),
        }
        let body = answer.bytes(TOKEN_MAX).await?;
        // The parser's message could quote a token, so it is not passed on.
        let token: Token =
            serde_json::from_slice(&body).map_err(|_| OciError::malformed(&*what, "not a token answer"))?;
        let token = [token.token, token.access_token].into_iter().flatten().find(|t| !t.is_empty());
        token.ok_or_else(|| OciError::malformed(what, "an answer without a token"))
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

fn basic(user: &str, password: &str) -> Result<HeaderValue, OciError> {
    header_value(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
}

fn header_value(text: &str) -> Result<HeaderValue, OciError> {
    let mut value =
        HeaderValue::from_str(text).map_err(|_| OciError::Setup("token with control characters".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// One challenge of a `WWW-Authenticate` header (RFC 9110, section 11.6.1).
#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    /// Lower case.
    scheme: String,
    /// Names in lower case.
    parameters: Vec<(String, String)>,
}

impl Challenge {
    fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// All challenges of one header line. What does not fit the grammar is skipped.
fn parse_challenges(line: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    for item in split_list(line) {
        // `scheme`, `scheme name=value` or `name=value`; a scheme has no '=' before its first space.
        let (head, rest) = item.split_once(char::is_whitespace).unwrap_or((item, ""));
        let parameter = if head.contains('=') {
            item
        } else if !head.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            continue;
        } else {
            challenges.push(Challenge { scheme: head.to_ascii_lowercase(), parameters: Vec::new() });
            rest.trim()
        };
        if let (Some(challenge), Some((name, value))) = (challenges.last_mut(), parameter.split_once('=')) {
            challenge.parameters.push((name.trim().to_ascii_lowercase(), unquote(value.trim())));
        }
    }
    challenges
}

/// Splits at commas outside of quoted strings.
fn split_list(line: &str) -> Vec<&str> {
    let (mut quoted, mut escaped) = (false, false);
    line.split(move |c| {
        let separator = c == ',' && !quoted;
        quoted ^= c == '"' && !escaped;
        escaped = quoted && c == '\\' && !escaped;
        separator
    })
    .map(str::trim)
    .filter(|item| !item.is_empty())
    .collect()
}

fn unquote(value: &str) -> String {
    let Some(inner) = value.strip_prefix('"') else { return value.to_owned() };
    let mut text = String::new();
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => text.extend(chars.next()),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges_are_parsed() {
        let line =
            r#"Bearer realm="https://auth.io/t?a=1,2",service="r \"x\" y", scope="repository:a/b:pull,push""#;
        let [bearer] = &parse_challenges(line)[..] else { panic!("one challenge") };
        assert_eq!(bearer.scheme, "bearer");
        assert_eq!(bearer.parameter("realm"), Some("https://auth.io/t?a=1,2"));
        assert_eq!(bearer.parameter("service"), Some("r \"x\" y"));
        assert_eq!(bearer.parameter("scope"), Some("repository:a/b:pull,push"));
        let schemes = |line| parse_challenges(line).into_iter().map(|c| c.scheme).collect::<Vec<_>>();
        assert_eq!(
            schemes(r#"Negotiate, Basic realm="a, b", BEARER realm=x"#),
            ["negotiate", "basic", "bearer"]
        );
        assert_eq!(schemes(r#"Basic realm = "x""#), ["basic"]);
        assert!(schemes("").is_empty() && schemes(",,").is_empty() && schemes("=x").is_empty());
    }

    proptest! {
        #[test]
        fn any_challenge_parses(line in r#"[a-zA-Z=",\\ ]{0,60}"#) {
            for challenge in parse_challenges(&line) {
                prop_assert!(challenge.scheme.bytes().all(|b| b.is_ascii_lowercase()));
            }
        }

        #[test]
        fn quoted_values_survive(value in r"[ -~]{0,30}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let challenges = parse_challenges(&format!("Bearer a=\"{quoted}\", b=c"));
            prop_assert_eq!(challenges.len(), 1);
            prop_assert_eq!(challenges[0].parameter("a"), Some(value.as_str()));
            prop_assert_eq!(challenges[0].parameter("b"), Some("c"));
        }
    }
}
