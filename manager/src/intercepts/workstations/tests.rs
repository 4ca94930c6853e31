use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tp_manager_api::tls::SecretTrouble;
use tp_tunnel::{DialError, Dialed, Service, Target, Tunnel, serve};

use super::*;

/// One connection as the manager serves it: all that it does is to arrive, and to stay.
struct Seated {
    seat: Arc<Seat>,
    stays: bool,
}

impl Service for Seated {
    fn dial(&self, _: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        unreachable!("nothing is dialled")
    }

    fn associate(&self, _: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        unreachable!("nothing is dialled")
    }

    fn resolve(&self, _: Bytes) -> BoxFuture<'_, Bytes> {
        unreachable!("nothing is resolved")
    }

    fn control(&self, _: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        unreachable!("nothing is asked")
    }

    fn connected(&self, workstation: Workstation) {
        self.seat.arrive(workstation);
        if self.stays {
            self.seat.stay();
        }
    }
}

fn workstations() -> Arc<Workstations> {
    let workstations = Arc::new(Workstations::new(Arc::default()));
    workstations.assign([("id-1".to_owned(), SessionUid::from("ada"))].into());
    workstations
}

fn seat(workstations: &Arc<Workstations>) -> Arc<Seat> {
    Arc::new(Seat::new(Arc::clone(workstations), "ada", Arc::default()))
}

/// A workstation of Ada's; aborting the task cuts it off.
async fn connect(workstations: &Arc<Workstations>) -> (Tunnel, JoinHandle<()>) {
    take_seat(seat(workstations), true).await
}

async fn take_seat(seat: Arc<Seat>, stays: bool) -> (Tunnel, JoinHandle<()>) {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let service = Arc::new(Seated { seat, stays });
    let serving = tokio::spawn(async move {
        let _ = serve(ours, service, std::future::pending()).await;
    });
    let (tunnel, driver) = Tunnel::establish(theirs).await.unwrap();
    tokio::spawn(driver);
    (tunnel, serving)
}

fn take_all(tunnel: Tunnel) -> JoinHandle<()> {
    tokio::spawn(async move {
        while let Ok(incoming) = tunnel.accept().await {
            let mut flow = incoming.opened().await.unwrap();
            tokio::spawn(async move { while let Ok(Some(_)) = flow.recv().await {} });
        }
    })
}

const PEER: &str = "10.244.0.9:4711";

async fn offer(workstations: &Workstations, intercept: &str) -> Result<(), NotOpened> {
    let opened = workstations.open(intercept, PEER.parse().unwrap()).await;
    opened.map(drop)
}

#[tokio::test(start_paused = true)]
async fn a_flow_goes_to_the_newest_connection_of_its_session_and_to_no_other() {
    let workstations = workstations();
    let (old, old_serving) = connect(&workstations).await;
    let (new, _serving) = connect(&workstations).await;
    let taking = take_all(new);

    offer(&workstations, "id-1").await.unwrap();
    let unknown = offer(&workstations, "id-2").await;
    assert!(matches!(unknown, Err(NotOpened::Closed)), "{unknown:?}");

    // The old one has nothing posted, and would have been silent.
    drop((old, old_serving));
    taking.abort();
}

#[tokio::test(start_paused = true)]
async fn a_silent_workstation_gets_one_offer_at_a_time_until_it_answers() {
    let workstations = workstations();
    let (tunnel, _serving) = connect(&workstations).await;

    let start = Instant::now();
    assert!(matches!(
        offer(&workstations, "id-1").await,
        Err(NotOpened::TimedOut)
    ));
    assert_eq!(start.elapsed(), Duration::from_secs(1));

    let probe = {
        let workstations = Arc::clone(&workstations);
        tokio::spawn(async move { offer(&workstations, "id-1").await })
    };
    tokio::task::yield_now().await;
    let start = Instant::now();
    assert!(matches!(
        offer(&workstations, "id-1").await,
        Err(NotOpened::TimedOut)
    ));
    assert_eq!(start.elapsed(), Duration::ZERO, "others fall back at once");

    let taking = take_all(tunnel);
    probe.await.unwrap().unwrap();
    offer(&workstations, "id-1").await.unwrap();
    taking.abort();
}

#[tokio::test(start_paused = true)]
async fn who_left_is_expected_back_for_a_lease() {
    let workstations = workstations();
    assert_eq!(workstations.here("ada"), Here::No);
    let mut changes = workstations.changes();
    let (_tunnel, serving) = connect(&workstations).await;
    assert!(matches!(workstations.here("ada"), Here::Now(_)));
    changes.changed().await.unwrap();

    serving.abort();
    changes.changed().await.unwrap();
    assert_eq!(workstations.here("ada"), Here::Lately);
    let refused = offer(&workstations, "id-1").await;
    assert!(matches!(refused, Err(NotOpened::Closed)), "{refused:?}");

    sleep(LEASE).await;
    assert_eq!(workstations.here("ada"), Here::No);
}

/// Two replicas may have a workstation's connection for a moment, and it goes on with one of them.
#[tokio::test(start_paused = true)]
async fn a_workstation_is_where_it_stays() {
    let workstations = workstations();
    let seat = seat(&workstations);
    let (_tunnel, _serving) = take_seat(Arc::clone(&seat), false).await;

    assert_eq!(workstations.here("ada"), Here::No);
    assert!(!seat.stays.initialized());

    seat.stay();
    seat.stay();
    assert!(matches!(workstations.here("ada"), Here::Now(_)));
    assert!(seat.stays.initialized());
}

#[tokio::test(start_paused = true)]
async fn what_was_handed_over_goes_with_its_intercept_and_with_its_workstation() {
    let workstations = workstations();
    let trouble = Handover::Trouble(SecretTrouble::Missing);
    let seat = seat(&workstations);
    assert!(
        !seat.hand_over("id-1", trouble.clone()),
        "nobody is connected"
    );
    let (_tunnel, serving) = connect(&workstations).await;

    assert!(seat.hand_over("id-1", trouble.clone()));
    assert_eq!(workstations.handover("ada", "id-1"), Some(trouble.clone()));
    assert_eq!(workstations.handover("bob", "id-1"), None);
    // The watch may be behind.
    workstations.forget_handovers(&BTreeSet::new());
    assert!(workstations.handover("ada", "id-1").is_some());
    sleep(UNSEEN).await;
    workstations.forget_handovers(&BTreeSet::from(["id-1"]));
    assert!(workstations.handover("ada", "id-1").is_some());
    workstations.forget_handovers(&BTreeSet::new());
    assert_eq!(workstations.handover("ada", "id-1"), None);

    for n in 0..HANDOVERS_MAX {
        assert!(seat.hand_over(&n.to_string(), trouble.clone()));
    }
    assert!(!seat.hand_over("one-more", trouble.clone()));
    assert!(
        seat.hand_over("0", trouble),
        "one that is known is replaced"
    );
    serving.abort();
    sleep(LEASE).await;
    workstations.assign(BTreeMap::new());
    assert_eq!(workstations.handover("ada", "0"), None);
}
