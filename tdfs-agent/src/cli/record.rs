//! `tdfs record` and `tdfs pack`

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use serde::Serialize;
use tdfs_common::digest::Digest;
use tdfs_common::envelope;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::trace::{Method, Trace};
use tokio::runtime::Handle;

use super::args::{Destination, PackArgs, Packing, RecordArgs};
use super::{interruptible, print, progress};
use crate::node::{self, ImageFiles, State};
use crate::oci::{ClientOptions, Image, Reference, Store};
use crate::pack::{self, Pack, Report, ServiceInput, merge_traces, read_group};
use crate::record::sandbox::{Accounts, Forward};
use crate::record::{Oracle, RecordInput, Recording, tracer};
use crate::rootfs::RootFs;

/// Bytes of the largest trace file that is read.
const TRACE_MAX: u64 = 64 << 20;

/// The `--json` object of `tdfs record`.
#[derive(Debug, Serialize)]
struct RecordReport {
    image: Digest,
    service: String,
    group: String,
    /// Touched pages.
    pages: u64,
    /// Files they belong to.
    files: u64,
    /// Bytes of these pages.
    bytes: u64,
    /// Bytes of all regular files of the image.
    image_bytes: u64,
    /// Whether nothing was missed.
    complete: bool,
    method: Method,
    lost_events: u64,
    /// The page cache's word on the last run; absent when it was the method itself.
    oracle: Option<Oracle>,
    /// From the start of the process to ready, of the last run.
    ready_ms: f64,
    runs: u32,
    /// Absent without a destination.
    runtime_image: Option<Packed>,
}

/// What became of the traces.
#[derive(Debug, Serialize)]
struct Packed {
    manifests: Vec<Digest>,
    #[serde(flatten)]
    report: Report,
}

/// An image of which every layer is here.
struct Whole {
    image: Image,
    files: ImageFiles,
    store: Store,
    index: tdfs_common::layer_index::LayerIndex,
    windows: Option<std::path::PathBuf>,
}

/// Records a service and, with a destination, attaches its runtime image.
pub async fn record(args: &RecordArgs, json: bool) -> anyhow::Result<ExitCode> {
    let state = args.packing.common.state().await?;
    let result = interruptible(record_and_attach(args, &state)).await;
    if result.is_err() {
        // An interrupted recording may have left a container behind.
        node::recover(&state).await?;
    }
    let report = result?;
    let text = format!(
        "{} of {}: {} pages of {} files ({:.1} of {:.1} MB), {}, precision {:.3}, recall {:.3}, ready in {:.0} ms{}",
        report.service,
        report.image,
        report.pages,
        report.files,
        report.bytes as f64 / 1e6,
        report.image_bytes as f64 / 1e6,
        if report.complete { "complete" } else { "INCOMPLETE" },
        report.oracle.map_or(f64::NAN, |o| o.precision),
        report.oracle.map_or(f64::NAN, |o| o.recall),
        report.ready_ms,
        report.runtime_image.as_ref().map_or(String::new(), |p| format!(
            "\n{} pages in the group already, {} new ones in {:.1} MB; attached as {}",
            p.report.reused_pages,
            p.report.new_pages,
            p.report.segment_bytes as f64 / 1e6,
            p.manifests.iter().map(Digest::to_string).collect::<Vec<_>>().join(", "),
        )),
    );
    print(json, &report, &text)?;
    Ok(ExitCode::SUCCESS)
}

async fn record_and_attach(args: &RecordArgs, state: &State) -> anyhow::Result<RecordReport> {
    let packing = &args.packing;
    let whole = pull(state, packing).await?;
    let command = packing.command();
    let mut traces = Vec::new();
    let mut last: Option<Recording> = None;
    for run in 0..args.runs {
        let bar = progress::spinner(format!("recording {} of {}", run + 1, args.runs));
        let recording = record_once(args, state, &whole, command.as_deref()).await;
        bar.finish_and_clear();
        let recording = recording?;
        traces.push(recording.trace.clone());
        last = Some(recording);
    }
    let last = last.context("no run was recorded")?;
    let trace = merge_traces(&traces)?;
    if let Some(path) = &args.trace {
        std::fs::write(path, envelope::encode(&trace)?).with_context(|| format!("{}", path.display()))?;
    }
    let mut report = RecordReport {
        image: whole.image.digest,
        service: trace.service.clone(),
        group: packing.group.clone(),
        pages: trace.pages(),
        files: trace.files.len() as u64,
        bytes: trace.pages() * PAGE_SIZE as u64,
        image_bytes: whole.files.tree.inodes.iter().map(tdfs_common::tree::Inode::file_size).sum(),
        complete: trace.complete,
        method: trace.method,
        lost_events: trace.lost_events,
        oracle: last.oracle,
        ready_ms: last.ready_ms,
        runs: args.runs,
        runtime_image: None,
    };
    if packing.destination.is_given() {
        let services = vec![ServiceInput { trace, args: command }];
        report.runtime_image = Some(attach(state, packing, &whole, services).await?);
    }
    Ok(report)
}

