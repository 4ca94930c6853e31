//! What carries a connection: any reliable byte stream, TLS 1.3 over it, and the port-forward of an API server.

pub mod port_forward;
mod read_ahead;
pub mod tls;

use std::io;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

pub use read_ahead::ReadAhead;

/// Anything HTTP/2 can run over.
pub trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> ByteStream for T {}

/// A carrier whose kind does not matter any more.
pub type BoxedStream = Box<dyn ByteStream>;

/// Sets up a TCP socket that carries a connection, at either end.
///
/// Frames leave at once, and the kernel takes no more unsent bytes than one scheduler turn: what waits in the kernel
/// cannot be overtaken by a small flow.
pub fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(tcp).set_tcp_notsent_lowat(UNSENT_MAX)?;
    Ok(())
}

/// Unsent bytes in the kernel of one carrier.
#[cfg(target_os = "linux")]
const UNSENT_MAX: u32 = 128 * 1024;

/// Tasks that a tokio runtime runs before it looks for new events, for a runtime that drives a connection.
///
/// tokio's 61 are milliseconds when each task moves a frame or more, and an answer of one byte waits for all of them.
pub const EVENT_INTERVAL: u32 = 8;
