//! What `tp status` shows of one connection. The shapes are documented in `docs/json.md`; change both.
//!
//! Plain data. Who fills it in is [`super::running`], and only at the moment of asking.

use std::fmt;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tp_manager_api::Matcher;
use tp_manager_api::route_table::Protocol;

use crate::report::Failure;

/// One connection, as it was found just now.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectionStatus {
    /// Its name on this workstation.
    pub name: String,
    /// Namespace whose short names resolve; empty without Kubernetes.
    pub namespace: String,
    /// What the probe found.
    pub state: State,
    /// How programs reach it; always `proxy` so far.
    pub mode: String,
    /// Context of the kubeconfig, where one was used.
    pub context: Option<String>,
    /// URL of the API server, where there is one.
    pub server: Option<String>,
    /// The manager at the other end, while one is known.
    pub manager: Option<ManagerStatus>,
    /// Where programs connect to.
    pub proxy: ProxyStatus,
    /// The byte streams under the tunnel; empty while there is none.
    pub carriers: Vec<CarrierStatus>,
    /// The end-to-end probe made for this answer.
    pub probe: ProbeStatus,
    /// Flows open now.
    pub flows: u64,
    /// Payload bytes sent to the cluster since the start.
    pub bytes_up: u64,
    /// Payload bytes received from the cluster since the start.
    pub bytes_down: u64,
    /// The last time a carrier was lost.
    pub last_cut: Option<Cut>,
    /// When the connection was asked for.
    pub since: Timestamp,
    /// The Session object, where there is one.
    pub session: Option<SessionStatus>,
    /// Its intercepts, one entry a port.
    #[serde(default)]
    pub intercepts: Vec<InterceptStatus>,
    /// What the user should know: overlaps, folders that could not be used.
    pub warnings: Vec<String>,
    /// Why the last attempt to connect, or to renew the session, failed; gone once one succeeds.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// Its log file.
    pub log: PathBuf,
    /// Process id of its daemon.
    pub pid: u32,
}

/// What a connection is good for right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The first carrier is not up yet.
    Connecting,
    /// The probe came back.
    Connected,
    /// A carrier is up, but the probe did not come back.
    Degraded,
    /// No carrier is up; another attempt is on its way.
    Reconnecting,
    /// Being ended.
    Ending,
    /// Its daemon is there and does not answer.
    Unresponsive,
    /// Over, for the reason in `error`. Shown until it is connected again or quit.
    Ended,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Degraded => "degraded",
            Self::Reconnecting => "reconnecting",
            Self::Ending => "ending",
            Self::Unresponsive => "unresponsive",
            Self::Ended => "ended",
        })
    }
}

/// The manager's replica that serves the connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManagerStatus {
    /// Name of the pod, or of the host of a standalone one.
    pub name: String,
    /// Its release.
    pub version: String,
    /// Its namespace; `None` without Kubernetes.
    pub namespace: Option<String>,
}

/// Where programs connect to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyStatus {
    /// `host:port` of SOCKS5 and HTTP alike.
    pub address: String,
    /// The same as a URL whose names resolve in the cluster.
    pub socks: String,
    /// The same as an HTTP proxy's URL.
    pub http: String,
    /// Where browsers read their configuration.
    pub pac: String,
}

/// One byte stream under the tunnel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CarrierStatus {
    /// How it goes.
    pub kind: CarrierKind,
    /// The pod or the address at its other end.
    pub peer: String,
    /// Round trip of its last ping.
    pub round_trip_ms: Option<f64>,
    /// When it came up.
    pub up_since: Timestamp,
}

/// How a carrier goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CarrierKind {
    /// Through the API server to a pod.
    PortForward,
    /// Straight to an address.
    Direct,
}

impl fmt::Display for CarrierKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::PortForward => "port-forward",
            Self::Direct => "direct",
        })
    }
}

/// What came of asking the manager for a sign of life through the tunnel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProbeStatus {
    /// Whether the manager answered within 2 s.
    pub ok: bool,
    /// How long that took.
    pub took_ms: Option<f64>,
    /// What went wrong.
    pub error: Option<String>,
}

/// A carrier that was lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// When that was noticed.
    pub at: Timestamp,
    /// What was noticed.
    pub reason: String,
    /// When its successor came up.
    pub restored_at: Option<Timestamp>,
}

/// The Session object that lets the connection in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its name, in the connection's namespace.
    pub name: String,
    /// When it ends unless it is renewed before.
    pub expires_at: Timestamp,
}

/// One port of an intercept of this connection.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct InterceptStatus {
    /// What its user calls it.
    pub name: String,
    /// Uid of its object; empty once somebody deleted that.
    pub id: String,
    /// Name of its object, in the connection's namespace.
    pub object: String,
    /// Kind and name, as in `deployment/web`.
    pub workload: String,
    /// The container's port.
    pub port: u16,
    /// What is carried to it.
    pub protocol: Protocol,
    /// Service by which it was asked for.
    pub service: Option<String>,
    /// Where its requests go on this workstation's side.
    pub local: String,
    /// Which requests; all must match. None: everything.
    pub matchers: Vec<Matcher>,
    /// Secret with which TLS is opened for it.
    pub tls_secret: Option<String>,
    /// Whether every running pod sends them here, as the manager says.
    pub ready: bool,
    /// One word why, or why not.
    pub reason: Option<String>,
    /// The same for people; a second line says what to do about it.
    pub message: Option<String>,
    /// Running pods of the workload.
    pub pods: u32,
    /// Those that send requests here.
    pub pods_attached: u32,
    /// Connections that were open before and bypass it until they end.
    pub open_before: Option<u32>,
    /// Flows that reached the local program.
    pub flows: u64,
    /// Flows that it refused; the application got them.
    pub refused: u64,
}

impl ConnectionStatus {
    /// What can be said of a connection whose daemon holds its name and does not answer.
    pub fn unresponsive(name: &str, log: PathBuf) -> Self {
        let error = "its daemon does not answer on its control socket";
        Self::lifeless(name, State::Unresponsive, error, log)
    }

    /// What is left of a connection that ended by itself, and the failure that ended it.
    pub fn ended(name: &str, why: Option<Failure>, log: PathBuf) -> Self {
        let error = why.as_ref().map(Failure::one_line).unwrap_or_default();
        Self {
            hint: why.and_then(|failure| failure.hint),
            ..Self::lifeless(name, State::Ended, &error, log)
        }
    }

    fn lifeless(name: &str, state: State, error: &str, log: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            namespace: String::new(),
            state,
            mode: "proxy".to_owned(),
            context: None,
            server: None,
            manager: None,
            proxy: ProxyStatus::default(),
            carriers: Vec::new(),
            probe: ProbeStatus::default(),
            flows: 0,
            bytes_up: 0,
            bytes_down: 0,
            last_cut: None,
            since: Timestamp::UNIX_EPOCH,
            session: None,
            intercepts: Vec::new(),
            warnings: Vec::new(),
            error: Some(error.to_owned()),
            hint: None,
            log,
            pid: 0,
        }
    }
}
