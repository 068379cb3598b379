//! `tdfs registry`: serves, or collects garbage.

use std::process::ExitCode;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::args::{GcArgs, RegistryArgs, RegistryCommand, ServeArgs};
use super::print;
use crate::oci::ClientOptions;
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

/// Every connection is an open file, and so is what it reads; the usual limit is for programs of another time.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        tracing::warn!("the limit of open files stays as it is: {e}");
    }
}

async fn serve(args: &ServeArgs, json: bool) -> anyhow::Result<ExitCode> {
    raise_file_limit();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut registry = Registry::open(&args.root, args.read_only)?;
    if let Some(upstream) = &args.upstream {
        let options = ClientOptions {
            auth_file: args.authfile.clone(),
            ca_file: args.ca_file.clone(),
            ..ClientOptions::default()
        };
        registry = registry.pulling_through(upstream, options)?;
    }
    let options = Options {
        listen: args.listen.clone(),
        metrics_listen: args.metrics_listen.clone(),
        tls: args.tls_cert.clone().zip(args.tls_key.clone()),
        htpasswd: args.htpasswd.clone(),
        anonymous_pull: args.anonymous_pull,
        token_key: args.token_key.clone(),
        patience: args.patience,
    };
    let server = Server::bind(Arc::new(registry), &options).await?;
    let (address, metrics) = (server.address()?, server.metrics_address()?);
    let report = json!({ "listen": address, "metrics_listen": metrics });
    print(json, &report, &format!("listening on {address}"))?;
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
