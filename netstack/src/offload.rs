//! What travels beside a packet: which checksums are still to do and how to cut it into segments.
//!
//! A Linux TUN or packet socket can hand over 64 KiB TCP segments without checksums, and take them back, under a 10-byte
//! virtio-net header (virtio 1.2 §5.1.6). That saves touching each byte once more and most of the per-packet work. This
//! module speaks that header and does in software what the device does not; it knows no flows.

use std::net::IpAddr;

use smoltcp::wire::{IpAddress, Ipv4Packet, TcpPacket, UdpPacket, checksum};

use crate::ip::{Headers, IPV6_HEADER, protocol};

/// Length of the virtio-net header that [`Offload::from_virtio`] reads, without `num_buffers`.
pub const VIRTIO_HEADER: usize = 10;

/// What a device said about a packet, or is to do with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// State of the transport checksum.
    pub checksum: Checksum,
    /// Set when the packet holds several segments.
    pub segments: Option<Segments>,
}

/// State of the transport checksum of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// It is in the packet, and nobody has vouched for it.
    #[default]
    Complete,
    /// It holds only the sum of the pseudo-header. The receiver of a real wire has to sum from `start` to the end and
    /// store the result at `start + offset`.
    Partial {
        /// First byte summed, from the start of the IP packet.
        start: u16,
        /// Where the sum goes, from `start`.
        offset: u16,
    },
    /// The device has verified it.
    Verified,
}

/// How to cut a packet whose TCP payload is longer than the peer's MSS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// IP version of the packet.
    pub version: IpVersion,
    /// Payload bytes in each segment but the last.
    pub size: u16,
    /// IP and TCP headers together, which every segment repeats.
    pub header: u16,
}

/// IP version of a packet with segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpVersion {
    /// TSO4.
    V4,
    /// TSO6.
    V6,
}

/// Which of these jobs the device does for packets that this stack sends. A device that does none takes
/// [`DeviceOffload::default`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceOffload {
    /// It completes transport checksums. Without it `tso4` and `tso6` are ignored.
    pub checksum: bool,
    /// It cuts IPv4 TCP packets into segments.
    pub tso4: bool,
    /// It cuts IPv6 TCP packets into segments.
    pub tso6: bool,
}

/// A virtio-net header that this stack never asked for: an unknown kind of segmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("virtio-net header with segmentation type {0}")]
pub struct UnknownSegmentation(pub u8);

const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

impl Offload {
    /// Reads the header that precedes a packet from the device. All fields are in the host's byte order.
    pub fn from_virtio(header: &[u8; VIRTIO_HEADER]) -> Result<Self, UnknownSegmentation> {
        let [
            flags,
            kind,
            header_low,
            header_high,
            size_low,
            size_high,
            start_low,
            start_high,
            offset_low,
            offset_high,
        ] = *header;
        let version = match kind & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(IpVersion::V4),
            GSO_TCPV6 => Some(IpVersion::V6),
            other => return Err(UnknownSegmentation(other)),
        };
        let segments = version.map(|version| Segments {
            version,
            size: u16::from_ne_bytes([size_low, size_high]),
            header: u16::from_ne_bytes([header_low, header_high]),
        });
        let checksum = if flags & NEEDS_CHECKSUM != 0 {
            Checksum::Partial {
                start: u16::from_ne_bytes([start_low, start_high]),
                offset: u16::from_ne_bytes([offset_low, offset_high]),
            }
        } else if flags & DATA_VALID != 0 {
            Checksum::Verified
        } else {
            Checksum::Complete
        };
        Ok(Self { checksum, segments })
    }

    /// The header to write before a packet. `Verified` becomes plain `Complete`: a TUN device ignores DATA_VALID.
    pub fn to_virtio(&self) -> [u8; VIRTIO_HEADER] {
        let mut header = [0; VIRTIO_HEADER];
        if let Checksum::Partial { start, offset } = self.checksum {
            header[0] = NEEDS_CHECKSUM;
            header[6..8].copy_from_slice(&start.to_ne_bytes());
            header[8..10].copy_from_slice(&offset.to_ne_bytes());
        }
        if let Some(segments) = self.segments {
            header[1] = match segments.version {
                IpVersion::V4 => GSO_TCPV4,
                IpVersion::V6 => GSO_TCPV6,
            };
            header[2..4].copy_from_slice(&segments.header.to_ne_bytes());
            header[4..6].copy_from_slice(&segments.size.to_ne_bytes());
        }
        header
    }

    /// Whether what the device said can be true of a packet of this length: offsets inside it, a segment size.
    pub(crate) fn is_plausible(&self, packet: usize) -> bool {
        let checksum = match self.checksum {
            Checksum::Partial { start, offset } => {
                usize::from(start) + usize::from(offset) + 2 <= packet
            }
            Checksum::Complete | Checksum::Verified => true,
        };
        checksum && self.segments.is_none_or(|segments| segments.size > 0)
    }
}

