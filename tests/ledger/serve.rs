//! A server that checks each request, writes it down, and gives the one right reply, signed.

use std::convert::Infallible;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use http::header::CONNECTION;
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tp_tests::ledger::{Event, INSTANCE_HEADER, Label, Ledger, REQUEST_HEADER};

use crate::load::{read_body, send_data};

pub(crate) struct Server {
    pub(crate) ledger: Ledger,
    /// How it signs.
    pub(crate) instance: String,
    /// What a reply takes: half of it before its head, half in the middle of its body.
    pub(crate) delay: Duration,
}

/// How long nobody must have come before a server that is to end does.
const QUIET: Duration = Duration::from_secs(3);

/// How long somebody who comes even then is served before that.
const VISIT: Duration = Duration::from_millis(500);

/// Accepts until SIGTERM, and then for as long as somebody comes: Services forget a pod only some time after it was told to
/// end. Meanwhile HTTP/2 connections are told to go (RFC 9113 §6.8), and those of HTTP/1 with their next answer.
pub(crate) async fn run(server: Arc<Server>, address: &str) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await?;
    writeln!(std::io::stdout(), "{}", listener.local_addr()?)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let ending = CancellationToken::new();
    let mut connections = JoinSet::new();
    loop {
        let quiet = async {
            ending.cancelled().await;
            tokio::time::sleep(QUIET).await;
        };
        tokio::select! {
            _ = terminate.recv() => ending.cancel(),
            // A client that went away is in its own ledger.
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let (stream, _) = accepted?;
                let (server, ending) = (Arc::clone(&server), ending.clone());
                connections.spawn(async move { server.connection(stream, ending).await });
            }
            () = quiet, if connections.is_empty() => return Ok(()),
        }
    }
}

impl Server {
    async fn connection(
        self: Arc<Self>,
        mut stream: TcpStream,
        ending: CancellationToken,
    ) -> anyhow::Result<()> {
        stream.set_nodelay(true)?;
        if begins_as_http2(&stream).await? {
            let mut connection = h2::server::handshake(stream).await?;
            let late = ending.is_cancelled();
            let leave = async {
                ending.cancelled().await;
                if late {
                    tokio::time::sleep(VISIT).await;
                }
            };
            tokio::pin!(leave);
            let mut told = false;
            loop {
                let accepted = tokio::select! {
                    () = &mut leave, if !told => {
                        told = true;
                        connection.graceful_shutdown();
                        continue;
                    }
                    accepted = connection.accept() => accepted,
                };
                let Some(accepted) = accepted else {
                    return Ok(());
                };
                let (request, respond) = accepted?;
                let server = Arc::clone(&self);
                tokio::spawn(async move { server.stream(request, respond).await });
            }
        }
        let service = service_fn(|request: hyper::Request<hyper::body::Incoming>| async {
            let (head, body) = request.into_parts();
            let mut reply = match body.collect().await {
                Ok(body) => self.answer(&head.headers, &body.to_bytes()).await,
                Err(_) => refusal("the body ended early"),
            };
            if ending.is_cancelled() {
                let close = HeaderValue::from_static("close");
                reply.headers_mut().insert(CONNECTION, close);
            }
            Ok::<_, Infallible>(reply.map(|body| self.slowly(body)))
        });
        let io = TokioIo::new(&mut stream);
        hyper::server::conn::http1::Builder::new()
            .serve_connection(io, service)
            .await?;
        let _ = stream.shutdown().await;
        Ok(())
    }

    async fn stream(
        self: Arc<Self>,
        request: http::Request<h2::RecvStream>,
        mut respond: h2::server::SendResponse<Bytes>,
    ) -> anyhow::Result<()> {
        let (head, body) = request.into_parts();
        let body = read_body(body).await?;
        let (head, mut body) = self.answer(&head.headers, &body).await.into_parts();
        let mut stream = respond.send_response(Response::from_parts(head, ()), false)?;
        let first = body.split_to(body.len() / 2);
        send_data(&mut stream, first).await?;
        tokio::time::sleep(self.delay / 2).await;
        send_data(&mut stream, body).await?;
        stream.send_data(Bytes::new(), true)?;
        Ok(())
    }

    /// A body with a length that comes in two halves.
    fn slowly(
        &self,
        mut body: Bytes,
    ) -> impl hyper::body::Body<Data = Bytes, Error = Infallible> + use<> {
        let first = body.split_to(body.len() / 2);
        let delay = self.delay / 2;
        let second = async move {
            tokio::time::sleep(delay).await;
            body
        };
        let halves = stream::once(async { first }).chain(stream::once(second));
        StreamBody::new(halves.map(|half| Ok(Frame::data(half))))
    }

    async fn answer(&self, headers: &HeaderMap, body: &[u8]) -> Response<Bytes> {
        let Ok(label) = label(headers) else {
            return refusal("not one of ours");
        };
        let exchange = label.plan.exchange(label.id);
        let received = Event::Received {
            instance: self.instance.clone(),
            intact: exchange.request == body,
        };
        self.ledger.write(label.id, received);
        tokio::time::sleep(self.delay / 2).await;
        let length = exchange.reply.len().into();
        let mut response = Response::new(Bytes::from(exchange.reply));
        response
            .headers_mut()
            .insert(http::header::CONTENT_LENGTH, length);
        let instance = self
            .instance
            .parse()
            .expect("an instance's name is visible ASCII");
        response.headers_mut().insert(INSTANCE_HEADER, instance);
        response
    }
}

fn label(headers: &HeaderMap) -> anyhow::Result<Label> {
    headers
        .get(REQUEST_HEADER)
        .context("no label")?
        .to_str()?
        .parse()
}

fn refusal(why: &'static str) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from_static(why.as_bytes()));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    response
}

/// Whether the client's preface (RFC 9113 §3.4) comes. Takes no byte of it.
async fn begins_as_http2(stream: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0; 3];
    loop {
        let len = stream.peek(&mut first).await?;
        // `PRI`, and no method of HTTP/1 that is used begins with `PR` (RFC 9110 §9.3).
        if len == 0 || first[..len] != b"PRI"[..len] {
            return Ok(false);
        }
        if len == first.len() {
            return Ok(true);
        }
        stream.readable().await?;
    }
}
