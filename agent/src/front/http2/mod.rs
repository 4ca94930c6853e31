//! HTTP/2 from a client, by prior knowledge or by ALPN: each stream to whom it belongs.
//!
//! A client's connection has one connection to the application and one flow to each workstation that one of its streams
//! belongs to; on them its streams are streams again, with their trailers and resets. gRPC is nothing special.

mod exchange;
mod intake;
mod message;
mod paced;
mod queued;
mod slots;
mod windows;

use std::collections::{HashMap, hash_map};
use std::future::poll_fn;
use std::sync::atomic::AtomicU16;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures::future::{self, BoxFuture};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Method, Request, StatusCode};
use tokio::sync::{mpsc, oneshot};
use tp_manager_api::matcher::graphql::{BODY_MAX, Operation};
use tp_manager_api::sighting::AnsweredBy;
use tp_tunnel::{ByteStream, Workstation};

use super::{Place, Shared, open, stopping};
use crate::book::Live;
use crate::budget::LARGE;
use crate::route::{Decision, decide};
use crate::socket::Socket;
use crate::upstream::Dialing;
use exchange::{Exchange, GONE, PIECE, answer};
use intake::Intake;
use message::to_match;
use paced::{FRAMES_AT_ONCE, Paced};
use queued::{QUEUE, Queue, Queued};
use slots::Slots;
use windows::{Backlog, Window};

/// Streams that a stranger may have open on one connection.
const STREAMS_MAX: u32 = 128;

/// Decoded bytes of a header.
const HEADER_MAX: u32 = 64 * 1024;

/// What each side of one connection may send at a time, on one stream or on all of them: what HTTP/2 begins with. In a
/// pod's network the way is short.
const WINDOW: u32 = 65_535;

/// The same for a workstation, which is far away. Taken only where the budget has room for it.
const FAR_WINDOW: u32 = 1 << 20;

/// What h2 reckons for small DATA frames that nobody has read, 256 bytes each; beyond it the connection ends. What comes is
/// taken out at once (`intake.rs`), so only streams that wait for a slot have any left after they came.
const FRAMES_BUDGET: usize = 2 * FRAMES_AT_ONCE * 256;

/// What one connection is charged: the windows that we grant to both sides, what waits to be written to them, its first
/// streams, and the connections themselves.
pub(super) const CHARGE: usize = 2 * (WINDOW as usize + QUEUE) + slots::CHARGE + 32 * 1024;

/// How long a body that a matcher asks for may take. After it the request is nobody's.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// `h2::client::Builder` and `h2::server::Builder` have equal methods and no common trait. What is not named here stays
/// at h2's own limits, which are made for strangers.
macro_rules! bounded {
    ($builder:expr, $window:expr) => {
        $builder
            .initial_window_size($window)
            .initial_connection_window_size($window)
            .max_header_list_size(HEADER_MAX)
            .max_send_buffer_size(PIECE)
            .data_frame_budget(FRAMES_BUDGET)
    };
}

