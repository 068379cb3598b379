//! Touches exactly the pages it is told to, in the ways programs do: `toucher STEP…`, steps in order.
//!
//! ```text
//! read|pread|readv|mmap|populate|sendfile|splice|uring|willneed|huge:PATH:PAGE[,PAGE…]   pages of a file
//! exec:PATH          run a program and wait for it
//! listen:PORT        listen on a loopback port, until the end
//! answer:PORT        listen and answer one HTTP request with 503, the next with 200
//! print:TEXT         a line on stdout
//! error:TEXT         a line on stderr
//! call               call the function `readiness_point`
//! wait               until SIGTERM
//! exit:CODE          at once
//! ```

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

const PAGE: usize = 4096;

fn main() -> Result<()> {
    let mut listeners = Vec::new();
    for step in std::env::args().skip(1) {
        let (verb, rest) = step.split_once(':').unwrap_or((&step, ""));
        match verb {
            "exec" => {
                let status = Command::new(rest).status().with_context(|| step.clone())?;
                ensure!(status.success(), "{rest} failed");
            }
            "listen" => listeners.push(TcpListener::bind(("127.0.0.1", rest.parse()?))?),
            "answer" => answer(rest.parse()?)?,
            "print" => println!("{rest}"),
            "error" => eprintln!("{rest}"),
            "call" => readiness_point(),
            "wait" => wait()?,
            "exit" => std::process::exit(rest.parse()?),
            _ => {
                let (path, pages) = rest.split_once(':').with_context(|| format!("{step}: no pages"))?;
                let file = File::open(path).with_context(|| path.to_owned())?;
                for page in pages.split(',') {
                    touch(verb, &file, page.parse()?).with_context(|| step.clone())?;
                }
            }
        }
    }
    Ok(())
}

/// Where a user-space probe can be set.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn readiness_point() {
    std::hint::black_box(());
}

fn wait() -> Result<()> {
    let mut signals = nix::sys::signal::SigSet::empty();
    signals.add(nix::sys::signal::Signal::SIGTERM);
    signals.thread_block()?;
    signals.wait()?;
    Ok(())
}

fn answer(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    for status in ["503 Not Yet", "200 OK"] {
        let (mut stream, _) = listener.accept()?;
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            request.push(byte[0]);
        }
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n")?;
    }
    Ok(())
}

/// Touches one page of `file`.
fn touch(how: &str, mut file: &File, page: u64) -> Result<()> {
    let offset = page * PAGE as u64;
    let mut buffer = [0u8; 1];
    match how {
        "read" => {
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(&mut buffer)?;
        }
        "pread" => file.read_exact_at(&mut buffer, offset)?,
        "readv" => {
            let mut parts = [io::IoSliceMut::new(&mut buffer)];
            ensure!(nix::sys::uio::preadv(file, &mut parts, offset as i64)? == 1, "nothing read");
        }
        "mmap" => map(file, offset, PAGE, 0, false)?,
        "populate" => map(file, offset, PAGE, libc::MAP_POPULATE, false)?,
        "huge" => map(file, offset, 2 << 20, 0, true)?,
        "sendfile" => {
            let null = File::options().write(true).open("/dev/null")?;
            let mut from = offset as libc::off_t;
            // SAFETY: two open files and a live offset.
            let sent = unsafe { libc::sendfile(null.as_raw_fd(), file.as_raw_fd(), &raw mut from, 1) };
            ensure!(sent == 1, io::Error::last_os_error());
        }
        "splice" => {
            let (_out, into) = nix::unistd::pipe()?;
            let mut from = offset as libc::loff_t;
            let (file, into, no_offset) = (file.as_raw_fd(), into.as_raw_fd(), std::ptr::null_mut());
            // SAFETY: two open files and a live offset.
            let moved = unsafe { libc::splice(file, &raw mut from, into, no_offset, 1, 0) };
            ensure!(moved == 1, io::Error::last_os_error());
        }
        "willneed" => {
            let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED;
            nix::fcntl::posix_fadvise(file.as_fd(), offset as i64, PAGE as i64, advice)?;
        }
        "uring" => uring::read(file, offset, &mut buffer)?,
        _ => bail!("unknown step {how}"),
    }
    Ok(())
}

