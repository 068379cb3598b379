//! EROFS on disk, as far as we write it (all fields little-endian, blocks of 4 KiB):
//!
//! ```text
//! block 0   1024  superblock, 128 bytes; its checksum covers bytes 1024..4096
//!           1152  device slots, 128 bytes each: [zone] cold, device ids from 1 in this order
//! block 1.. inodes in tree order, each at a multiple of 32 (nid = byte offset / 32); the root is the first
//!           | inode, 64 B | attributes | symlink target or last directory block |   inline: within one block
//!           | inode, 64 B | attributes | pad to 8 | chunk table, 8 B a chunk    |   regular files
//! then      directory blocks and long symlink targets
//! ```
//!
//! A chunk is a power of two of blocks and lies on one device; all chunks of a file have the same size. Kernel 5.16 knows
//! chunks and devices; mounting from files without loop devices needs 6.12.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout};

/// Bytes in a block.
pub const BLOCK: usize = 4096;
/// Inodes start at multiples of this, and are counted in it.
pub const SLOT: usize = 32;
/// Where the superblock lies.
pub const SUPER_OFFSET: usize = 1024;
/// First four bytes of the superblock.
pub const MAGIC: u32 = 0xE0F5_E1E2;
/// Block address of a chunk that is a hole.
pub const NULL_BLOCK: u32 = u32::MAX;

/// compat: the superblock has a checksum.
pub const COMPAT_SB_CHKSUM: u32 = 1;
/// compat: inode times are modification times.
pub const COMPAT_MTIME: u32 = 2;
/// incompat: chunk tables are in use.
pub const INCOMPAT_CHUNKED_FILE: u32 = 4;
/// incompat: the device table is in use.
pub const INCOMPAT_DEVICE_TABLE: u32 = 8;

/// Layout: content in whole blocks at `Inode::union`.
pub const LAYOUT_PLAIN: u16 = 0;
/// Layout: whole blocks at `Inode::union`, the rest right behind inode and attributes.
pub const LAYOUT_INLINE: u16 = 2;
/// Layout: a chunk table.
pub const LAYOUT_CHUNKS: u16 = 4;
/// Chunk format: the table has device ids.
pub const CHUNK_INDEXES: u32 = 0x20;
/// Largest power of two of blocks that the chunk format can say.
pub const CHUNK_BITS_MAX: u32 = 31;

/// The superblock.
#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SuperBlock {
    /// [`MAGIC`].
    pub magic: U32,
    /// crc32c without the final inversion, computed with this field zero.
    pub checksum: U32,
    /// Features that a reader may ignore.
    pub compat: U32,
    /// log2 of the block size.
    pub block_bits: u8,
    /// Bytes past 128, in units of 16.
    pub extra_slots: u8,
    /// Nid of the root.
    pub root_nid: U16,
    /// Inodes.
    pub inodes: U64,
    /// Seconds.
    pub build_time: U64,
    /// Nanoseconds.
    pub build_time_nsec: U32,
    /// Blocks of this file.
    pub blocks: U32,
    /// Block from which nids count.
    pub meta_block: U32,
    /// Block from which shared attributes count.
    pub xattr_block: U32,
    /// Identity.
    pub uuid: [u8; 16],
    /// Volume name.
    pub name: [u8; 16],
    /// Features that a reader must know.
    pub incompat: U32,
    /// Compression algorithms.
    pub algorithms: U16,
    /// Device slots.
    pub devices: U16,
    /// Offset of the first device slot, in units of 128.
    pub devices_at: U16,
    /// Zero.
    pub reserved: [u8; 38],
}

/// A device besides the metadata file.
#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceSlot {
    /// Free text.
    pub tag: [u8; 64],
    /// Blocks.
    pub blocks: U32,
    /// Zero: blocks are addressed by device id.
    pub mapped_block: U32,
    /// Zero.
    pub reserved: [u8; 56],
}

/// The extended inode.
#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Inode {
    /// Layout << 1 | 1.
    pub format: U16,
    /// 0 without attributes, else 1 + their bytes past [`XattrHeader`] / 4.
    pub xattr_count: U16,
    /// As in stat(2).
    pub mode: U16,
    /// Zero.
    pub reserved: U16,
    /// Bytes.
    pub size: U64,
    /// First block, chunk format or device number.
    pub union: U32,
    /// For 32-bit stat(2).
    pub ino: U32,
    /// Owner.
    pub uid: U32,
    /// Group owner.
    pub gid: U32,
    /// Seconds, signed.
    pub mtime: U64,
    /// Nanoseconds.
    pub mtime_nsec: U32,
    /// Link count.
    pub nlink: U32,
    /// Zero.
    pub reserved2: [u8; 16],
}

/// In front of an inode's attributes.
#[derive(IntoBytes, Immutable, KnownLayout, Default)]
#[repr(C)]
pub struct XattrHeader {
    /// Zero.
    pub filter: U32,
    /// Zero: we share none.
    pub shared: u8,
    /// Zero.
    pub reserved: [u8; 7],
}

/// An attribute; name without prefix and value follow, padded to 4.
#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct XattrEntry {
    /// Bytes of the name without its prefix.
    pub name_len: u8,
    /// The prefix.
    pub prefix: u8,
    /// Bytes of the value.
    pub value_len: U16,
}

/// A chunk of a file.
#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChunkIndex {
    /// Zero.
    pub block_high: U16,
    /// From 1.
    pub device: U16,
    /// First block on that device, or [`NULL_BLOCK`].
    pub block: U32,
}

/// A name in a directory block. All of a block's entries come first, then its names; one order by bytes runs through all
/// blocks, `.` and `..` included.
#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DirEntry {
    /// The inode.
    pub nid: U64,
    /// Where its name starts in the block; the first entry's says how many entries there are.
    pub name_offset: U16,
    /// 1 regular, 2 directory, 3 character device, 4 block device, 5 fifo, 6 socket, 7 symlink.
    pub kind: u8,
    /// Zero.
    pub reserved: u8,
}

const _: () = assert!(size_of::<SuperBlock>() == 128 && size_of::<DeviceSlot>() == 128);
const _: () = assert!(size_of::<Inode>() == 64 && size_of::<XattrHeader>() == 12);
const _: () =
    assert!(size_of::<XattrEntry>() == 4 && size_of::<ChunkIndex>() == 8 && size_of::<DirEntry>() == 12);

/// Index and rest of an attribute name; `None` where no Linux file system can hold such a name.
pub fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    let prefixes: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    let (index, rest) = prefixes.iter().find_map(|(i, p)| Some((*i, name.strip_prefix(*p)?)))?;
    (!rest.is_empty()).then_some((index, rest))
}

/// A device number as an inode holds it.
pub fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}
