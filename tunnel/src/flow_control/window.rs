//! How large the windows should be. Pure decisions: callers bring times and byte counts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Estimates the bandwidth-delay product from PING round trips and delivered bytes, and from that one window for all
/// streams.
///
/// A large window fills queues, which lengthens the round trip, which asks for a larger window. Two things stop that:
/// the smallest round trip counts, which only one without load replaces, and a window that made nothing faster is not made
/// larger.
pub(crate) struct Estimator {
    min: u32,
    max: u32,
    window: u32,
    smallest: Option<(Duration, Instant)>,
    last: Option<(Instant, u64)>,
    /// Bytes a second when the window last grew.
    grown_at: f64,
}

/// What another growth of the window needs: this much more speed since the last one.
const SPEED_UP: f64 = 1.25;

/// How long a smallest round trip is believed; then the path may have changed, and the next one without load says so. One
/// under load would measure the queue that the window itself fills.
const ROUND_TRIP_MEMORY: Duration = Duration::from_secs(10);

/// More than this received since the PING before: the round trip was one under load.
const LOAD: u64 = 256 << 10;

impl Estimator {
    pub(crate) fn new(min: u32, max: u32) -> Self {
        Self {
            min,
            max,
            window: min,
            smallest: None,
            last: None,
            grown_at: 0.0,
        }
    }

    pub(crate) fn window(&self) -> u32 {
        self.window
    }

    /// A PING came back at `now` after `round_trip`; `received` payload bytes were delivered since the connection
    /// began. Returns a new window when it should change: windows grow here and shrink only in [`Self::shrink`].
    pub(crate) fn on_pong(
        &mut self,
        now: Instant,
        round_trip: Duration,
        received: u64,
    ) -> Option<u32> {
        let last = self.last.replace((now, received));
        let loaded = last.is_some_and(|(_, before)| received - before > LOAD);
        let smallest = match self.smallest {
            Some((smallest, at))
                if smallest <= round_trip && (loaded || now - at < ROUND_TRIP_MEMORY) =>
            {
                smallest
            }
            Some(_) | None => {
                self.smallest = Some((round_trip, now));
                round_trip
            }
        };
        let (since, before) = last?;
        let elapsed = (now - since).as_secs_f64();
        if elapsed <= 0.0 {
            return None;
        }
        let rate = (received - before) as f64 / elapsed;
        let product = rate * smallest.as_secs_f64();
        let wanted = (2.0 * product).clamp(f64::from(self.min), f64::from(self.max)) as u32;
        // A quarter more is worth a SETTINGS round; less is noise.
        (wanted / 5 >= self.window / 4 && rate >= self.grown_at * SPEED_UP).then(|| {
            self.window = wanted;
            self.grown_at = rate;
            wanted
        })
    }

    /// Memory runs short: back to the smallest window.
    pub(crate) fn shrink(&mut self) -> Option<u32> {
        (self.window > self.min).then(|| {
            self.window = self.min;
            self.grown_at = 0.0;
            self.min
        })
    }
}

/// Connection window in stream windows: one flow at full speed must not use up what the others need.
const CONNECTION_FACTOR: u32 = 4;

/// The connection's target window: room for active flows on top of what slow readers hold.
pub(crate) fn connection_window(stream_window: u32, held: u64) -> u32 {
    let held = u32::try_from(held).unwrap_or(u32::MAX);
    stream_window
        .saturating_mul(CONNECTION_FACTOR)
        .saturating_add(held)
        .min(MAX_WINDOW)
}

/// RFC 9113 §6.9.1.
const MAX_WINDOW: u32 = (1 << 31) - 1;

/// Received bytes that readers have not taken yet, by flow, in the order in which the flows fell behind.
///
/// Invariant: `total` is the sum of all entries and at most `max` after [`Held::evict`] answered `None`.
pub(crate) struct Held {
    max: u64,
    total: u64,
    next: u64,
    flows: BTreeMap<u64, u64>,
}

