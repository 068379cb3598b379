//! `tdfs registry`: serves, or collects garbage.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::args::{GcArgs, RegistryArgs, RegistryCommand, ServeArgs};
use super::print;
use crate::registry::gc::Collection;
use crate::registry::{Options, Registry, Server};

/// Serves until a signal.
pub async fn registry(args: &RegistryArgs, json: bool) -> anyhow::Result<ExitCode> {
    if let Some(RegistryCommand::Gc(args)) = &args.command {
        return gc(args, json).await;
    }
    let Some(args) = &args.serve else { anyhow::bail!("the following argument is missing: --root ROOT") };
    serve(args, json).await
}

async fn serve(args: &ServeArgs, json: bool) -> anyhow::Result<ExitCode> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let registry = Arc::new(Registry::open(&args.root, args.read_only)?);
    let options = Options { listen: args.listen.clone() };
    let server = Server::bind(registry, &options).await.with_context(|| args.listen.clone())?;
    let address = server.address()?;
    print(json, &json!({ "listen": address }), &format!("listening on {address}"))?;
    server
        .run(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await;
    Ok(ExitCode::SUCCESS)
}

async fn gc(args: &GcArgs, json: bool) -> anyhow::Result<ExitCode> {
    let collection = Collection { grace: args.grace, untagged: args.untagged, dry_run: args.dry_run };
    let collected = Registry::open(&args.root, args.dry_run)?.collect(collection).await?;
    let text = format!(
        "{} {} blobs of {} bytes, {} untagged manifests, {} uploads; {} blobs stay",
        if args.dry_run { "would delete" } else { "deleted" },
        collected.blobs_deleted,
        collected.bytes_deleted,
        collected.manifests_deleted,
        collected.uploads_deleted,
        collected.blobs,
    );
    print(json, &collected, &text)?;
    Ok(ExitCode::SUCCESS)
}
