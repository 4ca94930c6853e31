//! What large bodies, and strangers, may make an agent hold: its own 48 MiB and no more.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::future::poll_fn;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use common::{ADA, Client, SEED, ada, frame, server, soon, workstation};
use http::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tp_tunnel::carrier::tls::connect_tls;
use tp_tunnel::{Identity, Settings, Tunnel};

/// Each test wants the machine.
static ALONE: Mutex<()> = Mutex::const_new(());

/// What traffic may add: 48 MiB less the 10 that the shipped program takes at rest (`benches/beside_nginx.rs`). This one has
/// more code, most of it never read.
const BUDGET: usize = 38 << 20;

/// An agent in a process of its own.
struct Process {
    child: Child,
    /// Its memory before any traffic, in bytes.
    at_rest: usize,
    addresses: Vec<SocketAddr>,
    _manager: JoinSet<()>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    /// In front of each of `apps`; requests with `x-tp-user: ada` go to `local`.
    async fn start<const N: usize>(apps: [SocketAddr; N], local: SocketAddr) -> Self {
        let (control, manager) = (free(), Identity::generate());
        let addresses = apps.map(|_| free());
        let pairs = || addresses.iter().zip(&apps);
        let child = Command::new(env!("CARGO_BIN_EXE_tp-agent"))
            .env("TP_AGENT_SEED", SEED)
            .env("TP_LOG", "warn")
            .args(["--control", &control.to_string()])
            .args(["--manager-key", &manager.key_hash().to_string()])
            .args(pairs().map(|(address, app)| format!("--listen={address}={app}")))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut intercepts = ada(false);
        intercepts.as_array_mut().unwrap().push(json!({
            "id": "uid-eve", "created": 2,
            "matchers": [{"path": {"exact": "/look"}}, {"graphql": {"operation": "Look"}}]
        }));
        let ports = pairs().map(|(address, app)| {
            json!({"listen": address.port(), "app": app.port(), "intercepts": intercepts})
        });
        let table = json!({"ports": ports.collect::<Vec<_>>()}).to_string();
        let (routed_tx, mut routed_rx) = mpsc::channel(1);
        let manager = Manager {
            control,
            identity: manager,
            table: table.into(),
            local,
            routed_tx,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(manager.run());
        soon(routed_rx.recv()).await.unwrap();
        let at_rest = peak(&child);
        Self {
            child,
            at_rest,
            addresses: addresses.to_vec(),
            _manager: tasks,
        }
    }

    /// So many strangers come and stay: a neighbour is answered, and it keeps within its budget.
    async fn bears(&self, what: &str, number: usize, kind: &Stranger) -> Vec<Box<dyn Send>> {
        let strangers = (0..number).map(|_| kind.clone().come(self.addresses.clone()));
        let strangers = strangers.collect::<JoinSet<_>>().join_all().await;
        let answer = Client::to(self.addresses[0]).await.get("/", "").await;
        assert!(answer.ends_with("xxx"), "{what}: {answer}");
        let held = self.held();
        eprintln!("{what}: {} KiB", held >> 10);
        assert!(held <= BUDGET, "{what}: {held} bytes");
        strangers
    }

    /// What strangers held can be used again: while there is none, requests pass unparsed.
    async fn recovers(&self) {
        let mine = async || Client::to(self.addresses[0]).await.get("/", ADA).await;
        soon(async {
            while !mine().await.contains("local") {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
    }

    /// The most memory that it ever had beside what it has at rest, in bytes.
    fn held(&self) -> usize {
        peak(&self.child) - self.at_rest
    }
}

/// What the agent has for a manager. Like a real one it connects again: on a busy machine its heartbeat is late at times,
/// and the agent drops a manager that is silent for three seconds.
struct Manager {
    control: SocketAddr,
    identity: Identity,
    table: Bytes,
    local: SocketAddr,
    /// Hears each time that the agent has taken the routes.
    routed_tx: mpsc::Sender<()>,
}

impl Manager {
    async fn run(self) {
        loop {
            // Why it ended is the next one's to find.
            let _ = self.serve().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// One connection, to its end.
    async fn serve(&self) -> std::io::Result<()> {
        let tcp = TcpStream::connect(self.control).await?;
        tp_tunnel::carrier::tune(&tcp)?;
        let pinned = Identity::from_seed(SEED).unwrap().key_hash();
        let tls = connect_tls(tcp, &self.identity, &pinned)
            .await
            .map_err(std::io::Error::other)?;
        let settings = Settings {
            ping_interval: Duration::from_secs(1),
            ..Settings::default()
        };
        let established = Tunnel::establish_with(tls, settings).await;
        let (tunnel, driver) = established.map_err(std::io::Error::other)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(driver.await) });
        for _ in 0..16 {
            tasks.spawn(workstation(tunnel.clone(), self.local, Default::default()));
        }
        loop {
            let answer = tunnel.control(Method::PUT, "/v1/routes", self.table.clone());
            let answer = answer.await.map_err(std::io::Error::other)?;
            assert_eq!(answer.status(), StatusCode::NO_CONTENT);
            let _ = self.routed_tx.try_send(());
            // The lease ends after 15 s.
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(4)) => {}
                () = tunnel.closed() => return Ok(()),
            }
        }
    }
}

fn peak(process: &Child) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: usize = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib << 10
}

fn free() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// Bodies are this again and again; its size is prime, so that no buffer's size divides it.
static PATTERN: LazyLock<Arc<[u8]>> = LazyLock::new(|| {
    let mut word = 1u32;
    (0..1_048_573)
        .map(|_| {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            word.to_be_bytes()[0]
        })
        .collect()
});

/// A place in a body.
#[derive(Default)]
struct Cursor(usize);

impl Cursor {
    /// The next bytes of the pattern, at most `most`.
    fn piece(&self, most: usize) -> &'static [u8] {
        let start = self.0 % PATTERN.len();
        &PATTERN[start..PATTERN.len().min(start + most)]
    }

