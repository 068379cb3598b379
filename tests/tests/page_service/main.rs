//! The page service, end to end: real images, one request, and everything that can go wrong with its answer.

mod server;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tdfs_agent::oci::{ClientOptions, Reference, Store};
use tdfs_agent::pack;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::Service;
use tdfs_common::wire::{HEAD_LEN, Head, Kind, Part, STREAM_HEADER_LEN};
use tdfs_tests::images::{self, recipe};
use tdfs_tests::node::Node;
use tdfs_tests::synthetic::Random;
use tdfs_tests::tdfs;
use tempfile::TempDir;

use server::{Fault, Piece, Server};

/// A real image with runtime images of its first services, in the layout `image` of a directory.
struct Recorded(TempDir);

impl Recorded {
    fn new(name: &str, services: usize) -> Result<Self> {
        let recorded = Self(TempDir::with_prefix("tdfs-pages-")?);
        let image = format!("oci:{}:latest", images::image(name)?.display());
        for (n, service) in recipe(name)?.services[..services].iter().enumerate() {
            let mut arguments: Vec<String> =
                ["record", &image, "--service", service.name, "--group", "g"].map(str::to_owned).to_vec();
            arguments.extend(["--ready".into(), service.ready.into(), "--output".into()]);
            arguments.extend([
                show(&recorded.path("image")),
                "--state".into(),
                show(&recorded.path("recorder")),
            ]);
            if n > 0 {
                arguments.push("--".into());
                arguments.extend(service.command.iter().map(|c| (*c).to_owned()));
            }
            tdfs::json(arguments).with_context(|| format!("record {}", service.name))?;
        }
        Ok(recorded)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The service as the layout has it.
    async fn service(&self, name: &str) -> Result<Service> {
        let reference = Reference::layout(self.path("image"));
        let store = Store::open(&reference, &ClientOptions::default())?;
        let image = store.resolve(&reference).await?;
        let choice = pack::Choice::Service(name);
        Ok(pack::load(&store, &self.path("model"), &image, choice).await?.service)
    }
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

fn number(report: &Value, field: &str) -> Result<u64> {
    report[field].as_u64().with_context(|| format!("{field} is no number in {report}"))
}

/// The entry of a source in a report.
fn source<'a>(report: &'a Value, name: &str) -> Option<&'a Value> {
    report["sources"].as_array()?.iter().find(|s| s["source"] == name)
}

fn run(image: &str, state: &Path, more: &[&str]) -> Result<Value> {
    let state = show(state);
    let arguments = ["run", image, "--exit-when-ready", "--network", "private", "--state", &state];
    tdfs::json(arguments.iter().chain(more))
}

fn pages(service: &Service) -> BTreeSet<u64> {
    service.needed().iter().collect()
}

/// Blocking work beside the server.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

fn block_on<T>(test: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(test)
}

