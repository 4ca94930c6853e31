//! A TUN device with virtio-net headers: whole segments of 64 KiB in both directions, without checksums.

use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

use tp_netstack::{Offload, VIRTIO_HEADER};

use super::super::netlink::{Link, Netlink};
use super::super::sys;
use super::{Device, HEADROOM, NAME, QUEUE, offload_of};

/// The largest multiple of 16 that IPv4 can say.
const MTU: u16 = 65_520;

pub(super) struct Tun;

pub(super) fn make(netlink: &mut Netlink) -> io::Result<(OwnedFd, u32)> {
    let descriptor = sys::open_tun(NAME)?;
    let index = netlink.index(NAME)?;
    let link = Link {
        mtu: Some(MTU.into()),
        queue: Some(QUEUE),
        no_link_local: true,
        ..Link::default()
    };
    netlink.set_up(index, link)?;
    Ok((descriptor, index))
}

impl Device for Tun {
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
        Ok((VIRTIO_HEADER..length, offload))
    }

    fn send(
        &self,
        to: BorrowedFd<'_>,
        buffer: &mut [u8],
        length: usize,
        offload: Offload,
    ) -> io::Result<()> {
        let start = HEADROOM - VIRTIO_HEADER;
        buffer[start..HEADROOM].copy_from_slice(&offload.to_virtio());
        rustix::io::write(to, &buffer[start..HEADROOM + length])?;
        Ok(())
    }
}