    async fn send(&mut self, tcp: &mut TcpStream, size: usize) {
        while self.0 < size {
            let piece = self.piece((size - self.0).min(64 << 10));
            tcp.write_all(piece).await.unwrap();
            self.0 += piece.len();
        }
    }

    fn check(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let piece = self.piece(bytes.len());
            assert!(piece == &bytes[..piece.len()], "corrupt near {}", self.0);
            self.0 += piece.len();
            bytes = &bytes[piece.len()..];
        }
    }

    async fn receive(&mut self, tcp: &mut TcpStream, size: usize) {
        let mut buf = vec![0; 64 << 10];
        while self.0 < size {
            let most = buf.len().min(size - self.0);
            let got = tcp.read(&mut buf[..most]).await.unwrap();
            assert_ne!(got, 0, "ended after {} bytes", self.0);
            self.check(&buf[..got]);
        }
    }
}

/// Bytes of one body; four of them each way are a GiB.
const BODY: usize = 256 << 20;

/// Reads a head, byte after byte; an empty one is the end.
async fn head(tcp: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match tcp.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) if head.is_empty() => break,
            Err(error) => panic!("{error} in {:?}", String::from_utf8_lossy(&head)),
        }
    }
    String::from_utf8(head).unwrap()
}

/// Takes a body that is PUT, and gives one that is asked for.
async fn bodies(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let head = head(&mut tcp).await;
                let size = match head.get(..3) {
                    Some("PUT") => {
                        Cursor::default().receive(&mut tcp, BODY).await;
                        0
                    }
                    Some(_) => BODY,
                    None => return,
                };
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nX-Served-By: {name}\r\nContent-Length: {size}\r\n\r\n"
                );
                tcp.write_all(answer.as_bytes()).await.unwrap();
                Cursor::default().send(&mut tcp, size).await;
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gibibyte_each_way_leaves_memory_flat() {
    let _alone = ALONE.lock().await;
    let agent = Process::start([bodies("app").await], bodies("local").await).await;
    let mut transfers = JoinSet::new();
    for (n, method) in ["GET", "PUT"].repeat(4).into_iter().enumerate() {
        let (fields, who) = if n % 4 < 2 {
            (ADA, "local")
        } else {
            ("", "app")
        };
        let address = agent.addresses[0];
        transfers.spawn(async move {
            let mut tcp = TcpStream::connect(address).await.unwrap();
            let (length, up, down) = match method {
                "PUT" => (format!("Content-Length: {BODY}\r\n"), BODY, 0),
                _ => (String::new(), 0, BODY),
            };
            let request = format!("{method} / HTTP/1.1\r\nHost: web\r\n{fields}{length}\r\n");
            tcp.write_all(request.as_bytes()).await.unwrap();
            Cursor::default().send(&mut tcp, up).await;
            let head = head(&mut tcp).await;
            assert!(head.contains(&format!("X-Served-By: {who}\r\n")), "{head}");
            Cursor::default().receive(&mut tcp, down).await;
        });
    }
    let all = tokio::time::timeout(Duration::from_secs(240), transfers.join_all());
    all.await.expect("done within four minutes");
    let held = agent.held();
    eprintln!("{} KiB", held >> 10);
    assert!(held <= BUDGET, "{held} bytes");
}

