//! Whatever is wrong with a runtime image, nothing wrong is served.

use std::fs;

use anyhow::{Result, ensure};
use tdfs_common::runtime_image::{LAYER_INDEX_TYPE, SEGMENT_TYPE, SERVICE_TYPE, TREE_TYPE};
use tdfs_tests::tdfs;

use crate::{Recorded, expect_clean, number, run, show};

/// Ways to ruin a blob.
type Ruin = (&'static str, fn(&mut Vec<u8>));

const RUIN: [Ruin; 5] = [
    ("first byte flipped", |b| b[0] ^= 1),
    ("byte in the middle flipped", |b| {
        let middle = b.len() / 2;
        b[middle] ^= 0x40;
    }),
    ("halves swapped", |b| {
        let middle = b.len() / 2;
        b.rotate_left(middle);
    }),
    ("truncated", |b| b.truncate(b.len() / 2)),
    ("longer", |b| b.extend_from_slice(&[0; 4096])),
];

#[test]
fn damaged_blobs_end_in_one_clear_error_and_expose_nothing() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    for media_type in [SERVICE_TYPE, TREE_TYPE, LAYER_INDEX_TYPE, SEGMENT_TYPE] {
        let path = recorded.blob("nginx", media_type)?;
        let good = fs::read(&path)?;
        for (how, ruin) in RUIN {
            let mut bad = good.clone();
            ruin(&mut bad);
            fs::write(&path, &bad)?;
            let node = recorded.path("damaged");
            let arguments = ["run", &recorded.reference(), "--network", "private", "--state", &show(&node)];
            let error = tdfs::error(arguments)?;
            ensure!(!error.contains("panicked"), "{media_type} {how}: {error}");
            expect_clean(&node)?;
            fs::write(&path, &good)?;
            // What was verified before the error may stay; the rest is fetched, and it starts.
            let healed = run(&recorded.reference(), &node, &[])?;
            let pages = ["pages_present", "pages_fetched", "pages_awaited"];
            let pages = pages.iter().map(|p| number(&healed, p)).sum::<Result<u64>>()?;
            ensure!(pages > 0 && pages == number(&healed, "pages_needed")?, "{how}: {healed}");
            fs::remove_dir_all(&node)?;
        }
    }
    Ok(())
}

#[test]
fn verify_finds_a_flipped_bit_in_a_layer() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    let node = recorded.path("node");
    let arguments = ["verify", &recorded.reference(), "--state", &show(&node)];
    tdfs::json(arguments)?;
    let inspected = tdfs::json(["inspect", &recorded.reference(), "--state", &show(&node)])?;
    let digest = inspected["layers"][0]["digest"].as_str().unwrap_or_default().to_owned();
    let path = recorded.layout().join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let mut bytes = fs::read(&path)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&path, bytes)?;
    let error = tdfs::error(["verify", &recorded.reference(), "--state", &show(&recorded.path("fresh"))])?;
    ensure!(!error.contains("panicked"), "{error}");
    expect_clean(&node)
}

#[test]
fn an_incomplete_trace_is_refused() -> Result<()> {
    use tdfs_common::envelope;
    use tdfs_common::trace::Trace;
    let recorded = Recorded::new("nginx", 1)?;
    let path = recorded.trace("nginx");
    let mut trace: Trace = envelope::decode(&fs::read(&path)?)?;
    (trace.complete, trace.lost_events) = (false, 7);
    fs::write(&path, envelope::encode(&trace)?)?;
    let (state, output) = (show(&recorded.state()), show(&recorded.path("refused")));
    let pack =
        ["pack", &recorded.reference(), "--trace", &show(&path), "--output", &output, "--state", &state];
    let error = tdfs::error(pack)?;
    ensure!(error.contains("incomplete") && error.contains('7'), "{error}");
    let allowed = tdfs::json(pack.iter().chain(&["--allow-incomplete"]))?;
    ensure!(number(&allowed, "pages")? > 0, "{allowed}");
    Ok(())
}
