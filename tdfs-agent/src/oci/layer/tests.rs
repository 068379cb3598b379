//! Layers packed by other code, read back by ours.

use std::io::Write;

use tdfs_common::digest::{ContentHash, Digest};
use tdfs_common::envelope::{Format, decode, encode};
use tdfs_common::layer_index::{Compression, SPAN_MAX, SPAN_TARGET};
use tdfs_common::tree::{Body, Extent, Tree, Xattr};

use super::*;

mod access;
mod hostile;
mod overlay;
mod walking;

/// A layer and everything that comes out of indexing it.
struct Indexed {
    blob: Vec<u8>,
    layer: IndexedLayer,
    tar: Vec<u8>,
    windows: Vec<u8>,
}

fn try_index(blob: &[u8], compression: Compression) -> Result<Indexed, LayerError> {
    let (mut tar, mut windows) = (Vec::new(), Vec::new());
    let layer = index_layer(blob, compression, &mut tar, &mut windows)?;
    Ok(Indexed { blob: blob.to_vec(), layer, tar, windows })
}

fn index(blob: &[u8], compression: Compression) -> Indexed {
    let indexed = try_index(blob, compression).unwrap();
    let layer = &indexed.layer.layer;
    assert_eq!(layer.blob, Digest::of(blob));
    assert_eq!(layer.blob_size, blob.len() as u64);
    assert_eq!(layer.diff_id, Digest::of(&indexed.tar));
    assert_eq!(layer.size, indexed.tar.len() as u64);
    indexed.layer.validate().unwrap();
    indexed
}

impl Indexed {
    fn read(&self, n: usize) -> Result<Vec<u8>, LayerError> {
        let layer = &self.layer.layer;
        let range = layer.span_in(n);
        let window = layer.spans[n].window;
        let window = window.map(|w| &self.windows[w.offset as usize..][..w.len as usize]);
        read_span(layer, n, &self.blob[range.start as usize..range.end as usize], window)
    }

    /// Reads every span alone and compares it with the straight decompression.
    fn check_spans(&self) {
        let layer = &self.layer.layer;
        for n in (0..layer.spans.len()).rev() {
            let out = layer.span_out(n);
            assert!(self.read(n).unwrap() == self.tar[out.start as usize..out.end as usize], "span {n}");
        }
    }
}

/// Bytes of some entropy: words, runs and noise, different for every seed.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut out = Vec::with_capacity(len + 64);
    while out.len() < len {
        match next() % 4 {
            0 => out.extend_from_slice(&next().to_le_bytes()),
            1 => out.extend(std::iter::repeat_n(next() as u8, (next() % 60) as usize)),
            _ => out.extend_from_slice(format!("word{} ", next() % 5000).as_bytes()),
        }
    }
    out.truncate(len);
    out
}

/// A tar with one file of `len` bytes.
fn tar_of(len: usize) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, "file", tar::EntryType::Regular, &content(len as u64, len));
    tar.into_inner().unwrap()
}

fn append<W: Write>(tar: &mut tar::Builder<W>, path: &str, kind: tar::EntryType, data: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(7);
    tar.append_data(&mut header, path, data).unwrap();
}

fn gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}
