//! Which flow may hand the next frame to HTTP/2.
//!
//! h2 has no priorities and queues without a bound, so at most a few frames are given to it at a time, in all. Flows
//! take turns with a quantum; flows with little to say go first, but not without end. Pure: a flow asks, a frame that
//! was written gives its slot back, and the answer is who goes next.

use std::collections::VecDeque;

use slab::Slab;

/// Names one flow of one connection.
pub(crate) type LaneId = usize;

/// Frames that h2 may hold at a time, of all flows together. Two keep the writer busy while the next is prepared.
pub(crate) const SLOTS: u32 = 2;

/// Bytes a flow may send before the next one in line.
const QUANTUM: u32 = 64 * 1024;

/// A request below this many bytes is a small one.
const SMALL: usize = 4 * 1024;

/// Small requests served in a row while a large one waits; together they are one quantum.
const SMALL_RUN: u32 = 16;

/// Invariant: while a slot is free nobody waits.
pub(crate) struct Scheduler {
    free: u32,
    lanes: Slab<LaneState>,
    small: VecDeque<Waiting>,
    bulk: VecDeque<Waiting>,
    small_run: u32,
    tickets: u64,
}

#[derive(Clone, Copy, Default)]
struct LaneState {
    turn: Turn,
    /// What is left of the quantum.
    left: u32,
    bytes: u32,
}

/// Where a flow stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Asked for nothing.
    #[default]
    Idle,
    /// Waits under this ticket; an older ticket in a queue is void.
    Queued(u64),
    /// Holds a slot it has not used yet.
    Granted,
}

#[derive(Clone, Copy)]
struct Waiting {
    lane: LaneId,
    ticket: u64,
}

impl Scheduler {
    pub(crate) fn new(slots: u32) -> Self {
        Self {
            free: slots,
            lanes: Slab::new(),
            small: VecDeque::new(),
            bulk: VecDeque::new(),
            small_run: 0,
            tickets: 0,
        }
    }

    pub(crate) fn open(&mut self) -> LaneId {
        self.lanes.insert(LaneState::default())
    }

    pub(crate) fn turn(&self, lane: LaneId) -> Turn {
        self.lanes[lane].turn
    }

    /// Asks for a turn to send `bytes`. The lane is granted now or waits.
    pub(crate) fn request(&mut self, lane: LaneId, bytes: usize) -> Turn {
        debug_assert_eq!(self.turn(lane), Turn::Idle);
        let state = &mut self.lanes[lane];
        state.bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        if self.free > 0 {
            self.free -= 1;
            return self.grant(lane);
        }
        self.tickets += 1;
        let waiting = Waiting {
            lane,
            ticket: self.tickets,
        };
        state.turn = Turn::Queued(waiting.ticket);
        match (bytes < SMALL, state.left) {
            (true, _) => self.small.push_back(waiting),
            (false, 0) => {
                state.left = QUANTUM;
                self.bulk.push_back(waiting);
            }
            (false, _) => self.bulk.push_front(waiting),
        }
        self.turn(lane)
    }

    /// The lane uses its slot; it may ask again at once.
    pub(crate) fn take(&mut self, lane: LaneId) {
        debug_assert_eq!(self.turn(lane), Turn::Granted);
        self.lanes[lane].turn = Turn::Idle;
    }

    /// A slot came back. Returns who holds it now.
    pub(crate) fn release(&mut self) -> Option<LaneId> {
        let next = self.next();
        match next {
            Some(lane) => drop(self.grant(lane)),
            None => self.free += 1,
        }
        next
    }

    /// The lane no longer wants a turn. Returns who holds its slot now, if it had one.
    pub(crate) fn cancel(&mut self, lane: LaneId) -> Option<LaneId> {
        match std::mem::take(&mut self.lanes[lane].turn) {
            Turn::Granted => self.release(),
            Turn::Idle | Turn::Queued(_) => None,
        }
    }

    /// Forgets an idle lane.
    pub(crate) fn close(&mut self, lane: LaneId) {
        debug_assert_eq!(self.turn(lane), Turn::Idle);
        self.lanes.remove(lane);
    }

    fn grant(&mut self, lane: LaneId) -> Turn {
        let state = &mut self.lanes[lane];
        state.left = state.left.saturating_sub(state.bytes);
        state.turn = Turn::Granted;
        state.turn
    }

