//! A tunnel flow as a byte stream, for code that wants `AsyncRead` and `AsyncWrite`.
//!
//! Only forwarded HTTP needs it; everything else is handed to `tp_tunnel::relay`, which is cheaper.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tp_tunnel::{Flow, FlowError, FlowReceiver, FlowSender};

/// Both directions of a flow. Shutting the writer down sends FIN.
pub(super) struct FlowIo {
    reader: Reader,
    writer: Writer,
}

enum Reader {
    Receiving(BoxFuture<'static, (FlowReceiver, Result<Option<Bytes>, FlowError>)>),
    Received(FlowReceiver, Bytes),
    Ended,
}

enum Writer {
    Idle(FlowSender),
    Busy(BoxFuture<'static, (FlowSender, Result<(), FlowError>)>),
    Ended,
}

impl FlowIo {
    pub(super) fn new(flow: Flow) -> Self {
        let (sender, receiver) = flow.into_split();
        Self {
            reader: Reader::Received(receiver, Bytes::new()),
            writer: Writer::Idle(sender),
        }
    }

    /// Completes what was handed to the flow; afterwards the writer is idle or ended.
    fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Writer::Busy(sending) = &mut self.writer else {
            return Poll::Ready(Ok(()));
        };
        let (sender, sent) = ready!(sending.poll_unpin(cx));
        self.writer = Writer::Idle(sender);
        Poll::Ready(sent.map_err(io::Error::other))
    }
}

impl AsyncRead for FlowIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match std::mem::replace(&mut self.reader, Reader::Ended) {
                Reader::Ended => return Poll::Ready(Ok(())),
                Reader::Received(mut receiver, bytes) if bytes.is_empty() => {
                    let receiving = async move {
                        let received = receiver.recv().await;
                        (receiver, received)
                    };
                    self.reader = Reader::Receiving(receiving.boxed());
                }
                Reader::Received(receiver, mut bytes) => {
                    let taken = bytes.len().min(buffer.remaining());
                    buffer.put_slice(&bytes[..taken]);
                    bytes.advance(taken);
                    self.reader = Reader::Received(receiver, bytes);
                    return Poll::Ready(Ok(()));
                }
                Reader::Receiving(mut receiving) => match receiving.poll_unpin(cx) {
                    Poll::Pending => {
                        self.reader = Reader::Receiving(receiving);
                        return Poll::Pending;
                    }
                    Poll::Ready((receiver, Ok(Some(bytes)))) => {
                        self.reader = Reader::Received(receiver, bytes)
                    }
                    Poll::Ready((_, Ok(None))) => {}
                    Poll::Ready((_, Err(error))) => {
                        return Poll::Ready(Err(io::Error::other(error)));
                    }
                },
            }
        }
    }
}

impl AsyncWrite for FlowIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_written(cx))?;
        let taken = bytes.len().min(WRITE);
        let data = Bytes::copy_from_slice(&bytes[..taken]);
        match std::mem::replace(&mut self.writer, Writer::Ended) {
            Writer::Idle(mut sender) => {
                let sending = async move {
                    let sent = sender.send(data).await;
                    (sender, sent)
                };
                self.writer = Writer::Busy(sending.boxed());
            }
            other @ (Writer::Busy(_) | Writer::Ended) => {
                self.writer = other;
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
        }
        // Starts it; that it is not done yet is no news to the caller, who flushes or writes again.
        if let Poll::Ready(sent) = self.poll_written(cx) {
            sent?;
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_written(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_written(cx))?;
        match std::mem::replace(&mut self.writer, Writer::Ended) {
            Writer::Idle(mut sender) => Poll::Ready(sender.finish().map_err(io::Error::other)),
            Writer::Busy(_) | Writer::Ended => Poll::Ready(Ok(())),
        }
    }
}

/// Bytes taken at once, so that one write does not copy more than the flow moves in one turn.
const WRITE: usize = 64 * 1024;
