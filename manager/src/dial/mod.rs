//! From a target to a connected socket.
//!
//! One order for TCP and UDP and every mode: resolve once, refuse what is never a destination, ask whether this
//! session may, dial that very address. Nothing is resolved twice, so an answer cannot change between check and dial.

pub mod doh;
pub mod exchange;
pub mod hosts;
pub mod message;
pub mod refuse;
pub mod resolv_conf;
pub mod resolve;
pub mod rights;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tp_tunnel::proxy_status::{DialError, DialErrorKind};
use tp_tunnel::{Dialed, Host, Target, descriptors_are_scarce};

use crate::dial::refuse::Surroundings;
use crate::dial::resolve::Resolver;
use crate::metrics::Metrics;

/// An address about to be dialled, and the name it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The fully qualified name whose answer held the address; `None` when the address itself was asked for.
    pub name: Option<String>,
    /// In canonical form: never an IPv4 address inside an IPv6 one.
    pub address: IpAddr,
    /// Port on it.
    pub port: u16,
}

/// Cancelled when the permission is withdrawn; without one it stands for as long as the connection.
pub type Permit = Option<CancellationToken>;

/// What one session may reach. Each mode of the manager has its own.
pub trait Reach: Send + Sync + 'static {
    /// What lies around this manager and is refused to everyone.
    fn surroundings(&self) -> &dyn Surroundings;

    /// Namespace whose pods' search list is used; `None` leaves the list as it is.
    fn namespace(&self) -> Option<&str>;

    /// Whether the session may go there. The error is one line for the user.
    fn permit<'a>(&'a self, destination: &'a Destination) -> BoxFuture<'a, Result<Permit, String>>;

    /// Hears every answer to a DNS question of this session.
    fn heard(&self, name: &str, addresses: &[IpAddr]) {
        let _ = (name, addresses);
    }
}

/// Resolves and dials. Shared by all sessions.
pub struct Dialer {
    resolver: Resolver,
    metrics: Arc<Metrics>,
    timeout: Duration,
}

impl Dialer {
    /// `timeout` bounds name resolution and all attempts together.
    pub fn new(resolver: Resolver, metrics: Arc<Metrics>, timeout: Duration) -> Self {
        Self {
            resolver,
            metrics,
            timeout,
        }
    }

    /// Connects to the first permitted address that accepts. Cancel safe: dropping it abandons the attempt.
    pub async fn connect(
        &self,
        target: &Target,
        reach: &dyn Reach,
    ) -> Result<Dialed<TcpStream>, DialError> {
        let deadline = Instant::now() + self.timeout;
        let outcome = match self.destinations(target, reach, deadline).await {
            Ok(destinations) => connect_in_turn(&destinations, deadline).await,
            Err(error) => Err(error),
        };
        self.metrics
            .dialed(outcome.as_ref().err().map(|error| error.kind));
        outcome
    }

    /// A UDP socket that talks to the first permitted address only.
    pub async fn associate(
        &self,
        target: &Target,
        reach: &dyn Reach,
    ) -> Result<Dialed<UdpSocket>, DialError> {
        let deadline = Instant::now() + self.timeout;
        let outcome = match self.destinations(target, reach, deadline).await {
            Ok(destinations) => connect_datagrams(&destinations).await,
            Err(error) => Err(error),
        };
        self.metrics
            .dialed(outcome.as_ref().err().map(|error| error.kind));
        outcome
    }

    /// Answers a DNS message as the nameserver of this pod does; never fails, the answer says what went wrong.
    pub async fn answer(&self, query: &[u8], reach: &dyn Reach) -> Bytes {
        self.metrics.dns_query();
        let answer = doh::answer(&self.resolver, query).await;
        if let Some((name, addresses)) = message::addresses(&answer) {
            reach.heard(&name, &addresses);
        }
        Bytes::from(answer)
    }

