//! Datagrams of a program.

use std::net::SocketAddr;
use std::rc::Rc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tp_netstack::{AssociationId, Unreachable};

use super::Shared;

/// Datagrams between a program and one destination. Dropping it makes the program's next datagram a new one.
pub struct Association {
    /// Where the datagrams go.
    pub destination: SocketAddr,
    id: AssociationId,
    datagram_rx: mpsc::Receiver<Bytes>,
    shared: Rc<Shared>,
}

impl Association {
    pub(super) fn new(
        id: AssociationId,
        destination: SocketAddr,
        datagram_rx: mpsc::Receiver<Bytes>,
        shared: Rc<Shared>,
    ) -> Self {
        Self {
            destination,
            id,
            datagram_rx,
            shared,
        }
    }

    /// The next datagram from the program; `None` when it has closed its socket or was idle for two minutes. Cancel safe.
    pub async fn recv(&mut self) -> Option<Bytes> {
        self.datagram_rx.recv().await
    }

    /// Sends a datagram to the program. One that is too large is dropped, as UDP would.
    pub fn send(&self, payload: &[u8]) {
        if payload.len() <= LARGEST_DATAGRAM {
            // Gone means that the program has.
            let _ = self
                .shared
                .stack
                .borrow_mut()
                .send_datagram(self.id, payload);
            self.shared.touched.notify_one();
        }
    }

    /// Tells the program that its datagrams do not arrive.
    pub fn refuse(self, why: Unreachable) {
        self.shared
            .stack
            .borrow_mut()
            .association_unreachable(self.id, why);
        self.shared.touched.notify_one();
    }
}

/// What fits an IPv4 packet (RFC 768).
const LARGEST_DATAGRAM: usize = 65_507;

impl Drop for Association {
    fn drop(&mut self) {
        self.shared.associations.borrow_mut().remove(&self.id);
        self.shared.stack.borrow_mut().close_association(self.id);
    }
}
