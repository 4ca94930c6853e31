//! Reading a few frames at a time.
//!
//! h2 reads as long as there is something to read, and keeps each DATA frame by itself until its stream's task takes it; what
//! it has kept them in stays as large as it ever was. A client can put thousands of frames of one byte into one segment. So
//! after some frames there is nothing to read for a moment: first the streams take what came.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use crate::socket::take_early;

/// Frames after which the streams come first.
const FRAMES: usize = 64;

/// Bytes read at a time beyond the frame that is being read: they may be as many frames as fit.
const BLIND: usize = 1024;

/// How much can come at once, in frames with a byte each.
pub(super) const FRAMES_AT_ONCE: usize = FRAMES + BLIND / (HEADER + 1);

/// RFC 9113 §4.1.
const HEADER: usize = 9;

/// What a client says first (RFC 9113 §3.4), in bytes.
const PREFACE: usize = 24;

/// A connection whose frames come a few at a time.
#[derive(Debug)]
pub(super) struct Paced<IO> {
    io: IO,
    /// Read already.
    early: BytesMut,
    frames: Frames,
    /// Frames that have begun since the streams came first.
    begun: usize,
}

/// Where frames begin and end.
#[derive(Debug, Default)]
struct Frames {
    /// Bytes of this frame's payload that are still to come.
    rest: usize,
    /// Of the next frame's header, how many have come.
    header: usize,
    /// As far as that says.
    length: usize,
}

impl<IO> Paced<IO> {
    /// Of who serves: `early` was read from it, and frames begin after the preface.
    pub(super) fn from_client(io: IO, early: BytesMut) -> Self {
        let rest = PREFACE;
        let frames = Frames {
            rest,
            ..Frames::default()
        };
        Self {
            io,
            early,
            frames,
            begun: 0,
        }
    }

    /// Of who asks: frames are all that comes.
    pub(super) fn from_server(io: IO) -> Self {
        Self {
            io,
            early: BytesMut::new(),
            frames: Frames::default(),
            begun: 0,
        }
    }
}

impl Frames {
    /// How many frames begin in what comes next.
    fn pass(&mut self, mut bytes: &[u8]) -> usize {
        let mut begun = 0;
        loop {
            let skipped = self.rest.min(bytes.len());
            self.rest -= skipped;
            bytes = &bytes[skipped..];
            let Some((first, others)) = bytes.split_first() else {
                return begun;
            };
            bytes = others;
            if self.header < 3 {
                self.length = self.length << 8 | usize::from(*first);
            }
            self.header += 1;
            if self.header == HEADER {
                begun += 1;
                *self = Self {
                    rest: self.length,
                    ..Self::default()
                };
            }
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Paced<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.begun >= FRAMES {
            this.begun = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let most = this.frames.rest + BLIND;
        if !take_early(&mut this.early, buf, most) {
            ready!(Pin::new(&mut (&mut this.io).take(most as u64)).poll_read(cx, buf))?;
        }
        this.begun += this.frames.pass(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Paced<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
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
    use super::*;

    #[test]
    fn frames_are_counted_wherever_the_bytes_are_cut() {
        let mut bytes = vec![b'P'; PREFACE];
        for length in [0, 1, 8, 300, 70_000, 0] {
            let size: u32 = length;
            bytes.extend_from_slice(&size.to_be_bytes()[1..]);
            bytes.extend([0; 6]);
            // Would be the beginning of a long frame.
            bytes.extend(vec![0xff; length as usize]);
        }
        for size in [1, 2, 7, 9, 10, 1024, bytes.len()] {
            let mut frames = Paced::from_client((), BytesMut::new()).frames;
            let begun: usize = bytes.chunks(size).map(|chunk| frames.pass(chunk)).sum();
            assert_eq!((begun, frames.rest, frames.header), (6, 0, 0), "by {size}");
        }
    }
}
