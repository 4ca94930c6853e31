//! TIME-WAIT without a socket.
//!
//! The end that closes first must still acknowledge a repeated FIN for a while (RFC 9293 §3.6.1). That needs six numbers,
//! not a socket with rings: a program that opens ten thousand short connections a second would otherwise hold a hundred
//! thousand sockets. Only the addresses and the last acknowledgement are kept.

use std::collections::{HashMap, VecDeque};

use crate::demux::{FlowKey, Seeded};
use crate::reply::Bare;
use crate::timers::Tick;

/// Flows that ended in order a short while ago.
pub(crate) struct Linger {
    ended: HashMap<FlowKey, Ended, Seeded>,
    order: VecDeque<(FlowKey, Tick)>,
}

struct Ended {
    last: Bare,
    expires: Tick,
}

/// Twice the longest time a segment can be on its way. The link is the memory of one machine, where nothing is late by
/// more than a retransmission timeout.
const LIFE: Tick = 10_000;
/// Flows remembered; the oldest are forgotten first. A FIN repeated after that is answered with RST.
const FLOWS: usize = 8192;

impl Linger {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            ended: HashMap::with_hasher(Seeded(seed)),
            order: VecDeque::new(),
        }
    }

    /// Remembers a flow whose last acknowledgement was `last`.
    pub(crate) fn add(&mut self, now: Tick, key: FlowKey, last: Bare) {
        let expires = now + LIFE;
        self.ended.insert(key, Ended { last, expires });
        self.order.push_back((key, expires));
        while self.order.front().is_some_and(|oldest| oldest.1 <= now) || self.order.len() > FLOWS {
            self.forget_oldest();
        }
    }

    /// The acknowledgement to repeat for `key`, if it ended not long ago.
    pub(crate) fn find(&self, now: Tick, key: &FlowKey) -> Option<Bare> {
        self.ended
            .get(key)
            .filter(|ended| now < ended.expires)
            .map(|ended| ended.last)
    }

    /// Forgets `key`: its addresses are in use again.
    pub(crate) fn remove(&mut self, key: &FlowKey) {
        self.ended.remove(key);
    }

    /// Flows remembered, and the bound on them: for the invariants.
    pub(crate) fn count(&self) -> (usize, usize) {
        (self.ended.len().max(self.order.len()), FLOWS)
    }

    fn forget_oldest(&mut self) {
        let Some((key, expires)) = self.order.pop_front() else {
            return;
        };
        if self
            .ended
            .get(&key)
            .is_some_and(|ended| ended.expires == expires)
        {
            self.ended.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> FlowKey {
        FlowKey::new(([10, 0, 0, 1], port).into(), ([10, 0, 0, 2], 80).into())
    }

    #[test]
    fn an_ended_flow_is_remembered_for_its_time() {
        let mut linger = Linger::new(1);
        let last = Bare {
            sequence: 5,
            acknowledgement: Some(6),
            window: 7,
        };
        linger.add(100, key(1), last);

        assert_eq!(linger.find(100 + LIFE - 1, &key(1)), Some(last));
        assert_eq!(linger.find(100 + LIFE, &key(1)), None);
    }

    #[test]
    fn a_flood_of_short_flows_is_bounded() {
        let mut linger = Linger::new(1);
        for port in 0..=u16::MAX {
            linger.add(1, key(port), Bare::default());
        }

        assert_eq!(linger.count(), (FLOWS, FLOWS));
        assert!(linger.find(2, &key(u16::MAX)).is_some());
    }
}
