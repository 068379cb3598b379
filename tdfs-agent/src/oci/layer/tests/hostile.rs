//! Damaged and malicious layers: one error, no panic, no unbounded memory.

use proptest::prelude::*;

use super::*;

/// A small archive with one of everything that has a size.
fn small_tar() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, "d", tar::EntryType::Directory, b"");
    append(&mut tar, "d/f", tar::EntryType::Regular, &content(1, 1000));
    append(&mut tar, &"long/".repeat(40), tar::EntryType::Directory, b"");
    tar.append_pax_extensions([("mtime", &b"1.5"[..]), ("SCHILY.xattr.user.a", b"1")]).unwrap();
    append(&mut tar, "g", tar::EntryType::Regular, &content(2, 100));
    tar.into_inner().unwrap()
}

#[test]
fn every_truncation_is_an_error_or_a_shorter_archive() {
    let tar = small_tar();
    let whole = index(&tar, Compression::None).layer.entries;
    for len in 0..tar.len() {
        match try_index(&tar[..len], Compression::None) {
            // A cut between two entries: only the diff id can tell.
            Ok(short) => {
                assert_eq!(len % 512, 0, "cut at {len}");
                assert!(whole.starts_with(&short.layer.entries));
                assert!(len >= tar.len() - 1024 || short.layer.entries.len() < whole.len());
            }
            Err(e) => assert!(matches!(e, LayerError::Truncated { .. }), "cut at {len}: {e}"),
        }
    }
}

#[test]
fn every_truncation_of_a_compressed_layer_is_an_error() {
    let tar = small_tar();
    let zstd = ::zstd::bulk::compress(&tar, 1).unwrap();
    for (blob, compression) in [(gzip(&tar, 6), Compression::Gzip), (zstd, Compression::Zstd)] {
        index(&blob, compression);
        for len in 0..blob.len() {
            let error = try_index(&blob[..len], compression).err().expect("an error");
            assert!(matches!(error, LayerError::Compressed { .. }), "cut at {len}: {error}");
        }
    }
}

#[test]
fn a_damaged_gzip_member_is_an_error() {
    let tar = small_tar();
    let blob = gzip(&tar, 6);
    // Bit flips in the time, system and extra-flag fields change nothing that is decompressed.
    for at in (0..blob.len()).filter(|at| !(4..10).contains(at)) {
        let mut bad = blob.clone();
        bad[at] ^= 0x10;
        match try_index(&bad, Compression::Gzip) {
            // The text flag, and the unused bits after the last block.
            Ok(same) => assert!(same.tar == tar, "flip at {at}"),
            Err(e) => assert!(matches!(e, LayerError::Compressed { .. }), "flip at {at}: {e}"),
        }
    }
}

#[test]
fn a_layer_over_the_limit_is_refused() {
    let blob = gzip(&vec![0; 3 << 20], 9);
    let limit = 1 << 20;
    let scan = scan::scan(&blob[..], Compression::Gzip, limit, io::sink(), &mut io::sink(), |_| Ok(()));
    assert!(matches!(scan, Err(LayerError::TooLarge { limit: l, .. }) if l == limit));
}

#[test]
fn errors_of_the_blob_and_of_the_sink_come_back() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(libc::ECONNRESET))
        }
    }
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let blob = gzip(&tar_of(9 << 20), 1);
    let error = index_layer(blob.chain(Broken), Compression::Gzip, io::sink(), &mut io::sink()).unwrap_err();
    assert_eq!(error.errno(), libc::ECONNRESET);
    let error = index_layer(&blob[..], Compression::Gzip, Full, &mut io::sink()).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC);
    let error = index_layer(&blob[..], Compression::Gzip, io::sink(), &mut Full).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC);
}

#[test]
fn a_wrong_blob_window_or_offset_never_passes_for_the_span() {
    let indexed = index(&gzip(&tar_of(9 << 20), 6), Compression::Gzip);
    let layer = &indexed.layer.layer;
    let n = layer.spans.iter().position(|s| s.window.is_some()).unwrap();
    let range = layer.span_in(n);
    let good = &indexed.blob[range.start as usize..range.end as usize];
    let w = layer.spans[n].window.unwrap();
    let window = &indexed.windows[w.offset as usize..][..w.len as usize];
    read_span(layer, n, good, Some(window)).unwrap();

    for at in [0, 1, 2, 100, good.len() / 2] {
        let mut bad = good.to_vec();
        bad[at] ^= 0x80;
        assert!(read_span(layer, n, &bad, Some(window)).is_err(), "flip at {at}");
    }
    for at in (0..window.len()).step_by(997) {
        let mut bad = window.to_vec();
        bad[at] ^= 1;
        // A flip in what the span never refers to is harmless: the content is still right.
        if let Ok(bytes) = read_span(layer, n, good, Some(&bad)) {
            let out = layer.span_out(n);
            assert!(bytes == indexed.tar[out.start as usize..out.end as usize]);
        }
    }
    assert!(read_span(layer, n, good, None).is_err());
    assert!(read_span(layer, n, &good[1..], Some(window)).is_err());
    assert!(read_span(layer, 99, good, Some(window)).is_err());
    assert!(read_span(layer, 0, good, Some(window)).is_err());
    let bomb = ::zstd::bulk::compress(&vec![0; 1 << 30], 1).unwrap();
    assert!(read_span(layer, n, good, Some(&bomb)).is_err());
    for bits in (0..8).filter(|b| *b != layer.spans[n].bits) {
        let mut layer = layer.clone();
        layer.spans[n].bits = bits;
        let start = layer.span_in(n).start as usize;
        let blob = &indexed.blob[start..range.end as usize];
        assert!(read_span(&layer, n, blob, Some(window)).is_err(), "bits {bits}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bits_of_a_tar_never_panic(flips in proptest::collection::vec((0usize..6000, 0u8..8), 1..4)) {
        let mut tar = small_tar();
        for (at, bit) in flips {
            let at = at % tar.len();
            tar[at] ^= 1 << bit;
        }
        if let Ok(indexed) = try_index(&tar, Compression::None) {
            // Whatever was accepted merges or is refused, and a merged tree is valid.
            if let Ok(tree) = merge(&[indexed.layer]) {
                prop_assert!(tree.validate().is_ok());
            }
        }
    }

    #[test]
    fn input_in_pieces_of_any_size_is_the_same(
        len in 0usize..100_000,
        level in 0u32..10,
        pieces in proptest::collection::vec(1usize..2000, 1..50),
    ) {
        struct Pieces<'a>(&'a [u8], std::iter::Cycle<std::slice::Iter<'a, usize>>);
        impl Read for Pieces<'_> {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                let n = self.1.next().map_or(1, |n| *n).min(self.0.len()).min(buf.len());
                let (now, later) = self.0.split_at(n);
                buf[..n].copy_from_slice(now);
                self.0 = later;
                Ok(n)
            }
        }
        let tar = tar_of(len);
        let blob = gzip(&tar, level);
        let mut out = Vec::new();
        let whole = index(&blob, Compression::Gzip).layer;
        let pieces = Pieces(&blob, pieces.iter().cycle());
        let pieced = index_layer(pieces, Compression::Gzip, &mut out, &mut io::sink()).unwrap();
        prop_assert_eq!(pieced, whole);
        prop_assert!(out == tar);
    }
}
