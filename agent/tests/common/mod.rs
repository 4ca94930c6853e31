//! An agent in this process, between a client and two servers: the application, and a workstation's local one.

#![expect(unreachable_pub, reason = "shared by several test binaries")]
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]
#![allow(dead_code, reason = "no test binary uses all of it")]

pub mod others;
pub mod pod;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tp_agent::worker::{Destination, Inbound, Listeners, Worker, serve};
use tp_manager_api::sighting::{OFFER, Sighting};
use tp_tunnel::carrier::tls::connect_tls;
use tp_tunnel::{Identity, Incoming, Settings, Tunnel, relay};

pub const SEED: &str = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";

pub struct Agent {
    /// Where clients connect.
    pub address: SocketAddr,
    /// The application behind it.
    pub app: Server,
    /// The workstation's local server.
    pub local: Server,
    /// The manager's connection.
    pub tunnel: Tunnel,
    pub control: SocketAddr,
    watcher: Watcher,
    driver: AbortHandle,
    stop: Option<oneshot::Sender<()>>,
    /// Dropped with everything else.
    _running: JoinSet<()>,
}

pub const ADA: &str = "x-tp-user: ada\r\n";

/// An agent whose requests with `x-tp-user: ada` go to the local server.
pub async fn agent() -> Agent {
    let agent = agent_with(
        server("app").await,
        server("local").await,
        Duration::from_secs(15),
    )
    .await;
    agent.push(ada(false)).await;
    agent
}

pub fn ada(strict: bool) -> Value {
    json!([{
        "id": "uid-ada", "created": 1, "strict": strict,
        "matchers": [{"header": {"name": "x-tp-user", "exact": "ada"}}]
    }])
}

pub async fn agent_with(app: Server, local: Server, lease: Duration) -> Agent {
    let bound = || TcpListener::bind("127.0.0.1:0");
    let (inbound, control) = (bound().await.unwrap(), bound().await.unwrap());
    let (address, control_address) = (inbound.local_addr().unwrap(), control.local_addr().unwrap());
    let listeners = Listeners {
        inbound: vec![Inbound {
            socket: inbound,
            destination: Destination::App(app.address),
        }],
        control,
    };
    let (identity, manager) = (Identity::from_seed(SEED).unwrap(), Identity::generate());
    let (stop, stopped) = oneshot::channel::<()>();
    let (key, pinned) = (manager.key_hash(), identity.key_hash());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let stopped = async { drop(stopped.await) };
        let worker = Worker {
            listeners,
            identity,
            manager: key,
            lease,
            parent: None,
        };
        serve(worker, |_| Ok(()), stopped).await.unwrap();
    });
    let tcp = TcpStream::connect(control_address).await.unwrap();
    tp_tunnel::carrier::tune(&tcp).unwrap();
    let tls = connect_tls(tcp, &manager, &pinned).await.unwrap();
    let settings = Settings {
        ping_interval: Duration::from_secs(1),
        ..Settings::default()
    };
    let (tunnel, driver) = Tunnel::establish_with(tls, settings).await.unwrap();
    let driver = tasks.spawn(async move { drop(driver.await) });
    let watcher = Watcher::default();
    for _ in 0..8 {
        tasks.spawn(workstation(
            tunnel.clone(),
            local.address,
            Arc::clone(&watcher),
        ));
    }
    Agent {
        address,
        app,
        local,
        tunnel,
        control: control_address,
        watcher,
        driver,
        stop: Some(stop),
        _running: tasks,
    }
}

/// Where sightings go while somebody watches.
pub type Watcher = Arc<Mutex<Option<mpsc::UnboundedSender<Sighting>>>>;

