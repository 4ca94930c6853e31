//! The connection that the manager dials: routes come in, matched requests go out on the streams it posts.
//!
//! The agent is the serving side of a tunnel. It reaches nothing for the manager: every request to dial is refused.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode};
use tokio::net::{TcpStream, UdpSocket};
use tp_manager_api::RouteTable;
use tp_manager_api::route_table::{AGENT_PATH, CONNECTIONS_PATH, Listen, Protocol, ROUTES_PATH};
use tp_manager_api::tls::{CREDENTIALS_PATH, Credential, FINDINGS_PATH};
use tp_tunnel::carrier::tls::accept_tls;
use tp_tunnel::server::serve_with;
use tp_tunnel::{
    DialError, DialErrorKind, Dialed, Identity, KeyHash, Service, Settings, Target, Workstation,
};

use crate::book::Credentials;
use crate::bypass;
use crate::front::{Shared, tls};
use crate::heartbeat::PATIENCE;

/// Path of the probe: `{"version", "ports"}` as the agent sees them.
pub const HEALTH_PATH: &str = "/v1/health";

/// A manager that pings every second and is silent for so long is gone; its workstations' requests fail then.
const PEER_SILENCE: Duration = Duration::from_secs(3);

/// Limits of the connection: the windows are smaller than a workstation's, since they are part of the agent's memory.
pub fn settings() -> Settings {
    Settings {
        peer_silence: PEER_SILENCE,
        window_min: 256 << 10,
        window_max: 1 << 20,
        held_max: 8 << 20,
        ..Settings::default()
    }
}

/// Speaks with whoever holds the manager's key, until the connection or `shutdown` ends it. Others get no byte.
pub async fn serve(
    tcp: TcpStream,
    identity: &Identity,
    manager: KeyHash,
    shared: Arc<Shared>,
    shutdown: impl Future<Output = ()>,
) {
    static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
    if let Err(error) = tp_tunnel::carrier::tune(&tcp) {
        tracing::debug!(%error, "cannot set socket options");
    }
    let own = match tcp.local_addr() {
        Ok(own) => own.ip().to_canonical(),
        Err(_) => return,
    };
    let (stream, key) = match accept_tls(tcp, identity).await {
        Ok(accepted) => accepted,
        Err(error) => {
            // A probe of the kubelet's does no more than connect.
            tracing::debug!(%error, "a peer without TLS was refused");
            return;
        }
    };
    if key != manager {
        tracing::warn!(%key, "a peer that is not the manager was refused");
        return;
    }
    // It stays the same for the pod's life.
    let _ = shared.own.set(own);
    let service = Arc::new(Agent {
        own,
        connection: CONNECTIONS.fetch_add(1, Ordering::Relaxed),
        workstation: OnceLock::new(),
        credentials: Mutex::default(),
        shared,
    });
    tracing::info!(connection = service.connection, "manager connected");
    let agent = Arc::clone(&service);
    let ended = serve_with(stream, service, settings(), shutdown).await;
    agent.shared.book.ended(agent.connection);
    tracing::info!(?ended, "manager disconnected");
}

/// One connection of a manager.
struct Agent {
    connection: u64,
    /// Where its intercepts' requests go.
    workstation: OnceLock<Workstation>,
    /// What its next table may name.
    credentials: Mutex<Credentials>,
    /// Where the manager found this pod.
    own: IpAddr,
    shared: Arc<Shared>,
}

/// Credentials that one connection may have given.
const CREDENTIALS_MAX: usize = 64;

impl Agent {
    async fn put_routes(&self, body: &[u8]) -> Response<Bytes> {
        let (tcp, udp) = match self.push(body) {
            Ok(ports) => ports,
            Err(why) => return status(StatusCode::BAD_REQUEST, why.into()),
        };
        self.shared.changed.notify_one();
        let redirected = match &self.shared.parent {
            Some(parent) => parent.redirects(&tcp, &udp).await,
            None => true,
        };
        match redirected {
            true => status(StatusCode::NO_CONTENT, Bytes::new()),
            false => unavailable("the kernel did not redirect the ports"),
        }
    }

    /// Counts what bypasses the agent, on all intercepted ports.
    async fn connections(&self) -> Response<Bytes> {
        let shared = Arc::clone(&self.shared);
        let counting = move || {
            let ports = shared.book.ports();
            match shared.parent {
                Some(_) => bypass::count(&ports),
                None => shared.passing.count(&ports),
            }
        };
        let counted = tokio::task::spawn_blocking(counting).await;
        match counted.map_err(io::Error::other).flatten() {
            Ok(counted) => status(
                StatusCode::OK,
                serde_json::to_vec(&counted).unwrap_or_default().into(),
            ),
            Err(error) => status(StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into()),
        }
    }

    async fn close_idle(&self) -> Response<Bytes> {
        let ports = self.shared.book.ports_of(self.connection);
        let closed = match &self.shared.parent {
            Some(parent) => parent.close(ports).await,
            None => self.close_passing(ports).await,
        };
        match closed {
            true => self.connections().await,
            false => unavailable("the idle connections were not closed"),
        }
    }

    async fn close_passing(&self, ports: Vec<u16>) -> bool {
        let shared = Arc::clone(&self.shared);
        let closing = tokio::task::spawn_blocking(move || shared.passing.close_idle(&ports));
        closing.await.map_err(io::Error::other).flatten().is_ok()
    }

