//! The listener: connections in, requests to the router, everything bounded.
//!
//! A connection gets one of [`CONNECTIONS_MAX`] places or waits in the kernel's queue; the heads of its requests must be
//! small, and its peer may keep the server waiting no longer than `patience` says. On a signal no connection is taken any
//! more, those that are idle close, and those at work get [`GRACE`] to finish.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{ConnectInfo, State};
use axum::http::header::{CONTENT_TYPE, HeaderName};
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use super::access::{Access, AccessError};
use super::metrics::Metrics;
use super::observe::observe;
use super::patience::Impatient;
use super::{Registry, api};

/// Connections at a time.
const CONNECTIONS_MAX: usize = 1024;
/// Header fields of a request.
const HEADERS_MAX: usize = 64;
/// Bytes of the head of a request.
const HEAD_MAX: usize = 32 << 10;
/// For requests to finish when the server stops.
const GRACE: Duration = Duration::from_secs(20);
/// After a failure to accept, such as no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How the server is to be run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen; port 0 for any.
    pub listen: String,
    /// Where to serve the counters instead of beside everything else.
    pub metrics_listen: Option<String>,
    /// PEM files of the certificates and the key to speak TLS with.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Who may do what; without it, everybody everything.
    pub htpasswd: Option<PathBuf>,
    /// Everybody may read.
    pub anonymous_pull: bool,
    /// File with the key of the tokens that users get.
    pub token_key: Option<PathBuf>,
    /// How long a peer may take for the head of a request, also when its connection was idle, and for any 64 KiB of what
    /// it sends or is sent.
    pub patience: Duration,
}

/// The server cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It cannot listen.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The users are not usable.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The certificates or the key are not usable.
    #[error("{}: {reason}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    router: Router,
    tls: Option<TlsAcceptor>,
    metrics: Option<(TcpListener, Router)>,
    counters: Arc<Metrics>,
    patience: Duration,
}

impl Server {
    /// Listens.
    pub async fn bind(registry: Arc<Registry>, options: &Options) -> Result<Self, ServeError> {
        let listen = async |address: &String| {
            let listening = TcpListener::bind(address).await;
            listening.map_err(|source| ServeError::Listen { address: address.clone(), source })
        };
        let counters = registry.metrics().clone();
        let tls = options.tls.as_ref().map(|(certificates, key)| acceptor(certificates, key)).transpose()?;
        let patience = options.patience;
        let mut router = api::router(registry, patience);
        if let Some(path) = &options.htpasswd {
            let key = options.token_key.as_deref();
            let access = Arc::new(Access::load(path, options.anonymous_pull, key)?);
            let guard = api::Guard { access: access.clone(), is_tls: tls.is_some() };
            router = router.layer(from_fn_with_state(guard, api::guard));
            if access.has_tokens() {
                router = router.merge(api::tokens(access));
            }
        }
        // Those that need no credentials.
        let mut open = Router::new().route("/healthz", get(async || "ok\n"));
        let metrics_router = Router::new().route("/metrics", get(text)).with_state(counters.clone());
        let metrics = if let Some(address) = &options.metrics_listen {
            Some((listen(address).await?, metrics_router))
        } else {
            open = open.merge(metrics_router);
            None
        };
        let router = router.merge(open).layer(from_fn_with_state(counters.clone(), observe));
        Ok(Self { listener: listen(&options.listen).await?, router, tls, metrics, counters, patience })
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Where the counters are served, if not beside everything else.
    pub fn metrics_address(&self) -> io::Result<Option<SocketAddr>> {
        self.metrics.as_ref().map(|(listener, _)| listener.local_addr()).transpose()
    }

    /// Serves until `stop`, and until the requests that run then are done or had time enough.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let graceful = GracefulShutdown::new();
        let listening = Listening { graceful: &graceful, counters: &self.counters, patience: self.patience };
        let metrics = async {
            match self.metrics {
                Some((listener, router)) => listening.accept(listener, router, None).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = listening.accept(self.listener, self.router, self.tls) => {}
            () = metrics => {}
            () = stop => {}
        }
        if tokio::time::timeout(GRACE, graceful.shutdown()).await.is_err() {
            tracing::warn!("stopped with requests unfinished after {} s", GRACE.as_secs());
        }
    }
}

async fn text(State(metrics): State<Arc<Metrics>>) -> ([(HeaderName, &'static str); 1], String) {
    ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], metrics.text())
}

fn acceptor(certificates: &Path, key: &Path) -> Result<TlsAcceptor, ServeError> {
    let bad = |path: &Path, reason: String| ServeError::Tls { path: path.to_owned(), reason };
    let chain = CertificateDer::pem_file_iter(certificates)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| bad(certificates, e.to_string()))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| bad(key, e.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, private))
        .map_err(|e| bad(certificates, e.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[derive(Clone, Copy)]
struct Listening<'a> {
    graceful: &'a GracefulShutdown,
    counters: &'a Arc<Metrics>,
    patience: Duration,
}

impl Listening<'_> {
    /// Takes connections, for ever.
    async fn accept(self, listener: TcpListener, router: Router, tls: Option<TlsAcceptor>) {
        let patience = self.patience;
        let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
        server
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(patience)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_MAX);
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            // The semaphore is never closed.
            let place = places.clone().acquire_owned().await.ok();
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(e) => {
                    tracing::warn!("cannot accept: {e}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // Answers are written whole; only latency is at stake.
            let _ = stream.set_nodelay(true);
            let service = TowerToHyperService::new(router.clone().layer(Extension(ConnectInfo(peer))));
            let (server, watcher, tls) = (server.clone(), self.graceful.watcher(), tls.clone());
            let connections = self.counters.connections.clone();
            tokio::spawn(async move {
                connections.inc();
                let served = match tls {
                    None => {
                        let stream = TokioIo::new(Impatient::new(stream, patience));
                        let connection = server.serve_connection(stream, service);
                        watcher.watch(connection.into_owned()).await
                    }
                    Some(tls) => match tokio::time::timeout(patience, tls.accept(stream)).await {
                        Ok(Ok(stream)) => {
                            let stream = TokioIo::new(Impatient::new(stream, patience));
                            let connection = server.serve_connection(stream, service);
                            watcher.watch(connection.into_owned()).await
                        }
                        Ok(Err(e)) => Err(e.into()),
                        Err(_) => Err("no TLS handshake".into()),
                    },
                };
                if let Err(e) = served {
                    tracing::debug!("{peer}: {e}");
                }
                connections.dec();
                drop(place);
            });
        }
    }
}
