//! A proxy with a tunnel whose far end dials servers on this machine's loopback, under names of a cluster.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::process::Command;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tp_manager_api::ClusterView;
use tp_tunnel::{DialError, DialErrorKind, Dialed, Service, Target, Tunnel};

use super::super::{Counters, Credentials, Options, Split, Upstream, UserRules, serve};

/// Where each name leads: `host:port` as asked, and the real address.
type Names = Arc<Mutex<HashMap<String, SocketAddr>>>;

/// A running proxy.
pub(super) struct Rig {
    pub(super) proxy: SocketAddr,
    pub(super) counters: Arc<Counters>,
    pub(super) split_tx: watch::Sender<Arc<Split>>,
    tunnel_tx: watch::Sender<Option<Tunnel>>,
    names: Names,
    tasks: JoinSet<()>,
    _shutdown_tx: oneshot::Sender<()>,
}

/// Short limits, so that tests of silence are quick.
pub(super) fn quick() -> Options {
    Options {
        handshake_timeout: Duration::from_millis(400),
        dial_timeout: Duration::from_millis(400),
        ..Options::default()
    }
}

pub(super) fn with_login() -> Options {
    Options {
        credentials: Some(Credentials::new("ada", "love lace")),
        ..Options::default()
    }
}

impl Rig {
    pub(super) async fn start() -> Self {
        Self::with(Options::default()).await
    }

    pub(super) async fn with(options: Options) -> Self {
        let mut rig = Self::without_tunnel(options).await;
        rig.connect_tunnel().await;
        rig
    }

    pub(super) async fn without_tunnel(options: Options) -> Self {
        Self::on(([127, 0, 0, 1], 0).into(), options).await
    }

