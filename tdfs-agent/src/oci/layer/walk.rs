//! The tar of one layer, header by header.
//!
//! Paths are cleaned as container unpackers do it: `..` and a leading slash stay inside the root. Extended
//! headers (PAX and GNU) are at most 1 MiB. Only regular files have data; sizes on anything else are ignored.
//! Extended attributes that no Linux file could carry, or that would reach into the overlay above
//! (`trusted.overlay.`, `user.overlay.`), are dropped.

use tdfs_common::digest::ContentHasher;
use tdfs_common::tree::{Body, Extent, FILE_MAX, Inode, NAME_MAX, PATH_MAX, TARGET_MAX, Xattr};

use super::header::{BLOCK, Fields, Header, checksum_matches, text};
use super::pax::{self, Records};
use super::scan::Stream;
use super::sparse::Map;
use super::{ENTRIES_MAX, Entry, EntryKind, LayerError};

/// Longest extended header, bytes.
const EXTENSION_MAX: u64 = 1 << 20;

/// Longest value of an extended attribute, bytes, as the tree stores it.
const XATTR_MAX: usize = 65535;
/// Paths, targets, attributes and extents of one layer, bytes.
const METADATA_MAX: usize = 256 << 20;
/// Holes of one layer, bytes: they are hashed too.
const HOLES_MAX: u64 = 64 << 30;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What else starts so is private to aufs.
const AUFS: &[u8] = b".wh..wh.";

/// Reads entries up to the end of the archive.
pub(super) fn walk(stream: &mut Stream<'_>) -> Result<Vec<Entry>, LayerError> {
    let mut walk = Walk { stream, metadata: 0, holes: 0, last: Vec::new() };
    let mut entries = Vec::new();
    let mut extension = Extension::default();
    loop {
        let offset = walk.stream.offset();
        let Some(block) = walk.block()? else {
            return if extension.is_empty() { Ok(entries) } else { Err(walk.truncated()) };
        };
        let damaged = |reason: String| LayerError::Header { offset, reason };
        if block == [0; BLOCK] {
            return match walk.block()? {
                Some(block) if block != [0; BLOCK] => Err(damaged("data after an empty header".into())),
                _ if !extension.is_empty() => Err(walk.truncated()),
                _ => Ok(entries),
            };
        }
        if !checksum_matches(&block) {
            return Err(damaged("checksum does not match".into()));
        }
        let header = Header::of(&block);
        let size = header.size().map_err(|e| damaged(e.into()))? as u64;
        match header.kind {
            b'x' => extension.records = Some(pax::parse(&walk.extension(size, offset)?).map_err(damaged)?),
            b'g' => walk.skip(size)?,
            b'L' => extension.path = Some(text(&walk.extension(size, offset)?).to_vec()),
            b'K' => extension.link = Some(text(&walk.extension(size, offset)?).to_vec()),
            _ => {
                let fields = header.fields().map_err(|e| damaged(e.into()))?;
                if let Some(entry) = walk.entry(header, fields, std::mem::take(&mut extension))? {
                    walk.count(entry_bytes(&entry))?;
                    entries.push(entry);
                }
                if entries.len() > ENTRIES_MAX {
                    return Err(LayerError::TooLarge { what: "entries", limit: ENTRIES_MAX as u64 });
                }
            }
        }
    }
}

