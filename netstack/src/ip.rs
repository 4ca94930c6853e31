//! What an IP header says, checked against the bytes that are there.
//!
//! Everything after this module may trust offsets and lengths. It knows no flows and keeps no state.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::{Ipv4Packet, Ipv6Packet};

/// Protocol numbers (IANA) that this stack serves.
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const ICMPV6: u8 = 58;
}

pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const IPV6_HEADER: usize = 40;

/// One packet's addresses and where its parts lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Headers {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// The payload's protocol, past any IPv6 extension headers.
    pub(crate) protocol: u8,
    /// Length of the fixed part (IPv4 with options, IPv6 without extension headers).
    pub(crate) header: usize,
    /// Where the payload begins; past `header` if there are extension headers.
    pub(crate) payload: usize,
    /// Where the payload ends: the length the header gives, which may be less than the bytes received.
    pub(crate) end: usize,
    pub(crate) fragment: Option<Fragment>,
}

/// One piece of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) id: u32,
    /// Offset of this piece in the whole payload, in bytes.
    pub(crate) offset: usize,
    pub(crate) more: bool,
}

/// Why a packet was not even looked at further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// Lengths that contradict each other or the bytes received.
    Length,
    /// The IPv4 header's checksum is wrong.
    Checksum,
    /// Addresses that no packet on a link may carry: unspecified, loopback, multicast as a source, v4-mapped.
    Address,
}

impl Headers {
    pub(crate) fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        match packet.first().map(|byte| byte >> 4) {
            Some(4) => Self::parse_v4(packet),
            Some(6) => Self::parse_v6(packet),
            Some(_) | None => Err(Malformed::Length),
        }
    }

    fn parse_v4(packet: &[u8]) -> Result<Self, Malformed> {
        let ip = Ipv4Packet::new_checked(packet).map_err(|_| Malformed::Length)?;
        let header = usize::from(ip.header_len());
        if header < IPV4_HEADER {
            return Err(Malformed::Length);
        }
        if !ip.verify_checksum() {
            return Err(Malformed::Checksum);
        }
        let fragment = (ip.more_frags() || ip.frag_offset() != 0).then(|| Fragment {
            id: u32::from(ip.ident()),
            offset: usize::from(ip.frag_offset()),
            more: ip.more_frags(),
        });
        let (source, destination) = (ip.src_addr(), ip.dst_addr());
        if !may_be_source_v4(source) || destination.is_unspecified() || destination.is_loopback() {
            return Err(Malformed::Address);
        }
        Ok(Self {
            source: source.into(),
            destination: destination.into(),
            protocol: ip.next_header().into(),
            header,
            payload: header,
            end: usize::from(ip.total_len()),
            fragment,
        })
    }

    fn parse_v6(packet: &[u8]) -> Result<Self, Malformed> {
        let ip = Ipv6Packet::new_checked(packet).map_err(|_| Malformed::Length)?;
        let end = ip.total_len();
        let (source, destination) = (ip.src_addr(), ip.dst_addr());
        if !may_be_source_v6(source) || !may_be_destination_v6(destination) {
            return Err(Malformed::Address);
        }
        let body = packet.get(..end).ok_or(Malformed::Length)?;
        let chain = Chain::walk(body, ip.next_header().into())?;
        Ok(Self {
            source: source.into(),
            destination: destination.into(),
            protocol: chain.protocol,
            header: IPV6_HEADER,
            payload: chain.payload,
            end,
            fragment: chain.fragment,
        })
    }

    /// Whether this is one whole packet with nothing between the fixed header and the payload.
    pub(crate) fn is_plain(&self) -> bool {
        self.fragment.is_none() && self.payload == self.header
    }
}

fn may_be_source_v4(ip: Ipv4Addr) -> bool {
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_broadcast())
}

fn may_be_source_v6(ip: Ipv6Addr) -> bool {
    !ip.is_multicast() && may_be_destination_v6(ip)
}

fn may_be_destination_v6(ip: Ipv6Addr) -> bool {
    !(ip.is_unspecified() || ip.is_loopback() || ip.to_ipv4_mapped().is_some())
}

/// Multicast or broadcast: nothing this stack answers.
pub(crate) fn is_group(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_multicast() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_multicast(),
    }
}

/// IPv6 extension headers (RFC 8200 §4), followed to the payload or to the first fragment header.
struct Chain {
    protocol: u8,
    payload: usize,
    fragment: Option<Fragment>,
}

impl Chain {
    /// More headers than this are an attack or a mistake.
    const LONGEST: usize = 8;

    fn walk(packet: &[u8], first: u8) -> Result<Self, Malformed> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const DESTINATION_OPTIONS: u8 = 60;
        let (mut protocol, mut at) = (first, IPV6_HEADER);
        for _ in 0..Self::LONGEST {
            match protocol {
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                    let next = *packet.get(at).ok_or(Malformed::Length)?;
                    let units = *packet.get(at + 1).ok_or(Malformed::Length)?;
                    protocol = next;
                    at += (usize::from(units) + 1) * 8;
                    if at > packet.len() {
                        return Err(Malformed::Length);
                    }
                }
                FRAGMENT => return Self::fragment(packet, at),
                _ => {
                    return Ok(Self {
                        protocol,
                        payload: at,
                        fragment: None,
                    });
                }
            }
        }
        Err(Malformed::Length)
    }

    fn fragment(packet: &[u8], at: usize) -> Result<Self, Malformed> {
        let Some(&[protocol, _, high, low, a, b, c, d]) =
            packet.get(at..).and_then(<[u8]>::first_chunk::<8>)
        else {
            return Err(Malformed::Length);
        };
        let offset = u16::from_be_bytes([high, low]);
        let fragment = Fragment {
            id: u32::from_be_bytes([a, b, c, d]),
            offset: usize::from(offset & !7),
            more: offset & 1 == 1,
        };
        Ok(Self {
            protocol,
            payload: at + 8,
            fragment: Some(fragment),
        })
    }
}

/// Makes `out` one plain packet: the fixed header of `packet` without extension headers, then `payload`. `None` if the
/// result would not fit an IP packet.
pub(crate) fn normalise(
    packet: &[u8],
    headers: &Headers,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Option<Headers> {
    out.clear();
    out.extend_from_slice(packet.get(..headers.header)?);
    out.extend_from_slice(payload);
    match headers.source {
        IpAddr::V4(_) => {
            let mut ip = Ipv4Packet::new_unchecked(&mut out[..]);
            ip.set_total_len(u16::try_from(headers.header + payload.len()).ok()?);
            ip.set_more_frags(false);
            ip.set_frag_offset(0);
            ip.fill_checksum();
        }
        IpAddr::V6(_) => {
            let mut ip = Ipv6Packet::new_unchecked(&mut out[..]);
            ip.set_payload_len(u16::try_from(payload.len()).ok()?);
            ip.set_next_header(headers.protocol.into());
        }
    }
    Some(Headers {
        payload: headers.header,
        end: out.len(),
        fragment: None,
        ..*headers
    })
}
