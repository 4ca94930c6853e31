//! Packets in and out on one side, flows on the other: TCP, UDP and ICMP in user space.
//!
//! A program's packets go into [`Stack::handle_packet`]; whoever owns the stack learns of its flows from
//! [`Stack::poll_event`], dials the real destinations, moves bytes with [`Stack::recv`] and [`Stack::send`], and carries
//! what [`Stack::poll_packet`] gives back to the program. There is no I/O, no clock, no thread and no task in here: time is
//! an argument, and [`Stack::poll_timeout`] says when to come back.
//!
//! TCP itself is smoltcp's. Around it this crate adds what a machine full of flows needs: a hash from addresses to flow, a
//! timer wheel, pooled memory, and the rule that a flow is touched only when it is dirty or due. A packet so costs nearly
//! the same with one flow as with fifty thousand. A SYN is answered only when the owner's dial has succeeded.
//!
//! One copy is made from a packet to a flow's ring and one from the ring to a packet; nothing is allocated per segment.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Instant;

use smoltcp::iface::Interface;
use smoltcp::phy::DeviceCapabilities;

use crate::demux::Demux;
use crate::flow::{Flow, Notice, Phase};
use crate::fragments::Fragments;
use crate::linger::Linger;
use crate::outbox::Outbox;
use crate::rings::Pool;
use crate::slab::Slab;
use crate::sys::Places;
use crate::timers::{Tick, Wheel};
use crate::turns::{Load, Turns};
use crate::udp::Associations;

mod checks;
mod demux;
mod device;
mod egress;
mod flow;
mod fragments;
mod icmp;
mod ingress;
mod ip;
mod linger;
mod offload;
mod outbox;
mod path_mtu;
mod reply;
mod rings;
mod slab;
mod sys;
mod timers;
mod turns;
mod udp;

pub use icmp::EchoRequest;
pub use offload::{
    Checksum, DeviceOffload, IpVersion, Offload, Segments, UnknownSegmentation, VIRTIO_HEADER,
};
pub use reply::Unreachable;
pub use udp::AssociationId;

/// Longest packet that [`Stack::poll_packet`] writes.
pub const LONGEST_PACKET: usize = 65_535;

/// Numbers that are fixed for a stack's life.
#[derive(Clone, Debug)]
pub struct Config {
    /// Longest IP packet on the link, 576 to 65,535; at least 1280 where IPv6 is used.
    pub mtu: u16,
    /// What the device does for packets of ours.
    pub offload: DeviceOffload,
    /// Secret of the hash tables and of initial sequence numbers. Random, but for repeatable tests.
    pub seed: u64,
    /// TCP flows at a time; a SYN past it is answered with RST.
    pub flows: usize,
    /// Bytes that the rings of all flows may hold together. A flow's rings are 512 KiB each way at most and 16 KiB at
    /// least; memory is taken only as bytes fill them. A SYN for which nothing is left is answered with RST.
    pub memory: usize,
    /// UDP associations at a time; past it the one longest unused makes room.
    pub associations: usize,
}

impl Default for Config {
    /// MTU 1500 without offload, 65,536 flows in at most 4 GiB, 4096 associations, and a seed that is no secret.
    fn default() -> Self {
        Self {
            mtu: 1500,
            offload: DeviceOffload::default(),
            seed: 0,
            flows: 65_536,
            memory: 4 << 30,
            associations: 4096,
        }
    }
}

/// Names one TCP flow; never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowId {
    index: u32,
    generation: u32,
}

/// What the owner has to know. Edges, not levels: see each one for when it comes again.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A program wants to connect. It waits until [`Stack::dialed`].
    FlowOpened {
        /// The new flow.
        id: FlowId,
        /// The program's address.
        source: SocketAddr,
        /// Where it wants to go.
        destination: SocketAddr,
    },
    /// Bytes have come. Comes again only after [`Stack::recv`] has emptied the ring.
    Readable(FlowId),
    /// There is room to send, for the first time or again after [`Stack::send`] filled the ring.
    Writable(FlowId),
    /// The program sent FIN. What it sent before can still be read; then `recv` says [`Received::Finished`].
    PeerFinished(FlowId),
    /// The program reset the flow, or gave up while it was dialed. What it sent before can still be read; the flow stays
    /// until [`Stack::reset`].
    Reset(FlowId),
    /// Both directions ended in order and everything was read. The id is gone.
    Closed(FlowId),
    /// A program sent a first datagram between these addresses. Its payload waits in [`Stack::recv_datagram`].
    AssociationOpened {
        /// The new association.
        id: AssociationId,
        /// The program's address.
        source: SocketAddr,
        /// Where its datagrams go.
        destination: SocketAddr,
    },
    /// An association was idle for too long, made room for another, or the program closed its socket. The id is gone.
    AssociationClosed(AssociationId),
    /// A program pings. The owner answers by [`Stack::echo`] or [`Stack::echo_unreachable`], or not at all.
    Echo(EchoRequest),
}

