//! The sockets on loopback to which the program's questions for names are led, and whose questions those are.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;

use super::joining;
use crate::run::workstation_dns;

/// Where questions go, whichever nameserver they were for.
pub(super) struct Resolver {
    v4: SocketAddr,
    v6: Option<SocketAddr>,
}

/// Port of every nameserver that `/etc/resolv.conf` can name.
const PORT: u16 = 53;

impl Resolver {
    /// Opens the sockets. Whoever has the connection answers on them.
    ///
    /// # Errors
    /// There is no loopback, or no descriptor.
    pub(super) fn open() -> io::Result<(Self, Vec<OwnedFd>)> {
        let v4 = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        // Without IPv6 no socket of the program needs it.
        let v6 = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).ok();
        let own = Self {
            v4: v4.local_addr()?,
            v6: v6.as_ref().map(UdpSocket::local_addr).transpose()?,
        };
        let sockets = std::iter::once(v4).chain(v6);
        Ok((own, sockets.map(OwnedFd::from).collect()))
    }

    /// Where a datagram of this socket finds an answer.
    pub(super) fn address_for(&self, program: &OwnedFd) -> io::Result<SocketAddr> {
        let ways = joining::ways(program, self.v4, self.v6)?;
        ways.into_iter()
            .next()
            .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }
}

/// Whether the workstation asks its names there. Read anew each time, since the file changes with the network.
pub(super) fn is_nameserver(to: SocketAddr) -> bool {
    if to.port() != PORT {
        return false;
    }
    let configuration = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    is_one_of(&workstation_dns::nameservers(&configuration), to.ip())
}

/// Where the workstation is its own nameserver, some ask it over IPv6.
fn is_one_of(nameservers: &[SocketAddr], to: IpAddr) -> bool {
    let named = |address: IpAddr| nameservers.iter().any(|one| one.ip() == address);
    let own = Ipv6Addr::LOCALHOST;
    named(to.to_canonical()) || (to == own && named(Ipv4Addr::LOCALHOST.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_are_those_of_the_configuration_in_every_spelling() {
        let of = |configuration: &str, to: &str| {
            is_one_of(
                &workstation_dns::nameservers(configuration),
                to.parse().unwrap(),
            )
        };

        assert!(of(
            "nameserver 10.0.0.1\nnameserver fd00::1",
            "::ffff:10.0.0.1"
        ));
        assert!(of("nameserver 10.0.0.1\nnameserver fd00::1", "fd00::1"));
        assert!(!of("nameserver 10.0.0.1", "8.8.8.8"));
        assert!(!of("nameserver 10.0.0.1", "::1"));
        assert!(of("", "127.0.0.1") && of("", "::1"));
        assert!(of("nameserver ::1", "::1"));
    }
}
