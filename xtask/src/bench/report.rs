//! The results as JSON, as a Markdown table and as a page.
//!
//! *÷ floor* is next to what no start can beat, *÷ own wire* next to the longer of a warm start and what this start itself
//! received, file tree, page table and headers too. A warm start needs no link: it is the median of those of the image in the
//! same round, so that a machine that is faster in one round than in another is so for both. Medians come with the spread
//! that [`spread`] tells.
//!
//! Two columns check the others. *÷ floor* below 1 would mean that something is measured wrong. *÷ told* is what passed the
//! link, until the program said what it received, next to that: above 1 by headers, acknowledgements and handshakes,
//! never below.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xtask::network::Rate;
use xtask::table::Table;

use super::cold::Sample;
use super::statistics::{median, spread};

/// The method that others are held against.
pub const WARM: &str = "warm start";

/// Everything that was measured, and where.
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    /// What the machine is, in words.
    pub machine: String,
    /// What every round trip takes longer than on the machine itself, milliseconds.
    pub rtt_ms: f64,
    /// Whole tables.
    pub rounds: usize,
    /// In the order they were made.
    pub samples: Vec<Sample>,
}

/// A row of the table: all rounds of one method.
#[derive(Debug)]
pub struct Row<'a> {
    image: &'a str,
    rate: Rate,
    method: &'a str,
    /// Milliseconds.
    ready: Vec<f64>,
    /// Next to the floor of the same round.
    pub to_floor: Vec<f64>,
    /// Next to the floor of its own bytes.
    to_own_wire: Vec<f64>,
    bytes: Vec<f64>,
    /// Next to what the program says.
    told: Vec<f64>,
    packets: Vec<f64>,
    requests: Vec<f64>,
    memory: Vec<f64>,
    failed: usize,
    /// Of all rounds, milliseconds.
    floor: Vec<f64>,
    /// Bytes of the pages that are read until ready.
    touched: f64,
}

impl Row<'_> {
    /// Whether others are held against it.
    pub fn is_warm(&self) -> bool {
        self.method == WARM
    }

    /// Image, link and method.
    pub fn name(&self) -> String {
        format!("{}, {}, {}", self.image, self.rate, self.method)
    }
}

impl Results {
    /// Without samples yet.
    pub fn new(rtt: Duration, rounds: usize) -> Self {
        Self { machine: machine(), rtt_ms: rtt.as_secs_f64() * 1000.0, rounds, samples: Vec::new() }
    }

    /// The table, for people.
    pub fn table(&self) -> Table {
        let mut table = Table::new(&[
            "image, link, method",
            "ready, ms",
            "spread",
            "÷ floor",
            "its spread",
            "÷ own wire",
            "MB received",
            "÷ told",
            "÷ touched",
            "packets",
            "requests",
            "MB of memory",
            "starts",
            "failed",
        ]);
        for row in self.rows() {
            let whole = |values: &[f64]| shown(median(values), 0);
            table.row(
                &row.name(),
                [
                    whole(&row.ready),
                    shown_spread(&row.ready, 0),
                    shown(median(&row.to_floor), 2),
                    shown_spread(&row.to_floor, 2),
                    shown(median(&row.to_own_wire), 2),
                    shown(median(&row.bytes) / 1e6, 1),
                    shown(median(&row.told), 3),
                    shown(median(&row.bytes) / row.touched, 2),
                    whole(&row.packets),
                    whole(&row.requests),
                    shown(median(&row.memory) / 1e6, 0),
                    (row.ready.len() + row.failed).to_string(),
                    row.failed.to_string(),
                ],
            );
        }
        table
    }

