//! Flows that the serving side offers on posted streams.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::{eventually, listener, pattern, read_all, send_and_finish, soon};
use futures::future::BoxFuture;
use http::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tp_tunnel::{
    ByteStream, DialError, DialErrorKind, Dialed, Flow, FlowError, NotOpened, OpenError,
    POSTED_MAX, Service, Settings, Target, Tunnel, TunnelError, Workstation, join, relay,
    serve_with,
};

const PEER: &str = "10.1.2.3:4567";

/// Offers flows and does nothing else.
#[derive(Default)]
struct Agent {
    workstation: Mutex<Option<Workstation>>,
}

impl Service for Agent {
    fn dial(&self, _: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        Box::pin(async { Err(DialError::new(DialErrorKind::Forbidden, "nothing to dial")) })
    }

    fn associate(&self, _: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        Box::pin(async { Err(DialError::new(DialErrorKind::Forbidden, "nothing to dial")) })
    }

    fn resolve(&self, query: Bytes) -> BoxFuture<'_, Bytes> {
        Box::pin(async move { query })
    }

    fn control(&self, _: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        Box::pin(async { Response::new(Bytes::new()) })
    }

    fn connected(&self, workstation: Workstation) {
        *self.workstation.lock().unwrap() = Some(workstation);
    }
}

struct Ends {
    tunnel: Tunnel,
    workstation: Workstation,
    driver: JoinHandle<Result<(), TunnelError>>,
    server: JoinHandle<Result<(), TunnelError>>,
    shutdown: oneshot::Sender<()>,
}

async fn ends() -> Ends {
    let (ours, theirs) = duplex(256 * 1024);
    ends_over(ours, theirs).await
}

async fn ends_over(ours: impl ByteStream, theirs: impl ByteStream) -> Ends {
    ends_with(ours, theirs, Settings::default()).await
}

async fn ends_with(ours: impl ByteStream, theirs: impl ByteStream, settings: Settings) -> Ends {
    let agent = Arc::new(Agent::default());
    let (shutdown, stopped) = oneshot::channel::<()>();
    let service: Arc<dyn Service> = agent.clone();
    let stopped = async {
        if stopped.await.is_err() {
            std::future::pending().await
        }
    };
    let server = tokio::spawn(serve_with(theirs, service, settings.clone(), stopped));
    let (tunnel, driver) = Tunnel::establish_with(ours, settings).await.unwrap();
    let driver = tokio::spawn(driver);
    let workstation = agent.workstation.lock().unwrap().take().unwrap();
    Ends {
        tunnel,
        workstation,
        driver,
        server,
        shutdown,
    }
}

/// Takes every flow and relays it to the address.
fn accept_for(tunnel: &Tunnel, local: SocketAddr) -> JoinHandle<()> {
    let tunnel = tunnel.clone();
    tokio::spawn(async move {
        while let Ok(incoming) = tunnel.accept().await {
            assert_eq!(incoming.intercept(), "uid-1");
            assert_eq!(incoming.peer().to_string(), PEER);
            tokio::spawn(async move {
                match TcpStream::connect(local).await {
                    Ok(tcp) => drop(relay(incoming.opened().await.unwrap(), tcp).await),
                    Err(_) => incoming.refuse().await,
                }
            });
        }
    })
}

async fn open(workstation: &Workstation) -> Result<Flow, NotOpened> {
    soon(workstation.open("uid-1", PEER.parse().unwrap())).await
}

/// A kernel socket of the cluster's side, and the workstation's local socket at the other end.
async fn through(ends: &Ends, local: &tokio::net::TcpListener) -> (TcpStream, TcpStream) {
    let (accepting, address) = listener().await;
    let client = TcpStream::connect(address).await.unwrap();
    let (server_side, _) = accepting.accept().await.unwrap();
    let flow = open(&ends.workstation).await.unwrap();
    tokio::spawn(relay(flow, server_side));
    (client, local.accept().await.unwrap().0)
}

#[tokio::test]
async fn bytes_and_half_closes_pass_both_ways() {
    let ends = ends().await;
    let (local, address) = listener().await;
    let accepting = accept_for(&ends.tunnel, address);
    for turn in 0..3 {
        let (mut client, mut app) = through(&ends, &local).await;
        let (there, back) = (pattern(turn, 3_000_000), pattern(turn + 9, 2_000_000));
        // The client is done before the application answers.
        let (_, read) =
            soon(async { tokio::join!(send_and_finish(&mut client, &there), read_all(&mut app)) })
                .await;
        assert_eq!(read.unwrap(), there);
        let (_, read) =
            soon(async { tokio::join!(send_and_finish(&mut app, &back), read_all(&mut client)) })
                .await;
        assert_eq!(read.unwrap(), back);
    }
    accepting.abort();
}

