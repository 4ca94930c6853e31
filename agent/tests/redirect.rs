//! The packet filter's rule in a network namespace of its own: who is redirected, and what is left when everything dies.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use common::pod::{Pod, dial, in_a_pod, until};
use common::{Client, ada, server, soon, workstation};
use http::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tp_tunnel::{Identity, Tunnel};

const APP: &str = "
import http.server, socket
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        body = f'app for {self.headers.get(\"x-forwarded-for\")} from {self.client_address[0].removeprefix(\"::ffff:\")}'.encode()
        self.send_response(200)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 128
Server(('::', 8080), Handler).serve_forever()
";

fn start_app(pod: &mut Pod) {
    let mut python = pod.command("python3");
    python.args(["-c", APP]);
    pod.start(python);
}

const WEB: &str = "10.77.0.2:8080";
const WEB_V6: &str = "[fd77::2]:8080";

/// The body of one answer on a new connection, unless that fails.
async fn get(fields: &str) -> std::io::Result<String> {
    get_at(WEB, fields).await
}

async fn get_at(address: &str, fields: &str) -> std::io::Result<String> {
    let address: SocketAddr = address.parse().unwrap();
    let tcp = TcpStream::connect(address).await?;
    let mut client = Client::over(tcp);
    client
        .try_send(&format!(
            "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n{fields}\r\n"
        ))
        .await?;
    let all = client.rest().await?;
    match all.split_once("\r\n\r\n") {
        Some((_, body)) if !body.is_empty() => Ok(body.to_owned()),
        _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Dials the agent as its manager does, pushes the route of ada and takes flows for the local address.
async fn manage(manager: &Identity, local: SocketAddr) -> Tunnel {
    let tunnel = dial(manager).await;
    tokio::spawn(workstation(tunnel.clone(), local, Default::default()));
    push(&tunnel, &ada(false)).await;
    tunnel
}

async fn push(tunnel: &Tunnel, intercepts: &Value) {
    let table = json!({"ports": [{"listen": 8080, "app": 8080, "intercepts": intercepts}]});
    let answer = tunnel
        .control(Method::PUT, "/v1/routes", table.to_string().into())
        .await
        .unwrap();
    assert_eq!(answer.status(), StatusCode::NO_CONTENT);
}

async fn connections(tunnel: &Tunnel, method: Method) -> Value {
    let answer = tunnel
        .control(method, "/v1/connections", bytes::Bytes::new())
        .await
        .unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    serde_json::from_slice(answer.body()).unwrap()
}

fn worker_of(parent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn signal(process: u32, signal: Signal) {
    let process = Pid::from_raw(process.try_into().unwrap()).unwrap();
    kill_process(process, signal).unwrap();
}

const ADA: &str = common::ADA;
const DIRECT: &str = "app for None from 10.77.0.1";
/// Redirected when the last intercept had just gone.
const PASSED: &str = "app for None from 10.77.0.2";
const ROUTED: &str = "app for 10.77.0.1 from 10.77.0.2";

#[test]
fn what_is_redirected_fails_open_whatever_dies() {
    in_a_pod("dies", redirected);
}

#[test]
fn coming_and_going_harms_nobody() {
    in_a_pod("comes", comes_and_goes);
}

/// Others at a constant rate, each on a connection of its own, for as long as the intercept comes and goes.
async fn comes_and_goes(pod: &mut Pod) {
    start_app(pod);
    let limit = Duration::from_secs(10);
    until("the application answers", limit, async || {
        get("").await.is_ok()
    })
    .await;
    let (manager, local) = (Identity::generate(), server("local").await);
    pod.start_agent(&manager);
    let tunnel = manage(&manager, local.address).await;
    let mut kept = Client::over(TcpStream::connect(WEB).await.unwrap());
    let others = tokio::spawn(async {
        let mut every = tokio::time::interval(Duration::from_millis(5));
        let mut requests = tokio::task::JoinSet::new();
        loop {
            every.tick().await;
            requests.spawn(get(""));
            while let Some(answer) = requests.try_join_next() {
                let answer = answer.unwrap().unwrap();
                assert!([DIRECT, ROUTED, PASSED].contains(&&*answer), "{answer}");
                ANSWERED.fetch_add(1, Relaxed);
            }
        }
    });
    for turn in 0..100 {
        push(&tunnel, &ada(true)).await;
        // From the moment that the push is answered, on new connections and on one that was open.
        assert_eq!(get(ADA).await.unwrap(), "local GET / 0", "{turn}");
        assert!(kept.get("/", ADA).await.ends_with("local GET / 0"));
        push(&tunnel, &json!([])).await;
        assert_ne!(get(ADA).await.unwrap(), "local GET / 0", "{turn}");
        assert!(kept.get("/", ADA).await.ends_with(ROUTED));
        assert!(!others.is_finished());
    }
    others.abort();
    assert!(others.await.unwrap_err().is_cancelled());
    let answered = ANSWERED.load(Relaxed);
    eprintln!("{answered} requests of others were answered, all of them right");
    assert!(answered > 100);
}

/// Requests of others that were answered.
static ANSWERED: AtomicU32 = AtomicU32::new(0);

async fn redirected(pod: &mut Pod) {
    let second = Duration::from_secs(1);
    start_app(pod);
    until("the application answers", 10 * second, async || {
        get("").await.is_ok()
    })
    .await;
    assert_eq!(get("").await.unwrap(), DIRECT);

    let mut before = Client::over(TcpStream::connect(WEB).await.unwrap());
    assert!(before.get("/", ADA).await.ends_with(DIRECT));

    let (manager, local) = (Identity::generate(), server("local").await);
    let agent = pod.start_agent(&manager);
    let tunnel = manage(&manager, local.address).await;
    // From the moment the push is answered.
    assert_eq!(get(ADA).await.unwrap(), "local GET / 0");
    assert_eq!(get("").await.unwrap(), ROUTED);
    assert_eq!(get_at(WEB_V6, ADA).await.unwrap(), "local GET / 0");
    assert_eq!(
        get_at(WEB_V6, "").await.unwrap(),
        "app for fd77::1 from fd77::2"
    );
    assert!(
        pod.rules()
            .contains("tcp flags syn / fin,syn,rst,ack tcp dport @live redirect to :15006"),
        "{}",
        pod.rules()
    );

    // What was open before bypasses the agent, is counted, and closed once it is idle.
    assert!(before.get("/", ADA).await.ends_with(DIRECT));
    let idle = json!({"ports": [{"port": 8080, "open": 1, "idle": 1}]});
    until("it is idle", 5 * second, async || {
        connections(&tunnel, Method::GET).await == idle
    })
    .await;
    let none = json!({"ports": []});
    assert_eq!(connections(&tunnel, Method::DELETE).await, none);
    let reset = before.rest().await.unwrap_err();
    assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(get(ADA).await.unwrap(), "local GET / 0");

    // Who parses traffic may do nothing else.
    let worker = worker_of(agent).unwrap();
    let status = fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
    for line in [
        "Uid:\t65532\t65532\t65532\t65532",
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.contains(line), "{line}\n{status}");
    }

    // The worker alone: the parent removes the ports at once and starts another, which serves whoever waits for it.
    signal(worker, Signal::STOP);
    let waiting: JoinSet<_> = (0..20).map(|_| get("")).collect();
    until("the kernel has accepted them", second, async || {
        let accepted = pod.command("ss").args(["-Htln", "sport = :15006"]).output();
        let accepted = String::from_utf8(accepted.unwrap().stdout).unwrap();
        accepted.split_whitespace().nth(1) == Some("20")
    })
    .await;
    signal(worker, Signal::KILL);
    for body in soon(waiting.join_all()).await {
        let body = body.unwrap();
        assert!(body.starts_with("app for None"), "{body}");
    }
    let gap = until("the application answers", 3 * second, async || {
        get("").await.is_ok_and(|body| body == DIRECT)
    })
    .await;
    eprintln!("worker killed: {gap:?} until the application answered");
    until("there is a new worker", 5 * second, async || {
        worker_of(agent).is_some_and(|new| new != worker)
    })
    .await;
    drop(tunnel);
    let tunnel = manage(&manager, local.address).await;
    assert_eq!(get(ADA).await.unwrap(), "local GET / 0");

    // A worker that hangs is ended by a process of its own user, and its ports go with it.
    let worker = worker_of(agent).unwrap();
    signal(worker, Signal::STOP);
    let gap = until("the application answers", 3 * second, async || {
        tokio::time::timeout(second, get(""))
            .await
            .is_ok_and(|answer| answer.is_ok_and(|body| body == DIRECT))
    })
    .await;
    eprintln!("worker stopped: {gap:?} until the application answered");
    until("there is a new worker", 5 * second, async || {
        worker_of(agent).is_some_and(|new| new != worker)
    })
    .await;
    drop(tunnel);
    let tunnel = manage(&manager, local.address).await;
    assert_eq!(get(ADA).await.unwrap(), "local GET / 0");

    // Every process: the kernel forgets the ports by itself.
    let worker = worker_of(agent).unwrap();
    signal(agent, Signal::KILL);
    // The worker follows its parent by itself, perhaps before this.
    let _ = kill_process(
        Pid::from_raw(worker.try_into().unwrap()).unwrap(),
        Signal::KILL,
    );
    let gap = until(
        "the application answers",
        Duration::from_millis(3200),
        async || get("").await.is_ok_and(|body| body == DIRECT),
    )
    .await;
    eprintln!("everything killed: {gap:?} until the application answered");
    assert_eq!(get(ADA).await.unwrap(), DIRECT);
    drop(tunnel);

    // A new agent takes over, and takes everything with it when it is told to end.
    let agent = pod.start_agent(&manager);
    let _tunnel = manage(&manager, local.address).await;
    assert_eq!(get(ADA).await.unwrap(), "local GET / 0");
    signal(agent, Signal::TERM);
    until("the application answers", 3 * second, async || {
        get("").await.is_ok_and(|body| body == DIRECT)
    })
    .await;
    until("no rule is left", 30 * second, async || {
        pod.rules().is_empty()
    })
    .await;
}
