//! The connection that a program in a namespace uses: one that is up already, or one of its own.

use std::io;
use std::os::fd::OwnedFd;

use tokio::net::UnixStream;

use super::bridge::Bridge;
use super::lease::{Lease, Wanted};
use crate::daemon::peers::Peer;
use crate::daemon::running::Running;
use crate::report::Failure;

/// A connection that carries no namespace yet.
#[expect(
    clippy::large_enum_variant,
    reason = "one of them exists, for a moment"
)]
pub enum Link {
    /// A daemon's, asked for already.
    Lent {
        /// To the daemon.
        stream: UnixStream,
        /// Namespace whose short names resolve.
        namespace: String,
        /// Cluster domain.
        domain: String,
    },
    /// Of this process, which ends with it.
    Own(Running),
}

/// A connection that carries a namespace.
#[expect(
    clippy::large_enum_variant,
    reason = "one of them exists, for the whole time"
)]
pub enum Carrying {
    /// A daemon does it.
    Lent(Lease),
    /// This process does it.
    Own(Running, Bridge),
}

impl Link {
    /// Asks a daemon.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn lent(peer: &Peer) -> Result<Self, Failure> {
        let (stream, namespace, domain) = peer.borrow().await?;
        Ok(Self::Lent {
            stream,
            namespace,
            domain,
        })
    }

    /// Namespace whose short names resolve, and cluster domain; both empty without Kubernetes.
    pub fn names(&self) -> (String, String) {
        match self {
            Self::Lent {
                namespace, domain, ..
            } => (namespace.clone(), domain.clone()),
            Self::Own(running) => {
                let upstream = running.upstream();
                let split = upstream.split.borrow();
                let view = split.view();
                (view.namespace.clone(), view.domain.clone())
            }
        }
    }

    /// Hands a namespace over to it.
    ///
    /// # Errors
    /// Its packets cannot be carried. An own connection has ended then.
    pub async fn carry(
        self,
        wanted: &Wanted,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Carrying, Failure> {
        let cannot = |error: io::Error| {
            Failure::new("the namespace's packets cannot be carried").caused_by(&error)
        };
        match self {
            Self::Lent { stream, .. } => Lease::take(stream, wanted, &descriptors)
                .await
                .map(Carrying::Lent)
                .map_err(cannot),
            Self::Own(running) => match wanted.bridge(descriptors, running.upstream()) {
                Ok(bridge) => Ok(Carrying::Own(running, bridge)),
                Err(error) => {
                    running.end().await;
                    Err(cannot(error))
                }
            },
        }
    }

    /// Gives it back, or ends it.
    pub async fn end(self) {
        if let Self::Own(running) = self {
            running.end().await;
        }
    }
}

impl Carrying {
    /// Returns when nothing is carried any more, and says why. Cancel safe.
    pub async fn ended(&mut self) -> Failure {
        match self {
            Self::Lent(lease) => {
                lease.ended().await;
                Failure::new("the connection was ended; the program has no network any more")
            }
            Self::Own(running, bridge) => tokio::select! {
                failure = running.ended() => failure,
                error = bridge.ended() => {
                    Failure::new("the program has no network any more").caused_by(&error)
                }
            },
        }
    }

    /// After [`Carrying::ended`]: returns when every flow has been reset. Cancel safe.
    pub async fn released(&mut self) {
        match self {
            Self::Lent(lease) => lease.released().await,
            Self::Own(_, bridge) => bridge.stop().await,
        }
    }

    /// Ends it, flows first.
    pub async fn end(self) {
        if let Self::Own(running, bridge) = self {
            let _ = tokio::task::spawn_blocking(move || drop(bridge)).await;
            running.end().await;
        }
    }
}
