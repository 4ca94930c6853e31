//! One direction of a link: when each piece of bytes comes out at the far end.
//!
//! It knows nothing of sockets or clocks: the caller says `now` and gets back instants. A piece first waits for the
//! line to be free (rate), then travels (delay and jitter). Pieces never overtake each other, because TCP above would
//! hide that anyway, and a stream must stay in order.

use std::time::{Duration, Instant};

/// What the link does to bytes. The default does nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Conditions {
    /// Time from one end to the other.
    pub(crate) delay: Duration,
    /// Largest random addition to `delay`, drawn anew for each piece.
    pub(crate) jitter: Duration,
    /// Bytes per second; 0 is unlimited.
    pub(crate) rate: u64,
}

/// The state of one direction.
#[derive(Debug)]
pub(crate) struct Direction {
    random: SplitMix64,
    line_free: Option<Instant>,
    last_arrival: Option<Instant>,
}

impl Direction {
    /// A direction whose jitter repeats for the same `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            random: SplitMix64(seed),
            line_free: None,
            last_arrival: None,
        }
    }

    /// Takes `len` bytes at `now` and says when they arrive.
    pub(crate) fn arrival(&mut self, now: Instant, len: usize, conditions: Conditions) -> Instant {
        let sent =
            self.line_free.map_or(now, |free| free.max(now)) + serialisation(len, conditions.rate);
        self.line_free = Some(sent);
        let travelled = sent + conditions.delay + self.jitter(conditions.jitter);
        let arrival = self
            .last_arrival
            .map_or(travelled, |last| last.max(travelled));
        self.last_arrival = Some(arrival);
        arrival
    }

    fn jitter(&mut self, limit: Duration) -> Duration {
        if limit.is_zero() {
            return Duration::ZERO;
        }
        limit.mul_f64(self.random.unit())
    }
}

/// How long `len` bytes occupy a line of `rate` bytes per second.
fn serialisation(len: usize, rate: u64) -> Duration {
    if rate == 0 {
        return Duration::ZERO;
    }
    Duration::from_secs_f64(len as f64 / rate as f64)
}

/// Sebastiano Vigna's SplitMix64: small, seeded, and good enough for jitter.
#[derive(Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    /// A number in `0.0..1.0`.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1024;

    #[test]
    fn an_empty_link_passes_bytes_at_once() {
        let now = Instant::now();
        assert_eq!(
            Direction::new(1).arrival(now, 64 * KIB, Conditions::default()),
            now
        );
    }

    #[test]
    fn delay_moves_every_piece_by_the_same_time() {
        let (now, conditions) = (
            Instant::now(),
            Conditions {
                delay: Duration::from_millis(10),
                ..Default::default()
            },
        );
        let mut link = Direction::new(1);
        assert_eq!(
            link.arrival(now, 1, conditions) - now,
            Duration::from_millis(10)
        );
        let later = now + Duration::from_millis(3);
        assert_eq!(
            link.arrival(later, 1, conditions) - later,
            Duration::from_millis(10)
        );
    }

    #[test]
    fn rate_spreads_a_burst_over_time() {
        let (now, conditions) = (
            Instant::now(),
            Conditions {
                rate: 1_000_000,
                ..Default::default()
            },
        );
        let mut link = Direction::new(1);
        let last = (0..100)
            .map(|_| link.arrival(now, 10_000, conditions))
            .last()
            .unwrap();
        assert_eq!((last - now).as_millis(), 1_000);
    }

    #[test]
    fn jitter_stays_in_bounds_and_never_reorders_and_repeats_for_a_seed() {
        let conditions = Conditions {
            delay: Duration::from_millis(20),
            jitter: Duration::from_millis(5),
            ..Default::default()
        };
        let start = Instant::now();
        let trace = |seed| {
            let mut link = Direction::new(seed);
            (0..1_000_u32)
                .map(|i| link.arrival(start + Duration::from_millis(10) * i, 100, conditions))
                .collect()
        };
        let arrivals: Vec<Instant> = trace(7);
        for (i, arrival) in arrivals.iter().enumerate() {
            let delay = *arrival - (start + Duration::from_millis(10) * u32::try_from(i).unwrap());
            assert!(
                (20..=25).contains(&delay.as_millis()),
                "piece {i} took {delay:?}"
            );
        }
        assert!(arrivals.is_sorted());
        assert_eq!(arrivals, trace(7));
        assert_ne!(arrivals, trace(8));
    }

    #[test]
    fn a_piece_that_drew_less_jitter_waits_for_the_one_before_it() {
        let conditions = Conditions {
            jitter: Duration::from_millis(50),
            ..Default::default()
        };
        let now = Instant::now();
        let mut link = Direction::new(3);
        let arrivals: Vec<Instant> = (0..200).map(|_| link.arrival(now, 1, conditions)).collect();
        assert!(arrivals.is_sorted());
    }
}