    /// Takes a table; returns its intercepted ports, of TCP and of UDP.
    fn push(&self, body: &[u8]) -> Result<(Vec<u16>, Vec<u16>), String> {
        let table: RouteTable = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        table.check().map_err(|error| error.to_string())?;
        let workstation = self.workstation.get().cloned();
        let workstation = workstation.ok_or("not connected yet")?;
        let credentials = self.named_by(&table)?;
        let wanted = table
            .ports
            .iter()
            .filter(|port| !port.intercepts.is_empty());
        let (tcp, udp): (Vec<_>, Vec<_>) = wanted
            .map(|port| (port.protocol, port.listen))
            .partition(|(protocol, _)| *protocol == Protocol::Tcp);
        let numbers = |ports: Vec<Listen>| ports.into_iter().map(|(_, port)| port).collect();
        let book = &self.shared.book;
        let pushed = (table, credentials);
        book.push(self.connection, pushed, workstation, Instant::now());
        Ok((numbers(tcp), numbers(udp)))
    }

    /// The credentials of a table; all others are forgotten.
    fn named_by(&self, table: &RouteTable) -> Result<Credentials, String> {
        let routes = table.ports.iter().flat_map(|port| &port.intercepts);
        let named: BTreeSet<_> = routes.filter_map(|route| route.tls.as_ref()).collect();
        let mut credentials = self.credentials();
        if let Some(id) = named.iter().find(|id| !credentials.contains_key(**id)) {
            return Err(format!("credential {id} was not given"));
        }
        credentials.retain(|id, _| named.contains(id));
        Ok(credentials.clone())
    }

    fn put_credential(&self, body: &[u8]) -> Response<Bytes> {
        // What serde says of it could show a part of it.
        let Ok(credential) = serde_json::from_slice::<Credential>(body) else {
            return status(StatusCode::BAD_REQUEST, "it is no credential".into());
        };
        let mut credentials = self.credentials();
        if credentials.len() >= CREDENTIALS_MAX {
            return status(StatusCode::BAD_REQUEST, "there are too many".into());
        }
        credentials.insert(credential.id().to_owned(), credential);
        status(StatusCode::NO_CONTENT, Bytes::new())
    }

    fn credentials(&self) -> MutexGuard<'_, Credentials> {
        let credentials = self.credentials.lock();
        credentials.unwrap_or_else(PoisonError::into_inner)
    }

    /// What is wrong with the applications whose TLS this connection's intercepts are about.
    async fn findings(&self) -> Response<Bytes> {
        let ports = self.shared.book.ports_of(self.connection);
        let findings = tls::findings(&self.shared, self.own, ports).await;
        let body = serde_json::to_vec(&findings).unwrap_or_default();
        status(StatusCode::OK, body.into())
    }

    /// Leaves the pod to another agent: nothing is redirected here any more, what is open goes on for a while.
    async fn yields(&self) -> Response<Bytes> {
        let Some(parent) = &self.shared.parent else {
            return status(StatusCode::METHOD_NOT_ALLOWED, Bytes::new());
        };
        match parent.yields().await {
            true => status(StatusCode::NO_CONTENT, Bytes::new()),
            false => unavailable("the parent did not end it"),
        }
    }

    async fn answer(&self, request: &Request<Bytes>) -> Response<Bytes> {
        match (request.uri().path(), request.method()) {
            (ROUTES_PATH, &Method::PUT) => self.put_routes(request.body()).await,
            (HEALTH_PATH, &Method::GET) => {
                let health = serde_json::json!({
                    "version": env!("CARGO_PKG_VERSION"),
                    "ports": self.shared.book.ports(),
                });
                status(StatusCode::OK, health.to_string().into())
            }
            (CREDENTIALS_PATH, &Method::PUT) => self.put_credential(request.body()),
            (FINDINGS_PATH, &Method::GET) => self.findings().await,
            (CONNECTIONS_PATH, &Method::GET) => self.connections().await,
            (CONNECTIONS_PATH, &Method::DELETE) => self.close_idle().await,
            (AGENT_PATH, &Method::DELETE) => self.yields().await,
            (
                ROUTES_PATH | HEALTH_PATH | CREDENTIALS_PATH | FINDINGS_PATH | CONNECTIONS_PATH
                | AGENT_PATH,
                _,
            ) => status(StatusCode::METHOD_NOT_ALLOWED, Bytes::new()),
            _ => status(StatusCode::NOT_FOUND, Bytes::new()),
        }
    }
}

fn status(code: StatusCode, body: Bytes) -> Response<Bytes> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response
}

fn unavailable(what: &str) -> Response<Bytes> {
    let why = format!("{what} within {PATIENCE:?}");
    status(StatusCode::SERVICE_UNAVAILABLE, why.into())
}

impl Service for Agent {
    fn dial(&self, _: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        Box::pin(async { Err(nothing_to_reach()) })
    }

    fn associate(&self, _: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        Box::pin(async { Err(nothing_to_reach()) })
    }

    fn resolve(&self, _: Bytes) -> BoxFuture<'_, Bytes> {
        Box::pin(async { Bytes::new() })
    }

    fn control(&self, request: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        Box::pin(async move { self.answer(&request).await })
    }

    fn connected(&self, workstation: Workstation) {
        // Told once.
        let _ = self.workstation.set(workstation);
    }
}

fn nothing_to_reach() -> DialError {
    DialError::new(DialErrorKind::Forbidden, "an agent dials for nobody")
}
