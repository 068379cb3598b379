//! Any bytes as a frame: refused with an error, or exactly the pages of the announced hash.
//!
//! The first bytes choose the announced number of pages and whether the announced length and hash are right. The
//! rest, as a zstd frame and as pages, is decoded, and encoded and decoded again.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use tdfs_agent::fetch::frame::{Decoder, encode};
use tdfs_common::digest::ContentHash;
use tdfs_common::page::PAGE_SIZE;
use tdfs_common::runtime_image::{FRAME_PAGES, Frame};

thread_local! {
    static DECODER: RefCell<Decoder> = RefCell::new(Decoder::new().expect("memory"));
}

fuzz_target!(|data: &[u8]| {
    let Some((&[pages, lie], bytes)) = data.split_first_chunk() else { return };
    if bytes.is_empty() {
        return;
    }
    let pages = u32::from(pages) % FRAME_PAGES + 1;
    let raw = pages as usize * PAGE_SIZE;
    let plain = zstd::bulk::decompress(bytes, raw).unwrap_or_default();
    let len = bytes.len() as u32 + u32::from(lie & 1);
    let hash = ContentHash::of(if lie & 2 == 0 { &plain } else { bytes });
    let frame = Frame { len, pages, hash };
    DECODER.with_borrow_mut(|decoder| {
        if let Ok(out) = decoder.decode(&frame, bytes) {
            assert_eq!((out.len(), ContentHash::of(out)), (raw, hash));
        }
        let mut whole = bytes[..bytes.len().min(raw)].to_vec();
        whole.resize(raw, lie);
        let (frame, stored) = encode(&whole, 1).expect("memory");
        assert!(decoder.decode(&frame, &stored).expect("its own frame") == whole);
    });
});
