//! SOCKS5 UDP ASSOCIATE: one relay socket per control connection, one flow per destination.
//!
//! Datagrams are taken only from the address of the control connection; where the client named no port, the first
//! source that belongs to the same user is kept. Everything ends with the control connection.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::timeout;

use super::counters::OpenFlow;
use super::dial::{Dialer, OutboundUdp};
use super::peer;
use super::scratch;
use super::socks5::codec;

/// Destinations of one association; beyond that the one unused for longest gives way.
const DESTINATIONS: usize = 256;

/// Datagrams that wait for a flow to open or to take them; more are dropped, as UDP would.
const QUEUE: usize = 64;

/// A flow without a datagram in either direction for this long is closed; the next datagram opens a new one.
const IDLE: Duration = Duration::from_secs(120);

/// The relay socket of a control connection, on the address that the client reached us on.
pub(super) async fn bind(control: &TcpStream) -> io::Result<UdpSocket> {
    UdpSocket::bind(SocketAddr::new(control.local_addr()?.ip(), 0)).await
}

/// Relays datagrams until the control connection ends. `port` is the client's source port, 0 when not known.
pub(super) async fn relay(
    mut control: TcpStream,
    socket: UdpSocket,
    port: u16,
    dialer: Arc<Dialer>,
) -> io::Result<()> {
    let client = control.peer_addr()?;
    let mut association = Association {
        source: Source::new(client, port, socket.local_addr()?),
        socket: Arc::new(socket),
        dialer,
        destinations: HashMap::new(),
        flows: JoinSet::new(),
        clock: 0,
    };
    let mut ignored = [0; 64];
    loop {
        tokio::select! {
            read = control.read(&mut ignored) => {
                if read? == 0 {
                    return Ok(());
                }
            }
            ready = association.socket.readable() => {
                ready?;
                association.receive();
            }
            Some(ended) = association.flows.join_next_with_id() => {
                association.ended(ended.map_or_else(|error| error.id(), |(id, ())| id));
            }
        }
    }
}

struct Association {
    source: Source,
    socket: Arc<UdpSocket>,
    dialer: Arc<Dialer>,
    /// By the header the client writes, which the replies repeat.
    destinations: HashMap<Bytes, Destination>,
    flows: JoinSet<()>,
    clock: u64,
}

struct Destination {
    datagram_tx: mpsc::Sender<Bytes>,
    flow: AbortHandle,
    last_used: u64,
}

impl Association {
    /// Takes one datagram. ICMP errors of earlier replies surface here too and concern no later datagram.
    fn receive(&mut self) {
        let received = scratch::with(|buffer| {
            let (length, from) = self.socket.try_recv_from(buffer)?;
            io::Result::Ok((Bytes::copy_from_slice(&buffer[..length]), from))
        });
        if let Ok((datagram, from)) = received {
            self.datagram(datagram, from);
        }
    }

    fn datagram(&mut self, datagram: Bytes, from: SocketAddr) {
        if !self.source.admits(from) {
            return;
        }
        let Some(header) = codec::parse_datagram(&datagram) else {
            return;
        };
        self.clock += 1;
        let key = datagram.slice(..header.length);
        if !self.destinations.contains_key(&key) {
            self.make_room();
            self.open(&key, header.target, from);
        }
        if let Some(destination) = self.destinations.get_mut(&key) {
            destination.last_used = self.clock;
            // A full queue drops the datagram; a closed one belongs to a flow that has just ended.
            let _ = destination
                .datagram_tx
                .try_send(datagram.slice(header.length..));
        }
    }

    fn open(&mut self, key: &Bytes, target: tp_tunnel::Target, client: SocketAddr) {
        // Copied, since a slice would keep the whole first datagram.
        let header = Bytes::copy_from_slice(key);
        let (datagram_tx, datagram_rx) = mpsc::channel(QUEUE);
        let replies = Replies {
            socket: self.socket.clone(),
            client,
            header: header.clone(),
        };
        let dialer = self.dialer.clone();
        let flow = self.flows.spawn(async move {
            if let Ok((outbound, open)) = dialer.associate(&target).await {
                serve_flow(outbound, open, datagram_rx, replies).await;
            }
        });
        let last_used = self.clock;
        self.destinations.insert(
            header,
            Destination {
                datagram_tx,
                flow,
                last_used,
            },
        );
    }