/// Extended headers that wait for their entry.
#[derive(Default)]
struct Extension {
    records: Option<Records>,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

struct Walk<'s, 'a> {
    stream: &'s mut Stream<'a>,
    metadata: usize,
    holes: u64,
    /// Path of the current entry, for messages.
    last: Vec<u8>,
}

impl Walk<'_, '_> {
    fn entry(
        &mut self,
        header: &Header,
        fields: Fields,
        extension: Extension,
    ) -> Result<Option<Entry>, LayerError> {
        let mut records = extension.records.unwrap_or_default();
        let sparse_path = records.sparse.path.take();
        let raw = extension.path.or(sparse_path).or(records.path.take()).unwrap_or(fields.path);
        self.last.clone_from(&raw);
        let fail = |reason: &str| LayerError::entry(&raw, reason);
        let link = extension.link.or(records.link.take()).unwrap_or(fields.link);
        let stored = records.size.unwrap_or(fields.size as u64);
        let path = clean(&raw).map_err(fail)?;
        let regular = |kind| matches!(kind, 0 | b'0' | b'7' | b'S');
        // V7 had no type for directories.
        let body = match header.kind {
            0 if raw.ends_with(b"/") => Body::Directory(vec![]),
            b'5' => Body::Directory(vec![]),
            kind if regular(kind) => self.regular(header, &mut records, stored)?,
            b'1' => {
                let target =
                    clean(&link).map_err(|e| LayerError::entry(&raw, format!("link target: {e}")))?;
                return Ok(Some(Entry { path, kind: EntryKind::HardLink(target) }));
            }
            b'2' if link.is_empty() || link.len() > TARGET_MAX => {
                return Err(fail("bad symbolic link target"));
            }
            b'2' => Body::Symlink(link),
            kind @ (b'3' | b'4') => {
                let (major, minor) = header.device().ok_or_else(|| fail("bad device number"))?;
                if kind == b'3' {
                    Body::CharDevice { major, minor }
                } else {
                    Body::BlockDevice { major, minor }
                }
            }
            b'6' => Body::Fifo,
            kind => return Err(fail(&format!("entry type {:?} is not supported", char::from(kind)))),
        };
        match meaning(&path).map_err(fail)? {
            Meaning::File => {}
            Meaning::Removal(entry) => return Ok(Some(entry)),
            Meaning::Private => return Ok(None),
        }
        if path.is_empty() && !matches!(body, Body::Directory(_)) {
            return Err(fail("the root must be a directory"));
        }
        let (mtime, mtime_nsec) = records.mtime.unwrap_or((fields.mtime, 0));
        let id = |n: i64| u32::try_from(n).map_err(|_| fail("owner or group out of range"));
        let xattrs = attributes(records.xattrs, &body).map_err(fail)?;
        let (uid, gid) = (id(records.uid.unwrap_or(fields.uid))?, id(records.gid.unwrap_or(fields.gid))?);
        // The kernel keeps no permissions of symbolic links.
        let mode = if matches!(body, Body::Symlink(_)) { 0o777 } else { fields.mode };
        let inode = Inode { mode, uid, gid, mtime, mtime_nsec, xattrs, body };
        Ok(Some(Entry { path, kind: EntryKind::Inode(inode) }))
    }

    fn regular(&mut self, header: &Header, records: &mut Records, stored: u64) -> Result<Body, LayerError> {
        let (size, regions, data) = self.regions(header, records, stored)?;
        if size > FILE_MAX {
            return Err(self.failed("file is too large"));
        }
        self.holes += size - data;
        if self.holes > HOLES_MAX {
            return Err(LayerError::TooLarge { what: "bytes of holes in sparse files", limit: HOLES_MAX });
        }
        self.count(regions.len() * size_of::<Extent>())?;
        let mut hasher = ContentHasher::default();
        let mut extents = Vec::with_capacity(regions.len());
        let mut at = 0;
        for (file_offset, len) in regions {
            hash_zeros(&mut hasher, file_offset - at);
            extents.push(Extent { file_offset, len, layer: 0, layer_offset: self.stream.offset() });
            if !self.stream.take(len, |bytes| hasher.update(bytes))? {
                return Err(self.truncated());
            }
            at = file_offset + len;
        }
        hash_zeros(&mut hasher, size - at);
        self.pad(data)?;
        Ok(Body::Regular { size, content: hasher.finish(), extents })
    }

