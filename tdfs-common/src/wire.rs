//! What a node and a page service say to each other: one request, one stream of everything that is missing.
//!
//! ```text
//! node                                                       page service
//!   POST /tdfs/v1/REPOSITORY/pages      [`Request`] in an envelope, at most [`REQUEST_MAX`] bytes
//!   -------------------------------------------------------->
//!   <--------------------------------------------------------
//!   200 [`STREAM_TYPE`]                 header, then units:
//!   [Blob]* [Plan] [Frame | Cut | Blob]* [End]
//! ```
//!
//! A node that starts an image for the first time knows neither manifest nor page table. It says which pages of which
//! segments it holds: a segment is named by its digest, so what it holds of a group it once fetched counts for every
//! other service of the group. The answer is the metadata, then the frames that lack pages, in order of first use.
//! Frames come as they are stored, or as a *cut* with only the pages that are missing and a [`proof`] that
//! they belong to the frame.
//!
//! The stream begins with
//!
//! ```text
//!  0  magic     8 bytes "TDFSPAGE"
//!  8  version   u16 LE, 1
//! 10  reserved  u16, zero
//! 12  compat    u32 LE, features a reader may ignore
//! 16  incompat  u32 LE, features a reader must know
//! 20  reserved  u32, zero
//! ```
//!
//! and each unit with
//!
//! ```text
//!                         Blob             Plan          Frame         Cut              End
//!  0  kind      u8        1                2             3             4                5
//!  1  flags     u8        0                0             1 if plain    1 if plain       0
//!  2  count     u16 LE    part             0             0             chaining values  reason
//!  4  len       u32 LE    bytes of the body, for each kind
//!  8  first     u32 LE    bytes of type    0             segment       segment          0
//! 12  second    u32 LE    0                frames        frame         frame            0
//! 16  pages     u64 LE    0                pages         0             set of pages     0
//! 24  bytes     u64 LE    0                bytes         0             0                0
//! 32  body                sha256, media    none          the frame     chaining values, a message
//!                         type, content                                then the pages
//! ```
//!
//! `segment` and `frame` are places in the service's list of segments and in that segment's frames. A frame's body is
//! what the segment blob holds or, plain, its pages uncompressed; the pages of a cut are one zstd frame or plain. A
//! stream without an end is broken off, and what came before is good.
//!
//! A reader survives any bytes: [`Head::decode`] checks a unit's lengths against hard limits before anything is
//! allocated for its body. Fields a kind does not use are zero.

use bincode::{Decode, Encode};
use blake3::hazmat::ChainingValue;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::bitmap::PageBitmap;
use crate::digest::Digest;
use crate::envelope::{Format, FormatError, ensure};
use crate::layer_index::LayerIndex;
use crate::page::PAGE_SIZE;
use crate::proof::{self, PageSet};
use crate::runtime_image::{FRAME_PAGES, Service};
use crate::tree::Tree;

/// Media type of a request.
pub const REQUEST_TYPE: &str = "application/vnd.tdfs.pages-request.v1";
/// Media type of an answer.
pub const STREAM_TYPE: &str = "application/vnd.tdfs.pages.v1";
/// Header field of every answer of a page service, also of refusals: tells them from those of a server that has none.
pub const SERVICE_HEADER: &str = "tdfs-page-service";
/// Bytes of a request, compressed.
pub const REQUEST_MAX: usize = 1 << 20;
/// Metadata blobs a request names.
pub const KNOWN_MAX: usize = 64;
/// Segments a request names.
pub const HELD_MAX: usize = 1024;
/// Bytes of a stream's header.
pub const STREAM_HEADER_LEN: usize = size_of::<RawStreamHeader>();
/// Bytes of a unit's header.
pub const HEAD_LEN: usize = size_of::<RawHead>();
/// Bytes of a message in an [`End`](Kind::End).
pub const MESSAGE_MAX: usize = 512;

const NAME: &str = "page stream";
const MAGIC: [u8; 8] = *b"TDFSPAGE";
const VERSION: u16 = 1;
const VALUE_LEN: usize = size_of::<ChainingValue>();
const DIGEST_LEN: usize = 32;
const MEDIA_TYPE_MAX: usize = 255;
const PLAIN: u8 = 1;

