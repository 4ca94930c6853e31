//! HTTP/1 from a client: request after request, each to whom it belongs.
//!
//! Requests of one connection are served one after the other; pipelined ones wait in the socket and in a small buffer.

pub mod body;
mod exchange;
pub mod head;

use std::io;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::watch;
use tp_manager_api::matcher::graphql::{BODY_MAX, Operation};
use tp_manager_api::sighting::AnsweredBy;
use tp_tunnel::Workstation;

use super::{FALLBACK, Place, Shared, opaque, open, stopping};
use crate::book::Live;
use crate::budget::{EXCHANGE, LARGE, Share};
use crate::route::{Decision, decide};
use crate::socket::{Socket, SocketReader, SocketWriter};
use crate::upstream::{Dialing, READ, Reader, Upstream, Writer};
use body::{Body, payload};
use exchange::{Failure, Served, exchange};
use head::{Doubt, Passage, Request, complete};

/// How long a head may take once its first byte is there.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a body that a matcher asks for may take. After it the request is nobody's.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a client may take to read our last words, and how much of what it says is thrown away meanwhile: closing
/// over unread bytes would be a reset, which overtakes them.
const FAREWELL: (Duration, usize) = (Duration::from_secs(1), 256 * 1024);

/// The connection that requests come on.
struct Client {
    rx: SocketReader,
    tx: SocketWriter,
    /// Received and not yet understood.
    buf: BytesMut,
    /// The client has sent its FIN.
    ended: bool,
}

/// The connections that serve this client.
#[derive(Default)]
struct Upstreams {
    app: Option<Upstream>,
    /// The first connection to the application.
    dialing: Option<Dialing>,
    /// To the workstation of this intercept.
    mine: Option<(String, Upstream)>,
    /// The last answer was the application's.
    app_was_last: bool,
}

impl Upstreams {
    async fn close(self) {
        if let Some((_, mine)) = self.mine {
            mine.close().await;
        }
    }

    /// The connection to the application, or a new one.
    async fn app(&mut self, place: &Place) -> io::Result<Upstream> {
        let socket = match (self.app.take(), self.dialing.take()) {
            (Some(upstream), _) => return Ok(upstream),
            (None, Some(dialing)) => dialing.await?,
            (None, None) => place.dial().await?,
        };
        Ok(Upstream::app(socket))
    }
}

/// What came while nothing was under way.
enum Next {
    Head(Bytes),
    /// No next request; the connection ends in good order.
    End,
    Lost,
    Refused(Doubt),
    /// There is no memory to parse what comes; it goes on unparsed.
    Unparsed,
}

/// How a connection goes on after a request.
enum Then {
    Next,
    End,
    Reset,
    Refuse(Doubt),
    /// The workstation vanished: nobody knows whether the request was executed.
    Gone,
    /// Bytes only, from here on, with whoever answered last.
    Tunnel(Box<Upstream>),
}

/// Serves one connection to its end. `early` was read from it, `app` is a connection to the application that nobody uses yet.
pub(super) async fn serve(
    client: Socket,
    early: BytesMut,
    app: Option<Dialing>,
    place: Place,
    shared: &Shared,
) {
    let (rx, tx) = client.into_split();
    let mut client = Client {
        rx,
        tx,
        buf: early,
        ended: false,
    };
    let mut upstreams = Upstreams {
        dialing: app,
        ..Upstreams::default()
    };
    let mut stop = shared.stop.clone();
    loop {
        let mut share = None;
        let raw = match next(&mut client, &mut upstreams, shared, &mut stop, &mut share).await {
            Next::Head(raw) => raw,
            Next::End => return end(client, upstreams).await,
            Next::Lost => return client.reset(),
            Next::Refused(doubt) => return client.refuse(doubt).await,
            Next::Unparsed => return client.pass_on(upstreams, &place, Bytes::new()).await,
        };
        let request = match Request::parse(raw) {
            Ok(request) => request,
            Err(doubt) => return client.refuse(doubt).await,
        };
        let passage = Passage {
            peer: place.peer.ip(),
            continued: false,
            decrypted: false,
        };
        if request.method() == "CONNECT" {
            // What follows is no HTTP, and matching it is nobody's wish.
            let mut head = BytesMut::new();
            request.write(passage, &mut head);
            return client.pass_on(upstreams, &place, head.freeze()).await;
        }
        let mut turn = Turn {
            client: &mut client,
            upstreams: &mut upstreams,
            request: &request,
            body: Body::new(request.framing),
            passage,
            buffered: BytesMut::new(),
            looked_into: None,
            place: &place,
            shared,
            status: AtomicU16::new(0),
            falls_back: false,
        };
        match turn.serve().await {
            Then::Next => {}
            Then::End => return end(client, upstreams).await,
            Then::Reset => return client.reset(),
            Then::Refuse(doubt) => return client.refuse(doubt).await,
            Then::Gone => {
                let why = "the workstation of this intercept went away before it answered";
                return client.answer(502, "Bad Gateway", why).await;
            }
            Then::Tunnel(upstream) => return client.tunnel(*upstream, Bytes::new()).await,
        }
    }
}

