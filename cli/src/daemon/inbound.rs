//! What the cluster offers to this workstation: each flow is joined with the local program of its intercept.
//!
//! Streams are posted on whichever tunnel is up while there is an intercept, so a new carrier needs nothing else. An
//! offer names an intercept and never an address: where it leads, only the user has said. It is taken once the local
//! connection is up, and refused when there is none, so that the application answers instead.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tp_manager_api::route_table::Protocol;
use tp_manager_api::sighting::OFFER;
use tp_tunnel::{
    Incoming, OPENED_TIMEOUT, OpenError, Refusal, Tunnel, relay, relay_datagrams,
    set_up_flow_socket,
};

use super::sightings::{self, Sightings};

/// Streams that wait at a time: as many flows can arrive at once without waiting for a round trip.
const POSTED: usize = 32;

/// Pause after the manager gave a posted stream back, and after it answered with something else: it may be of a release
/// that offers nothing.
const POST_AGAIN: Duration = Duration::from_millis(200);
const POST_MUCH_LATER: Duration = Duration::from_secs(10);

/// Where an intercept leads on this workstation's side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalAddress {
    /// Name or address; `None` is this machine's loopback, IPv4 first.
    pub host: Option<String>,
    /// Port.
    pub port: u16,
}

/// What is counted of one intercept's port.
#[derive(Debug, Default)]
pub struct Counts {
    /// Flows that reached the local program.
    pub flows: AtomicU64,
    /// Flows that it refused, and that the application got instead.
    pub refused: AtomicU64,
}

/// One way to a local program.
#[derive(Clone, Debug)]
pub struct Way {
    /// Where to.
    pub to: LocalAddress,
    /// What is carried there.
    pub protocol: Protocol,
    /// What went there.
    pub counts: Arc<Counts>,
    /// For who watches.
    pub sightings: Sightings,
}

/// Knows where each intercept leads.
pub trait Ways: Send + Sync + 'static {
    /// The way of the intercept with this uid, if it is ours.
    fn way(&self, uid: &str) -> Option<Way>;
}

impl std::fmt::Display for LocalAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.host {
            None => write!(f, "localhost:{}", self.port),
            Some(host) if host.contains(':') => write!(f, "[{host}]:{}", self.port),
            Some(host) => write!(f, "{host}:{}", self.port),
        }
    }
}

impl LocalAddress {
    async fn connect(&self) -> io::Result<TcpStream> {
        match &self.host {
            Some(host) => TcpStream::connect((host.as_str(), self.port)).await,
            None => {
                let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
                let loopback = loopback.map(|address| (address, self.port).into());
                TcpStream::connect(&loopback[..]).await
            }
        }
    }

    /// A socket for datagrams to it. Loopback is IPv4's.
    ///
    /// # Errors
    /// It is known that no program of this machine has the port, or the name has no address.
    async fn associate(&self) -> io::Result<UdpSocket> {
        if self.host.is_none() && !may_be_taken(self.port) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let host = self.host.as_deref().unwrap_or("127.0.0.1");
        let mut found = tokio::net::lookup_host((host, self.port)).await?;
        let to = found.next().ok_or(io::ErrorKind::NotFound)?;
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(to).await?;
        Ok(socket)
    }
}

