//! Connections that the application had before its port was redirected: NAT sees new ones only, so these bypass the
//! agent. Read from the kernel by sock_diag (linux/sock_diag.h, linux/inet_diag.h), which everybody in the network
//! namespace may; ending them takes CAP_NET_ADMIN.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with,
    sockopt,
};
use tp_manager_api::route_table::{OpenConnections, PortConnections};

/// One connection that does not pass through the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bypass {
    /// The application's port.
    pub port: u16,
    /// Who connected.
    pub peer: SocketAddr,
    /// For how long neither side has sent anything.
    pub idle: Duration,
    family: u8,
    id: SocketId,
}

/// How long a connection must have been silent to count as idle.
const IDLE: Duration = Duration::from_secs(1);

impl Bypass {
    /// Whether nobody waits for anything on it, as far as one can tell.
    pub fn is_idle(&self) -> bool {
        self.idle > IDLE
    }

    /// One of a test's own.
    #[cfg(test)]
    pub(crate) fn new(port: u16, peer: SocketAddr) -> Self {
        Self {
            port,
            peer,
            idle: Duration::ZERO,
            family: 0,
            id: [0; 48],
        }
    }
}

/// All connections to these ports that bypass the agent, by port.
pub fn count(ports: &[u16]) -> io::Result<OpenConnections> {
    Ok(counted(bypassing(ports)?))
}

/// Connections by port.
pub(crate) fn counted(connections: Vec<Bypass>) -> OpenConnections {
    let mut counted = BTreeMap::new();
    for bypass in connections {
        let of_port = counted.entry(bypass.port).or_insert(PortConnections {
            port: bypass.port,
            open: 0,
            idle: 0,
        });
        of_port.open += 1;
        of_port.idle += u32::from(bypass.is_idle());
    }
    OpenConnections {
        ports: counted.into_values().collect(),
    }
}

/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
type SocketId = [u8; 48];

/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY`.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

const ESTABLISHED: u32 = 1 << 1;

/// `INET_DIAG_INFO`, an attribute with a `struct tcp_info`.
const INFO: u16 = 2;

const TCP: u8 = 6;

/// Sizes of `nlmsghdr` and `inet_diag_msg`.
const HEADER: usize = 16;
const MESSAGE: usize = 72;

/// How long the kernel may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// All connections to these ports that bypass the agent. The agent's own, and those of the pod to itself, do not count:
/// both come from the address that they go to.
pub fn bypassing(ports: &[u16]) -> io::Result<Vec<Bypass>> {
    let netlink = open()?;
    let mut all = Vec::new();
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        let family = u8::try_from(family.as_raw()).unwrap_or_default();
        match dump(&netlink, family, &mut all) {
            // A kernel without IPv6.
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            dumped => dumped?,
        }
    }
    all.retain(|bypass| ports.contains(&bypass.port));
    Ok(all)
}

/// Resets the idle connections to these ports. Needs CAP_NET_ADMIN.
pub fn close_idle(ports: &[u16]) -> io::Result<()> {
    let netlink = open()?;
    for bypass in bypassing(ports)?.iter().filter(|bypass| bypass.is_idle()) {
        let message = request(DESTROY, REQUEST | ACK, bypass.family, &bypass.id);
        send(&netlink, &message, SendFlags::empty())?;
        let mut buffer = [0; 1024];
        let (size, _) = recv(&netlink, buffer.as_mut_slice(), RecvFlags::empty())?;
        for (kind, payload) in messages(&buffer[..size]) {
            match (kind, error_of(payload)) {
                // It has ended by itself.
                (NLMSG_ERROR, Err(error))
                    if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
                (NLMSG_ERROR, answer) => answer?,
                _ => {}
            }
        }
    }
    Ok(())
}

fn open() -> io::Result<OwnedFd> {
    let (kind, flags) = (SocketType::DGRAM, SocketFlags::CLOEXEC);
    let netlink = socket_with(AddressFamily::NETLINK, kind, flags, Some(SOCK_DIAG))?;
    connect(&netlink, &SocketAddrNetlink::new(0, 0))?;
    sockopt::set_socket_timeout(&netlink, sockopt::Timeout::Recv, Some(PATIENCE))?;
    Ok(netlink)
}

fn dump(netlink: &OwnedFd, family: u8, all: &mut Vec<Bypass>) -> io::Result<()> {
    let message = request(BY_FAMILY, REQUEST | DUMP, family, &[0; 48]);
    send(netlink, &message, SendFlags::empty())?;
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let (size, _) = recv(netlink, buffer.as_mut_slice(), RecvFlags::empty())?;
        for (kind, payload) in messages(&buffer[..size]) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => error_of(payload)?,
                _ => all.extend(bypass_of(payload)),
            }
        }
    }
}

/// `nlmsghdr` and `inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: u8, id: &SocketId) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + 8 + id.len());
    message.extend_from_slice(&((HEADER + 8 + id.len()) as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[family, TCP, 1 << (INFO - 1), 0]);
    message.extend_from_slice(&ESTABLISHED.to_ne_bytes());
    message.extend_from_slice(id);
    message
}

