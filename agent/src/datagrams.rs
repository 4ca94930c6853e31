//! UDP of intercepted ports. What one client sends to one port is one flow, for as long as anything is said.
//!
//! The kernel redirects a port to a socket of its own, since a datagram does not say where it wanted to go, and gives the
//! answers of that socket the port's number again. A flow goes to the intercept's workstation; where that does not take
//! it, or goes away, the rest of it goes to the application. Datagrams that find no room are dropped, as on any way.

use std::collections::{BTreeMap, HashMap, hash_map};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tp_tunnel::{DatagramFlow, DatagramReceiver, DatagramSender};

use crate::budget::Share;
use crate::front::{Shared, open, stopping};
use crate::route::{Via, unparsed};

/// How long a flow lives without a datagram, in either direction: as long as the kernel remembers who it is.
const IDLE: Duration = Duration::from_secs(60);

/// Datagrams of one flow that wait for it to be opened.
const WAITING: usize = 16;

/// What a flow is charged besides what waits.
const CHARGE: usize = 8 * 1024;

/// Bytes of the largest datagram.
const DATAGRAM: usize = 65_535;

/// A datagram, and its part of the budget.
type Kept = (Bytes, Share);

/// The sockets of the intercepted ports.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// By the port that clients know, the one that they are redirected to.
    open: BTreeMap<u16, u16>,
    serving: JoinSet<()>,
}

impl Sockets {
    /// The UDP ports that have intercepts, and where to redirect them. Opens what is missing; sockets of others stay, since
    /// clients may still be redirected to them.
    pub(crate) fn follow(&mut self, shared: &Arc<Shared>) -> Vec<(u16, u16)> {
        let wanted = shared.book.udp_ports();
        for port in &wanted {
            if self.open.contains_key(port) {
                continue;
            }
            match bind() {
                Ok((socket, own)) => {
                    self.open.insert(*port, own);
                    let shared = Arc::clone(shared);
                    self.serving.spawn(serve(*port, Arc::new(socket), shared));
                }
                Err(error) => tracing::warn!(port, %error, "no socket for a UDP port"),
            }
        }
        let open = wanted
            .iter()
            .filter_map(|port| self.open.get_key_value(port));
        open.map(|(port, own)| (*port, *own)).collect()
    }
}

fn bind() -> io::Result<(UdpSocket, u16)> {
    let any = [
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        Ipv4Addr::UNSPECIFIED.into(),
    ];
    let bound = std::net::UdpSocket::bind(&any.map(|any| SocketAddr::new(any, 0))[..])?;
    bound.set_nonblocking(true)?;
    let own = bound.local_addr()?.port();
    Ok((UdpSocket::from_std(bound)?, own))
}

/// Serves one port until the worker stops.
async fn serve(port: u16, socket: Arc<UdpSocket>, shared: Arc<Shared>) {
    let mut flows: HashMap<SocketAddr, mpsc::Sender<Kept>> = HashMap::new();
    let mut running = JoinSet::new();
    let mut stop = shared.stop.clone();
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let received = tokio::select! {
            () = stopping(&mut stop) => return,
            Some(ended) = running.join_next(), if !running.is_empty() => {
                if let Ok(peer) = ended {
                    flows.remove(&peer);
                }
                continue;
            }
            received = socket.recv_from(&mut buffer) => received,
        };
        // What the kernel says of an earlier datagram's fate is nobody's here.
        let Ok((size, peer)) = received else { continue };
        let Some(share) = shared.budget.take(size) else {
            continue;
        };
        let datagram = (Bytes::copy_from_slice(&buffer[..size]), share);
        let queue = match flows.entry(peer) {
            hash_map::Entry::Occupied(flow) => flow.into_mut(),
            hash_map::Entry::Vacant(vacant) => {
                let Some(charge) = shared.budget.take(CHARGE) else {
                    continue;
                };
                let (queue, waiting) = mpsc::channel(WAITING);
                let flow = Flow {
                    port,
                    peer,
                    socket: Arc::clone(&socket),
                    waiting,
                    shared: Arc::clone(&shared),
                };
                running.spawn(async move {
                    let _charge = charge;
                    flow.run().await;
                    peer
                });
                vacant.insert(queue)
            }
        };
        // No room, no datagram.
        let _ = queue.try_send(datagram);
    }
}

/// What one client sends to one port.
struct Flow {
    port: u16,
    peer: SocketAddr,
    socket: Arc<UdpSocket>,
    waiting: mpsc::Receiver<Kept>,
    shared: Arc<Shared>,
}

/// How a flow to a workstation ended.
enum End {
    Idle,
    /// The other side is gone; more datagrams may come.
    Gone,
}

impl Flow {
    async fn run(mut self) {
        let port = self.shared.book.udp_port(self.port);
        if let Some(live) = unparsed(port.as_deref(), Via::Plain) {
            let peer = SocketAddr::new(self.peer.ip().to_canonical(), self.peer.port());
            let end = match open(live, peer).await {
                Ok(flow) => self.with_workstation(flow.into_datagrams()).await,
                Err(_) => End::Gone,
            };
            if matches!(end, End::Idle) || live.route.strict {
                return;
            }
        }
        let app = port.map_or(self.port, |port| port.app);
        if let Err(error) = self.with_app(app).await {
            tracing::debug!(%error, port = self.port, "UDP flow ended");
        }
    }

    async fn with_workstation(&mut self, flow: DatagramFlow) -> End {
        let (mut tx, mut rx): (DatagramSender, DatagramReceiver) = flow.into_split();
        let mut active = Instant::now();
        loop {
            tokio::select! {
                Some((datagram, _share)) = self.waiting.recv() => if tx.send(&datagram).is_err() {
                    return End::Gone;
                },
                answer = rx.recv() => match answer {
                    Ok(Some(answer)) => drop(self.socket.try_send_to(&answer, self.peer)),
                    Ok(None) | Err(_) => return End::Gone,
                },
                () = sleep_until(active + IDLE) => {
                    // Fails only when it has ended.
                    let _ = tx.finish();
                    return End::Idle;
                }
            }
            active = Instant::now();
        }
    }

    async fn with_app(&mut self, port: u16) -> io::Result<()> {
        let own = self
            .shared
            .own
            .get()
            .ok_or(io::ErrorKind::AddrNotAvailable)?;
        let any: IpAddr = match own {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let app = UdpSocket::bind((any, 0)).await?;
        app.connect((*own, port)).await?;
        let mut active = Instant::now();
        loop {
            tokio::select! {
                Some((datagram, _share)) = self.waiting.recv() => {
                    // A refused one is lost, as it would be without us.
                    let _ = app.send(&datagram).await;
                }
                ready = app.readable() => {
                    ready?;
                    self.answers(&app);
                }
                () = sleep_until(active + IDLE) => return Ok(()),
            }
            active = Instant::now();
        }
    }

    /// Passes on what the application has said, a burst at a time.
    fn answers(&self, app: &UdpSocket) {
        const BURST: usize = 32;
        thread_local! {
            static SCRATCH: std::cell::RefCell<Box<[u8]>> = std::cell::RefCell::new(vec![0; DATAGRAM].into());
        }
        SCRATCH.with_borrow_mut(|scratch| {
            for _ in 0..BURST {
                match app.try_recv(scratch) {
                    Ok(size) => drop(self.socket.try_send_to(&scratch[..size], self.peer)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                    Err(_) => {}
                }
            }
        });
    }
}
