//! After a crash: what a dead process left running and mounted.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use nix::mount::MntFlags;

use super::mount::TARGET;
use super::{NodeError, State};
use crate::record::sandbox;
use crate::rootfs;

/// Unmounts and removes run directories without an owner, after any runc that is still making their container, and kills
/// containers without a run directory. Everything that lives stays untouched.
pub async fn recover(state: &State) -> Result<(), NodeError> {
    let at = |source| NodeError::State { path: state.runs(), source };
    for target in dead_targets(&state.runs()).map_err(at)? {
        // Gone already is fine; anything else shows when the run directory is removed.
        let _ = nix::mount::umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        tracing::info!(target = %target.display(), "removed the mount of a dead process");
    }
    for dir in rootfs::recover(&state.runs(), sandbox::end_orphans).map_err(at)? {
        tracing::info!(dir = %dir.display(), "removed what a dead process left");
    }
    let containers = match fs::read_dir(state.runc()) {
        Ok(entries) => entries.flatten().map(|e| e.file_name()).collect(),
        Err(_) => Vec::new(),
    };
    for container in containers.iter().filter_map(|c| c.to_str()) {
        if !state.runs().join(container).exists() {
            sandbox::remove_leftover(&state.runc(), container).await?;
        }
    }
    Ok(())
}

/// Mount points outside of run directories whose owners are dead.
fn dead_targets(runs: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut targets = Vec::new();
    for entry in fs::read_dir(runs)?.flatten() {
        let Ok(target) = fs::read(entry.path().join(TARGET)) else { continue };
        let Ok(owner) = File::open(entry.path().join("owner")) else { continue };
        match owner.try_lock() {
            Ok(()) => targets.push(PathBuf::from(String::from_utf8_lossy(&target).into_owned())),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(e)) => return Err(e),
        }
    }
    Ok(targets)
}