/// What came of a dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DialOutcome {
    /// Connected: the program's SYN is answered.
    Accepted,
    /// The destination refused: so does the stack, with RST.
    Refused,
    /// ICMP tells the program.
    Unreachable(Unreachable),
    /// Silence, as from a host that drops the SYN. A repeated SYN opens a new flow.
    TimedOut,
}

/// What [`Stack::recv`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// This many bytes were taken.
    Data(usize),
    /// Nothing yet; [`Event::Readable`] will come.
    Empty,
    /// Nothing any more: the program sent FIN and all before it was read.
    Finished,
}

/// Why a call about a flow was in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FlowError {
    /// The flow has ended: closed, reset, or let go by the owner.
    #[error("the flow has ended")]
    Gone,
    /// The owner itself has finished sending.
    #[error("the sending direction is finished")]
    Finished,
}

/// What was dropped or refused, since the stack was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Packets taken in.
    pub packets_in: u64,
    /// Packets handed out.
    pub packets_out: u64,
    /// Lengths or offsets that contradict the bytes, addresses that no link may carry, implausible offload.
    pub malformed: u64,
    /// Wrong IPv4, TCP, UDP or ICMP checksums.
    pub bad_checksum: u64,
    /// Fragments that overlap or cannot be part of a packet.
    pub bad_fragment: u64,
    /// Multicast and broadcast, which are not answered.
    pub group: u64,
    /// Segments of no flow, most of them answered with RST.
    pub stray: u64,
    /// SYNs answered with RST because flows or memory had run out.
    pub refused: u64,
    /// Datagrams, echo requests and answers dropped because a queue was full.
    pub dropped: u64,
    /// Packets of protocols that are not served.
    pub unknown_protocol: u64,
}

/// The whole stack: one shard, for one thread.
pub struct Stack {
    config: Config,
    clock: Clock,
    v4: Side,
    v6: Side,
    flows: Slab<Flow>,
    demux: Demux,
    linger: Linger,
    pool: Pool,
    wheel: Wheel,
    turns: Turns,
    places: Places,
    outbox: Outbox,
    events: VecDeque<Event>,
    fragments: Fragments,
    associations: Associations,
    echoes: usize,
    next_sweep: Option<Tick>,
    fragment_id: u32,
    counters: Counters,
}

/// smoltcp's interface for one IP version. They differ because smoltcp 0.14 drops IPv6 packets longer than the MTU even if
/// the device is to cut them.
struct Side {
    interface: Interface,
    capabilities: DeviceCapabilities,
    /// IP and TCP headers without options.
    headers: usize,
    /// Largest TCP payload that fits the MTU.
    segment: usize,
}

/// The owner's time, as smoltcp's and the wheel's.
struct Clock {
    epoch: Instant,
}

impl Clock {
    /// smoltcp takes some early times for "at once", so this clock does not begin at zero.
    const START: u64 = 1_000_000;

    fn smoltcp(&self, now: Instant) -> smoltcp::time::Instant {
        let micros = now.saturating_duration_since(self.epoch).as_micros() as i64;
        smoltcp::time::Instant::from_micros(micros + Self::START as i64 * 1000)
    }

    fn tick(&self, now: Instant) -> Tick {
        now.saturating_duration_since(self.epoch).as_millis() as Tick + Self::START
    }

    /// The first tick that is not before a deadline of smoltcp's.
    fn tick_of(deadline: smoltcp::time::Instant) -> Tick {
        (deadline.total_micros().max(0) as u64).div_ceil(1000)
    }

    fn instant(&self, tick: Tick) -> Instant {
        self.epoch + std::time::Duration::from_millis(tick.saturating_sub(Self::START))
    }
}

