//! `tdfs run`

use std::process::ExitCode;

use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

use super::args::RunArgs;
use super::{interruptible, print, progress};
use crate::node::{self, Rest, Running, StartOptions};
use crate::record::sandbox::Forward;

/// Starts a container, reports when it is ready, and stays until it ends.
pub async fn run(args: &RunArgs, json: bool) -> anyhow::Result<ExitCode> {
    let state = args.common.state().await?;
    let client = args.common.client(&args.image)?;
    let options = StartOptions {
        mode: args.start.into(),
        choice: args.choice.choice(),
        pull: args.choice.pull(),
        ready: args.ready.clone(),
        timeout: args.timeout,
        network: args.network.into(),
        args: (!args.command.is_empty()).then(|| args.command.clone()),
        // With --json standard output is for the report.
        forward: if json { Forward::Stderr } else { Forward::Stdout },
    };
    let bar = progress::bytes("fetching");
    let shown = |done, total| progress::show(&bar, done, total);
    let started =
        interruptible(async { Ok(node::start(&state, &args.image, &options, &client, &shown).await?) }).await;
    bar.finish_and_clear();
    let running = match started {
        Ok(running) => running,
        Err(error) => {
            // An interrupted start may have left a container behind.
            node::recover(&state).await?;
            return Err(error);
        }
    };
    if json {
        print(true, &running.report, "")?;
    } else {
        eprintln!("{}", running.report.text());
    }
    if args.exit_when_ready {
        let ended = async { Ok(running.end(Rest::Fetch).await) };
        interruptible(ended).await?;
        return Ok(ExitCode::SUCCESS);
    }
    forward_signals(&running).await?;
    let exit = running.end(Rest::Leave).await;
    Ok(exit.map_or(ExitCode::FAILURE, |e| ExitCode::from(u8::try_from(e.code()).unwrap_or(1))))
}

/// Passes signals to the container until it has ended.
async fn forward_signals(running: &Running) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        let passed = tokio::select! {
            _ = running.sandbox().wait() => return Ok(()),
            _ = interrupt.recv() => Signal::SIGINT,
            _ = terminate.recv() => Signal::SIGTERM,
            _ = hangup.recv() => Signal::SIGHUP,
        };
        running.sandbox().signal(passed)?;
    }
}
