//! One UDP flow (RFC 9298).

use bytes::Bytes;

use crate::error::{FlowError, TunnelError};

/// The client's end of one UDP flow: whole datagrams, unordered loss like UDP itself.
pub struct DatagramFlow {
    _private: (),
}

impl DatagramFlow {
    /// Sends one datagram now or drops it; never waits. `Ok(false)` means dropped because the peer is slow.
    pub fn send(&mut self, datagram: Bytes) -> Result<bool, FlowError> {
        let _ = datagram;
        Err(FlowError::Tunnel(TunnelError::Closed))
    }

    /// The next datagram, or `None` when the peer ended the flow (it was idle). Cancel safe.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, FlowError> {
        Err(FlowError::Tunnel(TunnelError::Closed))
    }
}