/// Serves one connection to its end. `early` was read from it, `app` is a connection to the application that nobody uses yet.
pub(super) async fn serve(
    client: Socket,
    early: BytesMut,
    app: Option<Dialing>,
    place: Place,
    shared: Arc<Shared>,
) {
    let mut builder = h2::server::Builder::new();
    bounded!(builder, WINDOW).max_concurrent_streams(STREAMS_MAX);
    let io = Paced::from_client(client, early);
    let Ok(mut connection) = builder.handshake::<_, Queued>(io).await else {
        return;
    };
    let from_client = Backlog::default();
    let mut window = Window::new(WINDOW, from_client.clone(), Arc::clone(&shared));
    let mut slots = Slots::new(Arc::clone(&shared));
    let (drivers_tx, mut drivers) = mpsc::channel(DRIVERS);
    let peers = Arc::new(Peers {
        place,
        shared,
        spare: Mutex::new(app),
        open: Mutex::default(),
        drivers: drivers_tx,
        from_client,
        to_client: Queue::new(),
    });
    // All in this one task: a request crosses no thread on its way.
    let mut running: FuturesUnordered<BoxFuture<'static, Ended>> = FuturesUnordered::new();
    let mut given_up = GivenUp::default();
    let (mut stop, mut leaving) = (peers.shared.stop.clone(), false);
    loop {
        let accept = poll_fn(|cx| {
            if let Some(size) = window.fit(cx) {
                connection.set_target_window_size(size);
            }
            match slots.poll_ready(cx) {
                Poll::Ready(()) => connection.poll_accept(cx),
                Poll::Pending => connection.poll_closed(cx).map(|_| None),
            }
        });
        tokio::select! {
            // In this order: what came is taken before more comes.
            biased;
            () = stopping(&mut stop), if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
            }
            Some(ended) = running.next(), if !running.is_empty() => match ended {
                // As the client would have seen it: no new requests, and the end of the open ones.
                Ended::App => connection.graceful_shutdown(),
                Ended::Stream | Ended::Workstation => {}
                Ended::GivenUp => {
                    if given_up.one_more(Instant::now()) {
                        tracing::debug!(peer = %peers.place.peer, "too many streams reset by their client");
                        connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                    }
                }
            },
            Some(driver) = drivers.recv() => running.push(driver),
            accepted = accept => match accepted {
                Some(Ok((request, respond))) => {
                    let (peers, slot) = (Arc::clone(&peers), slots.take());
                    running.push(Box::pin(async move {
                        let _slot = slot;
                        peers.stream(request, respond).await
                    }));
                }
                Some(Err(_)) | None => break,
            },
        }
    }
}

/// Which part of a connection has ended.
#[derive(Debug)]
enum Ended {
    Stream,
    /// A stream that its client reset before the answer.
    GivenUp,
    App,
    Workstation,
}

/// Streams that their client reset, by the second: each one costs us and the application a request, and the client
/// nothing (CVE-2023-44487).
#[derive(Default)]
struct GivenUp {
    since: Option<Instant>,
    number: u32,
}

/// A client whose deadlines all pass at once is still below.
const GIVEN_UP_MAX: u32 = 2 * STREAMS_MAX;

impl GivenUp {
    /// Whether that was one too many.
    fn one_more(&mut self, now: Instant) -> bool {
        if self
            .since
            .is_none_or(|since| now.duration_since(since) > Duration::from_secs(1))
        {
            self.since = Some(now);
            self.number = 0;
        }
        self.number += 1;
        self.number > GIVEN_UP_MAX
    }
}

/// Who may answer the streams of one client's connection.
struct Peers {
    place: Place,
    shared: Arc<Shared>,
    /// The first connection to the application, not spoken on yet.
    spare: Mutex<Option<Dialing>>,
    /// By intercept; the application's has the key [`APP`].
    open: Mutex<HashMap<String, Opening>>,
    /// Connections to be opened and driven beside the streams.
    drivers: mpsc::Sender<BoxFuture<'static, Ended>>,
    /// What the client sent and nobody took yet.
    from_client: Backlog,
    /// What waits to be written to the client.
    to_client: Queue,
}

/// A connection that answers streams.
#[derive(Clone)]
struct Peer {
    requests: SendRequest<Queued>,
    /// What waits to be written to it.
    queue: Queue,
    /// What it sent and the client did not take yet.
    backlog: Backlog,
}

/// A connection that is up or coming up. Streams that want it at the same time wait for it together, and fail together.
type Opening = future::Shared<BoxFuture<'static, Option<Peer>>>;

/// No uid of an intercept is empty.
const APP: &str = "";

/// Connections that wait to be driven; who opens one more waits for a turn of the connection's task.
const DRIVERS: usize = 8;

