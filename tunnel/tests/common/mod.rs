//! A connection on loopback with kernel sockets at both ends, and a service that reaches loopback only.

#![expect(unreachable_pub, reason = "shared by several test binaries")]
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]
#![allow(dead_code, reason = "no test binary uses all of it")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tp_tunnel::{
    DialError, DialErrorKind, Dialed, Host, Service, Settings, Target, Tunnel, TunnelError, relay,
    serve_with,
};

/// Dials addresses as they are; names ending in `.test` fail or hang as they say.
#[derive(Default)]
pub struct Loopback {
    /// Dials of `hang.test` under way.
    pub hanging: Arc<AtomicUsize>,
    /// The permission that all flows but those to `localhost` stand on.
    pub permit: CancellationToken,
}

struct Hanging(Arc<AtomicUsize>);

impl Drop for Hanging {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Loopback {
    async fn address(&self, target: &Target) -> Result<SocketAddr, DialError> {
        let name = match &target.host {
            Host::Ip(ip) => return Ok(SocketAddr::new(*ip, target.port)),
            Host::Name(name) => name.as_str(),
        };
        match name {
            "localhost" => Ok(SocketAddr::new([127, 0, 0, 1].into(), target.port)),
            "hang.test" => {
                self.hanging.fetch_add(1, Ordering::SeqCst);
                let _hanging = Hanging(Arc::clone(&self.hanging));
                std::future::pending().await
            }
            "late.test" => {
                tokio::time::sleep(Duration::from_millis(200)).await;
                Ok(SocketAddr::new([127, 0, 0, 1].into(), target.port))
            }
            "timeout.test" => Err(DialError::new(DialErrorKind::TimedOut, "5 s passed")),
            "forbidden.test" => Err(DialError::new(
                DialErrorKind::Forbidden,
                "namespace \"b\" is not yours",
            )),
            other => Err(DialError::new(
                DialErrorKind::Dns,
                format!("no such name: {other}"),
            )),
        }
    }
}

impl Service for Loopback {
    fn dial(&self, target: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        Box::pin(async move {
            let socket = TcpStream::connect(self.address(&target).await?).await?;
            let own = target.host == Host::Name("localhost".to_owned());
            let revoked = (!own).then(|| self.permit.clone());
            Ok(Dialed { socket, revoked })
        })
    }

    fn associate(&self, target: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        Box::pin(async move {
            let address = self.address(&target).await?;
            let socket = UdpSocket::bind("127.0.0.1:0").await?;
            socket.connect(address).await?;
            Ok(socket.into())
        })
    }

    fn resolve(&self, query: Bytes) -> BoxFuture<'_, Bytes> {
        Box::pin(async move { query.iter().rev().copied().collect() })
    }

    fn control(&self, request: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        Box::pin(async move {
            match request.uri().path() {
                "/v1/health" => Response::new(Bytes::from_static(b"{\"replica\":\"test\"}")),
                "/v1/large" => Response::new(vec![b'x'; 5 << 20].into()),
                _ => Response::new(
                    format!(
                        "{} {} {}",
                        request.method(),
                        request.uri(),
                        request.body().len()
                    )
                    .into(),
                ),
            }
        })
    }
}

pub struct Connection {
    pub tunnel: Tunnel,
    pub driver: JoinHandle<Result<(), TunnelError>>,
    pub server: JoinHandle<Result<(), TunnelError>>,
    pub shutdown: oneshot::Sender<()>,
    pub hanging: Arc<AtomicUsize>,
    pub permit: CancellationToken,
}

/// A connection over an in-memory carrier of 256 KiB.
pub async fn connection() -> Connection {
    connection_with(Settings::default()).await
}

pub async fn connection_with(settings: Settings) -> Connection {
    let (ours, theirs) = duplex(256 * 1024);
    over(ours, theirs, settings).await
}

pub async fn over(ours: DuplexStream, theirs: DuplexStream, settings: Settings) -> Connection {
    let service = Loopback::default();
    let hanging = Arc::clone(&service.hanging);
    let permit = service.permit.clone();
    let (shutdown, stopped) = oneshot::channel::<()>();
    let stopped = async {
        // A dropped sender is no request to stop.
        if stopped.await.is_err() {
            std::future::pending().await
        }
    };
    let server = tokio::spawn(serve_with(
        theirs,
        Arc::new(service),
        settings.clone(),
        stopped,
    ));
    let (tunnel, driver) = Tunnel::establish_with(ours, settings).await.unwrap();
    Connection {
        tunnel,
        driver: tokio::spawn(driver),
        server,
        shutdown,
        hanging,
        permit,
    }
}

pub fn target(address: SocketAddr) -> Target {
    Target::new(Host::Ip(address.ip()), address.port())
}

pub async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A kernel socket whose other end is relayed to `target` through the tunnel.
pub async fn through(tunnel: &Tunnel, target: Target) -> TcpStream {
    let (listener, address) = listener().await;
    let app = TcpStream::connect(address).await.unwrap();
    let (captured, _) = listener.accept().await.unwrap();
    let flow = tunnel.connect(&target).await.unwrap();
    tokio::spawn(relay(flow, captured));
    app
}

/// The two kernel sockets at the ends of one flow: the application's and the destination's.
pub async fn ends(tunnel: &Tunnel) -> (TcpStream, TcpStream) {
    let (listener, address) = listener().await;
    let (app, accepted) = tokio::join!(through(tunnel, target(address)), listener.accept());
    (app, accepted.unwrap().0)
}

/// A flow whose application reads nothing: its end of the socket, and who sends to it. Returns when the tunnel holds
/// bytes for it, so flows fall behind in the order of these calls.
pub async fn stalled_flow(tunnel: &Tunnel) -> (TcpStream, JoinHandle<()>) {
    let (captures, address) = listener().await;
    let (serves, destination) = listener().await;
    let app = TcpStream::connect(address).await.unwrap();
    let (captured, _) = captures.accept().await.unwrap();
    // The kernel doubles both. Less than this, and what it takes of the application's bytes would be as much again.
    socket2::SockRef::from(&app)
        .set_recv_buffer_size(KERNEL_TAKES / 8)
        .unwrap();
    socket2::SockRef::from(&captured)
        .set_send_buffer_size(KERNEL_TAKES / 8)
        .unwrap();
    let before = tunnel.traffic().bytes_down;
    let flow = tunnel.connect(&target(destination)).await.unwrap();
    let (mut server, _) = serves.accept().await.unwrap();
    tokio::spawn(relay(flow, captured));
    let feeder = tokio::spawn(async move { while server.write_all(&[1; 65_536]).await.is_ok() {} });
    eventually("more has come than the kernel takes", || {
        tunnel.traffic().bytes_down - before >= 2 * KERNEL_TAKES as u64
    })
    .await;
    (app, feeder)
}

/// Bytes that the two kernel sockets between a relay and a stalled application take at the most.
const KERNEL_TAKES: usize = 256 * 1024;

/// Bytes that differ everywhere, so that a loss, a repetition or a mix-up shows.
pub fn pattern(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(size + 8);
    while out.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(size);
    out
}

pub async fn read_all(tcp: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    tcp.read_to_end(&mut all).await.map(|_| all)
}

pub async fn send_and_finish(tcp: &mut TcpStream, data: &[u8]) {
    tcp.write_all(data).await.unwrap();
    tcp.shutdown().await.unwrap();
}

pub async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("done within 20 s")
}

pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 5 s: {what}");
}