#[test]
fn one_request_brings_an_empty_node_everything_and_another_what_a_second_service_adds() -> Result<()> {
    let recorded = Recorded::new("python", 2)?;
    block_on(async {
        let server = Server::start(recorded.0.path(), true).await?;
        let (image, node) = (server.image("image:latest"), recorded.path("node"));
        let (http, tls) = (recorded.service("http").await?, recorded.service("tls").await?);
        let go = |more: &'static [&'static str]| {
            let (image, node) = (image.clone(), node.clone());
            // Reports of others are written while pages are still under way.
            aside(move || run(&image, &node, &[more, &["--start", "fetched"]].concat()))
        };

        let a = go(&["--service", "http"]).await?;
        ensure!(number(&a, "data_requests")? + number(&a, "metadata_requests")? == 1, "{a}");
        ensure!(server.requests().0 == 1);
        ensure!(number(&a, "pages_needed")? == pages(&http).len() as u64, "{a}");
        ensure!(number(&a, "pages_fetched")? == pages(&http).len() as u64, "{a}");
        let served = source(&a, "page_service").context("not from the page service")?;
        ensure!(number(served, "pages")? == pages(&http).len() as u64 && served["requests"] == 1, "{a}");
        ensure!(served["failures"].as_object().is_some_and(serde_json::Map::is_empty), "{a}");
        ensure!(source(&a, "ranges").is_none(), "{a}");

        // B after A: what the model's sets differ by, and nothing else.
        let b = go(&["--service", "tls"]).await?;
        let new = pages(&tls).difference(&pages(&http)).count() as u64;
        ensure!(new > 0 && new < pages(&tls).len() as u64);
        ensure!(number(&b, "data_requests")? + number(&b, "metadata_requests")? == 1, "{b}");
        ensure!(number(&b, "pages_fetched")? == new, "{b}, the model says {new}");
        ensure!(number(&b, "pages_present")? == pages(&tls).len() as u64 - new, "{b}");

        // Nothing the second time, one small answer when asked anew, and one for pages alone.
        server.requests();
        let again = go(&["--service", "tls"]).await?;
        ensure!(number(&again, "data_requests")? + number(&again, "metadata_requests")? == 0, "{again}");
        ensure!(server.requests().0 == 0);
        let anew = go(&["--service", "tls", "--pull", "always"]).await?;
        ensure!(number(&anew, "metadata_requests")? == 1 && number(&anew, "data_requests")? == 0, "{anew}");
        std::fs::remove_dir_all(node.join("zones"))?;
        let pages_only = go(&["--service", "tls"]).await?;
        ensure!(number(&pages_only, "data_requests")? == 1, "{pages_only}");
        ensure!(number(&pages_only, "metadata_requests")? == 0, "{pages_only}");
        ensure!(number(&pages_only, "pages_fetched")? == pages(&tls).len() as u64, "{pages_only}");

        // A node that may not use it gets the same the plain way.
        let other = recorded.path("plain");
        server.requests();
        let (reference, state) = (image.clone(), other.clone());
        let plain =
            aside(move || run(&reference, &state, &["--service", "tls", "--page-service", "never"])).await?;
        ensure!(server.requests().0 == 0 && source(&plain, "page_service").is_none(), "{plain}");
        ensure!(number(&plain, "pages_needed")? == pages(&tls).len() as u64, "{plain}");
        Ok(())
    })
}

#[test]
fn a_plain_registry_is_asked_once_a_day() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    block_on(async {
        let server = Server::start(recorded.0.path(), false).await?;
        for (n, asked) in [1, 0].into_iter().enumerate() {
            let node = Node::new(&recorded.path("node"))?;
            let done = node
                .start(&server.image("image:latest"), "nginx")
                .await
                .with_context(|| format!("start {n}"))?;
            ensure!(server.requests().0 == asked, "start {n}");
            ensure!(done.of("page_service").failures.get("absent").copied() == (asked == 1).then_some(1));
            ensure!(done.of("ranges").pages > 0);
            std::fs::remove_dir_all(recorded.path("node/zones"))?;
            std::fs::remove_dir_all(recorded.path("node/resolved"))?;
        }
        Ok(())
    })
}

