//! Keeps one carrier up: the shell around [`Connection`].
//!
//! It owns the carrier, hands the tunnel over it to the proxy, follows the manager's view of the cluster and renews
//! the session. What it decides is only what [`Connection`] told it to do. Its flows end with their carrier.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http::Method;
use jiff::Timestamp;
use rand::seq::SliceRandom;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tp_manager_api::cluster_view::ManagerInfo;
use tp_manager_api::{CLUSTER_PATH, ClusterView, OLDEST_PROTOCOL};
use tp_tunnel::carrier::tls::{TlsError, connect_tls};
use tp_tunnel::{Identity, Tunnel, TunnelError};

use super::access::Admission;
use super::carrier::{CarrierDialer, Place};
use super::connection::{Connection, Output, Phase, Severity};
use super::overlap::Workstation;
use super::screen::{Screen, Screened};
use super::services::Known;
use super::status::{CarrierKind, Cut};
use super::unmet::Unmet;
use crate::proxy::split::Split;
use crate::report::Failure;

/// How long one replica may take, from the dial to its first answer.
const UP_WITHIN: Duration = Duration::from_millis(4500);

/// How long the first replica is tried alone before the next one is tried as well.
const HEAD_START: Duration = Duration::from_millis(400);

/// How often the session's age is looked at. Short, so that waking from sleep is noticed.
const SESSION_CHECK: Duration = Duration::from_secs(30);

/// How long after a carrier was closed its end may follow, to count as one event.
const END_AFTER_CLOSED: Duration = Duration::from_millis(20);

/// Pause after the manager answered a view request with nonsense.
const VIEW_RETRY: Duration = Duration::from_secs(2);

/// What is known of the connection at this moment.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Where it is in its life.
    pub phase: Phase,
    /// The carrier that is up.
    pub carrier: Option<CarrierFacts>,
    /// Who answers at its end; the last one known while there is none.
    pub manager: Option<ManagerInfo>,
    /// Namespace whose short names resolve.
    pub namespace: String,
    /// The last time a carrier was lost.
    pub last_cut: Option<Cut>,
    /// Why the last attempt to connect, or to renew the session, failed.
    pub error: Option<Failure>,
    /// Payload bytes up and down on carriers that are gone.
    pub carried: Carried,
    /// Collisions with the workstation's own addresses and names, and what of the view is not followed.
    pub overlaps: Vec<String>,
}

/// One carrier that is up.
#[derive(Clone, Debug)]
pub struct CarrierFacts {
    /// How it goes.
    pub kind: CarrierKind,
    /// What is at its other end.
    pub peer: String,
    /// Since when.
    pub up_since: Timestamp,
}

impl Default for Facts {
    fn default() -> Self {
        Self {
            phase: Phase::Connecting,
            carrier: None,
            manager: None,
            namespace: String::new(),
            last_cut: None,
            error: None,
            carried: (0, 0),
            overlaps: Vec::new(),
        }
    }
}

/// See the module.
pub struct Supervisor {
    /// How carriers are opened.
    pub dialer: Box<dyn CarrierDialer>,
    /// What lets the connection in.
    pub admission: Admission,
    /// The namespace that was asked for; a manager without Kubernetes has none.
    pub namespace: Option<String>,
    /// The namespace's Services as the user sees them, where the manager has no right to.
    pub services: Option<watch::Receiver<Known>>,
    /// What the user wants to go where, and how much of the manager's view is followed.
    pub screen: Screen,
    /// To the proxy: the tunnel, while there is one.
    pub tunnel_tx: watch::Sender<Option<Tunnel>>,
    /// To the proxy: what goes where.
    pub split_tx: watch::Sender<Arc<Split>>,
    /// To whoever asks.
    pub facts_tx: watch::Sender<Facts>,
}

/// A carrier that is up, with all that runs on it.
struct Live {
    place: Place,
    tunnel: Tunnel,
    driver: DriverTask,
    view: ClusterView,
}

type DriverTask = AbortOnDropHandle<Result<(), TunnelError>>;

/// How a carrier's time ended.
enum Over {
    /// Its flows are gone.
    Cut(String),
    /// Its flows go on, and new ones need another carrier.
    Draining(String, DriverTask),
    /// The connection as a whole is over.
    Final(Failure),
}

/// Payload bytes, up and down.
type Carried = (u64, u64);

impl Supervisor {
    /// Runs until `stop`, or until there is no point in going on.
    ///
    /// # Errors
    /// Why it could not connect at all, or why it gave up later.
    pub async fn run(self, stop: CancellationToken) -> Result<(), Failure> {
        let mut connection = Connection::new(rand::random(), now());
        // Carriers whose last flows are ending. Dropping the set cuts them.
        let mut draining = JoinSet::new();
        let work = async {
            loop {
                self.turn(&mut connection, &mut draining).await?;
            }
        };
        let outcome = stop.run_until_cancelled(work).await;
        self.tunnel_tx.send_replace(None);
        self.facts_tx
            .send_modify(|facts| facts.phase = Phase::Ended);
        outcome.unwrap_or(Ok(()))
    }

