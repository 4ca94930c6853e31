//! The way out: dirty flows, due timers, and the memory of flows that have gone quiet.

use std::net::IpAddr;
use std::time::Instant;

use smoltcp::iface::{Config as InterfaceConfig, Interface};
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use crate::device::{self, Egress};
use crate::flow::{Flow, Phase};
use crate::ingress::last_acknowledgement;
use crate::offload::{self, Offload};
use crate::outbox::Outbox;
use crate::path_mtu;
use crate::reply;
use crate::timers::Tick;
use crate::turns::Load;
use crate::{Clock, Config, Event, LONGEST_PACKET, Side, Stack};

/// How often idle memory is looked for, and how long a flow is idle before its rings are given back.
pub(crate) const SWEEP: Tick = 1_000;
const IDLE: Tick = 1_000;

impl Stack {
    /// Writes the next packet for the program to `buffer`; its length and what the device is to do with it. Runs what is
    /// due at `now` first. To be called until it answers `None`.
    ///
    /// # Panics
    /// When `buffer` is shorter than [`LONGEST_PACKET`].
    pub fn poll_packet(&mut self, now: Instant, buffer: &mut [u8]) -> Option<(usize, Offload)> {
        assert!(
            buffer.len() >= LONGEST_PACKET,
            "a buffer of {} bytes is too short for a packet",
            buffer.len()
        );
        self.handle_timeout(now);
        if let Some(sent) = self.poll_outbox(buffer) {
            return Some(sent);
        }
        while let Some(index) = self.turns.pop() {
            if let Some((sent, load)) = self.poll_flow(now, index, buffer) {
                self.turns.push(index, load);
                self.counters.packets_out += 1;
                return Some(sent);
            }
            self.settle(now, index);
        }
        self.poll_outbox(buffer)
    }

    fn poll_outbox(&mut self, buffer: &mut [u8]) -> Option<(usize, Offload)> {
        let len = self.outbox.pop_into(buffer)?;
        self.counters.packets_out += 1;
        Some((
            len,
            offload::complete(&mut buffer[..len], &self.config.offload, LONGEST_PACKET),
        ))
    }

    /// When to call [`Stack::handle_timeout`] or [`Stack::poll_packet`] again, if nothing happens before. May be early,
    /// never late.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let ticks = [
            self.wheel.next(),
            self.associations.next_expiry(),
            self.next_sweep,
        ];
        ticks
            .into_iter()
            .flatten()
            .min()
            .map(|tick| self.clock.instant(tick))
    }

    /// Runs what is due at `now`: retransmissions and probes become packets of [`Stack::poll_packet`].
    pub fn handle_timeout(&mut self, now: Instant) {
        self.move_wheel(now);
        let tick = self.wheel.now();
        while let Some(index) = self.wheel.pop_due() {
            self.mark_dirty(index);
        }
        while let Some(id) = self.associations.expire(tick) {
            self.events.push_back(Event::AssociationClosed(id));
        }
        if self.next_sweep.is_some_and(|due| due <= tick) {
            self.next_sweep = self.pool.sweep().then_some(tick + SWEEP);
        }
    }

    pub(crate) fn move_wheel(&mut self, now: Instant) {
        self.wheel.expire(self.clock.tick(now));
    }

    /// A flow's next packet, and what it has left.
    fn poll_flow(
        &mut self,
        now: Instant,
        index: u32,
        buffer: &mut [u8],
    ) -> Option<((usize, Offload), Load)> {
        let time = self.clock.smoltcp(now);
        let flow = self
            .flows
            .get_mut(index)
            .filter(|flow| flow.may_send_packets())?;
        let side = if flow.key.is_ipv4() {
            &mut self.v4
        } else {
            &mut self.v6
        };
        let loan = flow.loan.as_mut()?;
        let mut device = Egress {
            buffer,
            written: None,
            capabilities: &side.capabilities,
        };
        loan.socket
            .with_set(|set| side.interface.poll_egress(time, &mut device, set));
        let len = device.written?;
        let packet = &mut buffer[..len];
        side.correct_mss(packet);
        if let Some(last) = last_acknowledgement(packet) {
            flow.after_packet(last);
        }
        flow.active = self.wheel.now();
        let len = if side.is_segmented() {
            len
        } else {
            path_mtu::cut(
                packet,
                side.headers - TCP_HEADER,
                flow.segment,
                &mut self.outbox,
            )
        };
        let packet = &mut buffer[..len];
        let offload = offload::complete(packet, &self.config.offload, flow.segment);
        Some(((len, offload), Load::of(flow.queued())))
    }

    /// After a flow has nothing more to send: its next timer, or its end.
    fn settle(&mut self, now: Instant, index: u32) {
        let Some(flow) = self.flows.get_mut(index) else {
            return;
        };
        flow.dirty = false;
        if flow.phase == Phase::Aborting {
            return self.remove(index);
        }
        let given_up = flow.has_given_up(self.wheel.now());
        if given_up {
            flow.with_socket(|socket| socket.abort());
        }
        self.progress(index, |flow, tell| flow.progress(given_up, tell));
        match self.deadline(now, index) {
            Some(deadline) => self.arm(index, deadline),
            None => self.wheel.disarm(index),
        }
    }

    /// When the flow is to be looked at again: for its socket, or to give back the memory of its rings.
    fn deadline(&mut self, now: Instant, index: u32) -> Option<Tick> {
        let time = self.clock.smoltcp(now);
        let tick = self.wheel.now();
        let flow = self.flows.get_mut(index)?;
        let socket = if flow.may_send_packets() {
            let side = if flow.key.is_ipv4() {
                &mut self.v4
            } else {
                &mut self.v6
            };
            let loan = flow.loan.as_mut()?;
            let due = loan
                .socket
                .with_set(|set| side.interface.poll_at(time, set))
                .map(Clock::tick_of);
            flow.probe_window(due.is_none());
            match due {
                None if flow.is_probing() => Some(tick),
                due => due,
            }
        } else {
            None
        };
        let fin = fin_deadline(flow, socket, tick, &mut self.outbox);
        [socket, fin, idle_deadline(flow, tick), flow.gives_up_at()]
            .into_iter()
            .flatten()
            .min()
    }

    /// A timer that is armed a little early stays: it then finds nothing due and is armed anew. This spares most of the
    /// list surgery for retransmission timers, which move with every packet.
    fn arm(&mut self, index: u32, deadline: Tick) {
        const SLACK: Tick = 64;
        let early = self
            .wheel
            .deadline(index)
            .is_some_and(|armed| armed <= deadline && deadline - armed <= SLACK);
        if !early {
            self.wheel.arm(index, deadline);
        }
    }
}

