//! A standalone manager over real sockets: who gets in, what is reached, what is refused, and when it ends.
//!
//! Destinations stand on an address of this machine other than loopback, which is never a destination.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::net::{IpAddr, SocketAddr, UdpSocket as StdUdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use ipnet::IpNet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tp_manager::standalone::{Options, run};
use tp_manager_api::{CLUSTER_PATH, ClusterView, HEALTH_PATH};
use tp_tunnel::carrier::tls::connect_tls;
use tp_tunnel::{DialErrorKind, Identity, KeyHash, OpenError, Target, Tunnel, TunnelError};

/// An address of this machine that others could reach. None needs to be reachable: no packet leaves.
fn own_address() -> IpAddr {
    let socket = StdUdpSocket::bind("0.0.0.0:0").unwrap();
    socket
        .connect("203.0.113.1:9")
        .expect("these tests need a network interface besides loopback");
    socket.local_addr().unwrap().ip()
}

struct Manager {
    address: SocketAddr,
    key: KeyHash,
    keys: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<anyhow::Result<()>>,
    _files: tempfile::TempDir,
}

impl Manager {
    async fn start(client: &Identity, ranges: Vec<IpNet>) -> Self {
        let files = tempfile::tempdir().unwrap();
        let (key_file, keys) = (files.path().join("key.pem"), files.path().join("keys"));
        let identity = Identity::generate();
        std::fs::write(&key_file, identity.to_pem()).unwrap();
        std::fs::write(&keys, format!("{} test\n", client.key_hash())).unwrap();
        let address = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let options = Options {
            listen: address,
            key: key_file,
            authorized_keys: keys.clone(),
            suffixes: Vec::new(),
            ranges,
            egress: false,
        };
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(run(options, async {
            let _ = stopped.await;
        }));
        while TcpStream::connect(address).await.is_err() {
            assert!(!running.is_finished(), "the manager ended");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Self {
            address,
            key: identity.key_hash(),
            keys,
            stop: Some(stop),
            running,
            _files: files,
        }
    }

    async fn for_this_machine(client: &Identity) -> Self {
        Self::start(client, vec![own_address().into()]).await
    }

    async fn connect(&self, client: &Identity) -> Result<Tunnel, String> {
        let stream = TcpStream::connect(self.address)
            .await
            .map_err(|error| error.to_string())?;
        let stream = connect_tls(stream, client, &self.key)
            .await
            .map_err(|error| error.to_string())?;
        let (tunnel, driver) = Tunnel::establish(stream)
            .await
            .map_err(|error| error.to_string())?;
        tokio::spawn(driver);
        tunnel
            .control(http::Method::GET, HEALTH_PATH, Bytes::new())
            .await
            .map_err(|error| error.to_string())?;
        Ok(tunnel)
    }
}

fn target(address: SocketAddr) -> Target {
    address.to_string().parse().unwrap()
}

fn kind(error: OpenError) -> DialErrorKind {
    let OpenError::Dial(error) = error else {
        panic!("not a dial error: {error}");
    };
    error.kind
}

/// Sends back what it gets, until the end.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind((own_address(), 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            });
        }
    });
    address
}

