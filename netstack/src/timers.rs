//! When to look at a flow again: a timer wheel of one-millisecond ticks.
//!
//! One timer per index, in an intrusive list per slot, so arming, moving and cancelling cost the same whatever the number
//! of flows. Deadlines past one turn of the wheel (about 4 s) stay in their slot for another round. It knows only ticks.

use crate::sys;

/// A point on the wheel, in milliseconds since the stack's epoch.
pub(crate) type Tick = u64;

/// Timers for the indices of one slab.
pub(crate) struct Wheel {
    heads: Vec<u32>,
    occupied: [u64; SLOTS / 64],
    nodes: Vec<Node>,
    /// The last tick that was expired. Every armed deadline lies after it.
    now: Tick,
    armed: usize,
    due: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Node {
    next: u32,
    previous: u32,
    deadline: Tick,
}

const SLOTS: usize = 4096;
const NONE: u32 = u32::MAX;
const UNARMED: Tick = Tick::MAX;
const IDLE: Node = Node {
    next: NONE,
    previous: NONE,
    deadline: UNARMED,
};

impl Wheel {
    pub(crate) fn new() -> Self {
        Self {
            heads: vec![NONE; SLOTS],
            occupied: [0; SLOTS / 64],
            nodes: Vec::new(),
            now: 0,
            armed: 0,
            due: Vec::new(),
        }
    }

    /// Sets the one timer of `index`. A deadline that has passed fires at the next tick.
    pub(crate) fn arm(&mut self, index: u32, deadline: Tick) {
        let deadline = deadline.clamp(self.now + 1, UNARMED - 1);
        match self.deadline(index) {
            Some(armed) if armed == deadline => return,
            Some(_) => self.unlink(index),
            None => {}
        }
        self.link(index, deadline);
    }

    /// Cancels the timer of `index`, if any.
    pub(crate) fn disarm(&mut self, index: u32) {
        if self.deadline(index).is_some() {
            self.unlink(index);
        }
    }

    /// Asks the processor for the timer of `index`, which is about to be used.
    pub(crate) fn fetch(&self, index: u32) {
        if let Some(node) = self.nodes.get(index as usize) {
            sys::fetch(node);
        }
    }

    /// When the timer of `index` fires.
    pub(crate) fn deadline(&self, index: u32) -> Option<Tick> {
        let node = self.nodes.get(index as usize)?;
        (node.deadline != UNARMED).then_some(node.deadline)
    }

    /// A tick at or before the earliest deadline. Early by whole turns of the wheel for deadlines further away.
    pub(crate) fn next(&self) -> Option<Tick> {
        if self.armed == 0 {
            return None;
        }
        let first = self.now + 1;
        let distance = self.distance_to_occupied(slot(first))?;
        Some(first + distance as Tick)
    }

    /// The tick the wheel stands at.
    pub(crate) fn now(&self) -> Tick {
        self.now
    }

    /// Moves the wheel to `now`; what became due is then handed out by `pop_due`.
    pub(crate) fn expire(&mut self, now: Tick) {
        while self.now < now && self.armed > 0 {
            let first = self.now + 1;
            let Some(distance) = self.distance_to_occupied(slot(first)) else {
                break;
            };
            let tick = first + distance as Tick;
            if tick > now {
                break;
            }
            self.now = tick;
            self.collect(slot(tick), now);
        }
        self.now = self.now.max(now);
    }

    /// The next index whose timer fired. Its timer is off.
    pub(crate) fn pop_due(&mut self) -> Option<u32> {
        self.due.pop()
    }

    /// How many timers are armed, by counting the lists: for the invariants.
    pub(crate) fn count(&self) -> (usize, usize) {
        let linked = self
            .nodes
            .iter()
            .filter(|node| node.deadline != UNARMED)
            .count();
        (self.armed, linked)
    }

