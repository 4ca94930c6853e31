//! What an intercept is to the person who asks for one: flags, ports, workloads, variables.
//!
//! Mostly pure; [`workload`], [`mod@env`] and [`sidecar`] ask the API server, as the user. Keeping intercepts up is the daemon's part
//! ([`crate::daemon::intercepts`]), matching requests is `tp-manager-api`'s.

pub mod env;
pub mod example;
pub mod flags;
pub mod guess;
pub mod missing;
pub mod ports;
pub mod request;
pub mod sidecar;
pub mod summary;
pub mod workload;
