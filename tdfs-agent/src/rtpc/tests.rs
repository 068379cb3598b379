//! Zones: what they keep, what they refuse, and what a crash or a reboot may leave.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;
use tdfs_common::digest::Digest;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::{PlacedFrame, Run, Segment, Service};

use super::presence::age;
use super::{RtpcError, Zone};
use crate::fetch::frame;

/// The content of zone page `page` of the zone `seed`.
fn page(seed: u8, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE];
    let key = [&[seed][..], &page.to_le_bytes()].concat();
    blake3::Hasher::new().update(&key).finalize_xof().fill(&mut bytes[..64]);
    bytes
}

fn pages(seed: u8, frame: &PlacedFrame) -> Vec<u8> {
    frame.pages.clone().flat_map(|p| page(seed, p)).collect()
}

/// A segment whose frames have these numbers of pages.
fn segment(seed: u8, base: u64, frames: &[u64]) -> Segment {
    let mut at = base;
    let frames = frames.iter().map(|count| {
        let bytes: Vec<u8> = (at..at + count).flat_map(|p| page(seed, p)).collect();
        at += count;
        frame::encode(&bytes, 1).unwrap().0
    });
    let frames: Vec<_> = frames.collect();
    Segment { blob: Digest::of(&[seed, base as u8]), base, frames }
}

/// A service that needs every page of these segments.
fn service(group: &str, segments: Vec<Segment>) -> Service {
    let runs = segments.iter().enumerate().map(|(n, s)| Run {
        ino: n as u32,
        file_page: 0,
        zone_page: s.base as u32,
        count: s.pages() as u32,
    });
    Service {
        group: group.into(),
        service: "s".into(),
        image: Digest::of(b"image"),
        args: None,
        ready: "exit".into(),
        runs: runs.collect(),
        segments,
    }
}

fn open(state: &Path, service: &Service) -> Arc<Zone> {
    Arc::new(Zone::open(state, service).unwrap())
}

fn frames(service: &Service) -> Vec<PlacedFrame> {
    service.segments.iter().flat_map(Segment::placed).collect()
}

/// Injects the frames that lack a page, and commits.
fn complete(seed: u8, service: &Service, zone: &Arc<Zone>) {
    let writer = zone.writer().unwrap();
    let missing = writer.missing();
    for f in frames(service).iter().filter(|f| missing.intersects(f.pages.clone())) {
        writer.inject(f.pages.start, &pages(seed, f)).unwrap();
    }
    writer.commit().unwrap();
    assert_eq!(zone.missing().count(), 0);
}

/// Every page that the zone calls present has its content.
fn expect_right(seed: u8, zone: &Zone) {
    for p in zone.needed().difference(&zone.missing()).iter() {
        let mut bytes = vec![0; PAGE_SIZE];
        zone.data_file().read_exact_at(&mut bytes, p * PAGE_SIZE as u64).unwrap();
        assert!(bytes == page(seed, p), "zone page {p} is wrong");
    }
}

#[test]
fn pages_are_there_at_once_and_for_others_after_the_commit() {
    let dir = tempfile::tempdir().unwrap();
    let s = service("web", vec![segment(1, 0, &[64, 5]), segment(1, 100, &[3])]);
    let zone = open(dir.path(), &s);
    assert_eq!(zone.missing(), s.needed());
    let writer = zone.writer().unwrap();
    let all = frames(&s);
    writer.inject(0, &pages(1, &all[0])).unwrap();
    assert_eq!(zone.missing().iter().collect::<Vec<_>>(), [64, 65, 66, 67, 68, 100, 101, 102]);
    assert_eq!(open(dir.path(), &s).missing(), s.needed());
    writer.commit().unwrap();
    assert_eq!(open(dir.path(), &s).missing().count(), 8);
    drop(writer);
    complete(1, &s, &zone);
    expect_right(1, &zone);
    zone.prefetch();
    let again = open(dir.path(), &s);
    assert_eq!(again.missing().count(), 0);
    expect_right(1, &again);
}

#[test]
fn pages_outside_the_zone_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let zone = open(dir.path(), &service("web", vec![segment(1, 0, &[4])]));
    let writer = zone.writer().unwrap();
    for (at, bytes) in [(4, PAGE_SIZE), (3, 2 * PAGE_SIZE), (0, 100), (u64::MAX, PAGE_SIZE)] {
        let refused = writer.inject(at, &vec![0; bytes]);
        assert!(matches!(refused, Err(RtpcError::OutsideZone { .. })), "{at}");
    }
    assert_eq!(zone.data_file().metadata().unwrap().len(), 4 * PAGE_SIZE as u64);
}

