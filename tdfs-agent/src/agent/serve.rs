//! Requests in, mounts out.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinSet, spawn_blocking};

use super::protocol::{self, Answer, MountRequest, Request};
use super::{AgentError, DIRECTORY, SOCKET};
use crate::node::{self, MountOptions, MountServer, Mounts, State};
use crate::oci::{Location, OciError, Reference};

/// What a client may take to send its request.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests at a time that are read or carried out; what is mounted does not count.
const REQUESTS: usize = 64;
/// After a connection that could not be accepted, for want of file descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// A daemon that listens.
pub struct Agent {
    mounts: Arc<Mounts>,
    listener: UnixListener,
    socket: PathBuf,
    /// As long as it is held nobody else serves this state directory.
    _lock: Flock<File>,
}

impl Agent {
    /// Takes over the state directory: removes what dead processes left there, and listens.
    pub async fn listen(state: &Path) -> Result<Self, AgentError> {
        let state = State::open(state)?;
        let directory = state.root().join(DIRECTORY);
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(AgentError::io(&directory)(e)),
            _ => {}
        }
        let lock = lock(&directory.join("lock"), state.root())?;
        node::recover(&state).await?;
        let socket = directory.join(SOCKET);
        match std::fs::remove_file(&socket) {
            // Its owner is dead: we hold the lock.
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(AgentError::io(&socket)(e)),
            _ => {}
        }
        let listener = UnixListener::bind(&socket).map_err(AgentError::io(&socket))?;
        Ok(Self { mounts: Arc::new(Mounts::new(state)), listener, socket, _lock: lock })
    }

    /// Serves until `stop`, then unmounts everything.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let (stopping, stopped) = watch::channel(false);
        let places = Arc::new(Semaphore::new(REQUESTS));
        let mut served = JoinSet::new();
        tokio::pin!(stop);
        loop {
            // The semaphore is never closed.
            let accepted =
                async { (places.clone().acquire_owned().await.ok(), self.listener.accept().await) };
            let (place, accepted) = tokio::select! {
                accepted = accepted => accepted,
                Some(_) = served.join_next() => continue,
                () = &mut stop => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (mounts, stopped) = (Arc::clone(&self.mounts), stopped.clone());
                    served.spawn(async move {
                        let (runtime, asked) = (Handle::current(), stopped.clone());
                        let (from, to) = stream.into_split();
                        // A thread of its own: rustc cannot see that the future of a mount is Send.
                        let answer = move || runtime.block_on(answer(&mounts, from, to, wait(asked)));
                        let Ok(Some(server)) = spawn_blocking(answer).await else { return };
                        drop(place);
                        let target = server.report.target.clone();
                        if let Err(error) = server.serve(wait(stopped)).await {
                            tracing::warn!("{error}");
                        }
                        tracing::info!(target = %target.display(), "unmounted");
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        // Nobody shall wait for an answer that does not come.
        drop(self.listener);
        let _ = std::fs::remove_file(&self.socket);
        stopping.send_replace(true);
        while served.join_next().await.is_some() {}
    }
}

async fn wait(mut stopped: watch::Receiver<bool>) {
    // It fails only when the sender is gone, which is a stop as well.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Does what one client asks and tells it, unless `stop` comes first; what is then to be served.
pub async fn answer(
    mounts: &Mounts,
    from: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    stop: impl Future<Output = ()>,
) -> Option<MountServer> {
    let carried_out = async {
        let request = tokio::time::timeout(PATIENCE, protocol::read(from));
        match request.await.map_err(|_| format!("no request within {} s", PATIENCE.as_secs()))?? {
            Request::Mount(request) => mount(mounts, request).await.map_err(|e| one_line(&e)),
        }
    };
    let mounted = tokio::select! {
        mounted = carried_out => mounted,
        () = stop => Err("the server of the mount is told to stop".into()),
    };
    let (answer, server) = match mounted {
        Ok(server) => {
            tracing::info!(image = %server.report.image, target = %server.report.target.display(), "mounted");
            (Answer::Mounted(server.report.clone()), Some(server))
        }
        Err(reason) => {
            tracing::info!(%reason, "refused");
            (Answer::Failed(reason), None)
        }
    };
    if let Err(error) = protocol::write(to, &answer).await {
        tracing::info!(%error, "nobody waits for the answer");
        if let Some(server) = server
            && let Err(error) = server.serve(std::future::ready(())).await
        {
            tracing::warn!("{error}");
        }
        return None;
    }
    server
}

async fn mount(mounts: &Mounts, request: MountRequest) -> Result<MountServer, AgentError> {
    let image: Reference = request.image.parse().map_err(|e: OciError| AgentError::Refused(e.to_string()))?;
    let host = match image.location() {
        Location::Registry { host, .. } => Some(host.as_str()),
        Location::Layout(dir) if dir.is_absolute() => None,
        Location::Layout(_) => return Err(AgentError::Refused("the layout is no absolute path".into())),
    };
    if !request.target.is_absolute() {
        return Err(AgentError::Refused("the mount point is no absolute path".into()));
    }
    let client = request.registries.options(host);
    let options = MountOptions { choice: request.choice, pull: request.pull, target: request.target };
    Ok(mounts.mount(&image, &options, &client, &|_, _| {}).await?)
}

fn one_line(error: &AgentError) -> String {
    error.to_string().replace('\n', " ")
}

fn lock(path: &Path, state: &Path) -> Result<Flock<File>, AgentError> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let file = file.map_err(AgentError::io(path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => AgentError::Served(state.to_owned()),
        errno => AgentError::io(path)(errno.into()),
    })
}
