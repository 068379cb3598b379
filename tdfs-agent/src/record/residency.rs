//! Which pages of a file the kernel's page cache holds: the check on the probe, and its replacement where there is no
//! BPF.
//!
//! mincore(2) says which pages of a file can be used; cachestat(2) (Linux 6.5) says how many are there or being read, so
//! that files without any cost one call. Neither reads a page. Opening and mapping a file does not either.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use memmap2::MmapOptions;
use tdfs_common::bitmap::PageBitmap;
use tdfs_common::page::{self, PAGE_SIZE};

/// How often, and how long after each other, pages are looked for while some are on their way.
const ATTEMPTS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(2);

/// The resident pages of `file`, up to its size. Where the kernel tells of pages that are being read, waits for them for
/// up to a tenth of a second.
pub fn resident(file: &File) -> io::Result<PageBitmap> {
    let pages = page::count(file.metadata()?.len());
    if pages == 0 {
        return Ok(PageBitmap::new(0));
    }
    for _ in 1..ATTEMPTS {
        let cached = cached(file, pages)?;
        if cached == Some(0) {
            return Ok(PageBitmap::new(pages));
        }
        let found = valid(file, pages)?;
        if cached.is_none_or(|cached| cached <= found.count()) {
            return Ok(found);
        }
        std::thread::sleep(PAUSE);
    }
    valid(file, pages)
}

/// Those of the first `pages` pages of `file`, at least one, that can be used without a read.
fn valid(file: &File, pages: u64) -> io::Result<PageBitmap> {
    let mut found = PageBitmap::new(pages);
    // SAFETY: the mapping is never dereferenced, so it does not matter who changes the file.
    let map = unsafe { MmapOptions::new().len(pages as usize * PAGE_SIZE).map(file)? };
    let mut residency = vec![0u8; pages as usize];
    // SAFETY: the range is mapped; the vector has a byte for each of its pages.
    let done = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), residency.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    for (n, state) in residency.iter().enumerate() {
        if state & 1 != 0 {
            found.insert(n as u64);
        }
    }
    Ok(found)
}

/// cachestat(2), the same number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// How many of the first `pages` pages of `file`, at least one, are in the page cache, or on their way there; `None` where the kernel has
/// no cachestat(2).
fn cached(file: &File, pages: u64) -> io::Result<Option<u64>> {
    // struct cachestat_range { off, len }: length 0 would be up to the end. struct cachestat: five counters, nr_cache first.
    let range = [0, pages * PAGE_SIZE as u64];
    let mut counters = [0u64; 5];
    // SAFETY: both structures have the size the call expects.
    let done =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), counters.as_mut_ptr(), 0) };
    if done == 0 {
        return Ok(Some(counters[0]));
    }
    match io::Error::last_os_error() {
        // EPERM: seccomp filters of container engines refuse calls they do not know.
        e if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP)) => Ok(None),
        e => Err(e),
    }
}

/// Drops the clean, unmapped pages of `file` from the page cache.
pub fn forget(file: &File) -> io::Result<()> {
    nix::fcntl::posix_fadvise(file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn written_pages_are_resident() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 5 * PAGE_SIZE - 7]).unwrap();
        assert_eq!(resident(&file).unwrap().iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        file.set_len(2 * PAGE_SIZE as u64).unwrap();
        assert_eq!(resident(&file).unwrap().count(), 2);
        file.set_len(0).unwrap();
        assert_eq!(resident(&file).unwrap().count(), 0);
    }
}