/// Both sides end in good order.
async fn end(client: Client, upstreams: Upstreams) {
    tokio::join!(client.finish(), upstreams.close());
}

/// Waits for the next head. Idle upstreams are watched meanwhile: the application's close is the client's.
async fn next(
    client: &mut Client,
    upstreams: &mut Upstreams,
    shared: &Shared,
    stop: &mut watch::Receiver<bool>,
    share: &mut Option<(Share, Option<Share>)>,
) -> Next {
    if client.buf.is_empty() {
        client.buf = BytesMut::new();
        loop {
            let filled = tokio::select! {
                biased;
                filled = client.rx.fill(&mut client.buf) => filled,
                () = stopping(stop) => return Next::End,
                () = ended(upstreams.app.as_mut()) => {
                    upstreams.app = None;
                    match upstreams.app_was_last {
                        true => return Next::End,
                        false => continue,
                    }
                }
                () = ended(upstreams.mine.as_mut().map(|(_, mine)| mine)) => {
                    upstreams.mine = None;
                    continue;
                }
            };
            match filled {
                Ok(0) => return Next::End,
                Ok(_) => break,
                Err(_) => return Next::Lost,
            }
        }
    }
    match shared.budget.take(EXCHANGE) {
        Some(taken) => *share = Some((taken, None)),
        None => return Next::Unparsed,
    }
    let head = tokio::time::timeout(HEAD_TIMEOUT, async {
        let mut seen = 0;
        loop {
            // One empty line before a request is allowed (RFC 9112 §2.2).
            if seen == 0 && client.buf.starts_with(b"\r\n") {
                bytes::Buf::advance(&mut client.buf, 2);
            }
            let half_line = &client.buf[..] == b"\r";
            match complete(&client.buf, seen) {
                Ok(Some(size)) => return Next::Head(client.buf.split_to(size).freeze()),
                Ok(None) => seen = if half_line { 0 } else { client.buf.len() },
                Err(doubt) => return Next::Refused(doubt),
            }
            if client.buf.len() > READ
                && let Some((_, large @ None)) = share.as_mut()
            {
                *large = shared.budget.take(LARGE);
                if large.is_none() {
                    return Next::Unparsed;
                }
            }
            match client.rx.fill(&mut client.buf).await {
                Ok(0) if client.buf.is_empty() => return Next::End,
                Ok(0) => return Next::Refused(Doubt::Malformed("a header that does not end")),
                Ok(_) => {}
                Err(_) => return Next::Lost,
            }
        }
    });
    head.await.unwrap_or(Next::End)
}

/// Resolves when an idle connection has ended, or said something nobody asked for.
async fn ended(upstream: Option<&mut Upstream>) {
    let Some(upstream) = upstream else {
        return std::future::pending().await;
    };
    upstream.rx.stirred().await;
}

/// Who answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    App,
    Workstation,
}

/// One request and its answer.
struct Turn<'a> {
    client: &'a mut Client,
    upstreams: &'a mut Upstreams,
    request: &'a Request,
    body: Body,
    passage: Passage,
    /// The part of the body that a matcher has looked at, as it will be sent.
    buffered: BytesMut,
    /// For that.
    looked_into: Option<Share>,
    place: &'a Place,
    shared: &'a Shared,
    /// Of the answer; 0 before it.
    status: AtomicU16,
    /// The application answers what was a workstation's.
    falls_back: bool,
}

