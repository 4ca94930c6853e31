//! Packets that answer without a flow: bare TCP segments, ICMP errors, echo replies, datagrams.
//!
//! Each builder gives IP packets whose checksums `offload::complete` fills later, but for ICMP, whose sum is written here.

use std::net::{IpAddr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpRepr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, checksum};

use crate::ip::{IPV4_HEADER, IPV6_HEADER, protocol};
use crate::offload;
use crate::outbox::Outbox;

/// TTL or hop limit of what this stack sends (RFC 1700, RFC 8200).
const HOPS: u8 = 64;

/// Why a destination cannot be reached, as ICMP says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// No route to the network.
    Network,
    /// The host does not answer or has no address.
    Host,
    /// Nothing listens on the UDP port.
    Port,
    /// Policy forbids it.
    Prohibited,
}

impl Unreachable {
    /// Codes of ICMPv4 type 3 (RFC 792, RFC 1812 §5.2.7.1).
    fn code_v4(self) -> u8 {
        match self {
            Self::Network => 0,
            Self::Host => 1,
            Self::Port => 3,
            Self::Prohibited => 13,
        }
    }

    /// Codes of ICMPv6 type 1 (RFC 4443 §3.1).
    fn code_v6(self) -> u8 {
        match self {
            Self::Network => 0,
            Self::Prohibited => 1,
            Self::Host => 3,
            Self::Port => 4,
        }
    }
}

/// The numbers of a segment without payload or options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bare {
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: Option<u32>,
    pub(crate) window: u16,
}

