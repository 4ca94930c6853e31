//! SOCKS5 messages (RFC 1928, RFC 1929), parsed from whatever has arrived so far.
//!
//! Pure: bytes in, messages out. Every parser answers `Ok(None)` for "not all there yet" only as long as more bytes
//! could still make a valid message; the longest message is 513 bytes, so a caller needs no further bound.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tp_tunnel::{Host, ParseTargetError, Target};

/// A message and the bytes it took, or `None` while it is incomplete.
pub type Parsed<T> = Result<Option<(T, usize)>, Refusal>;

/// Authentication methods (RFC 1928 §3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Methods {
    /// The client offers to go without.
    pub none: bool,
    /// The client offers user name and password.
    pub password: bool,
}

/// User name and password as sent.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// At most 255 bytes.
    pub user: Vec<u8>,
    /// At most 255 bytes.
    pub password: Vec<u8>,
}

/// What the client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A TCP flow to this target.
    Connect(Target),
    /// A UDP association, with datagrams from this address and port. Unspecified or zero: not known yet.
    Associate(IpAddr, u16),
}

/// Why a client is turned away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A message starts with another version than it must.
    #[error("version {0} where another was expected")]
    Version(u8),
    /// None of the offered methods will do.
    #[error("no acceptable authentication method")]
    NoMethod,
    /// Wrong user name or password.
    #[error("wrong user name or password")]
    Login,
    /// Not CONNECT or UDP ASSOCIATE.
    #[error("command {0} is not supported")]
    Command(u8),
    /// Not IPv4, IPv6 or a name.
    #[error("address type {0} is not supported")]
    AddressType(u8),
    /// The name is no valid host name.
    #[error("the destination is not valid")]
    Address(#[from] ParseTargetError),
}

impl Refusal {
    /// What the client is told before the connection closes. Nothing for a client that speaks something else.
    pub fn reply(&self) -> Vec<u8> {
        match self {
            Self::Version(_) => Vec::new(),
            Self::NoMethod => vec![VERSION, 0xff],
            Self::Login => vec![LOGIN_VERSION, 1],
            Self::Command(_) => reply(7).to_vec(),
            Self::AddressType(_) => reply(8).to_vec(),
            Self::Address(ParseTargetError::Host) => reply(4).to_vec(),
            Self::Address(_) => reply(1).to_vec(),
        }
    }
}

const VERSION: u8 = 5;
const LOGIN_VERSION: u8 = 1;

/// Answers a SOCKS4 client: "request rejected or failed".
pub const SOCKS4_REJECTED: [u8; 8] = [0, 0x5b, 0, 0, 0, 0, 0, 0];

/// The server's choice of method.
pub const USE_NO_LOGIN: [u8; 2] = [VERSION, 0];
/// The server's choice of method.
pub const USE_PASSWORD: [u8; 2] = [VERSION, 2];
/// User name and password are right.
pub const LOGIN_ACCEPTED: [u8; 2] = [LOGIN_VERSION, 0];

/// A reply without a bound address: the socket that is bound is in the cluster.
pub fn reply(code: u8) -> [u8; 10] {
    [VERSION, code, 0, IPV4, 0, 0, 0, 0, 0, 0]
}

/// A success that names the bound address, for UDP ASSOCIATE.
pub fn reply_bound(address: IpAddr, port: u16) -> Vec<u8> {
    let mut message = vec![VERSION, 0, 0];
    match address {
        IpAddr::V4(address) => {
            message.push(IPV4);
            message.extend_from_slice(&address.octets());
        }
        IpAddr::V6(address) => {
            message.push(IPV6);
            message.extend_from_slice(&address.octets());
        }
    }
    message.extend_from_slice(&port.to_be_bytes());
    message
}

/// The first message: version and methods.
pub fn parse_greeting(bytes: &[u8]) -> Parsed<Methods> {
    expect_version(bytes, VERSION)?;
    let Some(offered) = prefixed(bytes, 1) else {
        return Ok(None);
    };
    let methods = Methods {
        none: offered.contains(&0),
        password: offered.contains(&2),
    };
    Ok(Some((methods, 2 + offered.len())))
}

/// User name and password (RFC 1929 §2).
pub fn parse_login(bytes: &[u8]) -> Parsed<Login> {
    expect_version(bytes, LOGIN_VERSION)?;
    let Some(user) = prefixed(bytes, 1) else {
        return Ok(None);
    };
    let Some(password) = prefixed(bytes, 2 + user.len()) else {
        return Ok(None);
    };
    let used = 3 + user.len() + password.len();
    let login = Login {
        user: user.to_vec(),
        password: password.to_vec(),
    };
    Ok(Some((login, used)))
}

