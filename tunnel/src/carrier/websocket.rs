//! One forwarded port of `pods/portforward` as a byte stream (`v4.channel.k8s.io` over a WebSocket).
//!
//! Every message is binary: a channel byte, then data. Channel 0 is the port's data, channel 1 its error text, and each
//! channel begins with two bytes that repeat the port. The API server can half-close nothing here, so any end of the
//! WebSocket is an error: what runs inside (TLS) says whether it was complete.
//!
//! Reading and writing belong to one task, as everywhere below TLS; neither direction waits for the other. It knows
//! nothing of TLS, pods or API servers.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message};

/// The data channel of one forwarded port.
///
/// Written bytes are gathered to messages of about 64 KiB, because API servers and kubelets pay by the message. They leave
/// when full or when flushed; a first flush of a message that is not full is put off until this stream is polled again,
/// which its task is asked to do at once, so that two frames of one turn share a message.
pub struct PortForwardStream<S> {
    ws: WebSocketStream<S>,
    channels: Channels,
    /// Data received and not yet read.
    unread: Bytes,
    /// The message being gathered, channel byte included; empty when there is none.
    gathered: BytesMut,
    /// Something was given to the WebSocket since the last complete flush.
    unflushed: bool,
    /// A flush was asked for and put off.
    put_off: bool,
}

/// The protocol inside the messages. Pure: messages in, data or an error out.
pub struct Channels {
    port: u16,
    begun: [usize; 2],
    error_text: Vec<u8>,
}

/// Why a carrier cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PortForwardError {
    /// What the API server or the kubelet reported on the error channel, control characters escaped.
    #[error("the port-forward failed: {0}")]
    Reported(String),
    /// A message that the protocol does not allow.
    #[error("the server does not speak v4.channel.k8s.io: {0}")]
    Protocol(&'static str),
}

impl<S> PortForwardStream<S> {
    /// Takes over a WebSocket that was opened with subprotocol `v4.channel.k8s.io` for exactly one port.
    pub fn new(ws: WebSocketStream<S>, port: u16) -> Self {
        Self {
            ws,
            channels: Channels::new(port),
            unread: Bytes::new(),
            gathered: BytesMut::new(),
            unflushed: false,
            put_off: false,
        }
    }
}

impl Channels {
    /// The state before the first message.
    pub fn new(port: u16) -> Self {
        Self {
            port,
            begun: [0; 2],
            error_text: Vec::new(),
        }
    }

    /// Takes one binary message. Returns its data, which may be empty.
    pub fn receive(&mut self, mut message: Bytes) -> Result<Bytes, PortForwardError> {
        if message.len() > RECEIVED_MAX {
            return Err(PortForwardError::Protocol("a message of more than 1 MiB"));
        }
        // An empty message and a message that is only a channel byte both carry nothing.
        if !message.has_remaining() {
            return Ok(message);
        }
        match message.get_u8() {
            DATA => self.begin(DATA, &mut message).map(|()| message),
            ERROR => {
                self.begin(ERROR, &mut message)?;
                self.report(&message).map(|()| Bytes::new())
            }
            _ => Err(PortForwardError::Protocol("a channel that was not opened")),
        }
    }

    /// Checks and removes the two bytes that open a channel, which may come in pieces.
    fn begin(&mut self, channel: u8, message: &mut Bytes) -> Result<(), PortForwardError> {
        let begun = &mut self.begun[usize::from(channel)];
        let port = self.port.to_le_bytes();
        while *begun < port.len() && message.has_remaining() {
            if message.get_u8() != port[*begun] {
                return Err(PortForwardError::Protocol(
                    "a channel began with another port",
                ));
            }
            *begun += 1;
        }
        Ok(())
    }

    /// The server writes the whole text and nothing after it; a text of several messages loses its later ones.
    fn report(&mut self, text: &[u8]) -> Result<(), PortForwardError> {
        if text.is_empty() {
            return Ok(());
        }
        self.error_text
            .extend_from_slice(&text[..text.len().min(ERROR_TEXT_MAX)]);
        let text = String::from_utf8_lossy(&self.error_text);
        Err(PortForwardError::Reported(
            text.trim().chars().flat_map(char::escape_debug).collect(),
        ))
    }
}

const DATA: u8 = 0;
const ERROR: u8 = 1;

/// Largest payload of a message we send: two full frames and what TLS adds. Beyond this the API server gets no faster.
const SENT_MAX: usize = 65 * 1024;

/// Largest message accepted; API servers send 32 KiB.
const RECEIVED_MAX: usize = 1 << 20;

