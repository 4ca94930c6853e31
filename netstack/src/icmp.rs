//! ICMP and ICMPv6: pings go to the owner, errors about our datagrams end their association, and those about the length of
//! our segments shorten them.
//!
//! The stack never answers a ping by itself: an answer has to mean that the destination lives.

use std::net::{IpAddr, SocketAddr};

use crate::demux::FlowKey;
use crate::ip::{Headers, IPV4_HEADER, IPV6_HEADER, protocol};
use crate::reply::{self, Unreachable};
use crate::{Event, Stack};

/// A ping that waits for its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EchoRequest {
    /// Who pings.
    pub source: IpAddr,
    /// Who is pinged.
    pub destination: IpAddr,
    /// Identifier that the answer repeats.
    pub identifier: u16,
    /// Sequence number that the answer repeats.
    pub sequence: u16,
    /// Payload that the answer repeats.
    pub payload: Vec<u8>,
}

/// Pings that may wait for the owner.
pub(crate) const WAITING: usize = 64;

const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const UNREACHABLE: u8 = 3;
const UNREACHABLE_V6: u8 = 1;
/// Code of ICMPv4 type 3: fragmentation needed and not allowed.
const TOO_LONG: u8 = 4;
const TOO_LONG_V6: u8 = 2;

impl Stack {
    /// Answers a ping.
    pub fn echo(&mut self, request: &EchoRequest) {
        let EchoRequest {
            source,
            destination,
            identifier,
            sequence,
            payload,
        } = request;
        let packet = reply::echo(*destination, *source, *identifier, *sequence, payload);
        if packet.len() <= usize::from(self.config.mtu) {
            self.outbox
                .push_with(packet.len(), |bytes| bytes.copy_from_slice(&packet));
        } else {
            self.send_in_pieces(packet);
        }
    }

    /// Tells who pings that nobody can be reached there.
    pub fn echo_unreachable(&mut self, request: &EchoRequest, why: Unreachable) {
        let (number, kind) = if request.source.is_ipv4() {
            (protocol::ICMP, ECHO_REQUEST)
        } else {
            (protocol::ICMPV6, ECHO_REQUEST_V6)
        };
        let [a, b] = request.identifier.to_be_bytes();
        let [c, d] = request.sequence.to_be_bytes();
        let (source, destination) = (
            SocketAddr::new(request.source, 0),
            SocketAddr::new(request.destination, 0),
        );
        let quoted = reply::quote(source, destination, number, [kind, 0, 0, 0, a, b, c, d], 8);
        reply::unreachable(
            &mut self.outbox,
            request.destination,
            request.source,
            why,
            &quoted,
        );
    }

    pub(crate) fn handle_icmp(&mut self, packet: &[u8], headers: &Headers) {
        let message = &packet[headers.payload..headers.end];
        let Some(([kind, code, _, _, a, b, c, d], body)) = message.split_first_chunk::<8>() else {
            return self.counters.malformed += 1;
        };
        match (headers.source.is_ipv4(), *kind) {
            (true, ECHO_REQUEST) | (false, ECHO_REQUEST_V6) => self.queue_echo(EchoRequest {
                source: headers.source,
                destination: headers.destination,
                identifier: u16::from_be_bytes([*a, *b]),
                sequence: u16::from_be_bytes([*c, *d]),
                payload: body.to_vec(),
            }),
            (true, UNREACHABLE) if *code == TOO_LONG => {
                self.handle_too_long(body, u16::from_be_bytes([*c, *d]).into());
            }
            (false, TOO_LONG_V6) => {
                self.handle_too_long(body, u32::from_be_bytes([*a, *b, *c, *d]));
            }
            (true, UNREACHABLE) | (false, UNREACHABLE_V6) => {
                if let Some((key, _)) = quoted(body, protocol::UDP) {
                    self.handle_refused_datagram(&key);
                }
            }
            _ => {}
        }
    }

    fn handle_too_long(&mut self, body: &[u8], mtu: u32) {
        if let Some((key, [_, _, _, _, sequence @ ..])) = quoted(body, protocol::TCP) {
            self.handle_too_big(&key, u32::from_be_bytes(sequence), mtu as usize);
        }
    }

    fn queue_echo(&mut self, request: EchoRequest) {
        if self.echoes == WAITING {
            self.counters.dropped += 1;
            return;
        }
        self.echoes += 1;
        self.events.push_back(Event::Echo(request));
    }
}

/// Whose packet an ICMP error quotes, as programs' packets are keyed, and its first 8 bytes of transport. The quoted lengths
/// may go past the quotation.
fn quoted(packet: &[u8], protocol: u8) -> Option<(FlowKey, [u8; 8])> {
    let (from, to, header): (IpAddr, IpAddr, usize) = match packet.first()? >> 4 {
        4 if packet.len() > IPV4_HEADER && packet[9] == protocol => {
            let ip = smoltcp::wire::Ipv4Packet::new_unchecked(packet);
            (
                ip.src_addr().into(),
                ip.dst_addr().into(),
                usize::from(ip.header_len()),
            )
        }
        6 if packet.len() > IPV6_HEADER && packet[6] == protocol => {
            let ip = smoltcp::wire::Ipv6Packet::new_unchecked(packet);
            (ip.src_addr().into(), ip.dst_addr().into(), IPV6_HEADER)
        }
        _ => return None,
    };
    let transport = *packet.get(header..)?.first_chunk::<8>()?;
    let [a, b, c, d, ..] = transport;
    let key = FlowKey::new(
        SocketAddr::new(to, u16::from_be_bytes([c, d])),
        SocketAddr::new(from, u16::from_be_bytes([a, b])),
    );
    Some((key, transport))
}