/// The request (RFC 1928 §4).
pub fn parse_request(bytes: &[u8]) -> Parsed<Request> {
    expect_version(bytes, VERSION)?;
    let command = match bytes.get(1) {
        None => return Ok(None),
        Some(1) => Command::Connect,
        Some(3) => Command::Associate,
        Some(other) => return Err(Refusal::Command(*other)),
    };
    let Some(rest) = bytes.get(3..) else {
        return Ok(None);
    };
    let Some((destination, used)) = parse_address(rest)? else {
        return Ok(None);
    };
    let request = match command {
        Command::Connect => Request::Connect(destination.target()?),
        Command::Associate => Request::Associate(destination.source(), destination.port),
    };
    Ok(Some((request, 3 + used)))
}

enum Command {
    Connect,
    Associate,
}

/// The header of a datagram from the client (RFC 1928 §7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatagramHeader {
    /// Where the payload goes.
    pub target: Target,
    /// Bytes before the payload. Replies carry the same ones, so a client that asked by name is answered by name.
    pub length: usize,
}

/// Parses the header of a whole datagram. `None`: to be dropped, because it is malformed or a fragment (which RFC 1928
/// §7 lets us refuse).
pub fn parse_datagram(bytes: &[u8]) -> Option<DatagramHeader> {
    let (0, rest) = (*bytes.get(2)?, bytes.get(3..)?) else {
        return None;
    };
    let (destination, used) = parse_address(rest).ok()??;
    Some(DatagramHeader {
        target: destination.target().ok()?,
        length: 3 + used,
    })
}

struct Destination<'a> {
    host: Raw<'a>,
    port: u16,
}

enum Raw<'a> {
    Ip(IpAddr),
    Name(&'a [u8]),
}

impl Destination<'_> {
    fn target(&self) -> Result<Target, ParseTargetError> {
        let host = match self.host {
            Raw::Ip(address) => Host::Ip(address.to_canonical()),
            Raw::Name(name) => parse_host(name)?,
        };
        if self.port == 0 {
            return Err(ParseTargetError::Port);
        }
        Ok(Target::new(host, self.port))
    }

    /// A name as the source of datagrams means nothing to us, so it counts as not known yet.
    fn source(&self) -> IpAddr {
        match self.host {
            Raw::Ip(address) => address.to_canonical(),
            Raw::Name(_) => Ipv4Addr::UNSPECIFIED.into(),
        }
    }
}

/// Some clients send addresses as names, IPv6 ones with or without brackets.
fn parse_host(name: &[u8]) -> Result<Host, ParseTargetError> {
    let name = std::str::from_utf8(name).map_err(|_| ParseTargetError::Host)?;
    let inside = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    match Host::parse(inside.unwrap_or(name))? {
        Host::Ip(address) => Ok(Host::Ip(address.to_canonical())),
        Host::Name(_) if inside.is_some() => Err(ParseTargetError::Host),
        Host::Name(name) => Ok(Host::Name(name)),
    }
}

const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// ATYP, address and port.
fn parse_address(bytes: &[u8]) -> Parsed<Destination<'_>> {
    let (host, length) = match bytes.first() {
        None => return Ok(None),
        Some(&IPV4) => match bytes.get(1..5).and_then(|b| <[u8; 4]>::try_from(b).ok()) {
            None => return Ok(None),
            Some(octets) => (Raw::Ip(Ipv4Addr::from(octets).into()), 5),
        },
        Some(&IPV6) => match bytes.get(1..17).and_then(|b| <[u8; 16]>::try_from(b).ok()) {
            None => return Ok(None),
            Some(octets) => (Raw::Ip(Ipv6Addr::from(octets).into()), 17),
        },
        Some(&NAME) => match prefixed(bytes, 1) {
            None => return Ok(None),
            Some(name) => (Raw::Name(name), 2 + name.len()),
        },
        Some(&other) => return Err(Refusal::AddressType(other)),
    };
    let port = bytes
        .get(length..length + 2)
        .and_then(|b| b.try_into().ok());
    let port = port.map(u16::from_be_bytes);
    Ok(port.map(|port| (Destination { host, port }, length + 2)))
}

/// The field behind a length byte at `at`.
fn prefixed(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let length = usize::from(*bytes.get(at)?);
    bytes.get(at + 1..at + 1 + length)
}

