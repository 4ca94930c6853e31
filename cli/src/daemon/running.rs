//! One connection from its start to its end, in whichever process it runs.
//!
//! Puts the parts together: name, control socket, proxy, session or temporary manager, supervisor. Undoes all of it in
//! the reverse order, also when the start fails half-way, so that nothing half-made stays behind in the cluster.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::Method;
use jiff::Timestamp;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tp_manager_api::HEALTH_PATH;
use tp_tunnel::Tunnel;

use super::access::Access;
use super::connection::Phase;
use super::control::{self, Reply, Request};
use super::folder::{self, Claim, NotClaimed};
use super::intercepts::Intercepts;
use super::login::Login;
use super::parameters::{Parameters, Way};
use super::screen::Screen;
use super::services::{self, Known};
use super::status::{CarrierStatus, ConnectionStatus, ManagerStatus, ProbeStatus, State};
use super::supervisor::{Facts, Supervisor};
use super::{asked, environment, inbound, listen, log, peers, secrets, sightings};
use crate::huge_pages;
use crate::proxy::{self, Counters, split::Split, split::UserRules};
use crate::report::{Failure, OrFail};

/// How long the end-to-end probe may take.
const PROBE_WITHIN: Duration = Duration::from_secs(2);

/// How long open flows may take to notice that the connection ends.
const FLOWS_END_WITHIN: Duration = Duration::from_millis(500);

/// Where events are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogTo {
    /// To the connection's own file.
    File,
    /// To stderr as well as people read it.
    Stderr,
}

/// What came of asking for a connection.
#[expect(
    clippy::large_enum_variant,
    reason = "one of them exists at a time, for a moment"
)]
pub enum Started {
    /// It is up.
    Up(Running),
    /// The same one was up before.
    Already(Box<ConnectionStatus>),
}

/// A connection that is up.
pub struct Running {
    claim: Claim,
    access: Access,
    shared: Arc<Shared>,
    supervisor: JoinHandle<Result<(), Failure>>,
    proxy: JoinHandle<()>,
    control: JoinHandle<()>,
    /// Takes the flows of intercepts.
    inbound: Option<AbortOnDropHandle<()>>,
    /// Follows the Services for the supervisor.
    _services: Option<AbortOnDropHandle<()>>,
    stop: CancellationToken,
}

/// What requests on the control socket are answered from.
struct Shared {
    name: String,
    namespace: String,
    context: Option<String>,
    server: Option<String>,
    manager_namespace: Option<String>,
    digest: String,
    since: Timestamp,
    address: SocketAddr,
    variables: Vec<(String, String)>,
    warnings: Vec<String>,
    log: std::path::PathBuf,
    lease: Option<Arc<super::session::SessionLease>>,
    login: Option<Login>,
    intercepts: Option<Arc<Intercepts>>,
    counters: Arc<Counters>,
    facts_rx: watch::Receiver<Facts>,
    upstream: proxy::Upstream,
    /// Somebody wants it to end.
    quit: CancellationToken,
}

/// Starts a connection and returns when its first carrier is up. `stop` gives up; what was made is undone.
///
/// # Errors
/// Why there is no connection. Nothing is left of it then.
pub async fn start(
    parameters: Parameters,
    log_to: LogTo,
    stop: &CancellationToken,
) -> Result<Started, Failure> {
    let rules = user_rules(&parameters)?;
    let mut access = Access::new(&parameters).await?;
    let name = parameters
        .name
        .clone()
        .unwrap_or_else(|| folder::name_from(&access.context()));
    let digest = parameters.digest(&[&access.server(), &access.context(), access.namespace()]);
    let claim = match Claim::try_new(&name) {
        Ok(claim) => claim,
        Err(NotClaimed::Failed(failure)) => return Err(failure),
        Err(NotClaimed::Held(socket)) => return already(&name, &socket, &digest).await,
    };
    match log_to {
        LogTo::File => log::to_file(&claim.log()),
        LogTo::Stderr => log::to_stderr(),
    }
    raise_descriptor_limit();
    huge_pages::refuse();
    let started = assemble(&parameters, rules, &mut access, &claim, digest, stop).await;
    match started {
        Ok(parts) => Ok(Started::Up(parts.into_running(claim, access))),
        Err(failure) => {
            tracing::error!(error = failure.one_line(), "not connected");
            access.end().await;
            claim.release();
            Err(failure)
        }
    }
}

