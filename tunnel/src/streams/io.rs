//! A flow as tokio's reader and writer, for code that speaks a protocol over it.
//!
//! Between a flow and a kernel socket [`crate::relay`] is the better choice: it owns no buffer while idle.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::error::FlowError;
use crate::settings::FRAME_PAYLOAD;
use crate::streams::{Flow, FlowReceiver, FlowSender};

/// The receiving direction. A reset is an error, never an end of file.
#[derive(Debug)]
pub struct FlowReader {
    receiver: FlowReceiver,
    /// Taken from the flow and not yet read; its credit is still held.
    rest: Bytes,
}

/// The sending direction; shutting down is FIN. A write that was begun must be polled to its end, or the writer dropped:
/// in between it may hold the turn that other flows wait for.
#[derive(Debug)]
pub struct FlowWriter {
    sender: FlowSender,
    finished: bool,
}

impl Flow {
    /// Both directions as tokio sees byte streams.
    pub fn into_io(self) -> (FlowReader, FlowWriter) {
        let reader = FlowReader {
            receiver: self.receiver,
            rest: Bytes::new(),
        };
        let writer = FlowWriter {
            sender: self.sender,
            finished: false,
        };
        (reader, writer)
    }

    /// The flow again; what was taken and not read comes first.
    pub fn from_io(reader: FlowReader, writer: FlowWriter) -> Self {
        let FlowReader { mut receiver, rest } = reader;
        receiver.put_back(rest);
        Self::from_parts(writer.sender, receiver)
    }
}

impl AsyncRead for FlowReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if self.rest.is_empty() {
            match ready!(self.receiver.poll_data(cx)).map_err(broken)? {
                Some(data) => self.rest = data,
                None => return Poll::Ready(Ok(())),
            }
        }
        let size = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest[..size]);
        self.rest.advance(size);
        self.receiver.release(size);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for FlowWriter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let mut data = Bytes::copy_from_slice(&buf[..buf.len().min(FRAME_PAYLOAD)]);
        let size = data.len();
        ready!(self.sender.poll_send(cx, &mut data, false)).map_err(broken)?;
        self.sender.unreserve();
        Poll::Ready(Ok(size - data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Frames leave as soon as it is their turn.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !std::mem::replace(&mut self.finished, true) {
            self.sender.finish().map_err(broken)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl FlowReader {
    /// As [`FlowReceiver::stalled`].
    pub async fn stalled(&mut self) -> io::Error {
        broken(self.receiver.stalled().await)
    }
}

impl FlowWriter {
    /// Waits until the peer has reset the flow or the connection has ended. Cancel safe.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.sender.poll_reset(cx).map(broken)
    }

    /// Ends both directions with a reset, once what was sent has left.
    pub async fn reset(self) {
        self.sender.reset(Reason::CONNECT_ERROR).await;
    }
}

fn broken(error: FlowError) -> io::Error {
    let kind = match &error {
        FlowError::Tunnel(_) => io::ErrorKind::ConnectionAborted,
        FlowError::Reset(_) | FlowError::Local | FlowError::Framing => {
            io::ErrorKind::ConnectionReset
        }
    };
    io::Error::new(kind, error)
}
