//! What the probe and the tracer share: ring buffer events, counters and the constants given to the probe.
//!
//! The probe writes one [`Event`] per page it has not reported before, and one per readiness event:
//!
//! ```text
//!  0        8       16       20       24       28       32
//!  +--------+--------+--------+--------+--------+--------+
//!  | ktime  | ino    | index  | count  | kind   | tgid   |   ExecEvent: 2 * 256 bytes of paths follow
//!  +--------+--------+--------+--------+--------+--------+
//! ```
//!
//! All fields are in the byte order of the machine: events never leave it.

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// `count` pages from `index` of inode `ino` entered the page cache.
    Added = 1,
    /// `count` pages from `index` of inode `ino` were read, or faulted in by a mapping.
    Used = 2,
    /// A socket started to listen on port `index`.
    Listen = 3,
    /// A program was executed; the event is an [`ExecEvent`].
    Exec = 4,
    /// The instruction of the user-space probe was reached.
    Uprobe = 5,
    /// `count` pages from `index` of inode `ino` left the page cache.
    Removed = 6,
}

impl Kind {
    /// The kind with number `n`.
    pub const fn from_u32(n: u32) -> Option<Self> {
        Some(match n {
            1 => Self::Added,
            2 => Self::Used,
            3 => Self::Listen,
            4 => Self::Exec,
            5 => Self::Uprobe,
            6 => Self::Removed,
            _ => return None,
        })
    }
}

/// A ring buffer event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub ktime: u64,
    /// The kernel's inode number.
    pub ino: u64,
    /// First page, or the port of [`Kind::Listen`].
    pub index: u32,
    /// Number of pages.
    pub count: u32,
    /// A [`Kind`].
    pub kind: u32,
    /// Process, as the initial pid namespace numbers it.
    pub tgid: u32,
}

/// Longest path of an [`ExecEvent`], bytes with its NUL.
pub const EXEC_PATH: usize = 256;

/// The event of [`Kind::Exec`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ExecEvent {
    /// The event.
    pub event: Event,
    /// The path given to execve(2), NUL-terminated.
    pub filename: [u8; EXEC_PATH],
    /// The interpreter of a script, or the same path; empty where the kernel does not say.
    pub interp: [u8; EXEC_PATH],
}

impl Event {
    /// The event at the start of a ring buffer record.
    pub fn parse(record: &[u8]) -> Option<Self> {
        Some(Self {
            ktime: u64_at(record, 0)?,
            ino: u64_at(record, 8)?,
            index: u32_at(record, 16)?,
            count: u32_at(record, 20)?,
            kind: u32_at(record, 24)?,
            tgid: u32_at(record, 28)?,
        })
    }
}

impl ExecEvent {
    /// The two paths of an exec record, without their NUL.
    pub fn paths(record: &[u8]) -> Option<[&[u8]; 2]> {
        let head = size_of::<Event>();
        let text = |from: usize| {
            let field = record.get(from..from + EXEC_PATH)?;
            field.split(|b| *b == 0).next()
        };
        Some([text(head)?, text(head + EXEC_PATH)?])
    }
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Pages of one bitmap of the probe: its hash map has an entry per inode and chunk of this many pages.
pub const CHUNK_PAGES: u64 = 512;

/// Counters of what the probe could not report, one slot each per CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Loss {
    /// No room in the ring buffer.
    RingFull = 0,
    /// No room for another bitmap.
    MapFull = 1,
    /// A kernel structure could not be read.
    ReadFailed = 2,
}

impl Loss {
    /// Number of counters.
    pub const COUNT: u32 = 3;
}

/// Slots of the probe's control map, which user space fills while it runs. All zero: nothing is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Control {
    /// Device of the pid namespace (kernel encoding) whose LISTEN and exec events count.
    PidnsDev = 0,
    /// Inode number of that pid namespace.
    PidnsIno = 1,
    /// The inode whose page events must wake user space at once.
    WatchIno = 2,
}

impl Control {
    /// Number of slots.
    pub const COUNT: u32 = 3;
}

/// Byte offsets that differ between kernels: slots of the probe's constant `OFFSETS`.
///
/// The first group is read from the kernel's BTF, the second from tracefs (`events/*/*/format`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Offset {
    /// `folio.flags`
    FolioFlags,
    /// `folio.mapping`
    FolioMapping,
    /// `folio.index`
    FolioIndex,
    /// The byte that holds the order of a large folio.
    FolioOrder,
    /// Not an offset: the bit number of `PG_head`.
    PgHead,
    /// `address_space.host`
    MappingHost,
    /// `inode.i_ino`
    InodeIno,
    /// `inode.i_sb`
    InodeSb,
    /// `super_block.s_dev`
    SbDev,
    /// `sock_common.skc_num`
    SockNum,
    /// `linux_binprm.filename`
    BprmFilename,
    /// `linux_binprm.interp`
    BprmInterp,

    /// filemap/mm_filemap_add_to_page_cache, and mm_filemap_delete_from_page_cache of the same class: `i_ino`
    AddedIno,
    /// `index`
    AddedIndex,
    /// `s_dev`
    AddedDev,
    /// `order`; 0 on kernels without the field, where every event is one page.
    AddedOrder,
    /// filemap/mm_filemap_get_pages: `i_ino`
    ReadIno,
    /// `index`
    ReadIndex,
    /// `last_index`
    ReadLast,
    /// `s_dev`
    ReadDev,
    /// filemap/mm_filemap_fault: `i_ino`
    FaultIno,
    /// `index`
    FaultIndex,
    /// `s_dev`
    FaultDev,
    /// sock/inet_sock_set_state: `newstate`
    StateNew,
    /// `sport`
    StatePort,
    /// `protocol`
    StateProtocol,
    /// sched/sched_process_exec: `filename` (`__data_loc`)
    ExecFilename,
}

impl Offset {
    /// Number of slots.
    pub const COUNT: usize = Self::ExecFilename as usize + 1;
}
