//! Classic tracepoints: fields are in the record, at offsets from tracefs.

use aya_ebpf::EbpfContext;
use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext as Context;
use tdfs_common::abi::{Loss, Offset};

use crate::{lost, offset, page, ready};

#[inline(always)]
fn field<T>(ctx: &Context, of: Offset) -> Result<T, i32> {
    // SAFETY: the helper checks the address; the offset is the one tracefs gives for a field of this size.
    unsafe { ctx.read_at(offset(of)) }
}

#[inline(always)]
fn report(ctx: &Context, result: Result<(), i32>) -> u32 {
    if let Err(code) = result {
        lost(ctx, Loss::ReadFailed, i64::from(code));
    }
    0
}

/// Inode, first page and order of the folio, if it is of the mount. Both tracepoints have one format.
#[inline(always)]
fn folio(ctx: &Context) -> Result<Option<(u64, u64, u32)>, i32> {
    if !page::ours(field(ctx, Offset::AddedDev)?) {
        return Ok(None);
    }
    let order = if offset(Offset::AddedOrder) == 0 { 0 } else { field::<u8>(ctx, Offset::AddedOrder)? };
    Ok(Some((field(ctx, Offset::AddedIno)?, field(ctx, Offset::AddedIndex)?, u32::from(order))))
}

#[tracepoint]
pub fn classic_page_added(ctx: Context) -> u32 {
    report(
        &ctx,
        folio(&ctx).map(|f| f.map_or((), |(ino, index, order)| page::added(&ctx, ino, index, order))),
    )
}

#[tracepoint]
pub fn classic_page_removed(ctx: Context) -> u32 {
    report(
        &ctx,
        folio(&ctx).map(|f| f.map_or((), |(ino, index, order)| page::removed(&ctx, ino, index, order))),
    )
}

#[tracepoint]
pub fn classic_page_read(ctx: Context) -> u32 {
    let read = || {
        if page::ours(field(&ctx, Offset::ReadDev)?) {
            let (index, last) = (field(&ctx, Offset::ReadIndex)?, field(&ctx, Offset::ReadLast)?);
            page::used(&ctx, field(&ctx, Offset::ReadIno)?, index, last);
        }
        Ok(())
    };
    report(&ctx, read())
}

#[tracepoint]
pub fn classic_page_fault(ctx: Context) -> u32 {
    let read = || {
        if page::ours(field(&ctx, Offset::FaultDev)?) {
            let index = field(&ctx, Offset::FaultIndex)?;
            page::used(&ctx, field(&ctx, Offset::FaultIno)?, index, index);
        }
        Ok(())
    };
    report(&ctx, read())
}

const IPPROTO_TCP: u16 = 6;

#[tracepoint]
pub fn classic_socket_state(ctx: Context) -> u32 {
    let read = || {
        let listens = field::<i32>(&ctx, Offset::StateNew)? == ready::LISTEN
            && field::<u16>(&ctx, Offset::StateProtocol)? == IPPROTO_TCP;
        if listens && ready::watched() {
            ready::listen(&ctx, field(&ctx, Offset::StatePort)?);
        }
        Ok(())
    };
    report(&ctx, read())
}

#[tracepoint]
pub fn classic_program_executed(ctx: Context) -> u32 {
    let read = || {
        if ready::watched() {
            // __data_loc: the low half is the offset of the string in the record.
            let at = field::<u32>(&ctx, Offset::ExecFilename)? & 0xffff;
            ready::exec(&ctx, ctx.as_ptr().cast::<u8>().wrapping_add(at as usize), None);
        }
        Ok(())
    };
    report(&ctx, read())
}
