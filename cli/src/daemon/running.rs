//! One connection from its start to its end, in whichever process it runs.
//!
//! Puts the parts together: name, control socket, proxy, session or temporary manager, supervisor. Undoes all of it in
//! the reverse order, also when the start fails half-way, so that nothing half-made stays behind in the cluster.

mod answers;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tp_tunnel::Tunnel;

use answers::{Respondent, lender};

use super::access::Access;
use super::connection::Phase;
use super::control;
use super::folder::{self, Claim, NotClaimed};
use super::intercepts::Intercepts;
use super::parameters::{Parameters, Way};
use super::screen::Screen;
use super::services::{self, Known};
use super::status::ConnectionStatus;
use super::supervisor::{Facts, Supervisor};
use super::{environment, inbound, listen, log, peers, secrets};
use crate::huge_pages;
use crate::proxy::{self, split::Split, split::UserRules};
use crate::report::{Failure, OrFail};

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
    parts: Parts,
}

/// What runs while it is up.
struct Parts {
    respondent: Arc<Respondent>,
    supervisor: JoinHandle<Result<(), Failure>>,
    proxy: JoinHandle<()>,
    control: JoinHandle<()>,
    /// Takes the flows of intercepts.
    inbound: Option<AbortOnDropHandle<()>>,
    /// Follows the Services for the supervisor.
    _services: Option<AbortOnDropHandle<()>>,
    stop: CancellationToken,
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
        Ok(parts) => Ok(Started::Up(Running {
            claim,
            access,
            parts,
        })),
        Err(failure) => {
            tracing::error!(error = failure.one_line(), "not connected");
            access.end().await;
            claim.release();
            Err(failure)
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
    let respondent = Arc::new(Respondent {
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
    let answering = Arc::clone(&respondent);
    let answer = move |request| {
        let respondent = Arc::clone(&answering);
        async move { respondent.answer(request).await }
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
        Arc::clone(&respondent.counters),
        stop.clone().cancelled_owned(),
    ));
    Ok(Parts {
        respondent,
        supervisor,
        proxy,
        control,
        inbound,
        _services: services,
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
        self.parts.respondent.status().await
    }

    /// The variables that make a program use it.
    pub fn variables(&self) -> &[(String, String)] {
        &self.parts.respondent.variables
    }

    /// What else may use it: the tunnel, and what goes there.
    pub fn upstream(&self) -> proxy::Upstream {
        self.parts.respondent.upstream.clone()
    }

    /// Waits until it ends by itself, and says why. Cancel safe.
    pub async fn ended(&mut self) -> Failure {
        tokio::select! {
            ended = &mut self.parts.supervisor => match ended {
                Ok(Err(failure)) => failure,
                Ok(Ok(())) => Failure::new("the connection was ended"),
                Err(panic) => Failure::new("the connection broke down").because(panic.to_string()),
            },
            broken = &mut self.parts.proxy => {
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

    async fn wind_up(self) -> Claim {
        let Self {
            claim,
            mut access,
            mut parts,
        } = self;
        // First, so that the applications answer while everything else ends.
        parts.respondent.leave_all().await;
        parts.stop.cancel();
        if !parts.proxy.is_finished() {
            let drained = tokio::time::timeout(FLOWS_END_WITHIN, &mut parts.proxy).await;
            if drained.is_err() {
                parts.proxy.abort();
            }
        }
        if !parts.supervisor.is_finished() {
            let _ = (&mut parts.supervisor).await;
        }
        parts.inbound = None;
        // A command may have been asking for another intercept meanwhile.
        let _ = parts.control.await;
        parts.respondent.leave_all().await;
        access.end().await;
        tracing::info!("ended");
        claim
    }
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
