//! Everything at once, for a while: pushes, deletions, collections, pulls and starts, through two servers over one
//! directory.
//!
//! `TDFS_SOAK_SECONDS` says for how long.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use reqwest::Method;
use serde_json::Value;
use tdfs_tests::images;
use tdfs_tests::node::Node;
use tdfs_tests::server::Server;
use tdfs_tests::tdfs;
use tempfile::TempDir;

use super::client::{Client, noise};
use super::crash::{pull, push, verify};

/// The image that is started, in a repository that nothing is deleted from.
const STARTED: (&str, &str) = ("team/nginx", "latest");
const PUSHERS: u64 = 4;
const STARTERS: usize = 2;
/// What a server may hold at the end more than after a quarter of the time: what its allocator keeps of the 24 MiB that
/// each of the large pushes needed, and service metadata.
const GROWTH_MAX: u64 = 64 << 20;
/// A guard against waiting for ever, not a measurement.
const FOR_EVER: Duration = Duration::from_mins(2);

fn duration() -> Result<Duration> {
    match std::env::var("TDFS_SOAK_SECONDS") {
        Ok(seconds) => Ok(Duration::from_secs(seconds.parse().context("TDFS_SOAK_SECONDS")?)),
        Err(_) => Ok(Duration::from_secs(40)),
    }
}

/// How often what was done.
#[derive(Debug, Default)]
struct Counts {
    pushes: AtomicU64,
    refused: AtomicU64,
    pulls: AtomicU64,
    deletions: AtomicU64,
    abandoned: AtomicU64,
    starts: AtomicU64,
}

fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed)
}

/// Pushes, pulls, deletes and abandons until it is over; returns the tags that are left, as `name:tag`.
async fn churn(task: u64, clients: [Client; 2], until: Instant, counts: &Counts) -> Result<BTreeSet<String>> {
    // What is there by what the servers said; only this task changes its tags.
    let mut there: BTreeSet<String> = BTreeSet::new();
    let large = noise(9 << 20, 99);
    for n in 0_u64.. {
        let choice = noise(5, task << 32 | n);
        let client = &clients[usize::from(choice[0]) % 2];
        let tag = format!("t-{task}-{}", choice[1] % 6);
        let name = ["a", "b"][usize::from(choice[2]) % 2];
        let key = format!("{name}:{tag}");
        // Layers that many images share, so that they are orphans now and then.
        let mut layers =
            vec![noise(50_000, u64::from(choice[3] % 8)), noise(50_000, u64::from(choice[1] % 8))];
        if choice[4].is_multiple_of(16) {
            layers.push(large.clone());
        }
        match push(client, name, &tag, &layers).await? {
            201 => {
                there.insert(key);
                count(&counts.pushes);
            }
            // What a push relied on may be gone when it took longer than the grace period. Nothing has changed.
            400 => {
                count(&counts.refused);
            }
            status => bail!("push: {status}"),
        }
        for key in there.iter().filter(|_| n.is_multiple_of(3)) {
            let (name, tag) = key.split_once(':').context("a key")?;
            pull(&clients[(usize::from(choice[0]) + 1) % 2], name, tag).await?;
            count(&counts.pulls);
        }
        if choice[0].is_multiple_of(3)
            && let Some(key) = there.pop_first()
        {
            let (name, tag) = key.split_once(':').context("a key")?;
            client.delete(&format!("/v2/{name}/manifests/{tag}")).await?.expect(202)?;
            count(&counts.deletions);
        }
        if choice[4] % 4 == 1 {
            abandon(client, name, choice[3]).await?;
            count(&counts.abandoned);
        }
        if Instant::now() > until {
            break;
        }
    }
    Ok(there)
}

/// Begins something and goes away.
async fn abandon(client: &Client, name: &str, how: u8) -> Result<()> {
    let location = client.begin(name).await?;
    match how % 3 {
        // An upload of which a part came.
        0 => drop(client.patch(&location, None, noise(1000, how.into())).await?.expect(202)?),
        // One that breaks off.
        1 => {
            let pieces = [Ok(Bytes::from_static(b"half")), Err(std::io::Error::other("gone"))];
            let body = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
            let sent = client.send(client.request(Method::PATCH, &location).body(body)).await;
            ensure!(sent.is_err(), "{sent:?}");
        }
        // A large blob that is not read to its end.
        _ => {
            let path = format!("/v2/{}/manifests/{}", STARTED.0, STARTED.1);
            let manifest = client.get(&path).await?.expect(200)?.json();
            let layers = manifest["layers"].as_array().context("no layers")?;
            let largest = layers.iter().max_by_key(|layer| layer["size"].as_u64()).context("no layers")?;
            let digest = largest["digest"].as_str().context("no digest")?;
            let path = format!("/v2/{}/blobs/{digest}", STARTED.0);
            let mut answer = client.request(Method::GET, &path).send().await?;
            ensure!(answer.status() == 200 && answer.chunk().await?.is_some());
        }
    }
    Ok(())
}

