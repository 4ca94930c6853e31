//! ICMP and ICMPv6: pings go to the owner, errors about our datagrams end their association.
//!
//! The stack never answers a ping by itself: an answer has to mean that the destination lives.

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::UdpPacket;

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
        let Some(([kind, _, _, _, a, b, c, d], body)) = message.split_first_chunk::<8>() else {
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
            (true, UNREACHABLE) | (false, UNREACHABLE_V6) => {
                if let Some(key) = refused_datagram(body) {
                    self.handle_refused_datagram(&key);
                }
            }
            _ => {}
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

/// The association of a datagram of ours that an ICMP error quotes. The quoted lengths may go past the quotation.
fn refused_datagram(quoted: &[u8]) -> Option<FlowKey> {
    let (from, to, header): (IpAddr, IpAddr, usize) = match quoted.first()? >> 4 {
        4 if quoted.len() > IPV4_HEADER && quoted[9] == protocol::UDP => {
            let ip = smoltcp::wire::Ipv4Packet::new_unchecked(quoted);
            (
                ip.src_addr().into(),
                ip.dst_addr().into(),
                usize::from(ip.header_len()),
            )
        }
        6 if quoted.len() > IPV6_HEADER && quoted[6] == protocol::UDP => {
            let ip = smoltcp::wire::Ipv6Packet::new_unchecked(quoted);
            (ip.src_addr().into(), ip.dst_addr().into(), IPV6_HEADER)
        }
        _ => return None,
    };
    let udp = UdpPacket::new_unchecked(quoted.get(header..)?.first_chunk::<8>()?);
    Some(FlowKey::new(
        SocketAddr::new(to, udp.dst_port()),
        SocketAddr::new(from, udp.src_port()),
    ))
}