    fn next(&mut self) -> Option<LaneId> {
        loop {
            let small_first = self.bulk.is_empty() || self.small_run < SMALL_RUN;
            let waiting = match small_first.then(|| self.small.pop_front()).flatten() {
                Some(small) => {
                    self.small_run = if self.bulk.is_empty() {
                        0
                    } else {
                        self.small_run + 1
                    };
                    small
                }
                None => {
                    self.small_run = 0;
                    self.bulk.pop_front().or_else(|| self.small.pop_front())?
                }
            };
            // A void ticket may belong to a lane that was closed, or to another one in the same place.
            if self
                .lanes
                .get(waiting.lane)
                .is_some_and(|state| state.turn == Turn::Queued(waiting.ticket))
            {
                return Some(waiting.lane);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const FRAME: usize = 32 * 1024;

    /// Every lane asks again as soon as it was served; returns the bytes each got in `turns` turns.
    fn served(sizes: &[usize], turns: usize) -> Vec<usize> {
        let mut scheduler = Scheduler::new(1);
        let lanes: Vec<_> = sizes.iter().map(|_| scheduler.open()).collect();
        let mut got = vec![0; sizes.len()];
        let mut holder = None;
        for (lane, size) in lanes.iter().zip(sizes) {
            if scheduler.request(*lane, *size) == Turn::Granted {
                holder = Some(*lane);
            }
        }
        for _ in 0..turns {
            let lane = holder.expect("somebody always waits");
            got[lane] += sizes[lane];
            scheduler.take(lane);
            scheduler.request(lane, sizes[lane]);
            holder = scheduler.release();
        }
        got
    }

    #[test]
    fn equal_flows_get_equal_shares() {
        let got = served(&[FRAME; 5], 1000);
        assert!(
            got.iter()
                .all(|bytes| (6_400_000..6_720_000).contains(bytes)),
            "{got:?}"
        );
    }

    #[test]
    fn frame_size_does_not_buy_more_than_a_quantum() {
        let got = served(&[FRAME, FRAME / 4, FRAME / 2], 7000);
        let (least, most) = (got.iter().min().unwrap(), got.iter().max().unwrap());
        assert!(*most as f64 / *least as f64 <= 1.1, "{got:?}");
    }

    #[test]
    fn small_requests_go_first_but_leave_room() {
        let mut order = Vec::new();
        let mut scheduler = Scheduler::new(1);
        let (holder, bulk, small) = (scheduler.open(), scheduler.open(), scheduler.open());
        scheduler.request(holder, FRAME);
        scheduler.request(bulk, FRAME);
        scheduler.request(small, 100);
        scheduler.take(holder);
        for _ in 0..40 {
            let lane = scheduler.release().unwrap();
            order.push(lane);
            scheduler.take(lane);
            scheduler.request(lane, if lane == bulk { FRAME } else { 100 });
        }
        let bulk_at: Vec<_> = (0..order.len()).filter(|at| order[*at] == bulk).collect();
        assert_eq!(bulk_at, [16, 33]);
    }

    #[test]
    fn a_cancelled_grant_passes_on_and_a_cancelled_wait_is_skipped() {
        let mut scheduler = Scheduler::new(1);
        let (a, b, c) = (scheduler.open(), scheduler.open(), scheduler.open());
        assert_eq!(scheduler.request(a, FRAME), Turn::Granted);
        scheduler.request(b, FRAME);
        scheduler.request(c, FRAME);
        assert_eq!(scheduler.cancel(b), None);
        scheduler.close(b);
        let reused = scheduler.open();
        assert_eq!(
            reused, b,
            "the slab reuses the place, which is what makes the test sharp"
        );
        assert_eq!(scheduler.cancel(a), Some(c));
    }

    proptest! {
        /// Against a plain model: slots are never over-used, never lost, and nobody waits while one is free.
        #[test]
        fn slots_are_conserved(steps in prop::collection::vec((0..4_u8, 0..8_usize, 1..100_000_usize), 1..300)) {
            let mut scheduler = Scheduler::new(SLOTS);
            let lanes: Vec<_> = (0..8).map(|_| scheduler.open()).collect();
            let mut writing = 0;
            for (step, lane, bytes) in steps {
                let lane = lanes[lane];
                match (step, scheduler.turn(lane)) {
                    (0 | 1, Turn::Idle) => drop(scheduler.request(lane, bytes)),
                    (0 | 1, Turn::Granted) => { scheduler.take(lane); writing += 1; }
                    (2, Turn::Idle | Turn::Queued(_) | Turn::Granted) if writing > 0 => {
                        writing -= 1;
                        scheduler.release();
                    }
                    (3, Turn::Idle | Turn::Queued(_) | Turn::Granted) => drop(scheduler.cancel(lane)),
                    (_, Turn::Idle | Turn::Queued(_) | Turn::Granted) => {}
                }
                let mut turns = HashMap::new();
                for lane in &lanes {
                    let name = match scheduler.turn(*lane) {
                        Turn::Idle => "idle",
                        Turn::Queued(_) => "queued",
                        Turn::Granted => "granted",
                    };
                    *turns.entry(name).or_insert(0_u32) += 1;
                }
                let granted = turns.get("granted").copied().unwrap_or(0);
                prop_assert_eq!(granted + writing + scheduler.free, SLOTS);
                prop_assert!(scheduler.free == 0 || !turns.contains_key("queued"));
            }
        }
    }
}
