//! One TCP flow: what smoltcp's socket went through, told as events.
//!
//! The socket speaks TCP with the program; the owner of the stack dials the real destination. In between a flow has a phase
//! of its own, because a dial, a reset and an orderly end mean more to the owner than to the socket. It knows nothing of
//! packets, timers or other flows.

use smoltcp::socket::tcp::{self, State};

use crate::demux::FlowKey;
use crate::reply::Bare;
use crate::rings::Loan;
use crate::timers::Tick;

/// Where a flow stands with its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The owner dials; the program's SYN is held.
    Dialing,
    /// The dial succeeded; the SYN-ACK is under way.
    Answered,
    /// Bytes move, until both directions have ended.
    Open,
    /// The program reset it. What it had sent can still be read, until the owner lets go.
    Reset,
    /// The owner let go; the RST is still to be sent.
    Aborting,
    /// Both directions ended in order; only the event is left.
    Done,
}

/// What a flow tells its owner, by the same names as [`crate::Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    Readable,
    Writable,
    PeerFinished,
    Reset,
    Closed,
}

/// The parts of a segment that decide about its flow.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Segment {
    pub(crate) reset: bool,
    /// The acknowledgement number that covers this segment, FIN included.
    pub(crate) next: u32,
}

/// One flow.
pub(crate) struct Flow {
    pub(crate) key: FlowKey,
    pub(crate) phase: Phase,
    /// `None` once the flow is done.
    pub(crate) loan: Option<Loan>,
    /// Largest TCP payload that the program and the path to it take in one segment.
    pub(crate) segment: usize,
    /// Sequence number of the program's SYN.
    pub(crate) syn: u32,
    /// The last acknowledgement sent.
    pub(crate) last: Bare,
    /// Whether it is in line to send.
    pub(crate) dirty: bool,
    /// Whether pages of its rings may be resident.
    pub(crate) touched: bool,
    /// When a packet last came or went.
    pub(crate) active: Tick,
    /// Since when the program has owed an acknowledgement and said nothing at all.
    pub(crate) silent: Option<Tick>,
    /// Whether bytes may wait behind a gap in the receive ring.
    gap: bool,
    /// When our FIN is to be repeated by this crate, and how long the wait for its acknowledgement is.
    pub(crate) fin_repeat: Option<(Tick, Tick)>,
    /// What acknowledges the program's FIN, once it came.
    fin: Option<u32>,
    orderly: bool,
    finish_wanted: bool,
    told_finished: bool,
    wants_read: bool,
    wants_write: bool,
}

impl Flow {
    pub(crate) fn new(key: FlowKey, loan: Loan, segment: usize, syn: u32, now: Tick) -> Self {
        Self {
            key,
            phase: Phase::Dialing,
            loan: Some(loan),
            segment,
            syn,
            last: Bare::default(),
            dirty: false,
            touched: false,
            active: now,
            silent: None,
            gap: false,
            fin_repeat: None,
            fin: None,
            orderly: false,
            finish_wanted: false,
            told_finished: false,
            wants_read: true,
            wants_write: true,
        }
    }

