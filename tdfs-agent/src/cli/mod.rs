//! The command line: arguments in, one object or a few lines out, one clear line on error.

mod args;
mod inspect;
mod mount;
mod progress;
mod record;
mod registry;
mod report;
mod run;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use nix::sys::signal::Signal;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::node::{self, State};
use crate::oci::{ClientOptions, Location, Reference};
use args::{Cli, Command, Common};

/// Runs `tdfs` with the process's arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = ["warn", "info", "debug"][usize::from(cli.verbose.min(2))];
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).compact().init();
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no threads for the runtime")
        .and_then(|runtime| {
            let result = runtime.block_on(dispatch(&cli));
            // A blocked read must not keep a finished command alive.
            runtime.shutdown_background();
            result
        });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tdfs: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes; most messages contain those already.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.contains(&cause) {
            line = if line.is_empty() { cause } else { format!("{line}: {cause}") };
        }
    }
    line.replace('\n', " ")
}

async fn dispatch(cli: &Cli) -> anyhow::Result<ExitCode> {
    let json = cli.json;
    match &cli.command {
        Command::Record(args) => record::record(args, json).await,
        Command::Pack(args) => record::pack(args, json).await,
        Command::Run(args) => run::run(args, json).await,
        Command::Mount(args) => mount::mount(args, json).await,
        Command::ServeMount(args) => mount::serve(args).await,
        Command::Umount { target, state } => mount::umount(target, state, json).await,
        Command::Inspect(args) => inspect::inspect(args, json).await,
        Command::Verify(args) => inspect::verify(args, json).await,
        Command::Report(args) => report::report(args, json).await,
        Command::Registry(args) => registry::registry(args, json).await,
    }
}

impl Common {
    /// How to reach the registry of `image`.
    fn client(&self, image: &Reference) -> anyhow::Result<ClientOptions> {
        let mut options = ClientOptions {
            plain_http: self.plain_http,
            auth_file: self.authfile.clone(),
            ca_file: self.ca_file.clone(),
            page_service: self.page_service == args::PageServiceUse::Auto,
            ..ClientOptions::default()
        };
        if let Some(platform) = &self.platform {
            options.platform = platform.parse()?;
        }
        if let Location::Registry { host, .. } = image.location() {
            options.mirrors = BTreeMap::from([(host.clone(), self.mirror.clone())]);
        }
        Ok(options)
    }

    /// The state directory, cleared of what dead processes left.
    async fn state(&self) -> anyhow::Result<State> {
        let state = State::open(&self.state)?;
        node::recover(&state).await?;
        Ok(state)
    }
}

/// Prints `value` as JSON, or `text`.
fn print(json: bool, value: &impl Serialize, text: &str) -> anyhow::Result<()> {
    let line = if json { serde_json::to_string(value)? } else { text.to_owned() };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("cannot write to standard output")
}

/// Ends `work` on SIGINT or SIGTERM.
async fn interruptible<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    Signals::listen()?.interrupt(work).await
}

/// SIGINT and SIGTERM. None of them is lost from when this exists, also while nobody waits for them.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let (interrupt, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        Ok(Self { interrupt, terminate })
    }

    /// The next one.
    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::SIGINT,
            _ = self.terminate.recv() => Signal::SIGTERM,
        }
    }

    /// Ends `work` on either.
    async fn interrupt<T>(&mut self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        tokio::select! {
            result = work => result,
            signal = self.next() => match signal {
                Signal::SIGINT => anyhow::bail!("interrupted"),
                _ => anyhow::bail!("terminated"),
            },
        }
    }
}
