//! One request to whoever answers it, and the answer back, both at the same time.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::task::Poll;

use bytes::{Bytes, BytesMut};

use super::Client;
use super::body::Body;
use super::head::{Doubt, Framing, Request, Response, Version, complete};
use crate::socket::{SocketReader, SocketWriter};
use crate::upstream::{READ, Reader, Upstream, Writer};

/// How an exchange ended well.
#[derive(Debug)]
pub(super) enum Served {
    /// Both connections can serve another one.
    Kept,
    /// Both connections end.
    Closed,
    /// Both connections speak another protocol now.
    Upgraded,
}

/// How it ended badly.
#[derive(Debug)]
pub(super) enum Failure {
    /// The rest of the request can be read in two ways.
    Doubt(Doubt),
    /// The client is gone, or does not read.
    Client,
    /// Who was to answer is gone.
    Upstream {
        /// The client has seen a part of the answer.
        answered: bool,
        /// A reset; `None` is an end.
        error: Option<io::Error>,
    },
}

/// Why a direction stopped.
enum Stop {
    Doubt(Doubt),
    Client,
    /// Upstream takes nothing more; it may have answered.
    Deaf,
    Upstream(Option<io::Error>),
}

/// Sends `first` (the head, and what of the body was looked at) and the rest of the body, and passes the answer on with
/// `marks` added. `status` becomes that of the answer.
pub(super) async fn exchange(
    client: &mut Client,
    upstream: &mut Upstream,
    request: &Request,
    mut first: BytesMut,
    body: &mut Body,
    marks: &[(&str, &str)],
    status: &AtomicU16,
) -> Result<Served, Failure> {
    let (sent, answered) = (AtomicBool::new(false), AtomicBool::new(false));
    let Client {
        rx: client_rx,
        tx: client_tx,
        buf: client_buf,
        ended: client_ended,
    } = client;
    let failed = |stop: Stop| match stop {
        Stop::Doubt(doubt) if !answered.load(Relaxed) => Failure::Doubt(doubt),
        Stop::Doubt(_) | Stop::Client => Failure::Client,
        Stop::Deaf => Failure::Upstream {
            answered: answered.load(Relaxed),
            error: None,
        },
        Stop::Upstream(error) => Failure::Upstream {
            answered: answered.load(Relaxed),
            error,
        },
    };
    let tx = &mut upstream.tx;
    let mut upload = pin!(async {
        if let Err(stop) = send(client_rx, client_buf, tx, &mut first, body).await {
            return stop;
        }
        drop(first);
        sent.store(true, Relaxed);
        watch(client_rx, client_buf, client_ended, tx).await
    });
    let mut download = pin!(receive(
        &mut upstream.rx,
        &mut upstream.buf,
        client_tx,
        request,
        marks,
        &answered,
        status,
    ));
    let (answer, deaf) = tokio::select! {
        biased;
        answer = &mut download => (answer, false),
        stop = &mut upload => match stop {
            Stop::Deaf => (download.await, true),
            stop @ (Stop::Doubt(_) | Stop::Client | Stop::Upstream(_)) => return Err(failed(stop)),
        },
    };
    let served = answer.map_err(failed)?;
    if deaf || matches!(served, Served::Closed) {
        return Ok(Served::Closed);
    }
    // An answer may come before the request is complete; whoever answered still reads it.
    let rest = poll_fn(|cx| match sent.load(Relaxed) {
        true => Poll::Ready(None),
        false => match upload.as_mut().poll(cx) {
            Poll::Ready(stop) => Poll::Ready(Some(stop)),
            Poll::Pending if sent.load(Relaxed) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        },
    });
    match rest.await {
        None => Ok(served),
        Some(Stop::Deaf | Stop::Upstream(_)) => Ok(Served::Closed),
        Some(Stop::Doubt(_) | Stop::Client) => Err(Failure::Client),
    }
}

async fn send(
    rx: &mut SocketReader,
    buf: &mut BytesMut,
    tx: &mut Writer,
    out: &mut BytesMut,
    body: &mut Body,
) -> Result<(), Stop> {
    loop {
        let done = body.transcode(buf, out).map_err(Stop::Doubt);
        if !out.is_empty() {
            tx.write_all(out).await.map_err(|_| Stop::Deaf)?;
            out.clear();
        }
        if done? {
            return Ok(());
        }
        match rx.fill(buf).await {
            Ok(0) | Err(_) => return Err(Stop::Client),
            Ok(_) => {}
        }
    }
}

