//! Starts of empty nodes behind links of known bandwidth, by every method, in turns.
//!
//! ```text
//! registries, images, recordings           once
//!   round -> image -> rate -> method       reset the node, start, count what passed the link
//! ```
//!
//! Each round is a whole table. So the starts of a row are as far apart as the run is long, and a machine that gets
//! slower meanwhile shows in their spread; and every start stands next to warm ones of the same minutes. From the second
//! round on, starts are shuffled: none always meets what the same other left behind.
//!
//! A start that fails is a row of the result like any other. The floor of a start is the longer of a warm start and the
//! time that the compressed pages take on the wire; nothing can be faster.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use xtask::images::{Compression, IMAGES};
use xtask::network::{Link, Place, Rate, Side};
use xtask::registry::Registry;
use xtask::{command, install};

use super::ColdArgs;
use super::methods::{FullPull, Method, Moment, Start, Tdfs, Warm};
use super::peer::{Description, Peer};
use super::report::{self, Results};
use super::subject::Subject;
use super::warm::WarmOverlay;

/// One start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Image.
    pub image: String,
    /// Bandwidth of the link, bits per second.
    pub rate: u64,
    /// Method.
    pub method: String,
    /// Whole table.
    pub round: usize,
    /// Bytes that the node received until the service answered.
    pub link_bytes: u64,
    /// Packets that the node received until then.
    pub link_packets: u64,
    /// Bytes that the node had received when the program told what it received, which may be later: a service goes on
    /// reading. It stands beside what was told.
    pub link_bytes_told: Option<u64>,
    /// What the start told, unless it failed.
    #[serde(flatten)]
    pub start: Option<Start>,
    /// Why it failed.
    pub failed: Option<String>,
}

/// The registries, and where the programs run.
struct Site {
    registry: Registry,
    ours: Registry,
    server: Place,
    node: Place,
    tdfs: PathBuf,
}

/// Measures and writes the results.
pub fn run(args: &ColdArgs) -> Result<()> {
    install::packages(install::IMAGE_PACKAGES)?;
    install::packages(install::RUN_PACKAGES)?;
    install::packages(install::NETWORK_PACKAGES)?;
    install::require_root("to mount, to run containers and to make networks")?;
    let names: Vec<&str> = match &args.image[..] {
        [] => IMAGES.iter().map(|image| image.name).collect(),
        named => named.iter().map(String::as_str).collect(),
    };
    let peers = args.peer.iter().map(|path| Description::read(path)).collect::<Result<Vec<_>>>()?;
    let tdfs = crate::demo::build_release()?;
    let directory = TempDir::with_prefix_in("bench-", command::workspace().join("target"))?;
    let link = Link::new(u8::try_from(std::process::id() % 200)?, args.rtt)?;
    let (server, node) = (link.place(Side::Registry), link.place(Side::Node));
    let registry = Registry::start(directory.path(), &server)?;
    let ours = Registry::start_tdfs(&tdfs, directory.path(), &server)?;
    let site = Site { registry, ours, server, node, tdfs };

    let output = command::workspace().join(&args.output);
    let mut results = Results::new(args.rtt, args.rounds);
    let mut subjects = Vec::new();
    for name in names {
        eprintln!("==> {name}: images");
        let work = TempDir::with_prefix_in("image-", directory.path())?;
        subjects.push((Subject::new(name, work.path())?, work));
    }
    let mut all = Vec::new();
    for (subject, work) in &subjects {
        eprintln!("==> {}: a recording", subject.name);
        let mut methods = methods(&site, subject, work.path(), &peers)?;
        methods.retain(|m| args.method.is_empty() || args.method.iter().any(|part| m.name().contains(part)));
        all.push((subject, methods));
    }
    let mut random = fastrand::Rng::with_seed(0);
    for round in 0..args.rounds {
        for (subject, methods) in &mut all {
            for &rate in &args.rate {
                let mut turns: Vec<usize> = methods
                    .iter()
                    .enumerate()
                    .flat_map(|(n, m)| std::iter::repeat_n(n, m.starts()))
                    .collect();
                if round > 0 {
                    random.shuffle(&mut turns);
                }
                for turn in turns {
                    let sample = measure(&link, rate, &subject.name, round, &mut *methods[turn])?;
                    eprintln!("{}", report::line(&sample));
                    results.samples.push(sample);
                }
                // A run takes long: what was measured stays when it is ended.
                results.write(&output)?;
            }
        }
    }
    println!("{}\nwritten to {}", results.table(), output.display());
    Ok(())
}