/// Whether the transport checksum of an incoming packet holds, as far as nobody promised it.
pub(crate) fn verify(packet: &[u8], headers: &Headers, offload: &Offload) -> bool {
    match offload.checksum {
        Checksum::Partial { .. } | Checksum::Verified => return true,
        Checksum::Complete => {}
    }
    let Some(payload) = packet.get(headers.payload..headers.end) else {
        return false;
    };
    let (source, destination) = (
        IpAddress::from(headers.source),
        IpAddress::from(headers.destination),
    );
    match headers.protocol {
        protocol::TCP => TcpPacket::new_checked(payload)
            .is_ok_and(|tcp| tcp.verify_checksum(&source, &destination)),
        // A sum of zero over IPv4 means there is none; over IPv6 it is forbidden (RFC 8200 §8.1).
        protocol::UDP => UdpPacket::new_checked(payload).is_ok_and(|udp| {
            let absent_in_v6 = udp.checksum() == 0 && headers.source.is_ipv6();
            !absent_in_v6 && udp.verify_checksum(&source, &destination)
        }),
        protocol::ICMP => checksum::data(payload) == !0,
        protocol::ICMPV6 => {
            let pseudo = checksum::pseudo_header(
                &source,
                &destination,
                headers.protocol.into(),
                payload.len() as u32,
            );
            checksum::combine(&[pseudo, checksum::data(payload)]) == !0
        }
        _ => true,
    }
}

/// Makes a packet of ours ready for the device: the IPv4 header's checksum, and the transport's or a sum over its
/// pseudo-header where the device does the rest. `segment` is the largest TCP payload of one segment.
pub(crate) fn complete(packet: &mut [u8], device: &DeviceOffload, segment: usize) -> Offload {
    let (source, destination, protocol, header) = seal_ip(packet);
    if is_fragment(packet) {
        return Offload::default();
    }
    let transport = &mut packet[header..];
    let Some(offset) = checksum_offset(protocol).filter(|offset| transport.len() >= offset + 2)
    else {
        return Offload::default();
    };
    let pseudo = checksum::pseudo_header(
        &source,
        &destination,
        protocol.into(),
        transport.len() as u32,
    );
    if !device.checksum {
        store(transport, offset, 0);
        let sum = !checksum::combine(&[pseudo, checksum::data(transport)]);
        // Zero means "no checksum" in UDP, so the other form of zero is sent (RFC 768).
        store(
            transport,
            offset,
            if sum == 0 && protocol == protocol::UDP {
                !0
            } else {
                sum
            },
        );
        return Offload::default();
    }
    store(transport, offset, pseudo);
    let checksum = Checksum::Partial {
        start: header as u16,
        offset: offset as u16,
    };
    Offload {
        checksum,
        segments: segments(transport, protocol, header, segment),
    }
}

