//! Developer commands: `cargo xtask <command>`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::images::{self, Cache, Compression, IMAGES};
use xtask::install;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer commands of tdfs")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that demo, test and bench need.
    Install,
    /// Build real images from Debian packages and print the paths of their OCI layouts.
    Images {
        /// Which; all if none is named.
        names: Vec<String>,
        /// How their layers are compressed.
        #[arg(long, value_enum, default_value = "gzip")]
        compression: Compression,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Install => {
            install::packages(install::IMAGE_PACKAGES)?;
            install::packages(install::RUN_PACKAGES)
        }
        Task::Images { mut names, compression } => {
            if names.is_empty() {
                names = IMAGES.iter().map(|image| image.name.to_owned()).collect();
            }
            for name in names {
                let layout = Cache::default().image(images::recipe(&name)?, compression)?;
                println!("{}", layout.display());
            }
            Ok(())
        }
    }
}
