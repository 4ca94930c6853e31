//! What the processes of one `tp run` say to each other.
//!
//! Three take part: the command line that the user started (*outside*), the one that becomes the program (*inside*), and
//! the guard that stays in the namespace to clear it up.

use serde::{Deserialize, Serialize};

use super::device::Kind;

/// From outside to inside, first of all.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// The one kind of device to try; `None` tries all, best first.
    pub device: Option<Kind>,
    /// Ports of the namespace's loopback that lead to the workstation's.
    pub forwarded: Vec<u16>,
}

/// From inside, once the namespace is made or cannot be.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub(super) enum Outcome {
    /// Comes with the device's descriptor, then the listeners of the forwarded ports.
    Ready(Made),
    /// Nothing is left of it.
    Refused(Refused),
}

/// A namespace that is ready.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Made {
    /// What carries its packets.
    pub device: Kind,
    /// Kinds that were tried before, and why each was not taken.
    pub passed_over: Vec<(Kind, String)>,
    /// The forwarded port of each listener, in the order of their descriptors.
    pub listeners: Vec<u16>,
    /// What could not be done and will be missed only by some programs.
    pub notes: Vec<String>,
}

/// Why there is no namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refused {
    /// What was being done.
    pub step: String,
    /// What the kernel said.
    pub why: String,
    /// Whether the kernel does not let this user make namespaces, as opposed to a part of one.
    pub by_policy: bool,
}

/// From outside to inside: all is connected, run the program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Go {
    /// Content of `/etc/resolv.conf`.
    pub(super) resolv_conf: String,
}

/// From inside, only if the program cannot be started: the system's error number.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct NotStarted(pub(super) i32);

/// To the guard.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToGuard {
    /// Make a TCP socket of the namespace. The answer comes with it.
    Socket,
    /// Nobody carries packets any more: end the connections that were, and let new ones fail at once. No answer.
    Cut,
    /// End what still runs, and yourself. Losing the connection means the same.
    End,
}

/// From the guard.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromGuard {
    /// To [`ToGuard::Socket`].
    Socket,
    /// To [`ToGuard::End`].
    Ended {
        /// How many processes had to be ended.
        processes: usize,
        /// The guard's own process, which ends now.
        guard: i32,
    },
}
