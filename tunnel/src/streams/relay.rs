//! Joins a flow with a kernel socket: FIN for FIN, RST for RST, in every order.
//!
//! Idle flows own no buffer: the socket is read when it has something, into a buffer of the thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::ops::Deref;
use std::pin::pin;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures::future::{Either, select};
use h2::Reason;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::error::FlowError;
use crate::settings::FRAME_PAYLOAD;
use crate::streams::flow::{Flow, FlowReceiver, FlowSender};
use crate::streams::socket::set_up_flow_socket;

/// What a finished relay moved and how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relayed {
    /// Bytes from the socket into the flow.
    pub sent: u64,
    /// Bytes from the flow into the socket.
    pub received: u64,
    /// How it ended.
    pub ended: Ended,
}

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A FIN in each direction.
    Finished,
    /// The socket was reset or failed; the flow was reset.
    BySocket,
    /// The flow was reset or its tunnel ended; the socket was reset.
    ByFlow,
}

/// Moves bytes both ways until both directions have ended. Dropping it resets both sides: a flow that cannot go on must
/// not look complete.
pub async fn relay(flow: Flow, tcp: TcpStream) -> Relayed {
    let tcp = ResetOnDrop::new(tcp);
    let (mut sender, mut receiver) = flow.into_split();
    let counts = Counts::default();
    let stop = {
        let up = pin!(upload_quietly(&mut sender, &tcp, &counts));
        let down = pin!(download(&mut receiver, &tcp, &counts));
        match select(up, down).await {
            Either::Left((Ok(()), down)) => down.await.err(),
            Either::Right((Ok(()), up)) => up.await.err(),
            Either::Left((Err(stop), _)) | Either::Right((Err(stop @ Stop::Flow(_)), _)) => {
                Some(stop)
            }
            Either::Right((Err(stop @ Stop::Socket), up)) => {
                // What the application sent before its reset may still wait in the kernel.
                counts.socket_broken.store(true, Relaxed);
                let _ = tokio::time::timeout(LAST_WORDS, up).await;
                Some(stop)
            }
        }
    };
    let ended = match stop {
        None => tcp.finish(),
        Some(Stop::Socket) => {
            sender.reset(Reason::CONNECT_ERROR).await;
            Ended::BySocket
        }
        Some(Stop::Flow(error)) => {
            tracing::debug!(%error, "flow reset");
            if matches!(error, FlowError::Local) {
                sender.reset(Reason::ENHANCE_YOUR_CALM).await;
            }
            Ended::ByFlow
        }
    };
    Relayed {
        sent: counts.sent.into_inner(),
        received: counts.received.into_inner(),
        ended,
    }
}

/// How long bytes that were read before a reset may wait for the peer's window.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Shared by the two directions of one task; atomics only because the task may move between threads.
#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
    /// Writing failed, which uses up the socket's error: an end of file is then the reset.
    socket_broken: AtomicBool,
}

/// Which side ended a relay early.
enum Stop {
    Socket,
    Flow(FlowError),
}

impl From<FlowError> for Stop {
    fn from(error: FlowError) -> Self {
        Self::Flow(error)
    }
}

impl From<io::Error> for Stop {
    fn from(_: io::Error) -> Self {
        Self::Socket
    }
}

/// NO_ERROR says that the peer is complete and reads no more (RFC 9113 §8.1); every other code is a reset.
async fn upload_quietly(
    sender: &mut FlowSender,
    tcp: &TcpStream,
    counts: &Counts,
) -> Result<(), Stop> {
    match upload(sender, tcp, counts).await {
        Err(Stop::Flow(FlowError::Reset(Reason::NO_ERROR))) => Ok(()),
        ended => ended,
    }
}

async fn upload(sender: &mut FlowSender, tcp: &TcpStream, counts: &Counts) -> Result<(), Stop> {
    while let Some(data) = read(sender, tcp).await? {
        let size = data.len() as u64;
        let mut sending = pin!(sender.send(data));
        tokio::select! {
            biased;
            sent = &mut sending => sent?,
            // Only while the peer takes nothing: the application may give up meanwhile.
            _ = tcp.ready(Interest::ERROR) => match tokio::time::timeout(LAST_WORDS, sending).await {
                Ok(sent) => sent?,
                Err(_) => return Err(Stop::Socket),
            },
        }
        counts.sent.fetch_add(size, Relaxed);
    }
    if counts.socket_broken.load(Relaxed) {
        return Err(Stop::Socket);
    }
    Ok(sender.finish()?)
}