    fn collect(&mut self, slot: usize, now: Tick) {
        let mut index = self.heads[slot];
        while index != NONE {
            let node = self.nodes[index as usize];
            if node.deadline <= now {
                self.unlink(index);
                self.due.push(index);
            }
            index = node.next;
        }
    }

    /// How many slots after `from` (itself included) the first occupied one lies.
    fn distance_to_occupied(&self, from: usize) -> Option<usize> {
        let words = self.occupied.len();
        for step in 0..=words {
            let word = (from / 64 + step) % words;
            let mut bits = self.occupied[word];
            if step == 0 {
                bits &= u64::MAX << (from % 64);
            } else if step == words {
                bits &= !(u64::MAX << (from % 64));
            }
            if bits != 0 {
                let found = word * 64 + bits.trailing_zeros() as usize;
                return Some((found + SLOTS - from) % SLOTS);
            }
        }
        None
    }

    fn link(&mut self, index: u32, deadline: Tick) {
        if self.nodes.len() <= index as usize {
            self.nodes.resize(index as usize + 1, IDLE);
        }
        let slot = slot(deadline);
        let next = self.heads[slot];
        self.nodes[index as usize] = Node {
            next,
            previous: NONE,
            deadline,
        };
        if next != NONE {
            self.nodes[next as usize].previous = index;
        }
        self.heads[slot] = index;
        self.occupied[slot / 64] |= 1 << (slot % 64);
        self.armed += 1;
    }

    fn unlink(&mut self, index: u32) {
        let node = std::mem::replace(&mut self.nodes[index as usize], IDLE);
        let slot = slot(node.deadline);
        if node.previous == NONE {
            self.heads[slot] = node.next;
        } else {
            self.nodes[node.previous as usize].next = node.next;
        }
        if node.next != NONE {
            self.nodes[node.next as usize].previous = node.previous;
        }
        if self.heads[slot] == NONE {
            self.occupied[slot / 64] &= !(1 << (slot % 64));
        }
        self.armed -= 1;
    }
}

fn slot(tick: Tick) -> usize {
    (tick % SLOTS as Tick) as usize
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn fired(wheel: &mut Wheel, now: Tick) -> Vec<u32> {
        wheel.expire(now);
        let mut due: Vec<u32> = std::iter::from_fn(|| wheel.pop_due()).collect();
        due.sort_unstable();
        due
    }

    #[test]
    fn a_timer_fires_at_its_tick_and_not_before() {
        let mut wheel = Wheel::new();
        wheel.arm(3, 10);

        assert_eq!(fired(&mut wheel, 9), []);
        assert_eq!(fired(&mut wheel, 10), [3]);
        assert_eq!(fired(&mut wheel, 20_000), []);
    }

    #[test]
    fn a_deadline_many_turns_away_is_kept() {
        let mut wheel = Wheel::new();
        wheel.arm(0, 60_000);

        assert_eq!(fired(&mut wheel, 59_999), []);
        assert_eq!(fired(&mut wheel, 60_000), [0]);
    }

    proptest! {
        #[test]
        fn behaves_as_a_sorted_map(steps in prop::collection::vec((0u32..20, 0u64..9_000, any::<bool>()), 1..200)) {
            let mut wheel = Wheel::new();
            let mut model: BTreeMap<u32, Tick> = BTreeMap::new();
            let mut now = 0;
            for (index, amount, advance) in steps {
                if advance {
                    now += amount;
                    let expected: Vec<u32> = model.iter().filter(|(_, at)| **at <= now).map(|(index, _)| *index).collect();
                    model.retain(|_, at| *at > now);
                    prop_assert_eq!(fired(&mut wheel, now), expected);
                } else if amount % 7 == 0 {
                    wheel.disarm(index);
                    model.remove(&index);
                } else {
                    wheel.arm(index, now + amount);
                    model.insert(index, (now + amount).max(now + 1));
                }
                let earliest = model.values().min().copied();
                prop_assert_eq!(wheel.next().is_some(), earliest.is_some());
                prop_assert!(wheel.next() <= earliest);
            }
        }
    }
}