#[test]
fn mirrors_come_first_credentials_are_sent_and_a_fast_wire_carries_plain_pages() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    block_on(async {
        let total = pages(&recorded.service("nginx").await?).len() as u64;
        let origin = Server::start(recorded.0.path(), true).await?;
        let mirror = Server::start(recorded.0.path(), true).await?;
        let empty = TempDir::new()?;
        let ignorant = Server::start(empty.path(), true).await?;
        let mirrored = |n: &str, first: &Server| {
            let mut node = Node::new(&recorded.path(n))?;
            node.options.mirrors =
                [(origin.addr.to_string(), vec![format!("http://{}", first.addr)])].into_iter().collect();
            Ok::<_, anyhow::Error>(node)
        };
        let done = mirrored("mirrored", &mirror)?.start(&origin.image("image:latest"), "nginx").await?;
        ensure!(
            done.of("mirror").pages == total && done.of("page_service").requests == 0,
            "{:?}",
            done.sources
        );
        ensure!((mirror.requests().0, origin.requests().0) == (1, 0));
        let stored = done.of("mirror").bytes;
        // A mirror that does not know the image is no reason to do without a page service.
        let done = mirrored("ignorant", &ignorant)?.start(&origin.image("image:latest"), "nginx").await?;
        ensure!(done.of("mirror").failures["refused"] == 1 && done.of("page_service").pages == total);
        // One that lies is left for the next.
        mirror.ruin(|_, answer| vec![Piece::Bytes(vec![7; answer.len()])]);
        let done = mirrored("lying", &mirror)?.start(&origin.image("image:latest"), "nginx").await?;
        ensure!(done.of("mirror").failures["wrong"] == 1 && done.of("page_service").pages == total);

        // Where the wire is said to be faster than the CPU, pages are not compressed, as far as the server has time.
        let node = Node::new(&recorded.path("fast"))?;
        std::fs::write(recorded.path("fast/sources.json"), r#"{"wire":1e15,"decode":1.0}"#)?;
        let done = node.start(&origin.image("image:latest"), "nginx").await?;
        let (plain, used) = (total * PAGE_SIZE as u64, done.of("page_service"));
        ensure!(used.pages == total && used.bytes > stored && used.bytes <= plain, "{used:?}");
        let learnt: Value = serde_json::from_slice(&std::fs::read(recorded.path("fast/sources.json"))?)?;
        ensure!(learnt["wire"].as_f64().is_some_and(|wire| wire < 1e15), "{learnt}");

        origin.lock("me", "secret");
        let auth = recorded.path("auth.json");
        let known = STANDARD.encode("me:secret");
        std::fs::write(
            &auth,
            serde_json::json!({ "auths": { origin.addr.to_string(): { "auth": known } } }).to_string(),
        )?;
        origin.requests();
        let mut node = Node::new(&recorded.path("known"))?;
        node.options.auth_file = Some(auth);
        let done = node.start(&origin.image("image:latest"), "nginx").await?;
        ensure!(done.of("page_service").pages == total && origin.requests().1 == 0, "{:?}", done.sources);
        let stranger =
            Node::new(&recorded.path("stranger"))?.start(&origin.image("image:latest"), "nginx").await;
        ensure!(stranger.err().context("let in")?.to_string().contains("credentials"));
        Ok(())
    })
}

/// The units of an answer, as bytes.
fn units(answer: &[u8]) -> (Vec<u8>, Vec<(Head, Vec<u8>)>) {
    let (header, mut rest) = answer.split_at(STREAM_HEADER_LEN);
    let mut units = Vec::new();
    while let Some((head, _)) = rest.split_first_chunk::<HEAD_LEN>() {
        // It is a server's own head.
        let Ok(head) = Head::decode(head) else { break };
        units.push((head, rest[HEAD_LEN..HEAD_LEN + head.len].to_vec()));
        rest = &rest[HEAD_LEN + head.len..];
    }
    (header.to_vec(), units)
}

fn joined(header: Vec<u8>, units: Vec<(Head, Vec<u8>)>) -> Vec<Piece> {
    let units = units.into_iter().map(|(head, body)| [&head.encode()[..], &body].concat());
    vec![Piece::Bytes([header, units.collect::<Vec<_>>().concat()].concat())]
}

/// An answer with its units changed.
fn changed(answer: &[u8], change: impl Fn(&mut Vec<(Head, Vec<u8>)>)) -> Vec<Piece> {
    let (header, mut all) = units(answer);
    change(&mut all);
    joined(header, all)
}

/// What is wrong, why the page service is left, and how it is done.
type Faulty = (&'static str, &'static str, Fault);

/// The place of the first frame of an answer.
fn first_frame(units: &[(Head, Vec<u8>)]) -> usize {
    units.iter().position(|(head, _)| matches!(head.kind, Kind::Frame { .. })).unwrap_or_default()
}

