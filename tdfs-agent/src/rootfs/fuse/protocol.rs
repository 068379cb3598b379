//! The part of the FUSE protocol (7.x, linux/fuse.h) that a file system of one read-only file needs.
//!
//! ```text
//! request   0 len u32, opcode u32 | 8 unique u64 | 16 node u64 | 24 uid, gid, pid u32, ext u16, pad u16 | 40 body
//! answer    0 len u32, -errno i32 | 8 unique u64 | 16 body
//! ```
//!
//! Integers are in host order. The file is the root node itself (`rootmode` of a regular file), so nothing is ever
//! looked up.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes that a read of /dev/fuse must offer (FUSE_MIN_READ_BUFFER).
pub const REQUEST_MAX: usize = 8192;
/// The file.
pub const ROOT_NODE: u64 = 1;
/// Pages of one READ; 256 is what the kernel allows at most by default.
pub const READ_PAGES_MAX: u16 = 256;

const MAJOR: u32 = 7;
/// The last version whose structures we know; the kernel speaks the lower one of both.
const MINOR: u32 = 38;
const INIT_ASYNC_READ: u32 = 1;
const INIT_ASYNC_DIO: u32 = 1 << 15;
const INIT_MAX_PAGES: u32 = 1 << 22;
const OPEN_DIRECT_IO: u32 = 1;
/// Closing asks nothing (5.16). This process holds the file while it mounts: killed then, it would wait for its own answer.
const OPEN_NO_FLUSH: u32 = 1 << 5;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const ACCESS: u32 = 34;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct InHeader {
    len: u32,
    opcode: u32,
    unique: u64,
    node: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    extensions: u16,
    padding: u16,
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct InitIn {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ReadIn {
    handle: u64,
    offset: u64,
    size: u32,
    read_flags: u32,
    lock_owner: u64,
    flags: u32,
    padding: u32,
}

/// In front of every answer.
#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OutHeader {
    /// Bytes with the body.
    pub len: u32,
    /// 0 or a negative errno.
    pub error: i32,
    /// Of the request.
    pub unique: u64,
}

#[derive(IntoBytes, Immutable, KnownLayout, Default)]
#[repr(C)]
struct InitOut {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    unused: [u32; 7],
}

#[derive(IntoBytes, Immutable, KnownLayout, Default)]
#[repr(C)]
struct AttrOut {
    valid: u64,
    valid_nsec: u32,
    dummy: u32,
    ino: u64,
    size: u64,
    blocks: u64,
    atime: u64,
    mtime: u64,
    ctime: u64,
    atime_nsec: u32,
    mtime_nsec: u32,
    ctime_nsec: u32,
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    block_size: u32,
    flags: u32,
}

#[derive(IntoBytes, Immutable, KnownLayout, Default)]
#[repr(C)]
struct OpenOut {
    handle: u64,
    flags: u32,
    padding: u32,
}

#[derive(IntoBytes, Immutable, KnownLayout, Default)]
#[repr(C)]
struct StatfsOut {
    blocks: u64,
    free: u64,
    available: u64,
    files: u64,
    files_free: u64,
    block_size: u32,
    name_len: u32,
    fragment_size: u32,
    padding: u32,
    spare: [u32; 6],
}

/// How a request is answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Now, with this body.
    Body(Vec<u8>),
    /// Now, with this errno.
    Error(i32),
    /// With these bytes of the file, once they are there.
    Read {
        /// Offset in the file, bytes.
        offset: u64,
        /// Bytes.
        len: usize,
    },
    /// Not at all.
    Nothing,
}

/// The answer to one request for a file of `size` bytes, and the request's number. `None` if `request` is too
/// short to say a number, which the kernel never sends.
pub fn answer(request: &[u8], size: u64) -> Option<(u64, Answer)> {
    let (header, body) = InHeader::read_from_prefix(request).ok()?;
    Some((header.unique, answer_body(&header, body, size)))
}

fn answer_body(header: &InHeader, body: &[u8], size: u64) -> Answer {
    if matches!(header.opcode, FORGET | BATCH_FORGET) {
        return Answer::Nothing;
    }
    if header.opcode == INIT {
        return init(body);
    }
    if matches!(header.opcode, STATFS | DESTROY) {
        let blocks = size.div_ceil(4096);
        let statfs = StatfsOut {
            blocks,
            block_size: 4096,
            fragment_size: 4096,
            name_len: 255,
            ..StatfsOut::default()
        };
        return if header.opcode == STATFS { reply(&statfs) } else { Answer::Body(Vec::new()) };
    }
    if header.node != ROOT_NODE {
        return Answer::Error(libc::ESTALE);
    }
    match header.opcode {
        LOOKUP => Answer::Error(libc::ENOTDIR),
        GETATTR => reply(&AttrOut {
            valid: u64::MAX / 2,
            ino: ROOT_NODE,
            size,
            blocks: size.div_ceil(512),
            mode: libc::S_IFREG | 0o400,
            nlink: 1,
            block_size: 4096,
            ..AttrOut::default()
        }),
        OPEN => reply(&OpenOut { flags: OPEN_DIRECT_IO | OPEN_NO_FLUSH, ..OpenOut::default() }),
        READ => match ReadIn::read_from_prefix(body) {
            Ok((read, _)) if read.size as usize <= usize::from(READ_PAGES_MAX) * 4096 => {
                Answer::Read { offset: read.offset, len: read.size as usize }
            }
            _ => Answer::Error(libc::EINVAL),
        },
        RELEASE | FLUSH | ACCESS => Answer::Body(Vec::new()),
        // INTERRUPT too: refused once, the kernel never sends it again. A read must not fail because of a signal, as a
        // page fault would turn that into SIGBUS.
        _ => Answer::Error(libc::ENOSYS),
    }
}

