//! Counters of one connection, shared by its flows and its driver.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use crate::settings::Settings;

/// Monotonic counters but for the gauge of open flows. Relaxed: nothing is ordered by them.
#[derive(Default)]
pub(crate) struct Meter {
    /// In milliseconds, what counts as a gap.
    gap: u64,
    flows: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    heard: AtomicU64,
    heard_at: AtomicU64,
    gaps: AtomicU64,
    ended: AtomicBool,
    round_trip_ns: AtomicU64,
    attention: AtomicU64,
    silent: watch::Sender<bool>,
}

/// Milliseconds, those included in which the machine slept.
fn since_boot() -> u64 {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Boottime;
    // Elsewhere this one goes on during sleep.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Monotonic;
    let now = rustix::time::clock_gettime(CLOCK);
    let milliseconds = now.tv_sec * 1_000 + now.tv_nsec / 1_000_000;
    u64::try_from(milliseconds).unwrap_or_default()
}

/// Somebody has to know soon when the peer falls silent, for as long as this lives.
pub(crate) struct Attention(Arc<Meter>);

/// Counts one open flow for as long as it lives.
pub(crate) struct OpenFlow(Arc<Meter>);

impl Meter {
    pub(crate) fn new(settings: &Settings) -> Self {
        let gap = settings.silence * 3 / 4;
        Self {
            gap: u64::try_from(gap.as_millis()).unwrap_or(u64::MAX),
            ..Self::default()
        }
    }

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

    /// Called by the driver alone, before h2 sees the bytes.
    pub(crate) fn add_heard(&self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.heard.fetch_add(bytes as u64, Ordering::Relaxed);
        let now = since_boot();
        let before = self.heard_at.swap(now, Ordering::Relaxed);
        if now.saturating_sub(before) > self.gap {
            self.gaps.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often nothing was heard for a while, the time before the first byte included. The other side gives flows up
    /// after [`crate::Settings::silence`], so there is a gap before whatever it has given up; and while somebody waits for a
    /// flow, it pings more often than that.
    pub(crate) fn gaps(&self) -> u64 {
        self.gaps.load(Ordering::Relaxed)
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