/// Writes the IPv4 header's checksum; gives addresses, protocol and the length of the header.
fn seal_ip(packet: &mut [u8]) -> (IpAddress, IpAddress, u8, usize) {
    if packet[0] >> 4 == 4 {
        let mut ip = Ipv4Packet::new_unchecked(&mut *packet);
        ip.fill_checksum();
        let ip = Ipv4Packet::new_unchecked(&*packet);
        return (
            ip.src_addr().into(),
            ip.dst_addr().into(),
            ip.next_header().into(),
            usize::from(ip.header_len()),
        );
    }
    let ip = smoltcp::wire::Ipv6Packet::new_unchecked(&*packet);
    (
        ip.src_addr().into(),
        ip.dst_addr().into(),
        ip.next_header().into(),
        IPV6_HEADER,
    )
}

/// Whether the transport's checksum was made before this packet was cut. IPv6 shows it by the protocol.
fn is_fragment(packet: &[u8]) -> bool {
    const MORE_AND_OFFSET: u16 = 0x3FFF;
    packet[0] >> 4 == 4 && u16::from_be_bytes([packet[6], packet[7]]) & MORE_AND_OFFSET != 0
}

fn segments(transport: &[u8], protocol: u8, header: usize, size: usize) -> Option<Segments> {
    if protocol != protocol::TCP {
        return None;
    }
    let tcp = usize::from(TcpPacket::new_unchecked(transport).header_len());
    if transport.len() - tcp <= size {
        return None;
    }
    let version = if header == IPV6_HEADER {
        IpVersion::V6
    } else {
        IpVersion::V4
    };
    Some(Segments {
        version,
        size: size as u16,
        header: (header + tcp) as u16,
    })
}

fn checksum_offset(protocol: u8) -> Option<usize> {
    match protocol {
        protocol::TCP => Some(16),
        protocol::UDP => Some(6),
        _ => None,
    }
}

fn store(transport: &mut [u8], offset: usize, sum: u16) {
    transport[offset..offset + 2].copy_from_slice(&sum.to_be_bytes());
}

/// The pseudo-header's sum for code that builds ICMPv6.
pub(crate) fn icmpv6_checksum(source: IpAddr, destination: IpAddr, message: &[u8]) -> u16 {
    let pseudo = checksum::pseudo_header(
        &source.into(),
        &destination.into(),
        protocol::ICMPV6.into(),
        message.len() as u32,
    );
    !checksum::combine(&[pseudo, checksum::data(message)])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_offload() -> impl Strategy<Value = Offload> {
        let checksum = prop_oneof![
            Just(Checksum::Complete),
            (any::<u16>(), any::<u16>())
                .prop_map(|(start, offset)| Checksum::Partial { start, offset }),
        ];
        let version = prop_oneof![Just(IpVersion::V4), Just(IpVersion::V6)];
        let segments = prop::option::of((version, any::<u16>(), any::<u16>()).prop_map(
            |(version, size, header)| Segments {
                version,
                size,
                header,
            },
        ));
        (checksum, segments).prop_map(|(checksum, segments)| Offload { checksum, segments })
    }

    proptest! {
        #[test]
        fn the_virtio_header_is_read_as_it_was_written(offload in any_offload()) {
            prop_assert_eq!(Offload::from_virtio(&offload.to_virtio()), Ok(offload));
        }
    }

    #[test]
    fn udp_segmentation_is_refused_by_its_number() {
        let mut header = [0; VIRTIO_HEADER];
        header[1] = 5;

        assert_eq!(Offload::from_virtio(&header), Err(UnknownSegmentation(5)));
    }

    #[test]
    fn offsets_past_the_packet_are_implausible() {
        let partial = |start, offset| Offload {
            checksum: Checksum::Partial { start, offset },
            segments: None,
        };

        assert!(partial(20, 16).is_plausible(38));
        assert!(!partial(20, 16).is_plausible(37));
        assert!(!partial(u16::MAX, u16::MAX).is_plausible(65_535));
    }
}
