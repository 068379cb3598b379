//! What a person types.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tdfs_common::digest::Digest;
use tdfs_common::trace::Method;

use crate::node;
use crate::oci::Reference;
use crate::record::Probe;
use crate::record::sandbox::Network;

/// Starts large containers cold in about the time they need warm.
#[derive(Debug, Parser)]
#[command(name = "tdfs", version, propagate_version = true)]
pub struct Cli {
    /// Print one JSON object on stdout instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Log more on stderr (-v info, -vv debug); RUST_LOG overrides
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `tdfs`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Record a service until it is ready and attach its runtime image to the image
    Record(RecordArgs),
    /// Pack saved traces into a runtime image
    Pack(PackArgs),
    /// Start a container from an image and its runtime image; report every stage
    Run(RunArgs),
    /// Mount an image read-only
    Mount(MountArgs),
    /// Unmount what `tdfs mount` mounted
    Umount {
        /// Mount point
        target: PathBuf,
        /// State directory of the mount
        #[arg(long, value_name = "DIR", default_value = "/var/lib/tdfs")]
        state: PathBuf,
    },
    /// Show an image and its runtime images
    Inspect(InspectArgs),
    /// Check every byte of an image's runtime images against the image
    Verify(InspectArgs),
    /// Draw a recording, a start, or both as one page for a browser
    Report(ReportArgs),
    /// Serve images and runtime images to other machines
    Registry(RegistryArgs),
    /// The server behind `tdfs mount`
    #[command(hide = true)]
    ServeMount {
        /// State directory of the mount
        #[arg(long, value_name = "DIR")]
        state: PathBuf,
    },
}

/// How to reach registries, and where to keep things.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Cache and state directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tdfs")]
    pub state: PathBuf,
    /// Speak plain HTTP to the registry, or with =false TLS; left out, plain HTTP on loopback addresses only
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub plain_http: Option<bool>,
    /// Try this registry before the image's own; may be given several times
    #[arg(long, value_name = "URL")]
    pub mirror: Vec<String>,
    /// Whether to fetch from the page service of a registry or mirror that has one
    #[arg(long, value_enum, default_value_t = PageServiceUse::Auto)]
    pub page_service: PageServiceUse,
    /// Trust the certificates in this PEM file as well
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Read registry credentials from this docker config instead of the usual places
    #[arg(long, value_name = "FILE")]
    pub authfile: Option<PathBuf>,
    /// Platform to choose from an image index, os/architecture[/variant]
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
}

/// Where a runtime image goes.
#[derive(Args, Clone, Debug)]
pub struct Destination {
    /// Write a layout that holds the image and its runtime image
    #[arg(long, value_name = "OCI-DIR", conflicts_with = "push")]
    pub output: Option<PathBuf>,
    /// Push the runtime image into the image's own repository
    #[arg(long)]
    pub push: bool,
}