/// Takes every flow for the local address.
pub async fn workstation(tunnel: Tunnel, local: SocketAddr, watcher: Watcher) {
    let mut flows = JoinSet::new();
    while let Ok(incoming) = tunnel.accept().await {
        if incoming.intercept().starts_with(OFFER) {
            let watching = watcher.lock().unwrap().clone();
            match watching {
                Some(watching) => drop(flows.spawn(watch(incoming, watching))),
                None => incoming.refuse().await,
            }
            continue;
        }
        flows.spawn(async move {
            match TcpStream::connect(local).await {
                Ok(tcp) => {
                    if let Ok(flow) = incoming.opened().await {
                        relay(flow, tcp).await;
                    }
                }
                Err(_) => incoming.refuse().await,
            }
        });
    }
}

async fn watch(incoming: Incoming, watching: mpsc::UnboundedSender<Sighting>) {
    let (reader, _writer) = incoming.opened().await.unwrap().into_io();
    let mut lines = BufReader::new(reader).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if watching.send(serde_json::from_str(&line).unwrap()).is_err() {
            return;
        }
    }
}

impl Agent {
    /// Watches from now on.
    pub fn watch(&self) -> mpsc::UnboundedReceiver<Sighting> {
        let (watching, sightings) = mpsc::unbounded_channel();
        *self.watcher.lock().unwrap() = Some(watching);
        sightings
    }

    /// Replaces the intercepts of the one port.
    pub async fn push(&self, intercepts: Value) {
        let (status, why) = self.try_push(intercepts).await;
        assert_eq!(status, StatusCode::NO_CONTENT, "{why}");
    }

    pub async fn try_push(&self, intercepts: Value) -> (StatusCode, String) {
        let table = json!({"ports": [{
            "listen": self.address.port(), "app": self.app.address.port(), "intercepts": intercepts
        }]});
        let body = table.to_string().into();
        let answer = self
            .tunnel
            .control(Method::PUT, "/v1/routes", body)
            .await
            .unwrap();
        let why = String::from_utf8(answer.body().to_vec()).unwrap();
        (answer.status(), why)
    }

    /// Ends the manager's connection as a crash would.
    pub fn cut_manager(&self) {
        self.driver.abort();
    }

    /// As SIGTERM does.
    pub fn stop(&mut self) {
        self.stop = None;
    }

    pub async fn connect(&self) -> Client {
        Client::to(self.address).await
    }
}

/// A server that answers every HTTP/1 request with its name, and remembers every byte it got.
pub struct Server {
    pub address: SocketAddr,
    received: Arc<Mutex<Vec<u8>>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Stands for an address that the test itself serves, or nobody.
    pub fn at(address: SocketAddr) -> Self {
        Self {
            address,
            received: Arc::default(),
            task: tokio::spawn(std::future::ready(())),
        }
    }

    /// What it got so far, of all connections.
    pub fn received(&self) -> String {
        String::from_utf8(self.received.lock().unwrap().clone()).unwrap()
    }

    pub fn forget(&self) {
        self.received.lock().unwrap().clear();
    }

    /// How many requests it got.
    pub fn requests(&self) -> usize {
        self.received().matches(" HTTP/1.").count()
    }
}

/// A server that answers `NAME METHOD TARGET SIZE-OF-BODY`.
pub async fn server(name: &'static str) -> Server {
    scripted(move |head, body| {
        let line = head.lines().next().unwrap();
        let text = format!("{name} {} {}", line.rsplit_once(' ').unwrap().0, body.len());
        let size = text.len();
        format!("HTTP/1.1 200 OK\r\nx-Served-By: {name}\r\nContent-Length: {size}\r\n\r\n{text}")
    })
    .await
}

/// A server that answers what `answer` says; an answer of nothing ends the connection with a reset.
pub async fn scripted(answer: impl Fn(&str, &[u8]) -> String + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let received = Arc::new(Mutex::new(Vec::new()));
    let (log, answer) = (Arc::clone(&received), Arc::new(answer));
    let task = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((tcp, _)) = listener.accept().await {
            connections.spawn(serve_one(tcp, Arc::clone(&log), Arc::clone(&answer)));
        }
    });
    Server {
        address,
        received,
        task,
    }
}