#[tokio::test]
async fn the_same_over_kernel_sockets_with_a_server_that_speaks_first() {
    let (carrier, address) = listener().await;
    let (ours, theirs) = tokio::join!(TcpStream::connect(address), carrier.accept());
    let ends = ends_over(ours.unwrap(), theirs.unwrap().0).await;
    let (local, address) = listener().await;
    let accepting = accept_for(&ends.tunnel, address);
    let (mut client, mut app) = through(&ends, &local).await;
    app.write_all(b"220 ready\r\n").await.unwrap();
    let mut greeting = [0; 11];
    soon(client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ready\r\n");
    // A reset on one side is a reset on the other.
    app.set_zero_linger().unwrap();
    drop(app);
    let error = soon(client.read_exact(&mut greeting)).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    accepting.abort();
}

#[tokio::test]
async fn not_a_byte_is_sent_before_opened() {
    let ends = ends().await;
    let tunnel = ends.tunnel.clone();
    let accepting = async move { tunnel.accept().await.unwrap() };
    let accepting = tokio::spawn(accepting);
    let mut opening = Box::pin(open(&ends.workstation));
    let incoming = tokio::select! {
        _ = &mut opening => panic!("open before OPENED"),
        incoming = accepting => incoming.unwrap(),
    };
    assert!(futures::poll!(&mut opening).is_pending());
    let (cluster, workstation) = tokio::join!(opening, incoming.opened());
    let (mut cluster, mut workstation) = (cluster.unwrap(), workstation.unwrap());
    cluster.send(Bytes::from_static(b"first")).await.unwrap();
    assert_eq!(
        soon(workstation.recv()).await.unwrap().unwrap(),
        &b"first"[..]
    );
}

#[tokio::test]
async fn a_refused_flow_is_refused_at_once_and_the_next_is_not() {
    let ends = ends().await;
    let tunnel = ends.tunnel.clone();
    let (local, address) = listener().await;
    let first = tokio::spawn(async move {
        tunnel.accept().await.unwrap().refuse().await;
        drop(tunnel.accept().await.unwrap());
        tunnel
    });
    for _ in 0..2 {
        assert!(matches!(
            open(&ends.workstation).await,
            Err(NotOpened::Refused)
        ));
    }
    let accepting = accept_for(&soon(first).await.unwrap(), address);
    drop(through(&ends, &local).await);
    accepting.abort();
}

#[tokio::test(start_paused = true)]
async fn an_offer_without_an_answer_is_taken_back_after_a_second() {
    let ends = ends().await;
    // Nobody has posted a stream.
    assert!(matches!(
        open(&ends.workstation).await,
        Err(NotOpened::TimedOut)
    ));
    // Somebody has, and does not say OPENED.
    let tunnel = ends.tunnel.clone();
    let accepting = tokio::spawn(async move { tunnel.accept().await.unwrap() });
    let start = tokio::time::Instant::now();
    assert!(matches!(
        open(&ends.workstation).await,
        Err(NotOpened::TimedOut)
    ));
    assert_eq!(start.elapsed().as_secs(), 1);
    let mut incoming = soon(accepting).await.unwrap();
    soon(incoming.cancelled()).await;
    // Too late: it is a reset, and nothing was delivered.
    let late = match incoming.opened().await {
        Ok(mut flow) => flow.recv().await.map(drop),
        Err(error) => Err(error),
    };
    assert!(matches!(late, Err(FlowError::Reset(_))), "{late:?}");
}

#[tokio::test]
async fn a_stream_that_was_taken_back_is_not_answered() {
    let ends = ends().await;
    let (local, address) = listener().await;
    for _ in 0..3 {
        let mut posted = Box::pin(ends.tunnel.accept());
        assert!(futures::poll!(&mut posted).is_pending());
        drop(posted);
    }
    let accepting = accept_for(&ends.tunnel, address);
    drop(through(&ends, &local).await);
    accepting.abort();
}

#[tokio::test]
async fn more_posted_streams_than_the_pool_holds_are_given_back() {
    let ends = ends().await;
    let mut posted: Vec<_> = (0..POSTED_MAX + 3)
        .map(|_| {
            let tunnel = ends.tunnel.clone();
            tokio::spawn(async move { tunnel.accept().await })
        })
        .collect();
    eventually("three came back", || {
        posted.iter().filter(|task| task.is_finished()).count() == 3
    })
    .await;
    for task in posted.extract_if(.., |task| task.is_finished()) {
        assert!(matches!(task.await.unwrap(), Err(OpenError::Reset(_))));
    }
    drop(ends.tunnel);
    ends.driver.abort();
    soon(ends.server).await.unwrap().ok();
    for task in posted {
        assert!(soon(task).await.unwrap().is_err());
    }
}

#[tokio::test]
async fn a_draining_connection_ends_although_streams_are_posted() {
    let ends = ends().await;
    let tunnel = ends.tunnel.clone();
    let taken = tokio::spawn(async move { tunnel.accept().await.unwrap().opened().await.unwrap() });
    let mut cluster = open(&ends.workstation).await.unwrap();
    let mut workstation = soon(taken).await.unwrap();
    let tunnel = ends.tunnel.clone();
    let waiting = tokio::spawn(async move { tunnel.accept().await });
    ends.shutdown.send(()).unwrap();
    eventually("nothing new", || ends.workstation.is_closed()).await;
    assert!(matches!(
        open(&ends.workstation).await,
        Err(NotOpened::Closed)
    ));
    // The open flow goes on and ends by itself; then the connection does.
    cluster.send(Bytes::from_static(b"late")).await.unwrap();
    assert_eq!(
        soon(workstation.recv()).await.unwrap().unwrap(),
        &b"late"[..]
    );
    assert!(soon(waiting).await.unwrap().is_err());
    drop((cluster, workstation));
    soon(ends.server).await.unwrap().unwrap();
    assert!(soon(ends.driver).await.unwrap().is_ok());
}

#[tokio::test]
async fn a_connection_that_dies_ends_offers_and_flows_with_an_error() {
    let ends = ends().await;
    let tunnel = ends.tunnel.clone();
    let taken = tokio::spawn(async move { tunnel.accept().await.unwrap().opened().await.unwrap() });
    let mut flow = open(&ends.workstation).await.unwrap();
    let _taken = soon(taken).await.unwrap();
    let workstation = ends.workstation.clone();
    let offered = tokio::spawn(async move { open(&workstation).await });
    ends.driver.abort();
    assert!(soon(flow.recv()).await.is_err());
    assert!(matches!(
        soon(offered).await.unwrap(),
        Err(NotOpened::Closed)
    ));
}

#[tokio::test]
async fn joined_flows_are_one() {
    // The agent's connection to the manager, and the manager's to the workstation.
    let (agent, manager) = (ends().await, ends().await);
    let (local, address) = listener().await;
    let accepting = accept_for(&manager.tunnel, address);
    let (from, to) = (agent.tunnel.clone(), manager.workstation.clone());
    let joining = tokio::spawn(async move {
        loop {
            let incoming = from.accept().await.unwrap();
            let flow = to
                .open(incoming.intercept(), incoming.peer())
                .await
                .unwrap();
            tokio::spawn(async move { join(incoming.opened().await.unwrap(), flow).await });
        }
    });
    let (mut client, mut app) = through(&agent, &local).await;
    let (there, back) = (pattern(1, 5_000_000), pattern(2, 5_000_000));
    let (_, _, read_there, read_back) = soon(async {
        let (mut client_rx, mut client_tx) = client.split();
        let (mut app_rx, mut app_tx) = app.split();
        let (mut read_there, mut read_back) = (Vec::new(), Vec::new());
        let results = tokio::join!(
            async {
                client_tx.write_all(&there).await.unwrap();
                client_tx.shutdown().await.unwrap()
            },
            async {
                app_tx.write_all(&back).await.unwrap();
                app_tx.shutdown().await.unwrap()
            },
            app_rx.read_to_end(&mut read_there),
            client_rx.read_to_end(&mut read_back),
        );
        results.2.unwrap();
        results.3.unwrap();
        ((), (), read_there, read_back)
    })
    .await;
    assert_eq!(read_there, there);
    assert_eq!(read_back, back);
    // A reset passes through both.
    let (mut client, app) = through(&agent, &local).await;
    app.set_zero_linger().unwrap();
    drop(app);
    let error = soon(client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    joining.abort();
    accepting.abort();
}

/// Readers that take nothing hold their own flow only.
#[tokio::test]
async fn a_stalled_reader_of_a_joined_flow_stalls_nobody_else() {
    let (agent, manager) = (ends().await, ends().await);
    let (from, to) = (agent.tunnel.clone(), manager.workstation.clone());
    let joining = tokio::spawn(async move {
        loop {
            let incoming = from.accept().await.unwrap();
            let flow = to
                .open(incoming.intercept(), incoming.peer())
                .await
                .unwrap();
            tokio::spawn(async move { join(incoming.opened().await.unwrap(), flow).await });
        }
    });
    let (local, address) = listener().await;
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let tunnel = manager.tunnel.clone();
        let relayed = tokio::spawn(async move {
            let incoming = tunnel.accept().await.unwrap();
            let tcp = TcpStream::connect(address).await.unwrap();
            relay(incoming.opened().await.unwrap(), tcp).await
        });
        let mut flow = open(&agent.workstation).await.unwrap();
        let sending = tokio::spawn(async move { flow.send(pattern(3, 16 << 20).into()).await });
        stalled.push((local.accept().await.unwrap(), relayed, sending));
    }
    // Nobody reads them, so they fill every window on their way.
    eventually("windows are full", || {
        manager.tunnel.traffic().bytes_down > 8 << 20
    })
    .await;
    assert!(stalled.iter().all(|(_, _, sending)| !sending.is_finished()));
    let accepting = accept_for(&manager.tunnel, address);
    let (mut client, mut app) = through(&agent, &local).await;
    let data = pattern(4, 3_000_000);
    let (_, read) =
        soon(async { tokio::join!(send_and_finish(&mut client, &data), read_all(&mut app)) }).await;
    assert_eq!(read.unwrap(), data);
    joining.abort();
    accepting.abort();
}

/// The workstation sleeps while the value is true.
async fn ends_that_can_sleep() -> (Ends, watch::Sender<bool>) {
    let (ours, theirs) = duplex(256 * 1024);
    // What happens to bytes between the two while the workstation sleeps: nothing.
    let (near, far) = duplex(256 * 1024);
    let (sleep, mut asleep) = watch::channel(false);
    tokio::spawn(async move {
        let (mut near, mut theirs) = (near, theirs);
        let mut copy = std::pin::pin!(tokio::io::copy_bidirectional(&mut near, &mut theirs));
        loop {
            tokio::select! {
                biased;
                Ok(_) = asleep.wait_for(|asleep| *asleep) => {}
                _ = &mut copy => return,
            }
            if asleep.wait_for(|asleep| !*asleep).await.is_err() {
                return;
            }
        }
    });
    let settings = Settings {
        // Whoever is not attended to is not asked within a test.
        ping_interval: Duration::from_secs(600),
        attentive_ping_interval: Duration::from_millis(20),
        silence: Duration::from_millis(60),
        ..Settings::default()
    };
    (ends_with(ours, far, settings).await, sleep)
}

#[tokio::test]
async fn what_was_given_up_while_the_workstation_slept_is_not_delivered() {
    let (ends, sleep) = ends_that_can_sleep().await;
    let (local, address) = listener().await;
    let accepting = accept_for(&ends.tunnel, address);
    let mut attention = ends.workstation.attend();
    let (mut given_up, mut kept) = (
        open(&ends.workstation).await.unwrap(),
        open(&ends.workstation).await.unwrap(),
    );
    let (mut app, _) = local.accept().await.unwrap();
    let (mut other_app, _) = local.accept().await.unwrap();
    for (flow, app) in [(&mut given_up, &mut app), (&mut kept, &mut other_app)] {
        flow.send(Bytes::from_static(b"before")).await.unwrap();
        let mut before = [0; 6];
        soon(app.read_exact(&mut before)).await.unwrap();
    }

    sleep.send_replace(true);
    given_up.send(pattern(1, 100_000).into()).await.unwrap();
    kept.send(Bytes::from_static(b"after")).await.unwrap();
    soon(attention.silent()).await;
    soon(given_up.reset()).await;
    sleep.send_replace(false);

    let error = soon(app.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let mut after = [0; 5];
    soon(other_app.read_exact(&mut after)).await.unwrap();
    assert_eq!(&after, b"after");
    accepting.abort();
}

#[tokio::test(start_paused = true)]
async fn the_silence_of_a_workstation_whose_flows_are_idle_is_noticed_as_soon() {
    let (ends, sleep) = ends_that_can_sleep().await;
    let tunnel = ends.tunnel.clone();
    let taken = tokio::spawn(async move { tunnel.accept().await.unwrap().opened().await.unwrap() });
    let mut attention = ends.workstation.attend();
    let flow = open(&ends.workstation).await.unwrap();
    let other_end = soon(taken).await.unwrap();
    // Many pings later: what moved when the flow was opened wakes nobody any more.
    tokio::time::sleep(Duration::from_secs(1)).await;

    sleep.send_replace(true);
    let start = tokio::time::Instant::now();
    soon(attention.silent()).await;

    let took = start.elapsed();
    assert!(took <= Duration::from_millis(20 + 60 + 10), "{took:?}");
    drop((flow, other_end));
}

#[tokio::test]
async fn a_silent_workstation_is_noticed_by_who_attends_and_heard_again() {
    let (ends, sleep) = ends_that_can_sleep().await;
    let (local, address) = listener().await;
    let accepting = accept_for(&ends.tunnel, address);
    let mut attention = ends.workstation.attend();
    let flow = open(&ends.workstation).await.unwrap();
    assert!(!ends.workstation.is_silent());

    sleep.send_replace(true);
    soon(attention.silent()).await;
    assert!(ends.workstation.is_silent());
    // Nobody has to attend any more: the answer that is still due is enough.
    drop((attention, flow));
    sleep.send_replace(false);

    eventually("it is heard again", || !ends.workstation.is_silent()).await;
    drop((local, accepting));
}
