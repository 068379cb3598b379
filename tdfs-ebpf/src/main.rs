//! The probe: which file pages of one mount enter the page cache, in which order they are used, and readiness events.
//!
//! In come kernel tracepoints, out go ring buffer events (`tdfs_common::abi`). A page is reported once: bitmaps per
//! inode and chunk of 512 pages remember what was. Nothing here blocks; what cannot be reported is counted, never
//! dropped silently. Every tracepoint has a BTF-typed and a classic program; user space attaches one set of them.
//!
//! No kernel structure is compiled in: offsets come as constants at load time, so the object fits any kernel.
//! Minimum kernels: ring buffer 5.8, atomic fetch-or 5.12, `mm_filemap_get_pages`/`mm_filemap_fault` 6.12 (optional).
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod classic;
mod page;
mod ready;
mod typed;

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray, RingBuf};
use aya_log_ebpf::warn;
use tdfs_common::abi::{Control, Event, Kind, Loss, Offset};

/// User space sets the size.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 16, 0);
#[map]
static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(Loss::COUNT, 0);
#[map]
static CONTROL: Array<u64> = Array::with_max_entries(Control::COUNT, 0);

/// The device of the mount, in the kernel's encoding (major << 20 | minor).
#[unsafe(no_mangle)]
static DEVICE: u32 = 0;
/// Unread bytes in the ring buffer above which user space is woken for page events.
#[unsafe(no_mangle)]
static WAKE_BYTES: u64 = 0;
#[unsafe(no_mangle)]
static OFFSETS: [u32; Offset::COUNT] = [0; Offset::COUNT];

/// The constant `value` as user space set it at load time.
#[inline(always)]
fn constant<T: Copy>(value: &'static T) -> T {
    // SAFETY: a reference is valid for reads; volatile, for the compiler must not believe the initial value.
    unsafe { core::ptr::read_volatile(value) }
}

#[inline(always)]
fn offset(of: Offset) -> usize {
    constant(&OFFSETS[of as usize]) as usize
}

#[inline(always)]
fn control(slot: Control) -> u64 {
    CONTROL.get(slot as u32).copied().unwrap_or(0)
}

/// Counts a loss, and says it the first time on this CPU.
#[inline(never)]
fn lost(ctx: &impl EbpfContext, loss: Loss, code: i64) {
    let Some(counter) = LOST.get_ptr_mut(loss as u32) else { return };
    // SAFETY: the slot is this CPU's own; programs do not migrate.
    let first = unsafe {
        *counter += 1;
        *counter == 1
    };
    if first {
        match loss {
            Loss::RingFull => warn!(ctx, "ring buffer full: events are lost"),
            Loss::MapFull => warn!(ctx, "page map full ({}): events are lost", code),
            Loss::ReadFailed => warn!(ctx, "cannot read a kernel structure ({}): events are lost", code),
        }
    }
}

const NO_WAKEUP: u64 = 1;
const FORCE_WAKEUP: u64 = 2;
const AVAIL_DATA: u64 = 0;

/// Reports an event. Page events wake user space only when much is unread or somebody waits for that inode.
#[inline(always)]
fn emit(ctx: &impl EbpfContext, kind: Kind, ino: u64, index: u32, count: u32) {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        return lost(ctx, Loss::RingFull, 0);
    };
    entry.write(event(ctx, kind, ino, index, count));
    entry.submit(wakeup(kind, ino));
}

#[inline(always)]
fn event(ctx: &impl EbpfContext, kind: Kind, ino: u64, index: u32, count: u32) -> Event {
    // SAFETY: the helper has no precondition.
    let ktime = unsafe { bpf_ktime_get_ns() };
    Event { ktime, ino, index, count, kind: kind as u32, tgid: ctx.tgid() }
}

#[inline(always)]
fn wakeup(kind: Kind, ino: u64) -> u64 {
    let page = matches!(kind, Kind::Added | Kind::Used | Kind::Removed);
    if !page || ino == control(Control::WatchIno) || EVENTS.query(AVAIL_DATA) > constant(&WAKE_BYTES) {
        FORCE_WAKEUP
    } else {
        NO_WAKEUP
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Some helpers are open to GPL-compatible programs only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
