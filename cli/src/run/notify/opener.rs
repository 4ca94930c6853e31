//! Opens what a keeper asks for, over the tunnel, and moves the bytes. It runs where the connection is.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpStream as StdTcpStream, UdpSocket as StdUdpSocket};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tp_tunnel::{DialErrorKind, Flow, Target};

use super::channel::Channel;
use super::messages::{Ask, News, Told};
use super::short_names;
use crate::proxy::peer::{self, Protocol};
use crate::proxy::{Upstream, UserRules};
use crate::run::bridge;
use crate::run::dial::{Dialer, Outbound, Refusal};
use crate::run::dns::{Names, Transport};
use crate::run::worker::Worker;

/// What one `tp run` asks for.
pub struct Config {
    /// To the keeper.
    pub channel: OwnedFd,
    /// Where the program's questions for names arrive.
    pub resolvers: Vec<OwnedFd>,
    /// The connection.
    pub upstream: Upstream,
    /// Rules on top of the connection's.
    pub rules: UserRules,
    /// Namespace whose short names resolve, instead of the connection's.
    pub namespace: Option<String>,
}

/// Starts opening flows. They are reset when the worker is dropped.
///
/// # Errors
/// No thread is free.
pub fn start(config: Config) -> io::Result<Worker> {
    Worker::start(move |stop| serve(config, stop))
}

/// Questions that may be open at a time on one socket.
const QUESTIONS: usize = 256;

/// A datagram with a question; more than that is no DNS over UDP.
const LONGEST_QUESTION: usize = 4_096;

struct Shared {
    channel: Channel,
    dialer: Dialer,
    names: Names,
    namespace: Option<String>,
    open: RefCell<HashMap<u64, Opened>>,
}

/// A flow that waits for the program's socket.
enum Opened {
    Flow(Flow),
    Resolver,
}

async fn serve(config: Config, stop: CancellationToken) -> io::Result<()> {
    let mut tasks = JoinSet::new();
    let split = bridge::with_rules(config.upstream.split, config.rules, &mut tasks);
    let upstream = Upstream {
        tunnel: config.upstream.tunnel,
        split,
    };
    let shared = Rc::new(Shared {
        channel: Channel::new(config.channel)?,
        dialer: Dialer {
            upstream,
            offline: false,
        },
        names: Names::default(),
        namespace: config.namespace,
        open: RefCell::default(),
    });
    for socket in config.resolvers {
        let socket = StdUdpSocket::from(socket);
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        tasks.spawn_local(answer_over_udp(Rc::clone(&shared), socket));
    }
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            asked = shared.channel.receive::<Ask>() => match asked? {
                Some((ask, descriptors)) => handle(&shared, &mut tasks, ask, descriptors),
                // The keeper has gone, and with it every process that had a flow.
                None => stop.cancelled().await,
            },
            Some(ended) = tasks.join_next(), if !tasks.is_empty() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a flow ended by a defect of tp");
                }
            }
        }
    }
    // Dropped flows are reset, and the program is told so.
    tasks.shutdown().await;
    Ok(())
}

fn handle(shared: &Rc<Shared>, tasks: &mut JoinSet<()>, ask: Ask, descriptors: Vec<OwnedFd>) {
    let own = Rc::clone(shared);
    match ask {
        Ask::Open { id, to } => {
            tasks.spawn_local(async move { own.open(id, to).await });
        }
        Ask::OpenResolver { id } => {
            shared.open.borrow_mut().insert(id, Opened::Resolver);
            tasks.spawn_local(async move { own.tell(id, News::Open).await });
        }
        Ask::Carry { id } => {
            let opened = shared.open.borrow_mut().remove(&id);
            let socket = descriptors.into_iter().next();
            if let (Some(opened), Some(socket)) = (opened, socket) {
                tasks.spawn_local(async move { own.carry(opened, socket).await });
            }
        }
        Ask::Abandon { id } => drop(shared.open.borrow_mut().remove(&id)),
    }
}

impl Shared {
    async fn open(&self, id: u64, to: SocketAddr) {
        let host = self.names.host(to.ip().to_canonical());
        let target = Target::new(host, to.port());
        if self.dialer.is_outside(&target.host) {
            return self.tell(id, News::Outside).await;
        }
        self.tell(id, News::Opening).await;
        let news = match self.dialer.connect(&target).await {
            Ok(Outbound::Tunnel(flow)) => {
                self.open.borrow_mut().insert(id, Opened::Flow(flow));
                News::Open
            }
            // It became one meanwhile, and the program was told to wait.
            Ok(Outbound::Direct(_)) => News::Unreachable,
            Err(refusal) => {
                tracing::debug!(%target, ?refusal, "no flow");
                news(&refusal)
            }
        };
        self.tell(id, news).await;
    }

    async fn tell(&self, id: u64, news: News) {
        // Who does not listen any more has ended, and so will this.
        let _ = self.channel.send(&Told { id, news }, &[]).await;
    }

    async fn carry(&self, opened: Opened, socket: OwnedFd) {
        let socket = StdTcpStream::from(socket);
        let stream = socket
            .set_nonblocking(true)
            .and_then(|()| TcpStream::from_std(socket));
        let Ok(stream) = stream else {
            return;
        };
        // Fails only on a connection that is gone already, which the relay will notice.
        let _ = stream.set_nodelay(true);
        match opened {
            Opened::Flow(flow) => drop(tp_tunnel::relay(flow, stream).await),
            // The program may go at any time.
            Opened::Resolver => drop(self.answer_over_tcp(stream).await),
        }
    }

    async fn answer_over_tcp(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let length = stream.read_u16().await?;
            let mut query = vec![0; length.into()];
            stream.read_exact(&mut query).await?;
            let answer = self.answer(&query, Transport::Tcp).await;
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            let message = [&length.to_be_bytes(), &answer[..]].concat();
            stream.write_all(&message).await?;
        }
    }

    async fn answer(&self, query: &[u8], over: Transport) -> Vec<u8> {
        let namespace = self.namespace.as_deref();
        short_names::answer(&self.dialer, &self.names, namespace, query, over).await
    }
}

fn news(refusal: &Refusal) -> News {
    match refusal {
        Refusal::NoTunnel => News::NoTunnel,
        Refusal::Dial(DialErrorKind::Refused) => News::Refused,
        Refusal::Dial(DialErrorKind::TimedOut) => News::TimedOut,
        Refusal::Dial(
            DialErrorKind::Dns | DialErrorKind::Unreachable | DialErrorKind::Forbidden,
        ) => News::Unreachable,
    }
}

/// Loopback is everybody's, and names of the cluster are for this user only.
async fn answer_over_udp(shared: Rc<Shared>, socket: UdpSocket) {
    let Ok(own) = socket.local_addr() else {
        return;
    };
    let socket = Rc::new(socket);
    let mut answers = JoinSet::new();
    let mut buffer = vec![0; LONGEST_QUESTION];
    loop {
        tokio::select! {
            received = socket.recv_from(&mut buffer), if answers.len() < QUESTIONS => {
                // An answer that nobody took comes back as an error of the socket.
                let Ok((length, from)) = received else { continue };
                if !peer::is_same_user(Protocol::Udp, from, own) {
                    continue;
                }
                let query = buffer[..length].to_vec();
                let (shared, socket) = (Rc::clone(&shared), Rc::clone(&socket));
                answers.spawn_local(async move {
                    let answer = shared.answer(&query, Transport::Udp).await;
                    let _ = socket.send_to(&answer, from).await;
                });
            }
            Some(_) = answers.join_next(), if !answers.is_empty() => {}
        }
    }
}