fn expect_version(bytes: &[u8], version: u8) -> Result<(), Refusal> {
    match bytes.first() {
        Some(&other) if other != version => Err(Refusal::Version(other)),
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn connect(host: &[u8], port: u16) -> Vec<u8> {
        [&[5, 1, 0][..], host, &port.to_be_bytes()].concat()
    }

    fn named(name: &str) -> Vec<u8> {
        [&[3, name.len() as u8], name.as_bytes()].concat()
    }

    #[test]
    fn requests_are_read_in_every_address_type() {
        let v6 = [&[4][..], &Ipv6Addr::LOCALHOST.octets()].concat();
        let mapped = [
            &[4][..],
            &Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets(),
        ]
        .concat();
        let table = [
            (connect(&[1, 10, 0, 0, 1], 80), "10.0.0.1:80"),
            (connect(&v6, 443), "[::1]:443"),
            (connect(&mapped, 80), "10.0.0.1:80"),
            (connect(&named("Web.Shop."), 8080), "web.shop:8080"),
            (connect(&named("10.0.0.1"), 80), "10.0.0.1:80"),
            (connect(&named("fd00::1"), 80), "[fd00::1]:80"),
            (connect(&named("[fd00::1]"), 80), "[fd00::1]:80"),
        ];
        for (bytes, target) in table {
            let expected = Request::Connect(target.parse().unwrap());
            assert_eq!(
                parse_request(&bytes),
                Ok(Some((expected, bytes.len()))),
                "{target}"
            );
        }
    }

    #[test]
    fn associate_keeps_the_source_and_port_0() {
        let bytes = [5, 3, 0, 1, 0, 0, 0, 0, 0, 0];
        let expected = Request::Associate(Ipv4Addr::UNSPECIFIED.into(), 0);
        assert_eq!(parse_request(&bytes), Ok(Some((expected, 10))));
    }

    #[test]
    fn bad_messages_are_refused_with_the_right_reply() {
        let table = [
            (parse_request(&[5, 2]).err(), reply(7).to_vec()),
            (parse_request(&[5, 9, 0, 1]).err(), reply(7).to_vec()),
            (parse_request(&[5, 1, 0, 2]).err(), reply(8).to_vec()),
            (
                parse_request(&connect(&named(""), 80)).err(),
                reply(4).to_vec(),
            ),
            (
                parse_request(&connect(&named("a b"), 80)).err(),
                reply(4).to_vec(),
            ),
            (
                parse_request(&connect(&named("[web]"), 80)).err(),
                reply(4).to_vec(),
            ),
            (
                parse_request(&connect(&[3, 1, 0xff], 80)).err(),
                reply(4).to_vec(),
            ),
            (
                parse_request(&connect(&named("web"), 0)).err(),
                reply(1).to_vec(),
            ),
            (parse_request(&[4]).err(), vec![]),
            (parse_greeting(&[0x16, 3, 1]).err(), vec![]),
            (parse_login(&[5, 1]).err(), vec![]),
        ];
        for (index, (refusal, expected)) in table.into_iter().enumerate() {
            assert_eq!(
                refusal.as_ref().map(Refusal::reply),
                Some(expected),
                "row {index}"
            );
        }
    }

    #[test]
    fn a_greeting_and_a_login_are_read_and_leave_what_follows() {
        let methods = Methods {
            none: true,
            password: true,
        };
        assert_eq!(parse_greeting(&[5, 2, 0, 2, 5, 1]), Ok(Some((methods, 4))));
        assert_eq!(
            parse_greeting(&[5, 0]),
            Ok(Some((
                Methods {
                    none: false,
                    password: false
                },
                2
            )))
        );

        let (login, used) = parse_login(b"\x01\x03ada\x04lace\x05").unwrap().unwrap();
        assert_eq!(
            (login.user.as_slice(), login.password.as_slice(), used),
            (&b"ada"[..], &b"lace"[..], 10)
        );
    }

    #[test]
    fn datagrams_carry_names_and_fragments_are_dropped() {
        let bytes = [
            &[0, 0, 0][..],
            &named("dns.kube-system"),
            &[0, 53],
            b"query",
        ]
        .concat();
        let header = parse_datagram(&bytes).unwrap();
        assert_eq!(header.target.to_string(), "dns.kube-system:53");
        assert_eq!(&bytes[header.length..], b"query");

        for bad in [
            &[][..],
            &[0, 0],
            &[0, 0, 0],
            &[0, 0, 1, 1, 10, 0, 0, 1, 0, 53],
            &[0, 0, 0, 1, 10, 0, 0, 1, 0, 0],
        ] {
            assert_eq!(parse_datagram(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn parsers_never_panic_and_never_use_more_than_there_is(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            for used in [
                parse_greeting(&bytes).ok().flatten().map(|(_, used)| used),
                parse_login(&bytes).ok().flatten().map(|(_, used)| used),
                parse_request(&bytes).ok().flatten().map(|(_, used)| used),
                parse_datagram(&bytes).map(|header| header.length),
            ].into_iter().flatten() {
                prop_assert!(used <= bytes.len());
            }
        }

        #[test]
        fn a_request_in_pieces_means_the_same(name in "[a-z]{1,60}(\\.[a-z]{1,60}){0,3}", port in 1..=u16::MAX) {
            let bytes = connect(&named(&name), port);
            for cut in 0..bytes.len() {
                prop_assert_eq!(parse_request(&bytes[..cut]), Ok(None));
            }
            let target = Target::new(Host::Name(name), port);
            prop_assert_eq!(parse_request(&bytes), Ok(Some((Request::Connect(target), bytes.len()))));
        }

        #[test]
        fn a_bound_reply_reads_back(address in any::<IpAddr>(), port in 1..=u16::MAX) {
            let message = reply_bound(address, port);
            let (destination, used) = parse_address(&message[3..]).unwrap().unwrap();
            prop_assert_eq!(used, message.len() - 3);
            prop_assert_eq!(destination.target().unwrap(), Target::new(Host::Ip(address.to_canonical()), port));
        }
    }
}
