//! Readiness events: LISTEN, exec, and the user-space probe.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_pidns_info;
use aya_ebpf::helpers::bpf_probe_read_kernel_str_bytes;
use aya_ebpf::helpers::generated::bpf_get_ns_current_pid_tgid;
use aya_ebpf::macros::uprobe;
use aya_ebpf::programs::ProbeContext;
use tdfs_common::abi::{Control, EXEC_PATH, ExecEvent, Kind, Loss};

use crate::{EVENTS, FORCE_WAKEUP, control, emit, event, lost};

/// TCP_LISTEN
pub const LISTEN: i32 = 10;

/// Whether the current process lives in the pid namespace user space watches.
#[inline(always)]
pub fn watched() -> bool {
    let (dev, ino) = (control(Control::PidnsDev), control(Control::PidnsIno));
    let mut info = bpf_pidns_info { pid: 0, tgid: 0 };
    let size = size_of::<bpf_pidns_info>() as u32;
    // SAFETY: `info` has the given size.
    ino != 0 && unsafe { bpf_get_ns_current_pid_tgid(dev, ino, &raw mut info, size) } == 0
}

#[inline(always)]
pub fn listen(ctx: &impl EbpfContext, port: u16) {
    emit(ctx, Kind::Listen, 0, u32::from(port), 0);
}

#[inline(always)]
pub fn exec(ctx: &impl EbpfContext, filename: *const u8, interp: Option<*const u8>) {
    let Some(mut entry) = EVENTS.reserve::<ExecEvent>(0) else {
        return lost(ctx, Loss::RingFull, 0);
    };
    let out = entry.as_mut_ptr();
    // SAFETY: the entry is ours until it is submitted, and as large as an ExecEvent.
    unsafe {
        (&raw mut (*out).event).write(event(ctx, Kind::Exec, 0, 0, 0));
        text(filename, &mut (*out).filename);
        (*out).interp[0] = 0;
        if let Some(interp) = interp {
            text(interp, &mut (*out).interp);
        }
    }
    entry.submit(FORCE_WAKEUP);
}

/// Copies a kernel string; an unreadable one becomes empty.
#[inline(always)]
unsafe fn text(from: *const u8, to: &mut [u8; EXEC_PATH]) {
    // SAFETY: the helper checks the address and ends the text with NUL.
    if unsafe { bpf_probe_read_kernel_str_bytes(from, to) }.is_err() {
        to[0] = 0;
    }
}

#[uprobe]
pub fn user_probe(ctx: ProbeContext) -> u32 {
    emit(&ctx, Kind::Uprobe, 0, 0, 0);
    0
}