struct Parts {
    shared: Arc<Shared>,
    supervisor: JoinHandle<Result<(), Failure>>,
    proxy: JoinHandle<()>,
    control: JoinHandle<()>,
    inbound: Option<AbortOnDropHandle<()>>,
    /// Follows the Services for the supervisor.
    services: Option<AbortOnDropHandle<()>>,
    stop: CancellationToken,
}

impl Parts {
    fn into_running(self, claim: Claim, access: Access) -> Running {
        let Self {
            shared,
            supervisor,
            proxy,
            control,
            inbound,
            services,
            stop,
        } = self;
        Running {
            claim,
            access,
            shared,
            supervisor,
            proxy,
            control,
            inbound,
            _services: services,
            stop,
        }
    }
}

async fn assemble(
    parameters: &Parameters,
    rules: UserRules,
    access: &mut Access,
    claim: &Claim,
    digest: String,
    quit: &CancellationToken,
) -> Result<Parts, Failure> {
    let control_listener = bind_control(claim)?;
    let bound = listen::bind(&parameters.listen).await?;
    let mut warnings = claim.passed_over.clone();
    if bound.moved {
        let (usual, taken) = (listen::DEFAULT_PORT, bound.address.port());
        warnings.push(format!(
            "port {usual} is taken, so the proxy listens on {taken}"
        ));
    }
    let (facts_tx, facts_rx) = watch::channel(Facts::default());
    let (tunnel_tx, tunnel_rx) = watch::channel(None);
    let (split_tx, split_rx) = watch::channel(Arc::new(Split::default()));
    let upstream = proxy::Upstream {
        tunnel: tunnel_rx,
        split: split_rx,
    };
    let credentials = parameters.credentials.as_ref();
    let intercepts = intercepts_of(access, &upstream).map(Arc::new);
    let shared = Arc::new(Shared {
        name: claim.name.clone(),
        namespace: access.namespace().to_owned(),
        context: access.cluster().map(|cluster| cluster.context),
        server: access.cluster().map(|cluster| cluster.server),
        manager_namespace: access.manager_namespace(),
        digest,
        since: Timestamp::now(),
        address: bound.address,
        variables: environment::variables(bound.address, credentials, &parameters.never_proxy),
        warnings,
        log: claim.log(),
        lease: access.lease(),
        login: access.login().cloned(),
        intercepts: intercepts.clone(),
        counters: Arc::default(),
        facts_rx: facts_rx.clone(),
        upstream: upstream.clone(),
        quit: quit.clone(),
    });
    let stop = CancellationToken::new();
    let answering = Arc::clone(&shared);
    let answer = move |request| {
        let shared = Arc::clone(&answering);
        async move { shared.answer(request).await }
    };
    let lend = lender(upstream.clone(), intercepts.clone(), stop.clone());
    let control = tokio::spawn(control::serve(control_listener, stop.clone(), answer, lend));
    let dialer = match quit.run_until_cancelled(access.dialer(parameters)).await {
        Some(dialer) => dialer?,
        None => return Err(interrupted()),
    };
    let (services_rx, services) = services_of(access, parameters).unzip();
    let supervisor = Supervisor {
        dialer,
        admission: access.admission().clone(),
        namespace: access.login().map(|_| access.namespace().to_owned()),
        services: services_rx,
        screen: Screen::new(parameters.way.source(), rules),
        tunnel_tx,
        split_tx,
        facts_tx,
    };
    let mut supervisor = tokio::spawn(supervisor.run(stop.clone()));
    if let Err(failure) = first_carrier(&mut supervisor, facts_rx, quit).await {
        stop.cancel();
        let _ = control.await;
        supervisor.abort();
        return Err(failure);
    }
    let inbound = intercepts.map(|intercepts| {
        let serving = serve_inbound(upstream.tunnel.clone(), intercepts);
        AbortOnDropHandle::new(tokio::spawn(serving))
    });
    let options = proxy::Options {
        credentials: credentials
            .map(|given| proxy::Credentials::new(&given.user, given.password.reveal())),
        allow_lan: parameters.allow_lan,
        ..proxy::Options::default()
    };
    let proxy = tokio::spawn(proxy::serve(
        bound.listeners,
        options,
        upstream,
        Arc::clone(&shared.counters),
        stop.clone().cancelled_owned(),
    ));
    Ok(Parts {
        shared,
        supervisor,
        proxy,
        control,
        inbound,
        services,
        stop,
    })
}

