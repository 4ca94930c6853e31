//! What a connection that is up answers to the commands that ask it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::Method;
use jiff::Timestamp;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tp_manager_api::HEALTH_PATH;
use tp_tunnel::Tunnel;

use crate::daemon::connection::Phase;
use crate::daemon::control::{Reply, Request};
use crate::daemon::intercepts::Intercepts;
use crate::daemon::login::Login;
use crate::daemon::session::SessionLease;
use crate::daemon::status::{CarrierStatus, ConnectionStatus, ManagerStatus, ProbeStatus, State};
use crate::daemon::supervisor::Facts;
use crate::daemon::{asked, environment, sightings};
use crate::proxy::{self, Counters};
use crate::report::Failure;

/// How long the end-to-end probe may take.
const PROBE_WITHIN: Duration = Duration::from_secs(2);

/// What requests on the control socket are answered from.
pub(super) struct Respondent {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) context: Option<String>,
    pub(super) server: Option<String>,
    pub(super) manager_namespace: Option<String>,
    pub(super) digest: String,
    pub(super) since: Timestamp,
    pub(super) address: SocketAddr,
    pub(super) variables: Vec<(String, String)>,
    pub(super) warnings: Vec<String>,
    pub(super) log: std::path::PathBuf,
    pub(super) lease: Option<Arc<SessionLease>>,
    pub(super) login: Option<Login>,
    pub(super) intercepts: Option<Arc<Intercepts>>,
    pub(super) counters: Arc<Counters>,
    pub(super) facts_rx: watch::Receiver<Facts>,
    pub(super) upstream: proxy::Upstream,
    /// Somebody wants it to end.
    pub(super) quit: CancellationToken,
}

impl Respondent {
    pub(super) async fn answer(&self, request: Request) -> Reply {
        match request {
            Request::Status => Reply::Status {
                connection: Box::new(self.status().await),
                digest: self.digest.clone(),
            },
            Request::Env => Reply::Env {
                variables: self.variables.clone(),
            },
            Request::Run => {
                let split = self.upstream.split.borrow();
                Reply::Run {
                    namespace: split.view().namespace.clone(),
                    domain: split.view().domain.clone(),
                }
            }
            Request::Quit => {
                self.quit.cancel();
                Reply::Ending
            }
            Request::Login => match &self.login {
                Some(login) => Reply::Login {
                    selectors: Box::new(login.selectors().clone()),
                    namespace: self.namespace.clone(),
                },
                None => Reply::Failed(Failure::new(
                    "this connection leads to a manager without Kubernetes",
                )),
            },
            Request::Intercept(_) => match &self.intercepts {
                Some(_) => Reply::Intercepting,
                None => Reply::Failed(no_intercepts()),
            },
            Request::Leave { name } => match &self.intercepts {
                Some(intercepts) => match intercepts.leave(&name).await {
                    Ok(found) => Reply::Left { found },
                    Err(failure) => Reply::Failed(failure),
                },
                None => Reply::Left { found: false },
            },
            Request::Watch { name } => {
                let intercepts = self.intercepts.as_ref();
                match intercepts.and_then(|intercepts| intercepts.sightings(&name)) {
                    Some(_) => Reply::Watching,
                    None => {
                        Reply::Failed(Failure::new(format!("there is no intercept named {name}")))
                    }
                }
            }
        }
    }

    pub(super) async fn leave_all(&self) {
        if let Some(intercepts) = &self.intercepts {
            intercepts.leave_all().await;
        }
    }

    pub(super) async fn status(&self) -> ConnectionStatus {
        let tunnel = self.upstream.tunnel.borrow().clone();
        let probe = match &tunnel {
            Some(tunnel) => probe(tunnel).await,
            None => ProbeStatus::default(),
        };
        let facts = self.facts_rx.borrow().clone();
        let traffic = tunnel.as_ref().map(Tunnel::traffic).unwrap_or_default();
        let round_trip = tunnel
            .as_ref()
            .and_then(Tunnel::round_trip)
            .map(milliseconds);
        let carrier = facts.carrier.map(|carrier| CarrierStatus {
            kind: carrier.kind,
            peer: carrier.peer,
            round_trip_ms: round_trip,
            up_since: carrier.up_since,
        });
        ConnectionStatus {
            name: self.name.clone(),
            namespace: if self.namespace.is_empty() {
                facts.namespace
            } else {
                self.namespace.clone()
            },
            state: state(facts.phase, &probe, self.quit.is_cancelled()),
            mode: "proxy".to_owned(),
            context: self.context.clone(),
            server: self.server.clone(),
            manager: facts.manager.map(|manager| ManagerStatus {
                name: manager.name,
                version: manager.version,
                namespace: self.manager_namespace.clone(),
            }),
            proxy: environment::shown(self.address),
            carriers: carrier.into_iter().collect(),
            probe,
            flows: self.counters.snapshot().flows_open,
            bytes_up: facts.carried.0 + traffic.bytes_up,
            bytes_down: facts.carried.1 + traffic.bytes_down,
            last_cut: facts.last_cut,
            since: self.since,
            session: self.lease.as_ref().and_then(|lease| lease.status()),
            intercepts: self
                .intercepts
                .as_ref()
                .map(|intercepts| intercepts.statuses())
                .unwrap_or_default(),
            warnings: self
                .warnings
                .iter()
                .chain(&facts.overlaps)
                .cloned()
                .collect(),
            error: facts.error.as_ref().map(Failure::one_line),
            hint: facts.error.and_then(|failure| failure.hint),
            log: self.log.clone(),
            pid: std::process::id(),
        }
    }
}

