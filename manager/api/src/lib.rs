//! The objects that workstation, manager and agent agree on.
//!
//! Custom resources and the admission policy that guards them, the documents that travel (the view of a cluster, the
//! manager's locator, an agent's routes, a certificate and its key), the matchers of requests, and the names all sides must spell alike. What needs
//! Kubernetes' types is behind the feature `kube`, which the agent leaves off. It holds no client, no socket and no clock:
//! whoever uses it decides where the objects come from.

pub mod cluster_view;
#[cfg(feature = "kube")]
pub mod intercept;
#[cfg(feature = "kube")]
pub mod locator;
pub mod matcher;
#[cfg(feature = "kube")]
pub mod policy;
pub mod route_table;
#[cfg(feature = "kube")]
pub mod session;
pub mod sighting;
pub mod tls;

pub use cluster_view::ClusterView;
#[cfg(feature = "kube")]
pub use intercept::{Intercept, InterceptSpec, InterceptStatus};
#[cfg(feature = "kube")]
pub use locator::ManagerLocator;
pub use matcher::{Matcher, Matchers};
pub use route_table::RouteTable;
#[cfg(feature = "kube")]
pub use session::{ClientInfo, Session, SessionSpec, SessionStatus};

/// API group of every custom resource.
pub const GROUP: &str = "tp.dev";

/// Plural name of [`Session`], as in URLs and RBAC rules.
pub const SESSIONS: &str = "sessions";

/// Plural name of [`Intercept`], as in URLs and RBAC rules.
pub const INTERCEPTS: &str = "intercepts";

/// RBAC resource that stands for leaving the cluster through the manager: `create sessions/egress`.
pub const EGRESS: &str = "egress";

/// RBAC resource that stands for ending what is other people's: `delete sessions/others`, `delete intercepts/others`.
///
/// Everyone who connects holds `delete sessions`, to end their own; this one sets administrators apart.
pub const OTHERS: &str = "others";

/// Version of what the two sides say to each other inside the tunnel.
pub const PROTOCOL: u32 = 1;

/// Oldest version that this release still understands.
pub const OLDEST_PROTOCOL: u32 = 1;

/// Namespace the manager is installed into unless told otherwise.
pub const MANAGER_NAMESPACE: &str = "tp-system";

/// Name of the manager's Deployment, Service, ServiceAccount and ConfigMap.
pub const MANAGER_NAME: &str = "tp-manager";

/// Secret that holds the private key all replicas share.
pub const KEY_SECRET: &str = "tp-manager-key";

/// Key of [`KEY_SECRET`]'s data that holds private key and certificate as PEM.
pub const KEY_ENTRY: &str = "identity.pem";

/// Port of the tunnel, on every replica.
pub const TUNNEL_PORT: u16 = 8443;

/// Port of `/healthz` and `/readyz`.
pub const HEALTH_PORT: u16 = 8080;

/// Port on which an agent in a pod hears the manager.
pub const AGENT_PORT: u16 = 15008;

/// Port of an agent to which the kernel sends the connections that it redirects.
pub const REDIRECTED_PORT: u16 = 15006;

/// How the names of agents' containers begin.
pub const AGENT_PREFIX: &str = "tp-agent-";

/// Name of the agent's container in pods that were made with it.
pub const SIDECAR: &str = "tp-agent-sidecar";

/// Label of a pod that is to be made with the agent's sidecar: names of ports, with dots between, that it takes over.
pub const SIDECAR_LABEL: &str = "tp.dev/sidecar";

/// Name of the webhook's Deployment, Service, ServiceAccount, Secret and configuration.
pub const WEBHOOK_NAME: &str = "tp-webhook";

/// Port of the webhook, in its own pods.
pub const WEBHOOK_PORT: u16 = 9443;

/// Where the webhook takes reviews of pods.
pub const WEBHOOK_PATH: &str = "/pods";

/// Flag of the manager's program that makes it the webhook.
pub const WEBHOOK_FLAG: &str = "--webhook";

/// Folder in the webhook's pod with `tls.crt` and `tls.key`.
pub const WEBHOOK_TLS: &str = "/etc/tp/tls";

/// Folder in the webhook's pod with the manager's locator.
pub const WEBHOOK_LOCATOR: &str = "/etc/tp/manager";

/// Environment variable of the manager and of the webhook: the agents' image.
pub const AGENT_IMAGE: &str = "TP_AGENT_IMAGE";

/// Environment variable of the webhook: `true` where Services find the named ports of native sidecars, from Kubernetes
/// 1.32 on.
pub const NATIVE_SIDECARS: &str = "TP_NATIVE_SIDECARS";

/// The agent's program in the image.
pub const AGENT_PROGRAM: &str = "/tp-agent";

/// The word after which the agent's program ends the agent of the container that it is run in.
pub const AGENT_RETIRE: &str = "retire";

/// Environment variable of an agent that makes its key: 64 hexadecimal digits.
pub const AGENT_SEED: &str = "TP_AGENT_SEED";

/// Label of a namespace; with the value `disabled` nothing is attached to its pods.
pub const INTERCEPT_LABEL: &str = "tp.dev/intercept";

/// Port of `/metrics`.
pub const METRICS_PORT: u16 = 9090;

/// How far ahead [`SessionSpec::expires_at`] may lie when it is written.
pub const LONGEST_SESSION: std::time::Duration = std::time::Duration::from_secs(3600);

/// Path of the cluster view on the tunnel's control resource. With `after=VERSION` the answer waits until the view has another
/// version; a workstation that follows it so stays with this replica, and only then does the Session's status name that.
pub const CLUSTER_PATH: &str = "/v1/cluster";

/// Path of the end-to-end probe on the tunnel's control resource.
pub const HEALTH_PATH: &str = "/v1/health";