/// Bytes of an error text that are kept.
const ERROR_TEXT_MAX: usize = 1024;

impl From<PortForwardError> for io::Error {
    fn from(error: PortForwardError) -> Self {
        let kind = match error {
            PortForwardError::Reported(_) => io::ErrorKind::ConnectionAborted,
            PortForwardError::Protocol(_) => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> PortForwardStream<S> {
    /// The next data, through pings and error texts.
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        loop {
            let Some(message) = ready!(Pin::new(&mut self.ws).poll_next(cx)) else {
                return Poll::Ready(Err(cut()));
            };
            match message.map_err(io_error)? {
                Message::Binary(message) => {
                    let data = self.channels.receive(message)?;
                    if !data.is_empty() {
                        return Poll::Ready(Ok(data));
                    }
                }
                // Reading on sends the pong that tungstenite queued.
                Message::Ping(_) | Message::Pong(_) => {}
                Message::Close(_) => return Poll::Ready(Err(cut())),
                Message::Text(_) | Message::Frame(_) => {
                    return Poll::Ready(Err(PortForwardError::Protocol("a text message").into()));
                }
            }
        }
    }

    /// Gives the gathered message to the WebSocket.
    fn poll_hand_over(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.gathered.is_empty() {
            return Poll::Ready(Ok(()));
        }
        // Ready once everything before is written, so at most one message is buffered below.
        ready!(Pin::new(&mut self.ws).poll_ready(cx)).map_err(io_error)?;
        self.put_off = false;
        let message = self.gathered.split().freeze();
        Pin::new(&mut self.ws)
            .start_send(Message::Binary(message))
            .map_err(io_error)?;
        self.unflushed = true;
        Poll::Ready(Ok(()))
    }

    /// Room for more bytes in the gathered message.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.gathered.len() > SENT_MAX {
            ready!(self.poll_hand_over(cx))?;
            ready!(self.poll_written(cx))?;
        }
        if self.gathered.is_empty() {
            self.gathered.reserve(1 + SENT_MAX);
            self.gathered.put_u8(DATA);
        }
        Poll::Ready(Ok(1 + SENT_MAX - self.gathered.len()))
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
            self.unread = ready!(self.poll_message(cx))?;
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
        if !self.gathered.is_empty() && self.gathered.len() <= SENT_MAX && !self.put_off {
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

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the port-forward was cut")
}

fn io_error(error: tungstenite::Error) -> io::Error {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "an open enum of another crate"
    )]
    match error {
        tungstenite::Error::Io(error) => error,
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => cut(),
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use futures::{SinkExt, StreamExt};
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;

    const PORT: u16 = 8443;
    const PORT_BYTES: [u8; 2] = PORT.to_le_bytes();

    async fn pair(
        buffer: usize,
    ) -> (
        PortForwardStream<DuplexStream>,
        WebSocketStream<DuplexStream>,
    ) {
        let (ours, theirs) = duplex(buffer);
        let ours = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
        let theirs = WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
        (PortForwardStream::new(ours, PORT), theirs)
    }

    fn message(channel: u8, data: &[u8]) -> Message {
        Message::Binary([&[channel], data].concat().into())
    }

    async fn open_channels(server: &mut WebSocketStream<DuplexStream>) {
        server.send(message(DATA, &PORT_BYTES)).await.unwrap();
        server.send(message(ERROR, &PORT_BYTES)).await.unwrap();
    }

    #[tokio::test]
    async fn bytes_arrive_both_ways_in_large_messages() {
        let (mut stream, mut server) = pair(1 << 20).await;
        open_channels(&mut server).await;
        server.send(message(DATA, b"hello ")).await.unwrap();
        server.send(message(DATA, b"world")).await.unwrap();
        let mut greeting = [0; 11];
        stream.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"hello world");

        let sent: Vec<u8> = (0..200_000_u32).map(|n| n as u8).collect();
        stream.write_all(&sent).await.unwrap();
        stream.flush().await.unwrap();
        let reading = tokio::spawn(async move { stream.read_u8().await });
        let mut received = Vec::new();
        let mut sizes = Vec::new();
        while received.len() < sent.len() {
            let Message::Binary(data) = server.next().await.unwrap().unwrap() else {
                panic!("not binary")
            };
            assert_eq!(data[0], DATA);
            sizes.push(data.len() - 1);
            received.extend_from_slice(&data[1..]);
        }
        assert_eq!(received, sent);
        assert_eq!(sizes, [66_560, 66_560, 66_560, 320]);
        reading.abort();
    }