impl Stack {
    /// A stack without flows. `now` is the earliest time it will ever be told.
    ///
    /// # Panics
    /// When the MTU is below 576, the least that IPv4 promises.
    pub fn new(config: Config, now: Instant) -> Self {
        assert!(
            config.mtu >= 576,
            "an MTU of {} is below the least of IPv4",
            config.mtu
        );
        let clock = Clock { epoch: now };
        let v4 = Side::new(
            &config,
            ip::IPV4_HEADER,
            config.offload.tso4,
            clock.smoltcp(now),
        );
        let v6 = Side::new(
            &config,
            ip::IPV6_HEADER,
            config.offload.tso6,
            clock.smoltcp(now),
        );
        let burst = v4.burst();
        let mut wheel = Wheel::new();
        wheel.expire(clock.tick(now));
        Self {
            flows: Slab::new(),
            demux: Demux::new(config.seed),
            linger: Linger::new(config.seed),
            pool: Pool::new(config.memory, burst),
            wheel,
            turns: Turns::default(),
            places: Places::default(),
            outbox: Outbox::new(),
            events: VecDeque::new(),
            fragments: Fragments::new(),
            associations: Associations::new(config.seed, config.associations, clock.tick(now)),
            echoes: 0,
            next_sweep: None,
            fragment_id: config.seed as u32,
            counters: Counters::default(),
            config,
            clock,
            v4,
            v6,
        }
    }

    /// The next thing the owner has to know.
    pub fn poll_event(&mut self) -> Option<Event> {
        loop {
            let event = self.events.pop_front()?;
            if self.is_current(&event) {
                return Some(event);
            }
        }
    }

    /// Settles the dial of a flow. After any outcome but `Accepted` the id is gone.
    pub fn dialed(
        &mut self,
        id: FlowId,
        outcome: DialOutcome,
        now: Instant,
    ) -> Result<(), FlowError> {
        let index = self.owned(id)?;
        let flow = self.flows.get_mut(index).ok_or(FlowError::Gone)?;
        if flow.phase != Phase::Dialing {
            return Err(FlowError::Gone);
        }
        flow.active = self.clock.tick(now);
        match outcome {
            DialOutcome::Accepted => {
                flow.phase = Phase::Answered;
                flow.with_socket(|socket| socket.pause_synack(false));
                self.mark_dirty(index);
            }
            DialOutcome::Refused => self.abort(index),
            DialOutcome::Unreachable(why) => {
                self.tell_unreachable(index, why);
                self.remove(index);
            }
            DialOutcome::TimedOut => self.remove(index),
        }
        Ok(())
    }

    /// Lends the oldest bytes that the program sent to `f`, which answers how many it took. `f` is not called if there are
    /// none. Two calls may be needed for what lies at the ring's end and start.
    pub fn recv(
        &mut self,
        id: FlowId,
        f: impl FnOnce(&[u8]) -> usize,
    ) -> Result<Received, FlowError> {
        let index = self.owned(id)?;
        let flow = self.flows.get_mut(index).ok_or(FlowError::Gone)?;
        match flow.recv(f) {
            Some(taken) => {
                self.after_call(index);
                Ok(Received::Data(taken))
            }
            None if flow.is_finished() => Ok(Received::Finished),
            None if flow.phase == Phase::Reset => Err(FlowError::Gone),
            None => Ok(Received::Empty),
        }
    }

