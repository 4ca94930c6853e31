//! How a tunnel, an opening and a flow end badly.

use std::sync::Arc;
use std::time::Duration;

use crate::proxy_status::DialError;

/// Why a whole connection ended. Cheap to clone: every flow of the connection reports the same cause.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TunnelError {
    /// The carrier broke, or the peer broke HTTP/2.
    #[error("the carrier broke")]
    Carrier(#[source] Arc<h2::Error>),
    /// No answer to a ping.
    #[error("the peer was silent for {0:?}")]
    Silent(Duration),
    /// The peer announced that it takes no more streams.
    #[error("the peer is going away")]
    GoingAway,
    /// The peer ended the carrier in good order before its first byte: it does not want this key.
    #[error("the peer does not admit this key")]
    NotAdmitted,
    /// This side closed the tunnel.
    #[error("the tunnel is closed")]
    Closed,
}

impl From<h2::Error> for TunnelError {
    fn from(error: h2::Error) -> Self {
        match error.is_go_away()
            && error.is_remote()
            && error.reason() == Some(h2::Reason::NO_ERROR)
        {
            true => Self::GoingAway,
            false => Self::Carrier(Arc::new(error)),
        }
    }
}

/// Why a flow could not be opened.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The peer answered that the dial failed.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The connection is gone or going; a new one may serve.
    #[error(transparent)]
    Closed(#[from] TunnelError),
    /// The peer reset this one stream.
    #[error("the peer reset the stream: {0}")]
    Reset(h2::Reason),
    /// The answer was not what the protocol allows.
    #[error("the peer's answer is unusable: {0}")]
    Answer(String),
}

impl From<h2::Error> for OpenError {
    fn from(error: h2::Error) -> Self {
        match (error.is_reset(), error.reason()) {
            (true, Some(reason)) => Self::Reset(reason),
            (true | false, _) => Self::Closed(error.into()),
        }
    }
}

/// Why a flow ended without a FIN.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FlowError {
    /// The peer reset the flow.
    #[error("the flow was reset by the peer: {0}")]
    Reset(h2::Reason),
    /// The connection under it ended.
    #[error("the tunnel under the flow ended")]
    Tunnel(#[source] TunnelError),
    /// This side ended it, for example because its reader was the slowest when memory ran short.
    #[error("the flow was reset on this side")]
    Local,
    /// The peer sent bytes that are no valid capsules.
    #[error("the peer broke the datagram framing")]
    Framing,
}

impl From<h2::Error> for FlowError {
    fn from(error: h2::Error) -> Self {
        match (error.is_reset(), error.is_remote(), error.reason()) {
            (true, true, Some(reason)) => Self::Reset(reason),
            (true, false, Some(_)) => Self::Local,
            (true | false, _, _) => Self::Tunnel(error.into()),
        }
    }
}
