//! The router over a layout, asked over a socket; what comes back is read with nothing but the format.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;

use reqwest::{Client, Response};
use serde_json::Value;
use tdfs_common::digest::{ContentHash, Digest};
use tdfs_common::envelope::encode;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::proof;
use tdfs_common::runtime_image::Service;
use tdfs_common::wire::{
    Choice, Encoding, FrameAt, HEAD_LEN, Head, Held, HeldPages, Kind, Part, REQUEST_MAX, Reason, Reference,
    Request, STREAM_HEADER_LEN, Wanted, blob_body, check_stream_header, cut_body,
};

use super::*;
use crate::fetch::frame::Decoder;
use crate::oci::{ClientOptions, Document};
use crate::pack::LoadedRuntimeImage;
use crate::pack::tests::Fixture;
use crate::registry::Upstream;

/// A server on a loopback port, over a layout with one image of two services that share pages.
struct Served {
    fixture: Fixture,
    url: String,
    client: Client,
}

/// An answer, read to its end.
#[derive(Default)]
struct Answered {
    blobs: Vec<(Part, Digest, Vec<u8>)>,
    plan: Option<tdfs_common::wire::Plan>,
    units: Vec<(FrameAt, u64, bool)>,
    /// Verified pages by zone address.
    pages: BTreeMap<u64, Vec<u8>>,
    end: Option<(Reason, String)>,
}

impl Served {
    async fn new(limits: &Limits) -> Self {
        let files: Vec<Vec<Option<u8>>> = (0..6u8)
            .map(|n| (0..200u8).map(|b| Some(b.wrapping_mul(7).wrapping_add(n * 31))).collect())
            .collect();
        let fixture = Fixture::new(&files).await;
        let traces = vec![
            fixture.trace("a", &[(0, 0, 100), (1, 10, 90), (2, 3, 1), (0, 120, 20)]),
            fixture.trace("b", &[(3, 0, 64), (1, 50, 80), (0, 90, 40)]),
        ];
        fixture.add(traces).await;
        let content = Arc::new(Upstream::layouts(fixture.dir.path(), ClientOptions::default()));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}/tdfs/v1", listener.local_addr().unwrap());
        let router = router(content, limits);
        tokio::spawn(async move { axum::serve(listener, router).await });
        // An error means that there is a provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { fixture, url, client: Client::builder().no_proxy().build().unwrap() }
    }

    async fn post(&self, path: &str, body: Vec<u8>) -> Response {
        let post = self.client.post(format!("{}/{path}", self.url)).header("content-type", REQUEST_TYPE);
        post.body(body).send().await.unwrap()
    }

    async fn ask(&self, request: &Request) -> Answered {
        let response = self.post("image/pages", encode(request).unwrap()).await;
        assert_eq!(response.status(), 200);
        assert_eq!(
            (&response.headers()["content-type"], &response.headers()[SERVICE_HEADER]),
            (&STREAM_TYPE.parse().unwrap(), &"1".parse().unwrap())
        );
        let service = self.loaded(request).await.map(|l| l.service);
        read(&response.bytes().await.unwrap(), service.as_ref())
    }

    /// The runtime image a request is about, as a plain registry's client finds it.
    async fn loaded(&self, request: &Request) -> Option<LoadedRuntimeImage> {
        let choice = match &request.wanted {
            Wanted::Image { choice: Choice::Service(name), .. } => crate::pack::Choice::Service(name),
            Wanted::Image { choice: Choice::Pinned(digest), .. } => crate::pack::Choice::Pinned(*digest),
            Wanted::Image { choice: Choice::Any, .. } => crate::pack::Choice::Only,
            Wanted::Pages { artifact, .. } => crate::pack::Choice::Pinned(*artifact),
        };
        self.fixture.load(choice).await.ok()
    }

    async fn refused(&self, path: &str, body: Vec<u8>) -> (u16, String) {
        let response = self.post(path, body).await;
        let status = response.status().as_u16();
        assert_eq!(response.headers()[SERVICE_HEADER], "1");
        let error: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        let (code, message) = (&error["errors"][0]["code"], &error["errors"][0]["message"]);
        assert!(!message.as_str().unwrap().is_empty());
        (status, code.as_str().unwrap().to_owned())
    }
}