/// What a node asks for.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Request {
    /// Of which runtime image.
    pub wanted: Wanted,
    /// What the node has, each segment once; every other page the service needs is sent.
    pub held: Vec<Held>,
    /// How the node would like pages to be sent.
    pub encoding: Encoding,
}

/// Metadata and pages, or pages only.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Wanted {
    /// The image at `reference`, its runtime image and the pages.
    Image {
        /// Tag or digest in the repository.
        reference: Reference,
        /// Which image to take out of an index: `os/architecture[/variant]`.
        platform: String,
        /// Which runtime image.
        choice: Choice,
        /// Metadata blobs that need not be sent.
        known: Vec<Digest>,
    },
    /// The pages of a runtime image whose metadata the node has.
    Pages {
        /// The image manifest.
        image: Digest,
        /// The artifact manifest.
        artifact: Digest,
    },
}

/// How an image is named in its repository.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Reference {
    /// By tag.
    Tag(String),
    /// By the digest of a manifest or index.
    Digest(Digest),
}

/// Which runtime image of an image.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Choice {
    /// The only one there is; where there is none, the image alone is sent.
    Any,
    /// The newest of this service.
    Service(String),
    /// This artifact manifest.
    Pinned(Digest),
}

/// Pages of a segment that the node holds.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Held {
    /// The segment's blob.
    pub segment: Digest,
    /// Which of its pages.
    pub pages: HeldPages,
}

/// Some or all pages of a segment.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum HeldPages {
    /// All.
    All,
    /// Bit `n & 7` of byte `n >> 3` is page `n` of the segment; pages past the end are not held.
    Some(Vec<u8>),
}

/// How pages travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Encoding {
    /// Compressed, whole frames as they are stored.
    Stored,
    /// Uncompressed, as far as the server has time for it.
    Plain,
}

/// What a blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// An index on the way to the image manifest, the outermost first.
    Index = 1,
    /// The image manifest.
    Image = 2,
    /// The image configuration.
    Config = 3,
    /// The artifact manifest.
    Artifact = 4,
    /// Service metadata.
    Service = 5,
    /// The tree.
    Tree = 6,
    /// The layer index.
    LayerIndex = 7,
}

/// How much is going to come; for progress, nothing relies on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Frames and cuts.
    pub frames: u32,
    /// Pages in them.
    pub pages: u64,
    /// Bytes of their bodies, an estimate.
    pub bytes: u64,
}

/// Why a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Everything was sent.
    Complete = 0,
    /// The server cannot read what is missing.
    Unavailable = 1,
    /// What the server has stored is damaged.
    Damaged = 2,
}

/// The header of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// What comes.
    pub kind: Kind,
    /// Bytes of the body.
    pub len: usize,
}

/// What a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A metadata blob; see [`blob_body`].
    Blob {
        /// Which.
        part: Part,
        /// Bytes of the media type.
        media_type_len: usize,
    },
    /// How much comes.
    Plan(Plan),
    /// A whole frame.
    Frame {
        /// Where it belongs.
        at: FrameAt,
        /// Whether the body is uncompressed.
        plain: bool,
    },
    /// Some pages of a frame; see [`cut_body`].
    Cut {
        /// Where they belong.
        at: FrameAt,
        /// Which.
        set: PageSet,
        /// Chaining values before the pages.
        values: usize,
        /// Whether the pages are uncompressed.
        plain: bool,
    },
    /// The end; the body is a message.
    End(Reason),
}

/// The place of a frame in a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameAt {
    /// Place in [`Service::segments`].
    pub segment: u32,
    /// Place in that segment's frames.
    pub frame: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawStreamHeader {
    magic: [u8; 8],
    version: U16,
    reserved_10: U16,
    compat: U32,
    incompat: U32,
    reserved_20: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    kind: u8,
    flags: u8,
    count: U16,
    len: U32,
    first: U32,
    second: U32,
    pages: U64,
    bytes: U64,
}

