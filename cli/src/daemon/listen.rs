//! The proxy's listening sockets: which port, and what to say when it is taken.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::net::TcpListener;

use super::parameters::Listen;
use crate::report::Failure;

/// The port of SOCKS, tried first unless one was asked for.
pub const DEFAULT_PORT: u16 = 1080;

/// How many ports after it are tried.
const NEXT_PORTS: u16 = 100;

/// Listening sockets on one port.
#[derive(Debug)]
pub struct Bound {
    /// The sockets, not accepting yet.
    pub listeners: Vec<TcpListener>,
    /// What to tell users: the first socket's address.
    pub address: SocketAddr,
    /// Whether the usual port was taken.
    pub moved: bool,
}

/// Binds what was asked for.
///
/// # Errors
/// The port that was asked for is taken or not allowed, or all usual ones are taken.
pub async fn bind(listen: &Listen) -> Result<Bound, Failure> {
    let addresses = listen.addresses();
    let explicit = match listen {
        Listen::Default => return bind_next_free(&addresses).await,
        Listen::Loopback(port) => *port,
        Listen::At(address) => address.port(),
    };
    match bind_all(&addresses, explicit).await {
        Ok(listeners) => bound(listeners, false),
        Err(error) => {
            let wanted = SocketAddr::new(addresses[0], explicit);
            let failure = Failure::new(format!("cannot listen on {wanted}")).caused_by(&error);
            if error.kind() != io::ErrorKind::AddrInUse {
                return Err(failure);
            }
            Err(failure
                .hint("take another port with `--listen`, or any free one with `--listen 0`"))
        }
    }
}

async fn bind_next_free(addresses: &[IpAddr]) -> Result<Bound, Failure> {
    for port in DEFAULT_PORT..=DEFAULT_PORT + NEXT_PORTS {
        match bind_all(addresses, port).await {
            Ok(listeners) => return bound(listeners, port != DEFAULT_PORT),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => {
                return Err(
                    Failure::new(format!("cannot listen on loopback port {port}"))
                        .caused_by(&error),
                );
            }
        }
    }
    let last = DEFAULT_PORT + NEXT_PORTS;
    Err(Failure::new(format!(
        "all loopback ports from {DEFAULT_PORT} to {last} are taken"
    ))
    .hint("take any free one with `--listen 0`"))
}

/// The same port on every address. An address family that this machine lacks is left out, but not the first one.
async fn bind_all(addresses: &[IpAddr], port: u16) -> io::Result<Vec<TcpListener>> {
    let mut listeners: Vec<TcpListener> = Vec::new();
    for address in addresses {
        let port = match listeners.first() {
            Some(first) => first.local_addr()?.port(),
            None => port,
        };
        match TcpListener::bind((*address, port)).await {
            Ok(listener) => listeners.push(listener),
            Err(error) if !listeners.is_empty() && error.kind() != io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Ok(listeners)
}

fn bound(listeners: Vec<TcpListener>, moved: bool) -> Result<Bound, Failure> {
    let address = listeners[0]
        .local_addr()
        .map_err(|error| Failure::new("the proxy's socket has no address").caused_by(&error))?;
    Ok(Bound {
        listeners,
        address,
        moved,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn any_free_port_is_the_same_on_both_families() {
        let bound = bind(&Listen::Loopback(0)).await.unwrap();

        let ports: Vec<u16> = bound
            .listeners
            .iter()
            .map(|l| l.local_addr().unwrap().port())
            .collect();

        assert_ne!(ports[0], 0);
        assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
    }

    #[tokio::test]
    async fn a_port_that_was_asked_for_and_is_taken_is_an_error() {
        let taken = bind(&Listen::Loopback(0)).await.unwrap();

        let failure = bind(&Listen::At(taken.address)).await.unwrap_err();

        assert!(
            failure.what.contains(&taken.address.to_string()),
            "{failure}"
        );
        assert!(failure.hint.unwrap().contains("--listen 0"));
    }

    #[tokio::test]
    async fn the_next_free_port_is_taken_when_the_usual_one_is_busy() {
        let first = bind(&Listen::Default).await.unwrap();

        let second = bind(&Listen::Default).await.unwrap();

        assert!(second.moved);
        assert!(second.address.port() > first.address.port());
    }
}
