//! IP fragments: put together before the demultiplexer, and made for datagrams longer than the MTU.
//!
//! Only the first fragment carries ports, so pieces are keyed by (source, destination, id, protocol). What a peer can make
//! us hold is bounded in number, bytes and time. Overlapping pieces end their datagram (RFC 5722), as no honest sender
//! makes them. It knows nothing of what the datagram carries.

use std::net::IpAddr;

use crate::ip::{self, Fragment, Headers};
use crate::timers::Tick;

/// Datagrams being put together.
pub(crate) struct Fragments {
    partial: Vec<Partial>,
    bytes: usize,
    /// The last whole packet, kept for its memory.
    whole: Vec<u8>,
}

struct Partial {
    key: Key,
    /// The fixed header of the first piece, and the protocol it names.
    header: Vec<u8>,
    protocol: u8,
    payload: Vec<u8>,
    /// Byte ranges received, sorted, disjoint and not adjacent.
    received: Vec<(usize, usize)>,
    /// Length of the whole payload, known from the last piece.
    total: Option<usize>,
    expires: Tick,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    id: u32,
    protocol: u8,
}

/// Datagrams, and bytes of payload, that may wait for their missing pieces.
const DATAGRAMS: usize = 64;
pub(crate) const BYTES: usize = 1 << 20;
/// Pieces with gaps between them in one datagram.
const GAPS: usize = 64;
/// Longest payload of an IP packet.
const LONGEST: usize = 65_535;
/// RFC 791 suggests 15 s, RFC 8200 says 60 s; this is the Linux default.
const LIFE: Tick = 30_000;

/// What became of a piece.
pub(crate) enum Assembly {
    /// Kept until the others come.
    Waiting,
    /// It made a datagram whole; the packet is in [`Fragments::whole`].
    Whole(Headers),
    /// It contradicts the other pieces, or is not one.
    Refused,
}

impl Fragments {
    pub(crate) fn new() -> Self {
        Self {
            partial: Vec::new(),
            bytes: 0,
            whole: Vec::new(),
        }
    }

    /// Adds one piece.
    pub(crate) fn add(
        &mut self,
        now: Tick,
        packet: &[u8],
        headers: &Headers,
        fragment: Fragment,
    ) -> Assembly {
        self.expire(now);
        let Some(piece) = packet.get(headers.payload..headers.end) else {
            return Assembly::Refused;
        };
        let end = fragment.offset + piece.len();
        let uneven = fragment.more && !piece.len().is_multiple_of(8);
        if piece.is_empty() || uneven || end > LONGEST {
            return Assembly::Refused;
        }
        let (source, destination, protocol) =
            (headers.source, headers.destination, headers.protocol);
        // Only IPv4 counts the protocol in; in IPv6 later pieces may name another (RFC 8200 §4.5).
        let protocol = if source.is_ipv4() { protocol } else { 0 };
        let index = self.find_or_make(
            now,
            Key {
                source,
                destination,
                id: fragment.id,
                protocol,
            },
        );
        let before = self.partial[index].payload.len();
        let accepted = self.partial[index].add(packet, headers, fragment, piece);
        self.bytes += self.partial[index].payload.len() - before;
        if !accepted {
            self.remove(index);
            return Assembly::Refused;
        }
        let assembly = self.finish(index, headers);
        self.shrink();
        assembly
    }

    /// The packet of the last [`Assembly::Whole`].
    pub(crate) fn whole(&mut self) -> &mut Vec<u8> {
        &mut self.whole
    }

    /// Bytes counted, and bytes that are there: for the invariants.
    pub(crate) fn count(&self) -> (usize, usize) {
        (
            self.bytes,
            self.partial
                .iter()
                .map(|partial| partial.payload.len())
                .sum(),
        )
    }

    fn finish(&mut self, index: usize, headers: &Headers) -> Assembly {
        let partial = &self.partial[index];
        if partial
            .total
            .is_none_or(|total| partial.received != [(0, total)])
            || partial.header.is_empty()
        {
            return Assembly::Waiting;
        }
        let partial = self.remove(index);
        let first = Headers {
            header: partial.header.len(),
            protocol: partial.protocol,
            ..*headers
        };
        match ip::normalise(&partial.header, &first, &partial.payload, &mut self.whole) {
            Some(whole) => Assembly::Whole(whole),
            None => Assembly::Refused,
        }
    }

