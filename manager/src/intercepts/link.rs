//! The connection to one agent: routes go in, matched flows come out and are joined with their workstations'.
//!
//! It dials until somebody answers with the agent's own key, pushes its table whenever it changes and within the lease,
//! and keeps streams posted for the agent to answer. It decides nothing: the plan says which agent and which routes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Response, StatusCode};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tp_manager_api::RouteTable;
use tp_manager_api::route_table::{
    AGENT_PATH, CONNECTIONS_PATH, LEASE, OpenConnections, ROUTES_PATH,
};
use tp_manager_api::sighting::OFFER;
use tp_manager_api::tls::{CREDENTIALS_PATH, FINDINGS_PATH, Findings, Found};
use tp_tunnel::carrier::ReadAhead;
use tp_tunnel::carrier::tls::connect_tls;
use tp_tunnel::{Identity, Incoming, KeyHash, OpenError, Settings, Tunnel, join};

use super::plan::Orders;
use super::workstations::Workstations;
use super::world::{LinkState, Trouble};
use crate::listen::chain;

/// An agent and how to know it.
#[derive(Clone)]
pub(super) struct Agent {
    /// Where it listens.
    pub(super) address: SocketAddr,
    /// The key that it shows.
    pub(super) key: KeyHash,
    /// The manager's own.
    pub(super) identity: Identity,
}

/// How long a SYN may stay unanswered.
const CONNECT: Duration = Duration::from_secs(1);

/// How long an agent may take from there to its first answer.
const INTRODUCTION: Duration = Duration::from_secs(5);

/// Between two tries: an agent that was just started listens within a fraction of a second.
const REST: Duration = Duration::from_millis(50);

/// Streams that wait for flows of the agent. As many can arrive at once; each is replaced as soon as it is answered.
const POSTED: usize = 32;

/// How often the lease is renewed.
const RENEW: Duration = Duration::from_secs(LEASE.as_secs() / 3);

/// How long an agent may take to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// What is known of a connection; shared with who makes the plan.
pub(super) struct Link {
    /// Name of the agent's container.
    pub(super) container: String,
    orders: watch::Sender<Orders>,
    state: Arc<Mutex<LinkState>>,
}

/// The half that the task holds.
pub(super) struct Ends {
    orders: watch::Receiver<Orders>,
    state: Arc<Mutex<LinkState>>,
    changed: watch::Sender<()>,
}

impl Link {
    /// For a task that is about to run [`serve`]. Dropping it withdraws the routes; the task ends when the flows that it
    /// carries have.
    pub(super) fn new(
        container: String,
        orders: Orders,
        changed: watch::Sender<()>,
    ) -> (Self, Ends) {
        let (orders_tx, orders_rx) = watch::channel(orders);
        let state = Arc::new(Mutex::new(LinkState::Dialing {
            since: Instant::now(),
            trouble: None,
        }));
        let link = Self {
            container,
            orders: orders_tx,
            state: Arc::clone(&state),
        };
        let ends = Ends {
            orders: orders_rx,
            state,
            changed,
        };
        (link, ends)
    }

    /// Tells it something else.
    pub(super) fn set(&self, orders: Orders) {
        self.orders
            .send_if_modified(|known| std::mem::replace(known, orders.clone()) != orders);
    }

    /// Where it got to.
    pub(super) fn state(&self) -> LinkState {
        lock(&self.state).clone()
    }
}

impl Ends {
    fn say(&self, state: LinkState) {
        *lock(&self.state) = state;
        self.changed.send_replace(());
    }

    fn trouble(&self, found: Trouble) {
        let news = match &mut *lock(&self.state) {
            LinkState::Dialing { trouble, .. } => trouble.replace(found.clone()) != Some(found),
            LinkState::Connected { .. } | LinkState::Yielded => false,
        };
        if news {
            self.changed.send_replace(());
        }
    }

    /// Says that the agent has taken this table. News only.
    fn connected(
        &self,
        table: &RouteTable,
        open: BTreeMap<u16, u32>,
        found: BTreeMap<String, Found>,
    ) {
        let routes = table.ports.iter().flat_map(|port| &port.intercepts);
        let ids: BTreeSet<_> = routes.map(|route| route.id.clone()).collect();
        let known = match &*lock(&self.state) {
            LinkState::Connected {
                routed,
                open_before,
                unopened,
            } => *routed == ids && *open_before == open && *unopened == found,
            LinkState::Dialing { .. } | LinkState::Yielded => false,
        };
        if !known {
            self.say(LinkState::Connected {
                routed: ids,
                open_before: open,
                unopened: found,
            });
        }
    }

    fn yielded(&self) -> bool {
        matches!(&*lock(&self.state), LinkState::Yielded)
    }

    fn withdrawn(&self) -> bool {
        self.orders.has_changed().is_err()
    }
}

