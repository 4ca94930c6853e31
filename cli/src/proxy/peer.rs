//! Who is at the other end of a loopback connection: the user that owns the peer's socket.
//!
//! Loopback is shared by all users of a machine, and browsers cannot authenticate to a SOCKS proxy, so the kernel is
//! asked (`sock_diag(7)`, one exact look-up of some microseconds; `/proc/net` where that is missing). Who cannot be
//! told is refused.

use std::net::{IpAddr, SocketAddr};
use std::sync::Once;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

/// The kind of socket that the peer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

/// Whether the socket `client`, which speaks to our socket `server`, belongs to the user that runs this process.
pub(crate) fn is_same_user(protocol: Protocol, client: SocketAddr, server: SocketAddr) -> bool {
    match owner(protocol, client, server) {
        Ok(uid) => uid == rustix::process::geteuid().as_raw(),
        Err(Unknown::Gone) => false,
        Err(Unknown::NoFacility(error)) => {
            static WARNED: Once = Once::new();
            WARNED.call_once(|| {
                tracing::warn!(%error, "cannot tell which user connects to the proxy, so all are refused");
            });
            false
        }
    }
}

/// Why an owner is not known.
#[derive(Debug)]
enum Unknown {
    /// There is no such socket (any more).
    Gone,
    /// Neither netlink nor `/proc` answers.
    NoFacility(std::io::Error),
}

/// Uid of the owner of the socket bound to `client`.
fn owner(protocol: Protocol, client: SocketAddr, server: SocketAddr) -> Result<u32, Unknown> {
    match ask_netlink(protocol, client, server) {
        Ok(uid) => Ok(uid),
        Err(Errno::NOENT) => Err(Unknown::Gone),
        Err(_) => read_proc(protocol, client, server),
    }
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// `nlmsghdr` and `inet_diag_req_v2`.
const REQUEST: usize = 16 + 56;
/// Offset of `idiag_uid` behind `nlmsghdr` and the start of `inet_diag_msg`.
const UID: usize = 16 + 64;

fn ask_netlink(protocol: Protocol, client: SocketAddr, server: SocketAddr) -> Result<u32, Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(netlink::SOCK_DIAG),
    )?;
    rustix::net::send(
        &socket,
        &request(protocol, client, server),
        SendFlags::empty(),
    )?;
    // The kernel answers within `send`, so the reply is there already.
    let mut reply = [0; 512];
    let (_, length) = rustix::net::recv(&socket, &mut reply[..], RecvFlags::empty())?;
    parse_reply(reply.get(..length).unwrap_or(&reply))
}

/// One exact look-up: no `NLM_F_DUMP`, which would walk every socket of the machine.
fn request(protocol: Protocol, client: SocketAddr, server: SocketAddr) -> [u8; REQUEST] {
    let (client, server) = (canonical(client), canonical(server));
    let family = if client.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    // For UDP the kernel takes the two ends the other way round "for historical reasons" (udp_diag.c).
    let (protocol, source, destination) = match protocol {
        Protocol::Tcp => (6, client, server),
        Protocol::Udp => (17, server, client),
    };
    let mut message = Vec::with_capacity(REQUEST);
    message.extend_from_slice(&(REQUEST as u32).to_ne_bytes());
    message.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[family.as_raw() as u8, protocol, 0, 0]);
    message.extend_from_slice(&u32::MAX.to_ne_bytes());
    message.extend_from_slice(&source.port().to_be_bytes());
    message.extend_from_slice(&destination.port().to_be_bytes());
    message.extend_from_slice(&address_field(source.ip()));
    message.extend_from_slice(&address_field(destination.ip()));
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&[0xff; 8]);
    message
        .try_into()
        .expect("the fields above are 72 bytes in all")
}

fn address_field(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V6(address) => address.octets(),
        IpAddr::V4(address) => {
            let mut field = [0; 16];
            field[..4].copy_from_slice(&address.octets());
            field
        }
    }
}

fn parse_reply(reply: &[u8]) -> Result<u32, Errno> {
    let u32_at = |at: usize| {
        reply
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map(u32::from_ne_bytes)
    };
    let kind = reply
        .get(4..6)
        .and_then(|b| b.try_into().ok())
        .map(u16::from_ne_bytes);
    match kind {
        Some(SOCK_DIAG_BY_FAMILY) => u32_at(UID).ok_or(Errno::PROTO),
        Some(NLMSG_ERROR) => {
            let code = u32_at(16).map_or(0, |code| (code as i32).wrapping_neg());
            Err(Errno::from_raw_os_error(code.clamp(1, 4095)))
        }
        _ => Err(Errno::PROTO),
    }
}