async fn record_once(
    args: &RecordArgs,
    state: &State,
    whole: &Whole,
    command: Option<&[String]>,
) -> anyhow::Result<Recording> {
    let (passwd, group) = whole.files.accounts(&whole.image).await?;
    let dir = state.new_run()?;
    let id = dir.id().into_owned();
    let source = whole.files.cold_source();
    let tree = &whole.files.tree;
    let rootfs = tokio::task::block_in_place(|| {
        RootFs::mount(dir, Arc::clone(tree), None, source, &Handle::current())
    })?;
    let recording = crate::record::record(RecordInput {
        rootfs: &rootfs,
        tree,
        image: whole.image.digest,
        configuration: &whole.image.configuration,
        accounts: Accounts { passwd: &passwd, group: &group },
        service: &args.service,
        args: command,
        probe: &args.ready,
        timeout: args.timeout,
        network: args.network.into(),
        forward: Forward::Stderr,
        id: &id,
        runc_root: &state.runc(),
        method: args.method.map(Into::into),
        ring_bytes: tracer::RING_BYTES,
    })
    .await;
    tokio::task::block_in_place(|| rootfs.unmount())?;
    Ok(recording?)
}

/// Packs saved traces.
pub async fn pack(args: &PackArgs, json: bool) -> anyhow::Result<ExitCode> {
    let packing = &args.packing;
    if !packing.destination.is_given() {
        bail!("nowhere to put the runtime image: give --output or --push");
    }
    let mut services: Vec<ServiceInput> = Vec::new();
    for path in &args.trace {
        let trace = read_trace(path)?;
        match services.iter_mut().find(|s| s.trace.service == trace.service) {
            Some(known) => known.trace = merge_traces(&[known.trace.clone(), trace])?,
            None => services.push(ServiceInput { trace, args: packing.command() }),
        }
    }
    let state = packing.common.state().await?;
    let packed = interruptible(async {
        let whole = pull(&state, packing).await?;
        attach(&state, packing, &whole, services).await
    })
    .await?;
    let text = format!(
        "{} pages: {} in the group already, {} new ones in {:.1} MB",
        packed.report.pages,
        packed.report.reused_pages,
        packed.report.new_pages,
        packed.report.segment_bytes as f64 / 1e6,
    );
    print(json, &packed, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn read_trace(path: &Path) -> anyhow::Result<Trace> {
    let at = || format!("{}", path.display());
    let size = std::fs::metadata(path).with_context(at)?.len();
    if size > TRACE_MAX {
        bail!("{}: {size} bytes are too many for a trace", path.display());
    }
    envelope::decode(&std::fs::read(path).with_context(at)?)
        .map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}

async fn pull(state: &State, packing: &Packing) -> anyhow::Result<Whole> {
    let store = Store::open(&packing.image, &packing.common.client(&packing.image)?)?;
    let image = store.resolve(&packing.image).await?;
    let bar = progress::bytes("pulling");
    let pulled =
        ImageFiles::pull(state, &store, &image, &|done, total| progress::show(&bar, done, total)).await;
    bar.finish_and_clear();
    let (files, index, windows) = pulled?;
    Ok(Whole { image, files, store, index, windows })
}

/// Packs `services` into the group at the destination and attaches them to the image there.
async fn attach(
    state: &State,
    options: &Packing,
    whole: &Whole,
    services: Vec<ServiceInput>,
) -> anyhow::Result<Packed> {
    let group = options.group.as_str();
    let store = match &options.destination.output {
        None => whole.store.clone(),
        Some(dir) => {
            let store = Store::open(&Reference::layout(dir), &ClientOptions::default())?;
            if store.location() != whole.store.location() {
                whole.store.copy_image(&whole.image, &store, options.image.tag()).await?;
            }
            store
        }
    };
    let existing = read_group(&store, group, &|_, _| {}).await?;
    let bar = progress::spinner("packing".into());
    let packing = Pack {
        image: whole.image.digest,
        tree: &whole.files.tree,
        group,
        existing: &existing,
        services,
        allow_incomplete: options.allow_incomplete,
        scratch: state.root(),
    };
    let layers = &whole.files.layers;
    let packed = packing
        .run(|layer, offset, len| {
            let layers = Arc::clone(layers);
            async move { layers.read(layer, offset, len).await }
        })
        .await;
    bar.finish_and_clear();
    let packed = packed?;
    let windows = whole.windows.clone().map(Into::into);
    let attached =
        pack::attach(&store, &whole.image, &packed, &whole.files.tree, &whole.index, windows).await?;
    Ok(Packed { manifests: attached.iter().map(|a| a.manifest.digest).collect(), report: packed.report })
}

impl Packing {
    fn command(&self) -> Option<Vec<String>> {
        (!self.command.is_empty()).then(|| self.command.clone())
    }
}

impl Destination {
    fn is_given(&self) -> bool {
        self.push || self.output.is_some()
    }
}
