//! One pass over a layer blob: decompress on one thread, hash, store and walk on the caller's.
//!
//! The decompressing thread sends chunks; a chunk that begins a span says so. The consumer hashes every chunk
//! (sha256 for the diff id, BLAKE3 for the span), writes it to the sink and then lets the walk read it. When
//! either side fails, the channel closes and the other side ends.

use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use tdfs_common::digest::{ContentHasher, Digest, DigestWriter};
use tdfs_common::layer_index::{Compression, Layer, SPAN_MAX, SPAN_TARGET, SPANS_MAX, Span, Window};

use super::{LayerError, gzip, zstd};

/// Bytes per chunk, and per read of the blob.
const CHUNK: usize = 256 << 10;
/// Chunks on their way at most.
const QUEUE: usize = 8;
/// zstd level for windows: shipped once, read seldom.
const WINDOW_LEVEL: i32 = 9;

/// Where decompression can start.
pub(super) struct Cut {
    /// First whole byte in the blob.
    pub in_offset: u64,
    /// High bits of the byte before that belong to the span.
    pub bits: u8,
    /// The deflate window, raw.
    pub window: Option<Vec<u8>>,
}

struct Chunk {
    bytes: Vec<u8>,
    cut: Option<Cut>,
}

/// The compressed side, as decoders see it.
pub(super) struct Input<R> {
    blob: R,
    buf: Vec<u8>,
    pos: usize,
    end: usize,
    read: u64,
}

impl<R: Read> Input<R> {
    pub fn new(blob: R) -> Self {
        Self { blob, buf: vec![0; CHUNK], pos: 0, end: 0, read: 0 }
    }

    /// Bytes not consumed yet, at least one unless the blob has ended.
    pub fn fill(&mut self) -> Result<&[u8], LayerError> {
        if self.pos == self.end {
            self.end = loop {
                match self.blob.read(&mut self.buf) {
                    Ok(n) => break n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(LayerError::Read(e)),
                }
            };
            self.pos = 0;
            self.read += self.end as u64;
        }
        Ok(&self.buf[self.pos..self.end])
    }

    /// Consumes `n` of the bytes that [`fill`](Self::fill) returned.
    pub fn consume(&mut self, n: usize) {
        self.pos += n;
    }

    /// The next byte; `None` at the end.
    pub fn byte(&mut self) -> Result<Option<u8>, LayerError> {
        let byte = self.fill()?.first().copied();
        self.pos += usize::from(byte.is_some());
        Ok(byte)
    }

    /// Offset of the next byte in the blob.
    pub fn offset(&self) -> u64 {
        self.read - (self.end - self.pos) as u64
    }

    /// An error about what is here.
    pub fn damaged(&self, reason: impl Into<String>) -> LayerError {
        LayerError::Compressed { offset: self.offset(), reason: reason.into() }
    }

    fn drain(&mut self) -> Result<(), LayerError> {
        while !self.fill()?.is_empty() {
            self.pos = self.end;
        }
        Ok(())
    }
}

/// A blob that is hashed while it is read.
struct Hashed<R> {
    blob: R,
    digest: DigestWriter,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.blob.read(buf)?;
        self.digest.update(&buf[..n]);
        Ok(n)
    }
}

/// The uncompressed side, as decoders see it.
pub(super) struct Output {
    to: SyncSender<Chunk>,
    spare: Receiver<Vec<u8>>,
    chunk: Chunk,
    cut: Option<Cut>,
    total: u64,
    span_start: u64,
    limit: u64,
}

impl Output {
    /// Whether the span has grown long enough to end at the next opportunity.
    pub fn wants_cut(&self) -> bool {
        self.total - self.span_start >= SPAN_TARGET
    }

    /// Lets a span start with the next byte; a later cut before that byte replaces this one.
    pub fn cut(&mut self, cut: Cut) {
        self.cut = Some(cut);
    }

    /// Takes the next uncompressed bytes.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), LayerError> {
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.len() as u64 > self.limit - self.total {
            return Err(LayerError::TooLarge { what: "uncompressed bytes", limit: self.limit });
        }
        if let Some(cut) = self.cut.take() {
            self.send()?;
            self.chunk.cut = Some(cut);
            self.span_start = self.total;
        }
        self.total += bytes.len() as u64;
        while !bytes.is_empty() {
            if self.chunk.bytes.len() == CHUNK {
                self.send()?;
            }
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - self.chunk.bytes.len()));
            self.chunk.bytes.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), LayerError> {
        if self.chunk.bytes.is_empty() {
            return Ok(());
        }
        let mut bytes = self.spare.try_recv().unwrap_or_else(|_| Vec::with_capacity(CHUNK));
        bytes.clear();
        let chunk = std::mem::replace(&mut self.chunk, Chunk { bytes, cut: None });
        self.to.send(chunk).map_err(|_| LayerError::Abandoned)
    }
}

/// The uncompressed layer, as the walk reads it.
pub(super) struct Stream<'a> {
    from: Receiver<Chunk>,
    spare: Sender<Vec<u8>>,
    sink: &'a mut dyn Write,
    windows: &'a mut dyn Write,
    windows_len: u64,
    chunk: Vec<u8>,
    pos: usize,
    received: u64,
    diff_id: DigestWriter,
    hash: ContentHasher,
    spans: Vec<Span>,
    /// Cleared when the layer turns out not to be accessible at random.
    spanned: bool,
}

