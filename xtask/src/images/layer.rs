//! Packs the upper directory of an overlay as a layer: a deterministic tar, compressed.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};
use walkdir::WalkDir;

use super::recipe::SOURCE_DATE_EPOCH;
use super::{Compression, Hashing, digest_string};

const ZSTD_LEVEL: i32 = 3;
/// Uncompressed bytes of one frame of the seekable format.
const FRAME: usize = 4 << 20;

/// Packs `upper` into `out`; returns the digest of the uncompressed tar.
pub(super) fn pack(upper: &Path, compression: Compression, out: File) -> Result<String> {
    match compression {
        Compression::Gzip => {
            // Some seconds instead of a minute: pigz uses every core. `-n` leaves the time out.
            let mut pigz = Command::new("pigz")
                .args(["-6", "-n", "-c"])
                .stdin(Stdio::piped())
                .stdout(out)
                .spawn()
                .context("cannot start pigz")?;
            let stdin = pigz.stdin.take().context("pigz has an input")?;
            let diff_id = write_tar(upper, stdin).map(|(_, diff_id)| diff_id);
            let status = pigz.wait().context("wait for pigz")?;
            if !status.success() {
                bail!("pigz failed: {status}");
            }
            diff_id
        }
        Compression::Zstd => {
            let (encoder, diff_id) = write_tar(upper, zstd::Encoder::new(out, ZSTD_LEVEL)?)?;
            encoder.finish()?;
            Ok(diff_id)
        }
        Compression::ZstdSeekable => {
            let (frames, diff_id) = write_tar(upper, SeekableZstd::new(out))?;
            frames.finish()?;
            Ok(diff_id)
        }
    }
}

/// Writes the tar; returns its sink and its digest.
fn write_tar<W: Write>(upper: &Path, out: W) -> Result<(W, String)> {
    let out = io::BufWriter::with_capacity(1 << 20, Hashing { inner: out, hash: Sha256::new() });
    let mut tar = Builder::new(out);
    let mut links = HashMap::new();
    for entry in WalkDir::new(upper).min_depth(1).sort_by_file_name() {
        let entry = entry?;
        let name = entry.path().strip_prefix(upper)?;
        add(&mut tar, entry.path(), name, &entry.metadata()?, &mut links)
            .with_context(|| format!("pack {}", entry.path().display()))?;
    }
    let out = tar.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok((out.inner, digest_string(out.hash)))
}

fn add<W: Write>(
    tar: &mut Builder<W>,
    path: &Path,
    name: &Path,
    metadata: &Metadata,
    links: &mut HashMap<u64, PathBuf>,
) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_socket() {
        return Ok(());
    }
    if kind.is_char_device() && metadata.rdev() == 0 {
        // overlayfs: something of a lower layer was removed.
        let file_name = name.file_name().context("a whiteout has a name")?;
        let whiteout = [b".wh.", file_name.as_bytes()].concat();
        return marker(tar, &name.with_file_name(std::ffi::OsStr::from_bytes(&whiteout)));
    }
    if !kind.is_symlink() {
        add_xattrs(tar, path)?;
    }
    let mut header = Header::new_gnu();
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(u64::from(metadata.uid()));
    header.set_gid(u64::from(metadata.gid()));
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0).min(SOURCE_DATE_EPOCH));
    header.set_size(0);
    if kind.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        tar.append_link(&mut header, name, fs::read_link(path)?)?;
    } else if kind.is_dir() {
        header.set_entry_type(EntryType::Directory);
        tar.append_data(&mut header, name, io::empty())?;
        if xattr::get(path, "trusted.overlay.opaque")?.as_deref() == Some(b"y") {
            marker(tar, &name.join(".wh..wh..opq"))?;
        }
    } else if kind.is_file() {
        if metadata.nlink() > 1
            && let Some(first) = links.get(&metadata.ino())
        {
            header.set_entry_type(EntryType::Link);
            tar.append_link(&mut header, name, first)?;
            return Ok(());
        }
        links.insert(metadata.ino(), name.to_owned());
        header.set_entry_type(EntryType::Regular);
        header.set_size(metadata.len());
        tar.append_data(&mut header, name, File::open(path)?)?;
    } else {
        header.set_entry_type(match () {
            () if kind.is_char_device() => EntryType::Char,
            () if kind.is_block_device() => EntryType::Block,
            () => EntryType::Fifo,
        });
        let device = metadata.rdev();
        // makedev(3) of Linux: 12 bits of major above 8 bits of minor; package managers make no larger numbers.
        header.set_device_major(((device >> 8) & 0xfff) as u32)?;
        header.set_device_minor((device & 0xff) as u32)?;
        tar.append_data(&mut header, name, io::empty())?;
    }
    Ok(())
}

fn add_xattrs<W: Write>(tar: &mut Builder<W>, path: &Path) -> Result<()> {
    let mut names: Vec<_> = xattr::list(path)?.collect();
    names.sort();
    let mut records = Vec::new();
    for name in names {
        let name = name.to_str().context("name of an extended attribute")?;
        if !name.starts_with("trusted.overlay.") {
            let value = xattr::get(path, name)?.unwrap_or_default();
            records.push((format!("SCHILY.xattr.{name}"), value));
        }
    }
    // An empty list writes no header.
    tar.append_pax_extensions(records.iter().map(|(name, value)| (name.as_str(), value.as_slice())))?;
    Ok(())
}