#[test]
fn services_of_a_group_share_a_zone_and_it_only_grows() {
    let dir = tempfile::tempdir().unwrap();
    let a = service("web", vec![segment(1, 0, &[64, 5])]);
    let b = service("web", vec![segment(1, 0, &[64, 5]), segment(1, 69, &[7])]);
    let zone_a = open(dir.path(), &a);
    complete(1, &a, &zone_a);
    let zone_b = open(dir.path(), &b);
    assert_eq!(zone_a.path(), zone_b.path());
    assert_eq!(zone_b.missing().iter().collect::<Vec<_>>(), (69..76).collect::<Vec<_>>());
    complete(1, &b, &zone_b);
    assert_eq!(open(dir.path(), &a).data_file().metadata().unwrap().len(), 76 * PAGE_SIZE as u64);
    // The pages that b brought are also there for a service that came before it, opened anew.
    assert_eq!(open(dir.path(), &a).missing().count(), 0);
    expect_right(1, &open(dir.path(), &b));
}

#[test]
fn contradicting_segments_get_zones_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let one = service("web", vec![segment(1, 0, &[64, 5])]);
    let two = service("web", vec![segment(2, 0, &[64, 5])]);
    // The blob of the first with other hashes: a liar must not make the pages of the first look wrong, or right.
    let mut liar = segment(3, 0, &[64, 5]);
    liar.blob = one.segments[0].blob;
    let liar = service("web", vec![liar]);
    let mut paths = BTreeSet::new();
    for (seed, s) in [(1, &one), (2, &two), (3, &liar)] {
        let zone = open(dir.path(), s);
        assert_eq!(zone.missing(), s.needed());
        complete(seed, s, &zone);
        paths.insert(zone.path().to_owned());
    }
    assert_eq!(paths.len(), 3);
    for (seed, s) in [(1, &one), (2, &two), (3, &liar)] {
        let zone = open(dir.path(), s);
        assert_eq!(zone.missing().count(), 0);
        expect_right(seed, &zone);
    }
    // More of the second lineage goes there, although it would fit beside the first as well.
    let more = service("web", vec![segment(2, 0, &[64, 5]), segment(2, 69, &[1])]);
    assert_eq!(open(dir.path(), &more).path(), open(dir.path(), &two).path());
    assert_eq!(open(dir.path(), &more).missing().count(), 1);
}

#[test]
fn group_names_cannot_leave_the_state_directory() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("a/b/state");
    for group in ["../../../x", "/etc", "", ".", "..", "a/b", "\0", "..\\x", &"n".repeat(5000), "web"] {
        let s = service(group, vec![segment(1, 0, &[1])]);
        let zone = open(&state, &s);
        let inside = zone.path().strip_prefix(state.join("zones")).unwrap();
        assert_eq!(inside.components().count(), 3, "{inside:?}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
}

#[test]
fn one_process_writes_at_a_time_and_the_next_finds_what_it_brought() {
    let dir = tempfile::tempdir().unwrap();
    let s = service("web", vec![segment(1, 0, &[64, 5])]);
    let (first, second) = (open(dir.path(), &s), open(dir.path(), &s));
    let writer = first.writer().unwrap();
    let lock = File::open(first.path().with_file_name("lock")).unwrap();
    assert!(matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)));
    let waiting = std::thread::spawn({
        let second = second.clone();
        move || second.writer().unwrap().missing().count()
    });
    for f in frames(&s) {
        writer.inject(f.pages.start, &pages(1, &f)).unwrap();
    }
    writer.commit().unwrap();
    assert_eq!(second.missing().count(), 69);
    drop(writer);
    assert_eq!(waiting.join().unwrap(), 0);
    assert_eq!(second.missing().count(), 0);
    // An open zone is leased.
    let data = File::open(first.path()).unwrap();
    assert!(matches!(data.try_lock(), Err(fs::TryLockError::WouldBlock)));
    drop((first, second));
    data.try_lock().unwrap();
}