    /// The permitted addresses of a target, in order. At least one, or the reason why there is none.
    async fn destinations(
        &self,
        target: &Target,
        reach: &dyn Reach,
        deadline: Instant,
    ) -> Result<Vec<Permitted>, DialError> {
        let (name, addresses) = match &target.host {
            Host::Ip(address) => (None, vec![*address]),
            Host::Name(name) => {
                let resolved = self.resolve(name, reach, deadline).await?;
                reach.heard(&resolved.name, &resolved.addresses);
                (Some(resolved.name), resolved.addresses)
            }
        };
        let mut permitted = Vec::new();
        let mut refusal = None;
        for address in addresses {
            let destination = Destination {
                name: name.clone(),
                address,
                port: target.port,
            };
            match self.check(destination, reach, deadline).await {
                Ok(destination) => permitted.push(destination),
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        match refusal {
            Some(error) if permitted.is_empty() => Err(error),
            _ => Ok(permitted),
        }
    }

    async fn resolve(
        &self,
        name: &str,
        reach: &dyn Reach,
        deadline: Instant,
    ) -> Result<resolve::Resolved, DialError> {
        let lookup = self.resolver.lookup(name, reach.namespace());
        match timeout_at(deadline, lookup).await {
            Ok(Ok(resolved)) => Ok(resolved),
            Ok(Err(error)) => Err(DialError::new(DialErrorKind::Dns, error.to_string())),
            Err(_) => Err(DialError::new(
                DialErrorKind::Dns,
                format!("no answer to the query for {name} in time"),
            )),
        }
    }

    async fn check(
        &self,
        destination: Destination,
        reach: &dyn Reach,
        deadline: Instant,
    ) -> Result<Permitted, DialError> {
        let forbidden = |detail: String| DialError::new(DialErrorKind::Forbidden, detail);
        let address = refuse::check(destination.address, destination.port, reach.surroundings())
            .map_err(|refusal| forbidden(format!("{} is {refusal}", destination.address)))?;
        let destination = Destination {
            address,
            ..destination
        };
        let socket_address = SocketAddr::new(address, destination.port);
        if self.resolver.is_nameserver(socket_address) {
            return Ok((socket_address, None));
        }
        match timeout_at(deadline, reach.permit(&destination)).await {
            Ok(permit) => permit
                .map(|permit| (socket_address, permit))
                .map_err(forbidden),
            Err(_) => Err(DialError::new(
                DialErrorKind::TimedOut,
                "the API server did not say in time whether this is permitted",
            )),
        }
    }
}

/// An address that may be dialled.
type Permitted = (SocketAddr, Permit);

/// Tries each address in order, each with its share of what is left of the time.
async fn connect_in_turn(
    addresses: &[Permitted],
    deadline: Instant,
) -> Result<Dialed<TcpStream>, DialError> {
    let mut worst: Option<DialError> = None;
    for (index, (address, permit)) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        match timeout_at(Instant::now() + share, connect(*address)).await {
            Ok(Ok(stream)) => return Ok(dialed(stream, permit)),
            Ok(Err(error)) => keep_clearest(&mut worst, DialError::from(error), *address),
            Err(_) => {
                let error = DialError::new(DialErrorKind::TimedOut, "no answer");
                keep_clearest(&mut worst, error, *address);
            }
        }
    }
    Err(worst.unwrap_or_else(|| DialError::new(DialErrorKind::Dns, "the name has no address")))
}

fn dialed<S>(socket: S, permit: &Permit) -> Dialed<S> {
    Dialed {
        socket,
        revoked: permit.clone(),
    }
}

/// Of several failures the one that says most about the destination: a refusal came from it, a timeout is silence, no
/// route may be this pod's lack of an address family.
fn keep_clearest(worst: &mut Option<DialError>, error: DialError, address: SocketAddr) {
    let rank = |kind: DialErrorKind| match kind {
        DialErrorKind::Refused => 3,
        DialErrorKind::TimedOut => 2,
        DialErrorKind::Forbidden | DialErrorKind::Dns | DialErrorKind::Unreachable => 1,
    };
    if worst
        .as_ref()
        .is_none_or(|known| rank(known.kind) < rank(error.kind))
    {
        *worst = Some(DialError::new(
            error.kind,
            format!("{address}: {}", error.detail),
        ));
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    leave_some(&socket)?;
    socket.set_nodelay(true)?;
    socket.connect(address).await.map_err(|error| {
        match error.kind() == io::ErrorKind::AddrNotAvailable {
            true => io::Error::new(
                error.kind(),
                "each port of the manager was used for a connection there within the last minute",
            ),
            false => error,
        }
    })
}

async fn connect_datagrams(addresses: &[Permitted]) -> Result<Dialed<UdpSocket>, DialError> {
    let mut worst = None;
    for (address, permit) in addresses {
        match connect_datagram(*address).await {
            Ok(socket) => return Ok(dialed(socket, permit)),
            Err(error) => keep_clearest(&mut worst, DialError::from(error), *address),
        }
    }
    Err(worst.unwrap_or_else(|| DialError::new(DialErrorKind::Dns, "the name has no address")))
}

/// Connected, so that the kernel drops what others send to it and reports a closed port.
async fn connect_datagram(address: SocketAddr) -> io::Result<UdpSocket> {
    let any = match address {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    leave_some(&socket)?;
    socket.connect(address).await?;
    Ok(socket)
}

/// The last descriptors are for new sessions and for the API server.
fn leave_some(socket: &impl AsRawFd) -> io::Result<()> {
    match descriptors_are_scarce(socket) {
        true => Err(io::Error::other("the manager has too many flows open")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_outranks_silence_and_silence_a_missing_route() {
        let address: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let mut worst = None;

        for kind in [
            DialErrorKind::Unreachable,
            DialErrorKind::Refused,
            DialErrorKind::TimedOut,
        ] {
            keep_clearest(&mut worst, DialError::new(kind, "x"), address);
        }

        let worst = worst.unwrap();
        assert_eq!(worst.kind, DialErrorKind::Refused);
        assert_eq!(worst.detail, "10.0.0.1:80: x");
    }
}
