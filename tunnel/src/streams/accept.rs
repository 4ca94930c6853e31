//! Inbound flows: what arrives in the cluster and belongs to the workstation.
//!
//! HTTP/2 lets only the client open streams, so the client posts some that wait (`POST /accept`). The serving side
//! answers one of them when it has a flow:
//!
//! ```text
//! client                                            serving side
//!   HEADERS  POST /accept                      ──►    kept in a pool
//!                                              ◄──    HEADERS 200, tp-intercept: ID, tp-peer: IP:PORT   (OPEN)
//!   DATA 01                                    ──►    the local connection is up                        (OPENED)
//!   DATA …                                     ◄─►    DATA …                the flow, as after a CONNECT
//! ```
//!
//! Not a byte of the flow is sent before OPENED, so a flow that is refused (RST_STREAM, REFUSED_STREAM) or not answered in
//! time (RST_STREAM by the serving side, CANCEL) has been seen by nobody and may go elsewhere. The id says which
//! intercept it is; the client decides what it dials for it, never the cluster.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;
use std::time::Duration;

use bytes::{Buf, Bytes};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Response};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use crate::client::Tunnel;
use crate::error::{FlowError, OpenError};
use crate::flow_control::Frame;
use crate::link::Link;
use crate::streams::backlog::Backlog;
use crate::streams::{Flow, FlowReceiver, FlowSender};

/// Path of the posted streams.
pub(crate) const ACCEPT_PATH: &str = "/accept";

const INTERCEPT: HeaderName = HeaderName::from_static("tp-intercept");
const PEER: HeaderName = HeaderName::from_static("tp-peer");

/// First byte of the request's body: the local connection is up.
const OPENED: u8 = 1;

/// How long an offer waits for a posted stream and for OPENED, both together.
pub const OPENED_TIMEOUT: Duration = Duration::from_secs(1);

/// Streams that one connection may have posted and unanswered; with one more the oldest is given back.
pub const POSTED_MAX: usize = 256;

/// A flow that the cluster offers. Dropping it refuses it.
pub struct Incoming {
    intercept: String,
    peer: SocketAddr,
    sender: FlowSender,
    receiver: FlowReceiver,
    tunnel: Tunnel,
}

/// Why an offered flow was not taken. Nothing of it was sent.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotOpened {
    /// The client refused it: nothing listens there, say.
    #[error("the workstation refused the connection")]
    Refused,
    /// No OPENED in time, or no posted stream to offer it on.
    #[error("the workstation did not answer within {OPENED_TIMEOUT:?}")]
    TimedOut,
    /// The connection has ended, or takes nothing new.
    #[error("the workstation is not connected")]
    Closed,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("intercept", &self.intercept)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Incoming {
    /// Reads the answer to a posted stream.
    pub(crate) fn new(
        head: &HeaderMap,
        body: RecvStream,
        stream: SendStream<Frame>,
        tunnel: Tunnel,
    ) -> Result<Self, OpenError> {
        let text = |name: HeaderName| head.get(name).and_then(|value| value.to_str().ok());
        let peer = text(PEER).and_then(|peer| peer.parse().ok());
        let (Some(intercept), Some(peer)) = (text(INTERCEPT), peer) else {
            return Err(OpenError::Answer("an offer without its headers".into()));
        };
        Ok(Self {
            intercept: intercept.to_owned(),
            peer,
            sender: FlowSender::new(stream, Arc::clone(tunnel.link())),
            receiver: FlowReceiver::new(body, Arc::clone(tunnel.link())),
            tunnel,
        })
    }

    /// The intercept it belongs to.
    pub fn intercept(&self) -> &str {
        &self.intercept
    }

    /// Who connected, in the cluster.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Takes it: the local connection is up. Fails when the serving side gave up meanwhile; then nothing was delivered.
    ///
    /// A [`relay`](crate::relay) of the flow delivers nothing that the serving side has given up, although it was sent and
    /// waited for this end to be heard of again.
    pub async fn opened(mut self) -> Result<Flow, FlowError> {
        self.receiver.may_wait(Backlog::new(self.tunnel));
        self.sender.send(Bytes::from_static(&[OPENED])).await?;
        Ok(Flow::from_parts(self.sender, self.receiver))
    }

    /// Refuses it, so that it goes elsewhere.
    pub async fn refuse(self) {
        self.sender.reset(Reason::REFUSED_STREAM).await;
    }

    /// Resolves when the serving side gives up, which a slow dial need not outlive. Cancel safe.
    pub async fn cancelled(&mut self) {
        poll_fn(|cx| self.sender.poll_reset(cx)).await;
    }
}

