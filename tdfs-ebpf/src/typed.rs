//! BTF-typed tracepoints: arguments are kernel pointers, read at offsets from the kernel's BTF.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext as Context;
use tdfs_common::abi::{Loss, Offset};

use crate::{lost, offset, page, ready};

/// A structure in the kernel.
#[derive(Clone, Copy)]
pub struct Object(*const u8);

impl Object {
    #[inline(always)]
    pub fn arg(ctx: &Context, n: usize) -> Self {
        Self(ctx.arg::<*const c_void>(n).cast())
    }

    #[inline(always)]
    pub fn get<T>(self, field: Offset) -> Result<T, i32> {
        // SAFETY: the helper checks the address.
        unsafe { bpf_probe_read_kernel(self.0.wrapping_add(offset(field)).cast()) }
    }

    #[inline(always)]
    pub fn follow(self, field: Offset) -> Result<Self, i32> {
        self.get::<*const u8>(field).map(Self)
    }

    pub fn as_ptr(self) -> *const u8 {
        self.0
    }
}

/// The inode number behind an address space, if it is one of the mount.
#[inline(always)]
fn inode(mapping: Object) -> Result<Option<u64>, i32> {
    let host = mapping.follow(Offset::MappingHost)?;
    let device = host.follow(Offset::InodeSb)?.get::<u32>(Offset::SbDev)?;
    if page::ours(device) { host.get::<u64>(Offset::InodeIno).map(Some) } else { Ok(None) }
}

#[inline(always)]
fn report(ctx: &Context, result: Result<(), i32>) -> i32 {
    if let Err(code) = result {
        lost(ctx, Loss::ReadFailed, i64::from(code));
    }
    0
}

/// Inode, first page and order of the folio that is the first argument, if it is of the mount.
#[inline(always)]
fn folio(ctx: &Context) -> Result<Option<(u64, u64, u32)>, i32> {
    let folio = Object::arg(ctx, 0);
    let Some(ino) = inode(folio.follow(Offset::FolioMapping)?)? else { return Ok(None) };
    let large = folio.get::<u64>(Offset::FolioFlags)? >> (offset(Offset::PgHead) & 63) & 1 != 0;
    let order = if large { folio.get::<u8>(Offset::FolioOrder)? } else { 0 };
    Ok(Some((ino, folio.get(Offset::FolioIndex)?, u32::from(order))))
}

/// `(folio)`
#[btf_tracepoint(function = "mm_filemap_add_to_page_cache")]
pub fn page_added(ctx: Context) -> i32 {
    report(
        &ctx,
        folio(&ctx).map(|f| f.map_or((), |(ino, index, order)| page::added(&ctx, ino, index, order))),
    )
}

/// `(folio)`
#[btf_tracepoint(function = "mm_filemap_delete_from_page_cache")]
pub fn page_removed(ctx: Context) -> i32 {
    report(
        &ctx,
        folio(&ctx).map(|f| f.map_or((), |(ino, index, order)| page::removed(&ctx, ino, index, order))),
    )
}

/// `(mapping, index, last_index)`
#[btf_tracepoint(function = "mm_filemap_get_pages")]
pub fn page_read(ctx: Context) -> i32 {
    used(&ctx, ctx.arg(1), ctx.arg(2))
}

/// `(mapping, index)`
#[btf_tracepoint(function = "mm_filemap_fault")]
pub fn page_fault(ctx: Context) -> i32 {
    used(&ctx, ctx.arg(1), ctx.arg(1))
}

#[inline(always)]
fn used(ctx: &Context, index: u64, last: u64) -> i32 {
    let read = || {
        if let Some(ino) = inode(Object::arg(ctx, 0))? {
            page::used(ctx, ino, index, last);
        }
        Ok(())
    };
    report(ctx, read())
}

/// `(sk, oldstate, newstate)`
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn socket_state(ctx: Context) -> i32 {
    let read = || {
        if ctx.arg::<i32>(2) == ready::LISTEN && ready::watched() {
            ready::listen(&ctx, Object::arg(&ctx, 0).get(Offset::SockNum)?);
        }
        Ok(())
    };
    report(&ctx, read())
}

/// `(task, old_pid, bprm)`
#[btf_tracepoint(function = "sched_process_exec")]
pub fn program_executed(ctx: Context) -> i32 {
    let read = || {
        if ready::watched() {
            let bprm = Object::arg(&ctx, 2);
            let (filename, interp) = (bprm.follow(Offset::BprmFilename)?, bprm.follow(Offset::BprmInterp)?);
            ready::exec(&ctx, filename.as_ptr(), Some(interp.as_ptr()));
        }
        Ok(())
    };
    report(&ctx, read())
}