/// Only an installed manager has intercepts, and it is one that admits Sessions.
fn intercepts_of(access: &Access, upstream: &proxy::Upstream) -> Option<Intercepts> {
    let (login, lease) = (access.login()?.clone(), access.lease()?);
    let (namespace, tunnel) = (access.namespace().to_owned(), upstream.tunnel.clone());
    Some(Intercepts::new(login, lease, namespace, tunnel))
}

async fn serve_inbound(tunnel: watch::Receiver<Option<Tunnel>>, intercepts: Arc<Intercepts>) {
    let count = intercepts.count();
    let flows = inbound::serve(tunnel.clone(), count, Arc::clone(&intercepts));
    let secrets = secrets::hand_over(tunnel.clone(), &intercepts);
    tokio::join!(flows, secrets, follow_sessions(tunnel, &intercepts));
}

/// A new Session comes with a new tunnel.
async fn follow_sessions(mut tunnel: watch::Receiver<Option<Tunnel>>, intercepts: &Intercepts) {
    while tunnel.changed().await.is_ok() {
        let is_up = tunnel.borrow_and_update().is_some();
        if is_up {
            intercepts.follow_session().await;
        }
    }
}

/// A temporary manager cannot tell which Services there are; the user may be able to.
fn services_of(
    access: &Access,
    parameters: &Parameters,
) -> Option<(watch::Receiver<Known>, AbortOnDropHandle<()>)> {
    let login = access.login()?.clone();
    if !matches!(parameters.way, Way::Temporary { .. }) {
        return None;
    }
    let (known_tx, known_rx) = watch::channel(None);
    let following = services::follow(login, access.namespace().to_owned(), known_tx);
    Some((known_rx, AbortOnDropHandle::new(tokio::spawn(following))))
}

impl Running {
    /// What can be said of it now, after a probe.
    pub async fn status(&self) -> ConnectionStatus {
        self.shared.status().await
    }

    /// The variables that make a program use it.
    pub fn variables(&self) -> &[(String, String)] {
        &self.shared.variables
    }

    /// What else may use it: the tunnel, and what goes there.
    pub fn upstream(&self) -> proxy::Upstream {
        self.shared.upstream.clone()
    }

    /// Waits until it ends by itself, and says why. Cancel safe.
    pub async fn ended(&mut self) -> Failure {
        tokio::select! {
            ended = &mut self.supervisor => match ended {
                Ok(Err(failure)) => failure,
                Ok(Ok(())) => Failure::new("the connection was ended"),
                Err(panic) => Failure::new("the connection broke down").because(panic.to_string()),
            },
            broken = &mut self.proxy => {
                let why = broken.err().map_or_else(|| "it returned".to_owned(), |panic| panic.to_string());
                Failure::new("the proxy broke down").because(why)
            }
        }
    }

    /// Leaves word of a failure for the next `tp status`.
    pub fn leave_word(&self, failure: &Failure) {
        self.claim.leave_word(failure);
    }