    /// One attempt and all that comes of it, or the pause before it.
    async fn turn(
        &self,
        connection: &mut Connection,
        draining: &mut JoinSet<Carried>,
    ) -> Result<(), Failure> {
        while let Some(drained) = draining.try_join_next() {
            self.add_carried(drained.unwrap_or_default());
        }
        match connection.poll_output(now()) {
            Some(Output::Dial) => {}
            None => {
                let due = connection.poll_timeout().unwrap_or_else(now);
                tokio::time::sleep_until(due.into()).await;
                return Ok(());
            }
        }
        match self.attempt().await {
            Ok(live) => {
                connection.handle_established(now());
                self.came_up(connection, &live);
                let tunnel = live.tunnel.clone();
                let over = self.attend(live).await;
                let carried = carried_by(&tunnel);
                self.add_carried(carried);
                connection.handle_lost(now());
                match over {
                    Over::Cut(reason) => self.went_down(connection, reason),
                    Over::Draining(reason, driver) => {
                        draining.spawn(drain(tunnel, driver, carried));
                        self.went_down(connection, reason);
                    }
                    Over::Final(failure) => return Err(failure),
                }
            }
            Err(unmet) => {
                connection.handle_failed(unmet.severity, now());
                if connection.phase() == Phase::Ended {
                    return Err(unmet.failure);
                }
                self.stayed_down(connection, &unmet.failure);
            }
        }
        Ok(())
    }

    fn came_up(&self, connection: &Connection, live: &Live) {
        tracing::info!(
            peer = live.place.name,
            manager = live.view.manager.name,
            "carrier up"
        );
        self.set_view(live.view.clone());
        self.facts_tx.send_modify(|facts| {
            facts.phase = connection.phase();
            facts.error = None;
            facts.carrier = Some(CarrierFacts {
                kind: self.dialer.kind(),
                peer: live.place.name.clone(),
                up_since: Timestamp::now(),
            });
            if let Some(cut) = &mut facts.last_cut {
                cut.restored_at.get_or_insert_with(Timestamp::now);
            }
        });
        self.tunnel_tx.send_replace(Some(live.tunnel.clone()));
    }

    fn add_carried(&self, (up, down): Carried) {
        self.facts_tx.send_modify(|facts| {
            facts.carried = (facts.carried.0 + up, facts.carried.1 + down);
        });
    }

    fn went_down(&self, connection: &Connection, reason: String) {
        tracing::warn!(reason, "carrier lost");
        self.tunnel_tx.send_replace(None);
        self.facts_tx.send_modify(|facts| {
            facts.phase = connection.phase();
            facts.carrier = None;
            facts.last_cut = Some(Cut {
                at: Timestamp::now(),
                reason,
                restored_at: None,
            });
        });
    }

    fn stayed_down(&self, connection: &Connection, failure: &Failure) {
        tracing::warn!(error = failure.one_line(), "cannot reconnect yet");
        self.facts_tx.send_modify(|facts| {
            facts.phase = connection.phase();
            facts.error = Some(failure.clone());
        });
    }

    /// Brings one carrier up, at whichever replica answers first.
    async fn attempt(&self) -> Result<Live, Unmet> {
        let identity = async {
            match &self.admission {
                Admission::Key(identity) => Ok(identity.clone()),
                Admission::Session(session) => session.ensure().await,
            }
        };
        // At once, since neither needs the other; but without a manager, that is what to say.
        let (identity, places) = tokio::join!(identity, self.dialer.places());
        let places = self.ordered(places?);
        let identity = identity?;
        first_up(places, HEAD_START, |place| self.bring_up(place, &identity)).await
    }

    /// In random order, to spread the load; the replica that was lost last comes last.
    fn ordered(&self, mut places: Vec<Place>) -> Vec<Place> {
        places.shuffle(&mut rand::rng());
        let last = self
            .facts_tx
            .borrow()
            .manager
            .clone()
            .unwrap_or_default()
            .name;
        let was_cut = self.facts_tx.borrow().last_cut.is_some();
        places.sort_by_key(|place| was_cut && place.name == last);
        places
    }

    async fn bring_up(&self, place: Place, identity: &Identity) -> Result<Live, Unmet> {
        let name = place.name.clone();
        let late = || {
            Unmet::passing(Failure::new(format!(
                "the manager at {name} did not answer within {UP_WITHIN:?}"
            )))
        };
        tokio::time::timeout(UP_WITHIN, self.bring_up_slowly(place, identity))
            .await
            .map_err(|_| late())?
    }

