//! Path MTU discovery (RFC 1191, RFC 8201): a hop behind the device takes less than the link does.
//!
//! That happens where a program's machine forwards for others, to containers on a narrower bridge say. A router's report
//! makes the segments of the flow it quotes smaller, for the rest of its life; what was lost comes with the next
//! retransmission. smoltcp knows no path MTU, so where the device does not cut segments either, this does.

use smoltcp::wire::{Ipv4Packet, Ipv6Packet, TcpPacket};

use crate::Stack;
use crate::demux::FlowKey;
use crate::ip::IPV4_HEADER;
use crate::outbox::Outbox;

/// The least that every IPv4 host takes (RFC 9293 §3.7.1) and every IPv6 link (RFC 8200 §5). Reports of less would let
/// anybody who can send one make all traffic headers.
const LEAST_V4: usize = 576;
const LEAST_V6: usize = 1280;

const TCP_HEADER: usize = 20;

impl Stack {
    /// A segment of ours with this sequence number was longer than `mtu`, some router says. It is believed only about
    /// what is on its way (RFC 5927 §4.1).
    pub(crate) fn handle_too_big(&mut self, key: &FlowKey, sequence: u32, mtu: usize) {
        let Some(flow) = self
            .demux
            .find(key)
            .and_then(|index| self.flows.get_mut(index))
        else {
            return;
        };
        let (headers, least) = if flow.key.is_ipv4() {
            (self.v4.headers, LEAST_V4)
        } else {
            (self.v6.headers, LEAST_V6)
        };
        let on_the_way = flow.socket().map_or(0, |socket| socket.send_queue());
        let behind = flow.last.sequence.wrapping_sub(sequence) as usize;
        if (1..=on_the_way).contains(&behind) {
            flow.segment = flow.segment.min(mtu.max(least) - headers);
        }
    }
}

/// Cuts a segment whose payload is longer than `segment`. The first piece stays in `packet`, of which it gives the new
/// length; the others go to the outbox, which is sent next. Checksums are not made yet. `ip` is the length of the IP header.
pub(crate) fn cut(packet: &mut [u8], ip: usize, segment: usize, outbox: &mut Outbox) -> usize {
    let header = ip + usize::from(TcpPacket::new_unchecked(&packet[ip..]).header_len());
    // Options take their place from the payload (RFC 6691 §2).
    let segment = segment + TCP_HEADER - (header - ip);
    if packet.len() - header <= segment {
        return packet.len();
    }
    let (head, payload) = packet.split_at(header);
    let last = (payload.len() - 1) / segment;
    for (number, piece) in payload.chunks(segment).enumerate().skip(1) {
        outbox.push_with(header + piece.len(), |bytes| {
            bytes[..header].copy_from_slice(head);
            bytes[header..].copy_from_slice(piece);
            readdress(bytes, ip, number * segment, number == last);
        });
    }
    readdress(&mut packet[..header + segment], ip, 0, false);
    header + segment
}

/// Makes a copy of a segment's headers those of one of its pieces.
fn readdress(piece: &mut [u8], ip: usize, offset: usize, last: bool) {
    if ip == IPV4_HEADER {
        let total = piece.len() as u16;
        Ipv4Packet::new_unchecked(&mut *piece).set_total_len(total);
    } else {
        let payload = (piece.len() - ip) as u16;
        Ipv6Packet::new_unchecked(&mut *piece).set_payload_len(payload);
    }
    let mut tcp = TcpPacket::new_unchecked(&mut piece[ip..]);
    tcp.set_seq_number(tcp.seq_number() + offset);
    if !last {
        tcp.set_psh(false);
        tcp.set_fin(false);
    }
}
