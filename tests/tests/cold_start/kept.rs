//! What one start keeps of its mount for the next.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;

/// Not needed to start nginx, so in no runtime image.
const COLD: &str = "/usr/bin/perl";

/// Starts a container that tells of a cold file, and returns what it says and what tdfs does.
fn sum(recorded: &Recorded, node: &Path) -> Result<(String, Value)> {
    let mut arguments = text(["run", &recorded.reference(), "--ready", "exit", "--state", &show(node)]);
    arguments.extend(text(["--", "sha256sum", COLD]));
    let running = tdfs::Running::start(arguments)?;
    let report = running.report.clone();
    let (status, messages) = running.finish()?;
    ensure!(status.success(), "{status}: {messages}");
    let said = messages.lines().find(|line| line.ends_with(COLD)).context("no sum")?;
    Ok((said.to_owned(), report))
}

fn kept(node: &Path) -> Result<PathBuf> {
    let mut files = fs::read_dir(node.join("mounts"))?;
    let file = files.next().context("nothing is kept")??;
    ensure!(files.next().is_none(), "one runtime image, one file");
    Ok(file.path())
}

#[test]
fn a_kept_mount_reads_the_same_and_is_not_believed_when_damaged() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    let node = recorded.path("node");
    run(&recorded.reference(), &node, &["--start", "streaming"])?;
    // Some of its pages lay behind the cold device. What it left has them on the zone, and so has what another writes.
    let file = kept(&node)?;
    let fresh = recorded.path("fresh");
    let expected = sum(&recorded, &fresh)?.0;
    ensure!(fs::read(kept(&fresh)?)? == fs::read(&file)?);

    let written = fs::metadata(&file)?.modified()?;
    let good = fs::read(&file)?;
    // Neither is looked at until a cold page is read.
    let metadata = fs::read_dir(node.join("metadata"))?.collect::<Result<Vec<_>, _>>()?;
    let sizes = metadata.iter().map(|f| Ok((f.metadata()?.len(), f.path()))).collect::<Result<Vec<_>>>()?;
    let (_, tree) = sizes.into_iter().max().context("no metadata")?;
    fs::rename(&tree, recorded.path("tree"))?;
    let warm = run(&recorded.reference(), &node, &[])?;
    ensure!(warm["start_mode"] == "resident" && warm["cold_pages"] == 0, "{warm}");
    ensure!(!tree.exists(), "the tree was needed: {warm}");
    // Then it is fetched again, from the layout.
    let (said, report) = sum(&recorded, &node)?;
    ensure!(said == expected && number(&report, "cold_pages")? > 0, "{said}: {report}");
    ensure!(tree.exists() && fs::metadata(&file)?.modified()? == written, "it was kept once");

    for damage in ["flip", "cut", "empty"] {
        let mut bytes = good.clone();
        match damage {
            "flip" => bytes[good.len() / 2] ^= 1,
            "cut" => bytes.truncate(good.len() / 2),
            _ => bytes.clear(),
        }
        fs::write(&file, bytes)?;
        ensure!(sum(&recorded, &node)?.0 == expected, "{damage}");
        ensure!(fs::read(kept(&node)?)? == good, "{damage}: it was not written again");
    }
    expect_clean(&node)
}