/// Maps `len` bytes and reads the first one.
fn map(file: &File, offset: u64, len: usize, flags: i32, huge: bool) -> Result<()> {
    // SAFETY: a new mapping, read inside its file and unmapped at the end.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ,
            libc::MAP_PRIVATE | flags,
            file.as_raw_fd(),
            offset as libc::off_t,
        );
        ensure!(at != libc::MAP_FAILED, io::Error::last_os_error());
        if huge {
            ensure!(libc::madvise(at, len, libc::MADV_HUGEPAGE) == 0, io::Error::last_os_error());
        }
        at.cast::<u8>().read_volatile();
        libc::munmap(at, len);
    }
    Ok(())
}

/// One read through io_uring, by the raw interface.
mod uring {
    use std::fs::File;
    use std::io;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    use anyhow::{Result, ensure};

    const SETUP: libc::c_long = 425;
    const ENTER: libc::c_long = 426;
    const ENTER_GETEVENTS: u32 = 1;
    const OP_READ: u8 = 22;
    const OFF_SQ_RING: i64 = 0;
    const OFF_CQ_RING: i64 = 0x800_0000;
    const OFF_SQES: i64 = 0x1000_0000;

    /// struct io_uring_params: 40 bytes, then the offsets of the two rings, 40 bytes each.
    #[repr(C)]
    #[derive(Default)]
    struct Params {
        head: [u32; 10],
        sq: Offsets,
        cq: Offsets,
    }

    /// Submission: head, tail, mask, entries, flags, dropped, array. Completion: head, tail, mask, entries, overflow, cqes.
    #[repr(C)]
    #[derive(Default)]
    struct Offsets {
        fields: [u32; 10],
    }

    #[repr(C)]
    struct Sqe {
        opcode: u8,
        flags: u8,
        ioprio: u16,
        fd: i32,
        off: u64,
        addr: u64,
        len: u32,
        rest: [u32; 7],
    }

    #[repr(C)]
    struct Cqe {
        user_data: u64,
        res: i32,
        flags: u32,
    }

    pub fn read(file: &File, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut params = Params::default();
        // SAFETY: the kernel's interface: one submission with a live buffer, waited for; everything is unmapped by exit.
        unsafe {
            let fd = libc::syscall(SETUP, 1, &raw mut params);
            ensure!(fd >= 0, io::Error::last_os_error());
            let ring = OwnedFd::from_raw_fd(fd as i32);
            let map = |len: usize, at: i64| -> Result<*mut libc::c_void> {
                let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
                let p = libc::mmap(std::ptr::null_mut(), len, protection, flags, ring.as_raw_fd(), at);
                ensure!(p != libc::MAP_FAILED, io::Error::last_os_error());
                Ok(p)
            };
            let (sq, cq, sqes) = (map(4096, OFF_SQ_RING)?, map(4096, OFF_CQ_RING)?, map(4096, OFF_SQES)?);
            sqes.cast::<Sqe>().write(Sqe {
                opcode: OP_READ,
                flags: 0,
                ioprio: 0,
                fd: file.as_raw_fd(),
                off: offset,
                addr: buffer.as_mut_ptr() as u64,
                len: buffer.len() as u32,
                rest: [0; 7],
            });
            sq.byte_add(params.sq.fields[6] as usize).cast::<u32>().write(0);
            sq.byte_add(params.sq.fields[1] as usize).cast::<u32>().write_volatile(1);
            let none = std::ptr::null::<u8>();
            let done = libc::syscall(ENTER, ring.as_raw_fd(), 1, 1, ENTER_GETEVENTS, none, 0);
            ensure!(done == 1, io::Error::last_os_error());
            let cqe = cq.byte_add(params.cq.fields[5] as usize).cast::<Cqe>().read_volatile();
            ensure!(cqe.res == buffer.len() as i32, "io_uring read: {}", cqe.res);
            for p in [sq, cq, sqes] {
                libc::munmap(p, 4096);
            }
        }
        Ok(())
    }
}