fn init(body: &[u8]) -> Answer {
    let Ok((init, _)) = InitIn::read_from_prefix(body) else { return Answer::Error(libc::EINVAL) };
    // 7.23 fixed the length of this answer.
    if init.major < MAJOR || (init.major == MAJOR && init.minor < 23) {
        return Answer::Error(libc::EPROTO);
    }
    reply(&InitOut {
        major: MAJOR,
        minor: MINOR,
        max_readahead: init.max_readahead,
        flags: init.flags & (INIT_ASYNC_READ | INIT_ASYNC_DIO | INIT_MAX_PAGES),
        // Reads that wait for their pages must not keep the others from being sent.
        max_background: u16::MAX,
        max_write: 4096,
        time_gran: 1,
        max_pages: READ_PAGES_MAX,
        ..InitOut::default()
    })
}

fn reply(body: &(impl IntoBytes + Immutable)) -> Answer {
    Answer::Body(body.as_bytes().to_vec())
}

const _: () =
    assert!(size_of::<InHeader>() == 40 && size_of::<OutHeader>() == 16 && size_of::<ReadIn>() == 40);
const _: () =
    assert!(size_of::<InitOut>() == 64 && size_of::<AttrOut>() == 104 && size_of::<StatfsOut>() == 80);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let len = (40 + body.len()) as u32;
        let mut bytes = [len.to_ne_bytes(), opcode.to_ne_bytes()].concat();
        bytes.extend_from_slice(&77u64.to_ne_bytes());
        bytes.extend_from_slice(&node.to_ne_bytes());
        bytes.resize(40, 0);
        bytes.extend_from_slice(body);
        bytes
    }

    fn read_body(offset: u64, size: u32) -> Vec<u8> {
        let mut body = vec![0; 40];
        body[8..16].copy_from_slice(&offset.to_ne_bytes());
        body[16..20].copy_from_slice(&size.to_ne_bytes());
        body
    }

    #[test]
    fn read_is_passed_on_and_bounded() {
        let ask = |size| answer(&request(READ, 1, &read_body(8192, size)), 1 << 20).unwrap();
        assert_eq!(ask(4096), (77, Answer::Read { offset: 8192, len: 4096 }));
        assert_eq!(ask(1 << 20).1, Answer::Read { offset: 8192, len: 1 << 20 });
        assert_eq!(ask((1 << 20) + 1).1, Answer::Error(libc::EINVAL));
        assert_eq!(answer(&request(READ, 1, &[0; 39]), 0).unwrap().1, Answer::Error(libc::EINVAL));
    }

    #[test]
    fn only_the_root_exists() {
        for opcode in [GETATTR, OPEN, READ, RELEASE] {
            assert_eq!(
                answer(&request(opcode, 2, &read_body(0, 1)), 9).unwrap().1,
                Answer::Error(libc::ESTALE)
            );
        }
        let Answer::Body(attr) = answer(&request(GETATTR, 1, &[]), 4096 * 5).unwrap().1 else {
            panic!("no body")
        };
        assert_eq!(attr[24..32], (4096u64 * 5).to_ne_bytes());
    }

    #[test]
    fn unknown_operations_are_refused_and_forget_is_silent() {
        let kind = |opcode| answer(&request(opcode, 1, &[]), 9).unwrap().1;
        for opcode in [4, 5, 9, 16, 20, 21, 22, 27, 28, 36, 44, 46, 52, 4096, u32::MAX] {
            assert_eq!(kind(opcode), Answer::Error(libc::ENOSYS), "{opcode}");
        }
        assert_eq!(kind(FORGET), Answer::Nothing);
        assert_eq!(kind(BATCH_FORGET), Answer::Nothing);
    }

    #[test]
    fn init_refuses_old_kernels() {
        let ask = |major: u32, minor: u32| {
            let body = [major, minor, 131072, u32::MAX].map(u32::to_ne_bytes).concat();
            answer(&request(INIT, 0, &body), 9).unwrap().1
        };
        assert_eq!(ask(6, 40), Answer::Error(libc::EPROTO));
        assert_eq!(ask(7, 22), Answer::Error(libc::EPROTO));
        let Answer::Body(out) = ask(7, 44) else { panic!("no body") };
        assert_eq!(out.len(), 64);
        assert_eq!(out[12..16], (INIT_ASYNC_READ | INIT_ASYNC_DIO | INIT_MAX_PAGES).to_ne_bytes());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200), size: u64) {
            prop_assert_eq!(answer(&bytes, size).is_some(), bytes.len() >= 40);
        }
    }
}
