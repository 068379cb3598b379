//! Pages as a browser shows them: Chromium without a window, and without a network.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flate2::read::ZlibDecoder;
use xtask::command;

/// The document of the page in `file` after its scripts have run, as HTML.
pub fn document(file: &Path) -> Result<String> {
    command::output(chromium(file)?.0.arg("--dump-dom").arg(url(file)?))
}

/// Takes a picture of the page, 1280 pixels wide, and says how many colours are in it.
pub fn colours(file: &Path, picture: &Path) -> Result<usize> {
    let (mut chromium, _profile) = chromium(file)?;
    let screenshot = format!("--screenshot={}", picture.display());
    command::output(
        chromium.args(["--window-size=1280,4000", "--hide-scrollbars", &screenshot]).arg(url(file)?),
    )?;
    distinct_colours(&std::fs::read(picture)?)
}

fn chromium(file: &Path) -> Result<(Command, tempfile::TempDir)> {
    let profile = tempfile::tempdir_in(file.parent().context("the page lies in a directory")?)?;
    let mut chromium = Command::new("chromium");
    // Tests run as root, where its sandbox does not.
    chromium.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]);
    chromium.arg(format!("--user-data-dir={}", profile.path().display()));
    // No name resolves: whatever a page asks a network for fails.
    chromium.arg("--host-resolver-rules=MAP * ~NOTFOUND");
    Ok((chromium, profile))
}

fn url(file: &Path) -> Result<String> {
    Ok(format!("file://{}", file.canonicalize()?.display()))
}

/// Of a PNG with 8 bits a channel, not interlaced, as Chromium writes them.
fn distinct_colours(png: &[u8]) -> Result<usize> {
    let word = |at: usize| -> Result<usize> {
        let bytes = png.get(at..at + 4).context("a PNG that ends early")?;
        Ok(u32::from_be_bytes(bytes.try_into()?) as usize)
    };
    ensure!(png.starts_with(b"\x89PNG\r\n\x1a\n"), "no PNG");
    let (mut at, mut data) = (8, Vec::new());
    while at < png.len() {
        let (len, kind) = (word(at)?, &png[at + 4..at + 8]);
        if kind == b"IDAT" {
            data.extend_from_slice(png.get(at + 8..at + 8 + len).context("a PNG that ends early")?);
        }
        at += len + 12;
    }
    let (width, height, depth, kind) = (word(16)?, word(20)?, png[24], png[25]);
    ensure!(depth == 8 && (kind == 2 || kind == 6) && png[28] == 0, "another kind of PNG: {depth} {kind}");
    let channels = if kind == 2 { 3 } else { 4 };
    let mut raw = Vec::new();
    ZlibDecoder::new(&data[..]).read_to_end(&mut raw)?;
    let stride = width * channels;
    ensure!(raw.len() == height * (stride + 1), "a PNG of another size");
    let mut colours = BTreeSet::new();
    let mut above = vec![0u8; stride];
    for line in raw.chunks_exact(stride + 1) {
        let mut row = line[1..].to_vec();
        for n in 0..stride {
            let (left, corner) = if n < channels { (0, 0) } else { (row[n - channels], above[n - channels]) };
            let predicted = match line[0] {
                0 => 0,
                1 => left,
                2 => above[n],
                3 => u16::midpoint(left.into(), above[n].into()) as u8,
                _ => paeth(left, above[n], corner),
            };
            row[n] = row[n].wrapping_add(predicted);
        }
        colours.extend(row.chunks_exact(channels).map(|pixel| [pixel[0], pixel[1], pixel[2]]));
        above = row;
    }
    Ok(colours.len())
}

/// The neighbour that lies nearest to left + above - corner.
fn paeth(left: u8, above: u8, corner: u8) -> u8 {
    let near = |n: u8| (i16::from(left) + i16::from(above) - i16::from(corner) - i16::from(n)).abs();
    [left, above, corner].into_iter().min_by_key(|n| near(*n)).unwrap_or(left)
}