/// The serving side's pool of one connection's posted streams. Clones share it.
#[derive(Clone)]
pub struct Workstation {
    pool: Arc<Pool>,
}

/// Streams that wait for a flow, the longest waiting first.
pub(crate) struct Pool {
    link: Arc<Link>,
    posted: Mutex<Posted>,
    changed: Notify,
}

#[derive(Default)]
struct Posted {
    streams: VecDeque<PostedStream>,
    closed: bool,
}

struct PostedStream {
    respond: SendResponse<Frame>,
    body: RecvStream,
}

impl fmt::Debug for Workstation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workstation")
            .field("posted", &self.pool.lock().streams.len())
            .finish()
    }
}

impl Workstation {
    pub(crate) fn new(link: Arc<Link>) -> Self {
        let pool = Arc::new(Pool {
            link,
            posted: Mutex::default(),
            changed: Notify::new(),
        });
        Self { pool }
    }

    /// Offers a flow and waits until it was taken, at most [`OPENED_TIMEOUT`]. `intercept` is visible ASCII.
    ///
    /// Dropping the future takes the offer back; the client may have said OPENED already and sees a reset.
    pub async fn open(&self, intercept: &str, peer: SocketAddr) -> Result<Flow, NotOpened> {
        let deadline = Instant::now() + OPENED_TIMEOUT;
        let offered = async {
            let posted = self.pool.take().await?;
            posted.offer(intercept, peer, &self.pool.link).await
        };
        timeout_at(deadline, offered)
            .await
            .unwrap_or(Err(NotOpened::TimedOut))
    }

    /// Makes sure that silence of the peer is noticed within [`crate::Settings::attentive_ping_interval`] and
    /// [`crate::Settings::silence`], for as long as the result lives. Taken before a flow is offered.
    pub fn attend(&self) -> Attention {
        let meter = &self.pool.link.meter;
        Attention {
            silent: meter.silence(),
            _attention: meter.attend(),
        }
    }

    /// Whether the peer has been silent; then an offer would only cost its time.
    pub fn is_silent(&self) -> bool {
        self.pool.link.meter.is_silent()
    }

    /// Whether the connection under it takes nothing new.
    pub fn is_closed(&self) -> bool {
        self.pool.lock().closed
    }

    pub(crate) fn post(&self, respond: SendResponse<Frame>, body: RecvStream) {
        let oldest = {
            let mut posted = self.pool.lock();
            if posted.closed {
                return;
            }
            posted.streams.push_back(PostedStream { respond, body });
            match posted.streams.len() > POSTED_MAX {
                true => posted.streams.pop_front(),
                false => None,
            }
        };
        // Outside of the lock: h2 has its own.
        drop(oldest);
        self.pool.changed.notify_one();
    }

    /// Gives every waiting stream back and takes no more.
    pub(crate) fn close(&self) {
        let streams = {
            let mut posted = self.pool.lock();
            posted.closed = true;
            std::mem::take(&mut posted.streams)
        };
        drop(streams);
        self.pool.changed.notify_waiters();
    }
}

/// What [`Workstation::attend`] gives.
pub struct Attention {
    silent: watch::Receiver<bool>,
    _attention: crate::meter::Attention,
}

impl fmt::Debug for Attention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attention")
            .field("silent", &*self.silent.borrow())
            .finish()
    }
}