    async fn bring_up_slowly(&self, place: Place, identity: &Identity) -> Result<Live, Unmet> {
        let stream = self.dialer.dial(&place).await?;
        let secured = connect_tls(stream, identity, &place.key).await;
        let secured = secured.map_err(|error| not_secured(&place, &error))?;
        let established = Tunnel::establish(secured).await;
        let (tunnel, driver) = established.map_err(|error| self.not_admitted(&place, &error))?;
        let driver = AbortOnDropHandle::new(tokio::spawn(driver));
        let view = self.cluster_view(&tunnel, None).await;
        let view = view.map_err(Unmet::passing)?;
        if view.protocol < OLDEST_PROTOCOL {
            let what = format!(
                "the manager {} (protocol {}) is too old for this tp",
                view.manager.version, view.protocol
            );
            return Err(Unmet::lasting(
                Failure::new(what).hint("upgrade the manager"),
            ));
        }
        Ok(Live {
            place,
            tunnel,
            driver,
            view,
        })
    }

    fn not_admitted(&self, place: &Place, error: &TunnelError) -> Unmet {
        let name = &place.name;
        Unmet::passing(match (error, &self.admission) {
            (TunnelError::NotAdmitted, Admission::Key(identity)) => {
                Failure::new(format!("the manager at {name} does not know this key")).hint(format!(
                    "whoever runs it lists the key's hash in its authorized keys: {}",
                    identity.key_hash()
                ))
            }
            (TunnelError::NotAdmitted, Admission::Session(session)) => Failure::new(format!(
                "the manager at {name} does not know this connection's Session"
            ))
            .hint(session.whereabouts()),
            (_, _) => Failure::new(format!("no tunnel to the manager at {name}")).caused_by(error),
        })
    }

    /// Lives with a carrier until it is over. Cancel safe: dropping it drops the carrier.
    async fn attend(&self, live: Live) -> Over {
        let Live {
            tunnel,
            mut driver,
            view,
            ..
        } = live;
        tokio::select! {
            biased;
            ended = &mut driver => return Over::Cut(why_ended(ended)),
            () = tunnel.closed() => {}
            never = self.follow_view(&tunnel, view) => never,
            failure = self.keep_session() => return Over::Final(failure),
        }
        // Closed is said a moment before the end, and also when there will be none for a while.
        match tokio::time::timeout(END_AFTER_CLOSED, &mut driver).await {
            Ok(ended) => Over::Cut(why_ended(ended)),
            Err(_) => Over::Draining("the manager takes no new flows on it".to_owned(), driver),
        }
    }

    async fn follow_view<T>(&self, tunnel: &Tunnel, mut view: ClusterView) -> T {
        let mut services = self.services.clone();
        loop {
            tokio::select! {
                answer = self.cluster_view(tunnel, Some(view.version)) => match answer {
                    Ok(newer) if newer.version == view.version => {}
                    Ok(newer) => {
                        view = newer;
                        self.set_view(view.clone());
                    }
                    Err(failure) => {
                        tracing::debug!(error = failure.one_line(), "no view of the cluster");
                        tokio::time::sleep(VIEW_RETRY).await;
                    }
                },
                () = changed(&mut services) => self.set_view(view.clone()),
            }
        }
    }

    /// Renews the session while its carrier is up. Returns when it is gone for good.
    async fn keep_session(&self) -> Failure {
        let session = match &self.admission {
            Admission::Key(_) => return std::future::pending().await,
            Admission::Session(session) => session,
        };
        loop {
            tokio::time::sleep(SESSION_CHECK).await;
            let error = match session.keep().await {
                Ok(()) => None,
                Err(unmet) if unmet.severity == Severity::Final => return unmet.failure,
                Err(unmet) => {
                    tracing::warn!(error = unmet.failure.one_line(), "session not renewed yet");
                    Some(unmet.failure.within("the session is not renewed yet"))
                }
            };
            self.facts_tx.send_modify(|facts| facts.error = error);
        }
    }

    /// What the cluster looks like; with a version, once it differs from that one.
    async fn cluster_view(
        &self,
        tunnel: &Tunnel,
        after: Option<u64>,
    ) -> Result<ClusterView, Failure> {
        let view = ask_for_view(tunnel, after).await?;
        match &self.namespace {
            Some(namespace) if *namespace != view.namespace => Err(Failure::new(format!(
                "the manager answers for namespace {:?}, and {namespace} was asked for",
                view.namespace
            ))
            .because(
                "the Session by which it admits this connection is not the one written for it",
            )),
            _ => Ok(view),
        }
    }

