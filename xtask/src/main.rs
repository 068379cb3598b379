//! Developer commands: `cargo xtask <command>`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::ebpf;
use xtask::images::{self, Cache, Compression, IMAGES};
use xtask::install;

mod bench;
mod demo;
mod fuzz;
mod interrupt;
mod test;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer commands of tdfs")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the probe and replace the committed object.
    Ebpf {
        /// Compare with the committed object instead.
        #[arg(long)]
        check: bool,
    },
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
    /// Record a real image and start it cold, next to a full pull by containerd.
    ///
    /// The first run builds tdfs and the image from Debian packages and keeps both. The default image is a large one
    /// (PyTorch, 0.4 GB compressed), which takes some minutes; `--image nginx` takes under one.
    Demo {
        /// nginx, redis, python or pytorch.
        #[arg(long, value_name = "NAME", default_value = "pytorch")]
        image: String,
    },
    /// Run every check and test.
    Test {
        /// Only what needs neither root nor images.
        #[arg(long)]
        quick: bool,
    },
    /// Run the fuzz targets of every parser; needs a nightly toolchain.
    Fuzz {
        /// Which; all if none is named.
        names: Vec<String>,
        /// How long each runs.
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        seconds: u32,
    },
    /// Measure starts next to others, in turns; everything if nothing is named.
    Bench {
        #[command(subcommand)]
        bench: Option<bench::Bench>,
    },
}

fn main() -> ExitCode {
    let task = Arguments::parse().command;
    match interrupt::survive().and_then(|()| run(task)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Ebpf { check } => ebpf::run(check),
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
        Task::Demo { image } => demo::run(&image),
        Task::Test { quick } => test::run(quick),
        Task::Fuzz { names, seconds } => fuzz::run(&names, seconds),
        Task::Bench { bench } => bench::run(bench),
    }
}
