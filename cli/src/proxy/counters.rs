//! What the proxy counts, for `tp status`.
//!
//! Bytes of flows through the tunnel are added when a flow ends; while it lives they are part of
//! `Tunnel::traffic`. Bytes of direct flows are added as they pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tp_tunnel::Relayed;

/// How a client asked for a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SOCKS5 CONNECT.
    Socks,
    /// One destination of a SOCKS5 UDP ASSOCIATE.
    Udp,
    /// HTTP CONNECT.
    HttpConnect,
    /// A connection to an origin that absolute-form requests are forwarded on.
    HttpForward,
}

/// Counters of one proxy, shared with whoever reports them.
#[derive(Debug, Default)]
pub struct Counters {
    open: AtomicU64,
    refused: AtomicU64,
    socks: AtomicU64,
    udp: AtomicU64,
    http_connect: AtomicU64,
    http_forward: AtomicU64,
    up: AtomicU64,
    down: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Flows open now, of every kind.
    pub flows_open: u64,
    /// Flows opened since the start, of every kind.
    pub flows_total: u64,
    /// Of these by SOCKS5 CONNECT.
    pub socks: u64,
    /// Of these by SOCKS5 UDP ASSOCIATE.
    pub udp: u64,
    /// Of these by HTTP CONNECT.
    pub http_connect: u64,
    /// Of these for absolute-form requests.
    pub http_forward: u64,
    /// Dials that failed or were refused.
    pub refused: u64,
    /// Bytes from local programs: direct flows, and tunnel flows that have ended.
    pub bytes_up: u64,
    /// Bytes to local programs, likewise.
    pub bytes_down: u64,
}

impl Counters {
    /// The counters now.
    pub fn snapshot(&self) -> Counted {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (socks, udp) = (read(&self.socks), read(&self.udp));
        let (http_connect, http_forward) = (read(&self.http_connect), read(&self.http_forward));
        Counted {
            flows_open: read(&self.open),
            flows_total: socks + udp + http_connect + http_forward,
            socks,
            udp,
            http_connect,
            http_forward,
            refused: read(&self.refused),
            bytes_up: read(&self.up),
            bytes_down: read(&self.down),
        }
    }

    /// Counts a flow as open until the guard is dropped.
    pub(super) fn open(self: &Arc<Self>, kind: Kind) -> OpenFlow {
        let total = match kind {
            Kind::Socks => &self.socks,
            Kind::Udp => &self.udp,
            Kind::HttpConnect => &self.http_connect,
            Kind::HttpForward => &self.http_forward,
        };
        total.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenFlow(self.clone())
    }

    pub(super) fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }
}

/// One flow that counts as open.
#[derive(Debug)]
pub(super) struct OpenFlow(Arc<Counters>);

impl OpenFlow {
    pub(super) fn up(&self, bytes: u64) {
        self.0.up.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn down(&self, bytes: u64) {
        self.0.down.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn relayed(&self, relayed: &Relayed) {
        self.0.up.fetch_add(relayed.sent, Ordering::Relaxed);
        self.0.down.fetch_add(relayed.received, Ordering::Relaxed);
    }
}

impl Drop for OpenFlow {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}
