//! One connection's life: dialling, up, cut, dialling again.
//!
//! Pure: it is told what happened and when, and says when to dial. It knows no carrier, no clock and no Kubernetes;
//! [`super::supervisor`] is its shell. Invariant: at most one dial is asked for at a time.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Shortest and longest pause between two attempts (design §10).
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A carrier that was cut sooner than this after it came up does not reset the backoff.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The first carrier is not up yet.
    Connecting,
    /// A carrier is up.
    Connected {
        /// Since when.
        since: Instant,
    },
    /// The carrier was lost and its successor is not up yet.
    Reconnecting {
        /// When the carrier was lost.
        since: Instant,
        /// How many attempts have failed since.
        attempt: u32,
    },
    /// Over.
    Ended,
}

/// Whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It may work in a moment: network, API server or manager are away.
    Passing,
    /// Somebody has to act first: no right, wrong key, session deleted.
    Final,
}

/// What the shell has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Start one attempt to bring a carrier up.
    Dial,
}

/// See the module.
#[derive(Debug)]
pub struct Connection {
    phase: Phase,
    /// Failures since the last carrier that lasted.
    failures: u32,
    dial_at: Option<Instant>,
    random: SmallRng,
}

impl Connection {
    /// A connection whose first attempt is due now. The seed decides the jitter.
    pub fn new(seed: u64, now: Instant) -> Self {
        Self {
            phase: Phase::Connecting,
            failures: 0,
            dial_at: Some(now),
            random: SmallRng::seed_from_u64(seed),
        }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// A carrier came up.
    pub fn handle_established(&mut self, now: Instant) {
        self.dial_at = None;
        if self.phase != Phase::Ended {
            self.phase = Phase::Connected { since: now };
        }
    }

    /// An attempt failed. The first one of a connection is not repeated: whoever waits for it should hear why.
    pub fn handle_failed(&mut self, severity: Severity, now: Instant) {
        match (self.phase, severity) {
            (Phase::Connecting | Phase::Reconnecting { .. }, Severity::Final)
            | (Phase::Connecting, Severity::Passing) => {
                self.handle_end();
            }
            (Phase::Reconnecting { since, attempt }, Severity::Passing) => {
                self.phase = Phase::Reconnecting {
                    since,
                    attempt: attempt.saturating_add(1),
                };
                self.retry(now);
            }
            (Phase::Connected { .. } | Phase::Ended, _) => {}
        }
    }

    /// The carrier died. The next attempt is due at once, unless carriers keep dying young.
    pub fn handle_lost(&mut self, now: Instant) {
        let Phase::Connected { since } = self.phase else {
            return;
        };
        self.phase = Phase::Reconnecting {
            since: now,
            attempt: 0,
        };
        if now.saturating_duration_since(since) >= STABLE_AFTER {
            self.failures = 0;
        }
        match self.failures {
            0 => {
                self.failures = 1;
                self.dial_at = Some(now);
            }
            _ => self.retry(now),
        }
    }

    /// Somebody ended it.
    pub fn handle_end(&mut self) {
        self.phase = Phase::Ended;
        self.dial_at = None;
    }

    /// What to do now, each thing once.
    pub fn poll_output(&mut self, now: Instant) -> Option<Output> {
        self.dial_at.take_if(|at| *at <= now).map(|_| Output::Dial)
    }

    /// When to ask [`Connection::poll_output`] again at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.dial_at
    }

    /// Doubles up to the longest pause; jitter takes up to half of it away, so that clients do not come in step.
    fn retry(&mut self, now: Instant) {
        let (shortest, longest) = BACKOFF;
        let doubled = shortest
            .saturating_mul(1 << self.failures.min(10))
            .min(longest);
        self.failures = self.failures.saturating_add(1);
        let pause = doubled
            .mul_f64(self.random.random_range(0.5..=1.0))
            .max(shortest);
        self.dial_at = Some(now + pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connected(now: Instant) -> Connection {
        let mut connection = Connection::new(1, now);
        assert_eq!(connection.poll_output(now), Some(Output::Dial));
        connection.handle_established(now);
        connection
    }

    #[test]
    fn the_first_failure_of_a_new_connection_ends_it() {
        let now = Instant::now();
        let mut connection = Connection::new(1, now);
        assert_eq!(connection.poll_output(now), Some(Output::Dial));
        assert_eq!(connection.poll_output(now), None, "one dial at a time");

        connection.handle_failed(Severity::Passing, now);

        assert_eq!(connection.phase(), Phase::Ended);
        assert_eq!(connection.poll_timeout(), None);
    }

    #[test]
    fn a_lost_carrier_is_replaced_at_once() {
        let start = Instant::now();
        let mut connection = connected(start);
        let lost = start + Duration::from_secs(3);

        connection.handle_lost(lost);

        assert_eq!(connection.poll_output(lost), Some(Output::Dial));
        assert_eq!(
            connection.phase(),
            Phase::Reconnecting {
                since: lost,
                attempt: 0
            }
        );
    }

    #[test]
    fn pauses_grow_to_five_seconds_and_never_leave_their_bounds() {
        for seed in 0..200 {
            let mut now = Instant::now();
            let mut connection = Connection::new(seed, now);
            connection.poll_output(now);
            connection.handle_established(now);
            connection.handle_lost(now);
            let mut longest = Duration::ZERO;
            for attempt in 0..40_u32 {
                assert_eq!(
                    connection.poll_output(now),
                    Some(Output::Dial),
                    "seed {seed} attempt {attempt}"
                );
                connection.handle_failed(Severity::Passing, now);
                let pause = connection.poll_timeout().expect("it tries again") - now;
                assert!(
                    pause >= BACKOFF.0 && pause <= BACKOFF.1,
                    "seed {seed}: {pause:?}"
                );
                assert_eq!(connection.poll_output(now), None);
                longest = longest.max(pause);
                now += pause;
            }
            assert!(longest >= BACKOFF.1 / 2, "seed {seed}: {longest:?}");
        }
    }

    #[test]
    fn carriers_that_die_young_are_not_redialled_in_a_hot_loop() {
        for seed in 0..50 {
            let start = Instant::now();
            let mut now = start;
            let mut connection = Connection::new(seed, now);
            let mut dials = 0;
            while now < start + Duration::from_secs(60) {
                if connection.poll_output(now).is_some() {
                    dials += 1;
                    connection.handle_established(now);
                    connection.handle_lost(now);
                }
                now = connection.poll_timeout().expect("it tries again").max(now);
            }
            assert!(dials < 40, "seed {seed}: {dials} dials in a minute");
        }
    }

    #[test]
    fn a_carrier_that_lasted_resets_the_backoff() {
        let mut now = Instant::now();
        let mut connection = connected(now);
        connection.handle_lost(now);
        for _ in 0..20 {
            connection.poll_output(now);
            connection.handle_failed(Severity::Passing, now);
            now = connection.poll_timeout().unwrap();
        }
        connection.poll_output(now);
        connection.handle_established(now);
        now += STABLE_AFTER;

        connection.handle_lost(now);

        assert_eq!(connection.poll_timeout(), Some(now));
    }

    #[test]
    fn what_cannot_get_better_ends_it_also_later() {
        let now = Instant::now();
        let mut connection = connected(now);
        connection.handle_lost(now);
        connection.poll_output(now);

        connection.handle_failed(Severity::Final, now);

        assert_eq!(connection.phase(), Phase::Ended);
        connection.handle_established(now);
        assert_eq!(connection.phase(), Phase::Ended, "the end is final");
    }
}