fn read(bytes: &[u8], service: Option<&Service>) -> Answered {
    let (header, mut rest) = bytes.split_first_chunk::<STREAM_HEADER_LEN>().unwrap();
    check_stream_header(header).unwrap();
    let mut answered = Answered::default();
    let mut decoder = Decoder::new().unwrap();
    while !rest.is_empty() {
        assert!(answered.end.is_none(), "something after the end");
        let (head, after) = rest.split_first_chunk::<HEAD_LEN>().unwrap();
        let head = Head::decode(head).unwrap();
        let (body, after) = after.split_at(head.len);
        rest = after;
        let (at, set, pages) = match head.kind {
            Kind::Blob { part, media_type_len } => {
                let (digest, _, content) = blob_body(media_type_len, body).unwrap();
                assert_eq!(Digest::of(content), digest);
                answered.blobs.push((part, digest, content.to_vec()));
                continue;
            }
            Kind::Plan(plan) => {
                answered.plan = Some(plan);
                continue;
            }
            Kind::End(reason) => {
                answered.end = Some((reason, String::from_utf8(body.to_vec()).unwrap()));
                continue;
            }
            Kind::Frame { at, plain } => {
                let frame = service.unwrap().segments[at.segment as usize].frames[at.frame as usize];
                let pages = if plain {
                    assert_eq!(ContentHash::of(body), frame.hash);
                    body.to_vec()
                } else {
                    decoder.decode(&frame, body).unwrap().to_vec()
                };
                answered.units.push((at, proof::all(frame.pages), plain));
                (at, proof::all(frame.pages), pages)
            }
            Kind::Cut { at, set, values, plain } => {
                let frame = service.unwrap().segments[at.segment as usize].frames[at.frame as usize];
                let (values, pages) = cut_body(values, body).unwrap();
                let raw = set.count_ones() as usize * PAGE_SIZE;
                let pages = if plain { pages.to_vec() } else { zstd::bulk::decompress(pages, raw).unwrap() };
                assert_eq!(proof::root(frame.pages, set, &pages, &values), Some(frame.hash));
                answered.units.push((at, set, plain));
                (at, set, pages)
            }
        };
        let segment = &service.unwrap().segments[at.segment as usize];
        let first = segment.placed().nth(at.frame as usize).unwrap().pages.start;
        let numbers = (0..64).filter(|n| set >> n & 1 == 1).map(|n| first + n);
        for (number, page) in numbers.zip(pages.chunks(PAGE_SIZE)) {
            assert_eq!(answered.pages.insert(number, page.to_vec()), None, "page {number} twice");
        }
    }
    answered
}

fn image(choice: Choice) -> Request {
    let wanted = Wanted::Image {
        reference: Reference::Tag("test".into()),
        platform: "linux/amd64".into(),
        choice,
        known: Vec::new(),
    };
    Request { wanted, held: Vec::new(), encoding: Encoding::Stored }
}

fn service(name: &str) -> Request {
    image(Choice::Service(name.into()))
}

impl Answered {
    fn numbers(&self) -> BTreeSet<u64> {
        self.pages.keys().copied().collect()
    }

    /// Every page is what the image's files hold there.
    fn assert_true_to(&self, fixture: &Fixture, service: &Service) {
        for run in &service.runs {
            for n in 0..run.count {
                if let Some(page) = self.pages.get(&u64::from(run.zone_page + n)) {
                    let mut expected = fixture.files[&run.ino].clone();
                    expected.resize(expected.len().next_multiple_of(PAGE_SIZE), 0);
                    let at = (run.file_page + n) as usize * PAGE_SIZE;
                    assert_eq!(page[..], expected[at..at + PAGE_SIZE]);
                }
            }
        }
    }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test)
}

