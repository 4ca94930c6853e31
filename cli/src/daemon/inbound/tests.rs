//! Offers of a manager in the same process, and local programs on this machine's loopback.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;
use tp_tunnel::{DialError, DialErrorKind, Dialed, Flow, NotOpened, Service, Target, Workstation};

use super::*;

/// Offers flows and dials nothing.
#[derive(Default)]
struct Manager(Mutex<Option<Workstation>>);

impl Service for Manager {
    fn dial(&self, _: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        Box::pin(async { Err(DialError::new(DialErrorKind::Forbidden, "no")) })
    }

    fn associate(&self, _: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        Box::pin(async { Err(DialError::new(DialErrorKind::Forbidden, "no")) })
    }

    fn resolve(&self, query: Bytes) -> BoxFuture<'_, Bytes> {
        Box::pin(async move { query })
    }

    fn control(&self, _: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        Box::pin(async { Response::new(Bytes::new()) })
    }

    fn connected(&self, workstation: Workstation) {
        *self.0.lock().unwrap() = Some(workstation);
    }
}

#[derive(Default)]
struct Known(Mutex<HashMap<String, Way>>);

impl Ways for Known {
    fn way(&self, uid: &str) -> Option<Way> {
        self.0.lock().unwrap().get(uid).cloned()
    }
}

/// A workstation that takes offers, with or without a carrier.
struct Rig {
    tunnel_tx: watch::Sender<Option<Tunnel>>,
    count_tx: watch::Sender<usize>,
    known: Arc<Known>,
    serving: JoinHandle<()>,
}

impl Rig {
    fn start() -> Self {
        let (tunnel_tx, tunnel) = watch::channel(None);
        let (count_tx, count) = watch::channel(0);
        let known = Arc::new(Known::default());
        let serving = tokio::spawn(serve(tunnel, count, Arc::clone(&known)));
        Self {
            tunnel_tx,
            count_tx,
            known,
            serving,
        }
    }

    /// A carrier comes up: the manager's side of it.
    async fn connect(&self) -> Workstation {
        let (near, far) = tokio::io::duplex(1 << 20);
        let manager = Arc::new(Manager::default());
        let service: Arc<dyn Service> = manager.clone();
        tokio::spawn(tp_tunnel::serve(far, service, std::future::pending::<()>()));
        let (tunnel, driver) = Tunnel::establish(near).await.unwrap();
        tokio::spawn(driver);
        self.tunnel_tx.send_replace(Some(tunnel));
        manager.0.lock().unwrap().take().unwrap()
    }

    fn intercept(&self, uid: &str, to: LocalAddress) -> Arc<Counts> {
        let counts = Arc::new(Counts::default());
        let way = Way {
            to,
            protocol: Protocol::Tcp,
            counts: Arc::clone(&counts),
            sightings: Sightings::default(),
        };
        self.known.0.lock().unwrap().insert(uid.to_owned(), way);
        self.count_tx.send_modify(|count| *count += 1);
        counts
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// A local program that answers what it was told, and then its name.
async fn program(name: &'static str) -> LocalAddress {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut told = String::new();
                stream.read_to_string(&mut told).await.unwrap();
                stream.write_all((told + name).as_bytes()).await.unwrap();
            });
        }
    });
    LocalAddress { host: None, port }
}

/// A port of this machine where nobody listens.
async fn closed_port() -> LocalAddress {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    LocalAddress {
        host: None,
        port: listener.local_addr().unwrap().port(),
    }
}

async fn offer(workstation: &Workstation, uid: &str) -> Result<Flow, NotOpened> {
    workstation
        .open(uid, "10.1.2.3:4567".parse().unwrap())
        .await
}

