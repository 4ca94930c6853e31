//! Reads a carrier in large pieces for a reader that asks for small ones.
//!
//! rustls asks for 4 KiB at a time, which is more than four system calls for each full record. It knows nothing of what
//! it reads.

use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// A byte stream read in large pieces; writing passes through. A stream that has nothing to read owns no buffer.
#[derive(Debug)]
pub struct ReadAhead<IO> {
    io: IO,
    unread: BytesMut,
}

/// Bytes asked for in one read: four full TLS records.
const PIECE: usize = 64 * 1024;

impl<IO> ReadAhead<IO> {
    /// Takes over a stream.
    pub fn new(io: IO) -> Self {
        Self {
            io,
            unread: BytesMut::new(),
        }
    }
}

impl<IO: AsyncRead + Unpin> ReadAhead<IO> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.unread.reserve(PIECE);
        // This future holds nothing between polls.
        let filled = pin!(self.io.read_buf(&mut self.unread)).poll(cx);
        if self.unread.is_empty() {
            self.unread = BytesMut::new();
        }
        filled
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadAhead<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() && buf.remaining() > 0 {
            ready!(self.poll_fill(cx))?;
        }
        let size = self.unread.len().min(buf.remaining());
        buf.put_slice(&self.unread[..size]);
        self.unread.advance(size);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for ReadAhead<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn every_byte_arrives_in_order_and_then_the_end() {
        let (mut near, far) = duplex(100_000);
        let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            near.write_all(&sent).await.unwrap();
            near.shutdown().await.unwrap();
        });
        let mut far = ReadAhead::new(far);
        let mut received = Vec::new();
        let mut piece = vec![0; 4096];
        loop {
            match far.read(&mut piece).await.unwrap() {
                0 => break,
                size => received.extend_from_slice(&piece[..size]),
            }
        }
        writing.await.unwrap();
        assert_eq!(received, expected);
    }

    #[tokio::test]
    async fn waiting_owns_no_buffer_and_small_reads_share_one_call() {
        let mut io = loop_back();
        io.write_all(b"hello").await.unwrap();
        let mut ahead = ReadAhead::new(io);
        assert_eq!(ahead.read_u8().await.unwrap(), b'h');
        assert_eq!(&ahead.unread[..], b"ello");
        ahead.read_exact(&mut [0; 4]).await.unwrap();
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(1), ahead.read_u8());
        waiting.await.unwrap_err();
        assert_eq!(ahead.unread.capacity(), 0);
    }

    /// A stream that gives back what was written to it.
    fn loop_back() -> tokio::io::SimplexStream {
        tokio::io::SimplexStream::new_unsplit(1024)
    }
}