    /// Size of a regular file, its stored regions, and how many bytes they have; reads what lies between header
    /// and data.
    #[expect(clippy::type_complexity, reason = "three plain values for the one caller")]
    fn regions(
        &mut self,
        header: &Header,
        records: &mut Records,
        stored: u64,
    ) -> Result<(u64, Vec<(u64, u64)>, u64), LayerError> {
        let (map, size, data) = if header.kind == b'S' {
            let (entries, mut more, size) =
                header.sparse().ok_or_else(|| self.failed("bad size of a sparse file"))?;
            let mut map = Map::default();
            map.push_entries(entries).map_err(|e| self.failed(e))?;
            while more {
                let block = self.block()?.ok_or_else(|| self.truncated())?;
                map.push_entries(&block[..504]).map_err(|e| self.failed(e))?;
                more = block[504] != 0;
            }
            (map, size, stored)
        } else if records.sparse.in_data {
            let size = records.sparse.size.ok_or_else(|| self.failed("sparse file without a size"))?;
            let (map, used) = self.map_in_data(stored)?;
            (map, size, stored - used)
        } else if let Some(map) = records.sparse.map.take() {
            let size = records.sparse.size.ok_or_else(|| self.failed("sparse file without a size"))?;
            (map, size, stored)
        } else {
            let regions = if stored > 0 { vec![(0, stored)] } else { vec![] };
            return Ok((stored, regions, stored));
        };
        let regions = map.finish(size, data).map_err(|e| self.failed(e))?;
        Ok((size, regions, data))
    }

    /// The map of a PAX 1.0 sparse file: a count, then offsets and lengths, one decimal number per line, padded
    /// to a block. Returns the bytes it took as well.
    fn map_in_data(&mut self, stored: u64) -> Result<(Map, u64), LayerError> {
        let mut map = Map::default();
        let mut used = 0;
        let mut block = [0; BLOCK];
        let mut pos = BLOCK;
        let mut line = |walk: &mut Self| {
            let mut digits = Vec::new();
            loop {
                if pos == BLOCK {
                    used += BLOCK as u64;
                    if used > stored {
                        return Err(walk.failed("sparse map is truncated"));
                    }
                    block = walk.block()?.ok_or_else(|| walk.truncated())?;
                    pos = 0;
                }
                let byte = block[pos];
                pos += 1;
                if byte == b'\n' {
                    return pax::decimal(&digits).ok_or_else(|| walk.failed("bad sparse map"));
                }
                if digits.len() == 20 {
                    return Err(walk.failed("bad sparse map"));
                }
                digits.push(byte);
            }
        };
        for _ in 0..line(self)? {
            let (offset, len) = (line(self)?, line(self)?);
            map.push(offset, len).map_err(|e| self.failed(e))?;
        }
        Ok((map, used))
    }

    /// The next block; `None` when the archive ends here.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        let whole = self.stream.take(BLOCK as u64, |bytes| {
            block[filled..filled + bytes.len()].copy_from_slice(bytes);
            filled += bytes.len();
        })?;
        match (whole, filled) {
            (true, _) => Ok(Some(block)),
            (false, 0) => Ok(None),
            (false, _) => Err(self.truncated()),
        }
    }

    /// The data of an extended header.
    fn extension(&mut self, size: u64, offset: u64) -> Result<Vec<u8>, LayerError> {
        if size > EXTENSION_MAX {
            return Err(LayerError::Header { offset, reason: "extended header is too long".into() });
        }
        let mut data = Vec::new();
        if !self.stream.take(size, |bytes| data.extend_from_slice(bytes))? {
            return Err(self.truncated());
        }
        self.pad(size)?;
        Ok(data)
    }

    fn skip(&mut self, size: u64) -> Result<(), LayerError> {
        if !self.stream.take(size, |_| {})? {
            return Err(self.truncated());
        }
        self.pad(size)
    }

    /// Skips from the end of `size` bytes of data to the next header.
    fn pad(&mut self, size: u64) -> Result<(), LayerError> {
        let pad = size.wrapping_neg() % BLOCK as u64;
        if self.stream.take(pad, |_| {})? { Ok(()) } else { Err(self.truncated()) }
    }

    fn count(&mut self, bytes: usize) -> Result<(), LayerError> {
        self.metadata += bytes;
        if self.metadata > METADATA_MAX {
            return Err(LayerError::TooLarge { what: "bytes of metadata", limit: METADATA_MAX as u64 });
        }
        Ok(())
    }

    fn failed(&self, reason: &str) -> LayerError {
        LayerError::entry(&self.last, reason)
    }

    fn truncated(&self) -> LayerError {
        LayerError::Truncated { path: super::lossy(&self.last) }
    }
}

