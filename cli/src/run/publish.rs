//! Ports of the workstation that lead to a program in a namespace.
//!
//! The sockets that go in are made by the namespace's guard, which is in there; everything else is plain relaying.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::bridge::join;
use super::namespace::Namespace;

/// One published port: `[ADDRESS:]PORT[:PORT]`, the workstation's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// Where the workstation listens.
    pub outside: SocketAddr,
    /// Where the program listens, on its loopback.
    pub inside: u16,
}

impl Published {
    /// Whether that is so for a program in the workstation's own network.
    pub fn is_by_itself(&self) -> bool {
        self.outside.ip().is_loopback() && self.outside.port() == self.inside
    }
}

impl FromStr for Published {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected PORT, PORT:PORT or ADDRESS:PORT:PORT".to_owned();
        let port = |text: &str| match text.parse::<u16>() {
            Ok(port @ 1..) => Ok(port),
            Ok(0) | Err(_) => Err(expected()),
        };
        let loopback = Ipv4Addr::LOCALHOST.into();
        let (rest, inside) = match text.rsplit_once(':') {
            Some((rest, inside)) => (rest, port(inside)?),
            None => {
                let port = port(text)?;
                return Ok(Self {
                    outside: SocketAddr::new(loopback, port),
                    inside: port,
                });
            }
        };
        let outside = match rest.parse::<SocketAddr>() {
            Ok(address) => address,
            Err(_) => SocketAddr::new(loopback, port(rest)?),
        };
        Ok(Self { outside, inside })
    }
}

/// Listens, before the program starts: a port that is taken should be said then.
///
/// # Errors
/// The port is taken, or not this user's to use.
pub async fn listen(published: Published) -> io::Result<TcpListener> {
    TcpListener::bind(published.outside).await
}

/// Serves until it is dropped, which cuts every connection.
pub async fn serve(published: Vec<(TcpListener, Published)>, guard: OwnedFd) {
    let guard = Arc::new(Mutex::new(guard));
    let mut listeners = JoinSet::new();
    for (listener, published) in published {
        listeners.spawn(serve_one(listener, published.inside, Arc::clone(&guard)));
    }
    while listeners.join_next().await.is_some() {}
    std::future::pending().await
}

async fn serve_one(listener: TcpListener, inside: u16, guard: Arc<Mutex<OwnedFd>>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => { connections.spawn(join(client, connect(inside, Arc::clone(&guard)))); }
                // Out of descriptors, say.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn connect(port: u16, guard: Arc<Mutex<OwnedFd>>) -> io::Result<TcpStream> {
    let guard = guard.lock_owned().await;
    let made = tokio::task::spawn_blocking(move || Namespace::socket(&*guard)).await;
    let socket = std::net::TcpStream::from(made.map_err(io::Error::other)??);
    let target = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    TcpSocket::from_std_stream(socket).connect(target).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_port_is_one_number_or_two_with_an_address_before() {
        for (text, outside, inside) in [
            ("8080", "127.0.0.1:8080", 8080),
            ("80:8080", "127.0.0.1:80", 8080),
            ("0.0.0.0:80:8080", "0.0.0.0:80", 8080),
            ("[::1]:80:8080", "[::1]:80", 8080),
        ] {
            let published: Published = text.parse().unwrap();
            assert_eq!(
                (published.outside, published.inside),
                (outside.parse().unwrap(), inside),
                "{text}"
            );
        }
        for bad in ["", "0", "x", "1:0", "1:2:3", "70000", "a:1:2"] {
            assert!(bad.parse::<Published>().is_err(), "{bad}");
        }
    }
}