/// Never "connected" from memory: only a probe that came back makes it so.
fn state(phase: Phase, probe: &ProbeStatus, ending: bool) -> State {
    match phase {
        _ if ending => State::Ending,
        Phase::Connecting => State::Connecting,
        Phase::Connected { .. } if probe.ok => State::Connected,
        Phase::Connected { .. } => State::Degraded,
        Phase::Reconnecting { .. } => State::Reconnecting,
        Phase::Ended => State::Ending,
    }
}

async fn probe(tunnel: &Tunnel) -> ProbeStatus {
    let begun = Instant::now();
    let asked = tokio::time::timeout(
        PROBE_WITHIN,
        tunnel.control(Method::GET, HEALTH_PATH, Bytes::new()),
    );
    let error = match asked.await {
        Ok(Ok(answer)) if answer.status().is_success() => None,
        Ok(Ok(answer)) => Some(format!("the manager answered {}", answer.status())),
        Ok(Err(error)) => {
            let failure = Failure::new("the tunnel failed").caused_by(&error);
            Some(failure.one_line())
        }
        Err(_) => Some(format!("no answer within {PROBE_WITHIN:?}")),
    };
    ProbeStatus {
        ok: error.is_none(),
        took_ms: Some(milliseconds(begun.elapsed())),
        error,
    }
}

/// With three decimals: enough for a loopback.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn no_intercepts() -> Failure {
    Failure::new("this connection's manager has no intercepts")
        .because("it was started for this connection, or knows no Kubernetes")
        .hint("an administrator installs one with `tp install`")
}

/// What serves the commands that keep their socket.
pub(super) fn lender(
    upstream: proxy::Upstream,
    intercepts: Option<Arc<Intercepts>>,
    stop: CancellationToken,
) -> impl Fn(UnixStream, Request) -> BoxFuture<'static, ()> {
    move |stream, request| match (request, &intercepts) {
        (Request::Intercept(wanted), Some(intercepts)) => Box::pin(asked::serve(
            stream,
            *wanted,
            Arc::clone(intercepts),
            stop.clone(),
        )),
        (Request::Watch { name }, Some(intercepts)) => Box::pin(sightings::serve(
            stream,
            name,
            Arc::clone(intercepts),
            stop.clone(),
        )),
        (Request::Run, _) => lend_network(stream, upstream.clone(), stop.clone()),
        (_, _) => Box::pin(std::future::ready(())),
    }
}

#[cfg(target_os = "linux")]
fn lend_network(
    stream: UnixStream,
    upstream: proxy::Upstream,
    stop: CancellationToken,
) -> BoxFuture<'static, ()> {
    Box::pin(crate::run::lease::serve(stream, upstream, stop))
}

/// There is no `tp run` here to ask for it.
#[cfg(not(target_os = "linux"))]
fn lend_network(
    _stream: UnixStream,
    _upstream: proxy::Upstream,
    _stop: CancellationToken,
) -> BoxFuture<'static, ()> {
    Box::pin(std::future::ready(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_probe_that_came_back_makes_it_connected() {
        let since = Instant::now();
        let up = ProbeStatus {
            ok: true,
            ..ProbeStatus::default()
        };
        let down = ProbeStatus::default();
        for (phase, probe, ending, expected) in [
            (Phase::Connecting, &down, false, State::Connecting),
            (Phase::Connected { since }, &up, false, State::Connected),
            (Phase::Connected { since }, &down, false, State::Degraded),
            (
                Phase::Reconnecting { since, attempt: 3 },
                &down,
                false,
                State::Reconnecting,
            ),
            (Phase::Connected { since }, &up, true, State::Ending),
        ] {
            assert_eq!(state(phase, probe, ending), expected);
        }
    }
}
