//! The supervisor against a manager in the same process, over an in-memory carrier, on a paused clock.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;
use http::{Request, Response};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::AbortHandle;
use tp_tunnel::carrier::tls::accept_tls;
use tp_tunnel::{BoxedStream, DialError, DialErrorKind, Dialed, KeyHash, Service, Target};

use super::*;
use crate::daemon::screen::Source;
use crate::proxy::split::Route;

fn place(name: &str) -> Place {
    Place {
        name: name.to_owned(),
        port: 8443,
        key: Identity::generate().key_hash(),
    }
}

fn refused(name: &str) -> Unmet {
    Unmet::passing(Failure::new(format!("{name} refused")))
}

#[tokio::test(start_paused = true)]
async fn a_dead_replica_costs_nothing_when_it_says_so() {
    let begun = tokio::time::Instant::now();

    let up = first_up(
        vec![place("dead"), place("alive")],
        HEAD_START,
        |place| async move {
            if place.name == "dead" {
                Err(refused("dead"))
            } else {
                Ok(place.name)
            }
        },
    )
    .await;

    assert_eq!(up.unwrap(), "alive");
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_silent_replica_costs_its_head_start_only() {
    let begun = tokio::time::Instant::now();

    let up = first_up(
        vec![place("silent"), place("alive")],
        HEAD_START,
        |place| async move {
            if place.name == "silent" {
                tokio::time::sleep(UP_WITHIN).await;
                return Err(refused("silent"));
            }
            Ok(place.name)
        },
    )
    .await;

    assert_eq!(up.unwrap(), "alive");
    assert!(begun.elapsed() <= HEAD_START + Duration::from_millis(1));
}

#[tokio::test(start_paused = true)]
async fn when_all_fail_the_first_reason_is_told() {
    let places = vec![place("a"), place("b"), place("c")];

    let down: Result<(), Unmet> = first_up(places, HEAD_START, |place| async move {
        Err(refused(&place.name))
    })
    .await;

    assert_eq!(down.unwrap_err().failure.what, "a refused");
}

/// Replicas that can be started and killed.
#[derive(Default)]
struct Cluster {
    identity: Mutex<HashMap<String, (Identity, Replica)>>,
    dials: AtomicUsize,
    /// What the locator says in place of the replicas' keys.
    stale_key: Mutex<Option<KeyHash>>,
}

#[derive(Clone, Default)]
struct Replica {
    serving: Arc<Mutex<Vec<AbortHandle>>>,
    drain: CancellationToken,
}

impl Cluster {
    fn with(names: &[&str]) -> Arc<Self> {
        let cluster = Arc::new(Self::default());
        names.iter().for_each(|name| cluster.start(name));
        cluster
    }

    fn start(&self, name: &str) {
        let replica = (Identity::generate(), Replica::default());
        self.identity
            .lock()
            .unwrap()
            .insert(name.to_owned(), replica);
    }

    /// As `kill -9`: what it served is cut.
    fn kill(&self, name: &str) {
        let (_, replica) = self.identity.lock().unwrap().remove(name).unwrap();
        replica
            .serving
            .lock()
            .unwrap()
            .iter()
            .for_each(AbortHandle::abort);
    }

    /// As a rollout: nothing new is taken.
    fn drain(&self, name: &str) {
        let (_, replica) = self.identity.lock().unwrap().remove(name).unwrap();
        replica.drain.cancel();
    }

    fn dials(&self) -> usize {
        self.dials.load(Ordering::Relaxed)
    }
}

struct InMemory(Arc<Cluster>);

impl CarrierDialer for InMemory {
    fn kind(&self) -> CarrierKind {
        CarrierKind::Direct
    }

    fn places(&self) -> BoxFuture<'_, Result<Vec<Place>, Unmet>> {
        let replicas = self.0.identity.lock().unwrap();
        let stale_key = *self.0.stale_key.lock().unwrap();
        let places: Vec<Place> = replicas
            .iter()
            .map(|(name, (identity, _))| Place {
                name: name.clone(),
                port: 0,
                key: stale_key.unwrap_or_else(|| identity.key_hash()),
            })
            .collect();
        async move {
            if places.is_empty() {
                Err(refused("everything"))
            } else {
                Ok(places)
            }
        }
        .boxed()
    }

    fn dial<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<BoxedStream, Unmet>> {
        async {
            self.0.dials.fetch_add(1, Ordering::Relaxed);
            let found = self.0.identity.lock().unwrap().get(&place.name).cloned();
            let (identity, replica) = found.ok_or_else(|| refused(&place.name))?;
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let name = place.name.clone();
            let drain = replica.drain.clone();
            let serving = tokio::spawn(async move {
                let Ok((secured, _)) = accept_tls(theirs, &identity).await else {
                    return;
                };
                let _ = tp_tunnel::serve(secured, Arc::new(Manager(name)), drain.cancelled_owned())
                    .await;
            });
            replica.serving.lock().unwrap().push(serving.abort_handle());
            let ours: BoxedStream = Box::new(ours);
            Ok(ours)
        }
        .boxed()
    }
}

