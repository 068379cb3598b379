//! `tdfs mount` and `tdfs umount`: the mount is served by the node's daemon or, without one, by a process of its own that
//! ends with it.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use anyhow::{Context as _, bail};

use super::args::MountArgs;
use super::{Signals, print};
use crate::agent::{self, AgentError, MountRequest};
use crate::node::{self, MountReport, Mounts, State};

/// Asks the daemon, or starts a server and asks that.
pub async fn mount(args: &MountArgs, verbose: u8, json: bool) -> anyhow::Result<ExitCode> {
    let request = request(args)?;
    let report = match agent::ask(&args.common.state, request.clone()).await? {
        Some(report) => report,
        None => own_server(&args.common.state().await?, request, verbose).await?,
    };
    let text = format!("{} mounted on {}", args.image, report.target.display());
    print(json, &report, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn request(args: &MountArgs) -> anyhow::Result<MountRequest> {
    Ok(MountRequest {
        image: args.image.clone().absolute()?.to_string(),
        target: std::path::absolute(&args.target)?,
        choice: args.choice.choice(),
        pull: args.choice.pull(),
        registries: args.common.registries()?,
    })
}

async fn own_server(state: &State, request: MountRequest, verbose: u8) -> anyhow::Result<MountReport> {
    let program = std::env::current_exe().context("cannot find my own program")?;
    let mut server = tokio::process::Command::new(program)
        .args((0..verbose).map(|_| "-v"))
        .arg("serve-mount")
        .arg("--state")
        .arg(state.root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the server of the mount")?;
    let (Some(to), Some(from)) = (server.stdin.take(), server.stdout.take()) else {
        bail!("the server of the mount has no pipes");
    };
    match agent::ask_over(from, to, request).await {
        Err(AgentError::Silent(_)) => bail!("the server of the mount: {}", server.wait().await?),
        answered => Ok(answered?),
    }
}

/// The server of one mount: a request on standard input, the answer on standard output.
pub async fn serve(state: &Path) -> anyhow::Result<ExitCode> {
    // Not the terminal's: closing it must not end the mount. It fails only for a group leader, which needs none.
    let _ = nix::unistd::setsid();
    let mounts = Mounts::new(State::open(state)?);
    let mut signals = Signals::listen()?;
    let told = async {
        signals.next().await;
    };
    let Some(server) = agent::answer(&mounts, tokio::io::stdin(), tokio::io::stdout(), told).await else {
        return Ok(ExitCode::FAILURE);
    };
    detach()?;
    let told = async {
        signals.next().await;
    };
    server.serve(told).await?;
    Ok(ExitCode::SUCCESS)
}

/// Unmounts and waits until the server has cleaned up.
pub async fn umount(target: &Path, state: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let target: PathBuf = target.canonicalize().with_context(|| format!("{}", target.display()))?;
    node::umount(state, &target).await?;
    print(json, &serde_json::json!({ "target": target }), &format!("{} unmounted", target.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Closes standard output and error for whoever reads them.
fn detach() -> anyhow::Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}
