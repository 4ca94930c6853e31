//! Where packets become flows of the tunnel: with `relay`, which moves the bytes, the only place in which the userspace stack and the
//! tunnel meet.
//!
//! A bridge has a thread of its own, on which one task pumps packets and one task for each connection moves its bytes.
//! A program hears what its destination said: a refusal as RST, silence as silence, half-close as half-close.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tp_netstack::{DialOutcome, EchoRequest, Unreachable};
use tp_tunnel::{DatagramFlow, DialErrorKind, Target, set_up_flow_socket};

use super::device::{ADDRESS, Kind};
use super::dial::{Dialer, Outbound, Refusal};
use super::dns::{self, Names, RESOLVER, Transport};
use super::relay;
use super::shard::{self, Association, Incoming, Pending, Pump, Shard, Stream};
use super::worker::Worker;
use crate::proxy::{Split, Upstream, UserRules};

/// What one `tp run` asks for.
pub struct Config {
    /// The kind of device behind `descriptor`.
    pub device: Kind,
    /// Where the namespace's packets come out.
    pub descriptor: OwnedFd,
    /// Listeners in the namespace, each with the port of the workstation's loopback that it leads to.
    pub forwards: Vec<(StdTcpListener, u16)>,
    /// The connection.
    pub upstream: Upstream,
    /// Rules on top of the connection's.
    pub rules: UserRules,
    /// Only the cluster is reached.
    pub offline: bool,
}

/// Starts carrying a namespace's packets. Its flows are reset when the worker is dropped. To be called on the runtime that
/// the connection's tunnel lives on.
///
/// # Errors
/// No thread is free.
pub fn start(config: Config) -> io::Result<Worker> {
    let outside = Handle::current();
    Worker::start(move |stop| serve(config, outside, stop))
}

/// What every connection of one bridge needs.
struct Shared {
    shard: Shard,
    dialer: Dialer,
    names: Names,
    /// Where the tunnel's own tasks run.
    runtime: Handle,
}

async fn serve(config: Config, runtime: Handle, stop: CancellationToken) -> io::Result<()> {
    let (shard, mut pump) = shard::open(config.device.device(), config.descriptor)?;
    let mut tasks = JoinSet::new();
    let split = with_rules(config.upstream.split, config.rules, &mut tasks);
    let upstream = Upstream {
        tunnel: config.upstream.tunnel,
        split,
    };
    for (listener, port) in config.forwards {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        tasks.spawn_local(forward(listener, port));
    }
    let shared = Rc::new(Shared {
        shard: shard.clone(),
        dialer: Dialer {
            upstream,
            offline: config.offline,
        },
        names: Names::default(),
        runtime,
    });
    let failed = carry(&shared, &mut pump, &mut tasks, &stop).await;
    // Dropped flows are reset, and the program is told so.
    tasks.shutdown().await;
    pump.flush();
    failed.map_or(Ok(()), Err)
}

async fn carry(
    shared: &Rc<Shared>,
    pump: &mut Pump,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Option<io::Error> {
    let pumping = pump.run();
    tokio::pin!(pumping);
    loop {
        tokio::select! {
            () = stop.cancelled() => return None,
            error = &mut pumping => return Some(error),
            incoming = shared.shard.incoming() => {
                let shared = Rc::clone(shared);
                match incoming {
                    Incoming::Tcp(pending) => tasks.spawn_local(tcp(shared, pending)),
                    Incoming::Udp(association) => tasks.spawn_local(udp(shared, association)),
                    Incoming::Echo(request) => tasks.spawn_local(echo(shared, request)),
                };
            }
            Some(ended) = tasks.join_next(), if !tasks.is_empty() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a flow ended by a defect of tp");
                }
            }
        }
    }
}