    pub(crate) fn socket(&self) -> Option<&tcp::Socket<'_>> {
        self.loan.as_ref().map(|loan| loan.socket.socket())
    }

    /// Runs `f` on the socket; `None` once the flow is done.
    pub(crate) fn with_socket<R>(
        &mut self,
        f: impl for<'s> FnOnce(&mut tcp::Socket<'s>) -> R,
    ) -> Option<R> {
        self.loan.as_mut().map(|loan| loan.socket.with_socket(f))
    }

    /// Whether the owner may still name this flow.
    pub(crate) fn is_owned(&self) -> bool {
        match self.phase {
            Phase::Dialing | Phase::Answered | Phase::Open | Phase::Reset | Phase::Done => true,
            Phase::Aborting => false,
        }
    }

    /// Whether the socket may be polled for packets to send. While the dial is under way it would ask for it for ever; in
    /// TIME-WAIT it would, after 10 s, throw away what the owner has not read.
    pub(crate) fn may_send_packets(&self) -> bool {
        match self.phase {
            Phase::Answered | Phase::Open | Phase::Aborting => !self.is_quiet(),
            Phase::Dialing | Phase::Reset | Phase::Done => false,
        }
    }

    /// Whether both FINs are acknowledged, so that only repetitions can come.
    fn is_quiet(&self) -> bool {
        self.fin.is_some()
            && self.last.acknowledgement == self.fin
            && self
                .socket()
                .is_some_and(|socket| socket.state() == State::TimeWait)
    }

    /// Takes note of an incoming segment after the socket has seen it. `replied`: the socket answered at once, which it
    /// does as long as there is a gap; `grew`: the receive queue did.
    pub(crate) fn after_segment(
        &mut self,
        segment: Segment,
        replied: bool,
        grew: bool,
        tell: impl FnMut(Notice),
    ) {
        if replied {
            self.gap = true;
        } else if grew {
            self.gap = false;
        }
        self.touched |= grew || self.gap;
        if self.fin.is_none()
            && self
                .socket()
                .is_some_and(|socket| has_received_fin(socket.state()))
        {
            self.fin = Some(segment.next);
        }
        self.progress(segment.reset, tell);
    }

    /// Tells the owner what has become possible, and moves to the next phase if the socket did.
    pub(crate) fn progress(&mut self, reset: bool, mut tell: impl FnMut(Notice)) {
        let Some(state) = self.socket().map(tcp::Socket::state) else {
            return;
        };
        match self.phase {
            Phase::Dialing | Phase::Answered if matches!(state, State::Listen | State::Closed) => {
                self.phase = Phase::Reset;
                tell(Notice::Reset);
            }
            Phase::Answered if state != State::SynReceived => {
                self.phase = Phase::Open;
                self.progress_open(state, reset, tell);
            }
            Phase::Open => self.progress_open(state, reset, tell),
            Phase::Dialing | Phase::Answered | Phase::Reset | Phase::Aborting | Phase::Done => {}
        }
    }

    fn progress_open(&mut self, state: State, reset: bool, mut tell: impl FnMut(Notice)) {
        self.orderly |= state == State::TimeWait || (state == State::Closed && !reset);
        if self.wants_read && self.socket().is_some_and(tcp::Socket::can_recv) {
            self.wants_read = false;
            tell(Notice::Readable);
        }
        if !self.told_finished && (self.orderly || has_received_fin(state)) {
            self.told_finished = true;
            tell(Notice::PeerFinished);
        }
        if state == State::Closed && !self.orderly {
            self.phase = Phase::Reset;
            return tell(Notice::Reset);
        }
        if self.wants_write && self.has_room() {
            self.wants_write = false;
            tell(Notice::Writable);
        }
        self.finish_if_wanted();
        let over = state == State::Closed || self.is_quiet();
        if over && !self.socket().is_some_and(tcp::Socket::can_recv) {
            self.phase = Phase::Done;
            tell(Notice::Closed);
        }
    }

    /// Room for a quarter of the ring: fewer, larger writes.
    fn has_room(&self) -> bool {
        self.socket().is_some_and(|socket| {
            socket.may_send()
                && socket.send_capacity() - socket.send_queue() >= socket.send_capacity() / 4
        })
    }

    /// Lends the oldest received bytes to `f`, which answers how many it took. `None` if there are none.
    pub(crate) fn recv(&mut self, f: impl FnOnce(&[u8]) -> usize) -> Option<usize> {
        let taken = self.with_socket(|socket| {
            if !socket.can_recv() {
                return None;
            }
            let take = |bytes: &mut [u8]| {
                let taken = f(bytes).min(bytes.len());
                (taken, taken)
            };
            socket.recv(take).ok()
        })?;
        self.wants_read |= !self.socket().is_some_and(tcp::Socket::can_recv);
        taken
    }

    /// Whether the program has ended its direction and all of it was read.
    pub(crate) fn is_finished(&self) -> bool {
        self.told_finished && !self.socket().is_some_and(tcp::Socket::can_recv)
    }

    /// Lends free space of the send ring to `f`, which answers how much of it it filled.
    pub(crate) fn send(&mut self, f: impl FnOnce(&mut [u8]) -> usize) -> usize {
        let outcome = self.with_socket(|socket| {
            if !socket.can_send() {
                return (0, true);
            }
            let fill = |space: &mut [u8]| {
                let filled = f(space).min(space.len());
                (filled, filled)
            };
            let sent = socket.send(fill).unwrap_or(0);
            (sent, !socket.can_send())
        });
        let (sent, full) = outcome.unwrap_or((0, true));
        self.touched |= sent > 0;
        self.wants_write |= full;
        sent
    }

    /// Sends FIN after what is queued; at once, or as soon as the handshake is over.
    pub(crate) fn finish(&mut self) {
        self.finish_wanted = true;
        self.wants_write = false;
        self.finish_if_wanted();
    }

    /// Whether the owner has ended its direction.
    pub(crate) fn has_finished(&self) -> bool {
        self.finish_wanted
    }

    /// Closes the socket once that is safe. smoltcp 0.14 goes from SYN-RECEIVED to FIN-WAIT-1 without a SYN-ACK, so FIN
    /// waits for the handshake's end; and in LAST-ACK it ignores window updates, so after the program's FIN ours waits
    /// until what was sent is acknowledged.
    fn finish_if_wanted(&mut self) {
        let ready = self.socket().is_some_and(|socket| match socket.state() {
            State::Established => true,
            State::CloseWait => socket.send_queue() == 0,
            State::Closed
            | State::Listen
            | State::SynSent
            | State::SynReceived
            | State::FinWait1
            | State::FinWait2
            | State::Closing
            | State::LastAck
            | State::TimeWait => false,
        });
        if self.finish_wanted && ready {
            self.with_socket(|socket| socket.close());
        }
    }

    /// Asks the program for its window, once a second for as long as there are bytes to send. `stuck`: the socket has no
    /// timer.
    ///
    /// smoltcp 0.14 probes a zero window unless bytes are on their way when it hears of it, as it may from an
    /// acknowledgement that was overtaken. When those are lost, its retransmission timer ends at the closed window, and
    /// nothing follows. A keep-alive segment is answered with the window as it is now.
    pub(crate) fn probe_window(&mut self, stuck: bool) {
        let waits = self.queued() > 0;
        if stuck && waits && !self.is_probing() {
            self.set_keep_alive(Some(smoltcp::time::Duration::from_secs(1)));
        } else if !waits && self.is_probing() {
            self.set_keep_alive(None);
        }
    }

    /// Whether the program is asked for its window.
    pub(crate) fn is_probing(&self) -> bool {
        self.socket()
            .is_some_and(|socket| socket.keep_alive().is_some())
    }

    fn set_keep_alive(&mut self, interval: Option<smoltcp::time::Duration>) {
        self.with_socket(|socket| socket.set_keep_alive(interval));
    }

    /// Takes note of a packet that was sent.
    pub(crate) fn after_packet(&mut self, sent: Bare) {
        let repeated = self.last.acknowledgement.is_some()
            && (sent.sequence.wrapping_sub(self.last.sequence) as i32) < 0;
        let sequence = if repeated {
            self.last.sequence
        } else {
            sent.sequence
        };
        self.last = Bare { sequence, ..sent };
    }

    /// Whether our FIN is out, not acknowledged, and everything before it is.
    pub(crate) fn awaits_fin_acknowledgement(&self) -> bool {
        self.socket().is_some_and(|socket| {
            socket.send_queue() == 0
                && matches!(
                    socket.state(),
                    State::FinWait1 | State::Closing | State::LastAck
                )
        })
    }

    /// The FIN to repeat: the last thing sent.
    pub(crate) fn fin_again(&self) -> Bare {
        Bare {
            sequence: self.last.sequence.wrapping_sub(1),
            ..self.last
        }
    }

    /// The acknowledgement to repeat after a flow that this side ended first.
    pub(crate) fn farewell(&self) -> Option<Bare> {
        self.is_quiet().then_some(self.last)
    }

    /// Bytes that the program has not acknowledged, sent or not.
    pub(crate) fn queued(&self) -> usize {
        self.socket().map_or(0, tcp::Socket::send_queue)
    }

    /// Whether the program has to acknowledge something: bytes, our SYN or our FIN.
    pub(crate) fn awaits_acknowledgement(&self) -> bool {
        self.socket().is_some_and(|socket| match socket.state() {
            State::SynReceived | State::FinWait1 | State::Closing | State::LastAck => true,
            State::Established | State::CloseWait => socket.send_queue() > 0,
            State::Closed | State::Listen | State::SynSent | State::FinWait2 | State::TimeWait => {
                false
            }
        })
    }

    /// Whether the program owed an acknowledgement and was silent for [`USER_TIMEOUT`].
    pub(crate) fn has_given_up(&mut self, now: Tick) -> bool {
        if !self.may_send_packets() || !self.awaits_acknowledgement() {
            self.silent = None;
            return false;
        }
        now >= *self.silent.get_or_insert(now) + USER_TIMEOUT
    }

    /// When that will be, if it stays silent.
    pub(crate) fn gives_up_at(&self) -> Option<Tick> {
        self.silent
            .filter(|_| self.may_send_packets())
            .map(|since| since + USER_TIMEOUT)
    }

    /// Whether no byte is queued, in flight or behind a gap.
    pub(crate) fn is_idle(&self) -> bool {
        !self.gap
            && self
                .socket()
                .is_some_and(|socket| socket.recv_queue() == 0 && socket.send_queue() == 0)
    }

    /// Gives the memory of idle rings back.
    pub(crate) fn discard(&mut self) {
        if !self.is_idle() {
            return;
        }
        if let Some(loan) = &mut self.loan {
            loan.socket.discard();
            self.touched = false;
        }
    }
}

/// How long a program may owe an acknowledgement without a sign of life, zero-window probes included, before its flow is
/// given up (RFC 9293 §3.8.3: at least 100 s, and 3 minutes for a SYN).
const USER_TIMEOUT: Tick = 180_000;

fn has_received_fin(state: State) -> bool {
    match state {
        State::CloseWait | State::LastAck | State::Closing | State::TimeWait => true,
        State::Closed
        | State::Listen
        | State::SynSent
        | State::SynReceived
        | State::Established
        | State::FinWait1
        | State::FinWait2 => false,
    }
}