    /// Lends free space to `f`, which answers how many bytes for the program it has written there. 0 means that there was
    /// no room, or that the handshake is not over; [`Event::Writable`] will come.
    pub fn send(
        &mut self,
        id: FlowId,
        f: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<usize, FlowError> {
        let index = self.owned(id)?;
        let flow = self.flows.get_mut(index).ok_or(FlowError::Gone)?;
        if flow.phase == Phase::Reset {
            return Err(FlowError::Gone);
        }
        if flow.has_finished() {
            return Err(FlowError::Finished);
        }
        let sent = flow.send(f);
        if sent > 0 {
            self.mark_dirty(index);
        }
        Ok(sent)
    }

    /// Ends the direction to the program: FIN after everything that was sent. Idempotent.
    pub fn finish(&mut self, id: FlowId) -> Result<(), FlowError> {
        let index = self.owned(id)?;
        let flow = self.flows.get_mut(index).ok_or(FlowError::Gone)?;
        if flow.phase == Phase::Reset {
            return Err(FlowError::Gone);
        }
        flow.finish();
        self.after_call(index);
        Ok(())
    }

    /// Lets go of a flow: RST, unless the program has reset it already. The id is gone, and so are unread bytes. Calling it
    /// for an id that is gone does nothing.
    pub fn reset(&mut self, id: FlowId) {
        let Ok(index) = self.owned(id) else { return };
        match self.flows.get(index).map(|flow| flow.phase) {
            Some(Phase::Reset | Phase::Done) => self.remove(index),
            Some(Phase::Dialing | Phase::Answered | Phase::Open | Phase::Aborting) => {
                self.abort(index)
            }
            None => {}
        }
    }

    /// What was dropped or refused so far.
    pub fn counters(&self) -> Counters {
        let dropped = self.counters.dropped + self.outbox.dropped() + self.associations.dropped();
        Counters {
            dropped,
            ..self.counters
        }
    }

    /// Flows that exist, whatever their phase.
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// UDP associations that exist.
    pub fn association_count(&self) -> usize {
        self.associations.len()
    }

    fn owned(&self, id: FlowId) -> Result<u32, FlowError> {
        let index = self
            .flows
            .resolve(id.index, id.generation)
            .ok_or(FlowError::Gone)?;
        match self.flows.get(index) {
            Some(flow) if flow.is_owned() => Ok(index),
            Some(_) | None => Err(FlowError::Gone),
        }
    }

    /// Whether an event is still worth telling; ends flows whose end is told now.
    fn is_current(&mut self, event: &Event) -> bool {
        match event {
            Event::Closed(id) => {
                let live = self.flows.resolve(id.index, id.generation);
                live.is_some_and(|index| self.flows.remove(index).is_some())
            }
            Event::FlowOpened { id, .. }
            | Event::Readable(id)
            | Event::Writable(id)
            | Event::PeerFinished(id)
            | Event::Reset(id) => {
                let live = self
                    .flows
                    .resolve(id.index, id.generation)
                    .and_then(|index| self.flows.get(index));
                live.is_some_and(Flow::is_owned)
            }
            Event::AssociationOpened { id, .. } => self.associations.contains(*id),
            Event::AssociationClosed(_) => true,
            Event::Echo(_) => {
                self.echoes -= 1;
                true
            }
        }
    }

    /// Lets a flow say what an owner's call has made possible: its end, most of all.
    fn after_call(&mut self, index: u32) {
        self.mark_dirty(index);
        self.progress(index, |flow, tell| flow.progress(false, tell));
    }

    /// Runs `step` on a flow and queues what it tells.
    fn progress(&mut self, index: u32, step: impl FnOnce(&mut Flow, &mut dyn FnMut(Notice))) {
        let id = FlowId {
            index,
            generation: self.flows.generation(index),
        };
        let Some(flow) = self.flows.get_mut(index) else {
            return;
        };
        let events = &mut self.events;
        step(flow, &mut |notice| {
            events.push_back(match notice {
                Notice::Readable => Event::Readable(id),
                Notice::Writable => Event::Writable(id),
                Notice::PeerFinished => Event::PeerFinished(id),
                Notice::Reset => Event::Reset(id),
                Notice::Closed => Event::Closed(id),
            });
        });
        match flow.phase {
            Phase::Reset => self.unlist(index),
            Phase::Done => self.retire(index),
            Phase::Dialing | Phase::Answered | Phase::Open | Phase::Aborting => {}
        }
    }

    /// Takes a flow that ended in order out of everything but the slab, which keeps its id for the event.
    fn retire(&mut self, index: u32) {
        self.unlist(index);
        let Some(flow) = self.flows.get(index) else {
            return;
        };
        if let Some(last) = flow.farewell() {
            self.linger.add(self.wheel.now(), flow.key, last);
        }
        self.return_loan(index);
    }

    /// Takes a flow out of the tables that packets and timers go by.
    fn unlist(&mut self, index: u32) {
        let Some(flow) = self.flows.get(index) else {
            return;
        };
        self.demux.remove(&flow.key, index);
        self.wheel.disarm(index);
    }

    fn abort(&mut self, index: u32) {
        let Some(flow) = self.flows.get_mut(index) else {
            return;
        };
        flow.phase = Phase::Aborting;
        flow.with_socket(|socket| socket.abort());
        self.mark_dirty(index);
    }

    fn remove(&mut self, index: u32) {
        self.unlist(index);
        self.return_loan(index);
        self.flows.remove(index);
    }

    fn return_loan(&mut self, index: u32) {
        let Some(loan) = self.flows.get_mut(index).and_then(|flow| flow.loan.take()) else {
            return;
        };
        self.pool.put(loan);
        if self.next_sweep.is_none() {
            self.next_sweep = Some(self.wheel.now() + egress::SWEEP);
        }
    }

    fn mark_dirty(&mut self, index: u32) {
        let Some(flow) = self.flows.get_mut(index) else {
            return;
        };
        if !flow.dirty {
            flow.dirty = true;
            self.turns.push(index, Load::of(flow.queued()));
        }
    }
}