    fn make_room(&mut self) {
        if self.destinations.len() < DESTINATIONS {
            return;
        }
        let oldest = self
            .destinations
            .iter()
            .min_by_key(|(_, destination)| destination.last_used);
        if let Some(key) = oldest.map(|(key, _)| key.clone())
            && let Some(destination) = self.destinations.remove(&key)
        {
            destination.flow.abort();
        }
    }

    fn ended(&mut self, id: Id) {
        self.destinations
            .retain(|_, destination| destination.flow.id() != id);
    }
}

/// Which datagrams are the client's.
struct Source {
    client: SocketAddr,
    relay: SocketAddr,
    /// The port that the client announced.
    announced: Option<u16>,
    /// The port of the first datagram that was admitted.
    pinned: Option<u16>,
}

impl Source {
    fn new(client: SocketAddr, port: u16, relay: SocketAddr) -> Self {
        Self {
            client,
            relay,
            announced: (port != 0).then_some(port),
            pinned: None,
        }
    }

    fn admits(&mut self, from: SocketAddr) -> bool {
        let port = self.pinned.or(self.announced);
        if from.ip() != self.client.ip() || port.is_some_and(|port| port != from.port()) {
            return false;
        }
        if self.pinned.is_none() && self.is_same_user(from) {
            self.pinned = Some(from.port());
        }
        self.pinned.is_some()
    }

    fn is_same_user(&self, from: SocketAddr) -> bool {
        let is_local = from.ip().to_canonical().is_loopback();
        !is_local || peer::is_same_user(peer::Protocol::Udp, from, self.relay)
    }
}

struct Replies {
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    header: Bytes,
}

impl Replies {
    async fn send(&self, payload: &[u8]) {
        let datagram = [&self.header, payload].concat();
        // Loss is UDP's own: too large, or the client's port is closed.
        let _ = self.socket.send_to(&datagram, self.client).await;
    }
}

/// Moves datagrams of one destination until it is idle, ended or given up.
async fn serve_flow(
    mut outbound: OutboundUdp,
    open: OpenFlow,
    mut datagram_rx: mpsc::Receiver<Bytes>,
    replies: Replies,
) {
    loop {
        let turn = timeout(IDLE, async {
            tokio::select! {
                datagram = datagram_rx.recv() => Turn::Out(datagram),
                datagram = receive(&mut outbound) => Turn::In(datagram),
            }
        });
        match turn.await {
            Ok(Turn::Out(Some(datagram))) => {
                open.up(datagram.len() as u64);
                if !send(&mut outbound, datagram).await {
                    return;
                }
            }
            Ok(Turn::In(Some(datagram))) => {
                open.down(datagram.len() as u64);
                replies.send(&datagram).await;
            }
            Ok(Turn::Out(None) | Turn::In(None)) | Err(_) => return,
        }
    }
}

enum Turn {
    Out(Option<Bytes>),
    In(Option<Bytes>),
}

/// `false` when the flow is over.
async fn send(outbound: &mut OutboundUdp, datagram: Bytes) -> bool {
    match outbound {
        OutboundUdp::Tunnel(flow) => flow.send(datagram).is_ok(),
        OutboundUdp::Direct(socket) => {
            // ICMP errors are reported once and the socket goes on.
            let _ = socket.send(&datagram).await;
            true
        }
    }
}

/// The next datagram, `None` when the flow is over. Cancel safe.
async fn receive(outbound: &mut OutboundUdp) -> Option<Bytes> {
    match outbound {
        OutboundUdp::Tunnel(flow) => flow.recv().await.ok().flatten(),
        OutboundUdp::Direct(socket) => loop {
            socket.readable().await.ok()?;
            let received = scratch::with(|buffer| {
                let length = socket.try_recv(buffer)?;
                io::Result::Ok(Bytes::copy_from_slice(&buffer[..length]))
            });
            match received {
                Ok(datagram) => return Some(datagram),
                // An ICMP error or a wake-up for nothing.
                Err(_) => tokio::task::yield_now().await,
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_source_needs_an_owner_in_either_form_of_loopback() {
        // Nobody holds these ports, so no owner can be told.
        for loopback in ["127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"] {
            let at = |port: u16| -> SocketAddr { format!("{loopback}:{port}").parse().unwrap() };

            let mut source = Source::new(at(2), 0, at(3));

            assert!(!source.admits(at(1)), "{loopback}");
        }
    }
}
