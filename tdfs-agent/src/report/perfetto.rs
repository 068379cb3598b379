//! A start in the Trace Event Format, which <https://ui.perfetto.dev> opens: times are microseconds.
//!
//! Complete events (`X`) of one thread must nest, so everything that goes on at the same time has a thread of its own:
//! the start, its fetch, and as many lanes of reads as overlap. Arrivals are counters (`C`).

use serde_json::{Value, json};

use crate::node::timeline::{FileRead, Timeline};

const PROCESS: u32 = 1;
const START: u32 = 1;
const FETCH: u32 = 2;
const WAITS: u32 = 100;
const COLD: u32 = 10_000;

/// The timeline as a trace.
pub fn trace(timeline: &Timeline) -> Value {
    let mut events = vec![
        json!({ "ph": "M", "pid": PROCESS, "name": "process_name", "args": { "name": format!("tdfs run {}", timeline.reference) } }),
        thread(START, "start"),
        thread(FETCH, "fetch"),
    ];
    let end = timeline.stages.iter().filter(|s| s.name != "fetch").map(|s| s.end_ms).fold(0.0, f64::max);
    events.push(complete(START, "start", 0.0, end, &timeline.start));
    for stage in &timeline.stages {
        let thread = if stage.name == "fetch" { FETCH } else { START };
        events.push(complete(thread, &stage.name, stage.begin_ms, stage.end_ms - stage.begin_ms, &json!({})));
    }
    let ready = us(end);
    events.push(json!({ "ph": "i", "s": "p", "pid": PROCESS, "tid": START, "ts": ready, "name": "ready" }));
    for sample in &timeline.arrivals.samples {
        let counter = |name: &str, value| json!({ "ph": "C", "pid": PROCESS, "ts": us(sample.ms), "name": name, "args": { "value": value } });
        events.push(counter("pages arrived", sample.pages));
        events.push(counter("bytes received", sample.bytes));
    }
    for (name, first, reads) in [("waits", WAITS, &timeline.waits), ("cold reads", COLD, &timeline.cold)] {
        for (n, lane) in lanes(&reads.reads).iter().enumerate() {
            let id = first + n as u32;
            events.push(thread(id, &format!("{name} {}", n + 1)));
            for read in lane {
                let file = timeline.files.get(read.file as usize);
                let path = file.map_or("", |f| f.path.as_str());
                let args =
                    json!({ "page": read.page, "pages": read.pages, "error": read.error, "kind": name });
                events.push(complete(id, path, read.ms, read.took_ms, &args));
            }
        }
    }
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "began": timeline.began,
            "lost_waits": timeline.waits.lost,
            "lost_cold_reads": timeline.cold.lost,
        },
    })
}

fn us(ms: f64) -> f64 {
    ms * 1000.0
}

fn thread(id: u32, name: &str) -> Value {
    json!({ "ph": "M", "pid": PROCESS, "tid": id, "name": "thread_name", "args": { "name": name } })
}

fn complete(thread: u32, name: &str, begin_ms: f64, ms: f64, args: &Value) -> Value {
    json!({
        "ph": "X", "pid": PROCESS, "tid": thread, "ts": us(begin_ms), "dur": us(ms), "name": name, "cat": "tdfs", "args": args,
    })
}

/// The reads in as few lanes as they fit into without overlapping.
fn lanes(reads: &[FileRead]) -> Vec<Vec<&FileRead>> {
    let mut ordered: Vec<&FileRead> = reads.iter().collect();
    ordered.sort_by(|a, b| a.ms.total_cmp(&b.ms));
    let mut lanes: Vec<(f64, Vec<&FileRead>)> = Vec::new();
    for read in ordered {
        let end = read.ms + read.took_ms;
        match lanes.iter_mut().find(|(free, _)| *free <= read.ms) {
            Some((free, lane)) => {
                *free = end;
                lane.push(read);
            }
            None => lanes.push((end, vec![read])),
        }
    }
    lanes.into_iter().map(|(_, lane)| lane).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::model::tests::{read, timeline};
    use super::*;

    /// Begin and end of the complete events of each thread.
    fn spans(trace: &Value) -> BTreeMap<u64, Vec<(f64, f64, String)>> {
        let mut spans: BTreeMap<u64, Vec<_>> = BTreeMap::new();
        for event in trace["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X") {
            let number = |field: &str| event[field].as_f64().unwrap();
            let name = event["name"].as_str().unwrap().to_owned();
            let span = (number("ts"), number("ts") + number("dur"), name);
            spans.entry(event["tid"].as_u64().unwrap()).or_default().push(span);
        }
        spans
    }

    fn nest(spans: &[(f64, f64, String)]) -> bool {
        // Computed ends may differ in the last digit.
        let apart = |a: &(f64, f64, String), b: &(f64, f64, String)| a.1 <= b.0 + 1e-6 || b.1 <= a.0 + 1e-6;
        let inside = |a: &(f64, f64, String), b: &(f64, f64, String)| b.0 <= a.0 + 1e-6 && a.1 <= b.1 + 1e-6;
        spans
            .iter()
            .enumerate()
            .all(|(n, a)| spans[n + 1..].iter().all(|b| apart(a, b) || inside(a, b) || inside(b, a)))
    }

    #[test]
    fn stages_lie_in_the_start_and_the_fetch_beside_it() {
        let trace = trace(&timeline(vec![], vec![]));
        let spans = spans(&trace);
        let names = |thread: u64| spans[&thread].iter().map(|s| s.2.as_str()).collect::<Vec<_>>();
        assert_eq!(names(1), ["start", "resolve", "diff", "mount", "create", "ready"]);
        assert_eq!(names(2), ["fetch"]);
        assert!(spans.values().all(|s| nest(s)));
        assert_eq!((spans[&1][0].0, spans[&1][0].1), (0.0, 500_000.0));
        assert_eq!((spans[&2][0].0, spans[&2][0].1), (101_500.0, 500_000.0));
    }

    proptest! {
        #[test]
        fn reads_of_a_lane_do_not_overlap(reads in prop::collection::vec((0u32..500, 0u32..60, 0u32..100), 0..60)) {
            let reads: Vec<_> = reads.iter().map(|&(ms, took, f)| read(ms.into(), took.into(), f)).collect();
            let spans = spans(&trace(&timeline(reads.clone(), reads.clone())));
            prop_assert!(spans.values().all(|s| nest(s)));
            let drawn: usize = spans.iter().filter(|(thread, _)| **thread >= 100).map(|(_, s)| s.len()).sum();
            prop_assert_eq!(drawn, 2 * reads.len());
        }
    }
}