/// Serves one agent until its [`Link`] is dropped, or until it has yielded.
pub(super) async fn serve(agent: Agent, mut ends: Ends, workstations: Arc<Workstations>) {
    while !ends.withdrawn() && !ends.yielded() {
        match dial(&agent).await {
            Ok((tunnel, driver)) => {
                tracing::info!(address = %agent.address, "agent connected");
                let mut tasks = JoinSet::new();
                tasks.spawn(async move {
                    let ended = driver.await;
                    tracing::debug!(?ended, "agent's connection ended");
                });
                converse(&tunnel, &mut ends, &mut tasks, &workstations).await;
                tracing::info!(address = %agent.address, "agent disconnected");
                if !ends.yielded() {
                    ends.say(LinkState::Dialing {
                        since: Instant::now(),
                        trouble: None,
                    });
                }
            }
            Err(trouble) => ends.trouble(trouble),
        }
        tokio::time::sleep(REST).await;
    }
}

async fn dial(agent: &Agent) -> Result<(Tunnel, tp_tunnel::Driver), Trouble> {
    let tcp = match timeout(CONNECT, TcpStream::connect(agent.address)).await {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            return Err(Trouble::Refused);
        }
        Ok(Err(error)) => return Err(Trouble::Other(error.to_string())),
        Err(_) => return Err(Trouble::Silent),
    };
    if let Err(error) = tp_tunnel::carrier::tune(&tcp) {
        tracing::debug!(%error, "cannot set socket options");
    }
    let introduced = timeout(INTRODUCTION, introduce(tcp, agent)).await;
    introduced.unwrap_or_else(|_| Err(Trouble::Other("it does not answer".to_owned())))
}

async fn introduce(tcp: TcpStream, agent: &Agent) -> Result<(Tunnel, tp_tunnel::Driver), Trouble> {
    let other = |error: &dyn std::error::Error| Trouble::Other(chain(error));
    let tls = connect_tls(ReadAhead::new(tcp), &agent.identity, &agent.key)
        .await
        .map_err(|error| other(&error))?;
    let settings = Settings {
        // The agent drops a manager that is silent for three seconds.
        ping_interval: Duration::from_secs(1),
        ping_timeout: Duration::from_secs(3),
        ..Settings::default()
    };
    Tunnel::establish_with(tls, settings)
        .await
        .map_err(|error| other(&error))
}

/// Routes and flows of one connection, until it ends, or the routes are withdrawn or the agent says goodbye, and the last
/// flow has ended. `tasks` holds its driver.
async fn converse(
    tunnel: &Tunnel,
    ends: &mut Ends,
    tasks: &mut JoinSet<()>,
    workstations: &Arc<Workstations>,
) {
    let mut accepting = JoinSet::new();
    let flows = Arc::new(Mutex::new(JoinSet::new()));
    for _ in 0..POSTED {
        accepting.spawn(accept(
            tunnel.clone(),
            ends.orders.clone(),
            Arc::clone(workstations),
            Arc::clone(&flows),
        ));
    }
    tokio::select! {
        () = push(tunnel, ends) => {}
        () = tunnel.closed() => {}
    }
    accepting.shutdown().await;
    let mut left = std::mem::take(&mut *lock(&flows));
    let drained = async { while left.join_next().await.is_some() {} };
    // An agent that is being ended takes nothing new; what it has goes on until its connection has really ended.
    tokio::select! {
        () = drained => {}
        _ = tasks.join_next() => {}
    }
    tasks.shutdown().await;
}

/// Pushes the table when it changes and when the lease needs it. Returns when the routes are withdrawn, the agent does not
/// take them, or has left the pod to another one.
async fn push(tunnel: &Tunnel, ends: &mut Ends) {
    let mut given = BTreeSet::new();
    let (mut unopened, mut is_new) = (BTreeMap::new(), true);
    loop {
        let orders = ends.orders.borrow_and_update().clone();
        if orders.yields {
            let answer = ask(tunnel, Method::DELETE, AGENT_PATH, Vec::new()).await;
            if answer.is_some_and(|answer| answer.status() == StatusCode::NO_CONTENT) {
                ends.say(LinkState::Yielded);
            }
            return;
        }
        if !give(tunnel, &orders, &mut given).await {
            return;
        }
        let next = match put(tunnel, &orders.table).await {
            Push::Taken => {
                let open_before = open_before(tunnel, &orders).await;
                // What is well stays so until something changes.
                if is_new || !unopened.is_empty() {
                    unopened = look(tunnel, &orders).await;
                }
                is_new = false;
                ends.connected(&orders.table, open_before, unopened.clone());
                RENEW
            }
            Push::NotYet => REST,
            Push::Failed => return,
        };
        match timeout(next, ends.orders.changed()).await {
            Ok(Ok(())) => is_new = true,
            Err(_) => {}
            Ok(Err(_)) => {
                put(tunnel, &RouteTable::default()).await;
                return;
            }
        }
    }
}

/// Gives the agent what its next table names and it does not have: it keeps what its last one named.
async fn give(tunnel: &Tunnel, orders: &Orders, given: &mut BTreeSet<String>) -> bool {
    for (id, credential) in orders
        .credentials
        .iter()
        .filter(|(id, _)| !given.contains(*id))
    {
        let body = serde_json::to_vec(credential).expect("two texts are always JSON");
        let answer = ask(tunnel, Method::PUT, CREDENTIALS_PATH, body).await;
        if answer.is_none_or(|answer| answer.status() != StatusCode::NO_CONTENT) {
            tracing::error!(id, "an agent refuses a credential");
            return false;
        }
    }
    *given = orders.credentials.keys().cloned().collect();
    true
}