    fn find_or_make(&mut self, now: Tick, key: Key) -> usize {
        if let Some(index) = self.partial.iter().position(|partial| partial.key == key) {
            return index;
        }
        if self.partial.len() == DATAGRAMS {
            self.remove(0);
        }
        let (header, payload, received) = (Vec::new(), Vec::new(), Vec::new());
        let expires = now + LIFE;
        self.partial.push(Partial {
            key,
            header,
            protocol: 0,
            payload,
            received,
            total: None,
            expires,
        });
        self.partial.len() - 1
    }

    fn remove(&mut self, index: usize) -> Partial {
        let partial = self.partial.remove(index);
        self.bytes -= partial.payload.len();
        partial
    }

    /// Drops the oldest datagrams until the rest is within bounds.
    fn shrink(&mut self) {
        while self.bytes > BYTES {
            self.remove(0);
        }
    }

    fn expire(&mut self, now: Tick) {
        while self
            .partial
            .first()
            .is_some_and(|oldest| oldest.expires <= now)
        {
            self.remove(0);
        }
    }
}

impl Partial {
    /// Whether the piece agrees with the others; it is kept if so.
    fn add(&mut self, packet: &[u8], headers: &Headers, fragment: Fragment, piece: &[u8]) -> bool {
        let (start, end) = (fragment.offset, fragment.offset + piece.len());
        let longest = self.received.last().map_or(0, |last| last.1);
        let total = if fragment.more { self.total } else { Some(end) };
        if total.is_some_and(|total| end > total || longest > total)
            || (self.total.is_some() && total != self.total)
        {
            return false;
        }
        let at = self.received.partition_point(|range| range.1 <= start);
        if self.received.get(at).is_some_and(|next| next.0 < end) || self.received.len() == GAPS {
            return false;
        }
        self.received.insert(at, (start, end));
        self.merge();
        self.total = total;
        if self.payload.len() < end {
            self.payload.resize(end, 0);
        }
        self.payload[start..end].copy_from_slice(piece);
        if start == 0 {
            self.header.extend_from_slice(&packet[..headers.header]);
            self.protocol = headers.protocol;
        }
        true
    }

    fn merge(&mut self) {
        self.received.dedup_by(|next, previous| {
            let adjacent = previous.1 == next.0;
            if adjacent {
                previous.1 = next.1;
            }
            adjacent
        });
    }
}

