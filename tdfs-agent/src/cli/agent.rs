//! `tdfs-agent`, the daemon.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use sd_notify::NotifyState;

use super::{Signals, finish, log, one_line};
use crate::agent::{Agent, Config};

/// Serves the mounts of a node: `tdfs mount` with the same state directory asks it
#[derive(Debug, Parser)]
#[command(name = "tdfs-agent", version)]
struct AgentArgs {
    /// Configuration; without this option that of /etc/tdfs/config.toml, if there is one
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Runs `tdfs-agent` with the process's arguments.
pub fn main() -> ExitCode {
    let args = AgentArgs::parse();
    let (path, named) = match &args.config {
        Some(path) => (path.as_path(), true),
        None => (Path::new(Config::PATH), false),
    };
    match Config::read(path, named) {
        Ok(config) => {
            log(&config.log);
            finish("tdfs-agent", serve(config))
        }
        Err(error) => {
            eprintln!("tdfs-agent: {}", one_line(&error.into()));
            ExitCode::FAILURE
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let agent = Agent::listen(&config.state).await?;
    tracing::info!(state = %config.state.display(), "serving");
    // Without systemd nobody is told.
    sd_notify::notify(&[NotifyState::Ready])?;
    agent
        .run(async {
            let signal = signals.next().await;
            tracing::info!(%signal, "stopping");
            let _ = sd_notify::notify(&[NotifyState::Stopping]);
        })
        .await;
    Ok(ExitCode::SUCCESS)
}