/// Queues a segment from `from` to `to`.
pub(crate) fn segment(
    outbox: &mut Outbox,
    from: SocketAddr,
    to: SocketAddr,
    control: TcpControl,
    bare: Bare,
) {
    let tcp = TcpRepr {
        src_port: from.port(),
        dst_port: to.port(),
        control,
        seq_number: TcpSeqNumber(bare.sequence as i32),
        ack_number: bare
            .acknowledgement
            .map(|number| TcpSeqNumber(number as i32)),
        window_len: bare.window,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let (source, destination) = (from.ip().into(), to.ip().into());
    packet(
        outbox,
        from.ip(),
        to.ip(),
        protocol::TCP,
        tcp.buffer_len(),
        |payload| {
            tcp.emit(
                &mut TcpPacket::new_unchecked(payload),
                &source,
                &destination,
                &ChecksumCapabilities::ignored(),
            );
        },
    );
}

/// Queues the RST that answers a segment for which there is no flow (RFC 9293 §3.10.7.1).
pub(crate) fn refuse(
    outbox: &mut Outbox,
    from: SocketAddr,
    to: SocketAddr,
    offending: &TcpPacket<&[u8]>,
) {
    if offending.rst() {
        return;
    }
    let bare = if offending.ack() {
        Bare {
            sequence: offending.ack_number().0 as u32,
            ..Bare::default()
        }
    } else {
        let next = offending.seq_number() + offending.segment_len();
        Bare {
            acknowledgement: Some(next.0 as u32),
            ..Bare::default()
        }
    };
    segment(outbox, from, to, TcpControl::Rst, bare);
}

/// Queues a datagram; whole, even if it is longer than the MTU.
pub(crate) fn datagram(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let len = 8 + payload.len();
    let repr = IpRepr::new(
        from.ip().into(),
        to.ip().into(),
        protocol::UDP.into(),
        len,
        HOPS,
    );
    let mut packet = vec![0; repr.buffer_len()];
    repr.emit(&mut packet[..], &ChecksumCapabilities::ignored());
    write_datagram(
        &mut packet[repr.header_len()..],
        from.port(),
        to.port(),
        payload,
    );
    packet
}

/// Queues a datagram that fits the MTU.
pub(crate) fn short_datagram(
    outbox: &mut Outbox,
    from: SocketAddr,
    to: SocketAddr,
    payload: &[u8],
) {
    packet(
        outbox,
        from.ip(),
        to.ip(),
        protocol::UDP,
        8 + payload.len(),
        |bytes| {
            write_datagram(bytes, from.port(), to.port(), payload);
        },
    );
}

fn write_datagram(bytes: &mut [u8], from: u16, to: u16, payload: &[u8]) {
    let mut udp = UdpPacket::new_unchecked(&mut *bytes);
    udp.set_src_port(from);
    udp.set_dst_port(to);
    udp.set_len((8 + payload.len()) as u16);
    udp.set_checksum(0);
    bytes[8..].copy_from_slice(payload);
}

/// Queues "destination unreachable" from `from` to `to`, quoting the packet that could not be delivered.
pub(crate) fn unreachable(
    outbox: &mut Outbox,
    from: IpAddr,
    to: IpAddr,
    why: Unreachable,
    quoted: &[u8],
) {
    if from.is_ipv4() {
        error(outbox, from, to, 3, why.code_v4(), 0, quoted);
    } else {
        error(outbox, from, to, 1, why.code_v6(), 0, quoted);
    }
}

/// Queues the error for a protocol that this stack does not serve.
pub(crate) fn unknown_protocol(outbox: &mut Outbox, from: IpAddr, to: IpAddr, quoted: &[u8]) {
    if from.is_ipv4() {
        error(outbox, from, to, 3, 2, 0, quoted);
    } else {
        // Parameter problem, unrecognised next header, at the fixed header's own field.
        error(outbox, from, to, 4, 1, 6, quoted);
    }
}

fn error(
    outbox: &mut Outbox,
    from: IpAddr,
    to: IpAddr,
    kind: u8,
    code: u8,
    pointer: u32,
    quoted: &[u8],
) {
    // RFC 1812 §4.3.2.3: at most 576 bytes in all; RFC 4443 §2.4: at most the minimum MTU.
    let longest = if from.is_ipv4() {
        576 - IPV4_HEADER - 8
    } else {
        1280 - IPV6_HEADER - 8
    };
    let quoted = &quoted[..quoted.len().min(longest)];
    icmp(outbox, from, to, kind, code, pointer.to_be_bytes(), quoted);
}

/// Queues an ICMP or ICMPv6 message, by the addresses' version. `rest` is the second word of the header.
fn icmp(
    outbox: &mut Outbox,
    from: IpAddr,
    to: IpAddr,
    kind: u8,
    code: u8,
    rest: [u8; 4],
    body: &[u8],
) {
    let number = if from.is_ipv4() {
        protocol::ICMP
    } else {
        protocol::ICMPV6
    };
    packet(outbox, from, to, number, 8 + body.len(), |message| {
        write_icmp(message, from, to, kind, code, rest, body)
    });
}

fn write_icmp(
    message: &mut [u8],
    from: IpAddr,
    to: IpAddr,
    kind: u8,
    code: u8,
    rest: [u8; 4],
    body: &[u8],
) {
    message[..4].copy_from_slice(&[kind, code, 0, 0]);
    message[4..8].copy_from_slice(&rest);
    message[8..].copy_from_slice(body);
    let sum = if from.is_ipv4() {
        !checksum::data(message)
    } else {
        offload::icmpv6_checksum(from, to, message)
    };
    message[2..4].copy_from_slice(&sum.to_be_bytes());
}

/// An echo reply, whole, even if it is longer than the MTU.
pub(crate) fn echo(
    from: IpAddr,
    to: IpAddr,
    identifier: u16,
    sequence: u16,
    payload: &[u8],
) -> Vec<u8> {
    let (number, kind) = if from.is_ipv4() {
        (protocol::ICMP, 0)
    } else {
        (protocol::ICMPV6, 129)
    };
    let repr = IpRepr::new(
        from.into(),
        to.into(),
        number.into(),
        8 + payload.len(),
        HOPS,
    );
    let mut packet = vec![0; repr.buffer_len()];
    repr.emit(&mut packet[..], &ChecksumCapabilities::ignored());
    let [a, b] = identifier.to_be_bytes();
    let [c, d] = sequence.to_be_bytes();
    write_icmp(
        &mut packet[repr.header_len()..],
        from,
        to,
        kind,
        0,
        [a, b, c, d],
        payload,
    );
    packet
}

/// The start of a packet as its sender made it, to quote in an ICMP error: IP header and the first 8 bytes of transport.
pub(crate) fn quote(
    source: SocketAddr,
    destination: SocketAddr,
    protocol: u8,
    transport: [u8; 8],
    length: usize,
) -> Vec<u8> {
    let repr = IpRepr::new(
        source.ip().into(),
        destination.ip().into(),
        protocol.into(),
        length,
        HOPS,
    );
    let header = repr.header_len();
    let mut packet = vec![0; header + length.max(8)];
    repr.emit(&mut packet[..], &ChecksumCapabilities::default());
    packet[header..header + 8].copy_from_slice(&transport);
    packet
}

fn packet(
    outbox: &mut Outbox,
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    len: usize,
    write: impl FnOnce(&mut [u8]),
) {
    let repr = IpRepr::new(from.into(), to.into(), protocol.into(), len, HOPS);
    outbox.push_with(repr.buffer_len(), |packet| {
        repr.emit(&mut *packet, &ChecksumCapabilities::ignored());
        write(&mut packet[repr.header_len()..]);
    });
}