    #[tokio::test]
    async fn a_blocked_writer_does_not_stop_the_reader() {
        let (mut stream, mut server) = pair(4096).await;
        let server = tokio::spawn(async move {
            open_channels(&mut server).await;
            for _ in 0..100 {
                server.send(message(DATA, &[7; 1000])).await.unwrap();
            }
            server
        });
        // The server reads nothing, so this fills every buffer on the way.
        let filled = async {
            loop {
                stream.write_all(&[0; 65_536]).await.unwrap();
                stream.flush().await.unwrap();
            }
        };
        tokio::time::timeout(std::time::Duration::from_millis(100), filled)
            .await
            .unwrap_err();
        let mut data = vec![0; 100_000];
        stream.read_exact(&mut data).await.unwrap();
        assert!(data.iter().all(|byte| *byte == 7));
        drop(server.await.unwrap());
    }

    #[tokio::test]
    async fn a_flushed_message_leaves_while_its_writer_waits_for_the_answer() {
        let (mut stream, mut server) = pair(4096).await;
        stream.write_all(&[7; 60_000]).await.unwrap();
        stream.flush().await.unwrap();
        let asking = tokio::spawn(async move { stream.read_u8().await });
        // The request meets a full pipe first.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        let receiving = tokio::time::timeout(std::time::Duration::from_secs(5), server.next());
        let received = receiving.await.expect("the request arrives").unwrap();
        assert_eq!(received.unwrap().into_data().len(), 1 + 60_000);
        open_channels(&mut server).await;
        server.send(message(DATA, b".")).await.unwrap();
        assert_eq!(asking.await.unwrap().unwrap(), b'.');
    }

    #[tokio::test]
    async fn the_error_channel_ends_the_stream_with_its_text() {
        let (mut stream, mut server) = pair(1 << 20).await;
        open_channels(&mut server).await;
        server
            .send(message(
                ERROR,
                b"an error occurred forwarding 8443\x1b[2J\n",
            ))
            .await
            .unwrap();
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the port-forward failed: an error occurred forwarding 8443\\u{1b}[2J",
        );
    }

    #[tokio::test]
    async fn no_end_is_a_clean_end() {
        for close in [true, false] {
            let (mut stream, mut server) = pair(1 << 20).await;
            open_channels(&mut server).await;
            server.send(message(DATA, b"x")).await.unwrap();
            if close {
                server.close(None).await.unwrap();
            } else {
                drop(server);
            }
            assert_eq!(stream.read_u8().await.unwrap(), b'x');
            let error = stream.read_u8().await.unwrap_err();
            assert!(
                matches!(error.kind(), io::ErrorKind::UnexpectedEof)
                    || error.to_string().contains("without closing handshake"),
                "{error:?}",
            );
        }
    }

    #[tokio::test]
    async fn a_ping_is_answered_while_reading() {
        let (mut stream, mut server) = pair(1 << 20).await;
        server
            .send(Message::Ping(Bytes::from_static(b"alive?")))
            .await
            .unwrap();
        open_channels(&mut server).await;
        server.send(message(DATA, b"x")).await.unwrap();
        stream.read_u8().await.unwrap();
        let reading = tokio::spawn(async move { stream.read_u8().await });
        assert_eq!(
            server.next().await.unwrap().unwrap(),
            Message::Pong(Bytes::from_static(b"alive?"))
        );
        reading.abort();
    }

    #[test]
    fn other_ports_channels_and_sizes_are_protocol_errors() {
        for bad in [
            vec![DATA, 0, 0],
            vec![DATA, PORT_BYTES[0], 0],
            vec![2, 1],
            vec![0; RECEIVED_MAX + 1],
        ] {
            let received = Channels::new(PORT).receive(bad.into());
            assert!(
                matches!(received, Err(PortForwardError::Protocol(_))),
                "{received:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn data_survives_any_cut_into_messages(data in prop::collection::vec(any::<u8>(), 0..500), cut in 1..100_usize) {
            let stream = [&PORT_BYTES[..], &data].concat();
            let mut channels = Channels::new(PORT);
            let mut received = Vec::new();
            for piece in stream.chunks(cut) {
                received.extend_from_slice(&channels.receive([&[DATA], piece].concat().into()).unwrap());
            }
            prop_assert_eq!(received, data);
        }

        #[test]
        fn any_messages_are_taken_without_panic(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20)) {
            let mut channels = Channels::new(PORT);
            for message in messages {
                if channels.receive(message.into()).is_err() {
                    break;
                }
            }
        }
    }
}