impl Request {
    /// What the node holds of a segment of `pages` pages, page 0 being the segment's first.
    pub fn held_of(&self, segment: &Digest, pages: u64) -> PageBitmap {
        match self.held.iter().find(|h| h.segment == *segment).map(|h| &h.pages) {
            Some(HeldPages::All) => {
                let mut all = PageBitmap::new(pages);
                all.insert_range(0..pages);
                all
            }
            Some(HeldPages::Some(bits)) => PageBitmap::from_bytes(bits, pages),
            None => PageBitmap::new(pages),
        }
    }
}

impl Format for Request {
    const MAGIC: [u8; 8] = *b"TDFSPREQ";
    const VERSION: u16 = 1;
    /// Bits for 16 million pages, 64 GiB, and some.
    const MAX_BYTES: usize = 2 << 20;
    const NAME: &'static str = "page request";

    fn validate(&self) -> Result<(), FormatError> {
        let ok = |c: bool, reason: &str| ensure(c, Self::NAME, || reason.to_owned());
        ok(self.held.len() <= HELD_MAX, "too many segments")?;
        let mut segments: Vec<&Digest> = self.held.iter().map(|h| &h.segment).collect();
        segments.sort_unstable();
        ok(segments.is_sorted_by(|a, b| a < b), "a segment twice")?;
        if let Wanted::Image { reference, platform, choice, known } = &self.wanted {
            ok(known.len() <= KNOWN_MAX, "too many known blobs")?;
            ok(platform.len() <= 128, "platform too long")?;
            if let Reference::Tag(tag) = reference {
                ok(!tag.is_empty() && tag.len() <= 128, "tag empty or too long")?;
            }
            if let Choice::Service(name) = choice {
                ok(name.len() <= 4096, "service name too long")?;
            }
        }
        Ok(())
    }
}

impl Part {
    const ALL: [Self; 7] =
        [Self::Index, Self::Image, Self::Config, Self::Artifact, Self::Service, Self::Tree, Self::LayerIndex];

    /// Bytes of the blob at most.
    pub fn limit(self) -> usize {
        match self {
            Self::Index | Self::Image | Self::Artifact => 4 << 20,
            Self::Config => 8 << 20,
            Self::Service => Service::MAX_BYTES,
            Self::Tree => Tree::MAX_BYTES,
            Self::LayerIndex => LayerIndex::MAX_BYTES,
        }
    }
}

/// The first bytes of a stream.
pub fn stream_header() -> [u8; STREAM_HEADER_LEN] {
    let zero = U32::ZERO;
    zerocopy::transmute!(RawStreamHeader {
        magic: MAGIC,
        version: U16::new(VERSION),
        reserved_10: U16::ZERO,
        compat: zero,
        incompat: zero,
        reserved_20: zero,
    })
}

/// Whether this code can read the stream that begins with `bytes`.
pub fn check_stream_header(bytes: &[u8; STREAM_HEADER_LEN]) -> Result<(), FormatError> {
    let header: &RawStreamHeader = zerocopy::transmute_ref!(bytes);
    if header.magic != MAGIC {
        return Err(FormatError::Magic(NAME));
    }
    let version = header.version.get();
    if version != VERSION {
        return Err(FormatError::Version { name: NAME, version, supported: VERSION });
    }
    let flags = header.incompat.get();
    if flags != 0 {
        return Err(FormatError::Incompatible { name: NAME, flags });
    }
    ensure(header.reserved_10 == U16::ZERO && header.reserved_20 == U32::ZERO, NAME, || {
        "reserved bytes are not zero".to_owned()
    })
}

impl Head {
    /// The head of a blob of `size` bytes, and what its body holds before them; `None` where it is over a limit.
    pub fn blob(part: Part, media_type: &str, digest: &Digest, size: u64) -> Option<(Self, Vec<u8>)> {
        let media_type_len = media_type.len();
        if media_type_len > MEDIA_TYPE_MAX || size > part.limit() as u64 {
            return None;
        }
        let start = [&digest.as_bytes()[..], media_type.as_bytes()].concat();
        let len = start.len() + size as usize;
        Some((Self { kind: Kind::Blob { part, media_type_len }, len }, start))
    }

