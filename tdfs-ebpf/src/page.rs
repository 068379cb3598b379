//! Pages of the mount: deduplication and reports.

use core::arch::asm;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use tdfs_common::abi::{CHUNK_PAGES, Kind, Loss};

use crate::{DEVICE, constant, emit, lost};

const WORD: u64 = 64;
const WORDS: usize = (CHUNK_PAGES / WORD) as usize;

#[repr(C)]
#[derive(Clone, Copy)]
struct Key {
    ino: u64,
    chunk: u64,
}

/// What was reported of one chunk, a bit per page.
#[repr(C)]
#[derive(Clone, Copy)]
struct Seen {
    added: [u64; WORDS],
    used: [u64; WORDS],
}

/// User space sets the size.
#[map]
static PAGES: HashMap<Key, Seen> = HashMap::with_max_entries(1024, 0);

/// Whether an inode of `device` is one of the mount.
#[inline(always)]
pub fn ours(device: u32) -> bool {
    device == constant(&DEVICE)
}

/// A folio of `1 << order` pages entered the page cache.
#[inline(always)]
pub fn added(ctx: &impl EbpfContext, ino: u64, index: u64, order: u32) {
    let count = 1u64 << (order & 31);
    // A folio lies at a multiple of its size, so up to 64 pages share a word. Larger ones are rare: report them always.
    if count > WORD || first(ctx, ino, index, index + count - 1, Kind::Added) {
        emit(ctx, Kind::Added, ino, index as u32, count as u32);
    }
}

/// Pages `index..=last` are used, as far as one word of the bitmap holds them; the rest comes with the next event.
#[inline(always)]
pub fn used(ctx: &impl EbpfContext, ino: u64, index: u64, last: u64) {
    let end = index | (WORD - 1);
    let last = if last < end { last } else { end };
    if last >= index && first(ctx, ino, index, last, Kind::Used) {
        emit(ctx, Kind::Used, ino, index as u32, (last - index + 1) as u32);
    }
}

/// Marks pages `index..=last` of one word; whether any was not marked before.
#[inline(always)]
fn first(ctx: &impl EbpfContext, ino: u64, index: u64, last: u64, kind: Kind) -> bool {
    let key = Key { ino, chunk: index / CHUNK_PAGES };
    let mut seen = PAGES.get_ptr_mut(key);
    if seen.is_none() {
        let empty = Seen { added: [0; WORDS], used: [0; WORDS] };
        // Another CPU may be faster: then its entry is found below.
        let result = PAGES.insert(key, empty, u64::from(BPF_NOEXIST));
        seen = PAGES.get_ptr_mut(key);
        if seen.is_none() {
            lost(ctx, Loss::MapFull, i64::from(result.err().unwrap_or(0)));
            return false;
        }
    }
    let Some(seen) = seen else { return false };
    let bits = (last - index) as u32 & 63;
    let mask = (u64::MAX >> (63 - bits)) << (index & 63);
    let word = (index as usize / 64) & (WORDS - 1);
    // SAFETY: the entry lives in a map that never removes one; `word` is below WORDS.
    let old = unsafe {
        let words = if matches!(kind, Kind::Added) { &raw mut (*seen).added } else { &raw mut (*seen).used };
        fetch_or(words.cast::<u64>().add(word), mask)
    };
    mask & !old != 0
}

/// `*at |= bits`, atomically; the value before. `core` has no atomic read-modify-write for BPF.
///
/// # Safety
/// `at` is valid for reads and writes and aligned.
#[inline(always)]
unsafe fn fetch_or(at: *mut u64, bits: u64) -> u64 {
    let mut value = bits;
    // SAFETY: the caller's; the instruction touches nothing else (BPF_ATOMIC | BPF_OR | BPF_FETCH, Linux 5.12).
    unsafe {
        asm!("{value} = atomic_fetch_or((u64 *)({at} + 0), {value})", at = in(reg) at, value = inout(reg) value);
    }
    value
}