fn measure(link: &Link, rate: Rate, image: &str, round: usize, method: &mut dyn Method) -> Result<Sample> {
    // Pushing and preparing need no limit.
    link.shape(None)?;
    method.reset()?;
    // What the one before wrote is on the disk, and not on its way there: a full pull leaves gigabytes.
    nix::unistd::sync();
    link.shape(Some(rate))?;
    let before = link.passed()?;
    // What a container reads while it ends is no part of its start.
    let (mut answered, mut told) = (None, None);
    let started = method.start(&mut |moment| match moment {
        Moment::Answered => answered = Some(link.passed()),
        Moment::Told => told = Some(link.passed()),
    });
    let passed = answered.unwrap_or_else(|| link.passed())? - before;
    let told = told.transpose()?.map(|passed| (passed - before).bytes);
    let (start, failed) = match started {
        Ok(start) => (Some(start), None),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    Ok(Sample {
        image: image.to_owned(),
        rate: rate.bits,
        method: method.name().to_owned(),
        round,
        link_bytes: passed.bytes,
        link_packets: passed.packets,
        link_bytes_told: told,
        start,
        failed,
    })
}

/// Pushes and records the image, and prepares every method for it.
fn methods<'a>(
    site: &Site,
    subject: &'a Subject,
    work: &'a Path,
    peers: &[Description],
) -> Result<Vec<Box<dyn Method + 'a>>> {
    let service = &subject.service;
    let layout = subject.layout(Compression::Gzip)?;
    let gzip = site.registry.push(&layout, &subject.name)?;
    let zstd = site.registry.push(&subject.layout(Compression::Zstd)?, &format!("{}-zstd", subject.name))?;
    let ours = site.ours.push(&layout, &subject.name)?;
    let trace = work.join("trace");
    let tdfs = |command: &str, reference: &str| {
        let mut tdfs = site.server.command(&site.tdfs);
        tdfs.args([command, reference, "--plain-http", "--push", "--state"]).arg(work.join("ci"));
        tdfs.arg("--trace").arg(&trace);
        tdfs
    };
    // Recorded where it is going to run: in another network services read other files.
    let how = ["--service", service.name, "--ready", service.ready, "--network", "host"];
    command::output(tdfs("record", &gzip).args(how)).context("recording")?;
    command::output(&mut tdfs("pack", &ours)).context("packing")?;

    let full = |name, reference: &str| FullPull {
        name,
        place: site.node.clone(),
        directory: work,
        reference: reference.to_owned(),
        service,
        containerd: None,
    };
    let cold = |name, reference: &str, options: &[&'static str]| Tdfs {
        name,
        place: site.node.clone(),
        program: site.tdfs.clone(),
        directory: work,
        reference: reference.to_owned(),
        service,
        options: options.to_vec(),
        state: None,
    };
    let mut methods: Vec<Box<dyn Method + 'a>> = vec![
        Box::new(Warm(WarmOverlay::new(subject, work, &site.node)?)),
        Box::new(full("full pull, gzip", &gzip)),
        Box::new(full("full pull, zstd", &zstd)),
        Box::new(cold("tdfs, ranges", &gzip, &["--start", "fetched"])),
        Box::new(cold("tdfs, ranges, streaming", &gzip, &["--start", "streaming"])),
        Box::new(cold("tdfs, page service", &ours, &["--start", "fetched"])),
        Box::new(cold("tdfs, page service, streaming", &ours, &["--start", "streaming"])),
        Box::new(cold("tdfs", &ours, &[])),
    ];
    for peer in peers {
        let images = (gzip.clone(), zstd.clone());
        methods.push(Box::new(Peer::new(peer.clone(), &site.node, work, images, service)?));
    }
    Ok(methods)
}
