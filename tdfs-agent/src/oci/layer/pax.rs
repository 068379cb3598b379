//! PAX extended header records: `LENGTH KEY=VALUE\n` (POSIX.1-2001, pax).
//!
//! Global headers (`g`) change nothing: no container unpacker applies them.

use tdfs_common::tree::Xattr;

use super::sparse::Map;

/// What one extended header says about the entry after it.
#[derive(Default)]
pub(super) struct Records {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub mtime: Option<(i64, u32)>,
    /// `SCHILY.xattr.*`, by full name; a later record wins.
    pub xattrs: Vec<Xattr>,
    /// GNU sparse, any of the PAX versions.
    pub sparse: Sparse,
}

/// `GNU.sparse.*` records.
#[derive(Default)]
pub(super) struct Sparse {
    /// 1.0: the map lies before the data.
    pub in_data: bool,
    /// The file's real path.
    pub path: Option<Vec<u8>>,
    /// The file's real size.
    pub size: Option<u64>,
    /// 0.0 and 0.1: the map.
    pub map: Option<Map>,
    /// 0.0: an offset that waits for its length.
    offset: Option<u64>,
}

/// Parses the data of an extended header.
pub(super) fn parse(mut data: &[u8]) -> Result<Records, String> {
    let mut records = Records::default();
    while !data.is_empty() {
        let damaged = || "damaged extended header".to_owned();
        let space = data.iter().take(20).position(|b| *b == b' ').ok_or_else(damaged)?;
        let len = decimal(&data[..space]).and_then(|n| usize::try_from(n).ok()).ok_or_else(damaged)?;
        let record = data.get(space + 1..len).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(damaged)?;
        let equals = record.iter().position(|b| *b == b'=').filter(|n| *n > 0).ok_or_else(damaged)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if key.contains(&0) {
            return Err(damaged());
        }
        records.apply(key, value).map_err(|()| {
            format!("bad value of extended header {:?}", String::from_utf8_lossy(&key[..key.len().min(100)]))
        })?;
        data = &data[len..];
    }
    if records.sparse.offset.is_some() {
        return Err("sparse offset without a length".into());
    }
    Ok(records)
}

impl Records {
    fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), ()> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.retain(|x| x.name != name);
            self.xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
            return Ok(());
        }
        if value.is_empty() {
            // Takes back an earlier record.
            match key {
                b"path" => self.path = None,
                b"linkpath" => self.link = None,
                b"size" => self.size = None,
                b"uid" => self.uid = None,
                b"gid" => self.gid = None,
                b"mtime" => self.mtime = None,
                _ => {}
            }
            return Ok(());
        }
        let sparse = &mut self.sparse;
        match key {
            b"path" => self.path = Some(name(value)?),
            b"linkpath" => self.link = Some(name(value)?),
            b"size" => self.size = Some(decimal(value).ok_or(())?),
            b"uid" => self.uid = Some(decimal(value).and_then(|n| i64::try_from(n).ok()).ok_or(())?),
            b"gid" => self.gid = Some(decimal(value).and_then(|n| i64::try_from(n).ok()).ok_or(())?),
            b"mtime" => self.mtime = Some(time(value).ok_or(())?),
            b"GNU.sparse.major" => sparse.in_data = decimal(value).ok_or(())? == 1,
            b"GNU.sparse.name" => sparse.path = Some(name(value)?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => sparse.size = Some(decimal(value).ok_or(())?),
            b"GNU.sparse.offset" if sparse.offset.is_some() => return Err(()),
            b"GNU.sparse.offset" => sparse.offset = Some(decimal(value).ok_or(())?),
            b"GNU.sparse.numbytes" => {
                let offset = sparse.offset.take().ok_or(())?;
                sparse.map.get_or_insert_default().push(offset, decimal(value).ok_or(())?).map_err(|_| ())?;
            }
            b"GNU.sparse.map" => {
                let map = sparse.map.insert(Map::default());
                let mut numbers = value.split(|b| *b == b',').map(decimal);
                while let Some(offset) = numbers.next() {
                    let len = numbers.next().flatten().ok_or(())?;
                    map.push(offset.ok_or(())?, len).map_err(|_| ())?;
                }
            }
            // An empty map is legal: a file that is one hole.
            b"GNU.sparse.numblocks" => {
                sparse.map.get_or_insert_default();
            }
            _ => {}
        }
        Ok(())
    }
}

fn name(value: &[u8]) -> Result<Vec<u8>, ()> {
    if value.contains(&0) { Err(()) } else { Ok(value.to_vec()) }
}

/// An unsigned decimal number.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds and nanoseconds of a decimal fraction; digits past the ninth are cut.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |t| (true, t));
    let mut parts = text.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanos = (0..9).fold(0, |n, i| n * 10 + fraction.get(i).map_or(0, |d| u32::from(d - b'0')));
    match (negative, nanos) {
        (false, _) => Some((seconds, nanos)),
        (true, 0) => Some((-seconds, 0)),
        (true, _) => Some((-seconds - 1, 1_000_000_000 - nanos)),
    }
}
