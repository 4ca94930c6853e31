//! What waited for this end while nothing could be heard: it may be nobody's business any more.
//!
//! A workstation that was asleep, or cut off, finds first the bytes of its flows, then the resets of those that the other
//! side has given up meanwhile and has answered for. Frames come in the order in which they were sent, so an answer to a
//! question that is asked now comes after all of that: until then, nothing is delivered.

use bytes::Bytes;
use http::Method;

use crate::client::Tunnel;
use crate::error::{FlowError, TunnelError};

/// Any answer does.
const QUESTION: &str = "/v1/health";

/// One inbound flow's view of its connection.
pub(crate) struct Backlog {
    tunnel: Tunnel,
    /// Gaps of which it is known that nothing from before them waits.
    settled: u64,
}

impl Backlog {
    /// For a flow that is about to be taken: what comes on it is sent after this.
    pub(crate) fn new(tunnel: Tunnel) -> Self {
        let settled = tunnel.gaps();
        Self { tunnel, settled }
    }

    /// Whether what has come is fresh.
    pub(crate) fn is_read(&self) -> bool {
        self.settled == self.tunnel.gaps()
    }

    /// Waits until everything from before the last gap was read. Cancel safe.
    ///
    /// # Errors
    /// The connection can answer nothing any more, so nobody knows what has become of the flow.
    pub(crate) async fn read(&mut self) -> Result<(), FlowError> {
        while !self.is_read() {
            let gaps = self.tunnel.gaps();
            let answer = self.tunnel.control(Method::GET, QUESTION, Bytes::new());
            if let Err(error) = answer.await {
                tracing::debug!(%error, "a flow from before a gap is given up");
                let why = self.tunnel.why_closed().unwrap_or(TunnelError::Closed);
                return Err(FlowError::Tunnel(why));
            }
            self.settled = gaps;
        }
        Ok(())
    }
}
