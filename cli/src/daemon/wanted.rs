//! What a command asks a connection's daemon to intercept.

use serde::{Deserialize, Serialize};
use tp_manager_api::Matchers;
use tp_manager_api::intercept::{AttachMode, Workload};
use tp_manager_api::route_table::Protocol;

use super::inbound::LocalAddress;

/// What a command asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wanted {
    /// What its user calls it.
    pub name: String,
    /// The workload.
    pub workload: Workload,
    /// Its ports, each with its way.
    pub ports: Vec<WantedPort>,
    /// Container whose environment the user's program gets.
    pub container: Option<String>,
    /// Which requests.
    pub matchers: Matchers,
    /// Whether a workstation that does not answer is an error.
    pub strict: bool,
    /// Secret with the application's certificate and key, where TLS is to be opened.
    pub tls_secret: Option<String>,
    /// Whether idle connections from before are reset.
    pub close_idle: bool,
    /// How the agent gets into the pods.
    pub attach: AttachMode,
    /// Ports of this machine's loopback that lead to the ports of the same number of a pod.
    #[serde(default)]
    pub to_pod: Vec<u16>,
    /// Whether the intercept ends with the command that asked for it.
    pub held: bool,
}

/// One port of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedPort {
    /// The container's port.
    pub port: u16,
    /// What is carried to it.
    pub protocol: Protocol,
    /// Service by which it is reached.
    pub service: Option<String>,
    /// Where it leads.
    pub local: LocalAddress,
}