    /// Writes `results.json`, `table.md` and `report.html`.
    pub fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        let write = |name: &str, text: &str| {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| path.display().to_string())
        };
        write("results.json", &serde_json::to_string_pretty(self)?)?;
        write("table.md", &format!("{}\n\n{}", self.circumstances(), self.table()))?;
        write("report.html", &self.page())
    }

    /// What [`Results::write`] wrote.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("results.json");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }

    /// By image, bandwidth and method.
    pub fn rows(&self) -> Vec<Row<'_>> {
        let mut rows: Vec<Row<'_>> = Vec::new();
        for sample in &self.samples {
            let rate = Rate { bits: sample.rate };
            let same = |r: &Row<'_>| (r.image, r.rate, r.method) == (&*sample.image, rate, &*sample.method);
            let at = rows.iter().position(same).unwrap_or_else(|| {
                rows.push(Row {
                    image: &sample.image,
                    rate,
                    method: &sample.method,
                    ready: Vec::new(),
                    to_floor: Vec::new(),
                    to_own_wire: Vec::new(),
                    bytes: Vec::new(),
                    told: Vec::new(),
                    packets: Vec::new(),
                    requests: Vec::new(),
                    memory: Vec::new(),
                    failed: 0,
                    floor: Vec::new(),
                    touched: self.touched(&sample.image),
                });
                rows.len() - 1
            });
            let row = &mut rows[at];
            let Some(start) = &sample.start else {
                row.failed += 1;
                continue;
            };
            row.ready.push(start.ready_ms);
            let (floor, own) = (self.floor(sample), self.own_floor(sample));
            row.floor.extend(floor);
            row.to_floor.extend(floor.map(|floor| start.ready_ms / floor));
            row.to_own_wire.extend(own.map(|own| start.ready_ms / own));
            row.bytes.push(sample.link_bytes as f64);
            let told = start.report.as_ref().and_then(|r| r["bytes_received"].as_f64());
            let passed = sample.link_bytes_told.map(|bytes| bytes as f64);
            row.told
                .extend(passed.zip(told.filter(|bytes| *bytes > 0.0)).map(|(passed, told)| passed / told));
            row.packets.push(sample.link_packets as f64);
            row.memory.extend(start.memory.map(|bytes| bytes as f64));
            row.requests.extend(start.report.as_ref().and_then(requests));
        }
        rows.sort_by(|a, b| (a.image, b.rate.bits).cmp(&(b.image, a.rate.bits)));
        rows
    }

    /// Milliseconds below which no start like `sample` can be: a warm one of its round, or the compressed pages of the
    /// image on the wire. `None` without a warm one.
    fn floor(&self, sample: &Sample) -> Option<f64> {
        let fetched = |s: &Sample| s.start.as_ref()?.report.as_ref()?["bytes_fetched"].as_f64();
        let same = self.samples.iter().filter(|s| (&s.image, s.rate) == (&sample.image, sample.rate));
        let fetched: Vec<f64> = same.filter_map(fetched).filter(|bytes| *bytes > 0.0).collect();
        // Without any there is no number, and the maximum is the other one.
        Some(self.warm(sample)?.max(on_wire(median(&fetched), sample.rate)))
    }

    /// The longer of a warm start of its round and the time that all it received takes on the wire, milliseconds.
    fn own_floor(&self, sample: &Sample) -> Option<f64> {
        Some(self.warm(sample)?.max(on_wire(sample.link_bytes as f64, sample.rate)))
    }

    /// Milliseconds of a warm start in the round of `sample`.
    fn warm(&self, sample: &Sample) -> Option<f64> {
        let beside = |s: &&Sample| (&s.image, s.round, &*s.method) == (&sample.image, sample.round, WARM);
        let warm = self.samples.iter().filter(beside).filter_map(|s| Some(s.start.as_ref()?.ready_ms));
        Some(median(&warm.collect::<Vec<_>>())).filter(|ms| ms.is_finite())
    }

    /// Bytes of the pages that the recorded start of `image` touched, uncompressed: what I/O amplification is relative to.
    /// NaN where nobody told.
    fn touched(&self, image: &str) -> f64 {
        let mine = self.samples.iter().filter(|s| s.image == image);
        let pages = mine.filter_map(|s| s.start.as_ref()?.report.as_ref()?["pages_needed"].as_f64());
        median(&pages.map(|pages| pages * 4096.0).collect::<Vec<_>>())
    }

    fn circumstances(&self) -> String {
        let rtt = if self.rtt_ms > 0.0 {
            format!(", round trips {} ms longer", self.rtt_ms)
        } else {
            String::new()
        };
        format!("{}{rtt}", self.machine)
    }

    /// A page without anything from elsewhere: the table as bars.
    fn page(&self) -> String {
        let mut body = String::new();
        let rows = self.rows();
        for group in rows.chunk_by(|a, b| (a.image, a.rate) == (b.image, b.rate)) {
            let _ = write!(body, "<h2>{}, {}</h2><table>", group[0].image, group[0].rate);
            let longest = group.iter().map(|row| median(&row.ready)).fold(0.0, f64::max);
            for row in group {
                let ready = median(&row.ready);
                let share = 100.0 * ready / longest;
                let _ = write!(
                    body,
                    "<tr><td>{}</td><td class=bar><div style=\"width:{share:.1}%\"></div></td><td>{} ms \
                     ({})</td><td>{} MB</td><td>{}</td></tr>",
                    escaped(row.method),
                    shown(ready, 0),
                    shown_spread(&row.ready, 0),
                    shown(median(&row.bytes) / 1e6, 1),
                    if row.failed > 0 { format!("{} failed", row.failed) } else { String::new() },
                );
            }
            let _ = write!(body, "</table><p>floor: {} ms</p>", shown(median(&group[0].floor), 0));
        }
        format!(
            "<!doctype html><meta charset=utf-8><title>tdfs benchmark</title><style>body{{font:14px system-ui;\
             margin:2em;max-width:70em}}td{{padding:.2em .8em .2em 0;white-space:nowrap}}.bar{{width:100%}}\
             .bar div{{background:#47a;height:1em}}</style><h1>Empty node to ready</h1><p>{}; medians of {} \
             rounds, their spread in brackets.</p>{body}",
            escaped(&self.circumstances()),
            self.rounds,
        )
    }
}

