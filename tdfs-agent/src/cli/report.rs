//! `tdfs report`

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};

use super::args::{ReportArgs, ReportFormat};
use super::inspect::wanted;
use super::{interruptible, print};
use crate::node::Timeline;
use crate::oci::{Reference, Store};
use crate::pack;
use crate::report::{self, Recording, Report, ReportError};

/// Bytes of the largest file of events that is read: several times what a start writes at most.
const EVENTS_MAX: u64 = 64 << 20;

/// Writes a page or a trace.
pub async fn report(args: &ReportArgs, json: bool) -> anyhow::Result<ExitCode> {
    let events = args.events.as_deref().map(read_events).transpose()?;
    if args.format == ReportFormat::Perfetto && events.is_none() {
        bail!("a trace is one of a start: give the --events of one");
    }
    let recording = match &args.image {
        Some(image) => Some(interruptible(recording(args, image)).await?),
        None => None,
    };
    let report = Report::new(args.image.as_ref().map(ToString::to_string), recording, events)?;
    let (bytes, name, format) = match (args.format, &report.start) {
        (ReportFormat::Perfetto, Some(start)) => {
            (report::trace(&start.timeline).to_string(), "tdfs-trace.json", "perfetto")
        }
        _ => (report::page(&report)?, "tdfs-report.html", "html"),
    };
    let output = args.output.as_deref().unwrap_or(Path::new(name));
    if output == Path::new("-") {
        if json {
            bail!("standard output is for the object of --json: give another --output");
        }
        let mut out = std::io::stdout().lock();
        out.write_all(bytes.as_bytes())
            .and_then(|()| out.flush())
            .context("cannot write to standard output")?;
        return Ok(ExitCode::SUCCESS);
    }
    fs::write(output, &bytes).with_context(|| output.display().to_string())?;
    let written = serde_json::json!({ "output": output, "format": format, "bytes": bytes.len() });
    print(json, &written, &format!("{}: {:.1} MB", output.display(), bytes.len() as f64 / 1e6))?;
    Ok(ExitCode::SUCCESS)
}

fn read_events(path: &Path) -> anyhow::Result<Timeline> {
    let context = || path.display().to_string();
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(EVENTS_MAX + 1).read_to_string(&mut text))
        .with_context(context)?;
    if text.len() as u64 > EVENTS_MAX {
        bail!("{}: too large for the events of a start", path.display());
    }
    serde_json::from_str(&text).map_err(|e| ReportError::Events(e.to_string())).with_context(context)
}

/// What the runtime images of an image say.
async fn recording(args: &ReportArgs, image: &Reference) -> anyhow::Result<Recording> {
    let state = args.common.state().await?;
    let store = Store::open(image, &args.common.client(image)?)?;
    let resolved = store.resolve(image).await?;
    let mut loaded = Vec::new();
    for available in wanted(args.service.as_deref(), &store, &resolved).await? {
        let choice = pack::Choice::Pinned(available.manifest.digest);
        loaded.push(pack::load(&store, state.root(), &resolved, choice).await?);
    }
    Ok(Recording::new(&resolved, loaded)?)
}