#[test]
fn an_empty_node_gets_everything_in_one_answer() {
    run(async {
        let served = Served::new(&Limits::default()).await;
        for encoding in [Encoding::Stored, Encoding::Plain] {
            let request = Request { encoding, ..service("a") };
            let loaded = served.loaded(&request).await.unwrap();
            let answered = served.ask(&request).await;
            let parts: Vec<Part> = answered.blobs.iter().map(|b| b.0).collect();
            let all =
                [Part::Image, Part::Artifact, Part::Config, Part::Service, Part::Tree, Part::LayerIndex];
            assert_eq!(parts, all);
            assert_eq!(answered.blobs[0].1, served.fixture.image.digest);
            assert_eq!(answered.blobs[1].1, loaded.manifest);
            let needed: BTreeSet<u64> = loaded.service.needed().iter().collect();
            assert_eq!(answered.numbers(), needed);
            answered.assert_true_to(&served.fixture, &loaded.service);
            let plan = answered.plan.unwrap();
            assert_eq!((plan.pages, plan.frames as usize), (needed.len() as u64, answered.units.len()));
            assert_eq!(answered.end, Some((Reason::Complete, String::new())));
            let order: Vec<FrameAt> = answered.units.iter().map(|u| u.0).collect();
            let by_use = loaded.service.frames_by_first_use().into_iter();
            let expected: Vec<FrameAt> =
                by_use.map(|f| FrameAt { segment: f.segment as u32, frame: f.placed.index as u32 }).collect();
            assert_eq!(order, expected);
            let compressible = |u: &&(FrameAt, u64, bool)| {
                let frame = loaded.service.segments[u.0.segment as usize].frames[u.0.frame as usize];
                (frame.len as usize) < frame.pages as usize * PAGE_SIZE
            };
            let plain = answered.units.iter().filter(compressible).filter(|u| u.2).count();
            assert_eq!(plain > 0, encoding == Encoding::Plain);
        }
    });
}

#[test]
fn what_is_held_is_not_sent_and_parts_of_frames_are_cut() {
    run(async {
        let served = Served::new(&Limits::default()).await;
        let (a, b) = (served.fixture.loaded("a").await, served.fixture.loaded("b").await);
        let segment = &a.service.segments[0];
        assert_eq!(segment.blob, b.service.segments[0].blob);
        let (needs_a, needs_b) = (a.service.needed(), b.service.needed());
        let (a_pages, b_pages): (BTreeSet<u64>, BTreeSet<u64>) =
            (needs_a.iter().collect(), needs_b.iter().collect());
        assert!(a_pages.intersection(&b_pages).count() > 0);
        let artifact = Wanted::Pages { image: served.fixture.image.digest, artifact: b.manifest };
        let held = |pages| vec![Held { segment: segment.blob, pages }];
        // What `a` brought is not sent again, and no metadata either.
        let after_a = Request {
            wanted: artifact,
            held: held(HeldPages::Some(needs_a.to_bytes())),
            encoding: Encoding::Stored,
        };
        let answered = served.ask(&after_a).await;
        assert_eq!(answered.numbers(), &b_pages - &a_pages);
        assert!(answered.blobs.is_empty());
        // Every third page is here.
        let third: Vec<u8> = (0..400u32)
            .map(|n| (0..8).fold(0, |byte, bit| byte | u8::from((n * 8 + bit) % 3 == 0) << bit))
            .collect();
        for encoding in [Encoding::Stored, Encoding::Plain] {
            let thirds = Request { held: held(HeldPages::Some(third.clone())), encoding, ..service("b") };
            let answered = served.ask(&thirds).await;
            let expected: BTreeSet<u64> = b_pages.iter().copied().filter(|p| p % 3 != 0).collect();
            assert_eq!(answered.numbers(), expected);
            answered.assert_true_to(&served.fixture, &b.service);
            assert!(answered.units.iter().any(|u| u.1.count_ones() > 1));
            assert_eq!(answered.plan.unwrap().pages, expected.len() as u64);
            if encoding == Encoding::Plain {
                assert!(answered.units.iter().filter(|u| u.1.count_ones() < 40).all(|u| u.2));
            }
        }
        // Everything is here, and so is some metadata.
        let Wanted::Image { reference, platform, choice, .. } = service("b").wanted else { panic!() };
        let Ok((_, Document::Manifest(manifest))) = Document::parse("b", None, &b.artifact) else { panic!() };
        let known = manifest.layers.iter().map(|l| l.digest).collect();
        let nothing = Request {
            wanted: Wanted::Image { reference, platform, choice, known },
            held: held(HeldPages::All),
            encoding: Encoding::Stored,
        };
        let answered = served.ask(&nothing).await;
        assert!(answered.pages.is_empty() && answered.end == Some((Reason::Complete, String::new())));
        assert_eq!(
            answered.blobs.iter().map(|b| b.0).collect::<Vec<_>>(),
            [Part::Image, Part::Artifact, Part::Config]
        );
    });
}