/// Who answers a stream.
#[derive(Clone, Copy)]
enum Whose<'a> {
    App,
    Mine(&'a Live<Workstation>),
}

/// Who was to answer is not there.
struct Unreachable;

impl Whose<'_> {
    fn key(&self) -> &str {
        match self {
            Self::App => APP,
            Self::Mine(live) => &live.route.id,
        }
    }
}

impl Peers {
    async fn stream(
        &self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Queued>,
    ) -> Ended {
        let (head, body) = request.into_parts();
        let mut body = Intake::new(body, self.from_client.clone());
        if head.method == Method::CONNECT {
            answer(&mut respond, StatusCode::NOT_IMPLEMENTED, "no CONNECT here");
            return Ended::Stream;
        }
        let (port, via) = (self.shared.book.port(self.place.listen), self.place.via());
        let to_match = to_match(&head);
        let decision = match decide(port.as_deref(), via, &to_match, None) {
            Decision::NeedsBody => {
                let operation = self.operation(&mut body).await;
                decide(port.as_deref(), via, &to_match, Some(&operation))
            }
            decided @ (Decision::App | Decision::Mine(_)) => decided,
        };
        let noted = match &decision {
            Decision::Mine(live) => {
                let sightings = &self.shared.sightings;
                let noted = sightings.note(&live.route.id, &to_match, self.place.peer);
                noted.map(|noted| (noted, *live))
            }
            Decision::App | Decision::NeedsBody => None,
        };
        let (peer, fallback, mine) = match decision {
            Decision::Mine(live) => match body.meanwhile(self.peer(Whose::Mine(live))).await {
                Ok(peer) => (Ok(peer), false, true),
                Err(Unreachable) if live.route.strict => (Err(Unreachable), false, true),
                Err(Unreachable) => (body.meanwhile(self.peer(Whose::App)).await, true, false),
            },
            Decision::App | Decision::NeedsBody => {
                (body.meanwhile(self.peer(Whose::App)).await, false, false)
            }
        };
        drop(to_match);
        let status = AtomicU16::new(0);
        let ended = match peer {
            Ok(peer) => {
                let request = self.place.next_request(head, mine);
                let exchange = Exchange {
                    respond,
                    to_client: self.to_client.clone(),
                    fallback,
                    mine,
                    status: &status,
                };
                exchange.run(peer, request, &mut body).await
            }
            Err(Unreachable) if mine => {
                answer(&mut respond, StatusCode::BAD_GATEWAY, GONE);
                Ended::Stream
            }
            Err(Unreachable) => {
                respond.send_reset(Reason::REFUSED_STREAM);
                Ended::Stream
            }
        };
        if let Some((noted, live)) = noted {
            let (by, status) = match (status.into_inner(), fallback) {
                (0, _) => (AnsweredBy::Nobody, None),
                (status, true) => (AnsweredBy::Application, Some(status)),
                (status, false) => (AnsweredBy::Workstation, Some(status)),
            };
            let sighting = noted.answered(by, status);
            let sightings = &self.shared.sightings;
            sightings.tell(live, self.place.peer, &sighting, &self.shared.budget);
        }
        ended
    }

    /// Reads the body for the operation in it; a body that is too large or too slow has none.
    async fn operation(&self, body: &mut Intake) -> Operation {
        let Some(share) = self.shared.budget.take(LARGE) else {
            return Operation::default();
        };
        body.read_ahead(share);
        let read = async {
            while !body.has_ended() && body.waiting() <= BODY_MAX {
                body.fill().await;
                body.release_all();
            }
        };
        // Out of time it is not whole, and has none either.
        let _ = tokio::time::timeout(BODY_TIMEOUT, read).await;
        match body.has_ended() && body.waiting() <= BODY_MAX {
            true => Operation::of_body(&body.peek()),
            false => Operation::default(),
        }
    }

