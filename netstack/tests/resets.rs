//! RST in every state of a flow (RFC 9293 §3.10.7), from either end: who hears of it, and that nothing is left. The peer
//! is made of hand-written segments, since no kernel resets a connection that its program has closed.
#![allow(clippy::unwrap_used, reason = "a test that is surprised panics")]

mod support;

use std::time::Instant;

use smoltcp::wire::TcpControl;
use support::packets::{answers, say, segment, tcp};
use tp_netstack::{Config, DialOutcome, Event, FlowId, Received, Stack};

/// States of the stack's end; `Held` is before the dial has settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Held,
    SynReceived,
    Established,
    FinWait1,
    FinWait2,
    CloseWait,
    LastAck,
    Closing,
    TimeWait,
}

const STATES: [State; 9] = [
    State::Held,
    State::SynReceived,
    State::Established,
    State::FinWait1,
    State::FinWait2,
    State::CloseWait,
    State::LastAck,
    State::Closing,
    State::TimeWait,
];

/// The program's sequence number of its SYN.
const FIRST: u32 = u32::MAX - 2;

/// A stack with one flow, and the numbers of both ends.
struct Connection {
    stack: Stack,
    now: Instant,
    flow: FlowId,
    /// The program's next sequence number.
    next: u32,
    /// What the program expects from the stack.
    expected: u32,
}

impl Connection {
    fn in_state(state: State) -> Self {
        let now = Instant::now();
        let mut stack = Stack::new(Config::default(), now);
        let said = say(&mut stack, now, &segment(TcpControl::Syn, FIRST, None, &[]));
        assert!(said.is_empty(), "a SYN is held");
        let Some(Event::FlowOpened { id: flow, .. }) = stack.poll_event() else {
            panic!("no flow")
        };
        let mut this = Self {
            stack,
            now,
            flow,
            next: FIRST.wrapping_add(1),
            expected: 0,
        };
        this.advance(state);
        while this.stack.poll_event().is_some() {}
        this
    }

    fn advance(&mut self, state: State) {
        let Self {
            stack, now, flow, ..
        } = self;
        if state == State::Held {
            return;
        }
        stack.dialed(*flow, DialOutcome::Accepted, *now).unwrap();
        let syn_ack = answers(stack, *now).remove(0);
        self.expected = (tcp(&syn_ack).seq_number() + 1).0 as u32;
        if state == State::SynReceived {
            return;
        }
        self.say(TcpControl::None);
        match state {
            State::Held | State::SynReceived | State::Established => {}
            State::FinWait1 => self.finish(),
            State::FinWait2 | State::TimeWait => {
                self.finish();
                self.expected = self.expected.wrapping_add(1);
                self.say(TcpControl::None);
                if state == State::TimeWait {
                    self.say(TcpControl::Fin);
                }
            }
            State::CloseWait => drop(self.say(TcpControl::Fin)),
            State::LastAck => {
                self.say(TcpControl::Fin);
                self.finish();
            }
            State::Closing => {
                self.finish();
                self.say(TcpControl::Fin);
            }
        }
    }

    fn finish(&mut self) {
        self.stack.finish(self.flow).unwrap();
        let sent = answers(&mut self.stack, self.now);
        assert!(
            sent.iter().any(|packet| tcp(packet).fin()),
            "a FIN goes out"
        );
    }

    /// The program's next segment, which acknowledges what it expects.
    fn say(&mut self, control: TcpControl) -> Vec<Vec<u8>> {
        let packet = segment(control, self.next, Some(self.expected), &[]);
        self.next = self.next.wrapping_add(control.len() as u32);
        say(&mut self.stack, self.now, &packet)
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.stack.poll_event()).collect()
    }
}

#[test]
fn a_reset_by_the_program_is_told_in_every_state_and_answered_in_none() {
    for state in STATES {
        let mut connection = Connection::in_state(state);
        let flow = connection.flow;

        let said = connection.say(TcpControl::Rst);

        assert_eq!(said, Vec::<Vec<u8>>::new(), "{state:?}");
        let events = connection.events();
        // In TIME-WAIT both ends have all they wanted (RFC 1337 §3 lets a reset pass unnoticed).
        let expected = if state == State::TimeWait {
            vec![]
        } else {
            vec![Event::Reset(flow)]
        };
        assert_eq!(events, expected, "{state:?}");
        connection.stack.check();
        connection.stack.reset(flow);
        assert!(
            answers(&mut connection.stack, connection.now).is_empty(),
            "{state:?}"
        );
        assert_eq!(connection.stack.flow_count(), 0, "{state:?}");
        connection.stack.check();
    }
}

#[test]
fn a_reset_from_outside_the_window_changes_nothing() {
    for state in STATES.into_iter().filter(|state| *state != State::Held) {
        let mut connection = Connection::in_state(state);
        let blind = segment(
            TcpControl::Rst,
            connection.next.wrapping_add(1 << 30),
            Some(connection.expected),
            &[],
        );

        let said = say(&mut connection.stack, connection.now, &blind);

        assert!(said.iter().all(|packet| !tcp(packet).rst()), "{state:?}");
        assert_eq!(connection.events(), [], "{state:?}");
        connection.stack.check();
    }
}

#[test]
fn a_reset_by_the_owner_reaches_the_program_in_every_state() {
    for state in STATES.into_iter().filter(|state| *state != State::TimeWait) {
        let mut connection = Connection::in_state(state);

        connection.stack.reset(connection.flow);

        let said = answers(&mut connection.stack, connection.now);
        let [reset] = &said[..] else {
            panic!("{state:?}: {} packets", said.len())
        };
        let reset = tcp(reset);
        assert!(reset.rst(), "{state:?}");
        // What the program's kernel takes (RFC 9293 §3.10.7.3 and .4).
        if state == State::Held {
            assert_eq!(reset.ack_number().0 as u32, FIRST.wrapping_add(1));
        } else {
            let sent = reset.seq_number().0 as u32;
            assert!(
                sent.wrapping_sub(connection.expected) <= 1,
                "{state:?}: {sent}"
            );
        }
        assert_eq!(connection.stack.flow_count(), 0, "{state:?}");
        connection.stack.check();
    }
}

#[test]
fn both_ends_may_close_at_the_same_time_and_the_owner_hears_that_it_is_over() {
    let mut connection = Connection::in_state(State::Closing);
    let flow = connection.flow;
    assert_eq!(
        connection.stack.recv(flow, <[u8]>::len),
        Ok(Received::Finished)
    );

    connection.expected = connection.expected.wrapping_add(1);
    connection.say(TcpControl::None);

    assert_eq!(connection.events(), [Event::Closed(flow)]);
    assert_eq!(connection.stack.flow_count(), 0);
}
