//! A tar header block (POSIX ustar, GNU, star and V7 dialects).

use zerocopy::{FromBytes, Immutable, KnownLayout};

/// Bytes of a block.
pub(super) const BLOCK: usize = 512;

/// The fields every dialect has, and the rest.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Header {
    name: [u8; 100],
    mode: [u8; 8],
    uid: [u8; 8],
    gid: [u8; 8],
    size: [u8; 12],
    mtime: [u8; 12],
    checksum: [u8; 8],
    /// Type flag.
    pub kind: u8,
    link: [u8; 100],
    magic: [u8; 8],
    user: [u8; 32],
    group: [u8; 32],
    major: [u8; 8],
    minor: [u8; 8],
    /// ustar: 155 bytes of name prefix. star: 131. GNU: times, then at 41 four sparse entries, flag, real size.
    rest: [u8; 167],
}

/// What a header says before extension headers change it.
pub(super) struct Fields {
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u16,
    pub uid: i64,
    pub gid: i64,
    pub size: i64,
    pub mtime: i64,
}

impl Header {
    pub fn of(block: &[u8; BLOCK]) -> &Self {
        zerocopy::transmute_ref!(block)
    }

    /// Reads the fields that belong to every entry.
    pub fn fields(&self) -> Result<Fields, &'static str> {
        let mode = number(&self.mode).ok_or("bad mode")?;
        Ok(Fields {
            path: self.path(),
            link: text(&self.link).to_vec(),
            // Some archivers store the file type here too.
            mode: (mode & 0o7777) as u16,
            uid: number(&self.uid).ok_or("bad owner")?,
            gid: number(&self.gid).ok_or("bad group")?,
            size: self.size()?,
            mtime: number(&self.mtime).ok_or("bad modification time")?,
        })
    }

    /// Bytes of data after the header.
    pub fn size(&self) -> Result<i64, &'static str> {
        number(&self.size).filter(|s| *s >= 0).ok_or("bad size")
    }

    /// Major and minor number of a device.
    pub fn device(&self) -> Option<(u32, u32)> {
        let part = |field, limit| number(field).and_then(|n| u32::try_from(n).ok()).filter(|n| *n < limit);
        Some((part(&self.major, 1 << 12)?, part(&self.minor, 1 << 20)?))
    }

    /// The GNU sparse entries, whether another block of them follows, and the file's size.
    pub fn sparse(&self) -> Option<(&[u8], bool, u64)> {
        let size = number(&self.rest[138..150]).and_then(|n| u64::try_from(n).ok())?;
        Some((&self.rest[41..137], self.rest[137] != 0, size))
    }

    fn path(&self) -> Vec<u8> {
        let name = text(&self.name);
        let prefix: &[u8] = if !self.magic.starts_with(b"ustar\0") {
            &[]
        } else if self.rest.ends_with(b"tar\0") {
            text(&self.rest[..131])
        } else {
            text(&self.rest[..155])
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }
}

/// Whether the block's checksum matches, in the signed or the unsigned sum.
pub(super) fn checksum_matches(block: &[u8; BLOCK]) -> bool {
    let at = |n: usize| if (148..156).contains(&n) { b' ' } else { block[n] };
    let unsigned: i64 = (0..BLOCK).map(|n| i64::from(at(n))).sum();
    let signed: i64 = (0..BLOCK).map(|n| i64::from(at(n) as i8)).sum();
    number(&Header::of(block).checksum).is_some_and(|sum| sum == unsigned || sum == signed)
}

/// The bytes before the first NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|b| *b == 0).unwrap_or(field.len())]
}

/// A number in octal, or in base 256 (two's complement) when the first bit is set; blank is 0.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // The sign is the bit after the marker.
        let mut value = i64::from((first << 1) as i8 >> 1);
        for byte in rest {
            value = value.checked_mul(256)? + i64::from(*byte);
        }
        return Some(value);
    }
    let pad = |b: &u8| *b == b' ' || *b == 0;
    let start = field.iter().position(|b| !pad(b)).unwrap_or(field.len());
    let digits = field[start..].split(pad).next()?;
    let mut value = 0i64;
    for digit in digits {
        let digit = digit.checked_sub(b'0').filter(|d| *d < 8)?;
        value = value.checked_mul(8)?.checked_add(i64::from(digit))?;
    }
    Some(value)
}