fn read_proc(protocol: Protocol, client: SocketAddr, server: SocketAddr) -> Result<u32, Unknown> {
    let files = match protocol {
        Protocol::Tcp => ["/proc/net/tcp", "/proc/net/tcp6"],
        Protocol::Udp => ["/proc/net/udp", "/proc/net/udp6"],
    };
    let mut failure = None;
    for file in files {
        match std::fs::read_to_string(file) {
            Ok(table) => {
                if let Some(uid) = find_in_table(&table, protocol, client, server) {
                    return Ok(uid);
                }
            }
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.map_or(Unknown::Gone, Unknown::NoFacility))
}

/// Columns: number, local address, remote address, state, queues, timer, retransmits, uid, …
fn find_in_table(
    table: &str,
    protocol: Protocol,
    client: SocketAddr,
    server: SocketAddr,
) -> Option<u32> {
    let (client, server) = (canonical(client), canonical(server));
    table.lines().skip(1).find_map(|line| {
        let mut columns = line.split_ascii_whitespace().skip(1);
        let local = parse_proc_address(columns.next()?)?;
        let remote = parse_proc_address(columns.next()?)?;
        let found = match protocol {
            Protocol::Tcp => local == client && remote == server,
            Protocol::Udp => {
                local.port() == client.port()
                    && (local.ip() == client.ip() || local.ip().is_unspecified())
            }
        };
        if found {
            columns.nth(4)?.parse().ok()
        } else {
            None
        }
    })
}

/// `0100007F:0438`: words of 32 bit in the byte order of the machine, then the port.
fn parse_proc_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words = address.as_bytes().chunks(8).map(|word| {
        let word = std::str::from_utf8(word).ok()?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    });
    let octets = words.collect::<Option<Vec<_>>>()?.concat();
    let address = match octets.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(octets).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(octets).ok()?),
        _ => return None,
    };
    Some(canonical(SocketAddr::new(address, port)))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::Instant;

    use super::*;

    fn tcp_pair(address: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        (client, server)
    }

    #[test]
    fn the_own_tcp_connection_is_recognised_by_both_ways() {
        let me = rustix::process::geteuid().as_raw();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (_client, server) = tcp_pair(address);
            let (client, own) = (server.peer_addr().unwrap(), server.local_addr().unwrap());

            assert!(is_same_user(Protocol::Tcp, client, own));
            assert_eq!(ask_netlink(Protocol::Tcp, client, own).unwrap(), me);
            assert_eq!(read_proc(Protocol::Tcp, client, own).unwrap(), me);
        }
    }

    #[test]
    fn a_udp_socket_is_recognised_also_when_bound_to_any_address() {
        let me = rustix::process::geteuid().as_raw();
        let server: SocketAddr = "127.0.0.1:9".parse().unwrap();
        for address in ["127.0.0.1:0", "0.0.0.0:0"] {
            let socket = UdpSocket::bind(address).unwrap();
            let client =
                SocketAddr::new([127, 0, 0, 1].into(), socket.local_addr().unwrap().port());

            assert_eq!(
                owner(Protocol::Udp, client, server).unwrap(),
                me,
                "{address}"
            );
            assert_eq!(
                read_proc(Protocol::Udp, client, server).unwrap(),
                me,
                "{address}"
            );
        }
    }

    #[test]
    fn a_socket_that_does_not_exist_is_nobodys() {
        let (_client, server) = tcp_pair("127.0.0.1:0");
        let own = server.local_addr().unwrap();
        let stranger = SocketAddr::new([127, 1, 2, 3].into(), 1);

        assert!(!is_same_user(Protocol::Tcp, stranger, own));
        assert!(matches!(
            owner(Protocol::Tcp, stranger, own),
            Err(Unknown::Gone)
        ));
    }

    #[test]
    fn a_look_up_takes_less_than_100_microseconds() {
        let (_client, server) = tcp_pair("127.0.0.1:0");
        let (client, own) = (server.peer_addr().unwrap(), server.local_addr().unwrap());
        let mut fastest = std::time::Duration::MAX;
        for _ in 0..200 {
            let start = Instant::now();
            let _ = ask_netlink(Protocol::Tcp, client, own);
            fastest = fastest.min(start.elapsed());
        }
        assert!(fastest.as_micros() < 100, "{fastest:?}");
    }

    #[test]
    fn strange_replies_are_errors() {
        for reply in [&[][..], &[0; 5], &[0; 16], &[20, 0, 0, 0, 20, 0, 0, 0]] {
            assert!(parse_reply(reply).is_err(), "{reply:?}");
        }
        assert!(parse_proc_address("zz:1").is_none());
        assert!(parse_proc_address("0100007F").is_none());
    }
}
