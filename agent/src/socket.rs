//! A connection whose bytes can be read: over TCP as they came, or inside of TLS that the agent speaks itself.
//!
//! The two kinds end alike: in good order (`close_notify`, then FIN), or with a reset, which also a TLS connection passes on
//! as a reset of its TCP.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use rustix::net::{Shutdown, shutdown};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_rustls::TlsStream;

use crate::upstream::READ;

/// A connection to a client or to the application.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Tls(Box<Tls>),
}

/// One that was opened by a handshake of ours, on either side.
#[derive(Debug)]
pub(crate) struct Tls {
    stream: TlsStream<Raw>,
    tcp: Arc<TcpStream>,
}

/// The receiving direction.
#[derive(Debug)]
pub(crate) enum SocketReader {
    Tcp(OwnedReadHalf),
    Tls(ReadHalf<TlsStream<Raw>>, Arc<TcpStream>),
}

/// The sending direction.
#[derive(Debug)]
pub(crate) enum SocketWriter {
    Tcp(OwnedWriteHalf),
    Tls(WriteHalf<TlsStream<Raw>>),
}

/// TCP under TLS, some of whose bytes were read already.
#[derive(Debug)]
pub(crate) struct Raw {
    early: BytesMut,
    tcp: Arc<TcpStream>,
}

/// Ciphertext that may wait in a connection for a peer that does not read.
const UNSENT_MAX: usize = 32 * 1024;

impl Raw {
    pub(crate) fn new(early: BytesMut, tcp: TcpStream) -> Self {
        let tcp = Arc::new(tcp);
        Self { early, tcp }
    }
}

impl Tls {
    /// After the handshake.
    pub(crate) fn new(mut stream: TlsStream<Raw>) -> Self {
        let tcp = Arc::clone(&stream.get_ref().0.tcp);
        match &mut stream {
            TlsStream::Client(stream) => {
                stream.get_mut().1.set_buffer_limit(Some(UNSENT_MAX));
            }
            TlsStream::Server(stream) => {
                stream.get_mut().1.set_buffer_limit(Some(UNSENT_MAX));
            }
        }
        Self { stream, tcp }
    }
}

impl Socket {
    pub(crate) fn into_split(self) -> (SocketReader, SocketWriter) {
        match self {
            Self::Tcp(tcp) => {
                let (rx, tx) = tcp.into_split();
                (SocketReader::Tcp(rx), SocketWriter::Tcp(tx))
            }
            Self::Tls(tls) => {
                let Tls { stream, tcp } = *tls;
                let (rx, tx) = tokio::io::split(stream);
                (SocketReader::Tls(rx, tcp), SocketWriter::Tls(tx))
            }
        }
    }

    /// Two halves that were one; `None` for others.
    pub(crate) fn reunite(rx: SocketReader, tx: SocketWriter) -> Option<Self> {
        match (rx, tx) {
            (SocketReader::Tcp(rx), SocketWriter::Tcp(tx)) => Some(Self::Tcp(rx.reunite(tx).ok()?)),
            (SocketReader::Tls(rx, tcp), SocketWriter::Tls(tx)) if rx.is_pair_of(&tx) => {
                let stream = rx.unsplit(tx);
                Some(Self::Tls(Box::new(Tls { stream, tcp })))
            }
            (SocketReader::Tcp(_) | SocketReader::Tls(..), _) => None,
        }
    }

    /// Makes its end a reset.
    pub(crate) fn reset_on_close(&self) {
        match self {
            Self::Tcp(tcp) => crate::upstream::reset_on_close(tcp),
            Self::Tls(tls) => crate::upstream::reset_on_close(&tls.tcp),
        }
    }
}