/// An application that sends large bodies to those who ask for `/big`, and reads none.
async fn generous() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                // Strangers end in the middle of what they say.
                let mut said = vec![0; 4096];
                let size = tcp.read(&mut said).await.unwrap_or_default();
                let big = String::from_utf8_lossy(&said[..size]).starts_with("GET /big");
                let body = if big { BODY } else { 3 };
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {body}\r\n\r\n");
                let mut sent = tcp.write_all(answer.as_bytes()).await;
                let mut left = body;
                while left > 0 && sent.is_ok() {
                    let piece = left.min(64 << 10);
                    sent = tcp.write_all(&vec![b'x'; piece]).await;
                    left -= piece;
                }
                // Those who do not go on are not closed.
                let _ = tcp.read(&mut said).await;
            });
        }
    });
    address
}

/// The same in HTTP/2.
async fn generous_h2() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(tcp).await else {
                    return;
                };
                // Requests and their bodies are kept and not read.
                let mut kept = Vec::new();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let sent = respond.send_response(http::Response::new(()), false);
                    if let Ok(mut stream) = sent {
                        stream.reserve_capacity(1 << 20);
                        let _ = stream.send_data(Bytes::from(vec![b'x'; 256 << 10]), false);
                        kept.push((request, stream));
                    }
                }
            });
        }
    });
    address
}

/// A client that says something, and reads nothing.
#[derive(Clone)]
enum Stranger {
    Http1(String),
    /// With its windows opened wide.
    Http2(Vec<u8>),
    /// The same, within the windows that it is granted: so many requests for `path`, each with `body` bytes of JSON and no
    /// end.
    Patient {
        path: &'static str,
        streams: usize,
        body: usize,
    },
}