    /// A connection that takes a stream now.
    async fn peer(&self, whose: Whose<'_>) -> Result<Peer, Unreachable> {
        // The second turn is for a connection that had ended.
        for _ in 0..2 {
            let opening = self.opening(whose).await?;
            let opened = opening.clone().await;
            let Some(peer) = opened else {
                self.forget(whose, &opening);
                break;
            };
            match peer.requests.ready().await {
                Ok(requests) => return Ok(Peer { requests, ..peer }),
                Err(_) => self.forget(whose, &opening),
            }
        }
        Err(Unreachable)
    }

    async fn opening(&self, whose: Whose<'_>) -> Result<Opening, Unreachable> {
        if let Some(opening) = self.open().get(whose.key()) {
            return Ok(opening.clone());
        }
        let driver = self.drivers.reserve().await.map_err(|_| Unreachable)?;
        Ok(match self.open().entry(whose.key().to_owned()) {
            hash_map::Entry::Occupied(entry) => entry.get().clone(),
            hash_map::Entry::Vacant(entry) => {
                let (peer_tx, peer) = oneshot::channel();
                driver.send(match whose {
                    Whose::App => self.to_app(peer_tx),
                    Whose::Mine(live) => self.to_workstation(live, peer_tx),
                });
                let opening = async { peer.await.ok() }.boxed().shared();
                entry.insert(opening).clone()
            }
        })
    }

    /// Makes the next stream open anew, unless another one has done so.
    fn forget(&self, whose: Whose<'_>, opening: &Opening) {
        let mut open = self.open();
        if open
            .get(whose.key())
            .is_some_and(|there| there.ptr_eq(opening))
        {
            open.remove(whose.key());
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<String, Opening>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn to_app(&self, peer: oneshot::Sender<Peer>) -> BoxFuture<'static, Ended> {
        let (place, shared) = (self.place.clone(), Arc::clone(&self.shared));
        let spare = self
            .spare
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        Box::pin(async move {
            let dialed = match spare {
                Some(spare) => spare.await,
                None => place.dial().await,
            };
            match dialed {
                Ok(socket) => {
                    speak(socket, WINDOW, shared, peer).await;
                    Ended::App
                }
                Err(error) => {
                    tracing::debug!(app = %place.app, %error, "the application does not answer");
                    Ended::Stream
                }
            }
        })
    }

    fn to_workstation(
        &self,
        live: &Live<Workstation>,
        peer: oneshot::Sender<Peer>,
    ) -> BoxFuture<'static, Ended> {
        let (live, client, shared) = (live.clone(), self.place.peer, Arc::clone(&self.shared));
        Box::pin(async move {
            if let Ok(flow) = open(&live, client).await {
                let share = shared.budget.take_spare(FAR_WINDOW as usize);
                let window = if share.is_some() { FAR_WINDOW } else { WINDOW };
                let (rx, tx) = flow.into_io();
                speak(tokio::io::join(rx, tx), window, shared, peer).await;
            }
            Ended::Workstation
        })
    }
}

/// Drives a connection of which we are the client to its end; `peer` is told once it takes streams.
async fn speak(io: impl ByteStream, window: u32, shared: Arc<Shared>, peer: oneshot::Sender<Peer>) {
    let mut builder = h2::client::Builder::new();
    bounded!(builder, window).enable_push(false);
    let io = Paced::from_server(io);
    let shaken = builder.handshake::<_, Queued>(io).await;
    let Ok((requests, mut connection)) = shaken else {
        return;
    };
    let backlog = Backlog::default();
    let mut window = Window::new(window, backlog.clone(), shared);
    let _ = peer.send(Peer {
        requests,
        queue: Queue::new(),
        backlog,
    });
    let driven = poll_fn(|cx| {
        if let Some(size) = window.fit(cx) {
            connection.set_target_window_size(size);
        }
        connection.poll_unpin(cx)
    });
    if let Err(error) = driven.await {
        tracing::debug!(%error, "upstream connection ended");
    }
}
