//! Decoded service metadata, the most recently used within a number of bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tdfs_common::digest::Digest;
use tdfs_common::runtime_image::{Frame, Run, Service};

/// The cache. Nothing waits while it is locked.
pub struct Services {
    limit: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    by_blob: HashMap<Digest, Entry>,
    bytes: usize,
    clock: u64,
}

struct Entry {
    service: Arc<Service>,
    bytes: usize,
    used: u64,
}

impl Services {
    /// An empty cache for `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, inner: Mutex::default() }
    }

    /// What the blob decodes to, if it is known.
    pub fn get(&self, blob: &Digest) -> Option<Arc<Service>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.clock += 1;
        let now = inner.clock;
        let entry = inner.by_blob.get_mut(blob)?;
        entry.used = now;
        Some(entry.service.clone())
    }

    /// Remembers what the blob decodes to; one that is larger than the whole cache is not kept.
    pub fn insert(&self, blob: Digest, service: &Arc<Service>) {
        let bytes = size(service);
        if bytes > self.limit {
            return;
        }
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.clock += 1;
        let entry = Entry { service: service.clone(), bytes, used: inner.clock };
        inner.bytes += bytes;
        if let Some(old) = inner.by_blob.insert(blob, entry) {
            inner.bytes -= old.bytes;
        }
        while inner.bytes > self.limit {
            let oldest = inner.by_blob.iter().min_by_key(|(_, e)| e.used).map(|(blob, _)| *blob);
            let Some(removed) = oldest.and_then(|blob| inner.by_blob.remove(&blob)) else { break };
            inner.bytes -= removed.bytes;
        }
    }
}

/// Bytes in memory, about.
fn size(service: &Service) -> usize {
    let frames: usize = service.segments.iter().map(|s| 64 + s.frames.len() * size_of::<Frame>()).sum();
    let args: usize = service.args.iter().flatten().map(|a| 24 + a.len()).sum();
    size_of::<Service>() + frames + args + service.runs.len() * size_of::<Run>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(runs: usize) -> Arc<Service> {
        let run = Run { ino: 0, file_page: 0, zone_page: 0, count: 1 };
        Arc::new(Service {
            group: String::new(),
            service: String::new(),
            image: Digest::of(b""),
            args: None,
            ready: String::new(),
            segments: Vec::new(),
            runs: vec![run; runs],
        })
    }

    #[test]
    fn the_least_recently_used_leave_first_and_giants_never_enter() {
        let one = size(&service(1000));
        let cache = Services::new(3 * one);
        let names: Vec<Digest> = (0..5u8).map(|n| Digest::of(&[n])).collect();
        for name in &names[..3] {
            cache.insert(*name, &service(1000));
        }
        cache.insert(names[2], &service(1000));
        assert!(cache.get(&names[0]).is_some());
        cache.insert(names[3], &service(1000));
        let known: Vec<bool> = names.iter().map(|n| cache.get(n).is_some()).collect();
        assert_eq!(known, [true, false, true, true, false]);
        cache.insert(names[4], &service(4000));
        assert!(cache.get(&names[4]).is_none() && cache.get(&names[0]).is_some());
    }
}
