//! Who may pass, and tokens for those who may.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CACHE_CONTROL, HOST, HeaderValue, WWW_AUTHENTICATE};
use axum::http::{Method, Response, StatusCode};
use axum::middleware::Next;
use axum::response::IntoResponse;
use axum::routing::get;
use serde_json::json;

use super::super::access::{Access, Verdict};
use super::super::request::{Action, Scope};
use super::super::token::{LIFETIME, SERVICE};
use super::{Answer, Head, Refusal, json};

/// Where tokens are.
const TOKEN_PATH: &str = "/tdfs/v1/token";
/// Scopes of a token.
const SCOPES_MAX: usize = 8;
const BASIC: &str = "Basic realm=\"tdfs registry\"";

/// What is asked of who wants to pass.
#[derive(Clone)]
pub struct Guard {
    pub access: Arc<Access>,
    /// Clients speak TLS with this server.
    pub is_tls: bool,
}

/// Lets through who may pass. That this is a registry is told to nobody without credentials: clients ask for it to
/// learn whether they need any.
pub async fn guard(
    State(Guard { access, is_tls }): State<Guard>,
    request: Request,
    next: Next,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let head = Head(parts);
    let (method, path) = (&head.0.method, head.0.uri.path());
    let is_api = path == "/v2" || path.starts_with("/v2/");
    let is_base = matches!(path, "/v2" | "/v2/");
    // The page service answers questions, whatever the method.
    let is_pull = !is_base && (!is_api || matches!(*method, Method::GET | Method::HEAD));
    let from = head.parameter("mount").and_then(|_| head.parameter("from")?.parse().ok());
    let needed = Scope::needed(method.as_str(), path, from);
    let error = match access.allows(authorization(&head), is_pull, &needed).await {
        Verdict::Allowed => return next.run(Request::from_parts(head.0, body)).await,
        Verdict::Insufficient => ",error=\"insufficient_scope\"",
        Verdict::Unknown => "",
    };
    let challenge = realm(&head, is_tls).filter(|_| access.has_tokens()).map(|realm| {
        let scopes: Vec<String> = needed.into_iter().map(|scope| offered(scope).to_string()).collect();
        let scope =
            if scopes.is_empty() { String::new() } else { format!(",scope=\"{}\"", scopes.join(" ")) };
        format!("Bearer realm=\"{realm}\",service=\"{SERVICE}\"{scope}{error}")
    });
    let refusal = Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "this needs a user and a password");
    refusal.with(WWW_AUTHENTICATE, challenge.as_deref().unwrap_or(BASIC)).into_response()
}

/// Serves tokens.
pub fn tokens(access: Arc<Access>) -> Router {
    Router::new().route(TOKEN_PATH, get(token)).with_state(access)
}

async fn token(State(access): State<Arc<Access>>, request: Request) -> Response<Body> {
    let head = Head(request.into_parts().0);
    issue(&access, &head).await.unwrap_or_else(IntoResponse::into_response)
}

async fn issue(access: &Access, head: &Head) -> Answer {
    let query = head.0.uri.query().unwrap_or_default();
    let pairs: Vec<_> = url::form_urlencoded::parse(query.as_bytes()).collect();
    let wanted = pairs.iter().filter(|(name, _)| name == "scope").flat_map(|(_, scopes)| scopes.split(' '));
    let scopes: Vec<Scope> = wanted.filter_map(Scope::parse).collect();
    if scopes.len() > SCOPES_MAX {
        let message = format!("a token is for {SCOPES_MAX} repositories at most");
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", message));
    }
    let Some(token) = access.token(authorization(head), scopes).await else {
        let refusal = Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "wrong user or password");
        return Err(refusal.with(WWW_AUTHENTICATE, BASIC));
    };
    let mut response = json(&json!({
        "token": token,
        "access_token": token,
        "expires_in": LIFETIME.as_secs(),
        "issued_at": humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
    }));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

fn authorization(head: &Head) -> Option<&str> {
    head.0.headers.get(AUTHORIZATION).map(|v| v.to_str().unwrap_or_default())
}

/// What is offered to who needs something: who writes reads as well.
fn offered(mut needed: Scope) -> Scope {
    needed.actions.insert(Action::Pull);
    needed
}

/// The address of the tokens, as this client sees it. It can mislead only itself.
fn realm(head: &Head, is_tls: bool) -> Option<String> {
    let is_host = |host: &&str| host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b));
    let host = head.header(HOST).filter(is_host)?;
    // Said by what ends TLS in front of this server.
    let scheme = match head.0.headers.get("x-forwarded-proto").map(HeaderValue::as_bytes) {
        Some(b"https") => "https",
        _ if is_tls => "https",
        _ => "http",
    };
    Some(format!("{scheme}://{host}{TOKEN_PATH}"))
}
