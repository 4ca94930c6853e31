//! One forwarded port of `pods/portforward` as a byte stream, over a WebSocket.
//!
//! Two protocols can run inside the messages, and the server chooses: [`Spdy`], which API servers since Kubernetes 1.31
//! pass on to the container runtime as it is, and [`Channels`], which older ones speak. The first is much faster upwards:
//! in the second the runtime itself unmasks every message, byte by byte. Nothing can be half-closed here, so any end of
//! the WebSocket is an error: what runs inside (TLS) says whether it was complete.
//!
//! Reading and writing belong to one task, as everywhere below TLS; neither direction waits for the other. It knows
//! nothing of TLS, pods or API servers.

mod channels;
mod spdy;

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};

pub use channels::Channels;
pub use spdy::Spdy;

/// What a server may choose to speak inside the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subprotocol {
    /// SPDY/3.1 frames, messages being pieces of one byte stream.
    Spdy,
    /// One channel byte a message.
    Channels,
}

impl Subprotocol {
    /// All of them, the best one first.
    pub const ALL: [Self; 2] = [Self::Spdy, Self::Channels];

    /// Its name in `Sec-WebSocket-Protocol`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Spdy => "SPDY/3.1+portforward.k8s.io",
            Self::Channels => "v4.channel.k8s.io",
        }
    }
}

/// How the WebSocket of a port-forward is to be set up.
///
/// tungstenite fills the room for each read with zeros first; API servers send TLS records of 16 KiB, so a read of the
/// usual 128 KiB would clear eight bytes for each one that comes.
pub fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default().read_buffer_size(READ_SIZE)
}

/// Bytes of one read from the WebSocket's connection.
const READ_SIZE: usize = 16 * 1024;

/// The data of one forwarded port.
///
/// Written bytes are gathered to messages of about 64 KiB, because API servers and kubelets pay by the message. They leave
/// when full or when flushed. Where messages are close together, a first flush of one that is not full is put off until
/// this stream is polled again, which its task is asked to do at once, so that two frames of one turn share a message.
pub struct PortForwardStream<S> {
    ws: WebSocketStream<S>,
    framing: Framing,
    /// Data received and not yet read.
    unread: Bytes,
    /// The message being gathered, room for the framing's head included; empty when there is none.
    gathered: BytesMut,
    /// Something was given to the WebSocket since the last complete flush.
    unflushed: bool,
    /// A flush was asked for and put off.
    put_off: bool,
    /// When a message was last given to the WebSocket.
    handed_over: Option<Instant>,
}

/// Why a carrier cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PortForwardError {
    /// What the API server or the kubelet reported, control characters escaped.
    #[error("the port-forward failed: {0}")]
    Reported(String),
    /// Something that the protocol does not allow.
    #[error("the server breaks the protocol of port-forwards: {0}")]
    Protocol(&'static str),
    /// The pod's end of the port is gone.
    #[error("the port-forward was cut")]
    Ended,
}

impl PortForwardError {
    fn reported(text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(&text[..text.len().min(ERROR_TEXT_MAX)]);
        Self::Reported(text.trim().chars().flat_map(char::escape_debug).collect())
    }
}

impl From<PortForwardError> for io::Error {
    fn from(error: PortForwardError) -> Self {
        let kind = match error {
            PortForwardError::Reported(_) => io::ErrorKind::ConnectionAborted,
            PortForwardError::Protocol(_) => io::ErrorKind::InvalidData,
            PortForwardError::Ended => io::ErrorKind::UnexpectedEof,
        };
        Self::new(kind, error)
    }
}

/// Largest payload of a message we send: two full frames and what TLS adds. Beyond this the API server gets no faster.
const SENT_MAX: usize = 65 * 1024;

/// Messages that follow each other within this time are part of a stream of them. Less than the round trip of a
/// port-forward on one machine.
const CLOSE_TOGETHER: Duration = Duration::from_micros(200);

/// Bytes of an error text that are kept.
const ERROR_TEXT_MAX: usize = 1024;

enum Framing {
    Spdy(Spdy),
    Channels(Channels),
}

impl Framing {
    /// Bytes before the payload of a message.
    fn head(&self) -> usize {
        match self {
            Self::Spdy(_) => Spdy::HEAD,
            Self::Channels(_) => 1,
        }
    }

    /// Something is to be sent that is no payload.
    fn owes(&self) -> bool {
        match self {
            Self::Spdy(spdy) => spdy.owes(),
            Self::Channels(_) => false,
        }
    }

    fn is_open(&self) -> bool {
        match self {
            Self::Spdy(spdy) => spdy.is_open(),
            Self::Channels(_) => true,
        }
    }

    /// Makes a message of the room for its head and its payload.
    fn complete(&mut self, message: &mut BytesMut) {
        match self {
            Self::Spdy(spdy) => spdy.complete(message),
            Self::Channels(_) => message[0] = channels::DATA,
        }
    }

    fn receive(&mut self, message: Bytes) -> Result<(), PortForwardError> {
        match self {
            Self::Spdy(spdy) => {
                spdy.receive(message);
                Ok(())
            }
            Self::Channels(channels) => channels.receive(message),
        }
    }

