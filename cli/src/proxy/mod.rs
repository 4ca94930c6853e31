//! The proxy of `tp connect --proxy`: SOCKS5 and HTTP on one port of loopback, without root.
//!
//! The first byte of a connection tells the protocol. What the client asks for goes through the tunnel or is dialled
//! from here, as the [`split`] says. Nothing here knows Kubernetes, or how a tunnel is kept up.

pub mod counters;
mod credentials;
mod dial;
mod direct;
mod flow_io;
pub mod http;
pub mod pac;
pub(crate) mod peer;
pub mod rule;
mod scratch;
pub mod socks5;
pub mod split;
mod udp;
mod waiting;

#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tp_tunnel::{descriptors_are_scarce, set_up_flow_socket};

pub use self::counters::{Counted, Counters};
pub use self::credentials::Credentials;
pub use self::dial::Upstream;
pub use self::rule::{Rule, RuleError};
pub use self::split::{Route, Split, UserRules};

use self::counters::{Kind, OpenFlow};
use self::dial::{Dialer, Outbound};
use self::http::NoHead;
use self::http::head::Head;
use self::socks5::codec::{self, Request};
use self::waiting::Waiting;

/// What the user chose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Demanded from every client, where set.
    pub credentials: Option<Credentials>,
    /// Serve clients on other machines too. They are served only with credentials.
    pub allow_lan: bool,
    /// A client that has not said what it wants by then is closed.
    pub handshake_timeout: Duration,
    /// How long a destination may take to answer, and how long a client waits for a tunnel.
    pub dial_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            credentials: None,
            allow_lan: false,
            handshake_timeout: Duration::from_secs(10),
            dial_timeout: Duration::from_secs(5),
        }
    }
}

/// Connections that have not said yet what they want. Each holds at most one header block of 64 KiB.
const HANDSHAKES: usize = 1024;

/// How long accepting rests when there are no descriptors or no memory.
const ACCEPT_REST: Duration = Duration::from_millis(50);

/// What all connections of one proxy share.
struct Shared {
    options: Options,
    dialer: Arc<Dialer>,
    waiting: Waiting,
}

/// Serves until `shutdown`, which ends every flow.
pub async fn serve(
    listeners: Vec<TcpListener>,
    options: Options,
    upstream: Upstream,
    counters: Arc<Counters>,
    shutdown: impl Future<Output = ()>,
) {
    let own = listeners
        .iter()
        .filter_map(|listener| listener.local_addr().ok());
    let dialer = Dialer {
        upstream,
        timeout: options.dial_timeout,
        own: own.collect(),
        counters,
    };
    let shared = Arc::new(Shared {
        options,
        dialer: Arc::new(dialer),
        waiting: Waiting::new(HANDSHAKES),
    });
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            accepted = accept(&listeners) => match accepted {
                Ok((stream, _)) if descriptors_are_scarce(&stream) => turn_away(&stream, &shared),
                Ok((stream, client)) => {
                    let shared = shared.clone();
                    connections.spawn(async move { connection(stream, client, &shared).await });
                }
                Err(error) => rest(&error, &shared).await,
            },
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a connection of the proxy ended by a defect of tp");
                }
            }
        }
    }
    drop(listeners);
    connections.shutdown().await;
}

/// The next connection on any of the listeners. Cancel safe.
async fn accept(listeners: &[TcpListener]) -> io::Result<(TcpStream, SocketAddr)> {
    std::future::poll_fn(|cx| {
        let accepted = listeners.iter().map(|listener| listener.poll_accept(cx));
        accepted
            .into_iter()
            .find(Poll::is_ready)
            .unwrap_or(Poll::Pending)
    })
    .await
}

/// The client sees a reset at once, and not a connection that nobody serves. The oldest one that has said nothing yet
/// makes room for the next.
fn turn_away(stream: &TcpStream, shared: &Shared) {
    tracing::warn!("no descriptors are left for more connections");
    direct::reset_on_drop(stream);
    shared.waiting.evict_oldest();
}

/// An error of one connection costs nothing; without descriptors the listener stays readable, and asking again at once
/// would only spin. The oldest connection that has said nothing yet gives its descriptor back.
async fn rest(error: &io::Error, shared: &Shared) {
    let of_one_connection = matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    );
    if !of_one_connection {
        tracing::warn!(%error, "cannot accept connections for the moment");
        shared.waiting.evict_oldest();
        tokio::time::sleep(ACCEPT_REST).await;
    }
}

async fn connection(mut stream: TcpStream, client: SocketAddr, shared: &Arc<Shared>) {
    if !admits(&stream, client, shared) {
        tracing::debug!(%client, "another user, or another machine: not served");
        return;
    }
    set_up_flow_socket(&stream);
    // Each phase is boxed, so that its buffers and state are gone in the next one.
    match Box::pin(handshake(&mut stream, shared)).await {
        Begun::Nothing => {}
        Begun::Told(message) => Box::pin(tell(stream, &message)).await,
        Begun::Socks(Request::Connect(target), early) => {
            Box::pin(connect(stream, early, target, shared)).await;
        }
        Begun::Socks(Request::Associate(_, port), _) => {
            Box::pin(associate(stream, port, shared)).await
        }
        Begun::Http(head, buffer) => Box::pin(http::serve(stream, buffer, *head, shared)).await,
        Begun::BadHttp(error) => Box::pin(http::refuse(stream, error)).await,
    }
}

