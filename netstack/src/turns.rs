//! Which flow sends its next packet.
//!
//! Flows with little to say go first: an answer to a keystroke shall not wait for a packet of 64 KiB from each of a hundred
//! downloads. Within either kind they take turns, a packet each. It knows only indices.

use std::collections::VecDeque;

/// How much a flow has to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// Less than [`SMALL`]; often an acknowledgement alone.
    Small,
    Bulk,
}

/// Bytes queued below which a flow goes first.
const SMALL: usize = 4 << 10;

/// Packets of small flows that may go before one of the others, so that those are never shut out.
const IN_A_ROW: u32 = 16;

impl Load {
    pub(crate) fn of(queued: usize) -> Self {
        if queued < SMALL {
            Self::Small
        } else {
            Self::Bulk
        }
    }
}

/// Flows that have something to send, or may have.
#[derive(Default)]
pub(crate) struct Turns {
    small: VecDeque<u32>,
    bulk: VecDeque<u32>,
    in_a_row: u32,
}

impl Turns {
    /// Lines a flow up. It must not be in line already.
    pub(crate) fn push(&mut self, index: u32, load: Load) {
        match load {
            Load::Small => self.small.push_back(index),
            Load::Bulk => self.bulk.push_back(index),
        }
    }

    /// Takes the next one out of the line.
    pub(crate) fn pop(&mut self) -> Option<u32> {
        let bulk_is_due = self.in_a_row >= IN_A_ROW && !self.bulk.is_empty();
        let small = if bulk_is_due {
            None
        } else {
            self.small.pop_front()
        };
        match small {
            Some(index) => {
                self.in_a_row += 1;
                Some(index)
            }
            None => {
                self.in_a_row = 0;
                self.bulk.pop_front()
            }
        }
    }

    /// Whether a flow is in line: for the invariants.
    pub(crate) fn contains(&self, index: u32) -> bool {
        self.small.contains(&index) || self.bulk.contains(&index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_flows_go_first_and_each_kind_takes_turns() {
        let mut turns = Turns::default();
        for (index, queued) in [(1, 1 << 20), (2, SMALL), (3, 0), (4, SMALL - 1)] {
            turns.push(index, Load::of(queued));
        }

        let order: Vec<u32> = std::iter::from_fn(|| turns.pop()).collect();

        assert_eq!(order, [3, 4, 1, 2]);
    }

    #[test]
    fn a_flood_of_small_packets_does_not_shut_out_the_others() {
        let mut turns = Turns::default();
        turns.push(1, Load::Bulk);
        turns.push(2, Load::Small);

        let bulk_came_after = (0..).find(|_| {
            let index = turns.pop().unwrap();
            turns.push(2, Load::Small);
            index == 1
        });

        assert_eq!(bulk_came_after, Some(IN_A_ROW));
    }
}
