//! The other end: who asks.

use std::io;
use std::path::Path;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

use super::protocol::{self, Answer, MountRequest, Request};
use super::{AgentError, DIRECTORY, SOCKET};
use crate::node::MountReport;

/// Asks the daemon of the state directory for a mount; `None` where no daemon serves it. Waits as long as the mount takes.
pub async fn ask(state: &Path, request: MountRequest) -> Result<Option<MountReport>, AgentError> {
    let socket = state.join(DIRECTORY).join(SOCKET);
    let mut stream = match UnixStream::connect(&socket).await {
        // Never one there, one that ended, or a path too long for one.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::InvalidInput
            ) =>
        {
            return Ok(None);
        }
        stream => stream.map_err(AgentError::io(&socket))?,
    };
    let (from, to) = stream.split();
    ask_over(from, to, request).await.map(Some)
}

/// Asks whoever reads `to` and answers on `from`.
pub async fn ask_over(
    from: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    request: MountRequest,
) -> Result<MountReport, AgentError> {
    // One that refuses without reading it says why.
    let _ = protocol::write(to, &Request::Mount(request)).await;
    match protocol::read(from).await.map_err(AgentError::Silent)? {
        Answer::Mounted(report) => Ok(report),
        Answer::Failed(reason) => Err(AgentError::Refused(reason)),
    }
}