/// An empty file whose name is a message to the layer above (OCI image spec, "Whiteouts").
fn marker<W: Write>(tar: &mut Builder<W>, name: &Path) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_mtime(SOURCE_DATE_EPOCH);
    header.set_size(0);
    tar.append_data(&mut header, name, io::empty())?;
    Ok(())
}

/// Writes frames of [`FRAME`] bytes and, at the end, the table that lets a reader find them.
struct SeekableZstd<W> {
    out: W,
    pending: Vec<u8>,
    /// Compressed and uncompressed size of each frame.
    frames: Vec<[u32; 2]>,
}

impl<W: Write> SeekableZstd<W> {
    fn new(out: W) -> Self {
        Self { out, pending: Vec::with_capacity(FRAME), frames: Vec::new() }
    }

    fn end_frame(&mut self) -> io::Result<()> {
        let frame = zstd::bulk::compress(&self.pending, ZSTD_LEVEL)?;
        self.frames.push([frame.len() as u32, self.pending.len() as u32]);
        self.pending.clear();
        self.out.write_all(&frame)
    }

    fn finish(mut self) -> io::Result<()> {
        if !self.pending.is_empty() {
            self.end_frame()?;
        }
        let mut table = Vec::new();
        for sizes in &self.frames {
            table.extend(sizes.iter().flat_map(|size| size.to_le_bytes()));
        }
        // Footer: number of frames, descriptor (no checksums), magic of the seekable format.
        table.extend((self.frames.len() as u32).to_le_bytes());
        table.push(0);
        table.extend(0x8f92_eab1_u32.to_le_bytes());
        // A skippable frame, so that plain decoders pass over it.
        self.out.write_all(&0x184d_2a5e_u32.to_le_bytes())?;
        self.out.write_all(&(table.len() as u32).to_le_bytes())?;
        self.out.write_all(&table)?;
        self.out.flush()
    }
}

impl<W: Write> Write for SeekableZstd<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(FRAME - self.pending.len());
        self.pending.extend_from_slice(&bytes[..n]);
        if self.pending.len() == FRAME {
            self.end_frame()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn packs_the_same_tree_to_the_same_bytes_in_every_compression() {
        let tree = tempfile::tempdir().unwrap();
        let at = |name: &str| tree.path().join(name);
        fs::create_dir(at("etc")).unwrap();
        fs::write(at("etc/one"), b"one").unwrap();
        fs::set_permissions(at("etc/one"), fs::Permissions::from_mode(0o4750)).unwrap();
        fs::hard_link(at("etc/one"), at("etc/two")).unwrap();
        symlink("../one", at("etc/link")).unwrap();
        let long = format!("etc/{}", "n".repeat(200));
        fs::write(at(&long), vec![7; FRAME + 5]).unwrap();

        let (plain, digest) = write_tar(tree.path(), Vec::new()).unwrap();
        for compression in [Compression::Gzip, Compression::Zstd, Compression::ZstdSeekable] {
            let packed = tempfile::NamedTempFile::new().unwrap();
            let diff_id = pack(tree.path(), compression, packed.reopen().unwrap()).unwrap();
            assert_eq!(diff_id, digest);
            let mut unpacked = Vec::new();
            if compression == Compression::Gzip {
                flate2::read::GzDecoder::new(packed.reopen().unwrap()).read_to_end(&mut unpacked).unwrap();
            } else {
                zstd::Decoder::new(packed.reopen().unwrap()).unwrap().read_to_end(&mut unpacked).unwrap();
            }
            assert!(unpacked == plain, "{compression:?}");
        }

        let mut names = Vec::new();
        for entry in tar::Archive::new(plain.as_slice()).entries().unwrap() {
            let entry = entry.unwrap();
            let link = entry.link_name().unwrap().map(|link| link.display().to_string());
            names.push((entry.path().unwrap().display().to_string(), entry.header().entry_type(), link));
            assert!(entry.header().mtime().unwrap() <= SOURCE_DATE_EPOCH);
        }
        let expected = [
            ("etc".to_owned(), EntryType::Directory, None),
            ("etc/link".to_owned(), EntryType::Symlink, Some("../one".to_owned())),
            (long, EntryType::Regular, None),
            ("etc/one".to_owned(), EntryType::Regular, None),
            ("etc/two".to_owned(), EntryType::Link, Some("etc/one".to_owned())),
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn ends_seekable_zstd_with_a_table_of_its_frames() {
        let mut frames = SeekableZstd::new(Vec::new());
        frames.write_all(&vec![1; 2 * FRAME + 1]).unwrap();
        let mut out = Vec::new();
        std::mem::swap(&mut out, &mut frames.out);
        let mut frames = SeekableZstd { out: &mut out, pending: frames.pending, frames: frames.frames };
        let sizes: Vec<u32> = frames.frames.iter().map(|sizes| sizes[1]).collect();
        assert_eq!(sizes, [FRAME as u32, FRAME as u32]);
        frames.flush().unwrap();
        frames.finish().unwrap();
        let footer = &out[out.len() - 9..];
        assert_eq!(footer[..4], 3_u32.to_le_bytes());
        assert_eq!(footer[5..], 0x8f92_eab1_u32.to_le_bytes());
    }
}
