//! Packets made by hand, for what no well-behaved host would send, and what the stack says to them.

use std::net::IpAddr;
use std::time::Instant;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IpProtocol, IpRepr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr, checksum,
};
use tp_netstack::{LONGEST_PACKET, Offload, Stack};

pub const PROGRAM: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 1));
pub const DESTINATION: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));
pub const PROGRAM_V6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1));
pub const DESTINATION_V6: IpAddr =
    IpAddr::V6(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7));
pub const PORT: u16 = 40_000;

/// An IP packet between these addresses around a payload.
pub fn ip(from: IpAddr, to: IpAddr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let repr = IpRepr::new(from.into(), to.into(), protocol, payload.len(), 64);
    let mut packet = vec![0; repr.buffer_len()];
    repr.emit(&mut packet[..], &ChecksumCapabilities::default());
    packet[repr.header_len()..].copy_from_slice(payload);
    packet
}

/// A TCP segment from the program to port 80.
pub fn segment(
    control: TcpControl,
    sequence: u32,
    acknowledgement: Option<u32>,
    payload: &[u8],
) -> Vec<u8> {
    segment_with_window(control, sequence, acknowledgement, 60_000, payload)
}

/// The same with the window of the program's choice, in bytes.
pub fn segment_with_window(
    control: TcpControl,
    sequence: u32,
    acknowledgement: Option<u32>,
    window: u16,
    payload: &[u8],
) -> Vec<u8> {
    let tcp = TcpRepr {
        src_port: PORT,
        dst_port: 80,
        control,
        seq_number: TcpSeqNumber(sequence as i32),
        ack_number: acknowledgement.map(|number| TcpSeqNumber(number as i32)),
        window_len: window,
        window_scale: None,
        max_seg_size: (control == TcpControl::Syn).then_some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let mut bytes = vec![0; tcp.buffer_len()];
    let mut packet = TcpPacket::new_unchecked(&mut bytes);
    tcp.emit(
        &mut packet,
        &PROGRAM.into(),
        &DESTINATION.into(),
        &ChecksumCapabilities::default(),
    );
    ip(PROGRAM, DESTINATION, IpProtocol::Tcp, &bytes)
}

/// A datagram from the program to port 53.
pub fn datagram(payload: &[u8]) -> Vec<u8> {
    let udp = UdpRepr {
        src_port: PORT,
        dst_port: 53,
    };
    let mut bytes = vec![0; 8 + payload.len()];
    let (from, to) = (PROGRAM.into(), DESTINATION.into());
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut bytes),
        &from,
        &to,
        payload.len(),
        |space| space.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    ip(PROGRAM, DESTINATION, IpProtocol::Udp, &bytes)
}

/// An ICMP message with a right checksum.
pub fn icmp(kind: u8, code: u8, rest: [u8; 4], body: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, code, 0, 0][..], &rest, body].concat();
    let sum = !checksum::data(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ip(PROGRAM, DESTINATION, IpProtocol::Icmp, &message)
}

/// Changes an IPv4 packet, and makes its header's checksum right again.
pub fn altered(mut packet: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut packet);
    // The header may say that it is longer than the packet.
    let header = (usize::from(packet[0] & 0xF) * 4).min(packet.len());
    packet[10..12].fill(0);
    let sum = !checksum::data(&packet[..header]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Hands a packet to the stack; everything it has to send then.
pub fn say(stack: &mut Stack, now: Instant, packet: &[u8]) -> Vec<Vec<u8>> {
    stack.handle_packet(now, packet, Offload::default());
    answers(stack, now)
}

/// Everything the stack has to send now.
pub fn answers(stack: &mut Stack, now: Instant) -> Vec<Vec<u8>> {
    let mut buffer = vec![0; LONGEST_PACKET];
    let mut packets = Vec::new();
    while let Some((len, _)) = stack.poll_packet(now, &mut buffer) {
        packets.push(buffer[..len].to_vec());
    }
    packets
}

/// The TCP header of an IPv4 packet.
pub fn tcp(packet: &[u8]) -> TcpPacket<&[u8]> {
    TcpPacket::new_checked(&packet[20..]).expect("the stack sends whole headers")
}