    /// The 32 bytes that stand for it.
    pub fn encode(&self) -> [u8; HEAD_LEN] {
        let mut raw = RawHead {
            kind: 0,
            flags: 0,
            count: U16::ZERO,
            len: U32::new(self.len as u32),
            first: U32::ZERO,
            second: U32::ZERO,
            pages: U64::ZERO,
            bytes: U64::ZERO,
        };
        match self.kind {
            Kind::Blob { part, media_type_len } => {
                (raw.kind, raw.count) = (1, U16::new(part as u16));
                raw.first = U32::new(media_type_len as u32);
            }
            Kind::Plan(plan) => {
                (raw.kind, raw.second) = (2, U32::new(plan.frames));
                (raw.pages, raw.bytes) = (U64::new(plan.pages), U64::new(plan.bytes));
            }
            Kind::Frame { at, plain } => {
                (raw.kind, raw.flags) = (3, u8::from(plain));
                (raw.first, raw.second) = (U32::new(at.segment), U32::new(at.frame));
            }
            Kind::Cut { at, set, values, plain } => {
                (raw.kind, raw.flags, raw.count) = (4, u8::from(plain), U16::new(values as u16));
                (raw.first, raw.second) = (U32::new(at.segment), U32::new(at.frame));
                raw.pages = U64::new(set);
            }
            Kind::End(reason) => (raw.kind, raw.count) = (5, U16::new(reason as u16)),
        }
        zerocopy::transmute!(raw)
    }

    /// Reads a head and holds its lengths against every limit.
    pub fn decode(bytes: &[u8; HEAD_LEN]) -> Result<Self, FormatError> {
        let raw: &RawHead = zerocopy::transmute_ref!(bytes);
        let bad = |reason: &str| FormatError::Invalid { name: NAME, reason: reason.to_owned() };
        let len = raw.len.get() as usize;
        let at = FrameAt { segment: raw.first.get(), frame: raw.second.get() };
        let plain = raw.flags == PLAIN;
        let kind = match raw.kind {
            1 => {
                let part = Part::ALL.into_iter().find(|p| *p as u16 == raw.count.get());
                let part = part.ok_or_else(|| bad("unknown part"))?;
                Kind::Blob { part, media_type_len: raw.first.get() as usize }
            }
            2 => {
                Kind::Plan(Plan { frames: raw.second.get(), pages: raw.pages.get(), bytes: raw.bytes.get() })
            }
            3 => Kind::Frame { at, plain },
            4 => Kind::Cut { at, set: raw.pages.get(), values: usize::from(raw.count.get()), plain },
            5 => Kind::End(match raw.count.get() {
                0 => Reason::Complete,
                1 => Reason::Unavailable,
                2 => Reason::Damaged,
                _ => return Err(bad("unknown reason")),
            }),
            _ => return Err(bad("unknown kind")),
        };
        let head = Self { kind, len };
        if !head.is_possible() {
            return Err(bad("a unit of an impossible length"));
        }
        // Whatever the kind does not use is zero: there is one spelling of each head.
        if head.encode() != *bytes {
            return Err(bad("a field that is not used is not zero"));
        }
        Ok(head)
    }

    fn is_possible(&self) -> bool {
        let len = self.len;
        let frame_max = FRAME_PAGES as usize * PAGE_SIZE;
        match self.kind {
            Kind::Blob { part, media_type_len } => {
                let before = DIGEST_LEN + media_type_len;
                media_type_len <= MEDIA_TYPE_MAX && len >= before && len - before <= part.limit()
            }
            Kind::Plan(_) => len == 0,
            Kind::Frame { plain, .. } => {
                len > 0 && len <= frame_max && (!plain || len.is_multiple_of(PAGE_SIZE))
            }
            Kind::Cut { set, values, plain, .. } => {
                let raw = set.count_ones() as usize * PAGE_SIZE;
                let before = values * VALUE_LEN;
                let bytes = len.saturating_sub(before);
                values <= proof::VALUES_MAX && bytes > 0 && bytes <= raw && (!plain || bytes == raw)
            }
            Kind::End(_) => len <= MESSAGE_MAX,
        }
    }
}