/// One sample, as it is made.
pub fn line(sample: &Sample) -> String {
    let what = format!("{}, {}, {}", sample.image, Rate { bits: sample.rate }, sample.method);
    match (&sample.start, &sample.failed) {
        (Some(start), _) => {
            format!("{what}: {:.0} ms, {:.1} MB", start.ready_ms, sample.link_bytes as f64 / 1e6)
        }
        (None, failed) => format!("{what}: failed, {}", failed.as_deref().unwrap_or_default()),
    }
}

fn requests(report: &Value) -> Option<f64> {
    Some(report["metadata_requests"].as_f64()? + report["data_requests"].as_f64()?)
}

/// Milliseconds.
fn on_wire(bytes: f64, rate: u64) -> f64 {
    bytes * 8000.0 / rate as f64
}

/// The spread of `values`.
pub fn shown_spread(values: &[f64], digits: usize) -> String {
    let (low, high) = spread(values);
    if low.is_finite() { format!("{low:.digits$}-{high:.digits$}") } else { "–".into() }
}

/// `value` with so many digits behind the point, if it is one.
pub fn shown(value: f64, digits: usize) -> String {
    if value.is_finite() { format!("{value:.digits$}") } else { "–".into() }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Processor, memory, kernel and day.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
        line.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory: f64 =
        field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(f64::NAN);
    let date =
        xtask::command::output(std::process::Command::new("date").arg("+%Y-%m-%d")).unwrap_or_default();
    format!(
        "{}: {cores} × {}, {:.0} GiB, Linux {}",
        date.trim(),
        field(&read("/proc/cpuinfo"), "model name"),
        memory / f64::from(1 << 20),
        read("/proc/sys/kernel/osrelease").trim(),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::methods::Start;
    use super::*;

    fn sample(method: &str, ready: Option<f64>, fetched: u64) -> Sample {
        let start = |ready_ms| Start {
            ready_ms,
            memory: None,
            report: Some(json!({
                "bytes_fetched": fetched, "bytes_received": 1_200_000, "pages_needed": 1000, "metadata_requests": 1,
                "data_requests": 2,
            })),
        };
        Sample {
            image: "a".into(),
            rate: 8_000_000,
            method: method.into(),
            round: 0,
            link_bytes: 1_500_000,
            link_packets: 3,
            link_bytes_told: Some(1_500_000),
            start: ready.map(start),
            failed: ready.is_none().then(|| "<gone>".into()),
        }
    }

    #[test]
    fn a_row_is_a_method_and_failures_are_shown() {
        let in_round = |round, mut sample: Sample| {
            sample.round = round;
            sample
        };
        let samples = vec![
            in_round(0, sample(WARM, Some(300.0), 0)),
            in_round(0, sample("x", Some(2000.0), 1_000_000)),
            in_round(1, sample("x", None, 0)),
            in_round(2, sample("x", Some(3000.0), 1_000_000)),
            in_round(2, sample(WARM, Some(2000.0), 0)),
            // Without a warm start beside it.
            in_round(3, sample("x", Some(2600.0), 1_000_000)),
        ];
        let results = Results { machine: "m<".into(), rtt_ms: 10.0, rounds: 3, samples };
        let rows = results.rows();
        assert_eq!(rows.len(), 2);
        // A million bytes at a million bytes per second, and a warm start of two seconds.
        assert_eq!((&rows[1].to_floor[..], &rows[1].floor[..]), (&[2.0, 1.5][..], &[1000.0, 2000.0][..]));
        // 1.5 million bytes by its own wire.
        assert_eq!(rows[1].to_own_wire, [2000.0 / 1500.0, 1.5]);
        let table = results.table().to_string();
        for shown in ["2600", "2000-3000", "1.75", "1.50-2.00", "1.42", "1.250", "0.37"] {
            assert!(table.contains(shown), "{shown}: {table}");
        }
        assert!(
            results.page().contains("10 ms")
                && results.page().contains("1 failed")
                && results.page().contains("m&lt;")
        );
    }

    #[test]
    fn what_is_written_is_read() {
        let samples = vec![sample(WARM, Some(300.0), 0), sample("x", None, 0)];
        let results = Results { machine: "m".into(), rtt_ms: 0.0, rounds: 1, samples };
        let directory = tempfile::tempdir().unwrap();
        results.write(directory.path()).unwrap();
        let read = Results::read(directory.path()).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(&results).unwrap());
        assert_eq!((read.rows()[0].name(), read.rows()[1].failed), ("a, 8 Mb/s, warm start".into(), 1));
        assert!(Results::read(&directory.path().join("none")).is_err());
    }
}
