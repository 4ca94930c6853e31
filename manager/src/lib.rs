//! In the cluster: admits sessions, dials for them, resolves for them.
//!
//! The pure parts (what is refused, what a resolv.conf means, whom a Session belongs to, which namespace an address
//! lies in) know no sockets; around them stand the shells that watch, listen and dial. Nothing a replica keeps in
//! memory is needed by another one: the API server has it all.

pub mod cluster;
pub mod dial;
pub mod guarded_http;
pub mod in_cluster;
pub mod intercepts;
pub mod inventory;
pub mod listen;
pub mod locator;
pub mod metrics;
pub mod reach;
pub mod service;
pub mod sessions;
pub mod shared_key;
pub mod sidecar;
pub mod standalone;
pub mod temporary;

/// For resolving and connecting together.
pub const DIAL_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// Keeps the kernel from backing small heaps with 2 MiB pages: an idle manager holds a fifth of what they would cost.
pub fn refuse_huge_pages() {
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(true) {
        tracing::debug!(%error, "the kernel may use huge pages");
    }
}

/// Takes all the descriptors the system grants: a flow costs one, and the usual soft limit is 1,024.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the descriptor limit stays as it is");
    }
}
