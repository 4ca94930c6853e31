//! `tp run`: one program whose network is the cluster's, without root and without a change to the workstation.
//!
//! The program gets namespaces of its own ([`inside`]), made and cleared up by processes that [`namespace`] starts. Its
//! packets come out of a [`device`], end in a userspace TCP/IP stack ([`shard`]) and go on as flows through the tunnel or
//! from the workstation ([`bridge`]). [`dns`] answers its names. Where namespaces are refused, a process beside the program
//! answers its system calls instead ([`notify`]).

pub mod bridge;
pub mod device;
mod dial;
pub mod dns;
pub mod explain;
mod files;
mod guard;
pub mod inside;
pub mod lease;
pub mod link;
pub mod method;
pub mod namespace;
mod netlink;
pub mod notify;
mod passing;
pub mod plan;
pub mod publish;
mod relay;
pub mod shard;
mod sockets;
mod sys;
pub mod worker;
mod workstation_dns;
