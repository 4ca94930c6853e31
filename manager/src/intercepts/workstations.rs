//! The workstations that are connected to this replica, and how flows of their intercepts get to them.
//!
//! A workstation that has gone keeps its place for a lease: its carrier may only have been replaced, and until then its
//! requests fall back to the application one by one, as the agent marks them. Knows nothing of pods.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{SetOnce, watch};
use tokio::time::Instant;
use tp_manager_api::route_table::LEASE;
use tp_manager_api::sighting::OFFER;
use tp_manager_api::tls::Handover;
use tp_tunnel::{Attention, Flow, NotOpened, Workstation};

use crate::metrics::Metrics;

/// Uid of a Session.
pub(super) type SessionUid = Arc<str>;

/// All of them. One a process.
pub struct Workstations {
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Inner {
    places: HashMap<SessionUid, Place>,
    /// Whose an intercept is.
    owners: BTreeMap<String, SessionUid>,
    last: u64,
}

/// Where one session's connections are. Several while one takes over from another.
#[derive(Default)]
struct Place {
    connections: Vec<Arc<Connection>>,
    left: Option<Instant>,
    /// By the uid of the intercept whose Secret it is about.
    handovers: BTreeMap<String, (Handover, Instant)>,
}

/// Handovers of one session at a time.
const HANDOVERS_MAX: usize = 64;

/// How long a handover waits for the watch to show its intercept.
const UNSEEN: Duration = Duration::from_secs(30);

struct Connection {
    id: u64,
    since: Instant,
    workstation: Workstation,
    /// An offer was not answered in time. Then one offer at a time finds out whether that has changed, and all others
    /// fall back at once.
    suspect: AtomicBool,
    probing: AtomicBool,
}

/// Whether a session's workstation is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Here {
    /// Connected, the newest connection since then.
    Now(Instant),
    /// It was, less than a lease ago.
    Lately,
    /// No.
    No,
}

/// What one connection needs to be among them, for as long as it lasts. A workstation may try several replicas at a time, so
/// it is not among them before it stays.
pub struct Seat {
    workstations: Arc<Workstations>,
    session: SessionUid,
    arrived: OnceLock<Workstation>,
    taken: OnceLock<Presence>,
    stays: Arc<SetOnce<()>>,
}

/// Ends the place when it is dropped.
struct Presence {
    workstations: Arc<Workstations>,
    session: SessionUid,
    id: u64,
}

impl Seat {
    /// For a connection by the session of this uid. `stays` is set when the workstation stays with it.
    pub fn new(workstations: Arc<Workstations>, session: &str, stays: Arc<SetOnce<()>>) -> Self {
        Self {
            workstations,
            session: session.into(),
            arrived: OnceLock::new(),
            taken: OnceLock::new(),
            stays,
        }
    }

    /// The connection is up.
    pub fn arrive(&self, workstation: Workstation) {
        // Told once.
        let _ = self.arrived.set(workstation);
    }

    /// The workstation does not go on with another connection.
    pub fn stay(&self) {
        if let Some(workstation) = self.arrived.get() {
            self.taken
                .get_or_init(|| self.workstations.enter(&self.session, workstation.clone()));
            // More than once it says nothing new.
            let _ = self.stays.set(());
        }
    }

    /// What the workstation read of the Secret of this intercept. False where there is no place for more.
    pub fn hand_over(&self, intercept: &str, handover: Handover) -> bool {
        let taken = {
            let mut inner = self.workstations.inner();
            let place = inner.places.get_mut(&self.session);
            place.is_some_and(|place| place.hand_over(intercept, handover))
        };
        self.workstations.changed.send_replace(());
        taken
    }
}