impl Held {
    pub(crate) fn new(max: u64) -> Self {
        Self {
            max,
            total: 0,
            next: 0,
            flows: BTreeMap::new(),
        }
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// A flow fell behind.
    pub(crate) fn begin(&mut self) -> u64 {
        self.next += 1;
        self.flows.insert(self.next, 0);
        self.next
    }

    /// Whether a flow is behind and was not evicted.
    pub(crate) fn contains(&self, flow: u64) -> bool {
        self.flows.contains_key(&flow)
    }

    /// What a flow holds now. Does nothing for a flow that was evicted.
    pub(crate) fn set(&mut self, flow: u64, bytes: u64) {
        if let Some(held) = self.flows.get_mut(&flow) {
            self.total = self.total - *held + bytes;
            *held = bytes;
        }
    }

    /// A flow caught up or ended.
    pub(crate) fn end(&mut self, flow: u64) {
        self.total -= self.flows.remove(&flow).unwrap_or(0);
    }

    /// While too much is held: the flow that has been behind for the longest time, removed.
    pub(crate) fn evict(&mut self) -> Option<u64> {
        if self.total <= self.max {
            return None;
        }
        let (flow, bytes) = self.flows.pop_first()?;
        self.total -= bytes;
        Some(flow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1 << 20;

    /// A path that delivers at most `rate` bytes a second and at most one window a round trip.
    fn settle(rate: u64, round_trip_ms: u64) -> (u32, u32) {
        let mut estimator = Estimator::new(MIB, 16 * MIB);
        let (mut now, mut received, mut rounds) = (Instant::now(), 0, 0);
        let round_trip = Duration::from_millis(round_trip_ms);
        for round in 0..50 {
            let elapsed = round_trip.max(Duration::from_millis(50));
            let in_window =
                u64::from(estimator.window()) * elapsed.as_millis() as u64 / round_trip_ms;
            received += in_window.min(rate * elapsed.as_millis() as u64 / 1000);
            now += elapsed;
            if estimator.on_pong(now, round_trip, received).is_some() {
                rounds = round;
            }
        }
        (estimator.window() / MIB, rounds)
    }

    #[test]
    fn the_window_follows_the_path() {
        //            rate B/s, RTT ms -> window MiB
        let table = [
            (1_000_000_000, 1, 1),
            (100_000_000, 20, 3),
            (500_000_000, 20, 16),
            (100_000_000, 80, 15),
            (1_000_000, 300, 1),
        ];
        for (rate, round_trip, expected) in table {
            let (window, rounds) = settle(rate, round_trip);
            assert_eq!(window, expected, "{rate} B/s at {round_trip} ms");
            assert!(
                rounds <= 8,
                "{rate} B/s at {round_trip} ms took {rounds} rounds"
            );
        }
    }

    #[test]
    fn queueing_does_not_inflate_the_window() {
        let mut estimator = Estimator::new(MIB, 16 * MIB);
        let start = Instant::now();
        estimator.on_pong(start, Duration::from_millis(1), 0);
        let later = start + Duration::from_secs(1);
        assert_eq!(
            estimator.on_pong(later, Duration::from_millis(500), 100_000_000),
            None
        );
    }

    #[test]
    fn a_long_saturated_flow_does_not_grow_its_window_for_ever() {
        let mut estimator = Estimator::new(MIB, 16 * MIB);
        let (mut now, mut received) = (Instant::now(), 0);
        estimator.on_pong(now, Duration::from_millis(1), received);
        // From here on every round trip is the queue of the window itself.
        for _ in 0..2000 {
            let queue = Duration::from_secs_f64(f64::from(estimator.window()) / 600e6);
            now += Duration::from_millis(50);
            received += 30_000_000;
            estimator.on_pong(now, 3 * queue, received);
        }
        assert_eq!(estimator.window(), MIB);
    }

    #[test]
    fn a_path_that_became_longer_is_noticed_without_load() {
        let mut estimator = Estimator::new(MIB, 16 * MIB);
        let start = Instant::now();
        let second = |seconds| start + Duration::from_secs(seconds);
        estimator.on_pong(start, Duration::from_millis(1), 0);
        estimator.on_pong(second(11), Duration::from_millis(100), 0);

        let window = estimator.on_pong(second(12), Duration::from_millis(100), 50 << 20);

        assert_eq!(window, Some(10 * MIB));
    }

    #[test]
    fn windows_shrink_on_demand_only() {
        let mut estimator = Estimator::new(MIB, 16 * MIB);
        let start = Instant::now();
        estimator.on_pong(start, Duration::from_millis(100), 0);
        let second = start + Duration::from_secs(1);
        assert_eq!(
            estimator.on_pong(second, Duration::from_millis(100), 50 * u64::from(MIB)),
            Some(10 * MIB)
        );
        assert_eq!(
            estimator.on_pong(
                second + Duration::from_secs(1),
                Duration::from_millis(100),
                50 << 20
            ),
            None
        );
        assert_eq!(estimator.shrink(), Some(MIB));
        assert_eq!(estimator.shrink(), None);
    }

    #[test]
    fn the_longest_behind_is_evicted_first_and_only_when_needed() {
        let mut held = Held::new(100);
        let flows: Vec<_> = (0..3).map(|_| held.begin()).collect();
        flows.iter().for_each(|flow| held.set(*flow, 30));
        assert_eq!(held.evict(), None);
        held.set(flows[2], 60);
        assert_eq!((held.evict(), held.evict()), (Some(flows[0]), None));
        held.set(flows[0], 1000);
        held.end(flows[0]);
        assert_eq!(held.total(), 90);
        held.end(flows[1]);
        held.end(flows[2]);
        assert_eq!(held.total(), 0);
    }

    #[test]
    fn the_connection_window_rises_with_what_is_held() {
        assert_eq!(connection_window(MIB, 0), 4 * MIB);
        assert_eq!(connection_window(16 * MIB, 64 << 20), 128 * MIB);
        assert_eq!(connection_window(u32::MAX, u64::MAX), MAX_WINDOW);
    }
}