    fn set_view(&self, mut view: ClusterView) {
        let known = self
            .services
            .as_ref()
            .map(|services| services.borrow().clone());
        let anybodys_guess = matches!(known, Some(None));
        if let Some(Some(names)) = known {
            let names = names.into_iter().collect();
            view.services.insert(view.namespace.clone(), names);
        }
        let workstation = Workstation::read();
        let Screened { view, notes } = self.screen.pass(view, &workstation);
        let split = Split::new(view.clone(), self.screen.rules().clone());
        let split = match anybodys_guess {
            true => split.with_any_label_but(workstation.names().clone()),
            false => split,
        };
        let mut overlaps = workstation.overlaps(&view, &split);
        overlaps.extend(notes);
        self.split_tx.send_replace(Arc::new(split));
        self.facts_tx.send_modify(|facts| {
            facts.manager = Some(view.manager);
            facts.namespace = view.namespace;
            facts.overlaps = overlaps;
        });
    }
}

/// Resolves when other Services are known; never where nobody looks, or no more.
async fn changed(services: &mut Option<watch::Receiver<Known>>) {
    let changed = match services {
        Some(services) => services.changed().await.is_ok(),
        None => false,
    };
    if !changed {
        std::future::pending().await
    }
}

/// The manager's end did not prove to be the manager.
fn not_secured(place: &Place, error: &TlsError) -> Unmet {
    let what = format!("no secure connection to the manager at {}", place.name);
    let failure = Failure::new(what).caused_by(error);
    if !matches!(error, TlsError::WrongKey { .. }) {
        return Unmet::passing(failure);
    }
    Unmet::passing(failure.hint("somebody else answers there, or the manager has a new key: ask whoever runs it before you trust that"))
}

fn carried_by(tunnel: &Tunnel) -> Carried {
    let traffic = tunnel.traffic();
    (traffic.bytes_up, traffic.bytes_down)
}

/// Lets the last flows of a carrier end; returns what it carried meanwhile. The manager bounds how long that may take.
async fn drain(tunnel: Tunnel, driver: DriverTask, (up, down): Carried) -> Carried {
    let ended = driver.await;
    tracing::info!(reason = why_ended(ended), "old carrier drained");
    let (all_up, all_down) = carried_by(&tunnel);
    (all_up.saturating_sub(up), all_down.saturating_sub(down))
}

fn why_ended(ended: Result<Result<(), TunnelError>, JoinError>) -> String {
    match ended {
        Ok(Ok(())) => "the manager closed it".to_owned(),
        Ok(Err(error)) => Failure::new(error.to_string()).caused_by(&error).one_line(),
        Err(panic) => format!("its driver ended: {panic}"),
    }
}

async fn ask_for_view(tunnel: &Tunnel, after: Option<u64>) -> Result<ClusterView, Failure> {
    let path = match after {
        Some(version) => format!("{CLUSTER_PATH}?after={version}"),
        None => CLUSTER_PATH.to_owned(),
    };
    let unreadable = || Failure::new("the manager does not say what the cluster looks like");
    let answer = tunnel.control(Method::GET, &path, Bytes::new()).await;
    let answer = answer.map_err(|error| unreadable().caused_by(&error))?;
    if !answer.status().is_success() {
        return Err(unreadable().because(format!("it answered {}", answer.status())));
    }
    serde_json::from_slice(answer.body()).map_err(|error| unreadable().caused_by(&error))
}

/// Tries places in order, the next one when the last one failed or had its head start; the first success wins, and
/// dropping the rest drops what they opened. Without a success, the first failure is returned.
async fn first_up<T, F>(
    places: Vec<Place>,
    head_start: Duration,
    up: impl Fn(Place) -> F,
) -> Result<T, Unmet>
where
    F: Future<Output = Result<T, Unmet>>,
{
    let mut waiting = places.into_iter();
    let mut trying = FuturesUnordered::new();
    let mut first_failure = None;
    loop {
        match waiting.next() {
            Some(place) => trying.push(up(place)),
            None if trying.is_empty() => break,
            None => {}
        }
        let patience = if waiting.len() == 0 {
            Duration::MAX
        } else {
            head_start
        };
        match tokio::time::timeout(patience, trying.next()).await {
            Ok(Some(Ok(up))) => return Ok(up),
            Ok(Some(Err(unmet))) => {
                first_failure.get_or_insert(unmet);
            }
            Ok(None) | Err(_) => {}
        }
    }
    let nowhere = || {
        Unmet::passing(Failure::new(
            "there is no replica of the manager to connect to",
        ))
    };
    Err(first_failure.unwrap_or_else(nowhere))
}

/// Tokio's clock, so that tests can pause it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests;
