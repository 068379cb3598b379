//! Ctrl-C: the program that we wait for gets the signal too and ends; we go on, see it fail and clean up on the way out.

use anyhow::Result;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Keeps this process alive on SIGINT. A handler does that for us alone: what we start would inherit an ignored or
/// blocked signal.
pub fn survive() -> Result<()> {
    extern "C" fn interrupted(_signal: i32) {}
    let action = SigAction::new(SigHandler::Handler(interrupted), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing, which is safe at any point of the program.
    unsafe { sigaction(Signal::SIGINT, &action) }?;
    Ok(())
}
