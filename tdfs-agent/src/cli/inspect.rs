//! `tdfs inspect` and `tdfs verify`

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::bail;
use serde::Serialize;
use tdfs_common::digest::Digest;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::Segment;

use super::args::InspectArgs;
use super::{interruptible, print, progress};
use crate::node::{self, Verified};
use crate::oci::{Reference, Store};
use crate::pack::{self, Choice, Sharing, sharing};

/// The `--json` object of `tdfs inspect`.
#[derive(Debug, Serialize)]
struct Inspection {
    image: Digest,
    /// Compressed bytes.
    image_bytes: u64,
    layers: Vec<LayerInfo>,
    runtime_images: Vec<RuntimeInfo>,
    /// Zone pages of all services together: each once, however many use it.
    unique_pages: u64,
    /// What the services shown here have in common, by group.
    groups: Vec<Sharing>,
}

#[derive(Debug, Serialize)]
struct LayerInfo {
    digest: Digest,
    media_type: String,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct RuntimeInfo {
    service: String,
    group: String,
    manifest: Digest,
    created: String,
    ready: String,
    args: Option<Vec<String>>,
    /// File pages the service needs.
    file_pages: u64,
    /// Zone pages they lie on.
    zone_pages: u64,
    /// Bytes of these pages.
    page_bytes: u64,
    segments: Vec<SegmentInfo>,
    /// Layers that can be read at random, of all.
    random_access_layers: usize,
    inodes: usize,
}

#[derive(Debug, Serialize)]
struct SegmentInfo {
    digest: Digest,
    base: u64,
    pages: u64,
    frames: usize,
    bytes: u64,
}

impl From<&Segment> for SegmentInfo {
    fn from(s: &Segment) -> Self {
        Self { digest: s.blob, base: s.base, pages: s.pages(), frames: s.frames.len(), bytes: s.size() }
    }
}

/// Shows an image and its runtime images.
pub async fn inspect(args: &InspectArgs, json: bool) -> anyhow::Result<ExitCode> {
    let state = args.common.state().await?;
    let store = Store::open(&args.image, &args.common.client(&args.image)?)?;
    let image = store.resolve(&args.image).await?;
    let mut inspection = Inspection {
        image: image.digest,
        image_bytes: image.size(),
        layers: image
            .layers
            .iter()
            .map(|l| LayerInfo { digest: l.digest, media_type: l.media_type.clone(), bytes: l.size })
            .collect(),
        runtime_images: Vec::new(),
        unique_pages: 0,
        groups: Vec::new(),
    };
    let mut services = Vec::new();
    for available in wanted(args.service.as_deref(), &store, &image).await? {
        let choice = Choice::Pinned(available.manifest.digest);
        let loaded = pack::load(&store, state.root(), &image, choice).await?;
        let service = &loaded.service;
        let needed = service.needed();
        inspection.runtime_images.push(RuntimeInfo {
            service: available.service,
            group: available.group,
            manifest: available.manifest.digest,
            created: available.created,
            ready: service.ready.clone(),
            args: service.args.clone(),
            file_pages: service.file_pages(),
            zone_pages: needed.count(),
            page_bytes: needed.count() * PAGE_SIZE as u64,
            segments: service.segments.iter().map(SegmentInfo::from).collect(),
            random_access_layers: loaded.index.layers.iter().filter(|l| !l.spans.is_empty()).count(),
            inodes: loaded.tree.inodes.len(),
        });
        services.push(loaded.service);
    }
    inspection.groups = sharing(&services);
    inspection.unique_pages = inspection.groups.iter().map(|g| g.unique_pages).sum();
    let mut text = format!(
        "{} {}\n  {} layers, {:.1} MB",
        args.image,
        inspection.image,
        inspection.layers.len(),
        inspection.image_bytes as f64 / 1e6
    );
    for r in &inspection.runtime_images {
        let bytes: u64 = r.segments.iter().map(|s| s.bytes).sum();
        let _ = write!(
            text,
            "\n  service {} (group {}): {} pages, {:.1} MB, in {} segments of {:.1} MB; ready by {}\n    {}",
            r.service,
            r.group,
            r.zone_pages,
            r.page_bytes as f64 / 1e6,
            r.segments.len(),
            bytes as f64 / 1e6,
            r.ready,
            r.manifest,
        );
    }
    for g in inspection.groups.iter().filter(|g| g.sets.iter().any(|set| set.services.len() > 1)) {
        let _ = write!(
            text,
            "\n  group {}: {} pages, {} of them shared; {:.1} MB saved",
            g.group,
            g.unique_pages,
            g.shared_pages,
            g.saved_bytes as f64 / 1e6,
        );
        for set in &g.sets {
            let _ = write!(text, "\n    {:>8} pages: {}", set.pages, set.services.join(", "));
        }
    }
    if inspection.runtime_images.is_empty() {
        text += "\n  no runtime image";
    }
    print(json, &inspection, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// Checks every byte of the runtime images against the image.
pub async fn verify(args: &InspectArgs, json: bool) -> anyhow::Result<ExitCode> {
    let state = args.common.state().await?;
    let store = Store::open(&args.image, &args.common.client(&args.image)?)?;
    let image = store.resolve(&args.image).await?;
    let wanted = wanted(args.service.as_deref(), &store, &image).await?;
    if wanted.is_empty() {
        bail!("{} has no runtime image", args.image);
    }
    let bar = progress::bytes("verifying");
    let shown = |done, total| progress::show(&bar, done, total);
    let verified = interruptible(async {
        let mut verified: Vec<Verified> = Vec::new();
        for available in wanted {
            verified.push(node::verify(&state, &store, &image, available.manifest.digest, &shown).await?);
        }
        Ok(verified)
    })
    .await;
    bar.finish_and_clear();
    let verified = verified?;
    let lines = verified.iter().map(|v| {
        format!("{}: {} pages, {} spans, {} inodes are right", v.service, v.pages, v.spans, v.inodes)
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    print(json, &serde_json::json!({ "image": image.digest, "runtime_images": verified }), &text)?;
    Ok(ExitCode::SUCCESS)
}

/// The runtime images of `image`, or just that of `service`.
pub async fn wanted(
    service: Option<&str>,
    store: &Store,
    image: &crate::oci::Image,
) -> anyhow::Result<Vec<pack::Available>> {
    let mut all = pack::list(store, image).await?;
    if let Some(name) = service {
        let names = all.iter().map(|a| a.service.clone()).collect::<Vec<_>>().join(", ");
        all.retain(|a| a.service == name);
        if all.is_empty() {
            bail!("no runtime image of service {name:?}; there are: {names}");
        }
    }
    Ok(all)
}

/// An image reference, or the directory of a layout.
pub fn image_or_layout(text: &str) -> Result<Reference, crate::oci::OciError> {
    if std::path::Path::new(text).join("oci-layout").is_file() {
        return Ok(Reference::layout(text));
    }
    text.parse()
}