/// Knows its name, and dials nothing.
struct Manager(String);

impl Service for Manager {
    fn dial(&self, _: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        async { Err(nowhere()) }.boxed()
    }

    fn associate(&self, _: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        async { Err(nowhere()) }.boxed()
    }

    fn resolve(&self, query: Bytes) -> BoxFuture<'_, Bytes> {
        async { query }.boxed()
    }

    fn control(&self, request: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        let waits = request.uri().query().is_some();
        let manager = ManagerInfo {
            name: self.0.clone(),
            version: "1".into(),
        };
        let view = ClusterView {
            version: 1,
            protocol: 1,
            manager,
            namespace: "shop".into(),
            ..ClusterView::default()
        };
        async move {
            if waits {
                tokio::time::sleep(Duration::from_secs(25)).await;
            }
            Response::new(serde_json::to_vec(&view).unwrap().into())
        }
        .boxed()
    }
}

fn nowhere() -> DialError {
    DialError {
        kind: DialErrorKind::Refused,
        detail: String::new(),
    }
}

struct Supervised {
    tunnel_rx: watch::Receiver<Option<Tunnel>>,
    split_rx: watch::Receiver<Arc<Split>>,
    facts_rx: watch::Receiver<Facts>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), Failure>>,
}

fn supervise(cluster: &Arc<Cluster>) -> Supervised {
    supervise_by(Box::new(InMemory(cluster.clone())))
}

fn supervise_by(dialer: Box<dyn CarrierDialer>) -> Supervised {
    supervise_with(dialer, None)
}

fn supervise_with(
    dialer: Box<dyn CarrierDialer>,
    services: Option<watch::Receiver<Known>>,
) -> Supervised {
    supervise_in(None, dialer, services)
}

fn supervise_in(
    namespace: Option<&str>,
    dialer: Box<dyn CarrierDialer>,
    services: Option<watch::Receiver<Known>>,
) -> Supervised {
    let (tunnel_tx, tunnel_rx) = watch::channel(None);
    let (split_tx, split_rx) = watch::channel(Arc::new(Split::default()));
    let (facts_tx, facts_rx) = watch::channel(Facts::default());
    let supervisor = Supervisor {
        dialer,
        admission: Admission::Key(Identity::generate()),
        namespace: namespace.map(str::to_owned),
        services,
        screen: Screen::new(Source::Cluster, crate::proxy::UserRules::default()),
        tunnel_tx,
        split_tx,
        facts_tx,
    };
    let stop = CancellationToken::new();
    let task = tokio::spawn(supervisor.run(stop.clone()));
    Supervised {
        tunnel_rx,
        split_rx,
        facts_rx,
        stop,
        task,
    }
}

impl Supervised {
    async fn up(&mut self) -> Facts {
        let is_up = |facts: &Facts| matches!(facts.phase, Phase::Connected { .. });
        self.facts_rx.wait_for(is_up).await.unwrap().clone()
    }