#[test]
fn after_a_reboot_only_needed_frames_are_verified_and_none_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let a = service("web", vec![segment(1, 0, &[64, 5])]);
    let b = service("web", vec![segment(1, 0, &[64, 5]), segment(1, 69, &[7])]);
    let zone = open(dir.path(), &b);
    complete(1, &b, &zone);
    let presence = zone.path().with_file_name("presence");
    drop(zone);
    age(&presence);
    let before = fs::read(&presence).unwrap();
    assert_eq!(open(dir.path(), &a).missing().count(), 0);
    // Frames of b are still suspects, so the file still says so.
    assert_eq!(fs::read(&presence).unwrap(), before);
    assert_eq!(open(dir.path(), &b).missing().count(), 0);
    assert_ne!(fs::read(&presence).unwrap(), before);
    assert_eq!(open(dir.path(), &a).missing().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever a power cut did to the files: a page is right or absent, and the zone can be completed.
    #[test]
    fn after_a_power_cut_pages_are_right_or_absent(
        wrong in proptest::collection::vec((0u64..100, any::<u16>(), any::<u8>()), 0..5),
        cut in proptest::option::of(any::<Index>()),
        damage in proptest::option::of((0usize..3, any::<Index>(), any::<bool>(), 1u8..)),
        part in 0usize..6,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let s = service("web", vec![segment(1, 0, &[64, 5, 1]), segment(1, 80, &[20])]);
        let zone = open(dir.path(), &s);
        let writer = zone.writer().unwrap();
        for f in frames(&s).iter().take(part) {
            writer.inject(f.pages.start, &pages(1, f)).unwrap();
        }
        writer.commit().unwrap();
        let data = zone.path().to_owned();
        drop((writer, zone));

        age(&data.with_file_name("presence"));
        let file = File::options().write(true).open(&data).unwrap();
        for (p, at, byte) in wrong {
            file.write_all_at(&[byte], p * PAGE_SIZE as u64 + u64::from(at) % PAGE_SIZE as u64).unwrap();
        }
        if let Some(cut) = cut {
            file.set_len(cut.index(100 * PAGE_SIZE) as u64).unwrap();
        }
        if let Some((which, at, truncate, flip)) = damage {
            let path = data.with_file_name(["presence", "segments", "presence.tmp"][which]);
            let mut bytes = fs::read(&path).unwrap_or_else(|_| vec![0; 50]);
            let at = at.index(bytes.len());
            if truncate {
                bytes.truncate(at);
            } else {
                bytes[at] ^= flip;
            }
            fs::write(&path, bytes).unwrap();
        }
        let zone = open(dir.path(), &s);
        expect_right(1, &zone);
        complete(1, &s, &zone);
        expect_right(1, &zone);
        drop(zone);
        let zone = open(dir.path(), &s);
        prop_assert_eq!(zone.missing().count(), 0);
        expect_right(1, &zone);
    }
}

/// `kill -9` of a writer wherever it happens to be: this test starts itself as the writer.
#[test]
fn a_killed_writer_leaves_right_pages() {
    const STATE: &str = "TDFS_TEST_KILLED_WRITER";
    let counts: Vec<u64> = (0..60).map(|n| n % 64 + 1).collect();
    let s = service("web", vec![segment(1, 0, &counts), segment(1, 5000, &counts)]);
    if let Some(state) = std::env::var_os(STATE) {
        write_until_killed(Path::new(&state), &s);
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut present = 0;
    for round in 0..20u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["rtpc::tests::a_killed_writer_leaves_right_pages", "--exact", "--nocapture"])
            .env(STATE, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut steps = lines.map_while(Result::ok).filter(|l| l.starts_with("step"));
        // Anywhere from the first file operation to some way into the frames.
        if let Some(last) = (round * 7 % 30).checked_sub(1) {
            steps.nth(last as usize);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let zone = open(dir.path(), &s);
        expect_right(1, &zone);
        let now = zone.needed().count() - zone.missing().count();
        assert!(now >= present, "committed pages were lost");
        present = now;
    }
    assert!(present > 0);
    let zone = open(dir.path(), &s);
    complete(1, &s, &zone);
    expect_right(1, &zone);
}

fn write_until_killed(state: &Path, s: &Service) {
    let zone = open(state, s);
    let writer = zone.writer().unwrap();
    let missing = writer.missing();
    let all = frames(s);
    let todo = all.iter().filter(|f| missing.intersects(f.pages.clone()));
    let say = |what: &str| writeln!(std::io::stdout(), "\nstep {what}").unwrap();
    for (n, f) in todo.enumerate() {
        writer.inject(f.pages.start, &pages(1, f)).unwrap();
        say("inject");
        if n % 3 == 2 {
            writer.commit().unwrap();
            say("commit");
        }
    }
}

#[test]
fn a_state_directory_that_cannot_be_used_is_one_error() {
    let dir = tempfile::tempdir().unwrap();
    let state: PathBuf = dir.path().join("file");
    fs::write(&state, b"").unwrap();
    let e = Zone::open(&state, &service("web", vec![segment(1, 0, &[1])])).unwrap_err();
    assert!(e.to_string().contains("file/zones/web"), "{e}");
    assert_eq!(e.errno(), libc::ENOTDIR);
}
