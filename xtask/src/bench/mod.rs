//! `cargo xtask bench`: what a start costs, measured side by side.
//!
//! - `pairs.rs`: how close a start with everything on the node comes to a warm one, and what the probe costs.
//! - `cold.rs`: empty nodes behind links of known bandwidth, by every method: the table of the README.
//! - `agree.rs`: whether two such runs say the same.
//!
//! Everything that is compared runs in turns in one run, under the same runc, until the same client gets an answer.

mod agree;
mod cold;
mod methods;
mod pairs;
mod peer;
mod report;
mod statistics;
mod subject;
mod warm;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use xtask::network::Rate;

/// What to measure; everything if nothing is named.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Starts of empty nodes behind links of known bandwidth.
    Cold(ColdArgs),
    /// Whether the results of two runs of `bench cold`, named by their directories, agree.
    Agree {
        /// The first run's `--output`
        first: PathBuf,
        /// The second run's
        second: PathBuf,
    },
    /// A resident start next to a warm overlay, and a recording next to one without its probe.
    Pairs(PairsArgs),
}

/// Options of `bench cold`.
#[derive(Args, Clone, Debug)]
pub struct ColdArgs {
    /// nginx, redis, python or pytorch, or a TOML file that describes another; may be given several times [default: the
    /// four]
    #[arg(long, value_name = "IMAGE")]
    image: Vec<String>,
    /// Bandwidth; may be given several times
    #[arg(long, value_name = "RATE", default_values = ["10gbit", "1gbit", "100mbit"])]
    rate: Vec<Rate>,
    /// Round-trip time that the link has on top of its own, such as 10ms
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    rtt: Duration,
    /// Whole tables; in each a full pull happens once and everything else twice
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// Only methods whose name contains this; may be given several times
    #[arg(long, value_name = "NAME")]
    method: Vec<String>,
    /// Another way to start a container, described in a TOML file; may be given several times
    #[arg(long, value_name = "FILE")]
    peer: Vec<PathBuf>,
    /// Where results.json, table.md and report.html go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    output: PathBuf,
}

/// Options of `bench pairs`.
#[derive(Args, Clone, Debug)]
pub struct PairsArgs {
    /// nginx, redis, python or pytorch, or a TOML file that describes another
    #[arg(long, value_name = "IMAGE", default_value = "python")]
    image: String,
    /// Pairs of starts
    #[arg(long, value_name = "N", default_value_t = 10)]
    pairs: usize,
}

#[derive(clap::Parser)]
struct Defaults {
    #[command(subcommand)]
    bench: Bench,
}

/// Runs one benchmark, or both with their defaults.
pub fn run(bench: Option<Bench>) -> Result<()> {
    match bench {
        Some(Bench::Cold(args)) => cold::run(&args),
        Some(Bench::Agree { first, second }) => agree::run(&first, &second),
        Some(Bench::Pairs(args)) => pairs::run(&args.image, args.pairs),
        None => ["pairs", "cold"].into_iter().try_for_each(|name| {
            let defaults = <Defaults as clap::Parser>::parse_from(["bench", name]);
            run(Some(defaults.bench))
        }),
    }
}