    /// Ends it: no new flows, open ones cut, session deleted, name free.
    pub async fn end(self) {
        self.wind_up().await.release();
    }

    /// The same for a connection that was made for one program, which ended `well` or not.
    pub async fn end_with_program(self, well: bool) {
        self.wind_up().await.release_program(well);
    }

    async fn wind_up(mut self) -> Claim {
        // First, so that the applications answer while everything else ends.
        self.shared.leave_all().await;
        self.stop.cancel();
        if !self.proxy.is_finished() {
            let drained = tokio::time::timeout(FLOWS_END_WITHIN, &mut self.proxy).await;
            if drained.is_err() {
                self.proxy.abort();
            }
        }
        if !self.supervisor.is_finished() {
            let _ = (&mut self.supervisor).await;
        }
        self.inbound = None;
        // A command may have been asking for another intercept meanwhile.
        let _ = self.control.await;
        self.shared.leave_all().await;
        self.access.end().await;
        tracing::info!("ended");
        self.claim
    }
}

impl Shared {
    async fn answer(&self, request: Request) -> Reply {
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

    async fn leave_all(&self) {
        if let Some(intercepts) = &self.intercepts {
            intercepts.leave_all().await;
        }
    }

    async fn status(&self) -> ConnectionStatus {
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

async fn first_carrier(
    supervisor: &mut JoinHandle<Result<(), Failure>>,
    mut facts_rx: watch::Receiver<Facts>,
    quit: &CancellationToken,
) -> Result<(), Failure> {
    let up = async {
        let is_up = |facts: &Facts| matches!(facts.phase, Phase::Connected { .. });
        if facts_rx.wait_for(is_up).await.is_err() {
            // The supervisor let go of its end: what it returns says why.
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        biased;
        () = quit.cancelled() => Err(interrupted()),
        () = up => Ok(()),
        ended = supervisor => match ended {
            Ok(outcome) => outcome.and(Err(interrupted())),
            Err(panic) => Err(Failure::new("the connection broke down").because(panic.to_string())),
        },
    }
}

fn interrupted() -> Failure {
    Failure::new("ended before it was connected").exit(130)
}

async fn already(name: &str, socket: &std::path::Path, digest: &str) -> Result<Started, Failure> {
    let (connection, theirs) = peers::wait_connected(name, socket).await?;
    if theirs == digest {
        return Ok(Started::Already(Box::new(connection)));
    }
    let other = match (&connection.context, connection.namespace.as_str()) {
        (Some(context), namespace) => {
            format!("it leads to namespace {namespace} of {context}, or has other flags")
        }
        (None, _) => "it leads elsewhere, or has other flags".to_owned(),
    };
    Err(
        Failure::new(format!("there is a connection named {name} already"))
            .because(other)
            .hint(format!(
                "end it with `tp quit {name}`, or give this one another name with `--name`"
            )),
    )
}

fn no_intercepts() -> Failure {
    Failure::new("this connection's manager has no intercepts")
        .because("it was started for this connection, or knows no Kubernetes")
        .hint("an administrator installs one with `tp install`")
}

/// What serves the commands that keep their socket.
fn lender(
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

fn bind_control(claim: &Claim) -> Result<UnixListener, Failure> {
    let socket = claim.socket();
    let cannot = || format!("cannot make the control socket {}", socket.display());
    let listener = UnixListener::bind(&socket).or_fail(cannot)?;
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&socket, private).or_fail(cannot)?;
    Ok(listener)
}

fn user_rules(parameters: &Parameters) -> Result<UserRules, Failure> {
    let parse = |texts: &[String]| -> Result<Vec<_>, Failure> {
        let rule = |text: &String| text.parse().or_fail(|| "that is no rule".to_owned());
        texts.iter().map(rule).collect()
    };
    Ok(UserRules {
        all: parameters.all,
        also_proxy: parse(&parameters.also_proxy)?,
        never_proxy: parse(&parameters.never_proxy)?,
    })
}

/// Each flow takes a descriptor, and many systems begin at 1,024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
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
