//! One TCP flow on one HTTP/2 stream: END_STREAM is FIN, RST_STREAM is RST.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

use crate::error::{FlowError, TunnelError};
use crate::flow_control::{Frame, Hold, Lane};
use crate::link::Link;
use crate::meter::OpenFlow;
use crate::settings::FRAME_PAYLOAD;
use crate::streams::DatagramFlow;
use crate::streams::backlog::Backlog;

/// Both directions of one TCP flow. Dropping it before both directions have ended resets it.
pub struct Flow {
    pub(crate) sender: FlowSender,
    pub(crate) receiver: FlowReceiver,
}

/// The sending direction.
pub struct FlowSender {
    stream: SendStream<Frame>,
    lane: Lane,
    link: Arc<Link>,
    _open: OpenFlow,
}

/// The receiving direction. Keep it until it has ended: after both halves of an unfinished flow are dropped the peer
/// sees a reset.
pub struct FlowReceiver {
    stream: RecvStream,
    link: Arc<Link>,
    /// Taken from h2 before anybody asked; their credit is still held.
    early: VecDeque<Bytes>,
    /// How the flow ended after them, if badly.
    failed: Option<FlowError>,
    /// Of a flow that the other side may give up while this end is away.
    backlog: Option<Backlog>,
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flow").finish_non_exhaustive()
    }
}

impl Flow {
    pub(crate) fn new(stream: SendStream<Frame>, body: RecvStream, link: Arc<Link>) -> Self {
        let sender = FlowSender::new(stream, Arc::clone(&link));
        Self::from_parts(sender, FlowReceiver::new(body, link))
    }

    pub(crate) fn from_parts(sender: FlowSender, receiver: FlowReceiver) -> Self {
        Self { sender, receiver }
    }

    /// Sends bytes; returns when all were handed to the connection. Not cancel safe: a dropped call may have sent a
    /// part.
    pub async fn send(&mut self, data: Bytes) -> Result<(), FlowError> {
        self.sender.send(data).await
    }

    /// The next bytes, or `None` after the peer's FIN. Cancel safe.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, FlowError> {
        self.receiver.recv().await
    }

    /// Sends FIN; receiving goes on.
    pub fn finish(&mut self) -> Result<(), FlowError> {
        self.sender.finish()
    }

    /// Ends both directions with a reset, once what was sent has left.
    pub async fn reset(self) {
        self.sender.reset(Reason::CONNECT_ERROR).await;
    }

    /// The same flow for datagrams, before anything was sent on it: each is a capsule (RFC 9297 §3.2), and the manager between the
    /// two ends passes them on as bytes.
    pub fn into_datagrams(self) -> DatagramFlow {
        DatagramFlow::of(self)
    }

    /// The two directions, for two tasks.
    pub fn into_split(self) -> (FlowSender, FlowReceiver) {
        (self.sender, self.receiver)
    }
}

impl FlowSender {
    pub(crate) fn new(stream: SendStream<Frame>, link: Arc<Link>) -> Self {
        let (lane, open) = link.open_flow();
        Self {
            stream,
            lane,
            link,
            _open: open,
        }
    }

    /// What sends datagrams, which take no turns.
    pub(crate) fn into_datagrams(self) -> (SendStream<Frame>, Arc<Link>, OpenFlow) {
        (self.stream, self.link, self._open)
    }

    /// As [`Flow::send`].
    pub async fn send(&mut self, data: Bytes) -> Result<(), FlowError> {
        self.send_all(data, false).await
    }

    /// Sends bytes with END_STREAM on the last frame.
    pub(crate) async fn send_last(&mut self, data: Bytes) -> Result<(), FlowError> {
        match data.is_empty() {
            true => self.finish(),
            false => self.send_all(data, true).await,
        }
    }