impl Workstations {
    /// Nobody yet. `metrics` is where flows are counted.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            inner: Mutex::default(),
            changed: watch::channel(()).0,
            metrics,
        }
    }

    /// A workstation has connected by this session.
    fn enter(self: &Arc<Self>, session: &SessionUid, workstation: Workstation) -> Presence {
        let session = Arc::clone(session);
        let mut inner = self.inner();
        inner.last += 1;
        let id = inner.last;
        let place = inner.places.entry(Arc::clone(&session)).or_default();
        place.left = None;
        place.connections.push(Arc::new(Connection {
            id,
            since: Instant::now(),
            workstation,
            suspect: AtomicBool::new(false),
            probing: AtomicBool::new(false),
        }));
        drop(inner);
        self.changed.send_replace(());
        Presence {
            workstations: Arc::clone(self),
            session,
            id,
        }
    }

    /// Whether the session's workstation is here.
    pub(super) fn here(&self, session: &str) -> Here {
        let inner = self.inner();
        let Some(place) = inner.places.get(session) else {
            return Here::No;
        };
        match (place.connections.last(), place.left) {
            (Some(newest), _) => Here::Now(newest.since),
            (None, Some(left)) if left.elapsed() < LEASE => Here::Lately,
            (None, _) => Here::No,
        }
    }

    /// What the session's workstation read of the Secret of this intercept.
    pub(super) fn handover(&self, session: &str, intercept: &str) -> Option<Handover> {
        let inner = self.inner();
        let (handover, _) = inner.places.get(session)?.handovers.get(intercept)?;
        Some(handover.clone())
    }

    /// Forgets what is about other intercepts than these.
    pub(super) fn forget_handovers(&self, known: &BTreeSet<&str>) {
        for place in self.inner().places.values_mut() {
            place
                .handovers
                .retain(|id, (_, at)| known.contains(id.as_str()) || at.elapsed() < UNSEEN);
        }
    }

    /// Tells when somebody came or went.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Says whose each intercept is. What is not listed is nobody's from now on.
    pub(super) fn assign(&self, owners: BTreeMap<String, SessionUid>) {
        let mut inner = self.inner();
        inner.owners = owners;
        let gone = |place: &Place| place.left.is_some_and(|left| left.elapsed() >= LEASE);
        inner.places.retain(|_, place| !gone(place));
    }

    /// Offers a flow of this intercept to its workstation, the newest connection first, and says when that falls silent.
    /// Dropping the future takes the offer back.
    ///
    /// # Errors
    /// It was not taken; nothing of the flow was sent.
    pub(super) async fn open(
        &self,
        intercept: &str,
        peer: SocketAddr,
    ) -> Result<(Flow, Attention), NotOpened> {
        let opened = self.open_newest(intercept, peer).await;
        // Sightings are no traffic.
        if !intercept.starts_with(OFFER) {
            self.metrics.inbound(opened.is_ok());
        }
        opened
    }

    async fn open_newest(
        &self,
        intercept: &str,
        peer: SocketAddr,
    ) -> Result<(Flow, Attention), NotOpened> {
        for connection in self.connections(intercept) {
            match connection.open(intercept, peer).await {
                Err(NotOpened::Closed) => {}
                outcome => return outcome,
            }
        }
        Err(NotOpened::Closed)
    }

    fn connections(&self, intercept: &str) -> Vec<Arc<Connection>> {
        let inner = self.inner();
        let owner = inner
            .owners
            .get(intercept.strip_prefix(OFFER).unwrap_or(intercept));
        let place = owner.and_then(|session| inner.places.get(session));
        let connections = place.into_iter().flat_map(|place| &place.connections);
        connections.rev().map(Arc::clone).collect()
    }

    fn leave(&self, session: &str, id: u64) {
        let mut inner = self.inner();
        if let Some(place) = inner.places.get_mut(session) {
            place.connections.retain(|connection| connection.id != id);
            if place.connections.is_empty() {
                place.left = Some(Instant::now());
            }
        }
        drop(inner);
        self.changed.send_replace(());
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    fn hand_over(&mut self, intercept: &str, handover: Handover) -> bool {
        let is_known = self.handovers.contains_key(intercept);
        let has_room = is_known || self.handovers.len() < HANDOVERS_MAX;
        if has_room {
            let now = Instant::now();
            self.handovers.insert(intercept.to_owned(), (handover, now));
        }
        has_room
    }
}

impl Connection {
    async fn open(
        &self,
        intercept: &str,
        peer: SocketAddr,
    ) -> Result<(Flow, Attention), NotOpened> {
        if self.workstation.is_silent()
            || self.suspect.load(Relaxed) && self.probing.swap(true, Relaxed)
        {
            return Err(NotOpened::TimedOut);
        }
        let _probe = Probe(&self.probing);
        let attention = self.workstation.attend();
        let outcome = self.workstation.open(intercept, peer).await;
        let silent = matches!(outcome, Err(NotOpened::TimedOut));
        if self.suspect.swap(silent, Relaxed) != silent {
            tracing::info!(silent, intercept, "workstation");
        }
        outcome.map(|flow| (flow, attention))
    }
}

/// Lets the next offer find out, also when this one was dropped.
struct Probe<'a>(&'a AtomicBool);

impl Drop for Probe<'_> {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.workstations.leave(&self.session, self.id);
    }
}

#[cfg(test)]
mod tests;
