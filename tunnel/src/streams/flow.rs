//! One TCP flow on one HTTP/2 stream.

use bytes::Bytes;

use crate::error::{FlowError, TunnelError};

/// Both directions of one TCP flow.
pub struct Flow {
    sender: FlowSender,
    receiver: FlowReceiver,
}

/// The sending direction.
pub struct FlowSender {
    _private: (),
}

/// The receiving direction.
pub struct FlowReceiver {
    _private: (),
}

impl Flow {
    /// Sends bytes; returns when they were handed to the connection.
    pub async fn send(&mut self, data: Bytes) -> Result<(), FlowError> {
        self.sender.send(data).await
    }

    /// The next bytes, or `None` after the peer's FIN. Cancel safe.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, FlowError> {
        self.receiver.recv().await
    }

    /// Sends FIN; receiving goes on.
    pub async fn finish(&mut self) -> Result<(), FlowError> {
        self.sender.finish().await
    }

    /// Ends both directions with a reset.
    pub fn reset(self) {}

    /// The two directions, for two tasks. The flow is reset when a direction is dropped before its end.
    pub fn into_split(self) -> (FlowSender, FlowReceiver) {
        (self.sender, self.receiver)
    }
}

impl FlowSender {
    /// As [`Flow::send`].
    pub async fn send(&mut self, data: Bytes) -> Result<(), FlowError> {
        let _ = data;
        Err(FlowError::Tunnel(TunnelError::Closed))
    }

    /// As [`Flow::finish`].
    pub async fn finish(&mut self) -> Result<(), FlowError> {
        Err(FlowError::Tunnel(TunnelError::Closed))
    }
}

impl FlowReceiver {
    /// As [`Flow::recv`].
    pub async fn recv(&mut self) -> Result<Option<Bytes>, FlowError> {
        Err(FlowError::Tunnel(TunnelError::Closed))
    }
}
