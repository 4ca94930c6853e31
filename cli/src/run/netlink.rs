//! The few netlink requests that `tp run` makes in its own network namespace (RFC 3549, `rtnetlink(7)`).
//!
//! Own code, since one blocking socket and six kinds of request are all it takes, and the per-route congestion control
//! has to be among them. Knows nothing of why an interface is wanted.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send};

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;

const ERROR: u16 = 2;
const DONE: u16 = 3;

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;

const NESTED: u16 = 0x8000;
const UP: u32 = 1;
const NO_ARP: u32 = 0x80;
const INET: u8 = 2;
const INET6: u8 = 10;

/// One connection to the kernel. Requests are answered one by one.
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// What an interface is to be.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Link {
    /// Longest IP packet.
    pub(super) mtu: Option<u32>,
    /// Packets that may wait for whoever reads the device.
    pub(super) queue: Option<u32>,
    /// Neighbours are not looked for; every frame carries the interface's own address as its destination.
    pub(super) no_arp: bool,
    /// No link-local IPv6 address is made up.
    pub(super) no_link_local: bool,
}

impl Netlink {
    /// Connects to the kernel, for the network namespace that this process is in now.
    pub(super) fn connect() -> io::Result<Self> {
        Self::connect_to(None)
    }

    /// Connects to one part of the kernel; `None` is the one for interfaces and routes.
    pub(super) fn connect_to(part: Option<rustix::net::Protocol>) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        let socket = rustix::net::socket_with(family, kind, flags, part)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// The index of the interface of this name.
    pub(super) fn index(&self, name: &str) -> io::Result<u32> {
        Ok(rustix::net::netdevice::name_to_index(&self.socket, name)?)
    }

    /// Makes two interfaces, each the other end of the other. The first gets this hardware address.
    pub(super) fn add_pair(&mut self, name: &str, address: [u8; 6], peer: &str) -> io::Result<()> {
        let mut message = Message::new(NEW_LINK, CREATE | EXCLUSIVE);
        message.link_header(0, 0, 0);
        message.text(3, name);
        message.attribute(1, &address);
        message.nested(18, |info| {
            info.attribute(1, b"veth");
            info.nested(2, |data| {
                data.nested(1, |other| {
                    other.link_header(0, 0, 0);
                    other.text(3, peer);
                });
            });
        });
        self.ask(message)
    }

    /// Changes an interface as `link` says, and takes it up.
    pub(super) fn set_up(&mut self, index: u32, link: Link) -> io::Result<()> {
        if link.no_link_local {
            // Before it is up; and a kernel without IPv6 makes none anyway.
            let _ = self.ask(without_link_local(index));
        }
        let mut message = Message::new(NEW_LINK, 0);
        let no_arp = if link.no_arp { NO_ARP } else { 0 };
        message.link_header(index, UP | no_arp, UP | no_arp);
        if let Some(mtu) = link.mtu {
            message.attribute(4, &mtu.to_ne_bytes());
        }
        if let Some(queue) = link.queue {
            message.attribute(13, &queue.to_ne_bytes());
        }
        self.ask(message)
    }

    /// Takes an interface down.
    pub(super) fn set_down(&mut self, index: u32) -> io::Result<()> {
        let mut message = Message::new(NEW_LINK, 0);
        message.link_header(index, 0, UP);
        self.ask(message)
    }

    /// Gives an interface an address of its own, without a network around it and without probing for duplicates.
    pub(super) fn add_address(&mut self, index: u32, address: IpAddr) -> io::Result<()> {
        const NO_DUPLICATE_PROBE: u8 = 2;
        let (family, bytes) = parts(address);
        let mut message = Message::new(NEW_ADDRESS, CREATE | EXCLUSIVE);
        let prefix = bytes.len() as u8 * 8;
        message.bytes(&[family, prefix, NO_DUPLICATE_PROBE, 0]);
        message.bytes(&index.to_ne_bytes());
        message.attribute(1, &bytes);
        message.attribute(2, &bytes);
        self.ask(message)
    }