/// Starts the service on empty nodes until it is over.
async fn start(dir: PathBuf, images: [String; 2], until: Instant, counts: &Counts) -> Result<()> {
    for n in 0.. {
        if Instant::now() > until {
            break;
        }
        let state = dir.join(n.to_string());
        let mut node = Node::new(&state)?;
        // The machine is busy.
        node.options.idle_timeout = FOR_EVER;
        let done = node.start(&images[n % 2], images::recipe("nginx")?.services[0].name).await?;
        let used = done.of("page_service");
        ensure!(used.pages > 0 && used.requests == 1 && used.failures.is_empty(), "{done:?}");
        std::fs::remove_dir_all(&state)?;
        count(&counts.starts);
    }
    Ok(())
}

/// What the tags of a repository lead to, and what refers to it, as hex digits of digests.
async fn reached(client: &Client, name: &str) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    let mut next: Vec<String> = tags(client, name).await?.into_iter().collect();
    while let Some(reference) = next.pop() {
        let answer = client.get(&format!("/v2/{name}/manifests/{reference}")).await?.expect(200)?;
        let digest = answer.header("docker-content-digest").to_owned();
        let referrers = client.get(&format!("/v2/{name}/referrers/{digest}")).await?.expect(200)?.json();
        let manifest = answer.json();
        let listed = |of: &Value, list: &str| {
            let entries = of[list].as_array().into_iter().flatten();
            entries.filter_map(|e| e["digest"].as_str().map(str::to_owned)).collect::<Vec<_>>()
        };
        let config = manifest["config"]["digest"].as_str().map(str::to_owned);
        let blobs = listed(&manifest, "layers").into_iter().chain(config).chain([digest]);
        all.extend(blobs.map(|digest| digest.trim_start_matches("sha256:").to_owned()));
        next.extend(listed(&manifest, "manifests").into_iter().chain(listed(&referrers, "manifests")));
    }
    Ok(all)
}

async fn tags(client: &Client, name: &str) -> Result<BTreeSet<String>> {
    let listed = client.get(&format!("/v2/{name}/tags/list")).await?.json();
    let tags = listed["tags"].as_array().into_iter().flatten();
    Ok(tags.filter_map(|tag| tag.as_str().map(str::to_owned)).collect())
}

