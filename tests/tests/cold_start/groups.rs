//! Services of one group share pages.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Result, ensure};
use tdfs_common::digest::ContentHash;
use tdfs_common::envelope;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::trace::Trace;
use tdfs_tests::images::{self, Unpacked};
use tdfs_tests::tdfs;

use crate::{Recorded, expect_clean, number, run, show};

/// The model: contents of all pages that a trace names, read from the image as another tool unpacked it.
fn contents(trace: &Path, rootfs: &Path) -> Result<HashSet<ContentHash>> {
    let trace: Trace = envelope::decode(&std::fs::read(trace)?)?;
    let mut pages = HashSet::new();
    for touch in &trace.touches {
        let path = String::from_utf8(trace.files[touch.file as usize].path.clone())?;
        let mut bytes = std::fs::read(rootfs.join(path))?;
        bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
        let (start, count) = (touch.page as usize, touch.count as usize);
        let touched = &bytes[start * PAGE_SIZE..(start + count) * PAGE_SIZE];
        pages.extend(touched.chunks(PAGE_SIZE).map(ContentHash::of));
    }
    Ok(pages)
}

#[test]
fn a_second_service_fetches_only_what_the_first_did_not_bring() -> Result<()> {
    let recorded = Recorded::new("python", 2)?;
    let layout = images::image("python")?;
    let unpacked = Unpacked::new(&layout, "latest")?;
    let first = contents(&recorded.trace("http"), &unpacked.path())?;
    let second = contents(&recorded.trace("tls"), &unpacked.path())?;
    let shared = first.intersection(&second).count() as u64;
    ensure!(shared > 1000, "both run the same interpreter: {shared} pages shared");

    let packed = &recorded.reports[1]["runtime_image"];
    let new = second.difference(&first).count() as u64;
    ensure!(number(packed, "new_pages")? == new, "{packed}, the model says {new}");

    let node = recorded.path("node");
    let a = run(&recorded.reference(), &node, &["--service", "http", "--start", "fetched"])?;
    ensure!(number(&a, "pages_fetched")? == first.len() as u64, "{a}, the model says {}", first.len());
    let b = run(&recorded.reference(), &node, &["--service", "tls", "--start", "fetched"])?;
    ensure!(number(&b, "pages_needed")? == second.len() as u64, "{b}, the model says {}", second.len());
    ensure!(number(&b, "pages_present")? == shared, "{b}, the model says {shared}");
    ensure!(number(&b, "pages_fetched")? == new, "{b}, the model says {new}");
    ensure!(number(&b, "data_requests")? == 1, "{b}");
    expect_clean(&node)?;

    // The other way round, on another node: both fit into one zone again.
    let node = recorded.path("other");
    let b = run(&recorded.reference(), &node, &["--service", "tls", "--start", "fetched"])?;
    ensure!(number(&b, "pages_present")? == 0 && number(&b, "pages_needed")? == second.len() as u64, "{b}");
    let a = run(&recorded.reference(), &node, &["--service", "http", "--start", "fetched"])?;
    ensure!(number(&a, "pages_present")? >= shared, "{a}");
    let again = run(&recorded.reference(), &node, &["--service", "tls", "--start", "fetched"])?;
    ensure!(number(&again, "data_requests")? == 0, "{again}");

    let ambiguous = tdfs::error(["run", &recorded.reference(), "--state", &show(&node)])?;
    ensure!(ambiguous.contains("http") && ambiguous.contains("tls"), "{ambiguous}");
    let unknown = tdfs::error(["run", &recorded.reference(), "--service", "x", "--state", &show(&node)])?;
    ensure!(unknown.contains("\"x\"") && unknown.contains("http"), "{unknown}");
    let verified = tdfs::json(["verify", &recorded.reference(), "--state", &show(&node)])?;
    ensure!(verified["runtime_images"].as_array().is_some_and(|r| r.len() == 2), "{verified}");
    expect_clean(&node)
}