#[test]
fn broken_connections_are_resumed_and_bad_answers_are_left() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    block_on(async {
        let server = Server::start(recorded.0.path(), true).await?;
        let total = pages(&recorded.service("nginx").await?).len() as u64;
        let fresh = |n: &str| Node::new(&recorded.path(n));

        // Without faults: how long an answer is.
        let length = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let seen = length.clone();
        server.ruin(move |_, answer| {
            seen.store(answer.len(), std::sync::atomic::Ordering::Relaxed);
            vec![Piece::Bytes(answer)]
        });
        let done = fresh("whole")?.start(&server.image("image:latest"), "nginx").await?;
        ensure!((done.of("page_service").pages, done.of("page_service").requests) == (total, 1));
        let length = length.load(std::sync::atomic::Ordering::Relaxed);

        // The first two answers break off anywhere.
        let mut random = Random(7);
        for round in 0..12 {
            let (a, b) = (random.below(length as u64) as usize, random.below(length as u64) as usize);
            server.ruin(move |n, mut answer| {
                let Some(at) = [a, b].get(n).copied() else { return vec![Piece::Bytes(answer)] };
                answer.truncate(at);
                vec![Piece::Bytes(answer), Piece::Break]
            });
            let done = fresh(&format!("cut{round}"))?
                .start(&server.image("image:latest"), "nginx")
                .await
                .with_context(|| format!("{a} {b}"))?;
            let used = done.of("page_service");
            ensure!(used.pages == total && used.failures["broken"] >= 1, "{used:?}");
            ensure!(done.of("ranges").requests == 0, "resumed, not left: {used:?}");
        }

        // Every answer breaks off after its metadata: ranges bring the rest.
        let metadata = Arc::new(move |answer: &[u8]| {
            let (_, all) = units(answer);
            let before =
                |(head, _): &&(Head, Vec<u8>)| !matches!(head.kind, Kind::Frame { .. } | Kind::Cut { .. });
            STREAM_HEADER_LEN + all.iter().take_while(before).map(|(h, _)| HEAD_LEN + h.len).sum::<usize>()
        });
        let at = metadata.clone();
        let after_metadata = move |answer: &mut Vec<u8>| answer.split_off(at(answer));
        let split = Arc::new(after_metadata);
        let (split_break, split_stall, split_trickle) = (split.clone(), split.clone(), split);
        let faults: Vec<Faulty> = vec![
            (
                "breaks",
                "broken",
                Box::new(move |_, mut answer| {
                    split_break(&mut answer);
                    vec![Piece::Bytes(answer), Piece::Break]
                }),
            ),
            (
                "stalls",
                "stalled",
                Box::new(move |_, mut answer| {
                    split_stall(&mut answer);
                    vec![Piece::Bytes(answer), Piece::Stall]
                }),
            ),
            (
                "trickles",
                "stalled",
                Box::new(move |_, mut answer| {
                    let rest = split_trickle(&mut answer);
                    vec![Piece::Bytes(answer), Piece::Trickle(rest)]
                }),
            ),
            (
                "ends early",
                "incomplete",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        let at = first_frame(all);
                        let end = all.len() - 1;
                        all.drain(at..end);
                    })
                }),
            ),
            (
                "frame twice",
                "wrong",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        let at = first_frame(all);
                        all.insert(at, all[at].clone());
                    })
                }),
            ),
            (
                "frames swapped",
                "wrong",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        let at = first_frame(all);
                        let (a, b) = (all[at].0.kind, all[at + 1].0.kind);
                        (all[at].0.kind, all[at + 1].0.kind) = (b, a);
                    })
                }),
            ),
            (
                "no such frame",
                "wrong",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        let at = first_frame(all);
                        if let Kind::Frame { at, .. } = &mut all[at].0.kind {
                            at.segment = u32::MAX;
                        }
                    })
                }),
            ),
            (
                "frame shorter",
                "wrong",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        let at = first_frame(all);
                        all[at].1.pop();
                        all[at].0.len -= 1;
                    })
                }),
            ),
            (
                "frame longer",
                "wrong",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        let at = first_frame(all);
                        all[at].1.push(0);
                        all[at].0.len += 1;
                    })
                }),
            ),
            (
                "frame plain",
                "wrong",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        let at = first_frame(all);
                        if let Kind::Frame { plain, .. } = &mut all[at].0.kind {
                            *plain = true;
                        }
                        all[at].1.resize(PAGE_SIZE, 0);
                        all[at].0.len = PAGE_SIZE;
                    })
                }),
            ),
            (
                "a cut without proof",
                "wrong",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        let at = first_frame(all);
                        if let Kind::Frame { at: place, .. } = all[at].0.kind {
                            all[at] = (
                                Head {
                                    kind: Kind::Cut { at: place, set: 1, values: 0, plain: true },
                                    len: PAGE_SIZE,
                                },
                                vec![0; PAGE_SIZE],
                            );
                        }
                    })
                }),
            ),
            (
                "head damaged",
                "wrong",
                Box::new(move |_, mut answer| {
                    let at = metadata(&answer);
                    answer[at] = 99;
                    vec![Piece::Bytes(answer)]
                }),
            ),
            ("garbage", "wrong", Box::new(|_, answer| vec![Piece::Bytes(vec![0x5a; answer.len()])])),
            ("nothing", "broken", Box::new(|_, _| Vec::new())),
            (
                "another version",
                "wrong",
                Box::new(|_, mut answer| {
                    answer[8] = 2;
                    vec![Piece::Bytes(answer)]
                }),
            ),
            (
                "blob damaged",
                "wrong",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        for (head, body) in all {
                            if matches!(head.kind, Kind::Blob { part: Part::Tree, .. }) {
                                let middle = body.len() / 2;
                                body[middle] ^= 1;
                            }
                        }
                    })
                }),
            ),
            (
                "blobs of something else",
                "wrong",
                Box::new(|_, answer| {
                    changed(&answer, |all| {
                        for (head, body) in all {
                            if let Kind::Blob { part: Part::Artifact, media_type_len } = head.kind {
                                let text = String::from_utf8_lossy(&body[32 + media_type_len..])
                                    .replace("subject", "sUbject");
                                let (new, mut start) = Head::blob(
                                    Part::Artifact,
                                    "a/b",
                                    &tdfs_common::digest::Digest::of(text.as_bytes()),
                                    text.len() as u64,
                                )
                                .expect("small");
                                start.extend(text.bytes());
                                (*head, *body) = (new, start);
                            }
                        }
                    })
                }),
            ),
        ];
        for (what, reason, fault) in faults {
            server.ruin(fault);
            let done = fresh(&format!("bad {what}"))?
                .start(&server.image("image:latest"), "nginx")
                .await
                .context(what)?;
            let used = done.of("page_service");
            ensure!(used.failures.contains_key(reason), "{what}: {used:?}");
            if reason == "wrong" {
                ensure!(used.requests == 1, "{what}: asked again after something wrong: {used:?}");
            }
            ensure!(done.of("ranges").pages > 0, "{what}: {:?}", done.sources);
        }

        // Flipped bytes anywhere.
        for round in 0..12 {
            let at = random.below(length as u64) as usize;
            server.ruin(move |_, mut answer| {
                let at = at.min(answer.len() - 1);
                answer[at] ^= 0x20;
                vec![Piece::Bytes(answer)]
            });
            fresh(&format!("flip{round}"))?
                .start(&server.image("image:latest"), "nginx")
                .await
                .with_context(|| format!("flip at {at}"))?;
        }
        Ok(())
    })
}

