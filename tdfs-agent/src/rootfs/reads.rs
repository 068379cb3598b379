//! A log of the reads that a container had to wait for, for whoever asks for one.
//!
//! Bounded: the first [`READS_KEPT`] of each kind are kept, the others only counted.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Reads of a kind that are kept.
pub const READS_KEPT: usize = 4096;

/// One read of the kernel through the cold device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// When it came.
    pub begin: Instant,
    /// How long it took.
    pub took: Duration,
    /// The file.
    pub ino: u32,
    /// First page of the file in it.
    pub page: u32,
    /// Its pages that were waited for.
    pub pages: u64,
    /// The errno that it ended with.
    pub error: Option<i32>,
}

/// Reads of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// The first ones, in the order they ended.
    pub kept: Vec<Read>,
    /// How many more there were.
    pub lost: u64,
    /// Pages of all of them.
    pub pages: u64,
    /// How long all of them took.
    pub took: Duration,
}

/// What was read through the cold device, read by read.
#[derive(Debug, Default)]
pub struct ReadLog {
    waits: Mutex<Reads>,
    cold: Mutex<Reads>,
}

impl ReadLog {
    /// Adds a wait for awaited pages.
    pub fn add_wait(&self, read: Read) {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).add(read);
    }

    /// Adds a read of cold pages.
    pub fn add_cold(&self, read: Read) {
        self.cold.lock().unwrap_or_else(PoisonError::into_inner).add(read);
    }

    /// Waits for awaited pages so far.
    pub fn waits(&self) -> Reads {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads of cold pages so far.
    pub fn cold(&self) -> Reads {
        self.cold.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Reads {
    fn add(&mut self, read: Read) {
        self.pages += read.pages;
        self.took += read.took;
        if self.kept.len() < READS_KEPT {
            self.kept.push(read);
        } else {
            self.lost += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kept_is_counted() {
        let log = ReadLog::default();
        let took = Duration::from_millis(2);
        let read = Read { begin: Instant::now(), took, ino: 1, page: 0, pages: 3, error: None };
        for _ in 0..READS_KEPT + 5 {
            log.add_cold(read);
        }
        let (reads, all) = (log.cold(), READS_KEPT as u64 + 5);
        assert_eq!((reads.kept.len(), reads.lost, reads.pages), (READS_KEPT, 5, all * 3));
        assert_eq!(reads.took, took * all as u32);
        assert_eq!(log.waits(), Reads::default());
    }
}
