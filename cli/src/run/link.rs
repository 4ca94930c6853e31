//! The connection that a program uses: one that is up already, or one of its own.

use std::io;
use std::os::fd::OwnedFd;

use tokio::net::UnixStream;

use super::lease::{Lease, Wanted};
use super::worker::Worker;
use crate::daemon::peers::Peer;
use crate::daemon::running::Running;
use crate::report::Failure;

/// A connection that serves no program yet.
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

/// A connection that serves a program.
#[expect(
    clippy::large_enum_variant,
    reason = "one of them exists, for the whole time"
)]
pub enum Carrying {
    /// A daemon does it.
    Lent(Lease),
    /// This process does it.
    Own(Running, Worker),
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

    /// Hands a program over to it.
    ///
    /// # Errors
    /// It cannot be served. An own connection has ended then.
    pub async fn carry(
        self,
        wanted: &Wanted,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Carrying, Failure> {
        let cannot =
            |error: io::Error| Failure::new("the program cannot be connected").caused_by(&error);
        match self {
            Self::Lent { stream, .. } => Lease::take(stream, wanted, &descriptors)
                .await
                .map(Carrying::Lent)
                .map_err(cannot),
            Self::Own(running) => match wanted.serve(descriptors, running.upstream()) {
                Ok(worker) => Ok(Carrying::Own(running, worker)),
                Err(error) => {
                    running.end_with_program(false).await;
                    Err(cannot(error))
                }
            },
        }
    }

    /// Gives it back, or ends it: no program used it.
    pub async fn end(self) {
        if let Self::Own(running) = self {
            running.end_with_program(false).await;
        }
    }
}

impl Carrying {
    /// Returns when the program is not served any more, and says why. Cancel safe.
    pub async fn ended(&mut self) -> Failure {
        match self {
            Self::Lent(lease) => {
                lease.ended().await;
                Failure::new("the connection was ended; the program has no network any more")
            }
            Self::Own(running, worker) => tokio::select! {
                failure = running.ended() => failure,
                error = worker.ended() => {
                    Failure::new("the program has no network any more").caused_by(&error)
                }
            },
        }
    }

    /// After [`Carrying::ended`]: returns when every flow has been reset. Cancel safe.
    pub async fn released(&mut self) {
        match self {
            Self::Lent(lease) => lease.released().await,
            Self::Own(_, worker) => worker.stop().await,
        }
    }

    /// Ends it, flows first. The program ended `well`, or its log may be wanted.
    pub async fn end(self, well: bool) {
        if let Self::Own(running, worker) = self {
            let _ = tokio::task::spawn_blocking(move || drop(worker)).await;
            running.end_with_program(well).await;
        }
    }
}