/// When to repeat a FIN that smoltcp has forgotten; does it if that is now.
///
/// smoltcp 0.14 takes three repeated acknowledgements for a lost segment and stops its retransmission timer. If that segment
/// is a FIN without data it has nothing to send again, and would wait for ever.
fn fin_deadline(
    flow: &mut Flow,
    socket: Option<Tick>,
    now: Tick,
    outbox: &mut Outbox,
) -> Option<Tick> {
    const FIRST: Tick = 1_000;
    const LONGEST: Tick = 60_000;
    if socket.is_some() || !flow.may_send_packets() || !flow.awaits_fin_acknowledgement() {
        flow.fin_repeat = None;
        return None;
    }
    let (due, wait) = *flow.fin_repeat.get_or_insert((now + FIRST, FIRST));
    if now < due {
        return Some(due);
    }
    let control = smoltcp::wire::TcpControl::Fin;
    reply::segment(
        outbox,
        flow.key.destination(),
        flow.key.source(),
        control,
        flow.fin_again(),
    );
    let wait = (wait * 2).min(LONGEST);
    flow.fin_repeat = Some((now + wait, wait));
    Some(now + wait)
}

/// When the rings of a flow that holds no byte are to be given back; does it if that is now.
fn idle_deadline(flow: &mut Flow, now: Tick) -> Option<Tick> {
    if !flow.touched || !flow.is_idle() {
        return None;
    }
    if now < flow.active + IDLE {
        return Some(flow.active + IDLE);
    }
    flow.discard();
    None
}

impl Side {
    pub(crate) fn new(
        config: &Config,
        header: usize,
        segmented: bool,
        now: smoltcp::time::Instant,
    ) -> Self {
        let headers = header + TCP_HEADER;
        let segment = usize::from(config.mtu) - headers;
        let segmented = segmented && config.offload.checksum;
        // Whole segments only, so that the device makes no short one in the middle.
        let burst = headers + (LONGEST_PACKET - headers) / segment * segment;
        let (mtu, burst) = if segmented {
            (LONGEST_PACKET, Some(burst))
        } else {
            (usize::from(config.mtu), None)
        };
        let capabilities = device::capabilities(mtu, burst, burst);
        let mut device = Egress {
            buffer: &mut [],
            written: None,
            capabilities: &capabilities,
        };
        let mut settings = InterfaceConfig::new(HardwareAddress::Ip);
        settings.random_seed = config.seed;
        let mut interface = Interface::new(settings, &mut device, now);
        // Any address is ours: the program's destinations are what it connects to.
        interface.set_any_ip(true);
        interface.update_ip_addrs(|addresses| {
            let own = IpCidr::new(IpAddress::from(own_address(header)), 0);
            let added = addresses.push(own);
            debug_assert!(added.is_ok(), "an interface has room for one address");
        });
        Self {
            interface,
            capabilities,
            headers,
            segment,
        }
    }

    /// Whether the device cuts large segments.
    fn is_segmented(&self) -> bool {
        self.capabilities.segmentation.tcpv4.is_some()
    }

    /// Payload of the largest packet that smoltcp makes.
    pub(crate) fn burst(&self) -> usize {
        self.capabilities
            .segmentation
            .tcpv4
            .map_or(self.segment, |burst| burst.get() - self.headers)
    }

    /// smoltcp offers an MSS for the MTU it was told, which is not the link's where the device cuts segments.
    fn correct_mss(&self, packet: &mut [u8]) {
        const SYN: u8 = 2;
        let Some(tcp) = packet.get_mut(self.headers - TCP_HEADER..) else {
            return;
        };
        // smoltcp writes the MSS as the first option.
        if tcp.len() >= 24 && tcp[13] & SYN != 0 && tcp[20..22] == [2, 4] {
            tcp[22..24].copy_from_slice(&(self.segment as u16).to_be_bytes());
        }
    }
}

const TCP_HEADER: usize = 20;

/// An address for smoltcp's own idea of itself. No packet carries it: flows use the destinations of their SYNs.
fn own_address(header: usize) -> IpAddr {
    if header == crate::ip::IPV4_HEADER {
        IpAddr::from([192, 0, 2, 1])
    } else {
        IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1])
    }
}