    async fn send_all(&mut self, mut data: Bytes, last: bool) -> Result<(), FlowError> {
        let waiting = CancelTurn(self);
        while !data.is_empty() {
            poll_fn(|cx| waiting.0.poll_send(cx, &mut data, last)).await?;
        }
        Ok(())
    }

    /// As [`Flow::finish`].
    pub fn finish(&mut self) -> Result<(), FlowError> {
        self.stream.reserve_capacity(0);
        self.stream
            .send_data(Frame::empty(), true)
            .map_err(|error| self.cause(error))
    }

    /// Sends one frame from the front of `data`, once the windows have room for it and it is this flow's turn. The
    /// windows come first: a flow that may not send must never hold a turn.
    pub(crate) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<(), FlowError>> {
        let wanted = data.len().min(FRAME_PAYLOAD);
        self.wake_nobody()?;
        loop {
            self.stream.reserve_capacity(wanted);
            if self.stream.capacity() == 0 {
                match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(_)) => continue,
                    Some(Err(error)) => return Poll::Ready(Err(self.cause(error))),
                    None => return Poll::Ready(Err(self.ended())),
                }
            }
            let Poll::Ready(slot) = self.lane.poll_turn(cx, wanted) else {
                return self.poll_reset(cx).map(Err);
            };
            // The window may have shrunk while this flow waited.
            let size = wanted.min(self.stream.capacity());
            if size == 0 {
                continue;
            }
            let end = last && size == data.len();
            let frame = Frame::in_slot(data.split_to(size), slot);
            self.link.meter.add_sent(size);
            return Poll::Ready(
                self.stream
                    .send_data(frame, end)
                    .map_err(|error| self.cause(error)),
            );
        }
    }

    /// Whoever waited for a reset is here now. h2 would wake that task for the window that it is about to reserve, and tokio
    /// another thread to run it: a futex call for every frame of a quiet connection.
    fn wake_nobody(&mut self) -> Result<(), FlowError> {
        let mut nobody = Context::from_waker(futures::task::noop_waker_ref());
        match self.poll_reset(&mut nobody) {
            Poll::Ready(error) => Err(error),
            Poll::Pending => Ok(()),
        }
    }

    /// Gives back window that was reserved and not used.
    pub(crate) fn unreserve(&mut self) {
        self.stream.reserve_capacity(0);
    }

    /// Waits until the peer has reset the flow or the connection has ended. Cancel safe.
    pub(crate) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<FlowError> {
        self.stream
            .poll_reset(cx)
            .map(|reason| reason.map_or_else(FlowError::from, FlowError::Reset))
    }

    /// Resets the flow after the frames handed over were written: h2 would drop them.
    pub(crate) async fn reset(mut self, reason: Reason) {
        poll_fn(|cx| match self.stream.poll_reset(cx) {
            Poll::Ready(_) => Poll::Ready(()),
            Poll::Pending => self.lane.poll_written(cx),
        })
        .await;
        self.stream.send_reset(reason);
    }

    /// h2 reports a use of an ended stream as a user error; the cause is what ended it.
    fn cause(&mut self, error: h2::Error) -> FlowError {
        match error.is_reset() || error.is_io() || error.is_go_away() {
            true => error.into(),
            false => self.ended(),
        }
    }

    fn ended(&mut self) -> FlowError {
        let mut cx = Context::from_waker(futures::task::noop_waker_ref());
        match self.poll_reset(&mut cx) {
            Poll::Ready(error) => error,
            Poll::Pending => FlowError::Tunnel(TunnelError::Closed),
        }
    }
}

impl fmt::Debug for FlowSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowSender").finish_non_exhaustive()
    }
}

impl fmt::Debug for FlowReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowReceiver").finish_non_exhaustive()
    }
}

/// A reset with NO_ERROR comes after everything was sent (RFC 9113 §8.1).
fn is_complete(error: &h2::Error) -> bool {
    error.is_reset() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR)
}

