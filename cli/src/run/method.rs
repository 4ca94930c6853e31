//! The ways in which a program can get to the cluster.

use clap::ValueEnum;

/// How a program gets to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// The first of these that works here
    Auto,
    /// A network of its own: every program, TCP, UDP, ping and names
    Netns,
    /// Its system calls are answered: every program, TCP and names; for machines that refuse namespaces
    Notify,
    /// Proxy variables: programs that heed them
    ProxyEnv,
}
