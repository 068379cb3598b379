//! `tdfs run`

use std::fs::{self, File};
use std::io::{Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

use super::args::RunArgs;
use super::{Signals, print, progress};
use crate::node::{self, Recording, Rest, Running, StartOptions};
use crate::record::sandbox::Forward;

/// Starts a container, reports when it is ready, and stays until it ends.
pub async fn run(args: &RunArgs, json: bool) -> anyhow::Result<ExitCode> {
    let state = args.common.state().await?;
    let client = args.common.client(&args.image)?;
    let events = args.events.as_deref().map(EventsFile::create).transpose()?;
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
    // From here on they are for the container, or end its start.
    let mut signals = Signals::listen()?;
    let starting = async { Ok(node::start(&state, &args.image, &options, &client, &shown).await?) };
    let started = signals.interrupt(starting).await;
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
    if let Err(error) = save(events.as_ref()) {
        // Without them the container is what it is with them; the end of this command tells the same.
        tracing::warn!("{error:#}");
    }
    if json {
        print(true, &running.report, "")?;
    } else {
        eprintln!("{}", running.report.text());
    }
    if args.exit_when_ready {
        let ended = async { Ok(running.end(Rest::Fetch).await) };
        signals.interrupt(ended).await?;
        save(events.as_ref())?;
        return Ok(ExitCode::SUCCESS);
    }
    forward(signals, &running).await?;
    let exit = running.end(Rest::Leave).await;
    save(events.as_ref())?;
    Ok(exit.map_or(ExitCode::FAILURE, |e| ExitCode::from(u8::try_from(e.code()).unwrap_or(1))))
}

/// Writes what was recorded so far, in place of what the file held.
fn save(events: Option<&(EventsFile, Arc<Recording>)>) -> anyhow::Result<()> {
    let Some((file, recording)) = events else { return Ok(()) };
    // It lists the paths of the image: meanwhile others serve the container.
    tokio::task::block_in_place(|| file.write(&serde_json::to_vec(&recording.timeline())?))
}

/// Where events go. Removed again if nothing was ever written.
struct EventsFile {
    path: PathBuf,
    file: File,
}

impl EventsFile {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn write(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut file = &self.file;
        let written = file
            .rewind()
            .and_then(|()| file.write_all(bytes))
            .and_then(|()| file.set_len(bytes.len() as u64));
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for EventsFile {
    fn drop(&mut self) {
        if self.file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() == 0) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Passes signals to the container until it has ended.
async fn forward(mut signals: Signals, running: &Running) -> anyhow::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        let passed = tokio::select! {
            _ = running.sandbox().wait() => return Ok(()),
            passed = signals.next() => passed,
            _ = hangup.recv() => Signal::SIGHUP,
        };
        running.sandbox().signal(passed)?;
    }
}
