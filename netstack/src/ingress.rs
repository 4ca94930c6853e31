//! The way in: from a packet to the flow, association or answer it leads to.

use std::net::SocketAddr;
use std::time::Instant;

use smoltcp::wire::TcpPacket;

use crate::demux::FlowKey;
use crate::device::Ingress;
use crate::flow::{Flow, Segment};
use crate::fragments::Assembly;
use crate::ip::{self, Headers, Malformed, protocol};
use crate::offload::{self, Offload};
use crate::reply::{self, Unreachable};
use crate::{Event, FlowId, Stack};

impl Stack {
    /// Takes one IP packet of a program. Whatever is wrong with it is counted and dropped.
    pub fn handle_packet(&mut self, now: Instant, packet: &[u8], offload: Offload) {
        self.counters.packets_in += 1;
        self.move_wheel(now);
        let headers = match Headers::parse(packet) {
            Ok(headers) if offload.is_plausible(headers.end) => headers,
            Ok(_) | Err(Malformed::Length | Malformed::Address) => {
                return self.counters.malformed += 1;
            }
            Err(Malformed::Checksum) => return self.counters.bad_checksum += 1,
        };
        if ip::is_group(headers.destination) {
            return self.counters.group += 1;
        }
        if headers.is_plain() {
            return self.handle_plain(now, &packet[..headers.end], &headers, &offload);
        }
        self.handle_unusual(now, packet, &headers, &offload);
    }

    /// Fragments and IPv6 extension headers: made plain first.
    fn handle_unusual(
        &mut self,
        now: Instant,
        packet: &[u8],
        headers: &Headers,
        offload: &Offload,
    ) {
        let (assembly, offload) = match headers.fragment {
            // A checksum that is still to be made cannot be made once the packet is in pieces.
            Some(fragment) => (
                self.fragments
                    .add(self.clock.tick(now), packet, headers, fragment),
                Offload::default(),
            ),
            None => {
                let payload = &packet[headers.payload..headers.end];
                let plain = ip::normalise(packet, headers, payload, self.fragments.whole());
                (plain.map_or(Assembly::Refused, Assembly::Whole), *offload)
            }
        };
        match assembly {
            Assembly::Waiting => {}
            Assembly::Refused => self.counters.bad_fragment += 1,
            Assembly::Whole(headers) => {
                let whole = std::mem::take(self.fragments.whole());
                self.handle_plain(now, &whole, &headers, &offload);
                *self.fragments.whole() = whole;
            }
        }
    }

    fn handle_plain(&mut self, now: Instant, packet: &[u8], headers: &Headers, offload: &Offload) {
        if !offload::verify(packet, headers, offload) {
            return self.counters.bad_checksum += 1;
        }
        match headers.protocol {
            protocol::TCP => self.handle_segment(now, packet, headers),
            protocol::UDP => self.handle_datagram(packet, headers),
            protocol::ICMP if headers.source.is_ipv4() => self.handle_icmp(packet, headers),
            protocol::ICMPV6 if headers.source.is_ipv6() => self.handle_icmp(packet, headers),
            _ => {
                self.counters.unknown_protocol += 1;
                reply::unknown_protocol(
                    &mut self.outbox,
                    headers.destination,
                    headers.source,
                    packet,
                );
            }
        }
    }

    fn handle_segment(&mut self, now: Instant, packet: &[u8], headers: &Headers) {
        let Ok(tcp) = TcpPacket::new_checked(&packet[headers.payload..headers.end]) else {
            return self.counters.malformed += 1;
        };
        if tcp.src_port() == 0 || tcp.dst_port() == 0 || !options_are_sound(&tcp) {
            return self.counters.malformed += 1;
        }
        let source = SocketAddr::new(headers.source, tcp.src_port());
        let destination = SocketAddr::new(headers.destination, tcp.dst_port());
        let key = FlowKey::new(source, destination);
        match self.demux.find(&key) {
            Some(index) => {
                self.fetch(index);
                self.feed(now, index, packet, &tcp)
            }
            None if tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin() => {
                self.open(now, key, packet, &tcp)
            }
            None => self.handle_stray(now, key, &tcp),
        }
    }

