//! Counters of one manager, and their text form for Prometheus.
//!
//! Sums only: no user, host, name or address is a label, so a scrape tells nothing about who went where.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tp_tunnel::proxy_status::DialErrorKind;

/// All counters. Relaxed: each stands for itself.
#[derive(Debug, Default)]
pub struct Metrics {
    connections_open: AtomicU64,
    connections_total: AtomicU64,
    refused_peers: AtomicU64,
    dials_ok: AtomicU64,
    dials_failed: [AtomicU64; KINDS.len()],
    dns_queries: AtomicU64,
    intercepts: AtomicU64,
    agents: AtomicU64,
    inbound_taken: AtomicU64,
    inbound_refused: AtomicU64,
}

const KINDS: [DialErrorKind; 5] = [
    DialErrorKind::Refused,
    DialErrorKind::TimedOut,
    DialErrorKind::Dns,
    DialErrorKind::Unreachable,
    DialErrorKind::Forbidden,
];

impl Metrics {
    /// A peer was admitted. The guard counts it as open until it is dropped.
    pub fn admitted(&self) -> impl Drop + '_ {
        self.connections_open.fetch_add(1, Relaxed);
        self.connections_total.fetch_add(1, Relaxed);
        OpenConnection(self)
    }

    /// A peer was refused before any HTTP.
    pub fn refused_peer(&self) {
        self.refused_peers.fetch_add(1, Relaxed);
    }

    /// A dial ended, well without an error.
    pub fn dialed(&self, error: Option<DialErrorKind>) {
        match error.and_then(|error| KINDS.iter().position(|kind| *kind == error)) {
            Some(index) => self.dials_failed[index].fetch_add(1, Relaxed),
            None => self.dials_ok.fetch_add(1, Relaxed),
        };
    }

    /// A DNS message was answered.
    pub fn dns_query(&self) {
        self.dns_queries.fetch_add(1, Relaxed);
    }

    /// Intercepts that this replica serves, and agents that it is told to be connected to.
    pub fn intercepting(&self, intercepts: usize, agents: usize) {
        self.intercepts.store(intercepts as u64, Relaxed);
        self.agents.store(agents as u64, Relaxed);
    }

    /// An agent offered a flow: whether its workstation took it.
    pub fn inbound(&self, taken: bool) {
        match taken {
            true => self.inbound_taken.fetch_add(1, Relaxed),
            false => self.inbound_refused.fetch_add(1, Relaxed),
        };
    }

    /// Prometheus text format 0.0.4.
    pub fn render(&self) -> String {
        let mut out = String::with_capacity(1024);
        let mut line = |name: &str, kind: &str, labels: &str, counter: &AtomicU64| {
            if !kind.is_empty() {
                let _ = writeln!(out, "# TYPE {name} {kind}");
            }
            let _ = writeln!(out, "{name}{labels} {}", counter.load(Relaxed));
        };
        line(
            "tp_manager_connections_open",
            "gauge",
            "",
            &self.connections_open,
        );
        line(
            "tp_manager_connections_total",
            "counter",
            "",
            &self.connections_total,
        );
        line(
            "tp_manager_refused_peers_total",
            "counter",
            "",
            &self.refused_peers,
        );
        line(
            "tp_manager_dns_queries_total",
            "counter",
            "",
            &self.dns_queries,
        );
        line("tp_manager_intercepts", "gauge", "", &self.intercepts);
        line("tp_manager_agents", "gauge", "", &self.agents);
        let inbound = "tp_manager_inbound_flows_total";
        line(
            inbound,
            "counter",
            "{outcome=\"taken\"}",
            &self.inbound_taken,
        );
        line(inbound, "", "{outcome=\"refused\"}", &self.inbound_refused);
        line(
            "tp_manager_dials_total",
            "counter",
            "{outcome=\"connected\"}",
            &self.dials_ok,
        );
        for (kind, counter) in KINDS.iter().zip(&self.dials_failed) {
            let labels = format!("{{outcome=\"{}\"}}", kind.as_str());
            line("tp_manager_dials_total", "", &labels, counter);
        }
        out
    }
}

struct OpenConnection<'a>(&'a Metrics);

impl Drop for OpenConnection<'_> {
    fn drop(&mut self) {
        self.0.connections_open.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_what_is_shown() {
        let metrics = Metrics::default();
        let guard = metrics.admitted();
        metrics.dialed(None);
        metrics.dialed(Some(DialErrorKind::Refused));
        metrics.dialed(Some(DialErrorKind::Refused));
        metrics.intercepting(2, 3);
        metrics.inbound(true);

        assert!(metrics.render().contains("tp_manager_connections_open 1\n"));
        drop(guard);

        let text = metrics.render();
        assert!(text.contains("tp_manager_connections_open 0\n"), "{text}");
        assert!(
            text.contains("tp_manager_dials_total{outcome=\"connected\"} 1\n"),
            "{text}"
        );
        assert!(
            text.contains("tp_manager_dials_total{outcome=\"connection_refused\"} 2\n"),
            "{text}"
        );
        assert_eq!(text.matches("# TYPE tp_manager_dials_total").count(), 1);
        assert!(text.contains("tp_manager_agents 3\n"), "{text}");
        assert!(
            text.contains("tp_manager_inbound_flows_total{outcome=\"taken\"} 1\n"),
            "{text}"
        );
    }
}
