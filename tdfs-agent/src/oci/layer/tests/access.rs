//! Random access equals straight decompression.

use super::*;

#[test]
fn plain_layers_have_spans_of_four_mebibytes() {
    let tar = tar_of(9 << 20);
    let indexed = index(&tar, Compression::None);
    assert_eq!(indexed.tar, tar);
    assert_eq!(indexed.layer.layer.spans.len(), 3);
    indexed.check_spans();
}

#[test]
fn gzip_of_every_level_is_accessible_at_random() {
    let tar = tar_of(13 << 20);
    for level in [0, 1, 6, 9] {
        let indexed = index(&gzip(&tar, level), Compression::Gzip);
        assert!(indexed.tar == tar);
        let layer = &indexed.layer.layer;
        assert!(layer.spans.len() >= 3, "level {level}: {} spans", layer.spans.len());
        assert!((0..layer.spans.len()).all(|n| {
            let out = layer.span_out(n);
            out.end - out.start < 2 * SPAN_TARGET
        }));
        assert!(layer.spans[1..].iter().all(|s| s.window.is_some()));
        indexed.check_spans();
    }
}

#[test]
fn gzip_members_join_into_spans_that_need_no_window() {
    let tar = tar_of(10 << 20);
    let blob: Vec<u8> = tar.chunks(300_000).flat_map(|member| gzip(member, 1)).collect();
    let indexed = index(&blob, Compression::Gzip);
    assert!(indexed.tar == tar);
    assert_eq!(indexed.layer.layer.spans.len(), 3);
    assert!(indexed.layer.layer.spans.iter().all(|s| s.window.is_none()));
    indexed.check_spans();
}

#[test]
fn gzip_header_fields_and_what_follows_the_last_member_are_skipped() {
    let tar = tar_of(5 << 20);
    let member = |data: &[u8]| {
        let mut encoder = flate2::GzBuilder::new()
            .extra(vec![7; 300])
            .filename("name")
            .comment("comment")
            .mtime(5)
            .write(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    };
    for garbage in [&b""[..], &[0; 700], b"\x1f", b"garbage"] {
        let mut blob: Vec<u8> = tar.chunks(1 << 20).flat_map(member).collect();
        blob.extend_from_slice(garbage);
        let indexed = index(&blob, Compression::Gzip);
        assert!(indexed.tar == tar);
        indexed.check_spans();
    }
}

#[test]
fn a_gzip_header_checksum_is_checked() {
    let plain = gzip(&tar_of(100), 6);
    let mut blob = plain[..10].to_vec();
    blob[3] |= 1 << 1;
    let mut crc = flate2::Crc::new();
    crc.update(&blob);
    blob.extend_from_slice(&(crc.sum() as u16).to_le_bytes());
    blob.extend_from_slice(&plain[10..]);
    index(&blob, Compression::Gzip);
    blob[10] ^= 1;
    let error = try_index(&blob, Compression::Gzip).err().unwrap();
    assert!(error.to_string().contains("header checksum"), "{error}");
}

#[test]
fn one_long_zstd_frame_is_one_span_or_none() {
    let tar = tar_of(9 << 20);
    let indexed = index(&::zstd::bulk::compress(&tar, 1).unwrap(), Compression::Zstd);
    assert_eq!(indexed.layer.layer.spans.len(), 1);
    indexed.check_spans();

    let tar = tar_of(SPAN_MAX as usize + 1);
    let indexed = index(&::zstd::bulk::compress(&tar, 1).unwrap(), Compression::Zstd);
    assert!(indexed.tar == tar);
    assert_eq!(indexed.layer.layer.spans, []);
}

#[test]
fn zstd_frames_join_into_spans_past_skippable_ones() {
    let tar = tar_of(10 << 20);
    let skippable = [&0x184d_2a53u32.to_le_bytes()[..], &5u32.to_le_bytes(), b"table"].concat();
    let mut blob = skippable.clone();
    for frame in tar.chunks(100_000) {
        blob.extend(::zstd::bulk::compress(frame, 1).unwrap());
        blob.extend_from_slice(&skippable);
    }
    let indexed = index(&blob, Compression::Zstd);
    assert!(indexed.tar == tar);
    assert_eq!(indexed.layer.layer.spans.len(), 3);
    indexed.check_spans();
}

#[test]
fn a_deflate_block_that_expands_past_the_limit_means_no_random_access() {
    // Zeros take so few symbols that one block covers more than a span may.
    let zeros = vec![0u8; SPAN_MAX as usize + (8 << 20)];
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, "zeros", tar::EntryType::Regular, &zeros);
    let tar = tar.into_inner().unwrap();
    for level in [1, 9] {
        let indexed = index(&gzip(&tar, level), Compression::Gzip);
        assert!(indexed.tar == tar);
        // Whichever way the compressor cut its blocks.
        indexed.check_spans();
    }
}

#[test]
fn an_empty_layer_has_no_spans() {
    for (blob, compression) in [
        (Vec::new(), Compression::None),
        (gzip(b"", 6), Compression::Gzip),
        (::zstd::bulk::compress(b"", 1).unwrap(), Compression::Zstd),
    ] {
        let indexed = index(&blob, compression);
        assert_eq!((indexed.layer.layer.size, indexed.layer.layer.spans.len()), (0, 0));
        assert_eq!(indexed.layer.entries, []);
    }
}

#[test]
fn windows_move_with_their_blob() {
    let mut indexed = index(&gzip(&tar_of(12 << 20), 6), Compression::Gzip);
    rebase_windows(&mut indexed.layer.layer, 1000);
    indexed.windows.splice(0..0, vec![0xff; 1000]);
    indexed.check_spans();
}

#[test]
fn an_indexed_layer_round_trips() {
    let indexed = index(&gzip(&tar_of(9 << 20), 6), Compression::Gzip);
    assert_eq!(decode::<IndexedLayer>(&encode(&indexed.layer).unwrap()).unwrap(), indexed.layer);
}

#[test]
fn uncompress_agrees_with_index() {
    let blob = gzip(&tar_of(9 << 20), 6);
    let mut tar = Vec::new();
    let layer = uncompress(&blob[..], Compression::Gzip, &mut tar).unwrap();
    let indexed = index(&blob, Compression::Gzip);
    assert_eq!(layer, indexed.layer.layer);
    assert!(tar == indexed.tar);
}