    /// Asks for all that lies about a flow at once. Among thousands of flows none of it is in a near cache, and TCP would
    /// else wait for each line in turn.
    fn fetch(&self, index: u32) {
        self.places.fetch(index);
        self.flows.fetch(index);
        self.wheel.fetch(index);
    }

    /// Gives a segment to its flow's socket.
    fn feed(&mut self, now: Instant, index: u32, packet: &[u8], tcp: &TcpPacket<&[u8]>) {
        let time = self.clock.smoltcp(now);
        let tick = self.clock.tick(now);
        let v4 = packet[0] >> 4 == 4;
        let side = if v4 { &mut self.v4 } else { &mut self.v6 };
        let Some(flow) = self.flows.get_mut(index) else {
            return;
        };
        let Some(loan) = flow.loan.as_mut() else {
            return;
        };
        let waiting = self.outbox.len();
        let queued = loan.socket.socket().recv_queue();
        let mut device = Ingress {
            packet: Some(packet),
            outbox: &mut self.outbox,
            capabilities: &side.capabilities,
        };
        loan.socket
            .with_set(|set| side.interface.poll_ingress_single(time, &mut device, set));
        let grew = loan.socket.socket().recv_queue() > queued;
        let replied = self.outbox.len() > waiting;
        flow.active = tick;
        flow.silent = None;
        if let Some(bare) = replied
            .then(|| self.outbox.last())
            .flatten()
            .and_then(last_acknowledgement)
        {
            flow.after_packet(bare);
        }
        let next = tcp.seq_number() + tcp.segment_len();
        let segment = Segment {
            reset: tcp.rst(),
            next: next.0 as u32,
        };
        self.progress(index, |flow, tell| {
            flow.after_segment(segment, replied, grew, tell)
        });
        if self.flows.get(index).is_some_and(Flow::may_send_packets) {
            self.mark_dirty(index);
        }
    }

    /// Holds a SYN in a new flow, or answers RST when there is no place for one.
    fn open(&mut self, now: Instant, key: FlowKey, packet: &[u8], tcp: &TcpPacket<&[u8]>) {
        self.linger.remove(&key);
        let place = self.flows.len() < self.config.flows;
        let Some(mut loan) = place.then(|| self.pool.take()).flatten() else {
            self.counters.refused += 1;
            return reply::refuse(&mut self.outbox, key.destination(), key.source(), tcp);
        };
        let destination = key.destination();
        let listening = loan.socket.with_socket(|socket| {
            socket.pause_synack(true);
            socket.set_nagle_enabled(false);
            socket.set_ack_delay(Some(ACK_DELAY));
            socket.listen(destination)
        });
        debug_assert!(
            listening.is_ok(),
            "a pooled socket is closed and the port is not zero"
        );
        let side = if destination.is_ipv4() {
            &self.v4
        } else {
            &self.v6
        };
        let segment = peer_segment(tcp).min(side.segment);
        let syn = tcp.seq_number().0 as u32;
        let (index, generation) =
            self.flows
                .insert(Flow::new(key, loan, segment, syn, self.clock.tick(now)));
        if let Some(loan) = self.flows.get(index).and_then(|flow| flow.loan.as_ref()) {
            self.places.note(index, &loan.socket);
        }
        self.demux.insert(key, index);
        let id = FlowId { index, generation };
        self.events.push_back(Event::FlowOpened {
            id,
            source: key.source(),
            destination,
        });
        self.feed(now, index, packet, tcp);
    }

