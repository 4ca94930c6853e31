//! What the behaviour tests stand on: a real cluster, a laptop that can reach only its API server, and `tp` on it.
//!
//! The tests themselves are in `tests/`, one file a behaviour. Nothing here knows how `tp` works inside: it starts the
//! program as a user would, and looks at bytes, exit codes and objects. The user's own kubeconfig is never read: every
//! command gets a kubeconfig of the harness and a home of its own.
//!
//! A test begins with `let Some(cluster) = Cluster::shared() else { return };`, which starts the cluster where it is
//! down, and says loudly how to run the test where root is missing.

pub mod clients;
pub mod cluster;
pub mod connection;
mod guard;
pub mod laptop;
pub mod ledger;
pub mod link;
pub mod manager;
pub mod process;
pub mod program;
pub mod snapshot;
pub mod user;
pub mod wait;
pub mod workload;

pub use cluster::Cluster;
pub use connection::Connection;
pub use laptop::Laptop;
pub use link::Link;
pub use process::Run;
pub use program::Program;
pub use user::User;
pub use wait::{eventually, time_in};
pub use workload::Namespace;