/// The next bytes from the socket, or `None` after its FIN. Meanwhile a reset by the peer is noticed.
async fn read(sender: &mut FlowSender, tcp: &TcpStream) -> Result<Option<Bytes>, Stop> {
    loop {
        match read_now(tcp) {
            Ok(data) if data.is_empty() => return Ok(None),
            Ok(data) => return Ok(Some(data)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            biased;
            ready = tcp.readable() => ready?,
            error = poll_fn(|cx| sender.poll_reset(cx)) => return Err(error.into()),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// Reads at most one frame. A large read gives its buffer away, a small one is copied at its size, so that what waits
/// for a slow peer is never larger than what it holds.
fn read_now(tcp: &TcpStream) -> io::Result<Bytes> {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.clear();
        scratch.reserve(FRAME_PAYLOAD);
        let size = tcp.try_read_buf(&mut bytes::BufMut::limit(&mut *scratch, FRAME_PAYLOAD))?;
        Ok(match size >= FRAME_PAYLOAD / 2 {
            true => scratch.split().freeze(),
            false => Bytes::copy_from_slice(scratch),
        })
    })
}

/// Frames written with one system call.
const BATCH: usize = 16;

async fn download(
    receiver: &mut FlowReceiver,
    tcp: &TcpStream,
    counts: &Counts,
) -> Result<(), Stop> {
    let mut pending = Pending::default();
    loop {
        pending.gather(receiver).await?;
        if pending.frames.is_empty() {
            SockRef::from(tcp).shutdown(Shutdown::Write)?;
            return Ok(());
        }
        if !receiver.is_fresh() {
            receiver.freshen().await?;
            pending.look_for_the_end(receiver).await?;
        }
        match pending.write(tcp) {
            Ok(size) => {
                receiver.release(size);
                counts.received.fetch_add(size as u64, Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                pending.wait(receiver, tcp).await?
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Bytes taken from the flow and not yet written. While the socket is full they are what the flow "holds".
#[derive(Default)]
struct Pending {
    frames: VecDeque<Bytes>,
    finished: bool,
    /// The flow ended badly after these frames.
    failed: Option<FlowError>,
}

impl Pending {
    /// Takes what has arrived; waits while there is nothing to write.
    async fn gather(&mut self, receiver: &mut FlowReceiver) -> Result<(), Stop> {
        poll_fn(|cx| {
            while self.frames.len() < BATCH && self.take(receiver, cx) {}
            match (self.frames.is_empty(), self.finished, self.failed.take()) {
                (true, _, Some(error)) => Poll::Ready(Err(error.into())),
                (true, false, None) => Poll::Pending,
                (_, _, failed) => {
                    self.failed = failed;
                    Poll::Ready(Ok(()))
                }
            }
        })
        .await
    }

    /// Takes what is there, and fails if a reset stands behind it.
    async fn look_for_the_end(&mut self, receiver: &mut FlowReceiver) -> Result<(), Stop> {
        poll_fn(|cx| {
            while self.frames.len() < FRAMES_MAX && self.take(receiver, cx) {}
            Poll::Ready(self.failed.take().map_or(Ok(()), |error| Err(error.into())))
        })
        .await
    }

    /// Takes one frame, if there is one.
    fn take(&mut self, receiver: &mut FlowReceiver, cx: &mut std::task::Context<'_>) -> bool {
        if self.finished || self.failed.is_some() {
            return false;
        }
        match receiver.poll_data(cx) {
            Poll::Ready(Ok(Some(data))) => {
                self.frames.push_back(data);
                true
            }
            Poll::Ready(Ok(None)) => {
                self.finished = true;
                false
            }
            Poll::Ready(Err(error)) => {
                self.failed = Some(error);
                false
            }
            Poll::Pending => false,
        }
    }

    fn write(&mut self, tcp: &TcpStream) -> io::Result<usize> {
        let size = match self.frames.len() {
            1 => tcp.try_write(&self.frames[0])?,
            _ => {
                let mut slices = [IoSlice::new(&[]); BATCH];
                let count = self.frames.len().min(BATCH);
                for (slice, frame) in slices.iter_mut().zip(&self.frames) {
                    *slice = IoSlice::new(frame);
                }
                tcp.try_write_vectored(&slices[..count])?
            }
        };
        self.consume(size);
        Ok(size)
    }

    fn consume(&mut self, mut size: usize) {
        while size > 0 {
            let front = self
                .frames
                .front_mut()
                .expect("no more was written than was there");
            let now = size.min(front.len());
            front.advance(now);
            size -= now;
            if front.is_empty() {
                self.frames.pop_front();
            }
        }
        if self.frames.is_empty() && self.frames.capacity() > 4 * BATCH {
            self.frames = VecDeque::new();
        }
    }

    /// Waits until the socket takes bytes again. What arrives meanwhile is counted as held, so that the connection's
    /// window can make up for it; the stream's window bounds it.
    async fn wait(&mut self, receiver: &mut FlowReceiver, tcp: &TcpStream) -> Result<(), Stop> {
        if let Some(error) = self.failed.take() {
            return Err(error.into());
        }
        let hold = receiver.hold();
        let evicted = poll_fn(|cx| {
            while self.frames.len() < FRAMES_MAX && self.take(receiver, cx) {}
            match self.failed.take() {
                Some(error) => Poll::Ready(error),
                None => hold
                    .poll_update(cx, receiver.held())
                    .map(|()| FlowError::Local),
            }
        });
        tokio::select! {
            biased;
            ready = tcp.writable() => Ok(ready?),
            error = evicted => Err(error.into()),
        }
    }
}

/// Frames kept beside the stream's window in bytes; with frames this small the rest waits inside h2.
const FRAMES_MAX: usize = 1024;

/// A socket that is reset unless both directions have ended.
struct ResetOnDrop {
    tcp: TcpStream,
    armed: bool,
}

impl ResetOnDrop {
    fn new(tcp: TcpStream) -> Self {
        set_up_flow_socket(&tcp);
        Self { tcp, armed: true }
    }

    fn finish(mut self) -> Ended {
        self.armed = false;
        Ended::Finished
    }
}

impl Deref for ResetOnDrop {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.tcp
    }
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if self.armed {
            // Fails only on a socket that is already gone.
            let _ = self.tcp.set_zero_linger();
        }
    }
}