    /// Sends everything of the address's family through an interface, from that address. TCP on it uses
    /// `congestion`, where the kernel has it.
    pub(super) fn add_default_route(
        &mut self,
        index: u32,
        from: IpAddr,
        congestion: &str,
    ) -> io::Result<()> {
        match self.ask(default_route(index, from, Some(congestion))) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.ask(default_route(index, from, None))
            }
            done => done,
        }
    }

    /// Makes a request that is answered with a list, and gives the entries' bodies.
    pub(super) fn list(&mut self, message: Message) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let request = message.finish(self.sequence);
        send(&self.socket, &request, SendFlags::empty())?;
        let (mut entries, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
        loop {
            let (length, _) = rustix::io::retry_on_intr(|| {
                recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty())
            })?;
            let mut rest = &buffer[..length];
            while let Some((kind, body, more)) = first(rest) {
                match kind {
                    DONE => return Ok(entries),
                    ERROR => return Err(io::ErrorKind::Unsupported.into()),
                    _ => entries.push(body.to_vec()),
                }
                rest = more;
            }
        }
    }

    pub(super) fn ask(&mut self, message: Message) -> io::Result<()> {
        self.sequence += 1;
        send(
            &self.socket,
            &message.finish(self.sequence),
            SendFlags::empty(),
        )?;
        let mut answer = [0; 4096];
        let (length, _) = rustix::io::retry_on_intr(|| {
            recv(&self.socket, answer.as_mut_slice(), RecvFlags::empty())
        })?;
        match answer[..length].get(16..20) {
            // An acknowledgement is an error message with the error 0.
            Some(&[a, b, c, d]) => match i32::from_ne_bytes([a, b, c, d]) {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(-error)),
            },
            Some(_) | None => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The first of several messages: its kind, its body, and what comes after it.
fn first(messages: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    const HEADER: usize = 16;
    let length = u32::from_ne_bytes(*messages.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*messages.get(4..)?.first_chunk()?);
    let body = messages.get(HEADER..length)?;
    let next = length.next_multiple_of(4).min(messages.len());
    Some((kind, body, &messages[next..]))
}

/// IFLA_AF_SPEC, AF_INET6, IFLA_INET6_ADDR_GEN_MODE: none.
fn without_link_local(index: u32) -> Message {
    let mut message = Message::new(NEW_LINK, 0);
    message.link_header(index, 0, 0);
    message.nested(26, |families| {
        families.nested(INET6.into(), |family| family.attribute(8, &[1]));
    });
    message
}

fn default_route(index: u32, from: IpAddr, congestion: Option<&str>) -> Message {
    const TABLE_MAIN: u8 = 254;
    const BY_ADMINISTRATOR: u8 = 4;
    const UNICAST: u8 = 1;
    let (family, bytes) = parts(from);
    // The scope of a route without a gateway: the link in IPv4; IPv6 knows none.
    let scope = if family == INET { 253 } else { 0 };
    let mut message = Message::new(NEW_ROUTE, CREATE | EXCLUSIVE);
    message.bytes(&[
        family,
        0,
        0,
        0,
        TABLE_MAIN,
        BY_ADMINISTRATOR,
        scope,
        UNICAST,
    ]);
    message.bytes(&0_u32.to_ne_bytes());
    message.attribute(4, &index.to_ne_bytes());
    message.attribute(7, &bytes);
    if let Some(algorithm) = congestion {
        message.nested(8, |metrics| metrics.text(16, algorithm));
    }
    message
}

fn parts(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (INET, address.octets().to_vec()),
        IpAddr::V6(address) => (INET6, address.octets().to_vec()),
    }
}

/// One request as it is built.
pub(super) struct Message(Vec<u8>);

impl Message {
    pub(super) fn new(kind: u16, flags: u16) -> Self {
        let mut message = Self(vec![0; 4]);
        message.bytes(&kind.to_ne_bytes());
        message.bytes(&(flags | REQUEST | ACKNOWLEDGE).to_ne_bytes());
        // Sequence number and port: filled in, and the kernel's.
        message.bytes(&[0; 8]);
        message
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// `struct ifinfomsg`.
    fn link_header(&mut self, index: u32, flags: u32, change: u32) {
        self.bytes(&[0; 4]);
        for number in [index, flags, change] {
            self.bytes(&number.to_ne_bytes());
        }
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let start = self.0.len();
        self.bytes(&[0; 2]);
        self.bytes(&kind.to_ne_bytes());
        self.bytes(value);
        self.close(start);
    }

    fn text(&mut self, kind: u16, text: &str) {
        self.attribute(kind, &[text.as_bytes(), &[0]].concat());
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.bytes(&[0; 2]);
        self.bytes(&(kind | NESTED).to_ne_bytes());
        fill(self);
        self.close(start);
    }

    /// Writes the length of the attribute that begins at `start`, and pads it.
    fn close(&mut self, start: usize) {
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_hold_their_length_and_end_on_four_bytes() {
        let mut message = Message::new(NEW_LINK, 0);
        message.nested(18, |info| info.attribute(1, b"veth!"));

        let bytes = message.finish(7);

        let expected = [
            &32_u32.to_ne_bytes()[..],
            &16_u16.to_ne_bytes(),
            &5_u16.to_ne_bytes(),
            &7_u32.to_ne_bytes(),
            &[0; 4],
            &16_u16.to_ne_bytes(),
            &(18 | NESTED).to_ne_bytes(),
            &9_u16.to_ne_bytes(),
            &1_u16.to_ne_bytes(),
            b"veth!\0\0\0",
        ]
        .concat();
        assert_eq!(bytes, expected);
    }
}