async fn read_all(flow: &mut tp_tunnel::Flow) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(data) = flow.recv().await.unwrap() {
        all.extend_from_slice(&data);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listed_key_reaches_what_the_ranges_hold() {
    let client = Identity::generate();
    let manager = Manager::for_this_machine(&client).await;
    let tunnel = manager.connect(&client).await.unwrap();

    let mut flow = tunnel.connect(&target(echo().await)).await.unwrap();
    flow.send(Bytes::from_static(b"half-closed, still answered"))
        .await
        .unwrap();
    flow.finish().unwrap();

    assert_eq!(read_all(&mut flow).await, b"half-closed, still answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_come_back() {
    let client = Identity::generate();
    let manager = Manager::for_this_machine(&client).await;
    let tunnel = manager.connect(&client).await.unwrap();
    let server = UdpSocket::bind((own_address(), 0)).await.unwrap();
    let address = server.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        let (length, peer) = server.recv_from(&mut buffer).await.unwrap();
        server.send_to(&buffer[..length], peer).await.unwrap();
    });

    let mut datagrams = tunnel.associate(&target(address)).await.unwrap();
    datagrams.send(Bytes::from_static(b"ping")).unwrap();

    let answer = timeout(Duration::from_secs(5), datagrams.recv())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(answer.as_deref(), Some(&b"ping"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_has_its_name() {
    let client = Identity::generate();
    let manager = Manager::for_this_machine(&client).await;
    let tunnel = manager.connect(&client).await.unwrap();
    let closed = {
        let listener = TcpListener::bind((own_address(), 0)).await.unwrap();
        listener.local_addr().unwrap()
    };

    for (to, expected) in [
        (closed.to_string(), DialErrorKind::Refused),
        ("no-such-name.invalid:80".to_owned(), DialErrorKind::Dns),
        ("203.0.113.7:80".to_owned(), DialErrorKind::Forbidden),
        ("127.0.0.1:80".to_owned(), DialErrorKind::Forbidden),
        ("localhost:80".to_owned(), DialErrorKind::Forbidden),
        ("[::ffff:127.0.0.1]:80".to_owned(), DialErrorKind::Forbidden),
        ("169.254.169.254:80".to_owned(), DialErrorKind::Forbidden),
        (manager.address.to_string(), DialErrorKind::Forbidden),
        (format!("{}:10250", own_address()), DialErrorKind::Forbidden),
    ] {
        let outcome = tunnel.connect(&to.parse().unwrap()).await;
        assert_eq!(
            kind(outcome.err().unwrap_or_else(|| panic!("{to} was reached"))),
            expected,
            "{to}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unlisted_key_gets_no_http_and_is_told() {
    let manager = Manager::for_this_machine(&Identity::generate()).await;

    let outcome = timeout(
        Duration::from_secs(5),
        manager.connect(&Identity::generate()),
    )
    .await
    .unwrap();

    assert_eq!(
        outcome.err(),
        Some(TunnelError::NotAdmitted.to_string()),
        "a refusal, not a cut"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_without_tls_gets_nothing() {
    let manager = Manager::for_this_machine(&Identity::generate()).await;
    let mut stream = TcpStream::connect(manager.address).await.unwrap();
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();

    let mut answer = Vec::new();
    let _ = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer))
        .await
        .unwrap();

    // A TLS alert at most: content type 21 and nothing of HTTP.
    assert!(
        answer.is_empty() || answer[0] == 21 && answer.len() <= 7,
        "{answer:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_key_is_cut_and_stays_out() {
    let client = Identity::generate();
    let manager = Manager::for_this_machine(&client).await;
    let tunnel = manager.connect(&client).await.unwrap();
    let mut flow = tunnel.connect(&target(echo().await)).await.unwrap();
    flow.send(Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(flow.recv().await.unwrap().as_deref(), Some(&b"x"[..]));

    std::fs::write(&manager.keys, "# nobody\n").unwrap();
    // Modification times have the resolution of a clock tick, and the first one may be of this tick.
    let keys = std::fs::File::options()
        .write(true)
        .open(&manager.keys)
        .unwrap();
    keys.set_modified(std::time::SystemTime::now() + Duration::from_secs(1))
        .unwrap();

    timeout(Duration::from_secs(5), tunnel.closed())
        .await
        .unwrap();
    assert!(flow.recv().await.is_err(), "a cut flow ends with a reset");
    assert!(manager.connect(&client).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn open_flows_may_end_after_the_shutdown_has_begun() {
    let client = Identity::generate();
    let mut manager = Manager::for_this_machine(&client).await;
    let tunnel = manager.connect(&client).await.unwrap();
    let mut flow = tunnel.connect(&target(echo().await)).await.unwrap();
    flow.send(Bytes::from_static(b"before")).await.unwrap();
    assert_eq!(flow.recv().await.unwrap().as_deref(), Some(&b"before"[..]));

    manager.stop.take().unwrap().send(()).unwrap();
    let refuses = async { while TcpStream::connect(manager.address).await.is_ok() {} };
    let refuses = timeout(Duration::from_secs(5), refuses).await;
    refuses.expect("nothing new is accepted soon after");
    flow.send(Bytes::from_static(b" after")).await.unwrap();
    flow.finish().unwrap();

    assert_eq!(read_all(&mut flow).await, b" after");
    drop(flow);
    drop(tunnel);
    timeout(Duration::from_secs(5), manager.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_view_holds_what_the_flags_say() {
    let client = Identity::generate();
    let manager = Manager::start(&client, vec!["10.1.0.0/16".parse().unwrap()]).await;
    let tunnel = manager.connect(&client).await.unwrap();

    let answer = tunnel
        .control(http::Method::GET, CLUSTER_PATH, Bytes::new())
        .await
        .unwrap();

    let view: ClusterView = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(
        view.service_ranges,
        ["10.1.0.0/16".parse::<IpNet>().unwrap()]
    );
    assert!(!view.everything);
    let unknown = tunnel
        .control(http::Method::GET, "/v1/nothing", Bytes::new())
        .await
        .unwrap();
    assert_eq!(unknown.status(), http::StatusCode::NOT_FOUND);
}