impl Turn<'_> {
    async fn serve(&mut self) -> Then {
        let port = self.shared.book.port(self.place.listen);
        let (request, via) = (self.request, self.place.via());
        let head = request.to_match();
        let decision = match decide(port.as_deref(), via, &head, None) {
            Decision::NeedsBody => match self.operation().await {
                Ok(operation) => decide(port.as_deref(), via, &head, Some(&operation)),
                Err(then) => return then,
            },
            decided @ (Decision::App | Decision::Mine(_)) => decided,
        };
        match decision {
            Decision::Mine(live) => {
                let (sightings, peer) = (&self.shared.sightings, self.place.peer);
                let noted = sightings.note(&live.route.id, &head, peer);
                let then = self.by_workstation(live).await;
                if let Some(noted) = noted {
                    let (by, status) = self.outcome(&then);
                    let sighting = noted.answered(by, status);
                    sightings.tell(live, peer, &sighting, &self.shared.budget);
                }
                then
            }
            Decision::App | Decision::NeedsBody => self.by_app(&[]).await,
        }
    }

    /// Who answered, and how.
    fn outcome(&self, then: &Then) -> (AnsweredBy, Option<u16>) {
        match (then, self.status.load(Relaxed)) {
            (Then::Gone, _) => (AnsweredBy::Nobody, Some(502)),
            (_, 0) => (AnsweredBy::Nobody, None),
            (_, status) if self.falls_back => (AnsweredBy::Application, Some(status)),
            (_, status) => (AnsweredBy::Workstation, Some(status)),
        }
    }

    /// Reads the body for the operation in it. A body that is too large or too slow has none.
    async fn operation(&mut self) -> Result<Operation, Then> {
        let nothing = Operation::default();
        self.looked_into = self.shared.budget.take(LARGE);
        if self.looked_into.is_none() {
            return Ok(nothing);
        }
        let deadline = tokio::time::Instant::now() + BODY_TIMEOUT;
        let mut piece = BytesMut::new();
        loop {
            let done = self.body.transcode(&mut self.client.buf, &mut piece);
            self.buffered.put_slice(&piece);
            piece.clear();
            match done {
                Err(doubt) => return Err(Then::Refuse(doubt)),
                Ok(true) => {
                    let payload = payload(&self.buffered, self.request.framing);
                    return Ok(Operation::of_body(&payload));
                }
                Ok(false) if self.buffered.len() > BODY_MAX => return Ok(nothing),
                Ok(false) => {}
            }
            if self.request.expects_continue() && !self.passage.continued {
                self.passage.continued = true;
                let go_on = self
                    .client
                    .tx
                    .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                    .await;
                go_on.map_err(|_| Then::Reset)?;
            }
            let filling = self.client.rx.fill(&mut self.client.buf);
            match tokio::time::timeout_at(deadline, filling).await {
                Err(_) => return Ok(nothing),
                Ok(Ok(0)) => {
                    return Err(Then::Refuse(Doubt::Malformed("a body that does not end")));
                }
                Ok(Ok(_)) => {}
                Ok(Err(_)) => return Err(Then::Reset),
            }
        }
    }

    fn head(&self, to: To) -> BytesMut {
        let mut out = BytesMut::new();
        let passage = Passage {
            // The application sees for itself.
            decrypted: to == To::Workstation && self.place.via().is_decrypted(),
            ..self.passage
        };
        self.request.write(passage, &mut out);
        out.put_slice(&self.buffered);
        out
    }

    async fn by_app(&mut self, marks: &[(&str, &str)]) -> Then {
        let app = self.place.app;
        let mut upstream = match self.upstreams.app(self.place).await {
            Ok(upstream) => upstream,
            Err(error) => {
                tracing::debug!(%app, %error, "the application does not answer");
                return Then::Reset;
            }
        };
        let first = self.head(To::App);
        match self.exchange(&mut upstream, first, marks).await {
            Ok(Served::Kept) => {
                self.upstreams.app = Some(upstream);
                self.upstreams.app_was_last = true;
                Then::Next
            }
            Ok(Served::Closed) => Then::End,
            Ok(Served::Upgraded) => Then::Tunnel(Box::new(upstream)),
            Err(Failure::Doubt(doubt)) => {
                abandon(upstream);
                Then::Refuse(doubt)
            }
            Err(Failure::Client) => {
                abandon(upstream);
                Then::Reset
            }
            // As the client would have seen it.
            Err(Failure::Upstream { error: None, .. }) => Then::End,
            Err(Failure::Upstream { error: Some(_), .. }) => Then::Reset,
        }
    }

    async fn by_workstation(&mut self, live: &Live<Workstation>) -> Then {
        let id = live.route.id.as_str();
        let kept = self.upstreams.mine.take();
        let mut kept = kept.filter(|(intercept, upstream)| {
            // Whose flow it is must not change, and it must not have ended.
            intercept == id && upstream.is_workstation()
        });
        if kept
            .as_mut()
            .is_some_and(|(_, upstream)| !upstream.is_idle())
        {
            kept = None;
        }
        let reused = kept.is_some();
        let mut upstream = match kept {
            Some((_, upstream)) => upstream,
            None => match open(live, self.place.peer).await {
                Ok(flow) => Upstream::workstation(flow),
                Err(_) if live.route.strict => return Then::Gone,
                Err(_) => {
                    self.falls_back = true;
                    return self.by_app(&[(FALLBACK, "1")]).await;
                }
            },
        };
        let first = self.head(To::Workstation);
        let mut served = self.exchange(&mut upstream, first, &[]).await;
        if let Err(Failure::Upstream {
            answered: false, ..
        }) = &served
            && reused
            && self.request.is_safe()
        {
            // The local application may have closed its idle connection at that very moment.
            let Ok(flow) = open(live, self.place.peer).await else {
                return Then::Gone;
            };
            upstream = Upstream::workstation(flow);
            let first = self.head(To::Workstation);
            served = self.exchange(&mut upstream, first, &[]).await;
        }
        match served {
            Ok(Served::Kept) => {
                self.upstreams.mine = Some((id.to_owned(), upstream));
                self.upstreams.app_was_last = false;
                Then::Next
            }
            Ok(Served::Closed) => {
                // Ended with the client's connection.
                self.upstreams.mine = Some((id.to_owned(), upstream));
                Then::End
            }
            Ok(Served::Upgraded) => Then::Tunnel(Box::new(upstream)),
            Err(Failure::Doubt(doubt)) => Then::Refuse(doubt),
            Err(Failure::Client) => Then::Reset,
            Err(Failure::Upstream {
                answered: false, ..
            }) => Then::Gone,
            Err(Failure::Upstream { answered: true, .. }) => Then::Reset,
        }
    }

    async fn exchange(
        &mut self,
        upstream: &mut Upstream,
        first: BytesMut,
        marks: &[(&str, &str)],
    ) -> Result<Served, Failure> {
        exchange(
            self.client,
            upstream,
            self.request,
            first,
            &mut self.body,
            marks,
            &self.status,
        )
        .await
    }
}

