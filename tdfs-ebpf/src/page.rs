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

/// A folio of `1 << order` pages leaves the page cache: should it come back, it is reported again.
#[inline(always)]
pub fn removed(ctx: &impl EbpfContext, ino: u64, index: u64, order: u32) {
    let count = 1u64 << (order & 31);
    if count <= WORD {
        let Some(seen) = PAGES.get_ptr_mut(Key { ino, chunk: index / CHUNK_PAGES }) else { return };
        // SAFETY: the entry lives in a map that never removes one; `word` is below WORDS.
        unsafe {
            fetch_and(
                (&raw mut (*seen).added).cast::<u64>().add(word(index)),
                !mask(index, index + count - 1),
            )
        };
    }
    emit(ctx, Kind::Removed, ino, index as u32, count as u32);
}

/// The word of a chunk's bitmap that holds page `index`.
#[inline(always)]
fn word(index: u64) -> usize {
    (index / WORD) as usize & (WORDS - 1)
}

/// Bits of pages `index..=last`, which share a word.
#[inline(always)]
fn mask(index: u64, last: u64) -> u64 {
    let bits = (last - index) as u32 & 63;
    (u64::MAX >> (63 - bits)) << (index & 63)
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
    let mask = mask(index, last);
    // SAFETY: the entry lives in a map that never removes one; `word` is below WORDS.
    let old = unsafe {
        let words = if matches!(kind, Kind::Added) { &raw mut (*seen).added } else { &raw mut (*seen).used };
        fetch_or(words.cast::<u64>().add(word(index)), mask)
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

/// `*at &= bits`, atomically.
///
/// # Safety
/// As for [`fetch_or`].
#[inline(always)]
unsafe fn fetch_and(at: *mut u64, bits: u64) {
    // SAFETY: the caller's; the instruction touches nothing else (BPF_ATOMIC | BPF_AND | BPF_FETCH, Linux 5.12).
    unsafe {
        asm!("{value} = atomic_fetch_and((u64 *)({at} + 0), {value})", at = in(reg) at, value = inout(reg) bits => _);
    }
}