/// Looks after the client while its answer is under way: its next requests wait here, its FIN is passed on, and when it
/// is gone the exchange ends.
async fn watch(
    rx: &mut SocketReader,
    buf: &mut BytesMut,
    ended: &mut bool,
    tx: &mut Writer,
) -> Stop {
    while buf.len() < READ {
        match rx.fill(buf).await {
            Err(_) => return Stop::Client,
            Ok(0) => {
                *ended = true;
                // With pipelined requests the end comes after their answers.
                if buf.is_empty() && tx.finish().await.is_err() {
                    return Stop::Deaf;
                }
                break;
            }
            Ok(_) => {}
        }
    }
    std::future::pending().await
}

async fn receive(
    rx: &mut Reader,
    buf: &mut BytesMut,
    tx: &mut SocketWriter,
    request: &Request,
    marks: &[(&str, &str)],
    answered: &AtomicBool,
    status: &AtomicU16,
) -> Result<Served, Stop> {
    let mut out = BytesMut::new();
    let (mut body, served) = loop {
        let parsed = match head(rx, buf).await? {
            Some(raw) => Response::parse(raw.clone())
                .and_then(|response| Ok((response.framing(request.method())?, response)))
                .map_err(|_| Some(raw)),
            None => Err(None),
        };
        let (framing, response) = match parsed {
            Ok(parsed) => parsed,
            Err(raw) => {
                // Nobody else's bytes follow on this connection, so the client may judge for itself.
                out.extend_from_slice(raw.as_deref().unwrap_or_default());
                answered.store(true, Relaxed);
                break (Body::new(Framing::UntilClose), Served::Closed);
            }
        };
        if !matches!(response.status, 100 | 102..200) {
            status.store(response.status, Relaxed);
        }
        match response.status {
            101 if request.upgrades() => {
                answered.store(true, Relaxed);
                response.write(marks, &mut out);
                write(tx, &out, rx).await?;
                return Ok(Served::Upgraded);
            }
            // RFC 9110 §15.2: HTTP/1.0 knows none of them.
            100 | 102..200 if request.version == Version::V10 => {}
            100 | 102..200 => {
                response.write(&[], &mut out);
                write(tx, &out, rx).await?;
                out.clear();
            }
            101 => {
                answered.store(true, Relaxed);
                response.write(marks, &mut out);
                break (Body::new(Framing::UntilClose), Served::Closed);
            }
            _ => {
                answered.store(true, Relaxed);
                response.write(marks, &mut out);
                let kept =
                    request.persists() && response.persists() && framing != Framing::UntilClose;
                let served = if kept { Served::Kept } else { Served::Closed };
                break (Body::new(framing), served);
            }
        }
    };
    loop {
        let done = body.transcode(buf, &mut out);
        write(tx, &out, rx).await?;
        out.clear();
        match done {
            Ok(true) => return Ok(served),
            Ok(false) => {}
            // A part is out already: the client must see that it is not the whole.
            Err(_) => return Err(Stop::Upstream(Some(io::ErrorKind::InvalidData.into()))),
        }
        match rx.fill(buf).await {
            Ok(0) if body.ends_with_connection() => return Ok(Served::Closed),
            Ok(0) => return Err(Stop::Upstream(None)),
            Ok(_) => {}
            Err(error) => return Err(Stop::Upstream(Some(error))),
        }
    }
}

/// The next head, or `None` for something that is none; it stays in `buf`.
async fn head(rx: &mut Reader, buf: &mut BytesMut) -> Result<Option<Bytes>, Stop> {
    let mut seen = 0;
    loop {
        match complete(buf, seen) {
            Ok(Some(size)) => return Ok(Some(buf.split_to(size).freeze())),
            Ok(None) => seen = buf.len(),
            Err(_) => return Ok(None),
        }
        match rx.fill(buf).await {
            Ok(0) if buf.is_empty() => return Err(Stop::Upstream(None)),
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(Stop::Upstream(Some(error))),
        }
    }
}

async fn write(tx: &mut SocketWriter, data: &[u8], rx: &mut Reader) -> Result<(), Stop> {
    if data.is_empty() {
        return Ok(());
    }
    tokio::select! {
        biased;
        written = tx.write_all(data) => written.map_err(|_| Stop::Client),
        error = rx.stalled() => Err(Stop::Upstream(Some(error))),
    }
}
