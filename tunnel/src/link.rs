//! What both ends of a connection have in common: its settings in h2's terms, its shared state, its byte counter.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::flow_control::{Holds, Lane, Turns, connection_window};
use crate::meter::{Meter, OpenFlow};
use crate::settings::{
    DATA_FRAME_BUDGET, FRAME_MAX, HEADER_BLOCK_MAX, RESETS_MAX, Settings, UNSEEN_RESETS_MAX,
};

/// Shared by the flows of one connection and its driver.
pub(crate) struct Link {
    pub(crate) turns: Arc<Turns>,
    pub(crate) holds: Arc<Holds>,
    pub(crate) meter: Arc<Meter>,
    pub(crate) settings: Settings,
}

impl Link {
    pub(crate) fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            turns: Turns::new(),
            holds: Holds::new(settings.held_max),
            meter: Arc::new(Meter::new(&settings)),
            settings,
        })
    }

    /// A place in the scheduler and in the count of open flows.
    pub(crate) fn open_flow(&self) -> (Lane, OpenFlow) {
        (self.turns.open(), self.meter.open_flow())
    }
}

/// `h2::client::Builder` and `h2::server::Builder` have equal methods and no common trait.
macro_rules! configure {
    ($builder:expr, $settings:expr) => {
        $builder
            .initial_window_size($settings.window_min)
            .initial_connection_window_size(connection_window($settings.window_min, 0))
            .max_frame_size(FRAME_MAX)
            .max_header_list_size(HEADER_BLOCK_MAX)
            .max_concurrent_streams($settings.streams_max)
            .max_concurrent_reset_streams(RESETS_MAX)
            .max_pending_accept_reset_streams(UNSEEN_RESETS_MAX)
            .max_local_error_reset_streams(None)
            .data_frame_budget(DATA_FRAME_BUDGET)
    };
}

pub(crate) fn client_builder(settings: &Settings) -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    configure!(builder, settings).enable_push(false);
    builder
}

pub(crate) fn server_builder(settings: &Settings) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    configure!(builder, settings).enable_connect_protocol();
    builder
}

/// The carrier under h2. Counts what it delivers, since every byte is a sign of life, and ends the driver's turn after
/// a few frames.
///
/// h2 reads for as long as there is something to read. The flows would wait meanwhile, then find megabytes that the
/// processor's cache has forgotten, and a small answer would wait with them.
pub(crate) struct Wire<IO> {
    io: IO,
    meter: Arc<Meter>,
    /// Bytes read in this turn.
    turn: usize,
}

/// Bytes read from the carrier before the flows have their turn.
const TURN: usize = 128 * 1024;

impl<IO> Wire<IO> {
    pub(crate) fn new(io: IO, link: &Link) -> Self {
        Self {
            io,
            meter: Arc::clone(&link.meter),
            turn: 0,
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Wire<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.turn >= TURN {
            self.turn = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        let heard = buf.filled().len() - before;
        self.meter.add_heard(heard);
        self.turn = match polled {
            Poll::Ready(_) => self.turn + heard,
            Poll::Pending => 0,
        };
        if heard == 0 && buf.remaining() > 0 && matches!(polled, Poll::Ready(Ok(()))) {
            self.meter.set_ended();
        }
        polled.map_err(cut)
    }
}

/// TLS names an end without a farewell by a lecture with a link; one clause says it.
fn cut(error: io::Error) -> io::Error {
    if error.kind() != io::ErrorKind::UnexpectedEof {
        return error;
    }
    io::Error::new(error.kind(), "it ended without a farewell")
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Wire<IO> {
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
    use futures::task::noop_waker_ref;

    use super::*;

    #[test]
    fn a_carrier_that_never_runs_dry_still_ends_the_turn() {
        let link = Link::new(Settings::default());
        let mut wire = Wire::new(tokio::io::repeat(7), &link);
        let mut cx = Context::from_waker(noop_waker_ref());
        let mut piece = vec![0; 32 * 1024];
        let mut turns = Vec::new();
        for _ in 0..3 {
            let mut bytes = 0;
            loop {
                let mut buf = ReadBuf::new(&mut piece);
                match Pin::new(&mut wire).poll_read(&mut cx, &mut buf) {
                    Poll::Ready(read) => read.unwrap(),
                    Poll::Pending => break,
                }
                bytes += buf.filled().len();
                assert!(bytes <= 2 * TURN, "no end");
            }
            turns.push(bytes);
        }
        assert_eq!(turns, [TURN; 3]);
    }
}