/// A turn granted to nobody would stop the whole connection.
struct CancelTurn<'a>(&'a mut FlowSender);

impl Drop for CancelTurn<'_> {
    fn drop(&mut self) {
        self.0.lane.cancel();
        self.0.stream.reserve_capacity(0);
    }
}

/// Frames kept beside the stream's window in bytes; with frames this small the rest waits inside h2.
const STALLED_FRAMES_MAX: usize = 1024;

impl FlowReceiver {
    pub(crate) fn new(stream: RecvStream, link: Arc<Link>) -> Self {
        Self {
            stream,
            link,
            early: VecDeque::new(),
            failed: None,
            backlog: None,
        }
    }

    /// What comes may have waited for this end.
    pub(crate) fn may_wait(&mut self, backlog: Backlog) {
        self.backlog = Some(backlog);
    }

    /// Whether nothing that has come can have been given up meanwhile.
    pub(crate) fn is_fresh(&self) -> bool {
        self.backlog.as_ref().is_none_or(Backlog::is_read)
    }

    /// Waits until the flow's end is known if it has one, whatever came before it. Cancel safe.
    pub(crate) async fn freshen(&mut self) -> Result<(), FlowError> {
        match &mut self.backlog {
            Some(backlog) => backlog.read().await,
            None => Ok(()),
        }
    }

    /// Bytes taken by [`Self::poll_data`] that are to come again.
    pub(crate) fn put_back(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.early.push_front(data);
        }
    }

    /// As [`Flow::recv`].
    pub async fn recv(&mut self) -> Result<Option<Bytes>, FlowError> {
        let data = poll_fn(|cx| self.poll_data(cx)).await?;
        if let Some(data) = &data {
            self.release(data.len());
        }
        Ok(data)
    }

    /// The next bytes, whose credit [`Self::release`] returns.
    pub(crate) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, FlowError>> {
        if let Some(data) = self.early.pop_front() {
            return Poll::Ready(Ok(Some(data)));
        }
        match self.failed.take() {
            Some(error) => Poll::Ready(Err(error)),
            None => self.poll_fresh(cx),
        }
    }

    /// The next bytes from h2. After the end it is the end again.
    fn poll_fresh(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, FlowError>> {
        loop {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    self.link.meter.add_received(data.len());
                    return Poll::Ready(Ok(Some(data)));
                }
                Some(Err(error)) if is_complete(&error) => return Poll::Ready(Ok(None)),
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                None => return Poll::Ready(Ok(None)),
            }
        }
    }

    /// Returns the credit for consumed bytes to the stream and the connection.
    pub(crate) fn release(&mut self, bytes: usize) {
        // Fails only when more is released than was received, or after the stream's end, when nothing needs it.
        let _ = self.stream.flow_control().release_capacity(bytes);
    }

    /// To be polled while whatever the bytes go to takes none: what arrives meanwhile counts as held, so that the
    /// connection's window can make up for it. Resolves when the flow ended badly or had to go because it was the slowest.
    /// Cancel safe: nothing is lost.
    pub async fn stalled(&mut self) -> FlowError {
        let hold = self.hold();
        poll_fn(|cx| {
            while self.early.len() < STALLED_FRAMES_MAX {
                match self.poll_fresh(cx) {
                    Poll::Ready(Ok(Some(data))) => self.early.push_back(data),
                    Poll::Ready(Err(error)) => {
                        self.failed = Some(error.clone());
                        return Poll::Ready(error);
                    }
                    Poll::Ready(Ok(None)) | Poll::Pending => break,
                }
            }
            hold.poll_update(cx, self.held()).map(|()| FlowError::Local)
        })
        .await
    }

    /// Bytes received and not released.
    pub(crate) fn held(&mut self) -> usize {
        self.stream.flow_control().used_capacity()
    }

    /// The flow has fallen behind.
    pub(crate) fn hold(&self) -> Hold {
        self.link.holds.begin()
    }
}