async fn answer(mut flow: Flow, told: &'static str) -> String {
    flow.send(Bytes::from_static(told.as_bytes()))
        .await
        .unwrap();
    flow.finish().unwrap();
    let mut answer = Vec::new();
    while let Some(bytes) = flow.recv().await.unwrap() {
        answer.extend_from_slice(&bytes);
    }
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn each_intercept_leads_to_its_own_program() {
    let rig = Rig::start();
    let manager = rig.connect().await;
    let counts = rig.intercept("uid-1", program("one").await);
    rig.intercept("uid-2", program("two").await);

    let first = offer(&manager, "uid-1").await.unwrap();
    let second = offer(&manager, "uid-2").await.unwrap();

    assert_eq!(answer(second, "to ").await, "to two");
    assert_eq!(answer(first, "to ").await, "to one");
    assert_eq!(counts.flows.load(Relaxed), 1);
}

#[tokio::test]
async fn more_flows_at_once_than_streams_are_posted_all_arrive() {
    let rig = Rig::start();
    let manager = rig.connect().await;
    rig.intercept("uid-1", program("one").await);

    let offers = (0..4 * POSTED).map(|_| offer(&manager, "uid-1"));
    let flows = futures::future::try_join_all(offers).await.unwrap();
    let answers = flows.into_iter().map(|flow| answer(flow, ""));

    let answers = futures::future::join_all(answers).await;
    assert!(answers.iter().all(|answer| answer == "one"));
}

#[tokio::test]
async fn what_nobody_answers_here_is_refused_and_nothing_was_sent() {
    let rig = Rig::start();
    let manager = rig.connect().await;
    let counts = rig.intercept("uid-1", closed_port().await);

    let closed = offer(&manager, "uid-1").await;
    let foreign = offer(&manager, "uid-of-another").await;

    assert!(matches!(closed, Err(NotOpened::Refused)), "{closed:?}");
    assert!(matches!(foreign, Err(NotOpened::Refused)), "{foreign:?}");
    assert_eq!(counts.refused.load(Relaxed), 1);
    assert_eq!(counts.flows.load(Relaxed), 0);
}

#[tokio::test]
async fn nothing_is_posted_without_an_intercept() {
    let rig = Rig::start();
    let manager = rig.connect().await;

    let offered = offer(&manager, "uid-1").await;

    assert!(matches!(offered, Err(NotOpened::TimedOut)), "{offered:?}");
}

#[tokio::test]
async fn a_new_carrier_takes_offers_and_flows_of_the_old_one_go_on() {
    let rig = Rig::start();
    let old = rig.connect().await;
    rig.intercept("uid-1", program("one").await);
    let begun = offer(&old, "uid-1").await.unwrap();

    let new = rig.connect().await;
    let flow = offer(&new, "uid-1").await.unwrap();

    assert_eq!(answer(flow, "new ").await, "new one");
    assert_eq!(answer(begun, "old ").await, "old one");
}

#[tokio::test]
async fn a_program_on_ipv6_loopback_alone_is_found() {
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();

    let local = LocalAddress { host: None, port };
    let (connected, accepted) = tokio::join!(local.connect(), listener.accept());

    assert_eq!(
        connected.unwrap().local_addr().unwrap(),
        accepted.unwrap().1
    );
}

#[test]
fn addresses_are_shown_as_they_are_typed() {
    for (host, shown) in [
        (None, "localhost:80"),
        (Some("10.0.0.2"), "10.0.0.2:80"),
        (Some("app.local"), "app.local:80"),
        (Some("fd00::1"), "[fd00::1]:80"),
    ] {
        let host = host.map(str::to_owned);
        assert_eq!(LocalAddress { host, port: 80 }.to_string(), shown);
    }
}

#[tokio::test]
async fn a_udp_port_that_nobody_has_is_known_before_a_datagram_is_lost() {
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = server.local_addr().unwrap().port();
    let way = LocalAddress { host: None, port };

    let socket = way.associate().await.unwrap();
    socket.send(b"hello").await.unwrap();
    let mut data = [0; 16];
    assert_eq!(server.recv(&mut data).await.unwrap(), 5);

    drop(server);
    if cfg!(target_os = "linux") {
        let refused = way.associate().await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}
