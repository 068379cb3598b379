//! `tdfs mount` and `tdfs umount`: the mount is served by the node's daemon or, without one, by a process of its own that
//! ends with it.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use anyhow::{Context as _, bail};
use tokio::io::AsyncReadExt as _;

use super::args::MountArgs;
use super::{Signals, print};
use crate::agent::{self, MountRequest};
use crate::node::{self, MountOptions, MountReport, Mounts};

/// Asks the daemon, or starts a server and waits until the mount is there.
pub async fn mount(args: &MountArgs, json: bool) -> anyhow::Result<ExitCode> {
    let report = match agent::ask(&args.common.state, request(args)?).await? {
        Some(report) => report,
        None => own_server().await?,
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

async fn own_server() -> anyhow::Result<MountReport> {
    let program = std::env::current_exe().context("cannot find my own program")?;
    // The same arguments: the server parses them itself. What comes before the command takes no values, and what comes
    // behind it may be called "mount" too.
    let mut own: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(command) = own.iter_mut().find(|a| *a == "mount") {
        *command = "serve-mount".into();
    }
    let mut server = tokio::process::Command::new(program)
        .args(own)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the server of the mount")?;
    let (mut report, mut messages) = (String::new(), String::new());
    let (Some(mut stdout), Some(mut stderr)) = (server.stdout.take(), server.stderr.take()) else {
        bail!("the server of the mount has no output");
    };
    // Both end when the server closes them: after the mount, or because it failed.
    tokio::try_join!(stdout.read_to_string(&mut report), stderr.read_to_string(&mut messages))?;
    if report.is_empty() {
        let status = server.wait().await?;
        let line = messages.lines().last().unwrap_or_default();
        bail!("{}", if line.is_empty() { status.to_string() } else { line.replacen("tdfs: ", "", 1) });
    }
    eprint!("{messages}");
    serde_json::from_str(&report).context("the server of the mount is confused")
}

/// The server.
pub async fn serve(args: &MountArgs) -> anyhow::Result<ExitCode> {
    // Not the terminal's: closing it must not end the mount. It fails only for a group leader, which needs none.
    let _ = nix::unistd::setsid();
    let state = args.common.state().await?;
    let client = args.common.client(&args.image)?;
    let options =
        MountOptions { choice: args.choice.choice(), pull: args.choice.pull(), target: args.target.clone() };
    let mut signals = Signals::listen()?;
    let mounts = Mounts::new(state);
    let mounting = async { Ok(mounts.mount(&args.image, &options, &client, &|_, _| {}).await?) };
    let server = signals.interrupt(mounting).await?;
    print(true, &server.report, "")?;
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