impl Stream<'_> {
    /// Offset of the next byte in the uncompressed layer.
    pub fn offset(&self) -> u64 {
        self.received - (self.chunk.len() - self.pos) as u64
    }

    /// Bytes not consumed yet, at least one unless the layer has ended.
    fn fill(&mut self) -> Result<&[u8], LayerError> {
        if self.pos == self.chunk.len() {
            self.pos = 0;
            let used = match self.from.recv() {
                Ok(Chunk { bytes, cut }) => {
                    if let Some(cut) = cut {
                        self.start_span(cut)?;
                    }
                    std::mem::replace(&mut self.chunk, bytes)
                }
                Err(_) => std::mem::take(&mut self.chunk),
            };
            // Nobody may need the buffer any more.
            let _ = self.spare.send(used);
            self.received += self.chunk.len() as u64;
            self.diff_id.update(&self.chunk);
            if self.spanned {
                self.hash.update(&self.chunk);
            }
            self.sink.write_all(&self.chunk).map_err(LayerError::Write)?;
        }
        Ok(&self.chunk[self.pos..])
    }

    /// Hands the next `n` bytes to `each`, piece by piece; false when the layer ends before.
    pub fn take(&mut self, mut n: u64, mut each: impl FnMut(&[u8])) -> Result<bool, LayerError> {
        while n > 0 {
            let bytes = self.fill()?;
            if bytes.is_empty() {
                return Ok(false);
            }
            let bytes = &bytes[..bytes.len().min(usize::try_from(n).unwrap_or(usize::MAX))];
            each(bytes);
            let len = bytes.len();
            self.pos += len;
            n -= len as u64;
        }
        Ok(true)
    }

    fn drain(&mut self) -> Result<(), LayerError> {
        while !self.fill()?.is_empty() {
            self.pos = self.chunk.len();
        }
        Ok(())
    }

    fn start_span(&mut self, cut: Cut) -> Result<(), LayerError> {
        self.end_span();
        if !self.spanned {
            return Ok(());
        }
        let window = match cut.window {
            None => None,
            Some(raw) => {
                let packed = ::zstd::bulk::compress(&raw, WINDOW_LEVEL).map_err(LayerError::Write)?;
                self.windows.write_all(&packed).map_err(LayerError::Write)?;
                let window = Window { offset: self.windows_len, len: packed.len() as u32 };
                self.windows_len += packed.len() as u64;
                Some(window)
            }
        };
        let hash = self.hash.finish();
        let (out_offset, in_offset, bits) = (self.received, cut.in_offset, cut.bits);
        self.spans.push(Span { out_offset, in_offset, bits, window, hash });
        Ok(())
    }

    fn end_span(&mut self) {
        if let Some(span) = self.spans.last_mut() {
            span.hash = std::mem::take(&mut self.hash).finish();
            self.spanned &= self.received - span.out_offset <= SPAN_MAX;
        }
        self.spanned &= self.spans.len() < SPANS_MAX;
        if !self.spanned {
            self.spans = Vec::new();
        }
    }
}

/// Reads `blob` to its end and gives the uncompressed stream to `walk`, which may stop early.
pub(super) fn scan<T>(
    blob: impl Read + Send,
    compression: Compression,
    limit: u64,
    mut tar: impl Write,
    windows: &mut impl Write,
    walk: impl FnOnce(&mut Stream<'_>) -> Result<T, LayerError>,
) -> Result<(Layer, T), LayerError> {
    let (to, from) = sync_channel(QUEUE);
    let (give, spare) = channel();
    let chunk = Chunk { bytes: Vec::with_capacity(CHUNK), cut: None };
    let out = Output { to, spare, chunk, cut: None, total: 0, span_start: 0, limit };
    let mut stream = Stream {
        from,
        spare: give,
        sink: &mut tar,
        windows,
        windows_len: 0,
        chunk: Vec::new(),
        pos: 0,
        received: 0,
        diff_id: DigestWriter::default(),
        hash: ContentHasher::default(),
        spans: Vec::new(),
        spanned: true,
    };
    std::thread::scope(|scope| {
        let decoder = scope.spawn(move || decode(blob, compression, out));
        let walked = walk(&mut stream).and_then(|value| stream.drain().map(|()| value));
        let Stream { from, received, diff_id, spans, .. } = {
            stream.end_span();
            stream
        };
        // Wakes a decoder that waits for room.
        drop(from);
        let decoded = decoder.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (value, (blob, blob_size)) = match (walked, decoded) {
            (Ok(value), Ok(blob)) => (value, blob),
            (Ok(_) | Err(LayerError::Truncated { .. }), Err(e)) | (Err(e), _) => return Err(e),
        };
        let mut layer =
            Layer { blob, blob_size, diff_id: diff_id.finish(), size: received, compression, spans };
        let too_far = |n| {
            let range = layer.span_in(n);
            range.end - range.start > 2 * SPAN_MAX
        };
        if (0..layer.spans.len()).any(too_far) {
            layer.spans = Vec::new();
        }
        Ok((layer, value))
    })
}

fn decode<R: Read>(blob: R, compression: Compression, mut out: Output) -> Result<(Digest, u64), LayerError> {
    let mut input = Input::new(Hashed { blob, digest: DigestWriter::default() });
    match compression {
        Compression::None => copy(&mut input, &mut out)?,
        Compression::Gzip => gzip::decode(&mut input, &mut out)?,
        Compression::Zstd => zstd::decode(&mut input, &mut out)?,
    }
    out.send()?;
    input.drain()?;
    Ok((input.blob.digest.finish(), input.read))
}

fn copy<R: Read>(input: &mut Input<R>, out: &mut Output) -> Result<(), LayerError> {
    loop {
        let at = input.offset();
        if at.is_multiple_of(SPAN_TARGET) {
            out.cut(Cut { in_offset: at, bits: 0, window: None });
        }
        let bytes = input.fill()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let to_cut = SPAN_TARGET - at % SPAN_TARGET;
        let len = bytes.len().min(to_cut as usize);
        out.write(&bytes[..len])?;
        input.consume(len);
    }
}
