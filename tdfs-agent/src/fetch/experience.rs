//! What this node has learnt about its sources: who has no page service, and what is slower, the wire or the CPU.
//!
//! Kept in `STATE/sources.json`. A missing or damaged file is an empty one, and a file that cannot be written costs a
//! request or a less than perfect choice next time. Of several processes the last one wins.
//!
//! **Plain or compressed.** A frame of `R` bytes uncompressed and `S` stored takes `max(S / wire, R / (decode * cores))`
//! when it is sent as stored, since receiving and decompressing overlap, and `R / wire` when it is sent plain. So plain
//! is faster exactly where `wire > decode * cores`: where the wire brings pages faster than all cores can decompress
//! them. `decode` is bytes of pages per second of one core, hash included; `wire` is bytes per second of the time spent
//! waiting for the network alone, so that a slow CPU does not look like a slow network. Both are averages that halve
//! the weight of the past with each start.
//!
//! **How long a fetch takes** follows from the same two rates ([`Experience::expected`]). A node that fetches for the first
//! time knows at least how fast the metadata came.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tdfs_common::wire::Encoding;
use tempfile::NamedTempFile;

/// How long a server without page service is not asked again.
const ABSENT: Duration = Duration::from_hours(24);
/// Servers remembered.
const HOSTS_MAX: usize = 256;
/// Bytes of the file.
const FILE_MAX: u64 = 256 << 10;
/// Bytes that a measurement needs to mean something.
const SAMPLE_MIN: u64 = 1 << 20;
/// What comes before the pages of a first fetch says more than nothing from this many bytes on: the first few are there at
/// once by any link.
const HINT_MIN: u64 = 64 << 10;
/// Of a network that was not measured yet: 1 Gb/s.
const WIRE: f64 = 125e6;
/// Of a core that was not measured yet.
const DECODE: f64 = 400e6;

/// What was learnt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Experience {
    /// Servers without page service, and when they said so, in seconds since 1970.
    absent: BTreeMap<String, u64>,
    /// Bytes of pages that a core decompresses and verifies in a second.
    decode: Option<f64>,
    /// Bytes that the network brings in a second.
    wire: Option<f64>,
    #[serde(skip)]
    path: PathBuf,
}

/// Bytes and the time they took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Bytes.
    pub bytes: u64,
    /// Seconds.
    pub seconds: f64,
}

impl Experience {
    /// What is remembered in the state directory.
    pub fn load(state: &Path) -> Self {
        let path = state.join("sources.json");
        let small = fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() <= FILE_MAX);
        let read = small.then(|| fs::read(&path).ok()).flatten();
        let mut known: Self = read.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let now = now();
        // A time in the future is damage, or a clock that was wrong.
        known.absent.retain(|_, at| *at <= now && now - *at < ABSENT.as_secs());
        known.path = path;
        known
    }

    /// Whether `host` said lately that it has no page service.
    pub fn is_absent(&self, host: &str) -> bool {
        self.absent.contains_key(host)
    }

    /// `host` has no page service.
    pub fn absent(&mut self, host: &str) {
        if self.absent.len() >= HOSTS_MAX {
            let oldest = self.absent.iter().min_by_key(|(_, at)| **at).map(|(host, _)| host.clone());
            oldest.and_then(|host| self.absent.remove(&host));
        }
        self.absent.insert(host.to_owned(), now());
        self.save();
    }

    /// Adds what was measured during a fetch.
    pub fn measured(&mut self, decode: Sample, wire: Sample) {
        let before = (self.decode, self.wire);
        blend(&mut self.decode, decode);
        blend(&mut self.wire, wire);
        if before != (self.decode, self.wire) {
            self.save();
        }
    }

    /// How pages should be sent.
    pub fn encoding(&self) -> Encoding {
        match (self.wire, self.decode) {
            (Some(wire), Some(decode)) if wire > decode * cores() => Encoding::Plain,
            _ => Encoding::Stored,
        }
    }

    /// How long a fetch takes that brings `pages` bytes of pages in `stored` bytes, after what came `so_far`: receiving and
    /// decompressing overlap.
    pub fn expected(&self, stored: u64, pages: u64, so_far: Sample) -> Duration {
        let hint = so_far.rate().filter(|_| so_far.bytes >= HINT_MIN);
        let wire = stored as f64 / self.wire.or(hint).unwrap_or(WIRE);
        let decode = pages as f64 / (self.decode.unwrap_or(DECODE) * cores());
        // A rate out of a damaged file may be anything.
        Duration::try_from_secs_f64(wire.max(decode)).unwrap_or(Duration::MAX)
    }

    fn save(&self) {
        let written = || {
            let bytes = serde_json::to_vec(self)?;
            let mut file = NamedTempFile::new_in(self.path.parent().unwrap_or(&self.path))?;
            file.write_all(&bytes)?;
            file.persist(&self.path)?;
            Ok::<_, std::io::Error>(())
        };
        if let Err(e) = written() {
            tracing::debug!(path = %self.path.display(), "not remembered: {e}");
        }
    }
}