/// What `tdfs record` and `tdfs pack` share: the image, and what becomes of the traces.
#[derive(Args, Debug)]
pub struct Packing {
    /// registry/repo:tag, …@sha256:… or oci:DIR[:tag]
    pub image: Reference,
    /// Group whose services share pages
    #[arg(long, value_name = "GROUP", default_value = "default")]
    pub group: String,
    /// Pack although events were lost: the start will fetch what is missing on demand
    #[arg(long)]
    pub allow_incomplete: bool,
    /// Where the runtime image goes
    #[command(flatten)]
    pub destination: Destination,
    /// Registries and directories
    #[command(flatten)]
    pub common: Common,
    /// Command that replaces the image's
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `tdfs record`
#[derive(Args, Debug)]
pub struct RecordArgs {
    /// Name of the service
    #[arg(long, value_name = "NAME")]
    pub service: String,
    /// When the service is ready: tcp:PORT, http:URL[=STATUS], log:REGEX, open:PATH, exec:PATH,
    /// uprobe:PATH:SYMBOL or exit[=CODE]
    #[arg(long, value_name = "PROBE")]
    pub ready: Probe,
    /// Give up when not ready by then
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub timeout: Duration,
    /// Record this many runs and pack what any of them touched
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// Trace this way instead of the best that the kernel allows
    #[arg(long, value_enum, value_name = "METHOD")]
    pub method: Option<TraceMethod>,
    /// Also save the trace
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Network of the container
    #[arg(long, value_enum, default_value_t = Net::Private)]
    pub network: Net,
    /// The image and the runtime image
    #[command(flatten)]
    pub packing: Packing,
}

/// `tdfs pack`
#[derive(Args, Debug)]
pub struct PackArgs {
    /// Traces saved by `tdfs record --trace`; those of one service merge
    #[arg(long, value_name = "FILE", required = true)]
    pub trace: Vec<PathBuf>,
    /// The image and the runtime image
    #[command(flatten)]
    pub packing: Packing,
}

/// Which runtime image a start uses.
#[derive(Args, Clone, Debug)]
pub struct Choice {
    /// Service whose runtime image to use; may be left out where there is one
    #[arg(long, value_name = "NAME")]
    pub service: Option<String>,
    /// Use exactly the runtime image with this manifest digest
    #[arg(long, value_name = "DIGEST")]
    pub pin: Option<Digest>,
    /// Use no runtime image: fetch all layers first
    #[arg(long, conflicts_with_all = ["service", "pin"])]
    pub no_runtime_image: bool,
    /// When to ask the registry what the reference stands for
    #[arg(long, value_enum, default_value_t = Pull::Missing)]
    pub pull: Pull,
}

/// `tdfs run`
#[derive(Args, Debug)]
pub struct RunArgs {
    /// registry/repo:tag, …@sha256:… or oci:DIR[:tag]
    pub image: Reference,
    /// Which runtime image
    #[command(flatten)]
    pub choice: Choice,
    /// When the service is ready; the recorded probe where left out
    #[arg(long, value_name = "PROBE")]
    pub ready: Option<Probe>,
    /// Give up when not ready by then
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub timeout: Duration,
    /// Network of the container
    #[arg(long, value_enum, default_value_t = Net::Host)]
    pub network: Net,
    /// When its process starts
    #[arg(long, value_enum, default_value_t = Start::Auto)]
    pub start: Start,
    /// Stop the container as soon as it is ready, and fetch what is missing then
    #[arg(long)]
    pub exit_when_ready: bool,
    /// Write what happened, moment by moment, for `tdfs report`: when ready, and once more when the container has ended
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
    /// Registries and directories
    #[command(flatten)]
    pub common: Common,
    /// Command that replaces the image's and the service's
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `tdfs mount`
#[derive(Args, Clone, Debug)]
pub struct MountArgs {
    /// registry/repo:tag, …@sha256:… or oci:DIR[:tag]
    pub image: Reference,
    /// Empty directory to mount on
    pub target: PathBuf,
    /// Which runtime image
    #[command(flatten)]
    pub choice: Choice,
    /// Registries and directories
    #[command(flatten)]
    pub common: Common,
}

/// `tdfs inspect` and `tdfs verify`
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// registry/repo:tag, …@sha256:…, oci:DIR[:tag] or the directory of a layout
    #[arg(value_parser = super::inspect::image_or_layout)]
    pub image: Reference,
    /// Only this service
    #[arg(long, value_name = "NAME")]
    pub service: Option<String>,
    /// Registries and directories
    #[command(flatten)]
    pub common: Common,
}

/// `tdfs report`
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// Draw the recordings of this image: registry/repo:tag, …@sha256:…, oci:DIR[:tag] or the directory of a layout
    #[arg(value_parser = super::inspect::image_or_layout, required_unless_present = "events")]
    pub image: Option<Reference>,
    /// Only this service
    #[arg(long, value_name = "NAME", requires = "image")]
    pub service: Option<String>,
    /// Draw the start that `tdfs run --events FILE` wrote down
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
    /// What to write
    #[arg(long, value_enum, default_value_t = ReportFormat::Html)]
    pub format: ReportFormat,
    /// Where to; `-` for standard output. tdfs-report.html or tdfs-trace.json where left out
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Registries and directories
    #[command(flatten)]
    pub common: Common,
}

/// What a report is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// One page that needs nothing else
    Html,
    /// The start in the Trace Event Format, for ui.perfetto.dev; needs --events
    Perfetto,
}

/// `tdfs registry`
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct RegistryArgs {
    /// Something else than to serve
    #[command(subcommand)]
    pub command: Option<RegistryCommand>,
    /// How to serve
    #[command(flatten)]
    pub serve: Option<ServeArgs>,
}

/// What can be done with a registry besides serving it.
#[derive(Debug, Subcommand)]
pub enum RegistryCommand {
    /// Delete what nothing reaches; servers may run meanwhile
    Gc(GcArgs),
}

/// `tdfs registry gc`
#[derive(Args, Clone, Debug)]
pub struct GcArgs {
    /// Directory, or s3://bucket[/prefix]; AWS_* variables tell the endpoint and the keys
    #[arg(long, value_name = "ROOT")]
    pub root: String,
    /// Keep what is younger, or was relied on more recently
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    pub grace: Duration,
    /// Delete manifests that no tag, index or living subject leads to as well
    #[arg(long)]
    pub untagged: bool,
    /// Only say what would be deleted
    #[arg(long)]
    pub dry_run: bool,
}

