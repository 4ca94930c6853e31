//! The TCP connections of this network namespace, as the kernel lists and ends them (`sock_diag(7)`).
//!
//! Ending one makes its program hear of it at once, as a reset would, even if it only waits to read. It takes the capability
//! over the network that the guard has, and a kernel with `CONFIG_INET_DIAG_DESTROY`, as distributions have.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::netlink::{Message, Netlink};

const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
/// `NLM_F_DUMP`.
const ALL: u16 = 0x300;

const INET: u8 = 2;
const INET6: u8 = 10;
const TCP: u8 = 6;

/// Bits of `enum tcp_state`: all but TIME-WAIT, CLOSED and LISTEN.
const CONNECTIONS: u32 = !(1 << 6 | 1 << 7 | 1 << 10);

/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const IDENTITY: usize = 48;

/// Ends every connection from one of these addresses.
///
/// # Errors
/// The kernel cannot, or does not let this process.
pub(super) fn end_connections(from: &[IpAddr]) -> io::Result<()> {
    let mut netlink = Netlink::connect_to(Some(rustix::net::netlink::SOCK_DIAG))?;
    for family in [INET, INET6] {
        let connections = netlink.list(request(BY_FAMILY, ALL, family, &[0; IDENTITY]))?;
        for connection in connections {
            let Some((identity, local)) = parse(&connection) else {
                continue;
            };
            if from.contains(&local) {
                // It may have ended meanwhile.
                let _ = netlink.ask(request(DESTROY, 0, family, identity));
            }
        }
    }
    Ok(())
}

/// `struct inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: u8, identity: &[u8; IDENTITY]) -> Message {
    let mut message = Message::new(kind, flags);
    message.bytes(&[family, TCP, 0, 0]);
    message.bytes(&CONNECTIONS.to_ne_bytes());
    message.bytes(identity);
    message
}

/// Identity and local address of a `struct inet_diag_msg`.
fn parse(entry: &[u8]) -> Option<(&[u8; IDENTITY], IpAddr)> {
    let identity: &[u8; IDENTITY] = entry.get(4..)?.first_chunk()?;
    let address: [u8; 16] = *identity.get(4..)?.first_chunk()?;
    let local = match *entry.first()? {
        INET => Ipv4Addr::from(*address.first_chunk::<4>()?).into(),
        _ => IpAddr::V6(Ipv6Addr::from(address)).to_canonical(),
    };
    Some((identity, local))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_socket_with_an_ipv4_address_is_known_by_that() {
        let mut entry = vec![INET6, 1, 0, 0, 0x1F, 0x90, 0, 7];
        entry.extend_from_slice(&Ipv4Addr::new(198, 18, 0, 1).to_ipv6_mapped().octets());
        entry.resize(4 + IDENTITY + 20, 0);

        let (identity, local) = parse(&entry).unwrap();

        assert_eq!(local, IpAddr::from([198, 18, 0, 1]));
        assert_eq!(identity[..2], [0x1F, 0x90]);
        assert_eq!(parse(&entry[..40]), None);
    }
}