#[test]
fn an_image_without_runtime_image_is_sent_alone_and_a_choice_is_needed_where_there_are_two() {
    run(async {
        let served = Served::new(&Limits::default()).await;
        let bad = |request: &Request| encode(request).unwrap();
        let ambiguous = served.refused("image/pages", bad(&image(Choice::Any))).await;
        assert_eq!(ambiguous, (404, "RUNTIME_IMAGE_UNKNOWN".into()));
        let unknown = served.refused("image/pages", bad(&service("c"))).await;
        assert_eq!(unknown, (404, "RUNTIME_IMAGE_UNKNOWN".into()));

        let bare = Fixture::new(&[vec![Some(1); 20]]).await;
        let content = Arc::new(Upstream::layouts(bare.dir.path(), ClientOptions::default()));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}/tdfs/v1/image/pages", listener.local_addr().unwrap());
        let router = router(content, &Limits::default());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let post = served.client.post(url).header("content-type", REQUEST_TYPE);
        let answer = post.body(bad(&image(Choice::Any))).send().await.unwrap().bytes().await.unwrap();
        let answered = read(&answer, None);
        assert_eq!(answered.blobs.iter().map(|b| b.0).collect::<Vec<_>>(), [Part::Image, Part::Config]);
        assert_eq!(answered.end, Some((Reason::Complete, String::new())));
    });
}