#[test]
fn hostile_requests_do_not_disturb_others() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    block_on(async {
        let server = Server::start(recorded.0.path(), true).await?;
        let head = |length: usize| {
            format!(
                "POST /tdfs/v1/image/pages HTTP/1.1\r\nhost: x\r\ncontent-type: {}\r\ncontent-length: {length}\r\n\r\n",
                tdfs_common::wire::REQUEST_TYPE
            )
        };
        let mut random = Random(3);
        let addr = server.addr;
        for round in 0..40 {
            let len = random.below(4096) as usize;
            let mut body = random.bytes(len);
            if round % 2 == 0 && len > 24 {
                body[..24].copy_from_slice(b"TDFSPREQ\x01\0\0\0\0\0\0\0\0\0\0\0\xff\xff\x1f\0");
            }
            let request = [head(len).into_bytes(), body].concat();
            let status = aside(move || exchange(addr, &request)).await?;
            ensure!(status.starts_with("HTTP/1.1 400"), "{status}");
        }
        let status =
            aside(move || exchange(addr, &[head(8 << 20).into_bytes(), vec![0; 2 << 20]].concat())).await?;
        ensure!(status.is_empty() || status.starts_with("HTTP/1.1 413"), "{status}");
        // Half a request keeps only its own connection waiting.
        let half = std::net::TcpStream::connect(addr)?;
        std::io::Write::write_all(&mut &half, head(1000).as_bytes())?;
        let done = Node::new(&recorded.path("node"))?.start(&server.image("image:latest"), "nginx").await?;
        ensure!(done.of("page_service").requests == 1 && done.of("ranges").requests == 0);
        Ok(())
    })
}

/// Sends raw bytes and reads the first line of the answer.
fn exchange(addr: std::net::SocketAddr, request: &[u8]) -> Result<String> {
    use std::io::{BufRead as _, BufReader, Write as _};
    let stream = std::net::TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    // A server that has refused may close while we still send.
    let _ = (&stream).write_all(request);
    let mut line = String::new();
    let _ = BufReader::new(&stream).read_line(&mut line);
    Ok(line)
}
