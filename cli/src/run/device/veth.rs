//! A pair of virtual Ethernet interfaces, whose far end is read and written by a packet socket.
//!
//! Stands in for TUN where /dev/net/tun is root's alone: a packet socket takes the same virtio-net headers. Programs use
//! the near end. It looks for no neighbours: every frame carries its own hardware address as the destination, so the
//! far end's kernel sees frames for another host and leaves them alone, while the packet socket gets them all.

use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

use tp_netstack::{Checksum, Offload, Segments, VIRTIO_HEADER};

use super::super::netlink::{Link, Netlink};
use super::super::sys;
use super::{Device, HEADROOM, NAME, QUEUE, offload_of};

/// Two addresses and a protocol.
pub(super) const ETHERNET_HEADER: usize = 14;

/// Locally administered addresses of the near end and of whoever is behind the far one.
const NEAR: [u8; 6] = [0x02, 0x74, 0x70, 0, 0, 1];
const FAR: [u8; 6] = [0x02, 0x74, 0x70, 0, 0, 2];
const FAR_NAME: &str = "tp0-out";

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];

/// Bytes of frames that may wait for us; the kernel allows less on most machines, and takes this as a wish.
const SOCKET_BUFFER: i32 = 8 << 20;

/// That of Ethernet. Segments are cut and joined by the kernel, so it moves as much as a longer one; and congestion control,
/// which counts in segments, can send little enough for the queue of a packet socket.
const MTU: u16 = 1_500;

pub(super) struct Veth;

pub(super) fn make(netlink: &mut Netlink) -> io::Result<(OwnedFd, u32)> {
    netlink.add_pair(NAME, NEAR, FAR_NAME)?;
    let (near, far) = (netlink.index(NAME)?, netlink.index(FAR_NAME)?);
    let link = Link {
        mtu: Some(MTU.into()),
        queue: Some(QUEUE),
        no_arp: true,
        no_link_local: true,
    };
    netlink.set_up(far, link)?;
    netlink.set_up(near, link)?;
    let socket = sys::packet_socket(far)?;
    for option in [libc::SO_RCVBUF, libc::SO_SNDBUF] {
        sys::set_option(&socket, libc::SOL_SOCKET, option, SOCKET_BUFFER)?;
    }
    Ok((socket, near))
}

impl Device for Veth {
    fn mtu(&self) -> u16 {
        MTU
    }

    fn receive(
        &self,
        from: BorrowedFd<'_>,
        buffer: &mut [u8],
    ) -> io::Result<(Range<usize>, Offload)> {
        let length = rustix::io::read(from, &mut *buffer)?;
        let offload = offload_of(&buffer[..length])?;
        match buffer[..length].get(HEADROOM - 2..HEADROOM) {
            Some(protocol) if protocol == IPV4 || protocol == IPV6 => {
                Ok((HEADROOM..length, in_packet(offload)))
            }
            // Neighbour discovery of other protocols, say. An empty packet is counted as malformed, no more.
            Some(_) | None => Ok((length..length, Offload::default())),
        }
    }

    fn send(
        &self,
        to: BorrowedFd<'_>,
        buffer: &mut [u8],
        length: usize,
        offload: Offload,
    ) -> io::Result<()> {
        let is_v4 = buffer[HEADROOM] >> 4 == 4;
        buffer[..VIRTIO_HEADER].copy_from_slice(&in_frame(offload).to_virtio());
        let frame = &mut buffer[VIRTIO_HEADER..];
        frame[..6].copy_from_slice(&NEAR);
        frame[6..12].copy_from_slice(&FAR);
        frame[12..ETHERNET_HEADER].copy_from_slice(if is_v4 { &IPV4 } else { &IPV6 });
        rustix::io::write(to, &buffer[..HEADROOM + length])?;
        Ok(())
    }
}

/// The kernel counts from the start of the frame, and the stack from the start of the packet.
fn in_packet(offload: Offload) -> Offload {
    moved(offload, |place| {
        place.saturating_sub(ETHERNET_HEADER as u16)
    })
}

fn in_frame(offload: Offload) -> Offload {
    moved(offload, |place| {
        place.saturating_add(ETHERNET_HEADER as u16)
    })
}

fn moved(offload: Offload, shift: impl Fn(u16) -> u16) -> Offload {
    let checksum = match offload.checksum {
        Checksum::Partial { start, offset } => Checksum::Partial {
            start: shift(start),
            offset,
        },
        whole @ (Checksum::Complete | Checksum::Verified) => whole,
    };
    let segments = offload.segments.map(|segments| Segments {
        header: shift(segments.header),
        ..segments
    });
    Offload { checksum, segments }
}

#[cfg(test)]
mod tests {
    use tp_netstack::IpVersion;

    use super::*;

    #[test]
    fn offsets_of_a_packet_and_of_its_frame_are_an_ethernet_header_apart() {
        let in_packet_form = Offload {
            checksum: Checksum::Partial {
                start: 20,
                offset: 16,
            },
            segments: Some(Segments {
                version: IpVersion::V4,
                size: 1460,
                header: 40,
            }),
        };

        let framed = in_frame(in_packet_form);

        assert_eq!(
            framed.checksum,
            Checksum::Partial {
                start: 34,
                offset: 16
            }
        );
        assert_eq!(framed.segments.map(|segments| segments.header), Some(54));
        assert_eq!(in_packet(framed), in_packet_form);
    }
}