impl SocketReader {
    /// Waits for bytes and appends at most [`READ`]; 0 is the end. Cancel safe, and an idle connection owns no buffer.
    pub(crate) async fn fill(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::Tcp(rx) => loop {
                rx.readable().await?;
                buf.reserve(READ);
                match rx.try_read_buf(&mut (&mut *buf).limit(READ)) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                }
            },
            Self::Tls(rx, _) => {
                std::future::poll_fn(|cx| {
                    buf.reserve(READ);
                    let read = pin!(rx.read_buf(&mut (&mut *buf).limit(READ))).poll(cx);
                    if read.is_pending() && buf.is_empty() {
                        *buf = BytesMut::new();
                    }
                    read
                })
                .await
            }
        }
    }

    /// Whether nothing came, and no end.
    pub(crate) fn is_idle(&mut self) -> bool {
        match self {
            Self::Tcp(rx) => {
                let read = rx.try_read(&mut [0]);
                matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
            }
            Self::Tls(rx, _) => {
                let mut cx = Context::from_waker(futures::task::noop_waker_ref());
                let read = Pin::new(rx).poll_read(&mut cx, &mut ReadBuf::new(&mut [0]));
                read.is_pending()
            }
        }
    }

    /// Resolves when an idle connection may have ended or said something; what it said is lost. Cancel safe.
    pub(crate) async fn stirred(&mut self) {
        loop {
            let Self::Tcp(rx) = self else {
                return drop(self.fill(&mut BytesMut::new()).await);
            };
            // The kernel may speak of bytes that were read long ago.
            if rx.readable().await.is_err() {
                return;
            }
            if !self.is_idle() {
                return;
            }
        }
    }

    /// Makes its end a reset.
    pub(crate) fn reset_on_close(&self) {
        match self {
            Self::Tcp(rx) => crate::upstream::reset_on_close(rx.as_ref()),
            Self::Tls(_, tcp) => crate::upstream::reset_on_close(tcp),
        }
    }
}

impl SocketWriter {
    pub(crate) async fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(tx) => tx.write_all(data).await,
            Self::Tls(tx) => {
                tx.write_all(data).await?;
                // rustls keeps what the kernel did not take.
                tx.flush().await
            }
        }
    }

    /// Ends this direction in good order.
    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(tx) => tx.shutdown().await,
            Self::Tls(tx) => tx.shutdown().await,
        }
    }

    /// Drops it without a FIN, which would come before a reset.
    pub(crate) fn forget(self) {
        match self {
            Self::Tcp(tx) => tx.forget(),
            Self::Tls(_) => {}
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(&mut tls.stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(&mut tls.stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Self::Tls(tls) => Pin::new(&mut tls.stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(tcp) => tcp.is_write_vectored(),
            Self::Tls(tls) => tls.stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(&mut tls.stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(&mut tls.stream).poll_shutdown(cx),
        }
    }
}

/// Reads from what was read already, at most so much; false when nothing of it is left. The last of it gives its buffer
/// back.
pub(crate) fn take_early(early: &mut BytesMut, buf: &mut ReadBuf<'_>, most: usize) -> bool {
    if early.is_empty() {
        return false;
    }
    let size = early.len().min(buf.remaining()).min(most);
    buf.put_slice(&early[..size]);
    early.advance(size);
    if early.is_empty() {
        *early = BytesMut::new();
    }
    true
}

impl AsyncRead for Raw {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if take_early(&mut self.early, buf, usize::MAX) {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.tcp.poll_read_ready(cx))?;
            match self.tcp.try_read_buf(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }
}

impl AsyncWrite for Raw {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.tcp.poll_write_ready(cx))?;
            match self.tcp.try_write(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(shutdown(&*self.tcp, Shutdown::Write)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn early_bytes_come_in_order_and_leave_no_buffer() {
        let mut early = BytesMut::with_capacity(16 * 1024);
        early.extend_from_slice(b"question");
        let (mut read, mut room) = (Vec::new(), [0; 3]);
        loop {
            let mut buf = ReadBuf::new(&mut room);
            if !take_early(&mut early, &mut buf, 2) {
                break;
            }
            assert!(buf.filled().len() <= 2);
            read.extend_from_slice(buf.filled());
        }
        assert_eq!((&read[..], early.capacity()), (&b"question"[..], 0));
    }
}
