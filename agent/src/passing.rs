//! Connections that a sidecar passes on unparsed, because nobody intercepted their port when they came: an intercept that
//! comes later does not see their requests. The kernel keeps none of them from the agent, so it cannot tell them from
//! others; how long each has been idle it knows ([`crate::bypass`]).

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tp_manager_api::route_table::OpenConnections;

use crate::bypass::{self, Bypass};

/// Port that a client connected to, and the client.
type Ends = (u16, SocketAddr);

/// All of them.
#[derive(Debug, Default)]
pub struct Passing {
    all: Mutex<BTreeMap<Ends, Arc<Notify>>>,
}

impl Passing {
    /// Does `work`, which passes a connection on, until that is done or the connection is to end. Cancel safe if `work`
    /// is.
    pub(crate) async fn pass(&self, port: u16, peer: SocketAddr, work: impl Future<Output = ()>) {
        let end = Arc::new(Notify::new());
        self.lock().insert((port, peer), Arc::clone(&end));
        let _leave = Leave(self, (port, peer));
        tokio::select! {
            () = work => {}
            () = end.notified() => {}
        }
    }

    /// Counts those of these ports. Asks the kernel, and blocks for that long.
    pub(crate) fn count(&self, ports: &[u16]) -> io::Result<OpenConnections> {
        Ok(bypass::counted(self.among(bypass::bypassing(ports)?)))
    }

    /// Ends the idle ones of these ports. Asks the kernel, and blocks for that long.
    pub(crate) fn close_idle(&self, ports: &[u16]) -> io::Result<()> {
        let ours = self.among(bypass::bypassing(ports)?);
        let all = self.lock();
        for bypass in ours.iter().filter(|bypass| bypass.is_idle()) {
            if let Some(end) = all.get(&(bypass.port, bypass.peer)) {
                end.notify_one();
            }
        }
        Ok(())
    }

    fn among(&self, mut connections: Vec<Bypass>) -> Vec<Bypass> {
        let all = self.lock();
        connections.retain(|bypass| all.contains_key(&(bypass.port, bypass.peer)));
        connections
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Ends, Arc<Notify>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a connection out, however it ends.
struct Leave<'a>(&'a Passing, Ends);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_counts_until_it_ends_or_is_ended() {
        let passing = Passing::default();
        let ends = (15100, SocketAddr::from(([10, 0, 0, 9], 4000)));
        let known = || passing.lock().len();
        let forever = passing.pass(ends.0, ends.1, std::future::pending());
        tokio::pin!(forever);
        assert!(futures::poll!(&mut forever).is_pending());
        assert_eq!(known(), 1);

        passing.lock()[&ends].notify_one();
        forever.await;

        assert_eq!(known(), 0);
        passing
            .pass(ends.0, ends.1, async { assert_eq!(known(), 1) })
            .await;
        assert_eq!(known(), 0);
    }

    #[test]
    fn only_its_own_connections_are_its_business() {
        let passing = Passing::default();
        let bypass = |port| Bypass::new(port, SocketAddr::from(([10, 0, 0, 9], port)));
        let own = bypass(15100);
        passing.lock().insert((own.port, own.peer), Arc::default());

        assert_eq!(passing.among(vec![own.clone(), bypass(15101)]), [own]);
    }
}