/// Learns what the client wants, in bounded time and number.
async fn handshake(stream: &mut TcpStream, shared: &Shared) -> Begun {
    let begin = timeout(shared.options.handshake_timeout, begin(stream, shared));
    match shared.waiting.run(begin).await {
        Some(Ok(begun)) => begun,
        Some(Err(_)) | None => Begun::Nothing,
    }
}

/// Loopback is for the own user only; other machines for those who asked for it and set credentials.
fn admits(stream: &TcpStream, client: SocketAddr, shared: &Shared) -> bool {
    if client.ip().to_canonical().is_loopback() {
        let own = stream.local_addr();
        return own.is_ok_and(|own| peer::is_same_user(peer::Protocol::Tcp, client, own));
    }
    shared.options.allow_lan && shared.options.credentials.is_some()
}

/// What a client wants.
enum Begun {
    Socks(Request, BytesMut),
    Http(Box<Head>, BytesMut),
    BadHttp(http::head::HeadError),
    /// It is told this and closed.
    Told(Vec<u8>),
    /// It is gone.
    Nothing,
}

/// A SOCKS client's messages fit in here; a head of HTTP makes it grow.
const FIRST_BUFFER: usize = 512;

async fn begin(stream: &mut TcpStream, shared: &Shared) -> Begun {
    let mut buffer = BytesMut::with_capacity(FIRST_BUFFER);
    if !stream
        .read_buf(&mut buffer)
        .await
        .is_ok_and(|read| read > 0)
    {
        return Begun::Nothing;
    }
    match buffer.first() {
        None => Begun::Nothing,
        Some(4) => Begun::Told(codec::SOCKS4_REJECTED.to_vec()),
        Some(5) => {
            let credentials = shared.options.credentials.as_ref();
            match socks5::negotiate(stream, &mut buffer, credentials).await {
                Ok(request) => Begun::Socks(request, buffer),
                Err(socks5::Failed::Refused(refusal)) => Begun::Told(refusal.reply()),
                Err(socks5::Failed::Gone) => Begun::Nothing,
            }
        }
        Some(_) => match http::read_head(stream, &mut buffer).await {
            Ok(head) => Begun::Http(Box::new(head), buffer),
            Err(NoHead::Bad(error)) => Begun::BadHttp(error),
            Err(NoHead::Gone) => Begun::Nothing,
        },
    }
}

async fn connect(
    mut stream: TcpStream,
    early: BytesMut,
    target: tp_tunnel::Target,
    shared: &Shared,
) {
    // What dialling needs is gone while bytes are relayed.
    match Box::pin(shared.dialer.connect(&target, Kind::Socks)).await {
        Ok((outbound, flow)) => {
            if stream.write_all(&codec::reply(0)).await.is_ok() {
                Box::pin(relay(outbound, flow, stream, early)).await;
            }
        }
        Err(refusal) => Box::pin(tell(stream, &codec::reply(refusal.socks_reply()))).await,
    }
}

async fn associate(mut stream: TcpStream, port: u16, shared: &Shared) {
    let bound = match udp::bind(&stream).await {
        Ok(socket) => socket.local_addr().map(|bound| (socket, bound)),
        Err(error) => Err(error),
    };
    let Ok((socket, bound)) = bound else {
        return Box::pin(tell(stream, &codec::reply(1))).await;
    };
    if stream
        .write_all(&codec::reply_bound(bound.ip(), bound.port()))
        .await
        .is_ok()
    {
        // Ends with the control connection, however that ends.
        let _ = udp::relay(stream, socket, port, shared.dialer.clone()).await;
    }
}

/// Hands a flow over to whoever moves its bytes. What the client sent ahead goes first.
async fn relay(outbound: Outbound, flow: OpenFlow, stream: TcpStream, early: BytesMut) {
    match outbound {
        Outbound::Tunnel(mut tunnel) => {
            if !early.is_empty() {
                flow.up(early.len() as u64);
                if tunnel.send(early.freeze()).await.is_err() {
                    return direct::reset_on_drop(&stream);
                }
            } else {
                drop(early);
            }
            let relayed = tp_tunnel::relay(tunnel, stream).await;
            flow.relayed(&relayed);
        }
        Outbound::Direct(mut origin) => {
            flow.up(early.len() as u64);
            if origin.write_all(&early).await.is_err() {
                return direct::reset_on_drop(&stream);
            }
            drop(early);
            direct::relay(stream, origin, &flow).await;
        }
    }
}

async fn tell(mut stream: TcpStream, message: &[u8]) {
    if stream.write_all(message).await.is_ok() {
        close_politely(stream).await;
    }
}

/// Closes so that what was written last arrives: closing with unread bytes is a RST, which may overtake it.
async fn close_politely(mut stream: TcpStream) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let drain = async {
        let mut left = DRAIN_MAX;
        let mut ignored = [0; 1024];
        while left > 0 {
            match stream.read(&mut ignored).await {
                Ok(read @ 1..) => left = left.saturating_sub(read),
                Ok(0) | Err(_) => return,
            }
        }
    };
    let _ = timeout(DRAIN_TIME, drain).await;
}

/// Bounds what a client that goes on sending costs.
const DRAIN_MAX: usize = 1024 * 1024;
const DRAIN_TIME: Duration = Duration::from_secs(1);