impl Attention {
    /// Waits until the peer is silent. Cancel safe.
    pub async fn silent(&mut self) {
        // The connection has ended, and its flows have heard that.
        if self.silent.wait_for(|silent| *silent).await.is_err() {
            std::future::pending().await
        }
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Posted> {
        self.posted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self) -> Result<PostedStream, NotOpened> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            loop {
                let (next, closed, more) = {
                    let mut posted = self.lock();
                    let next = posted.streams.pop_front();
                    (next, posted.closed, !posted.streams.is_empty())
                };
                if closed {
                    return Err(NotOpened::Closed);
                }
                let Some(mut stream) = next else { break };
                if !stream.is_gone() {
                    // One notification may have stood for several streams.
                    if more {
                        self.changed.notify_one();
                    }
                    return Ok(stream);
                }
            }
            changed.await;
        }
    }
}

impl PostedStream {
    /// Whether the client took it back or is gone.
    fn is_gone(&mut self) -> bool {
        let mut cx = Context::from_waker(futures::task::noop_waker_ref());
        self.respond.poll_reset(&mut cx).is_ready()
    }

    async fn offer(
        mut self,
        intercept: &str,
        peer: SocketAddr,
        link: &Arc<Link>,
    ) -> Result<Flow, NotOpened> {
        let mut open = Response::new(());
        let id = HeaderValue::from_str(intercept).map_err(|_| NotOpened::Refused)?;
        let peer = HeaderValue::from_str(&peer.to_string()).expect("an address is visible ASCII");
        open.headers_mut().insert(INTERCEPT, id);
        open.headers_mut().insert(PEER, peer);
        let stream = self
            .respond
            .send_response(open, false)
            .map_err(|_| NotOpened::Closed)?;
        let sender = FlowSender::new(stream, Arc::clone(link));
        let mut receiver = FlowReceiver::new(self.body, Arc::clone(link));
        let mut first = match poll_fn(|cx| receiver.poll_data(cx)).await {
            Ok(Some(first)) => first,
            Ok(None) | Err(FlowError::Reset(_)) => return Err(NotOpened::Refused),
            Err(FlowError::Tunnel(_) | FlowError::Local | FlowError::Framing) => {
                return Err(NotOpened::Closed);
            }
        };
        if first.get_u8() != OPENED {
            return Err(NotOpened::Refused);
        }
        receiver.release(1);
        receiver.put_back(first);
        Ok(Flow::from_parts(sender, receiver))
    }
}

/// Moves bytes between two flows until both directions have ended, FIN for FIN and reset for reset: the manager's part
/// between an agent and a workstation. Dropping it resets both.
///
/// A slow end closes the other's window; what it holds counts as in any flow.
pub async fn join(a: Flow, b: Flow) {
    let ((mut a_tx, mut a_rx), (mut b_tx, mut b_rx)) = (a.into_split(), b.into_split());
    let ended = {
        let there = pump(&mut a_rx, &mut b_tx);
        let back = pump(&mut b_rx, &mut a_tx);
        tokio::try_join!(there, back)
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "joined flow reset");
        tokio::join!(
            a_tx.reset(Reason::CONNECT_ERROR),
            b_tx.reset(Reason::CONNECT_ERROR)
        );
    }
}

async fn pump(from: &mut FlowReceiver, to: &mut FlowSender) -> Result<(), FlowError> {
    loop {
        let next = tokio::select! {
            biased;
            next = from.recv() => next?,
            error = poll_fn(|cx| to.poll_reset(cx)) => {
                // With NO_ERROR the peer is complete and reads no more (RFC 9113 §8.1).
                return match matches!(error, FlowError::Reset(Reason::NO_ERROR)) {
                    true => Ok(()),
                    false => Err(error),
                };
            }
        };
        match next {
            Some(data) => tokio::select! {
                biased;
                sent = to.send(data) => sent?,
                error = from.stalled() => return Err(error),
            },
            None => return to.finish(),
        }
    }
}