impl Stranger {
    /// Sends `streams` requests, each with `body` bytes in frames of `piece` and no end, whatever it is granted.
    fn h2(streams: u32, body: usize, piece: usize) -> Self {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        // SETTINGS_INITIAL_WINDOW_SIZE, and the connection's window.
        bytes.extend(frame(4, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]));
        bytes.extend(frame(8, 0, 0, &0x7fff_0000u32.to_be_bytes()));
        // POST http://a/, in HPACK.
        let headers = [0x83, 0x86, 0x84, 0x41, 0x01, b'a'];
        for n in 0..streams {
            bytes.extend(frame(1, 4, 2 * n + 1, &headers));
            for piece in vec![b' '; body].chunks(piece) {
                bytes.extend(frame(0, 0, 2 * n + 1, piece));
            }
        }
        Self::Http2(bytes)
    }

    /// To the port of its protocol. It stays until what it returns is dropped.
    async fn come(self, ports: Vec<SocketAddr>) -> Box<dyn Send> {
        let (port, said) = match self {
            Self::Http1(said) => (ports[0], said.into_bytes()),
            Self::Http2(said) => (ports[1], said),
            Self::Patient {
                path,
                streams,
                body,
            } => return Box::new(patient(ports[1], path, streams, body).await),
        };
        let mut tcp = TcpStream::connect(port).await.unwrap();
        // What does not go through within a while is not taken: it is full.
        let _ = tokio::time::timeout(Duration::from_secs(3), tcp.write_all(&said)).await;
        Box::new(tcp)
    }
}

async fn patient(port: SocketAddr, path: &str, streams: usize, body: usize) -> impl Send + use<> {
    let tcp = TcpStream::connect(port).await.unwrap();
    let mut client = h2::client::Builder::new();
    client
        .initial_connection_window_size(1 << 30)
        .initial_window_size(1 << 30);
    let (mut requests, connection) = client.handshake(tcp).await.unwrap();
    let mut driver = JoinSet::new();
    driver.spawn(async move { drop(connection.await) });
    let mut sending = JoinSet::new();
    let mut kept = Vec::new();
    for _ in 0..streams {
        let request = http::Request::post(format!("http://web{path}"))
            .header("content-type", "application/json")
            .body(())
            .unwrap();
        requests = requests.ready().await.unwrap();
        let (response, mut stream) = requests.send_request(request, false).unwrap();
        kept.push(response);
        sending.spawn(async move {
            let mut left = body;
            while left > 0 {
                stream.reserve_capacity(left);
                let room = poll_fn(|cx| stream.poll_capacity(cx)).await;
                let room = room.unwrap().unwrap();
                let piece = Bytes::from(vec![b' '; room]);
                stream.send_data(piece, false).unwrap();
                left -= room;
            }
            stream
        });
    }
    // What does not go through within a while is not taken: it is full.
    let full = tokio::time::sleep(Duration::from_secs(4));
    let done = async {
        let mut done = Vec::new();
        while let Some(sent) = sending.join_next().await {
            done.push(sent.unwrap());
        }
        done
    };
    let sent = tokio::select! {
        done = done => done,
        () = full => Vec::new(),
    };
    (driver, sending, sent, kept, requests)
}

/// RFC 9113 §10.5, and the slow clients of every decade: each kind alone, and all of them at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_do_not_make_it_hold_more_than_its_budget() {
    let _alone = ALONE.lock().await;
    let local = server("local").await;
    let apps = [generous().await, generous_h2().await];
    let head = format!("GET / HTTP/1.1\r\nHost: web\r\nX: {}", "a".repeat(60_000));
    let big = "GET /big HTTP/1.1\r\nHost: web\r\n\r\n".to_owned();
    let patient = |path, body| Stranger::Patient {
        path,
        streams: 100,
        body,
    };
    let kinds = [
        ("heads that do not end", 400, Stranger::Http1(head)),
        ("answers that are not read", 400, Stranger::Http1(big)),
        ("streams without answers", 50, Stranger::h2(128, 0, 1)),
        ("a byte a frame", 50, Stranger::h2(4, 16_000, 1)),
        ("bodies that nobody reads", 50, patient("/", 65_535)),
        ("bodies to look into", 50, patient("/look", 131_070)),
    ];
    for (what, number, kind) in &kinds {
        let agent = Process::start(apps, local.address).await;
        drop(agent.bears(what, *number, kind).await);
        agent.recovers().await;
    }
    let agent = Process::start(apps, local.address).await;
    let mut held = Vec::new();
    for (what, number, kind) in &kinds {
        held.push(agent.bears(what, *number, kind).await);
    }
    drop(held);
    agent.recovers().await;
}
