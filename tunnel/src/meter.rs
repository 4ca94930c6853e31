//! Counters of one connection, shared by its flows and its driver.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

/// Monotonic counters but for the gauge of open flows. Relaxed: nothing is ordered by them.
#[derive(Default)]
pub(crate) struct Meter {
    flows: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    heard: AtomicU64,
    ended: AtomicBool,
    round_trip_ns: AtomicU64,
    attention: AtomicU64,
    silent: watch::Sender<bool>,
}

/// Somebody has to know soon when the peer falls silent, for as long as this lives.
pub(crate) struct Attention(Arc<Meter>);

/// Counts one open flow for as long as it lives.
pub(crate) struct OpenFlow(Arc<Meter>);

impl Meter {
    pub(crate) fn flows(&self) -> u64 {
        self.flows.load(Ordering::Relaxed)
    }

    /// Payload bytes given to HTTP/2.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub(crate) fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Payload bytes taken from HTTP/2.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub(crate) fn add_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes read from the carrier, frame headers included.
    pub(crate) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    pub(crate) fn add_heard(&self, bytes: usize) {
        self.heard.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// The peer ended the carrier in good order: TLS said so, it was not just cut.
    pub(crate) fn set_ended(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Whether the peer ended the carrier in good order without a byte before.
    pub(crate) fn turned_away(&self) -> bool {
        self.ended.load(Ordering::Relaxed) && self.heard() == 0
    }

    pub(crate) fn round_trip(&self) -> Option<Duration> {
        match self.round_trip_ns.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    pub(crate) fn set_round_trip(&self, round_trip: Duration) {
        let nanos = u64::try_from(round_trip.as_nanos()).unwrap_or(u64::MAX);
        self.round_trip_ns.store(nanos.max(1), Ordering::Relaxed);
    }

    pub(crate) fn attend(self: &Arc<Self>) -> Attention {
        self.attention.fetch_add(1, Ordering::Relaxed);
        Attention(Arc::clone(self))
    }

    /// Whether somebody has to know soon when the peer falls silent.
    pub(crate) fn attended(&self) -> bool {
        self.attention.load(Ordering::Relaxed) > 0
    }

    /// Whether the peer leaves a PING unanswered for longer than [`crate::Settings::silence`].
    pub(crate) fn is_silent(&self) -> bool {
        *self.silent.borrow()
    }

    /// The same as it changes.
    pub(crate) fn silence(&self) -> watch::Receiver<bool> {
        self.silent.subscribe()
    }

    pub(crate) fn set_silent(&self, silent: bool) {
        self.silent
            .send_if_modified(|was| std::mem::replace(was, silent) != silent);
    }

    pub(crate) fn open_flow(self: &Arc<Self>) -> OpenFlow {
        self.flows.fetch_add(1, Ordering::Relaxed);
        OpenFlow(Arc::clone(self))
    }
}

impl Drop for Attention {
    fn drop(&mut self) {
        self.0.attention.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for OpenFlow {
    fn drop(&mut self) {
        self.0.flows.fetch_sub(1, Ordering::Relaxed);
    }
}