/// Cuts one plain packet of ours that is longer than `mtu` and hands each piece to `emit`. `id` tells the datagrams of one
/// pair of addresses apart. Transport checksums must be complete.
pub(crate) fn split(packet: &[u8], mtu: usize, id: u32, mut emit: impl FnMut(&[u8])) {
    let v6 = packet[0] >> 4 == 6;
    let (fixed, header) = if v6 {
        (ip::IPV6_HEADER, ip::IPV6_HEADER + 8)
    } else {
        (ip::IPV4_HEADER, ip::IPV4_HEADER)
    };
    let step = (mtu - header) / 8 * 8;
    let payload = &packet[fixed..];
    let mut piece = Vec::with_capacity(mtu);
    for (number, chunk) in payload.chunks(step).enumerate() {
        let offset = number * step;
        let more = offset + chunk.len() < payload.len();
        piece.clear();
        piece.extend_from_slice(&packet[..fixed]);
        let length = (header + chunk.len()) as u16;
        if v6 {
            piece[4..6].copy_from_slice(&(length - ip::IPV6_HEADER as u16).to_be_bytes());
            piece[6] = 44;
            piece.extend_from_slice(&[packet[6], 0]);
            piece.extend_from_slice(&(offset as u16 | u16::from(more)).to_be_bytes());
            piece.extend_from_slice(&id.to_be_bytes());
        } else {
            piece[2..4].copy_from_slice(&length.to_be_bytes());
            piece[4..6].copy_from_slice(&(id as u16).to_be_bytes());
            piece[6..8]
                .copy_from_slice(&((offset / 8) as u16 | u16::from(more) << 13).to_be_bytes());
        }
        piece.extend_from_slice(chunk);
        emit(&piece);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::{IpRepr, Ipv4Packet};

    use super::*;
    use crate::ip::protocol;

    fn packet(v6: bool, payload: &[u8]) -> Vec<u8> {
        let (source, destination): (IpAddr, IpAddr) = if v6 {
            ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap())
        } else {
            ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap())
        };
        let repr = IpRepr::new(
            source.into(),
            destination.into(),
            protocol::UDP.into(),
            payload.len(),
            64,
        );
        let mut packet = vec![0; repr.buffer_len()];
        repr.emit(
            &mut packet[..],
            &smoltcp::phy::ChecksumCapabilities::default(),
        );
        packet[repr.header_len()..].copy_from_slice(payload);
        packet
    }

    fn pieces(packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        split(packet, mtu, 77, |piece| pieces.push(piece.to_vec()));
        for piece in &mut pieces {
            if piece[0] >> 4 == 4 {
                Ipv4Packet::new_unchecked(&mut piece[..]).fill_checksum();
            }
        }
        pieces
    }

    fn feed(fragments: &mut Fragments, now: Tick, piece: &[u8]) -> Assembly {
        let headers = Headers::parse(piece).unwrap();
        fragments.add(now, piece, &headers, headers.fragment.unwrap())
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_make_the_packet_again(
            v6 in any::<bool>(),
            payload in prop::collection::vec(any::<u8>(), 2000..9000),
            mtu in 576usize..1500,
            order in any::<prop::sample::Index>(),
        ) {
            let packet = packet(v6, &payload);
            let mut pieces = pieces(&packet, mtu);
            prop_assert!(pieces.iter().all(|piece| piece.len() <= mtu));
            let pivot = order.index(pieces.len());
            pieces.rotate_left(pivot);
            if pivot % 2 == 0 {
                pieces.reverse();
            }

            let mut fragments = Fragments::new();
            let last = pieces.pop().unwrap();
            for piece in &pieces {
                prop_assert!(matches!(feed(&mut fragments, 1, piece), Assembly::Waiting));
            }
            let Assembly::Whole(headers) = feed(&mut fragments, 1, &last) else { panic!("not whole") };

            let whole = fragments.whole().clone();
            prop_assert_eq!(Headers::parse(&whole), Ok(headers));
            prop_assert_eq!(&whole[headers.payload..headers.end], &payload[..]);
            prop_assert_eq!(fragments.count(), (0, 0));
        }
    }

    #[test]
    fn an_overlap_ends_the_datagram() {
        let packet = packet(false, &[7; 2000]);
        let mut fragments = Fragments::new();
        let wide = pieces(&packet, 1300);
        let narrow = pieces(&packet, 1000);

        assert!(matches!(
            feed(&mut fragments, 1, &wide[0]),
            Assembly::Waiting
        ));
        assert!(matches!(
            feed(&mut fragments, 1, &narrow[1]),
            Assembly::Refused
        ));
        assert_eq!(fragments.count(), (0, 0));
    }

    #[test]
    fn missing_pieces_are_waited_for_thirty_seconds() {
        let packet = packet(true, &[7; 2000]);
        let pieces = pieces(&packet, 1300);
        let mut fragments = Fragments::new();

        feed(&mut fragments, 1, &pieces[0]);
        assert!(matches!(
            feed(&mut fragments, LIFE + 1, &pieces[1]),
            Assembly::Waiting
        ));
    }

    #[test]
    fn a_flood_of_first_pieces_stays_within_bounds() {
        let mut fragments = Fragments::new();
        for id in 0..10_000u32 {
            split(&packet(false, &[1; 60_000]), 40_000, id, |piece| {
                let mut piece = piece.to_vec();
                Ipv4Packet::new_unchecked(&mut piece[..]).fill_checksum();
                if Headers::parse(&piece).unwrap().fragment.unwrap().more {
                    feed(&mut fragments, 1, &piece);
                }
            });
            let (counted, held) = fragments.count();
            assert_eq!(counted, held);
            assert!(held <= BYTES);
        }
    }
}
