//! The HTTP proxy on one connection: CONNECT, absolute-form requests, and the PAC file.
//!
//! Origin-form is refused without a word, which closes DNS rebinding: a page that reaches this port through a name of
//! its own can only send origin-form. Requests are never forwarded as the bytes that came in; they are parsed strictly
//! and written anew, and so are responses.

mod answer;
pub mod body;
mod fields;
mod forward;
pub mod head;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use http::header::{HOST, PROXY_AUTHORIZATION};
use http::uri::PathAndQuery;
use http::{Method, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::timeout;
use tp_tunnel::Target;

use self::answer::Answer;
use self::body::UploadError;
use self::fields::Ending;
use self::forward::{Exchange, ForwardError, Informational, Origin};
use self::head::{Form, Head, HeadError};
use super::counters::Kind;
use super::{Shared, close_politely, direct, pac, relay};

/// How long a connection may stay open between two requests.
const KEEP_ALIVE: Duration = Duration::from_secs(90);

/// How long a client that has ended its side is waited for until its response begins: it may have gone for good.
const HALF_CLOSED: Duration = Duration::from_secs(30);

/// Bytes of later requests that are taken while one is under way.
const PIPELINED_MAX: usize = 64 * 1024;

/// Why no head was read.
#[derive(Debug)]
pub(super) enum NoHead {
    /// The client is gone, or silent for too long.
    Gone,
    /// To be told to the client.
    Bad(HeadError),
}

impl From<io::Error> for NoHead {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

/// Reads until there is a whole head. What follows it stays in `buffer`.
pub(super) async fn read_head(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
) -> Result<Head, NoHead> {
    loop {
        if let Some((head, used)) = Head::parse(buffer).map_err(NoHead::Bad)? {
            let _ = buffer.split_to(used);
            return Ok(head);
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(NoHead::Gone);
        }
    }
}

/// Tells the client why its head was not understood.
pub(super) async fn refuse(stream: TcpStream, error: HeadError) {
    answer_and_close(stream, &Answer::bad(error), true).await;
}

/// Serves a connection from its first request on.
pub(super) async fn serve(stream: TcpStream, buffer: BytesMut, first: Head, shared: &Shared) {
    let with_body = first.method != Method::HEAD;
    match &first.form {
        Form::Origin(path) => {
            let answer =
                origin_form(&first, path, &stream, shared).unwrap_or_else(Answer::not_a_server);
            answer_and_close(stream, &answer, with_body).await;
        }
        _ if !is_authenticated(&first, shared) => {
            answer_and_close(stream, &Answer::unauthenticated(), with_body).await;
        }
        Form::Connect(target) => connect(stream, buffer, target, shared).await,
        Form::Absolute(..) => Box::pin(forward(stream, buffer, first, shared)).await,
    }
}

fn is_authenticated(head: &Head, shared: &Shared) -> bool {
    let Some(credentials) = &shared.options.credentials else {
        return true;
    };
    let given = head.headers.get(PROXY_AUTHORIZATION);
    given.is_some_and(|value| credentials.verify_basic(value.as_bytes()))
}

/// The one thing that is served: the PAC file.
fn origin_form(head: &Head, path: &str, stream: &TcpStream, shared: &Shared) -> Option<Answer> {
    let (client, proxy) = (stream.peer_addr().ok()?, stream.local_addr().ok()?);
    if !may_have_pac(head, path, client, proxy) {
        return None;
    }
    let split = shared.dialer.upstream.split.borrow().clone();
    Some(Answer::pac(pac::script(&split, proxy)))
}

/// It names the cluster's Services and takes no password: it is for a browser on this machine that was told its
/// address, and for no page of the web and no other machine, whose `Host` proves nothing.
pub(super) fn may_have_pac(head: &Head, path: &str, client: SocketAddr, proxy: SocketAddr) -> bool {
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
    let site = head.headers.get("sec-fetch-site");
    head.method == Method::GET
        && path == "/proxy.pac"
        && site.is_none_or(|site| site == "none")
        && client.ip().to_canonical().is_loopback()
        && host.is_some_and(|host| is_loopback_host(host, proxy))
}

fn is_loopback_host(host: &str, proxy: SocketAddr) -> bool {
    ["127.0.0.1", "localhost", "[::1]"]
        .iter()
        .any(|name| host.eq_ignore_ascii_case(&format!("{name}:{}", proxy.port())))
}

async fn connect(mut stream: TcpStream, early: BytesMut, target: &Target, shared: &Shared) {
    match Box::pin(shared.dialer.connect(target, Kind::HttpConnect)).await {
        Ok((outbound, flow)) => {
            if stream.write_all(answer::CONNECTED).await.is_ok() {
                Box::pin(relay(outbound, flow, stream, early)).await;
            }
        }
        Err(refusal) => answer_and_close(stream, &Answer::refusal(&refusal), true).await,
    }
}

async fn answer_and_close(mut stream: TcpStream, answer: &Answer, with_body: bool) {
    if stream.write_all(&answer.to_bytes(with_body)).await.is_ok() {
        Box::pin(close_politely(stream)).await;
    }
}

/// Absolute-form requests, one after the other, each perhaps to another origin.
async fn forward(mut stream: TcpStream, mut buffer: BytesMut, first: Head, shared: &Shared) {
    let mut origin = Origin::new(shared.dialer.clone());
    let mut head = first;
    loop {
        let Form::Absolute(target, path) = &head.form else {
            // A client may open a tunnel on a connection that it used for requests before.
            return Box::pin(serve(stream, buffer, head, shared)).await;
        };
        if !is_authenticated(&head, shared) {
            let with_body = head.method != Method::HEAD;
            return answer_and_close(stream, &Answer::unauthenticated(), with_body).await;
        }
        match exchange(&mut stream, &mut buffer, &mut origin, &head, target, path).await {
            After::KeepAlive => {}
            After::Close => return close_politely(stream).await,
            After::Reset => return direct::reset_on_drop(&stream),
            After::Upgraded(upgraded) => return relay_upgraded(stream, buffer, *upgraded).await,
        }
        match next_head(&mut stream, &mut buffer, shared).await {
            Ok(next) => head = next,
            Err(NoHead::Gone) => return,
            Err(NoHead::Bad(error)) => return refuse(stream, error).await,
        }
    }
}

async fn next_head(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    shared: &Shared,
) -> Result<Head, NoHead> {
    if buffer.is_empty() {
        // A connection that waits holds no buffer.
        *buffer = BytesMut::new();
        timeout(KEEP_ALIVE, stream.readable())
            .await
            .map_err(|_| NoHead::Gone)??;
    }
    let head = timeout(shared.options.handshake_timeout, read_head(stream, buffer)).await;
    head.map_err(|_| NoHead::Gone)?
}

/// What becomes of the client's connection after an exchange.
enum After {
    KeepAlive,
    Close,
    /// The response was cut: a clean end would look like a whole one.
    Reset,
    Upgraded(Box<Upgraded>),
}

/// One request and its response. Both bodies move at the same time.
async fn exchange(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    origin: &mut Origin,
    head: &Head,
    target: &Target,
    path: &PathAndQuery,
) -> After {
    let (mut reader, mut writer) = stream.split();
    let (mut exchange, body_tx, informational) = Exchange::new(head, target, path);
    let moved = AtomicU64::new(0);
    let uploaded = AtomicBool::new(false);
    let answered = AtomicBool::new(false);
    let after = {
        let response = respond(
            &mut writer,
            origin,
            &mut exchange,
            head,
            informational,
            &uploaded,
            &answered,
        );
        let upload = async {
            body::upload(&mut reader, buffer, head.body, body_tx, &moved).await?;
            uploaded.store(true, Ordering::Relaxed);
            until_gone(&mut reader, buffer).await;
            if !answered.load(Ordering::Relaxed) {
                tokio::time::sleep(HALF_CLOSED).await;
            }
            if answered.load(Ordering::Relaxed) {
                // Whether anyone still reads shows when it is written to.
                std::future::pending::<()>().await;
            }
            Err(UploadError::Gone)
        };
        // The upload goes first, so that its end is known when the response says whether the connection stays open.
        tokio::select! {
            biased;
            Err::<(), _>(error) = upload => Err(error),
            after = response => Ok(after),
        }
    };
    if let Some(flow) = origin.flow() {
        flow.up(moved.into_inner());
    }
    match after {
        Ok(After::KeepAlive) if !uploaded.load(Ordering::Relaxed) => After::Close,
        Ok(after) => after,
        Err(UploadError::Framing(_)) if !answered.load(Ordering::Relaxed) => {
            let answer = Answer::bad(HeadError::Bad("the request body is framed wrongly"));
            let _ = writer.write_all(&answer.to_bytes(true)).await;
            After::Close
        }
        Err(UploadError::Framing(_) | UploadError::Gone) => After::Reset,
    }
}

/// Waits until the client has ended its side or is gone, taking in what it sends ahead.
async fn until_gone(reader: &mut ReadHalf<'_>, buffer: &mut BytesMut) {
    loop {
        if buffer.len() >= PIPELINED_MAX {
            std::future::pending::<()>().await;
        }
        match reader.read_buf(buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

/// Gets the response and writes it to the client.
async fn respond(
    writer: &mut WriteHalf<'_>,
    origin: &mut Origin,
    exchange: &mut Exchange<'_>,
    head: &Head,
    mut informational: Informational,
    uploaded: &AtomicBool,
    answered: &AtomicBool,
) -> After {
    let mut response = {
        let mut response = Box::pin(origin.exchange(exchange));
        loop {
            tokio::select! {
                biased;
                Some(head) = informational.recv() => {
                    if writer.write_all(&head).await.is_err() {
                        return After::Reset;
                    }
                }
                response = &mut response => break response,
            }
        }
    };
    answered.store(true, Ordering::Relaxed);
    let refused = match &mut response {
        Ok(response) if forward::is_unasked_upgrade(head, response.status()) => {
            Answer::broken_origin("it switched protocols without being asked")
        }
        Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
            return switch(writer, response).await;
        }
        Ok(response) => {
            let keep_alive = head.keeps_alive() && uploaded.load(Ordering::Relaxed);
            return deliver(writer, origin, response, head, keep_alive).await;
        }
        Err(ForwardError::Refused(refusal)) => Answer::refusal(refusal),
        Err(ForwardError::Broken(error)) => Answer::broken_origin(&error.to_string()),
    };
    let _ = writer
        .write_all(&refused.to_bytes(head.method != Method::HEAD))
        .await;
    After::Close
}

async fn switch(writer: &mut WriteHalf<'_>, response: &mut Response<Incoming>) -> After {
    let head = fields::response_head(response, Ending::None, true);
    if writer.write_all(&head).await.is_err() {
        return After::Reset;
    }
    match hyper::upgrade::on(response).await {
        Ok(upgraded) => After::Upgraded(Box::new(upgraded)),
        Err(_) => After::Reset,
    }
}

async fn deliver(
    writer: &mut WriteHalf<'_>,
    origin: &Origin,
    response: &mut Response<Incoming>,
    head: &Head,
    keep_alive: bool,
) -> After {
    let length = response.body().size_hint().exact();
    let ending = fields::ending(&head.method, response.status(), length, head.http11);
    let keep_alive = keep_alive && ending != Ending::Close;
    let bytes = fields::response_head(response, ending, keep_alive);
    if writer.write_all(&bytes).await.is_err() {
        return After::Reset;
    }
    let flow = origin.flow();
    while let Some(frame) = response.body_mut().frame().await {
        let Ok(frame) = frame else {
            return After::Reset;
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if data.is_empty() || ending == Ending::None {
            continue;
        }
        if let Some(flow) = &flow {
            flow.down(data.len() as u64);
        }
        let written = match ending {
            Ending::Chunked => writer.write_all_buf(&mut body::chunk(data)).await,
            Ending::Length(_) | Ending::Close | Ending::None => writer.write_all(&data).await,
        };
        if written.is_err() {
            return After::Reset;
        }
    }
    if ending == Ending::Chunked && writer.write_all(body::LAST_CHUNK).await.is_err() {
        return After::Reset;
    }
    if keep_alive {
        After::KeepAlive
    } else {
        After::Close
    }
}

/// After 101 both sides speak whatever they agreed on.
async fn relay_upgraded(mut stream: TcpStream, early: BytesMut, upgraded: Upgraded) {
    let mut origin = TokioIo::new(upgraded);
    if origin.write_all(&early).await.is_err() || origin.flush().await.is_err() {
        return direct::reset_on_drop(&stream);
    }
    drop(early);
    if tokio::io::copy_bidirectional(&mut stream, &mut origin)
        .await
        .is_err()
    {
        direct::reset_on_drop(&stream);
    }
}