/// A request that its client gave up is given up upstream, too.
fn abandon(upstream: Upstream) {
    // A flow is reset by being dropped.
    if let (Reader::App(rx), Writer::App(tx)) = (upstream.rx, upstream.tx) {
        rx.reset_on_close();
        tx.forget();
    }
}

impl Client {
    /// Ends in good order, so that the last answer arrives.
    async fn finish(mut self) {
        if self.tx.finish().await.is_err() || self.ended {
            return;
        }
        let (patience, most) = FAREWELL;
        let drained = async {
            let mut left = most;
            loop {
                self.buf.clear();
                match self.rx.fill(&mut self.buf).await {
                    Ok(0) | Err(_) => return,
                    Ok(size) => left = left.saturating_sub(size),
                }
                if left == 0 {
                    return;
                }
            }
        };
        // A client that goes on talking is cut.
        let _ = tokio::time::timeout(patience, drained).await;
    }

    fn reset(self) {
        self.rx.reset_on_close();
        self.tx.forget();
    }

    async fn refuse(self, doubt: Doubt) {
        tracing::debug!(%doubt, "request refused");
        match doubt {
            Doubt::Malformed(_) => self.answer(400, "Bad Request", &doubt.to_string()).await,
            Doubt::TooLarge => {
                self.answer(431, "Request Header Fields Too Large", &doubt.to_string())
                    .await;
            }
        }
    }

    /// An answer of our own, the last one of this connection.
    async fn answer(mut self, status: u16, reason: &str, why: &str) {
        let answer = format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\ntp: {why}\n",
            why.len() + 5
        );
        if self.tx.write_all(answer.as_bytes()).await.is_ok() {
            self.finish().await;
        }
    }

    /// Hands the connection and what was read of it to the application, unparsed.
    async fn pass_on(self, mut upstreams: Upstreams, place: &Place, head: Bytes) {
        let Ok(app) = upstreams.app(place).await else {
            return self.reset();
        };
        self.tunnel(app, head).await;
    }

    /// Bytes only from here on, `head` first.
    async fn tunnel(self, upstream: Upstream, head: Bytes) {
        let early = match head.is_empty() {
            true => self.buf.freeze(),
            false => [&head[..], &self.buf[..]].concat().into(),
        };
        if let Some(client) = Socket::reunite(self.rx, self.tx) {
            opaque::join(client, upstream, early).await;
        }
    }
}
