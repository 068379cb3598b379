//! What a node does per start: the diff of a zone, and the decoding of frames next to plain zstd.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tdfs_agent::fetch::frame::{Decoder, encode};
use tdfs_agent::rtpc::Presence;
use tdfs_common::bitmap::PageBitmap;
use tdfs_common::digest::ContentHash;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::{FRAME_PAGES, Frame};

/// The diff of a zone of a million pages of which every other run of 50 is needed and two thirds are present.
fn diff(c: &mut Criterion) {
    const PAGES: u64 = 1_000_000;
    let dir = tempfile::tempdir().unwrap();
    let presence = Presence::open(&dir.path().join("presence"), PAGES).unwrap();
    let mut needed = PageBitmap::new(PAGES);
    for start in (0..PAGES).step_by(100) {
        needed.insert_range(start..start + 50);
        presence.insert(start + 10..start + 70);
    }
    assert_eq!(presence.missing(&needed).count(), PAGES / 10);
    c.bench_function("diff of 1,000,000 pages", |b| b.iter(|| presence.missing(black_box(&needed))));
}

/// Frames of this very program, which is like the libraries that services touch.
fn frames() -> Vec<(Frame, Vec<u8>)> {
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let frames = program.chunks_exact(FRAME_PAGES as usize * PAGE_SIZE).take(64);
    let compressed = |(frame, bytes): &(Frame, Vec<u8>)| bytes.len() < frame.pages as usize * PAGE_SIZE;
    frames.map(|pages| encode(pages, 9).unwrap()).filter(compressed).collect()
}

fn decode(c: &mut Criterion) {
    let frames = frames();
    let raw: u64 = frames.iter().map(|(f, _)| u64::from(f.pages) * PAGE_SIZE as u64).sum();
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Bytes(raw));
    let mut decoder = Decoder::new().unwrap();
    group.bench_function("frame: zstd and hash", |b| {
        b.iter(|| {
            for (frame, bytes) in &frames {
                black_box(decoder.decode(frame, bytes).unwrap());
            }
        });
    });
    let pages: Vec<Vec<u8>> =
        frames.iter().map(|(frame, bytes)| decoder.decode(frame, bytes).unwrap().to_vec()).collect();
    group.bench_function("hash alone", |b| {
        b.iter(|| {
            for pages in &pages {
                black_box(ContentHash::of(pages));
            }
        });
    });
    let mut zstd = zstd::bulk::Decompressor::new().unwrap();
    let out = || vec![0; FRAME_PAGES as usize * PAGE_SIZE];
    group.bench_function("zstd alone", |b| {
        b.iter_batched_ref(
            out,
            |out| {
                for (_, bytes) in &frames {
                    black_box(zstd.decompress_to_buffer(bytes, out.as_mut_slice()).unwrap());
                }
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, diff, decode);
criterion_main!(benches);