/// A blob's digest, media type and content. The content is not verified.
pub fn blob_body(media_type_len: usize, body: &[u8]) -> Result<(Digest, &str, &[u8]), FormatError> {
    let bad = |reason: &str| FormatError::Invalid { name: NAME, reason: reason.to_owned() };
    let (digest, rest) = body.split_first_chunk::<DIGEST_LEN>().ok_or_else(|| bad("blob too short"))?;
    let (media_type, content) = rest.split_at_checked(media_type_len).ok_or_else(|| bad("blob too short"))?;
    let media_type = std::str::from_utf8(media_type).map_err(|_| bad("media type is no text"))?;
    Ok((Digest::from_bytes(*digest), media_type, content))
}

/// The chaining values and the pages of a cut; neither is verified.
pub fn cut_body(values: usize, body: &[u8]) -> Result<(Vec<ChainingValue>, &[u8]), FormatError> {
    let bad = || FormatError::Invalid { name: NAME, reason: "cut too short".to_owned() };
    let (proof, pages) = body.split_at_checked(values.saturating_mul(VALUE_LEN)).ok_or_else(bad)?;
    Ok((proof.as_chunks().0.to_vec(), pages))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::envelope::{decode, encode};

    fn digest() -> impl Strategy<Value = Digest> {
        any::<u64>().prop_map(|n| Digest::of(&n.to_le_bytes()))
    }

    fn wanted() -> impl Strategy<Value = Wanted> {
        let reference =
            prop_oneof!["[a-z0-9.]{1,128}".prop_map(Reference::Tag), digest().prop_map(Reference::Digest)];
        let choice = prop_oneof![
            Just(Choice::Any),
            ".{0,100}".prop_map(Choice::Service),
            digest().prop_map(Choice::Pinned)
        ];
        let known = proptest::collection::vec(digest(), 0..=KNOWN_MAX);
        let image = (reference, "[a-z0-9/]{0,128}", choice, known).prop_map(
            |(reference, platform, choice, known)| Wanted::Image { reference, platform, choice, known },
        );
        prop_oneof![
            image,
            (digest(), digest()).prop_map(|(image, artifact)| Wanted::Pages { image, artifact })
        ]
    }

    fn request() -> impl Strategy<Value = Request> {
        let bits = proptest::collection::vec(any::<u8>(), 0..300);
        let pages = prop_oneof![Just(HeldPages::All), bits.prop_map(HeldPages::Some)];
        let held = (digest(), pages).prop_map(|(segment, pages)| Held { segment, pages });
        let encoding = prop_oneof![Just(Encoding::Stored), Just(Encoding::Plain)];
        (wanted(), proptest::collection::vec(held, 0..20), encoding).prop_map(
            |(wanted, mut held, encoding)| {
                held.sort_by_key(|h| h.segment);
                held.dedup_by_key(|h| h.segment);
                Request { wanted, held, encoding }
            },
        )
    }

    fn head() -> impl Strategy<Value = Head> {
        let at = || (any::<u32>(), any::<u32>()).prop_map(|(segment, frame)| FrameAt { segment, frame });
        let blob =
            (0..Part::ALL.len(), 0..=255usize, 0..1000usize).prop_map(|(part, media_type_len, len)| Head {
                kind: Kind::Blob { part: Part::ALL[part], media_type_len },
                len: DIGEST_LEN + media_type_len + len,
            });
        let plan = any::<(u32, u64, u64)>().prop_map(|(frames, pages, bytes)| Head {
            kind: Kind::Plan(Plan { frames, pages, bytes }),
            len: 0,
        });
        let frame = (at(), any::<bool>(), 1..=64usize).prop_map(|(at, plain, pages)| Head {
            kind: Kind::Frame { at, plain },
            len: pages * PAGE_SIZE - usize::from(!plain),
        });
        let cut =
            (at(), 1..u64::MAX, 0..=proof::VALUES_MAX, any::<bool>()).prop_map(|(at, set, values, plain)| {
                Head {
                    kind: Kind::Cut { at, set, values, plain },
                    len: values * VALUE_LEN + set.count_ones() as usize * PAGE_SIZE - usize::from(!plain),
                }
            });
        let reason = prop_oneof![Just(Reason::Complete), Just(Reason::Unavailable), Just(Reason::Damaged)];
        let end = (reason, 0..=MESSAGE_MAX).prop_map(|(reason, len)| Head { kind: Kind::End(reason), len });
        prop_oneof![blob, plan, frame, cut, end]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn requests_round_trip_and_truncated_ones_are_refused(request in request()) {
            let bytes = encode(&request).unwrap();
            prop_assert_eq!(decode::<Request>(&bytes).unwrap(), request);
            for len in 0..bytes.len() {
                prop_assert!(decode::<Request>(&bytes[..len]).is_err());
            }
        }

        #[test]
        fn heads_round_trip_and_every_flipped_bit_is_another_head_or_none(head in head(), bit in 0..HEAD_LEN * 8) {
            let mut bytes = head.encode();
            prop_assert_eq!(Head::decode(&bytes).unwrap(), head);
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(other) = Head::decode(&bytes) {
                prop_assert_ne!(other, head);
                prop_assert_eq!(other.encode(), bytes);
            }
        }

        #[test]
        fn any_head_is_refused_or_within_the_limits(bytes in any::<[u8; HEAD_LEN]>(), kind in 0u8..7, flags in 0u8..3) {
            let mut bytes = bytes;
            (bytes[0], bytes[1]) = (kind, flags);
            if let Ok(Head { kind, len }) = Head::decode(&bytes) {
                let limit = match kind {
                    Kind::Blob { part, .. } => part.limit() + 32 + 255,
                    Kind::Plan(_) => 0,
                    Kind::Frame { .. } => 64 * 4096,
                    Kind::Cut { .. } => 64 * 4096 + 32 * 32,
                    Kind::End(_) => MESSAGE_MAX,
                };
                prop_assert!(len <= limit);
            }
        }

        #[test]
        fn any_body_is_read_or_refused(body in proptest::collection::vec(any::<u8>(), 0..400), n in 0usize..400) {
            if let Ok((digest, media_type, content)) = blob_body(n, &body) {
                let back = [&digest.as_bytes()[..], media_type.as_bytes(), content].concat();
                prop_assert_eq!(back, body.clone());
            }
            match cut_body(n, &body) {
                Ok((values, pages)) => prop_assert_eq!([values.as_flattened(), pages].concat(), body),
                Err(_) => prop_assert!(n * 32 > body.len()),
            }
        }
    }

    #[test]
    fn a_head_says_its_limits() {
        let refused = |kind, len| Head::decode(&Head { kind, len }.encode()).is_err();
        let at = FrameAt { segment: 0, frame: 0 };
        let blob = |part, media_type_len| Kind::Blob { part, media_type_len };
        assert!(refused(blob(Part::Image, 3), 34) && !refused(blob(Part::Image, 3), 35));
        assert!(refused(blob(Part::Image, 0), 33 + (4 << 20)) && refused(blob(Part::Image, 256), 1000));
        assert!(refused(Kind::Plan(Plan::default()), 1));
        assert!(refused(Kind::Frame { at, plain: false }, 0));
        assert!(refused(Kind::Frame { at, plain: false }, 64 * 4096 + 1));
        assert!(refused(Kind::Frame { at, plain: true }, 4095));
        let cut = |set, values, plain| Kind::Cut { at, set, values, plain };
        assert!(
            refused(cut(0, 0, false), 0) && refused(cut(0, 1, false), 32) && refused(cut(1, 1, false), 32)
        );
        assert!(refused(cut(1, 1, false), 33 + 4096) && refused(cut(1, 1, true), 32 + 4095));
        assert!(refused(cut(1, 33, true), 33 * 32 + 4096));
        assert!(refused(Kind::End(Reason::Complete), MESSAGE_MAX + 1));
    }

    #[test]
    fn stream_headers_are_checked() {
        let good = stream_header();
        check_stream_header(&good).unwrap();
        let with = |at: usize| {
            let mut bytes = good;
            bytes[at] ^= 2;
            check_stream_header(&bytes)
        };
        assert!(matches!(with(0), Err(FormatError::Magic(_))));
        assert!(matches!(with(8), Err(FormatError::Version { version: 3, .. })));
        assert!(matches!(with(16), Err(FormatError::Incompatible { flags: 2, .. })));
        assert!(matches!(with(10), Err(FormatError::Invalid { .. })));
        assert!(matches!(with(23), Err(FormatError::Invalid { .. })));
        assert!(with(12).is_ok(), "a compatible feature is ignored");
    }

    #[test]
    fn blobs_over_a_limit_are_not_written() {
        let d = Digest::of(b"");
        let (head, start) = Head::blob(Part::Image, "a/b", &d, 3).unwrap();
        assert_eq!(Head::decode(&head.encode()).unwrap(), head);
        let body = [&start[..], b"xyz"].concat();
        let Kind::Blob { media_type_len, .. } = head.kind else { panic!() };
        assert_eq!(blob_body(media_type_len, &body).unwrap(), (d, "a/b", &b"xyz"[..]));
        assert!(Head::blob(Part::Image, &"x".repeat(256), &d, 0).is_none());
        assert!(Head::blob(Part::Image, "", &d, (4 << 20) + 1).is_none());
    }

    #[test]
    fn requests_over_a_limit_are_refused() {
        let base = Request {
            wanted: Wanted::Pages { image: Digest::of(b"i"), artifact: Digest::of(b"a") },
            held: Vec::new(),
            encoding: Encoding::Stored,
        };
        let held = |pages| Held { segment: Digest::of(b"s"), pages };
        let many = (0..=HELD_MAX as u32)
            .map(|n| Held { segment: Digest::of(&n.to_le_bytes()), ..held(HeldPages::All) })
            .collect();
        let image =
            |reference, choice, known| Wanted::Image { reference, platform: "l/a".into(), choice, known };
        let tag = |len: usize| Reference::Tag("x".repeat(len));
        let bad = [
            Request { held: many, ..base.clone() },
            Request { held: vec![held(HeldPages::All); 2], ..base.clone() },
            Request { wanted: image(tag(0), Choice::Any, vec![]), ..base.clone() },
            Request { wanted: image(tag(129), Choice::Any, vec![]), ..base.clone() },
            Request { wanted: image(tag(1), Choice::Service("x".repeat(4097)), vec![]), ..base.clone() },
            Request {
                wanted: image(tag(1), Choice::Any, vec![Digest::of(b""); KNOWN_MAX + 1]),
                ..base.clone()
            },
        ];
        for request in bad {
            let refused = decode::<Request>(&encode(&request).unwrap());
            assert!(matches!(refused, Err(FormatError::Invalid { .. })));
        }
        let giant = Request { held: vec![held(HeldPages::Some(vec![0; 2 << 20]))], ..base.clone() };
        assert!(matches!(encode(&giant), Err(FormatError::TooLarge { .. })));
        // The same from a client that does not check itself.
        let mut bytes = encode(&base).unwrap();
        bytes[20..24].copy_from_slice(&(u32::MAX).to_le_bytes());
        assert!(matches!(decode::<Request>(&bytes), Err(FormatError::TooLarge { .. })));
    }

    #[test]
    fn held_pages_are_cut_at_the_end_of_their_segment() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let some = |bits: &[u8]| HeldPages::Some(bits.to_vec());
        let request = Request {
            wanted: Wanted::Pages { image: a, artifact: b },
            held: vec![
                Held { segment: a, pages: some(&[0b1101, 0xff]) },
                Held { segment: b, pages: HeldPages::All },
            ],
            encoding: Encoding::Plain,
        };
        assert_eq!(request.held_of(&a, 10).iter().collect::<Vec<_>>(), [0, 2, 3, 8, 9]);
        assert_eq!(request.held_of(&b, 3).count(), 3);
        assert_eq!(request.held_of(&Digest::of(b"c"), 3).count(), 0);
    }
}