    /// Up at another replica than this one. A state in between may be too short to be seen.
    async fn up_elsewhere(&mut self, old: &str) -> Facts {
        let is_up = |facts: &Facts| {
            let manager = facts.manager.as_ref();
            matches!(facts.phase, Phase::Connected { .. }) && manager.is_some_and(|m| m.name != old)
        };
        let waiting = self.facts_rx.wait_for(is_up);
        let facts = tokio::time::timeout(Duration::from_secs(60), waiting).await;
        facts.expect("another replica takes over").unwrap().clone()
    }

    async fn down(&mut self) -> Facts {
        let is_down = |facts: &Facts| matches!(facts.phase, Phase::Reconnecting { .. });
        self.facts_rx.wait_for(is_down).await.unwrap().clone()
    }
}

#[tokio::test(start_paused = true)]
async fn a_carrier_comes_up_and_its_tunnel_answers() {
    let cluster = Cluster::with(&["a"]);
    let mut supervised = supervise(&cluster);

    let facts = supervised.up().await;

    assert_eq!(facts.manager.unwrap().name, "a");
    assert_eq!(facts.namespace, "shop");
    let tunnel = supervised
        .tunnel_rx
        .wait_for(Option::is_some)
        .await
        .unwrap()
        .clone()
        .unwrap();
    assert!(ask_for_view(&tunnel, None).await.is_ok());
    supervised.stop.cancel();
    assert!(supervised.task.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_manager_that_answers_for_another_namespace_is_refused() {
    let cluster = Cluster::with(&["a"]);
    let mut supervised = supervise_in(Some("mine"), Box::new(InMemory(cluster)), None);

    let ended = tokio::time::timeout(Duration::from_secs(60), &mut supervised.task).await;
    let failure = ended.expect("it gives up").unwrap().unwrap_err();

    assert!(failure.what.contains("\"shop\", and mine"), "{failure}");
    assert!(supervised.tunnel_rx.borrow_and_update().is_none());
}

#[tokio::test(start_paused = true)]
async fn when_a_replica_is_killed_the_other_one_takes_over_within_a_second() {
    let cluster = Cluster::with(&["a", "b"]);
    let mut supervised = supervise(&cluster);
    let first = supervised.up().await.manager.unwrap().name;
    let begun = tokio::time::Instant::now();

    cluster.kill(&first);
    let facts = supervised.up_elsewhere(&first).await;

    assert_ne!(facts.manager.unwrap().name, first);
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    assert!(facts.last_cut.unwrap().restored_at.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_drains_is_left_before_it_ends() {
    let cluster = Cluster::with(&["a", "b"]);
    let mut supervised = supervise(&cluster);
    let first = supervised.up().await.manager.unwrap().name;

    cluster.drain(&first);
    let facts = supervised.up_elsewhere(&first).await;

    assert_ne!(facts.manager.unwrap().name, first);
}

#[tokio::test(start_paused = true)]
async fn a_first_attempt_that_fails_ends_it_with_the_reason() {
    let supervised = supervise(&Cluster::with(&[]));

    let failure = supervised.task.await.unwrap().unwrap_err();

    assert_eq!(failure.what, "everything refused");
}

#[tokio::test(start_paused = true)]
async fn it_waits_for_a_manager_that_comes_back_without_hammering() {
    let cluster = Cluster::with(&["a"]);
    let mut supervised = supervise(&cluster);
    supervised.up().await;
    cluster.kill("a");
    supervised.down().await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert!(supervised.tunnel_rx.borrow().is_none());
    assert!(supervised.facts_rx.borrow().error.is_some());

    cluster.start("a");
    let begun = tokio::time::Instant::now();
    let facts = supervised.up().await;

    assert!(
        begun.elapsed() <= Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert!(facts.error.is_none());
    assert_eq!(cluster.dials(), 2, "no replica, no dial");
}

#[tokio::test(start_paused = true)]
async fn a_replica_with_another_key_is_not_spoken_to() {
    let identity = Identity::generate();
    let pinned: KeyHash = Identity::generate().key_hash();
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let server = tokio::spawn(async move { accept_tls(theirs, &identity).await.map(drop) });

    let refused = connect_tls(ours, &Identity::generate(), &pinned).await;

    assert!(refused.is_err());
    assert!(server.await.unwrap().is_err());
}

/// Admits nobody: it ends TLS in good order before the first byte of HTTP.
struct Doorman(Identity);

impl CarrierDialer for Doorman {
    fn kind(&self) -> CarrierKind {
        CarrierKind::Direct
    }

    fn places(&self) -> BoxFuture<'_, Result<Vec<Place>, Unmet>> {
        let key = self.0.key_hash();
        let name = "door".to_owned();
        async move { Ok(vec![Place { name, port: 0, key }]) }.boxed()
    }

    fn dial<'a>(&'a self, _: &'a Place) -> BoxFuture<'a, Result<BoxedStream, Unmet>> {
        let identity = self.0.clone();
        async move {
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            tokio::spawn(async move {
                let (mut secured, _) = accept_tls(theirs, &identity).await.unwrap();
                secured.shutdown().await.unwrap();
                tokio::io::copy(secured.get_mut().0, &mut tokio::io::sink()).await
            });
            let ours: BoxedStream = Box::new(ours);
            Ok(ours)
        }
        .boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn a_manager_that_does_not_know_the_key_is_told_from_a_cut() {
    let supervised = supervise_by(Box::new(Doorman(Identity::generate())));

    let failure = supervised.task.await.unwrap().unwrap_err();

    assert_eq!(failure.what, "the manager at door does not know this key");
    assert_eq!(failure.why, [""; 0], "one line says it all");
    assert!(failure.hint.unwrap().contains("sha256:"));
}

#[tokio::test(start_paused = true)]
async fn a_manager_with_another_key_is_shown_with_a_hint_until_the_locator_names_it() {
    let cluster = Cluster::with(&["a"]);
    let mut supervised = supervise(&cluster);
    supervised.up().await;
    *cluster.stale_key.lock().unwrap() = Some(Identity::generate().key_hash());
    cluster.kill("a");
    cluster.start("a");
    tokio::time::sleep(Duration::from_secs(60)).await;

    let error = supervised.facts_rx.borrow().error.clone().unwrap();
    assert!(
        error.why.iter().any(|why| why.contains("not the pinned")),
        "{error}"
    );
    assert!(error.hint.is_some());
    assert!(cluster.dials() < 40, "{} dials", cluster.dials());

    *cluster.stale_key.lock().unwrap() = None;
    let facts = supervised.up().await;
    assert!(facts.error.is_none());
}

/// The names that go to the tunnel, out of a few.
fn tunnelled(supervised: &mut Supervised) -> Vec<&'static str> {
    let split = supervised.split_rx.borrow_and_update().clone();
    let to_cluster = |name: &&str| split.route(&name.parse().unwrap()) == Route::Cluster;
    let names = ["web", "web.shop", "web-0.web", "new", "new.shop", "new.svc"];
    names.into_iter().filter(to_cluster).collect()
}

#[tokio::test(start_paused = true)]
async fn what_the_user_may_list_completes_a_view_without_services() {
    let cluster = Cluster::with(&["a"]);
    let (known_tx, known_rx) = watch::channel(None);
    let mut supervised = supervise_with(Box::new(InMemory(cluster)), Some(known_rx));
    supervised.up().await;
    assert_eq!(
        tunnelled(&mut supervised),
        ["web", "new", "new.svc"],
        "who knows"
    );

    known_tx.send_replace(Some(["web".to_owned()].into()));
    supervised.split_rx.changed().await.unwrap();
    assert_eq!(
        tunnelled(&mut supervised),
        ["web", "web.shop", "web-0.web", "new.svc"]
    );

    known_tx.send_replace(Some(["web".to_owned(), "new".to_owned()].into()));
    supervised.split_rx.changed().await.unwrap();
    assert!(tunnelled(&mut supervised).contains(&"new.shop"));
}
