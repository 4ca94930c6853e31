//! Socket addresses as they lie in a program's memory (`struct sockaddr`). Pure.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// The longest that the kernel takes (`struct sockaddr_storage`).
pub(super) const LONGEST: usize = 128;

/// What a program wants to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// An IP address and port.
    Inet(SocketAddr),
    /// A socket in the file system.
    Unix(Vec<u8>),
    /// Neither, or nothing that could be used.
    Other,
}

/// Reads one. Lengths that the kernel would refuse are [`Address::Other`], so that the kernel refuses them.
pub(super) fn parse(bytes: &[u8]) -> Address {
    let Some((family, rest)) = bytes.split_first_chunk() else {
        return Address::Other;
    };
    match i32::from(u16::from_ne_bytes(*family)) {
        libc::AF_INET => inet(rest).map_or(Address::Other, Address::Inet),
        libc::AF_INET6 => inet6(rest).map_or(Address::Other, Address::Inet),
        libc::AF_UNIX if rest.first().is_some_and(|first| *first != 0) => {
            let path = rest.split(|byte| *byte == 0).next().unwrap_or_default();
            Address::Unix(path.to_vec())
        }
        _ => Address::Other,
    }
}

/// Behind the family: port, address, 8 bytes of padding.
fn inet(rest: &[u8]) -> Option<SocketAddr> {
    let rest: &[u8; 14] = rest.first_chunk()?;
    let (port, rest) = rest.split_first_chunk()?;
    let address: &[u8; 4] = rest.first_chunk()?;
    Some((Ipv4Addr::from(*address), u16::from_be_bytes(*port)).into())
}

/// Behind the family: port, flow information, address, and the scope, which old programs leave off (RFC 2133).
fn inet6(rest: &[u8]) -> Option<SocketAddr> {
    let (port, rest) = rest.split_first_chunk()?;
    let (_flow, rest) = rest.split_first_chunk::<4>()?;
    let (address, rest) = rest.split_first_chunk::<16>()?;
    let scope = rest.first_chunk().map_or(0, |s| u32::from_ne_bytes(*s));
    let port = u16::from_be_bytes(*port);
    Some(SocketAddrV6::new(Ipv6Addr::from(*address), port, 0, scope).into())
}

/// Writes one as the kernel would.
pub(super) fn encode(address: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    match address {
        SocketAddr::V4(address) => {
            bytes.extend((libc::AF_INET as u16).to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend(address.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(address) => {
            bytes.extend((libc::AF_INET6 as u16).to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend(address.flowinfo().to_be_bytes());
            bytes.extend(address.ip().octets());
            bytes.extend(address.scope_id().to_ne_bytes());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_end_where_their_text_does_and_abstract_names_are_not_paths() {
        let unix = |path: &[u8]| parse(&[&1_u16.to_ne_bytes()[..], path].concat());

        assert_eq!(unix(b"/run/x\0\0\0"), Address::Unix(b"/run/x".to_vec()));
        assert_eq!(unix(b"/run/x"), Address::Unix(b"/run/x".to_vec()));
        assert_eq!(unix(b"\0abstract"), Address::Other);
        assert_eq!(unix(b""), Address::Other);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(address in any::<std::net::IpAddr>(), port in any::<u16>()) {
            let address = SocketAddr::new(address, port);
            prop_assert_eq!(parse(&encode(address)), Address::Inet(address));
        }

        #[test]
        fn whatever_a_program_has_there_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..LONGEST)) {
            parse(&bytes);
        }

        #[test]
        fn an_address_cut_short_is_none(address in any::<std::net::IpAddr>(), cut in 0_usize..16) {
            let bytes = encode(SocketAddr::new(address, 1));
            prop_assert_eq!(parse(&bytes[..cut]), Address::Other);
        }
    }
}
