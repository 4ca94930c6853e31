//! What carries a connection: any reliable byte stream, TLS 1.3 over it, and the port-forward of an API server.

pub mod tls;
pub mod websocket;

use tokio::io::{AsyncRead, AsyncWrite};

/// Anything HTTP/2 can run over.
pub trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> ByteStream for T {}

/// A carrier whose kind does not matter any more.
pub type BoxedStream = Box<dyn ByteStream>;
