//! What the processes of one `tp run` say to each other where the keeper answers system calls.
//!
//! Three take part: the command line that the user started (*outside*), the keeper, and the *opener*, which is whoever
//! has the connection: its daemon, or the command line itself.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::run::plan::Refused;

/// From outside to the keeper, first of all.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// The program's limit of open files, soft and hard; `None` is no limit.
    pub(super) open_files: (Option<u64>, Option<u64>),
}

/// From the keeper, once the program's process is under the filter or cannot be.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub(super) enum Outcome {
    /// Comes with the opener's end of the channel, then the sockets that get the program's questions for names.
    Ready,
    Refused(Refused),
}

/// To the keeper.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToKeeper {
    /// All is connected, run the program.
    Go,
    /// Send the program a signal.
    Signal(i32),
    /// End what still runs, and yourself. Losing the connection means the same.
    End,
}

/// From the keeper, after [`ToKeeper::Go`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromKeeper {
    /// The program runs.
    Started,
    /// It cannot be run: the system's error number.
    NotStarted(i32),
    /// It has ended with this status, as `wait(2)` gives it, and nothing of it is left.
    Ended {
        /// As `wait(2)` gives it.
        status: i32,
        /// How many other processes had to be ended.
        left: usize,
    },
}

/// From the keeper to the opener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    /// Open a flow to where the program wants to connect.
    Open { id: u64, to: SocketAddr },
    /// Open one to the resolver: the program wants to ask a nameserver over TCP.
    OpenResolver { id: u64 },
    /// The other end of the program's socket comes with this; move the flow's bytes.
    Carry { id: u64 },
    /// The program's socket could not be joined.
    Abandon { id: u64 },
}

/// From the opener, about one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Told {
    pub(super) id: u64,
    pub(super) news: News,
}

/// How a flow is getting on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum News {
    /// It is not the cluster's: let the program connect by itself. Nothing follows.
    Outside,
    /// It is being opened; one of the others follows.
    Opening,
    /// The destination has accepted.
    Open,
    /// The destination refused.
    Refused,
    /// Nobody answered in time.
    TimedOut,
    /// There is no such destination, or no right to reach it.
    Unreachable,
    /// There is no tunnel.
    NoTunnel,
}
