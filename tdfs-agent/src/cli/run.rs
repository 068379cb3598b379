//! `tdfs run`

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

use super::args::RunArgs;
use super::{interruptible, print, progress};
use crate::node::{self, Recording, Rest, Running, StartOptions};
use crate::record::sandbox::Forward;

/// Starts a container, reports when it is ready, and stays until it ends.
pub async fn run(args: &RunArgs, json: bool) -> anyhow::Result<ExitCode> {
    let state = args.common.state().await?;
    let client = args.common.client(&args.image)?;
    let events =
        args.events.as_ref().map(|path| File::create(path).with_context(|| path.display().to_string()));
    let events = events.transpose()?;
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
        events: events.is_some(),
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
    let events = events.zip(running.recording());
    save(events.as_ref())?;
    if json {
        print(true, &running.report, "")?;
    } else {
        eprintln!("{}", running.report.text());
    }
    if args.exit_when_ready {
        let ended = async { Ok(running.end(Rest::Fetch).await) };
        interruptible(ended).await?;
        save(events.as_ref())?;
        return Ok(ExitCode::SUCCESS);
    }
    forward_signals(&running).await?;
    let exit = running.end(Rest::Leave).await;
    save(events.as_ref())?;
    Ok(exit.map_or(ExitCode::FAILURE, |e| ExitCode::from(u8::try_from(e.code()).unwrap_or(1))))
}

/// Writes what was recorded so far, in place of what the file held.
fn save(events: Option<&(File, Arc<Recording>)>) -> anyhow::Result<()> {
    let Some((mut file, recording)) = events.map(|(file, recording)| (file, recording)) else {
        return Ok(());
    };
    // It lists the paths of the image: meanwhile others serve the container.
    let bytes = tokio::task::block_in_place(|| serde_json::to_vec(&recording.timeline()))?;
    let written =
        file.rewind().and_then(|()| file.write_all(&bytes)).and_then(|()| file.set_len(bytes.len() as u64));
    written.context("cannot write the events")
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
