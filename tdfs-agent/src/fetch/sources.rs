//! Where pages came from, and why a source was left.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// What one kind of source did for a start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SourceUse {
    /// `local`, `mirror` (its page service), `page_service`, `ranges`, `segments` (whole ones) or `layers`.
    pub source: &'static str,
    /// Pages that it brought.
    pub pages: u64,
    /// Bytes of page data received.
    pub bytes: u64,
    /// Requests sent to it.
    pub requests: u64,
    /// By reason, how often it failed.
    pub failures: BTreeMap<&'static str, u64>,
}

/// The sources of a start in the order they were first used. Clones share one account, which grows while pages arrive.
#[derive(Clone, Debug, Default)]
pub struct Sources(Arc<Mutex<Vec<SourceUse>>>);

impl Sources {
    /// Changes the entry of a source.
    pub(super) fn count(&self, source: &'static str, change: impl FnOnce(&mut SourceUse)) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = all.iter().position(|s| s.source == source).unwrap_or_else(|| {
            all.push(SourceUse { source, ..SourceUse::default() });
            all.len() - 1
        });
        change(&mut all[at]);
    }

    /// Counts a failure.
    pub(super) fn failed(&self, source: &'static str, reason: &'static str) {
        self.count(source, |used| *used.failures.entry(reason).or_default() += 1);
    }

    /// Requests to all of them so far.
    pub(super) fn requests(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|s| s.requests).sum()
    }

    /// What each did so far.
    pub fn list(&self) -> Vec<SourceUse> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