/// How a registry is served.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Directory, or s3://bucket[/prefix]; AWS_* variables tell the endpoint and the keys
    #[arg(long, value_name = "ROOT")]
    pub root: String,
    /// Address to listen on; port 0 for any, it is printed
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:5000")]
    pub listen: String,
    /// Fetch what is not there from this registry, http[s]://host[:port], and keep it
    #[arg(long, value_name = "URL")]
    pub upstream: Option<String>,
    /// Trust the certificates in this PEM file as well when talking to the other registry
    #[arg(long, value_name = "FILE", requires = "upstream")]
    pub ca_file: Option<PathBuf>,
    /// Read credentials for the other registry from this docker config instead of the usual places
    #[arg(long, value_name = "FILE", requires = "upstream")]
    pub authfile: Option<PathBuf>,
    /// Refuse all that changes something
    #[arg(long)]
    pub read_only: bool,
    /// Users and their passwords, as `htpasswd -B` writes them
    #[arg(long, value_name = "FILE")]
    pub htpasswd: Option<PathBuf>,
    /// Let everybody pull; only pushes and deletions need a user
    #[arg(long, requires = "htpasswd")]
    pub anonymous_pull: bool,
    /// Give users tokens for what they ask, signed with the key in this file (32 random bytes or more); all servers
    /// over one root share it
    #[arg(long, value_name = "FILE", requires = "htpasswd")]
    pub token_key: Option<PathBuf>,
    /// Speak TLS with the certificates in this PEM file
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Key of the first certificate, a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// How long a client may take for the head of a request, and for any 64 KiB that it sends or is sent
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub patience: Duration,
    /// Serve /metrics here instead of beside everything else
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_listen: Option<String>,
}

/// When to use a page service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PageServiceUse {
    /// Where there is one
    Auto,
    /// Nowhere: blobs and ranges only
    Never,
}

/// When to ask the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// Only what the state directory does not know yet
    Missing,
    /// Resolve the reference and its runtime images anew
    Always,
}

/// How touched pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TraceMethod {
    /// Typed tracepoints: needs BTF
    TpBtf,
    /// Classic tracepoints
    Tracepoint,
    /// The page cache after the run, without BPF: exact pages, order unknown
    Residency,
}

/// When a container's process starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Start {
    /// Streaming if what is missing is expected to take longer than creating the container and the detour through FUSE
    Auto,
    /// When all pages are there
    Fetched,
    /// While they arrive
    Streaming,
}

impl From<Start> for node::StartMode {
    fn from(start: Start) -> Self {
        match start {
            Start::Auto => Self::Auto,
            Start::Fetched => Self::Fetched,
            Start::Streaming => Self::Streaming,
        }
    }
}

/// Network of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Net {
    /// The host's
    Host,
    /// Its own, with loopback only
    Private,
}

impl From<TraceMethod> for Method {
    fn from(method: TraceMethod) -> Self {
        match method {
            TraceMethod::TpBtf => Self::TpBtf,
            TraceMethod::Tracepoint => Self::Tracepoint,
            TraceMethod::Residency => Self::Residency,
        }
    }
}

impl From<Net> for Network {
    fn from(net: Net) -> Self {
        match net {
            Net::Host => Self::Host,
            Net::Private => Self::Private,
        }
    }
}

impl Choice {
    /// For the node.
    pub fn choice(&self) -> node::Choice {
        match (self.no_runtime_image, self.pin, &self.service) {
            (true, ..) => node::Choice::Without,
            (_, Some(digest), _) => node::Choice::Pinned(digest),
            (_, _, Some(name)) => node::Choice::Service(name.clone()),
            _ => node::Choice::Any,
        }
    }

    /// For the node.
    pub fn pull(&self) -> node::Pull {
        match self.pull {
            Pull::Missing => node::Pull::Missing,
            Pull::Always => node::Pull::Always,
        }
    }
}

/// `90`, `90s`, `1500ms`, `2m`, `1h`
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a time such as 60s"))?;
    let millis = match &text[digits.len()..] {
        "" | "s" => number.checked_mul(1000),
        "ms" => Some(number),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        unit => return Err(format!("unknown unit {unit:?}: use ms, s, m or h")),
    };
    millis.map(Duration::from_millis).ok_or_else(|| format!("{text:?} is too long"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations() {
        assert_eq!(duration("60s"), Ok(Duration::from_mins(1)));
        assert_eq!(duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Ok(Duration::from_mins(2)));
        assert_eq!(duration("1h"), Ok(Duration::from_hours(1)));
        for bad in ["", "s", "-1s", "1d", "99999999999999999m"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