/// The connection's rules and this program's, followed as the cluster changes.
pub(super) fn with_rules(
    mut split_rx: watch::Receiver<Arc<Split>>,
    rules: UserRules,
    tasks: &mut JoinSet<()>,
) -> watch::Receiver<Arc<Split>> {
    if !rules.all && rules.also_proxy.is_empty() && rules.never_proxy.is_empty() {
        return split_rx;
    }
    let combined = Arc::new(split_rx.borrow_and_update().with_rules(&rules));
    let (combined_tx, combined_rx) = watch::channel(combined);
    tasks.spawn_local(async move {
        while split_rx.changed().await.is_ok() {
            let combined = split_rx.borrow_and_update().with_rules(&rules);
            combined_tx.send_replace(Arc::new(combined));
        }
    });
    combined_rx
}

async fn tcp(shared: Rc<Shared>, pending: Pending) {
    let destination = pending.destination;
    if is_resolver(destination) {
        if let Ok(stream) = pending.accept() {
            // The program may go at any time.
            let _ = answer_over_tcp(&shared, stream).await;
        }
        return;
    }
    let target = shared.target(destination);
    let opened = tokio::select! {
        opened = shared.dialer.connect(&target) => opened,
        () = pending.abandoned() => return,
    };
    match opened {
        Ok(Outbound::Tunnel(flow)) => {
            if let Ok(stream) = pending.accept() {
                relay::through_tunnel(stream, flow, &shared.runtime).await;
            }
        }
        Ok(Outbound::Direct(origin)) => {
            if let Ok(stream) = pending.accept() {
                relay::from_workstation(stream, origin).await;
            }
        }
        Err(refusal) => {
            tracing::debug!(%target, ?refusal, "no flow");
            pending.refuse(outcome(&refusal));
        }
    }
}

impl Shared {
    fn target(&self, destination: SocketAddr) -> Target {
        let host = self.names.host(destination.ip().to_canonical());
        Target::new(host, destination.port())
    }
}

fn is_resolver(destination: SocketAddr) -> bool {
    destination == SocketAddr::new(RESOLVER.into(), 53)
}

/// What TCP is told.
fn outcome(refusal: &Refusal) -> DialOutcome {
    match refusal {
        Refusal::Dial(DialErrorKind::Refused) => DialOutcome::Refused,
        Refusal::Dial(DialErrorKind::TimedOut) => DialOutcome::TimedOut,
        Refusal::NoTunnel
        | Refusal::Dial(
            DialErrorKind::Dns | DialErrorKind::Unreachable | DialErrorKind::Forbidden,
        ) => DialOutcome::Unreachable(unreachable(refusal)),
    }
}

/// What ICMP says.
fn unreachable(refusal: &Refusal) -> Unreachable {
    match refusal {
        Refusal::NoTunnel => Unreachable::Network,
        Refusal::Dial(DialErrorKind::Refused) => Unreachable::Port,
        Refusal::Dial(DialErrorKind::Forbidden) => Unreachable::Prohibited,
        Refusal::Dial(
            DialErrorKind::TimedOut | DialErrorKind::Dns | DialErrorKind::Unreachable,
        ) => Unreachable::Host,
    }
}

/// The largest datagram, and more.
const DIRECT_BUFFER: usize = 64 * 1024;

async fn answer_over_tcp(shared: &Shared, stream: Stream) -> Result<(), tp_netstack::FlowError> {
    let mut received = Vec::new();
    while let Some(bytes) = stream.read().await? {
        received.extend_from_slice(&bytes);
        while let Some((length, rest)) = received.split_first_chunk() {
            let length = usize::from(u16::from_be_bytes(*length));
            let Some(query) = rest.get(..length) else {
                break;
            };
            let answer = dns::answer(&shared.dialer, &shared.names, query, Transport::Tcp).await;
            // No resolver's answer is longer, since it came the same way.
            let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
            let message = [&length.to_be_bytes(), &answer[..length.into()]].concat();
            stream.write(&message).await?;
            received.drain(..2 + query.len());
        }
    }
    stream.finish()
}

async fn udp(shared: Rc<Shared>, association: Association) {
    if is_resolver(association.destination) {
        return answer_over_udp(shared, association).await;
    }
    let target = shared.target(association.destination);
    match shared.dialer.associate(&target).await {
        Ok(Outbound::Tunnel(flow)) => datagrams_through_tunnel(association, flow).await,
        Ok(Outbound::Direct(socket)) => datagrams_from_workstation(association, socket).await,
        Err(refusal) => association.refuse(unreachable(&refusal)),
    }
}