/// What keeps the agent from opening TLS, by intercept.
async fn look(tunnel: &Tunnel, orders: &Orders) -> BTreeMap<String, Found> {
    if orders.credentials.is_empty() {
        return BTreeMap::new();
    }
    let answer = ask(tunnel, Method::GET, FINDINGS_PATH, Vec::new()).await;
    let findings = answer.and_then(|answer| serde_json::from_slice(answer.body()).ok());
    let Findings { ports } = findings.unwrap_or_default();
    let found = ports.into_iter();
    found
        .map(|finding| (finding.intercept, finding.found))
        .collect()
}

/// What an agent makes of its routes.
enum Push {
    Taken,
    /// The kernel does not redirect yet.
    NotYet,
    Failed,
}

async fn put(tunnel: &Tunnel, table: &RouteTable) -> Push {
    let body = serde_json::to_vec(table).expect("a table is always JSON");
    let Some(answer) = ask(tunnel, Method::PUT, ROUTES_PATH, body).await else {
        return Push::Failed;
    };
    match answer.status() {
        StatusCode::NO_CONTENT => Push::Taken,
        StatusCode::SERVICE_UNAVAILABLE => Push::NotYet,
        status => {
            let why = String::from_utf8_lossy(answer.body()).into_owned();
            tracing::error!(%status, why, "an agent refuses its routes");
            Push::Failed
        }
    }
}

/// Connections from before the agent, by port; those that are idle are reset first where that is wanted. Nothing where the
/// agent does not say.
async fn open_before(tunnel: &Tunnel, orders: &Orders) -> BTreeMap<u16, u32> {
    let method = match orders.close_idle {
        true => Method::DELETE,
        false => Method::GET,
    };
    let answer = ask(tunnel, method, CONNECTIONS_PATH, Vec::new()).await;
    let answer = answer.filter(|answer| answer.status() == StatusCode::OK);
    let Some(counted) = answer.and_then(|answer| serde_json::from_slice(answer.body()).ok()) else {
        return BTreeMap::new();
    };
    let OpenConnections { ports } = counted;
    let of = |listen: u16| ports.iter().find(|counted| counted.port == listen);
    let listens = orders.table.ports.iter().map(|port| port.listen);
    listens
        .map(|listen| (listen, of(listen).map_or(0, |counted| counted.open)))
        .collect()
}

async fn ask(
    tunnel: &Tunnel,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Option<Response<Bytes>> {
    match timeout(ANSWER, tunnel.control(method, path, body.into())).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            tracing::warn!(error = chain(&error), path, "an agent does not answer");
            None
        }
        Err(_) => {
            tracing::warn!(path, "an agent is silent");
            None
        }
    }
}

/// Keeps one stream posted.
async fn accept(
    tunnel: Tunnel,
    orders: watch::Receiver<Orders>,
    workstations: Arc<Workstations>,
    flows: Arc<Mutex<JoinSet<()>>>,
) {
    loop {
        match tunnel.accept().await {
            Ok(incoming) => {
                let mut flows = lock(&flows);
                while flows.try_join_next().is_some() {}
                // An agent is believed about its own intercepts and no others.
                if routes(&orders.borrow().table, incoming.intercept()) {
                    flows.spawn(carry(incoming, Arc::clone(&workstations)));
                }
            }
            Err(OpenError::Reset(_)) if !tunnel.is_closed() => tokio::time::sleep(REST).await,
            Err(error) => {
                tracing::debug!(error = chain(&error), "no more flows of an agent");
                return;
            }
        }
    }
}

/// Whether the table has the intercept that a flow is offered for, or sightings of it.
fn routes(table: &RouteTable, offered: &str) -> bool {
    let intercept = offered.strip_prefix(OFFER).unwrap_or(offered);
    let mut routes = table.ports.iter().flat_map(|port| &port.intercepts);
    routes.any(|route| route.id == intercept)
}

/// One flow, from the agent's offer to its end. The workstation is asked first; what it does not take, the agent gets back
/// at once. What it took and then fell silent about is reset, so that somebody can say so to whoever waits for the answer.
async fn carry(mut incoming: Incoming, workstations: Arc<Workstations>) {
    let (intercept, peer) = (incoming.intercept().to_owned(), incoming.peer());
    let opened = tokio::select! {
        opened = workstations.open(&intercept, peer) => opened,
        () = incoming.cancelled() => return,
    };
    match opened {
        Ok((there, mut attention)) => match incoming.opened().await {
            Ok(here) => tokio::select! {
                () = join(here, there) => {}
                () = attention.silent() => tracing::info!(intercept, "the workstation is silent: flow reset"),
            },
            Err(error) => tracing::debug!(%error, "the agent gave up"),
        },
        Err(error) => {
            tracing::debug!(%error, intercept, "flow refused");
            incoming.refuse().await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
