//! One exchange: what moves between a stream of the client and the one that answers it.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::FutureExt;
use h2::client::ResponseFuture;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderValue, Request, Response, StatusCode};

use super::intake::{End, Intake};
use super::queued::{Queue, Queued, Room};
use super::{Ended, Peer};
use crate::front::FALLBACK;

/// Bytes handed to h2 at a time.
pub(super) const PIECE: usize = 16 * 1024;

pub(super) const GONE: &str = "the workstation of this intercept went away before it answered";

/// An answer of our own.
pub(super) fn answer(respond: &mut SendResponse<Queued>, status: StatusCode, why: &str) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain");
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, kind);
    // Fails only when the client is gone.
    if let Ok(mut body) = respond.send_response(response, false) {
        let _ = body.send_data(Bytes::from(format!("tp: {why}\n")).into(), true);
    }
}

/// One stream of the client and the stream that answers it.
pub(super) struct Exchange<'a> {
    pub(super) respond: SendResponse<Queued>,
    pub(super) to_client: Queue,
    pub(super) fallback: bool,
    pub(super) mine: bool,
    /// Becomes that of the answer.
    pub(super) status: &'a AtomicU16,
}

impl Exchange<'_> {
    pub(super) async fn run(
        mut self,
        mut peer: Peer,
        request: Request<()>,
        body: &mut Intake,
    ) -> Ended {
        let empty = body.is_done();
        let (mut response, mut to_peer) = match peer.requests.send_request(request, empty) {
            Ok(sent) => sent,
            Err(error) => {
                self.fail(&error);
                return Ended::Stream;
            }
        };
        let upload = async {
            let uploaded = match empty {
                true => Ok(()),
                false => pump(body, &mut to_peer, &peer.queue).await,
            };
            if let Err(Pumped::Deaf) = uploaded {
                body.discard().await;
            }
            uploaded
        };
        let download = async {
            let answered = poll_fn(|cx| self.poll_head(cx, &mut response)).await;
            let (mut head, body) = match answered {
                None => return Ended::GivenUp,
                Some(Ok(response)) => response.into_parts(),
                Some(Err(error)) => {
                    self.fail(&error);
                    return Ended::Stream;
                }
            };
            self.status.store(head.status.as_u16(), Relaxed);
            if self.fallback {
                let mark = HeaderValue::from_static("1");
                head.headers.insert(FALLBACK, mark);
            }
            let empty = body.is_end_stream();
            let response = Response::from_parts(head, ());
            if let Ok(mut to_client) = self.respond.send_response(response, empty)
                && !empty
            {
                let mut body = Intake::new(body, peer.backlog.clone());
                let _ = pump(&mut body, &mut to_client, &self.to_client).await;
            }
            Ended::Stream
        };
        tokio::pin!(upload, download);
        tokio::select! {
            biased;
            ended = &mut download => ended,
            uploaded = &mut upload => match uploaded {
                // The answer is complete when the download is; then the peer needs nothing more.
                Ok(()) | Err(Pumped::Deaf) => download.await,
                Err(Pumped::Lost) => Ended::GivenUp,
            },
        }
    }

    /// The answer's head, or `None` once the client has reset the stream. Interim answers are passed on.
    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        response: &mut ResponseFuture,
    ) -> Poll<Option<Result<Response<RecvStream>, h2::Error>>> {
        if self.respond.poll_reset(cx).is_ready() {
            return Poll::Ready(None);
        }
        while let Poll::Ready(Some(interim)) = response.poll_informational(cx) {
            match interim {
                // Fails only when the client is gone.
                Ok(interim) => drop(self.respond.send_informational(interim)),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
        response.poll_unpin(cx).map(Some)
    }

    /// The stream to who was to answer ended before its answer.
    fn fail(&mut self, error: &h2::Error) {
        match error.reason() {
            Some(reason) if error.is_reset() && error.is_remote() => {
                self.respond.send_reset(reason);
            }
            _ if self.mine => answer(&mut self.respond, StatusCode::BAD_GATEWAY, GONE),
            _ => self.respond.send_reset(Reason::INTERNAL_ERROR),
        }
    }
}

/// Why one direction of a stream stopped before its end.
enum Pumped {
    /// Where the bytes went takes no more.
    Deaf,
    /// Where they came from is gone; the other side has been told.
    Lost,
}

/// Moves the data and the trailers of one direction, no more than the windows of both sides allow.
async fn pump(from: &mut Intake, to: &mut SendStream<Queued>, queue: &Queue) -> Result<(), Pumped> {
    loop {
        if let Some(end) = from.take_end() {
            let told = match end {
                End::Plain => to.send_data(Bytes::new().into(), true),
                End::Trailers(trailers) => to.send_trailers(trailers),
                End::Failed(error) => return Err(lost(to, &error)),
            };
            return told.map_err(|_| Pumped::Deaf);
        }
        let wanted = from.waiting().min(PIECE);
        tokio::select! {
            biased;
            () = from.fill() => {}
            room = room(to, queue, wanted) => {
                let room = room?;
                let piece = room.of(from);
                let last = from.is_done();
                to.send_data(piece, last).map_err(|_| Pumped::Deaf)?;
                if last {
                    return Ok(());
                }
            }
        }
    }
}

/// Waits until so many bytes or fewer can be sent; where there are none, for the end of who would take them. The windows of
/// the other side come first, so that a stream that may not send takes no room from others. Cancel safe.
async fn room(to: &mut SendStream<Queued>, queue: &Queue, wanted: usize) -> Result<Room, Pumped> {
    to.reserve_capacity(wanted);
    while wanted > 0 && to.capacity() == 0 {
        match poll_fn(|cx| to.poll_capacity(cx)).await {
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return Err(Pumped::Deaf),
        }
    }
    let size = wanted.min(to.capacity());
    tokio::select! {
        biased;
        room = queue.room(size), if wanted > 0 => Ok(room),
        _ = poll_fn(|cx| to.poll_reset(cx)) => Err(Pumped::Deaf),
    }
}

/// A reset is passed on with its code; a lost connection is an error on the other side, never an end.
fn lost(to: &mut SendStream<Queued>, error: &h2::Error) -> Pumped {
    let reason = error
        .reason()
        .filter(|_| error.is_reset() && error.is_remote());
    to.send_reset(reason.unwrap_or(Reason::INTERNAL_ERROR));
    Pumped::Lost
}