    /// A segment of no flow: the repetition of an ended one, or something to refuse.
    fn handle_stray(&mut self, now: Instant, key: FlowKey, tcp: &TcpPacket<&[u8]>) {
        let last = self.linger.find(self.clock.tick(now), &key);
        if let Some(last) = last.filter(|_| !tcp.rst() && !tcp.syn()) {
            let control = smoltcp::wire::TcpControl::None;
            return reply::segment(
                &mut self.outbox,
                key.destination(),
                key.source(),
                control,
                last,
            );
        }
        self.counters.stray += 1;
        reply::refuse(&mut self.outbox, key.destination(), key.source(), tcp);
    }

    /// ICMP to the program whose SYN this flow holds. The sequence number must be the SYN's, or its kernel ignores it.
    pub(crate) fn tell_unreachable(&mut self, index: u32, why: Unreachable) {
        let Some(flow) = self.flows.get(index) else {
            return;
        };
        let (source, destination) = (flow.key.source(), flow.key.destination());
        let mut transport = [0; 8];
        transport[..2].copy_from_slice(&source.port().to_be_bytes());
        transport[2..4].copy_from_slice(&destination.port().to_be_bytes());
        transport[4..].copy_from_slice(&flow.syn.to_be_bytes());
        let quoted = reply::quote(source, destination, protocol::TCP, transport, 20);
        reply::unreachable(
            &mut self.outbox,
            destination.ip(),
            source.ip(),
            why,
            &quoted,
        );
    }
}

/// Long enough to ride on an answer that comes at once, short enough not to hold up a program that writes twice and then
/// waits (Nagle). A megabyte does not wait for it: every second full segment is acknowledged at once.
const ACK_DELAY: smoltcp::time::Duration = smoltcp::time::Duration::from_millis(1);

/// The MSS option of a SYN, or the value that stands for its absence (RFC 9293 §3.7.1). Never so small that headers would
/// be most of the traffic; smoltcp has the same least value.
fn peer_segment(tcp: &TcpPacket<&[u8]>) -> usize {
    const ABSENT: usize = 536;
    const LEAST: usize = 48;
    let mut options = tcp.options();
    while let Ok((rest, option)) = smoltcp::wire::TcpOption::parse(options) {
        match option {
            smoltcp::wire::TcpOption::MaxSegmentSize(size) if size != 0 => {
                return usize::from(size).max(LEAST);
            }
            smoltcp::wire::TcpOption::EndOfList => break,
            smoltcp::wire::TcpOption::MaxSegmentSize(_)
            | smoltcp::wire::TcpOption::NoOperation
            | smoltcp::wire::TcpOption::WindowScale(_)
            | smoltcp::wire::TcpOption::SackPermitted
            | smoltcp::wire::TcpOption::SackRange(_)
            | smoltcp::wire::TcpOption::TimeStamp { .. }
            | smoltcp::wire::TcpOption::Unknown { .. } => {}
        }
        if rest.is_empty() {
            break;
        }
        options = rest;
    }
    ABSENT
}

/// Whether each option is as long as it says. smoltcp drops a segment where one is not, and says nothing.
fn options_are_sound(tcp: &TcpPacket<&[u8]>) -> bool {
    let mut options = tcp.options();
    while !options.is_empty() {
        match smoltcp::wire::TcpOption::parse(options) {
            Ok((_, smoltcp::wire::TcpOption::EndOfList)) => return true,
            Ok((rest, _)) => options = rest,
            Err(_) => return false,
        }
    }
    true
}

/// The numbers of one of our own packets, if it acknowledges something.
pub(crate) fn last_acknowledgement(packet: &[u8]) -> Option<reply::Bare> {
    let header = if packet.first()? >> 4 == 4 {
        ip::IPV4_HEADER
    } else {
        ip::IPV6_HEADER
    };
    let tcp = TcpPacket::new_checked(packet.get(header..)?).ok()?;
    tcp.ack().then(|| reply::Bare {
        sequence: (tcp.seq_number() + tcp.segment_len()).0 as u32,
        acknowledgement: Some(tcp.ack_number().0 as u32),
        window: tcp.window_len(),
    })
}
