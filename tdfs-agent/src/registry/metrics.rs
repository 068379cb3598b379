//! What the server counts. All names and their units are here; `/metrics` serves them in the OpenMetrics text format.

use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Upper ends of the classes of request durations, in seconds.
const DURATIONS: [f64; 10] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0];

/// A kind of request, by method and status.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    method: Method,
    status: u16,
}

/// Only those that exist: a client must not be able to invent label values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Method(&'static str);

impl EncodeLabelValue for Method {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.encode(encoder)
    }
}

/// All counters of a server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<Kind, Counter>,
    seconds: Histogram,
    sent: Counter,
    received: Counter,
    /// `tdfs_registry_running_requests`: begun and not answered to the end.
    pub running: Gauge<i64>,
    /// `tdfs_registry_connections`: open now.
    pub connections: Gauge<i64>,
    /// `tdfs_registry_upstream_fetches_total`: blobs fetched from the other registry.
    pub upstream_fetches: Counter,
    /// `tdfs_registry_upstream_bytes_total`: bytes of them.
    pub upstream_bytes: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("tdfs_registry");
        let metrics = Self {
            requests: Family::default(),
            seconds: Histogram::new(DURATIONS),
            sent: Counter::default(),
            received: Counter::default(),
            running: Gauge::default(),
            connections: Gauge::default(),
            upstream_fetches: Counter::default(),
            upstream_bytes: Counter::default(),
            registry: Registry::default(),
        };
        registry.register("requests", "Requests that were answered", metrics.requests.clone());
        let help = "From a request's head to its answer's last byte";
        registry.register_with_unit("request_duration", help, Unit::Seconds, metrics.seconds.clone());
        registry.register_with_unit("sent", "Bodies of answers", Unit::Bytes, metrics.sent.clone());
        registry.register_with_unit("received", "Bodies of requests", Unit::Bytes, metrics.received.clone());
        let help = "Requests that are not answered to the end";
        registry.register("running_requests", help, metrics.running.clone());
        registry.register("connections", "Connections that are open", metrics.connections.clone());
        let help = "Blobs fetched from the other registry";
        registry.register("upstream_fetches", help, metrics.upstream_fetches.clone());
        let help = "Bytes of blobs fetched from the other registry";
        registry.register_with_unit("upstream", help, Unit::Bytes, metrics.upstream_bytes.clone());
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// Counts a request that is over.
    pub fn request(&self, method: &str, status: u16, sent: u64, received: u64, took: Duration) {
        let known = ["GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"].into_iter().find(|m| *m == method);
        self.requests.get_or_create(&Kind { method: Method(known.unwrap_or("other")), status }).inc();
        self.seconds.observe(took.as_secs_f64());
        self.sent.inc_by(sent);
        self.received.inc_by(received);
    }

    /// The text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stable() {
        let metrics = Metrics::default();
        metrics.request("GET", 200, 5, 7, Duration::from_millis(2));
        metrics.request("INVENTED", 405, 0, 0, Duration::ZERO);
        let text = metrics.text();
        for line in [
            r#"tdfs_registry_requests_total{method="GET",status="200"} 1"#,
            r#"tdfs_registry_requests_total{method="other",status="405"} 1"#,
            r#"tdfs_registry_request_duration_seconds_bucket{le="0.003"} 2"#,
            "tdfs_registry_sent_bytes_total 5",
            "tdfs_registry_received_bytes_total 7",
            "tdfs_registry_running_requests 0",
            "tdfs_registry_connections 0",
            "tdfs_registry_upstream_fetches_total 0",
            "tdfs_registry_upstream_bytes_total 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
