//! The command line: arguments in, one object or a few lines out, one clear line on error.

mod agent;
mod args;
mod inspect;
mod mount;
mod progress;
mod record;
mod registry;
mod report;
mod run;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use nix::sys::signal::Signal;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::Registries;
use crate::node::{self, State};
use crate::oci::{ClientOptions, Location, Platform, Reference};
use args::{Cli, Command, Common};

pub use agent::main as agent;

/// Runs `tdfs` with the process's arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log(["warn", "info", "debug"][usize::from(cli.verbose.min(2))]);
    finish("tdfs", dispatch(&cli))
}

/// Logs on standard error what passes this filter, or that of `RUST_LOG`.
fn log(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| filter.into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).compact().init();
}

/// Does the work of the program called `name` and says on one line what went wrong.
fn finish(name: &str, work: impl Future<Output = anyhow::Result<ExitCode>>) -> ExitCode {
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no threads for the runtime")
        .and_then(|runtime| {
            let result = runtime.block_on(work);
            // A blocked read must not keep a finished command alive.
            runtime.shutdown_background();
            result
        });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{name}: {}", one_line(&error));
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
        Command::Mount(args) => mount::mount(args, cli.verbose, json).await,
        Command::ServeMount { state } => mount::serve(state).await,
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
        let host = match image.location() {
            Location::Registry { host, .. } => Some(host.as_str()),
            Location::Layout(_) => None,
        };
        Ok(self.registries()?.options(host))
    }

    /// What was said of registries, with absolute paths.
    fn registries(&self) -> anyhow::Result<Registries> {
        let absolute = |path: &Option<PathBuf>| path.as_deref().map(std::path::absolute).transpose();
        Ok(Registries {
            plain_http: self.plain_http,
            mirrors: self.mirror.clone(),
            auth_file: absolute(&self.authfile)?,
            ca_file: absolute(&self.ca_file)?,
            page_service: self.page_service == args::PageServiceUse::Auto,
            platform: self.platform.as_deref().map_or(Ok(Platform::host()), str::parse)?,
        })
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