/// Names of the files below a directory, without what is before their last slash.
fn files(dir: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in walkdir::WalkDir::new(dir).into_iter().filter(|_| dir.exists()) {
        let entry = entry?;
        if entry.file_type().is_file() {
            names.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

fn resident(server: &Server) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

fn open_files(server: &Server) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{}/fd", server.pid()))?.count())
}

#[test]
fn nothing_is_lost_or_leaked_under_churn() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (dir, seconds) = (TempDir::with_prefix("tdfs-soak-")?, duration()?);
    let root = dir.path().join("root");
    let servers = [Server::start(&root, &[])?, Server::start(&root, &[])?];
    let opened = servers.iter().map(open_files).collect::<Result<Vec<_>>>()?;
    let image = servers[0].push(&images::image("nginx")?, &format!("{}:{}", STARTED.0, STARTED.1))?;
    let service = &images::recipe("nginx")?.services[0];
    let recorder = dir.path().join("recorder").display().to_string();
    let record = ["record", &image, "--service", service.name, "--ready", service.ready, "--push"];
    tdfs::json(record.into_iter().chain(["--state", &recorder]))?;

    let (begin, counts) = (Instant::now(), Arc::new(Counts::default()));
    let until = begin + seconds;
    let mut churning = Vec::new();
    for task in 0..PUSHERS {
        let (clients, counts) = (servers.each_ref().map(Client::new), counts.clone());
        churning.push(runtime.spawn(async move { churn(task, clients, until, &counts).await }));
    }
    let starting: Vec<_> = (0..STARTERS)
        .map(|n| {
            let (dir, counts, handle) =
                (dir.path().join(format!("nodes-{n}")), counts.clone(), runtime.handle().clone());
            let images = servers.each_ref().map(|s| s.image(&format!("{}:{}", STARTED.0, STARTED.1)));
            std::thread::spawn(move || handle.block_on(start(dir, images, until, &counts)))
        })
        .collect();
    let gc = |grace: &str| {
        let root = root.display().to_string();
        tdfs::json(["registry", "gc", "--root", &root, "--grace", grace, "--untagged"])
    };
    let over = AtomicBool::new(false);
    let (ended, deleted, early) = std::thread::scope(|scope| {
        let collecting = scope.spawn(|| -> Result<u64> {
            let mut deleted = 0;
            while !over.load(Ordering::Relaxed) {
                deleted += gc("1s")?["blobs_deleted"].as_u64().context("no number")?;
            }
            Ok(deleted)
        });
        std::thread::sleep((begin + seconds / 4).saturating_duration_since(Instant::now()));
        let early = servers.iter().map(resident).collect::<Result<Vec<_>>>();
        let ended: Vec<_> = churning.into_iter().map(|task| runtime.block_on(task)).collect();
        let started: Vec<_> = starting.into_iter().map(std::thread::JoinHandle::join).collect();
        over.store(true, Ordering::Relaxed);
        let deleted = collecting.join();
        let ended = ended.into_iter().map(|e| e?).collect::<Result<Vec<_>>>();
        let started = started.into_iter().map(|s| s.unwrap_or_else(|_| bail!("a starter panicked")));
        started.collect::<Result<()>>()?;
        Ok::<_, anyhow::Error>((ended?, deleted.unwrap_or_else(|_| bail!("the collector panicked"))?, early?))
    })?;
    let there: BTreeSet<String> = ended.into_iter().flatten().collect();

    // Nothing is lost: every tag that was not deleted, at both servers.
    let clients = servers.each_ref().map(Client::new);
    let mut living = BTreeSet::new();
    runtime.block_on(async {
        for client in &clients {
            pull(client, STARTED.0, STARTED.1).await?;
            for key in &there {
                let (name, tag) = key.split_once(':').context("a key")?;
                pull(client, name, tag).await?;
            }
            for name in ["a", "b"] {
                let listed = tags(client, name).await?.into_iter().map(|tag| format!("{name}:{tag}"));
                let of_name = there.iter().filter(|key| key.starts_with(&format!("{name}:"))).cloned();
                ensure!(listed.collect::<BTreeSet<_>>() == of_name.collect(), "{name}: {there:?}");
            }
            for name in ["a", "b", STARTED.0] {
                living.extend(reached(client, name).await?);
            }
        }
        Ok::<_, anyhow::Error>(())
    })?;
    verify(&root)?;

    // Nothing is left over: what was relied on a moment ago is old after a moment.
    std::thread::sleep(Duration::from_secs(4));
    let last = gc("0")?;
    let (stored, sessions) = (files(&root.join("blobs"))?, files(&root.join("uploads"))?);
    let differing: Vec<&String> = stored.symmetric_difference(&living).collect();
    ensure!(differing.is_empty(), "stored or reached, not both: {differing:?} {last}");
    ensure!(sessions.is_empty(), "{sessions:?} {last}");
    drop(clients);
    let late = servers.iter().map(resident).collect::<Result<Vec<_>>>()?;
    println!(
        "{} s: {counts:?}, {deleted} blobs collected, {} images left; resident {early:?} -> {late:?} bytes",
        seconds.as_secs(),
        there.len(),
    );
    for counter in [&counts.pushes, &counts.pulls, &counts.deletions, &counts.abandoned, &counts.starts] {
        ensure!(counter.load(Ordering::Relaxed) > 0, "{counts:?}");
    }
    ensure!(deleted > 0);
    let waiting = Instant::now();
    for (n, server) in servers.iter().enumerate() {
        ensure!(late[n] < early[n] + GROWTH_MAX, "server {n} grew from {} to {}", early[n], late[n]);
        while open_files(server)? > opened[n] {
            ensure!(
                waiting.elapsed() < FOR_EVER,
                "server {n}: {} files, not {}",
                open_files(server)?,
                opened[n]
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}
