//! Beside the workload: sends requests that are somebody's to their workstation, and all others to the application.
//!
//! Two processes of one binary. The *parent* ([`parent`]) may change the pod's packet filter and touches no traffic; the
//! *worker* ([`worker`]) parses traffic and may do nothing else. Which request is whose comes from the manager, which
//! dials the worker ([`workstation`]); without it everything reaches the application, and without the worker the kernel
//! stops redirecting by itself. There is no Kubernetes in here.
//!
//! # What the manager does for an agent
//!
//! 1. It starts `tp-agent --manager-key sha256:… --redirected [::]:15006` with `TP_AGENT_SEED` (64 hexadecimal digits, new for
//!    each agent), as uid 0 with NET_ADMIN, SETUID and SETGID and nothing else; or, without any privilege and in place of an
//!    application's port, `--listen IP:PORT=APP_IP:PORT`, or `--listen [::]:PORT=APP_PORT` for one in the same pod. Such an agent
//!    is one process, and whoever started it starts it again.
//! 2. It dials port 15008 ([`tp_tunnel::carrier::tls::connect_tls`]) with its own key and expects that of
//!    [`tp_tunnel::Identity::from_seed`]; then it is the client of a tunnel ([`tp_tunnel::Tunnel::establish_with`]). It pings every
//!    second ([`tp_tunnel::Settings::ping_interval`]): a manager that is silent for three is dropped.
//! 3. It keeps some [`tp_tunnel::Tunnel::accept`] waiting, for connections and for flows of datagrams alike. Each [`tp_tunnel::Incoming`] names the uid of an intercept; the manager
//!    offers it, as it is named, to the session's own [`tp_tunnel::Workstation::open`], says `opened()` or `refuse()` within the second that
//!    the agent waits, and joins the two with [`tp_tunnel::join`]. A workstation that is suspect is refused at once.
//! 4. It PUTs a [`tp_manager_api::RouteTable`] with *its own* intercepts to [`tp_manager_api::route_table::ROUTES_PATH`] when they change
//!    and every five seconds, since a table holds for [`tp_manager_api::route_table::LEASE`]. An empty one makes the agent dormant
//!    for this replica. The answers are
//!    - 204: new connections to these ports come to the agent from now on, and requests go by this table;
//!    - 400: the table is refused, and the one before stays; the body says why, in one line;
//!    - 503: the table is taken, but the kernel does not redirect the ports yet. Push again.
//!
//!    What a route's `tls` names is PUT to [`tp_manager_api::tls::CREDENTIALS_PATH`] before, and forgotten with the first table that
//!    does not name it; `GET` [`tp_manager_api::tls::FINDINGS_PATH`] says whether the applications show those keys.
//! 5. `GET` [`workstation::HEALTH_PATH`] answers `{"version": "…", "ports": […]}`: the ports that have intercepts, of all replicas.
//! 6. `GET` and `DELETE` [`tp_manager_api::route_table::CONNECTIONS_PATH`] count, and close, what the application had open before.
//! 7. `DELETE` [`tp_manager_api::route_table::AGENT_PATH`] comes before an agent of another image is added to the pod: there is one
//!    rule and one pair of ports for both.
//! 8. SIGTERM removes the rule, ends idle connections, lets the others finish for up to 20 s, and ends the agent.

pub mod book;
pub mod budget;
pub mod bypass;
pub mod datagrams;
pub mod front;
pub mod handover;
pub mod heartbeat;
pub mod parent;
pub mod passing;
pub mod redirect;
pub mod retire;
pub mod route;
pub mod sightings;
mod socket;
pub mod upstream;
pub mod worker;
pub mod workstation;