async fn datagrams_through_tunnel(mut association: Association, mut flow: DatagramFlow) {
    loop {
        tokio::select! {
            datagram = association.recv() => match datagram {
                Some(datagram) => {
                    if flow.send(datagram).is_err() {
                        return;
                    }
                }
                None => return,
            },
            datagram = flow.recv() => match datagram {
                Ok(Some(datagram)) => association.send(&datagram),
                Ok(None) | Err(_) => return,
            },
        }
    }
}

async fn datagrams_from_workstation(mut association: Association, socket: UdpSocket) {
    let mut buffer = Vec::new();
    loop {
        tokio::select! {
            datagram = association.recv() => match datagram {
                // Its loss is UDP's own.
                Some(datagram) => drop(socket.send(&datagram).await),
                None => return,
            },
            ready = socket.readable() => {
                if ready.is_err() {
                    return;
                }
                buffer.clear();
                buffer.reserve(DIRECT_BUFFER);
                match socket.try_recv_buf(&mut buffer) {
                    Ok(_) => association.send(&buffer),
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                        return association.refuse(Unreachable::Port);
                    }
                    Err(_) => {}
                }
            }
        }
    }
}

/// Questions that one socket of a program may have open.
const QUESTIONS: usize = 256;

async fn answer_over_udp(shared: Rc<Shared>, mut association: Association) {
    let mut answers = JoinSet::new();
    loop {
        tokio::select! {
            query = association.recv(), if answers.len() < QUESTIONS => match query {
                Some(query) => {
                    let shared = Rc::clone(&shared);
                    answers.spawn_local(async move {
                        dns::answer(&shared.dialer, &shared.names, &query, Transport::Udp).await
                    });
                }
                None => return,
            },
            Some(answer) = answers.join_next(), if !answers.is_empty() => {
                if let Ok(answer) = answer {
                    association.send(&answer);
                }
            }
        }
    }
}

/// Answers a ping if its destination lives. HTTP/2 carries no ICMP, so life is shown by TCP: a host that accepts or refuses
/// a connection is there.
async fn echo(shared: Rc<Shared>, request: EchoRequest) {
    const ECHO_PORT: u16 = 7;
    let own = [IpAddr::V4(RESOLVER), IpAddr::V4(ADDRESS)].contains(&request.destination);
    let target = shared.target(SocketAddr::new(request.destination, ECHO_PORT));
    let reached = if own {
        Ok(())
    } else {
        match shared.dialer.connect(&target).await {
            Ok(_) | Err(Refusal::Dial(DialErrorKind::Refused)) => Ok(()),
            // Nobody answered, and so do we.
            Err(Refusal::Dial(DialErrorKind::TimedOut)) => return,
            Err(refusal) => Err(unreachable(&refusal)),
        }
    };
    shared.shard.answer(&request, reached);
}

/// Leads connections to a port of the namespace's loopback to one of the workstation's.
async fn forward(listener: TcpListener, port: u16) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((program, _)) => {
                    let target = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
                    connections.spawn_local(join(program, TcpStream::connect(target)));
                }
                // Out of descriptors, say.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// Joins two sockets of this machine; the first is reset if the second cannot be had or breaks.
pub(super) async fn join(
    mut accepted: TcpStream,
    dialled: impl Future<Output = io::Result<TcpStream>>,
) {
    let mut other = match dialled.await {
        Ok(other) => other,
        Err(error) => {
            tracing::debug!(%error, "nobody listens there");
            let _ = SockRef::from(&accepted).set_linger(Some(Duration::ZERO));
            return;
        }
    };
    for socket in [&accepted, &other] {
        set_up_flow_socket(socket);
    }
    if copy_bidirectional(&mut accepted, &mut other).await.is_err() {
        for socket in [&accepted, &other] {
            let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }
}