/// The kinds and payloads of the messages of one datagram.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let size = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let message = bytes.get(..size).filter(|_| size >= HEADER)?;
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        bytes = bytes.get(size.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, &message[HEADER..]))
    })
}

/// The answer in a `NLMSG_ERROR`; zero is an acknowledgement.
fn error_of(payload: &[u8]) -> io::Result<()> {
    match payload
        .first_chunk()
        .map(|error| i32::from_ne_bytes(*error))
    {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Reads an `inet_diag_msg` with its attributes; `None` for a connection from the address that it goes to.
fn bypass_of(payload: &[u8]) -> Option<Bypass> {
    let family = *payload.first()?;
    let id: SocketId = *payload.get(4..)?.first_chunk()?;
    let port = u16::from_be_bytes([id[0], id[1]]);
    let (own, peer) = (address(family, &id[4..20])?, address(family, &id[20..36])?);
    if own == peer || peer.is_loopback() {
        return None;
    }
    let info = attribute(payload.get(MESSAGE..)?, INFO)?;
    let milliseconds = |at: usize| Some(u32::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    // `tcpi_last_data_sent` and `tcpi_last_data_recv`.
    let idle = milliseconds(44)?.min(milliseconds(52)?);
    Some(Bypass {
        port,
        peer: SocketAddr::new(peer, u16::from_be_bytes([id[2], id[3]])),
        idle: Duration::from_millis(u64::from(idle)),
        family,
        id,
    })
}

fn address(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match u16::from(family) == AddressFamily::INET.as_raw() {
        true => bytes.first_chunk::<4>().map(|four| IpAddr::from(*four)),
        false => bytes
            .first_chunk::<16>()
            .map(|all| IpAddr::from(Ipv6Addr::from(*all)).to_canonical()),
    }
}

/// The value of one attribute: size, kind, value, padding to four bytes.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let size = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..size)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(size.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn broken_messages_end_the_reading() {
        let mut message = 20u32.to_ne_bytes().to_vec();
        message.extend_from_slice(&NLMSG_ERROR.to_ne_bytes());
        message.extend_from_slice(&[0; 10]);
        message.extend_from_slice(&(-2i32).to_ne_bytes());
        let all: Vec<_> = messages(&message).collect();
        assert_eq!(all.len(), 1);
        assert_eq!(error_of(all[0].1).unwrap_err().raw_os_error(), Some(2));
        for end in 0..message.len() {
            assert_eq!(messages(&message[..end]).count(), 0);
        }
        assert_eq!(messages(&[0; 64]).count(), 0);
        for end in 0..MESSAGE {
            assert_eq!(bypass_of(&vec![2; end]), None);
        }
    }

    #[test]
    fn a_connection_of_the_pod_to_itself_is_none() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _client = TcpStream::connect(address).unwrap();
        let _server = listener.accept().unwrap();
        assert_eq!(bypassing(&[address.port()]).unwrap(), []);
    }
}