#[test]
fn hostile_requests_are_refused_and_the_next_one_is_answered() {
    run(async {
        let served = Served::new(&Limits::default()).await;
        let good = encode(&service("a")).unwrap();
        for len in 0..good.len() {
            assert_eq!(
                served.refused("image/pages", good[..len].to_vec()).await,
                (400, "REQUEST_INVALID".into())
            );
        }
        let mut lying = good.clone();
        lying[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(served.refused("image/pages", lying).await, (400, "REQUEST_INVALID".into()));
        // Bits for more pages than any request may name, though they compress to nothing.
        let bits = HeldPages::Some(vec![0xff; 1 << 20]);
        let held = (0..2u8).map(|n| Held { segment: Digest::of(&[n]), pages: bits.clone() }).collect();
        assert!(encode(&Request { held, ..service("a") }).is_err());
        assert_eq!(
            served.refused("image/pages", vec![0; REQUEST_MAX + 1]).await,
            (413, "SIZE_INVALID".into())
        );
        for (path, status) in [
            ("image", 404),
            ("pages", 404),
            ("image/pages/", 404),
            ("nobody/pages", 404),
            ("Image/pages", 400),
            ("image%00/pages", 400),
            ("image%2f..%2fimage/pages", 400),
            ("image:x@y/pages", 400),
        ] {
            let (got, _) = served.refused(path, good.clone()).await;
            assert_eq!(got, status, "{path}");
        }
        for tag in ["../test", "a b", "@", "test@x", "a/b", "sha256:00"] {
            let Wanted::Image { platform, choice, known, .. } = service("a").wanted else { panic!() };
            let wanted = Wanted::Image { reference: Reference::Tag(tag.into()), platform, choice, known };
            let request = Request { wanted, ..service("a") };
            let (status, code) = served.refused("image/pages", encode(&request).unwrap()).await;
            assert_eq!((status, code.as_str()), (400, "NAME_INVALID"), "{tag}");
        }
        let other = Digest::of(b"nothing");
        for wanted in [
            Wanted::Pages { image: other, artifact: served.fixture.loaded("a").await.manifest },
            Wanted::Pages { image: served.fixture.image.digest, artifact: other },
            Wanted::Pages { image: served.fixture.image.digest, artifact: served.fixture.image.digest },
        ] {
            let (status, _) =
                served.refused("image/pages", encode(&Request { wanted, ..service("a") }).unwrap()).await;
            assert_eq!(status, 404);
        }
        let untyped =
            served.client.post(format!("{}/image/pages", served.url)).body(good).send().await.unwrap();
        assert_eq!(untyped.status(), 415);
        let got = served.client.get(format!("{}/image/pages", served.url)).send().await.unwrap();
        assert_eq!(got.status(), 405);
        assert!(!served.ask(&service("a")).await.pages.is_empty());
    });
}

#[test]
fn requests_over_the_limit_are_told_to_come_back() {
    run(async {
        let served = Served::new(&Limits { requests: 0, ..Limits::default() }).await;
        let response = served.post("image/pages", encode(&service("a")).unwrap()).await;
        assert_eq!(
            (response.status().as_u16(), &response.headers()["retry-after"]),
            (503, &"1".parse().unwrap())
        );
        let served = Served::new(&Limits { requests: 1, ..Limits::default() }).await;
        for _ in 0..3 {
            assert!(served.ask(&service("a")).await.end.is_some());
        }
    });
}

#[test]
fn damaged_segments_end_the_stream_with_a_reason() {
    run(async {
        let served = Served::new(&Limits::default()).await;
        let loaded = served.fixture.loaded("a").await;
        let segment = &loaded.service.segments[0];
        let path = served.fixture.blob(&segment.blob);
        let good = fs::read(&path).unwrap();
        // A cut is verified here, because its proof is made of the other pages.
        let first = loaded.service.frames_by_first_use()[0].placed.clone();
        let mut bad = good.clone();
        bad[first.bytes.start as usize..first.bytes.end as usize].fill(0x55);
        fs::write(&path, bad).unwrap();
        let one = HeldPages::Some({
            let mut bits = vec![0; segment.pages().div_ceil(8) as usize];
            let page = loaded.service.needed().iter().find(|p| first.pages.contains(p)).unwrap();
            bits[page as usize / 8] = 1 << (page % 8);
            bits
        });
        let request = Request { held: vec![Held { segment: segment.blob, pages: one }], ..service("a") };
        let answered = served.ask(&request).await;
        assert!(
            matches!(&answered.end, Some((Reason::Damaged, text)) if text.contains("frame")),
            "{:?}",
            answered.end
        );
        fs::write(&path, &good[..good.len() / 2]).unwrap();
        let answered = served.ask(&service("a")).await;
        assert!(matches!(answered.end, Some((Reason::Unavailable, _))), "{:?}", answered.end);
        fs::remove_file(&path).unwrap();
        let answered = served.ask(&service("a")).await;
        assert!(matches!(answered.end, Some((Reason::Unavailable, _))) && answered.pages.is_empty());
        fs::write(&path, &good).unwrap();
        assert!(matches!(served.ask(&service("a")).await.end, Some((Reason::Complete, _))));
    });
}