impl Sample {
    /// Bytes per second, unless it took no time.
    fn rate(self) -> Option<f64> {
        Some(self.bytes as f64 / self.seconds).filter(|rate| rate.is_finite())
    }
}

fn blend(average: &mut Option<f64>, sample: Sample) {
    if sample.bytes >= SAMPLE_MIN
        && let Some(rate) = sample.rate()
    {
        *average = Some(average.filter(|a| a.is_finite() && *a > 0.0).map_or(rate, |old| old.midpoint(rate)));
    }
}

fn cores() -> f64 {
    thread::available_parallelism().map_or(1, usize::from) as f64
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(bytes: u64, seconds: f64) -> Sample {
        Sample { bytes, seconds }
    }

    #[test]
    fn is_remembered_for_a_day_and_damage_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut known = Experience::load(dir.path());
        known.absent("r.io");
        assert!(Experience::load(dir.path()).is_absent("r.io"));
        assert!(!Experience::load(dir.path()).is_absent("s.io"));
        let path = dir.path().join("sources.json");
        let text = fs::read_to_string(&path).unwrap();
        let at = known.absent["r.io"];
        for (time, remembered) in [(at - 86_000, true), (at - 86_500, false), (at + 1000, false)] {
            fs::write(&path, text.replace(&at.to_string(), &time.to_string())).unwrap();
            assert_eq!(Experience::load(dir.path()).is_absent("r.io"), remembered, "{time}");
        }
        for damage in ["", "{", "[1]", r#"{"absent":3}"#, "\0\0\0", r#"{"wire":"x"}"#, &"[".repeat(100_000)] {
            fs::write(&path, damage).unwrap();
            assert_eq!(
                Experience::load(dir.path()),
                Experience { path: path.clone(), ..Experience::default() }
            );
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        Experience::load(dir.path()).absent("r.io");
        assert!(!Experience::load(dir.path()).is_absent("r.io"));
    }

    #[test]
    fn the_oldest_of_too_many_hosts_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut known = Experience::load(dir.path());
        known.absent = (0..HOSTS_MAX).map(|n| (format!("{n}"), now() - n as u64)).collect();
        known.absent("new");
        assert!(
            known.is_absent("new") && known.is_absent("0") && !known.is_absent(&(HOSTS_MAX - 1).to_string())
        );
        assert_eq!(known.absent.len(), HOSTS_MAX);
    }

    #[test]
    fn pages_are_asked_for_plain_where_the_wire_is_faster_than_all_cores() {
        let dir = tempfile::tempdir().unwrap();
        let cores = cores() as u64;
        let mut known = Experience::load(dir.path());
        assert_eq!(known.encoding(), Encoding::Stored);
        known.measured(sample(1 << 30, 1.0), sample(cores << 31, 1.0));
        assert_eq!(known.encoding(), Encoding::Plain);
        assert_eq!(Experience::load(dir.path()).encoding(), Encoding::Plain);
        // Too little, or no time at all, says nothing.
        known.measured(sample(1000, 1000.0), sample(1000, 1000.0));
        known.measured(sample(1 << 30, 0.0), Sample::default());
        assert_eq!(known.encoding(), Encoding::Plain);
        // A slow network a few times in a row.
        for _ in 0..8 {
            known.measured(sample(1 << 30, 1.0), sample(10 << 20, 1.0));
        }
        assert_eq!(Experience::load(dir.path()).encoding(), Encoding::Stored);
    }

    #[test]
    fn a_fetch_takes_as_long_as_the_slower_of_wire_and_cores() {
        let dir = tempfile::tempdir().unwrap();
        let mut known = Experience::load(dir.path());
        let nothing = Sample::default();
        assert_eq!(known.expected(0, 0, nothing), Duration::ZERO);
        for says_nothing in [nothing, sample(HINT_MIN, 0.0), sample(HINT_MIN - 1, 1.0)] {
            assert_eq!(known.expected(250_000_000, 1, says_nothing), Duration::from_secs(2), "1 Gb/s");
        }
        let metadata = sample(100 << 10, 0.01);
        assert_eq!(known.expected(20 << 20, 1, metadata), Duration::from_millis(2048), "as the metadata");
        known.measured(sample(1 << 30, 1.0), sample(10 << 20, 1.0));
        assert_eq!(known.expected(20 << 20, 80 << 20, metadata), Duration::from_secs(2), "the wire");
        let pages = cores() as u64 * (3 << 30);
        assert_eq!(known.expected(20 << 20, pages, nothing), Duration::from_secs(3), "the cores");
        for damage in [0.0, -1.0, f64::NAN] {
            known.wire = Some(damage);
            known.expected(1, 1, nothing);
        }
    }
}
