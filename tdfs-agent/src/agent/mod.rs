//! The node daemon: one process that serves all mounts of a state directory.
//!
//! ```text
//! tdfs mount --connect--> STATE/agent/socket --Request--> serve.rs -> node::Mounts -> EROFS mount, one per image
//!            <--------------------------------Answer----                         \-> bind mounts, one per request
//! ```
//!
//! Without a daemon every `tdfs mount` has a server of its own, which gets the same request on its standard input. With a
//! daemon, mounts of one image and runtime image share one EROFS mount, and with it the kernel's page cache and the cold
//! device. The daemon asks no registry before it is asked for something, and leaves all caches where they are when it stops.
//!
//! It blocks on nothing but what a request needs, and requests do not wait for each other unless they mount the same
//! image. When it is told to stop it unmounts everything. When it is killed its mounts stay, serve hot pages and give
//! EIO for cold ones, until it starts again, or any other command with this state directory does: both remove what the
//! dead left.

mod ask;
mod config;
mod protocol;
mod serve;

use std::io;
use std::path::{Path, PathBuf};

pub use ask::{ask, ask_over};
pub use config::Config;
pub use protocol::{MountRequest, Registries};
pub use serve::{Agent, answer};

use crate::node::NodeError;

/// In the state directory, mode 0700: who connects may mount whatever root may.
const DIRECTORY: &str = "agent";
const SOCKET: &str = "socket";

/// The daemon cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, on one line.
        reason: String,
    },
    /// The state directory, or what is mounted from it.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The socket or its directory.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another daemon serves this state directory.
    #[error("{} is served by another tdfs-agent", .0.display())]
    Served(PathBuf),
    /// The daemon refused, or could not do, what it was asked.
    #[error("{0}")]
    Refused(String),
    /// The daemon ended, or is of another version.
    #[error("tdfs-agent does not answer: {0}")]
    Silent(String),
}

impl AgentError {
    fn io(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path: path.clone(), source }
    }
}