async fn serve_one(
    mut tcp: TcpStream,
    log: Arc<Mutex<Vec<u8>>>,
    answer: Arc<impl Fn(&str, &[u8]) -> String>,
) {
    let mut buf = Vec::new();
    loop {
        let Some((head, body, size)) = whole(&buf) else {
            let mut piece = [0; 4096];
            match tcp.read(&mut piece).await {
                Ok(0) | Err(_) => return,
                Ok(size) => {
                    log.lock().unwrap().extend_from_slice(&piece[..size]);
                    buf.extend_from_slice(&piece[..size]);
                }
            }
            continue;
        };
        let answered = answer(&head, &body);
        buf.drain(..size);
        if answered.is_empty() {
            tcp.set_zero_linger().unwrap();
            return;
        }
        if tcp.write_all(answered.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Head, body as it was sent, and size of the first message, once it is complete.
fn whole(buf: &[u8]) -> Option<(String, Vec<u8>, usize)> {
    let end = buf.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = String::from_utf8(buf[..end].to_vec()).unwrap();
    let lower = head.to_ascii_lowercase();
    let body = if lower.contains("transfer-encoding: chunked") {
        let last = buf[end - 2..]
            .windows(5)
            .position(|five| five == b"\r\n0\r\n")?;
        let trailers = &buf[end + last + 3..];
        let size = match trailers.starts_with(b"\r\n") {
            true => 2,
            false => trailers.windows(4).position(|four| four == b"\r\n\r\n")? + 4,
        };
        last + 3 + size
    } else {
        let length = lower
            .split_once("content-length: ")
            .map_or("0", |(_, rest)| rest);
        length.split("\r\n").next().unwrap().parse().unwrap()
    };
    let body_end = end + body;
    (buf.len() >= body_end).then(|| (head, buf[end..body_end].to_vec(), body_end))
}

/// A client that speaks bytes.
pub struct Client {
    pub tcp: TcpStream,
    buf: Vec<u8>,
}

impl Client {
    pub async fn to(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).await.unwrap())
    }

    pub fn over(tcp: TcpStream) -> Self {
        tcp.set_nodelay(true).unwrap();
        Self {
            tcp,
            buf: Vec::new(),
        }
    }

    pub async fn try_send(&mut self, text: &str) -> std::io::Result<()> {
        self.tcp.write_all(text.as_bytes()).await
    }

    pub async fn send(&mut self, text: &str) {
        self.tcp.write_all(text.as_bytes()).await.unwrap();
    }

    /// One answer, head and body as they came.
    pub async fn answer(&mut self) -> String {
        soon(async {
            loop {
                if let Some((head, body, size)) = whole(&self.buf) {
                    self.buf.drain(..size);
                    return head + std::str::from_utf8(&body).unwrap();
                }
                let size = self.tcp.read_buf(&mut self.buf).await.unwrap();
                assert_ne!(
                    size,
                    0,
                    "the connection ended in {:?}",
                    String::from_utf8_lossy(&self.buf)
                );
            }
        })
        .await
    }

    pub async fn get(&mut self, target: &str, fields: &str) -> String {
        self.send(&format!(
            "GET {target} HTTP/1.1\r\nHost: web\r\n{fields}\r\n"
        ))
        .await;
        self.answer().await
    }

    /// Everything up to the end; an error if that is a reset.
    pub async fn rest(mut self) -> std::io::Result<String> {
        soon(self.tcp.read_to_end(&mut self.buf)).await?;
        Ok(String::from_utf8_lossy(&self.buf).into_owned())
    }
}

pub async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("done within 20 s")
}

/// Plays a server by hand: reads what it expects, then says something.
pub async fn expect(tcp: &mut TcpStream, end: &str) -> String {
    let mut all = Vec::new();
    while !all.ends_with(end.as_bytes()) {
        let size = soon(tcp.read_buf(&mut all)).await.unwrap();
        assert_ne!(size, 0, "{}", String::from_utf8_lossy(&all));
    }
    String::from_utf8(all).unwrap()
}

/// One frame of HTTP/2 (RFC 9113 §4.1).
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}
