//! Where the packets of a namespace come out: one trait, and a kind of device for each that a kernel may allow.
//!
//! A device is made inside the namespace (`make`) and used outside of it, by whoever got its descriptor.
//! It moves single IP packets with what is still to be done to them; it knows no flows.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};
use tp_netstack::{LONGEST_PACKET, Offload, VIRTIO_HEADER};

use super::netlink::Netlink;
use super::sockets;

mod tun;
mod veth;

/// The interface's name, as programs in the namespace see it.
pub(super) const NAME: &str = "tp0";

/// Packets that may wait for us. A packet lost here would cost a retransmission timeout of a second.
const QUEUE: u32 = 2_000;

/// The namespace's own addresses. From the range for benchmarks (RFC 2544), which no network routes, and a made-up
/// unique local one.
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
pub(super) const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd74, 0x7075, 0, 0, 0, 0, 0, 1);

/// The congestion control of programs in the namespace: what paces, as BBR does, halves the speed on a link without
/// loss.
const CONGESTION: &str = "cubic";

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A TUN device; needs /dev/net/tun.
    Tun,
    /// A pair of virtual Ethernet interfaces and a packet socket; works where /dev/net/tun is root's alone.
    Veth,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Tun => "tun",
            Self::Veth => "veth",
        })
    }
}

/// How packets lie in what one kind of device reads and writes. Both calls answer `WouldBlock` rather than wait, if the
/// descriptor was made non-blocking.
pub trait Device: Send {
    /// Longest IP packet on it, but for segments that are still to be cut.
    fn mtu(&self) -> u16;

    /// Reads one packet into `buffer`, which has room for [`BUFFER`] bytes. Answers where in it the packet is.
    fn receive(
        &self,
        from: BorrowedFd<'_>,
        buffer: &mut [u8],
    ) -> io::Result<(Range<usize>, Offload)>;

    /// Writes the packet of this length that begins at [`HEADROOM`] in `buffer`; what is before may be overwritten.
    fn send(
        &self,
        to: BorrowedFd<'_>,
        buffer: &mut [u8],
        length: usize,
        offload: Offload,
    ) -> io::Result<()>;
}

/// Room before a packet for what devices put there: a virtio-net and an Ethernet header.
pub const HEADROOM: usize = VIRTIO_HEADER + veth::ETHERNET_HEADER;

/// Bytes for one packet and what comes before it.
pub const BUFFER: usize = HEADROOM + LONGEST_PACKET;

/// Makes a device with addresses and routes in this network namespace.
pub(super) fn make(kind: Kind) -> io::Result<OwnedFd> {
    let mut netlink = Netlink::connect()?;
    let (descriptor, index) = match kind {
        Kind::Tun => tun::make(&mut netlink)?,
        Kind::Veth => veth::make(&mut netlink)?,
    };
    netlink.add_address(index, ADDRESS.into())?;
    netlink.add_default_route(index, ADDRESS.into(), CONGESTION)?;
    // A kernel without IPv6 has no such addresses; there is nothing to carry then.
    if netlink.add_address(index, ADDRESS_V6.into()).is_ok() {
        netlink.add_default_route(index, IpAddr::V6(ADDRESS_V6), CONGESTION)?;
    }
    Ok(descriptor)
}

/// Takes the device down in this network namespace, which takes its routes away, and ends the TCP connections that went
/// through it: those of a carrier that did not get to reset them.
pub(super) fn cut() -> io::Result<()> {
    let mut netlink = Netlink::connect()?;
    // A TUN device goes with its carrier.
    if let Ok(index) = netlink.index(NAME) {
        netlink.set_down(index)?;
    }
    sockets::end_connections(&[ADDRESS.into(), ADDRESS_V6.into()])
}

impl Kind {
    /// How packets lie in what it reads and writes.
    pub fn device(self) -> Box<dyn Device> {
        match self {
            Self::Tun => Box::new(tun::Tun),
            Self::Veth => Box::new(veth::Veth),
        }
    }
}

/// An unreadable virtio-net header means that the kernel does what nobody asked it for.
fn offload_of(header: &[u8]) -> io::Result<Offload> {
    let header = header.first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
    Offload::from_virtio(header).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
