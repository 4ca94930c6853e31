//! What must hold between any two calls, for tests and the fuzzer to ask after each.

use crate::flow::Phase;
use crate::fragments;
use crate::icmp;
use crate::outbox::Outbox;
use crate::{Event, Stack};

impl Stack {
    /// Panics if the parts of the stack contradict each other or a bound is passed. Slow: it looks at every flow.
    pub fn check(&self) {
        self.check_flows();
        self.check_memory();
        self.associations.check();
        let (armed, linked) = self.wheel.count();
        assert_eq!(armed, linked, "armed timers are on the wheel");
        assert!(armed <= self.flows.len(), "at most one timer per flow");
        let echoes = self
            .events
            .iter()
            .filter(|event| matches!(event, Event::Echo(_)))
            .count();
        assert_eq!(echoes, self.echoes, "pings counted");
        assert!(echoes <= icmp::WAITING, "pings within their bound");
    }

    fn check_flows(&self) {
        assert!(
            self.flows.len() <= self.config.flows,
            "flows within their limit"
        );
        let mut listed = 0;
        for (index, flow) in self.flows.iter() {
            let found = self.demux.find(&flow.key) == Some(index);
            let (expected, socket) = match flow.phase {
                Phase::Dialing | Phase::Answered | Phase::Open | Phase::Aborting => (true, true),
                Phase::Reset => (false, true),
                Phase::Done => (false, false),
            };
            assert_eq!(
                found, expected,
                "a flow in {:?} is found by its key",
                flow.phase
            );
            assert_eq!(
                flow.loan.is_some(),
                socket,
                "a flow in {:?} has a socket",
                flow.phase
            );
            listed += usize::from(found);
            if flow.dirty {
                assert!(self.turns.contains(index), "a dirty flow is in line");
            }
            if flow.phase == Phase::Dialing {
                assert!(
                    self.wheel.deadline(index).is_none(),
                    "a flow that is dialed has no timer"
                );
            }
        }
        assert_eq!(self.demux.len(), listed, "one hash entry per flow");
    }

    fn check_memory(&self) {
        let loans: usize = self
            .flows
            .iter()
            .filter_map(|(_, flow)| Some(flow.loan.as_ref()?.cost()))
            .sum();
        let (used, budget) = self.pool.used();
        assert_eq!(used, loans, "the budget counts what flows hold");
        assert!(used <= budget, "rings within their budget");
        let (counted, held) = self.fragments.count();
        assert_eq!(counted, held, "bytes of fragments");
        assert!(held <= fragments::BYTES, "fragments within their bound");
        let (counted, held) = self.outbox.count();
        assert_eq!(counted, held, "bytes of waiting packets");
        assert!(held <= Outbox::BYTES, "waiting packets within their bound");
        let (lingering, limit) = self.linger.count();
        assert!(lingering <= limit, "ended flows within their bound");
    }
}