impl Extension {
    fn is_empty(&self) -> bool {
        self.records.is_none() && self.path.is_none() && self.link.is_none()
    }
}

/// Variable-length bytes of an entry, extents apart.
fn entry_bytes(entry: &Entry) -> usize {
    let rest = match &entry.kind {
        EntryKind::Inode(inode) => {
            let target = if let Body::Symlink(target) = &inode.body { target.len() } else { 0 };
            let xattr = |x: &Xattr| size_of::<Xattr>() + x.name.len() + x.value.len();
            target + inode.xattrs.iter().map(xattr).sum::<usize>()
        }
        EntryKind::HardLink(target) => target.len(),
        EntryKind::Whiteout | EntryKind::Opaque => 0,
    };
    entry.path.len() + rest
}

/// `path` inside the root: without empty components, `.`, and with `..` resolved by its text.
fn clean(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            name if name.len() > NAME_MAX => return Err("name is too long"),
            name => parts.push(name),
        }
    }
    let path = parts.join(&b'/');
    if path.len() > PATH_MAX { Err("path is too long") } else { Ok(path) }
}

/// What the name of an entry says about it.
enum Meaning {
    File,
    Removal(Entry),
    /// Metadata of aufs, which is not for us.
    Private,
}

fn meaning(path: &[u8]) -> Result<Meaning, &'static str> {
    let (dir, name) = match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&path[..0], path),
    };
    if name == OPAQUE {
        return Ok(Meaning::Removal(Entry { path: dir.to_vec(), kind: EntryKind::Opaque }));
    }
    if path.split(|b| *b == b'/').any(|part| part.starts_with(AUFS)) {
        return Ok(Meaning::Private);
    }
    let Some(hidden) = name.strip_prefix(WHITEOUT) else { return Ok(Meaning::File) };
    if matches!(hidden, b"" | b"." | b"..") {
        return Err("whiteout of no name");
    }
    let path = if dir.is_empty() { hidden.to_vec() } else { [dir, b"/", hidden].concat() };
    Ok(Meaning::Removal(Entry { path, kind: EntryKind::Whiteout }))
}

/// The attributes that the kernel would take for such an inode, by name.
fn attributes(mut xattrs: Vec<Xattr>, body: &Body) -> Result<Vec<Xattr>, &'static str> {
    let user = matches!(body, Body::Regular { .. } | Body::Directory(_));
    xattrs.retain(|x| {
        let name = x.name.as_slice();
        let overlay = name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
        let known = [&b"trusted."[..], b"security."].iter().any(|p| name.starts_with(p))
            || (user && name.starts_with(b"user."))
            || matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default");
        known && !overlay
    });
    for x in &xattrs {
        let prefix = x.name.iter().position(|b| *b == b'.').unwrap_or(0) + 1;
        if x.name.len() > NAME_MAX || x.name.len() == prefix || x.value.len() > XATTR_MAX {
            return Err("bad extended attribute");
        }
    }
    xattrs.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(xattrs)
}

fn hash_zeros(hasher: &mut ContentHasher, mut n: u64) {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while n > 0 {
        let len = n.min(ZEROS.len() as u64) as usize;
        hasher.update(&ZEROS[..len]);
        n -= len as u64;
    }
}