    /// A proxy that listens on `address`, without a tunnel.
    pub(super) async fn on(address: SocketAddr, options: Options) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let proxy = listener.local_addr().unwrap();
        let (tunnel_tx, tunnel) = watch::channel(None);
        let (split_tx, split) = watch::channel(Arc::new(Split::new(view(), UserRules::default())));
        let counters = Arc::new(Counters::default());
        let (shutdown_tx, shutdown_rx) = oneshot::channel::<()>();
        let mut tasks = JoinSet::new();
        let counted = counters.clone();
        tasks.spawn(async move {
            let shutdown = shutdown_rx.map(|_| ());
            serve(
                vec![listener],
                options,
                Upstream { tunnel, split },
                counted,
                shutdown,
            )
            .await;
        });
        Self {
            proxy,
            counters,
            split_tx,
            tunnel_tx,
            names: Names::default(),
            tasks,
            _shutdown_tx: shutdown_tx,
        }
    }

    /// Brings a tunnel up, as the daemon would after a cut.
    pub(super) async fn connect_tunnel(&mut self) {
        let (near, far) = tokio::io::duplex(1 << 20);
        let service = Arc::new(Cluster(self.names.clone()));
        self.tasks.spawn(async move {
            let _ = tp_tunnel::serve(far, service, std::future::pending()).await;
        });
        let (tunnel, driver) = Tunnel::establish(near).await.unwrap();
        self.tasks.spawn(async move {
            let _ = driver.await;
        });
        self.tunnel_tx.send_replace(Some(tunnel));
    }

    pub(super) fn lose_tunnel(&self) {
        self.tunnel_tx.send_replace(None);
    }

    /// A server in the cluster: every connection is handed to `handler`.
    pub(super) async fn server<F>(
        &mut self,
        name: &str,
        handler: impl Fn(TcpStream) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let address = self.listen(([127, 0, 0, 1], 0).into(), handler).await;
        self.name(name, address);
    }

    /// A server that no name leads to.
    pub(super) async fn listen<F>(
        &mut self,
        address: SocketAddr,
        handler: impl Fn(TcpStream) -> F + Send + 'static,
    ) -> SocketAddr
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        self.tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(handler(stream));
            }
        });
        address
    }

    /// A UDP server that answers what it gets, with `prefix` in front.
    pub(super) async fn udp_echo(&mut self, name: &str, prefix: &'static [u8]) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        self.name(name, socket.local_addr().unwrap());
        self.tasks.spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let _ = socket
                    .send_to(&[prefix, &buffer[..length]].concat(), from)
                    .await;
            }
        });
    }

    pub(super) fn name(&self, name: &str, address: SocketAddr) {
        self.names.lock().unwrap().insert(name.to_owned(), address);
    }

    pub(super) async fn client(&self) -> TcpStream {
        TcpStream::connect(self.proxy).await.unwrap()
    }

    /// Sends `bytes` and reads until the proxy closes.
    pub(super) async fn say(&self, bytes: &[u8]) -> Vec<u8> {
        let mut client = self.client().await;
        client.write_all(bytes).await.unwrap();
        read_to_end(&mut client).await
    }

    /// Runs `curl` with the proxy given as `scheme://[user@]`.
    pub(super) async fn curl(&self, scheme: &str, arguments: &[&str]) -> Output {
        let proxy = format!("{scheme}{}", self.proxy);
        let output = Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--max-time",
                "20",
                "--noproxy",
                "",
                "-x",
                &proxy,
            ])
            .args(arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .expect("curl is installed");
        Output {
            code: output.status.code(),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// What `curl` printed.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) code: Option<i32>,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
}

impl Output {
    pub(super) fn text(&self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Reads until the end, also when that is a reset.
pub(super) async fn read_to_end(client: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(15), client.read_to_end(&mut bytes)).await;
    let _ = read.expect("the proxy closes");
    bytes
}

/// Answers a connection with what it sent, and ends when it ends.
pub(super) async fn echo(mut stream: TcpStream) {
    let (mut reader, mut writer) = stream.split();
    let _ = tokio::io::copy(&mut reader, &mut writer).await;
    let _ = writer.shutdown().await;
}

fn view() -> ClusterView {
    ClusterView {
        namespace: "shop".into(),
        domain: "cluster.local".into(),
        service_ranges: vec!["10.96.0.0/16".parse().unwrap()],
        services: [("shop".to_owned(), vec!["web".to_owned(), "db".to_owned()])].into(),
        ..ClusterView::default()
    }
}

/// The far end. It may dial loopback, where the servers of these tests are.
struct Cluster(Names);

impl Cluster {
    fn find(&self, target: &Target) -> Result<SocketAddr, DialError> {
        let found = self.0.lock().unwrap().get(&target.to_string()).copied();
        let name = target.host.to_string();
        let kind = match name.split('.').next() {
            Some("refused") => DialErrorKind::Refused,
            Some("forbidden") => DialErrorKind::Forbidden,
            Some("unreachable") => DialErrorKind::Unreachable,
            _ => DialErrorKind::Dns,
        };
        found.ok_or_else(|| DialError::new(kind, format!("test says no to {name}")))
    }
}

impl Service for Cluster {
    fn dial(&self, target: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        async move {
            if target.host.to_string().starts_with("filtered.") {
                std::future::pending::<()>().await;
            }
            Ok(TcpStream::connect(self.find(&target)?).await?.into())
        }
        .boxed()
    }

    fn associate(&self, target: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        async move {
            let address = self.find(&target)?;
            let socket = UdpSocket::bind("127.0.0.1:0").await?;
            socket.connect(address).await?;
            // A socket that no poll has seen yet takes nothing by `try_send`; on a real link one has by then.
            socket.writable().await?;
            Ok(socket.into())
        }
        .boxed()
    }

    fn resolve(&self, query: Bytes) -> BoxFuture<'_, Bytes> {
        async move { query }.boxed()
    }

    fn control(&self, _: ::http::Request<Bytes>) -> BoxFuture<'_, ::http::Response<Bytes>> {
        async move { ::http::Response::new(Bytes::new()) }.boxed()
    }
}