    fn next_data(&mut self) -> Result<Option<Bytes>, PortForwardError> {
        match self {
            Self::Spdy(spdy) => spdy.next_data(),
            Self::Channels(channels) => Ok(channels.next_data()),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> PortForwardStream<S> {
    /// Takes over a WebSocket that was opened for exactly one port, and opens what its subprotocol asks for.
    ///
    /// # Errors
    /// The server refused, or broke the protocol.
    pub async fn open(
        ws: WebSocketStream<S>,
        subprotocol: Subprotocol,
        port: u16,
    ) -> io::Result<Self> {
        let mut stream = Self {
            ws,
            framing: match subprotocol {
                Subprotocol::Spdy => Framing::Spdy(Spdy::new(port)),
                Subprotocol::Channels => Framing::Channels(Channels::new(port)),
            },
            unread: Bytes::new(),
            gathered: BytesMut::new(),
            unflushed: false,
            put_off: false,
            handed_over: None,
        };
        poll_fn(|cx| stream.poll_flush_now(cx)).await?;
        while !stream.framing.is_open() {
            poll_fn(|cx| stream.poll_message(cx)).await?;
            if let Some(data) = stream.framing.next_data()? {
                stream.unread = data;
            }
        }
        Ok(stream)
    }

    /// Gives the next binary message to the framing.
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let Some(message) = ready!(Pin::new(&mut self.ws).poll_next(cx)) else {
                return Poll::Ready(Err(PortForwardError::Ended.into()));
            };
            match message.map_err(io_error)? {
                Message::Binary(message) => {
                    return Poll::Ready(self.framing.receive(message).map_err(Into::into));
                }
                // Reading on sends the pong that tungstenite queued.
                Message::Ping(_) | Message::Pong(_) => {}
                Message::Close(_) => return Poll::Ready(Err(PortForwardError::Ended.into())),
                Message::Text(_) | Message::Frame(_) => {
                    return Poll::Ready(Err(PortForwardError::Protocol("a text message").into()));
                }
            }
        }
    }

    /// The next data, through pings and whatever else carries none.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        loop {
            let data = self.framing.next_data()?;
            if self.framing.owes() && !self.put_off {
                self.put_off = true;
                cx.waker().wake_by_ref();
            }
            if let Some(data) = data {
                return Poll::Ready(Ok(data));
            }
            ready!(self.poll_message(cx))?;
        }
    }

    /// Gives the gathered message to the WebSocket.
    fn poll_hand_over(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.gathered.is_empty() && !self.framing.owes() {
            self.put_off = false;
            return Poll::Ready(Ok(()));
        }
        // Ready once everything before is written, so at most one message is buffered below.
        ready!(Pin::new(&mut self.ws).poll_ready(cx)).map_err(io_error)?;
        self.put_off = false;
        if self.gathered.is_empty() {
            self.gathered.put_bytes(0, self.framing.head());
        }
        self.framing.complete(&mut self.gathered);
        let message = self.gathered.split().freeze();
        Pin::new(&mut self.ws)
            .start_send(Message::Binary(message))
            .map_err(io_error)?;
        self.unflushed = true;
        self.handed_over = Some(Instant::now());
        Poll::Ready(Ok(()))
    }

    /// Whether more may come that can share a message with what is gathered. A question that waits for its answer comes
    /// alone, and to put it off costs it a turn of the scheduler.
    fn is_busy(&self) -> bool {
        self.handed_over
            .is_some_and(|last| last.elapsed() < CLOSE_TOGETHER)
    }

    /// Bytes of the largest message.
    fn message_max(&self) -> usize {
        self.framing.head() + SENT_MAX
    }

    /// Room for more bytes in the gathered message.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.gathered.len() >= self.message_max() {
            ready!(self.poll_hand_over(cx))?;
            ready!(self.poll_written(cx))?;
        }
        if self.gathered.is_empty() {
            self.gathered.reserve(self.message_max());
            self.gathered.put_bytes(0, self.framing.head());
        }
        Poll::Ready(Ok(self.message_max() - self.gathered.len()))
    }

    fn poll_flush_now(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_hand_over(cx))?;
        self.poll_written(cx)
    }

    /// Goes on with a flush that was put off, and with what it handed over until all of it has left.
    fn poll_owed_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.put_off {
            true => self.poll_flush_now(cx),
            false => self.poll_written(cx),
        }
    }

    fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unflushed {
            ready!(Pin::new(&mut self.ws).poll_flush(cx)).map_err(io_error)?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for PortForwardStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Whoever asked for a flush was told that it is done, and now only waits for an answer.
        if let Poll::Ready(Err(error)) = self.poll_owed_flush(cx) {
            return Poll::Ready(Err(error));
        }
        if self.unread.is_empty() {
            self.unread = ready!(self.poll_data(cx))?;
        }
        let size = self.unread.len().min(buf.remaining());
        buf.put_slice(&self.unread.split_to(size));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for PortForwardStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let size = ready!(self.poll_room(cx))?.min(data.len());
        self.gathered.put_slice(&data[..size]);
        Poll::Ready(Ok(size))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_room(cx))?;
        let mut left = room;
        for slice in slices {
            let size = left.min(slice.len());
            self.gathered.put_slice(&slice[..size]);
            left -= size;
        }
        Poll::Ready(Ok(room - left))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let is_full = self.gathered.len() >= self.message_max();
        if !self.gathered.is_empty() && !is_full && !self.put_off && self.is_busy() {
            self.put_off = true;
            cx.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        self.poll_flush_now(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush_now(cx))?;
        match ready!(Pin::new(&mut self.ws).poll_close(cx)) {
            Ok(())
            | Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(io_error(error))),
        }
    }
}

fn io_error(error: tungstenite::Error) -> io::Error {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "an open enum of another crate"
    )]
    match error {
        tungstenite::Error::Io(error) => error,
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
            PortForwardError::Ended.into()
        }
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests;