/// Takes what is offered for as long as it is polled; dropping it resets every flow. `wanted` is how many intercepts
/// there are: without one nothing is posted.
pub async fn serve(
    mut tunnel: watch::Receiver<Option<Tunnel>>,
    mut wanted: watch::Receiver<usize>,
    ways: Arc<impl Ways>,
) {
    let mut relays = JoinSet::new();
    loop {
        let up = tunnel.borrow_and_update().clone();
        let is_wanted = *wanted.borrow_and_update() > 0;
        let changed = async {
            tokio::select! {
                changed = tunnel.changed() => changed.is_ok(),
                changed = wanted.wait_for(|count| (*count > 0) != is_wanted) => changed.is_ok(),
            }
        };
        let posting = async {
            match up.filter(|_| is_wanted) {
                Some(up) => accept(&up, &ways, &mut relays).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            more = changed => if !more {
                return;
            },
            () = posting => unreachable!("streams are posted until that is dropped"),
        }
    }
}

/// Keeps streams posted on one tunnel, for ever: what follows it is the caller's business.
async fn accept(tunnel: &Tunnel, ways: &Arc<impl Ways>, relays: &mut JoinSet<()>) {
    let mut posted = FuturesUnordered::new();
    let post = |after: Duration| async move {
        if !after.is_zero() {
            tokio::time::sleep(after).await;
        }
        tunnel.accept().await
    };
    (0..POSTED).for_each(|_| posted.push(post(Duration::ZERO)));
    loop {
        tokio::select! {
            Some(offered) = posted.next() => match offered {
                Ok(incoming) => {
                    posted.push(post(Duration::ZERO));
                    relays.spawn(join(incoming, Arc::clone(ways)));
                }
                Err(error) if tunnel.is_closed() => {
                    tracing::debug!(%error, "no streams are posted any more");
                    posted.clear();
                }
                Err(error) => {
                    tracing::debug!(%error, "a posted stream came back");
                    posted.push(post(match matches!(error, OpenError::Reset(_)) {
                        true => POST_AGAIN,
                        false => POST_MUCH_LATER,
                    }));
                }
            },
            Some(_) = relays.join_next(), if !relays.is_empty() => {}
            else => std::future::pending().await,
        }
    }
}

/// Whether a program of this machine has the UDP port, as Linux says; elsewhere it may. A datagram would have to be lost to
/// find out.
fn may_be_taken(port: u16) -> bool {
    let tables = ["/proc/net/udp", "/proc/net/udp6"].map(std::fs::read_to_string);
    let ending = format!(":{port:04X}");
    let has = |line: &str| {
        let local = line.split_whitespace().nth(1);
        local.is_some_and(|local| local.ends_with(&ending))
    };
    tables.iter().all(Result::is_err) || tables.iter().flatten().any(|table| table.lines().any(has))
}

/// How long a flow of datagrams lives without one.
const DATAGRAM_IDLE: Duration = Duration::from_secs(60);

/// One flow of datagrams. A local program that goes away shows with the next of them: that one is lost, and those after it are
/// the application's.
async fn join_datagrams(incoming: Incoming, way: Way) {
    let socket = match way.to.associate().await {
        Ok(socket) => socket,
        Err(error) => {
            way.counts.refused.fetch_add(1, Relaxed);
            tracing::info!(%error, to = %way.to, "the application answers instead");
            return incoming.refuse().await;
        }
    };
    match incoming.opened().await {
        Ok(flow) => {
            way.counts.flows.fetch_add(1, Relaxed);
            let flow = flow.into_datagrams();
            relay_datagrams(flow, socket, DATAGRAM_IDLE, Refusal::Ends).await;
        }
        Err(error) => tracing::debug!(%error, "the offer was withdrawn"),
    }
}

/// One flow, from the offer to its end.
async fn join(mut incoming: Incoming, ways: Arc<impl Ways>) {
    let uid = incoming.intercept().strip_prefix(OFFER);
    let Some(way) = ways.way(uid.unwrap_or(incoming.intercept())) else {
        tracing::warn!(intercept = incoming.intercept(), "offered, and not ours");
        return incoming.refuse().await;
    };
    if uid.is_some() {
        return sightings::receive(incoming, way.sightings).await;
    }
    if way.protocol == Protocol::Udp {
        return join_datagrams(incoming, way).await;
    }
    // The other side gives up by then.
    let dialled = tokio::select! {
        dialled = tokio::time::timeout(OPENED_TIMEOUT, way.to.connect()) => {
            dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        }
        () = incoming.cancelled() => return,
    };
    let tcp = match dialled {
        Ok(tcp) => tcp,
        Err(error) => {
            way.counts.refused.fetch_add(1, Relaxed);
            tracing::info!(%error, to = %way.to, "the application answers instead");
            return incoming.refuse().await;
        }
    };
    set_up_flow_socket(&tcp);
    match incoming.opened().await {
        Ok(flow) => {
            way.counts.flows.fetch_add(1, Relaxed);
            relay(flow, tcp).await;
        }
        Err(error) => tracing::debug!(%error, "the offer was withdrawn"),
    }
}

#[cfg(test)]
mod tests;
