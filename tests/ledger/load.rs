//! A client of numbered requests: each flow has one at a time, on a connection that it keeps, or on one that all share.

use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tp_tests::ledger::{Event, Exchange, INSTANCE_HEADER, Id, Label, Ledger, Plan, REQUEST_HEADER};

/// How long a client waits. Longer than any deadline that a test judges by, so that the join decides what is late.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Load {
    pub(crate) ledger: Ledger,
    pub(crate) plan: Plan,
    pub(crate) address: SocketAddr,
    /// What makes a request mine.
    pub(crate) header: Option<(String, String)>,
}

#[derive(Clone, Copy)]
pub(crate) enum Version {
    Http1,
    /// A new connection for each request.
    Fresh,
    Http2,
}

impl FromStr for Version {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "h1" => Ok(Self::Http1),
            "h1-fresh" => Ok(Self::Fresh),
            "h2" => Ok(Self::Http2),
            other => bail!("{other}: none of h1, h1-fresh and h2"),
        }
    }
}

/// Runs `flows` flows, numbered from `first` on, that make `per_second` requests together, until `stop`; those on their
/// way are waited for.
pub(crate) async fn run(
    load: Arc<Load>,
    first: u32,
    flows: u32,
    per_second: f64,
    version: Version,
    stop: CancellationToken,
) {
    let shared = Arc::new(Mutex::new(None));
    let tasks: Vec<_> = (first..first + flows)
        .map(|flow| {
            let client = match version {
                Version::Http1 => Client::Http1(None),
                Version::Fresh => Client::Fresh,
                Version::Http2 => Client::Http2(Arc::clone(&shared)),
            };
            let every = Duration::from_secs_f64(f64::from(flows) / per_second);
            tokio::spawn(Arc::clone(&load).flow(flow, every, client, stop.clone()))
        })
        .collect();
    for task in tasks {
        task.await.expect("a flow does not panic");
    }
}

impl Load {
    async fn flow(
        self: Arc<Self>,
        flow: u32,
        every: Duration,
        mut client: Client,
        stop: CancellationToken,
    ) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for seq in 0.. {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            self.exchange(Id { flow, seq }, &mut client).await;
        }
    }

    async fn exchange(&self, id: Id, client: &mut Client) {
        let exchange = self.plan.exchange(id);
        let mine = exchange.mine && self.header.is_some();
        self.ledger.write(id, Event::Sent { mine });
        let request = self.request(id, mine, &exchange);
        let event = match timeout(PATIENCE, client.send(self.address, request)).await {
            Ok(Ok(reply)) => reply.judged(&exchange),
            Ok(Err(error)) => Event::Failed {
                error: format!("{error:#}"),
            },
            Err(_) => {
                client.forget().await;
                return;
            }
        };
        self.ledger.write(id, event);
    }

    fn request(&self, id: Id, mine: bool, exchange: &Exchange) -> Request<Bytes> {
        let label = Label {
            plan: self.plan,
            id,
        };
        let mut request = Request::post(format!("http://{}/ledger", self.address))
            .header(http::header::HOST, self.address.to_string())
            .header(REQUEST_HEADER, label.to_string());
        if let (true, Some((name, value))) = (mine, &self.header) {
            request = request.header(name, value);
        }
        request
            .body(Bytes::copy_from_slice(&exchange.request))
            .expect("the arguments are valid headers")
    }
}

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Reply {
    fn judged(&self, exchange: &Exchange) -> Event {
        if self.status != StatusCode::OK {
            let text = String::from_utf8_lossy(&self.body);
            return Event::Failed {
                error: format!("{}: {}", self.status, text.trim()),
            };
        }
        let instance = self
            .headers
            .get(INSTANCE_HEADER)
            .and_then(|value| value.to_str().ok());
        Event::Answered {
            instance: instance.unwrap_or_default().to_owned(),
            fallback: self.headers.contains_key("x-tp-fallback"),
            intact: self.body == exchange.reply,
        }
    }
}

type Http1 = hyper::client::conn::http1::SendRequest<Full<Bytes>>;
type Http2 = h2::client::SendRequest<Bytes>;

enum Client {
    Http1(Option<Http1>),
    Fresh,
    Http2(Arc<Mutex<Option<Http2>>>),
}

impl Client {
    async fn send(
        &mut self,
        address: SocketAddr,
        request: Request<Bytes>,
    ) -> anyhow::Result<Reply> {
        match self {
            Self::Http1(kept) => {
                let sent = send_http1(kept, address, request).await;
                if sent.is_err() {
                    *kept = None;
                }
                sent
            }
            Self::Fresh => send_http1(&mut None, address, request).await,
            Self::Http2(shared) => send_http2(shared, address, request).await,
        }
    }

    /// The next request gets a new connection.
    async fn forget(&mut self) {
        match self {
            Self::Http1(kept) => *kept = None,
            Self::Fresh => {}
            Self::Http2(shared) => *shared.lock().await = None,
        }
    }
}

async fn send_http1(
    kept: &mut Option<Http1>,
    address: SocketAddr,
    request: Request<Bytes>,
) -> anyhow::Result<Reply> {
    let request = request.map(Full::new);
    // A kept connection may have been closed meanwhile; a request of which no byte was sent is nobody's loss.
    if let Some(mut connection) = kept.take()
        && connection.ready().await.is_ok()
    {
        match connection.try_send_request(request.clone()).await {
            Ok(response) => return reply_http1(connection, response, kept).await,
            Err(error) if error.message().is_some() => {}
            Err(error) => return Err(error.into_error().into()),
        }
    }
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut connection, driver) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(driver);
    let response = connection.send_request(request).await?;
    reply_http1(connection, response, kept).await
}

async fn reply_http1(
    connection: Http1,
    response: hyper::Response<hyper::body::Incoming>,
    kept: &mut Option<Http1>,
) -> anyhow::Result<Reply> {
    let (head, body) = response.into_parts();
    let body = body.collect().await?.to_bytes();
    *kept = Some(connection);
    Ok(Reply {
        status: head.status,
        headers: head.headers,
        body,
    })
}

async fn send_http2(
    shared: &Mutex<Option<Http2>>,
    address: SocketAddr,
    request: Request<Bytes>,
) -> anyhow::Result<Reply> {
    let mut connection = {
        let mut shared = shared.lock().await;
        let usable = match shared.take() {
            Some(connection) => connection.ready().await.ok(),
            None => None,
        };
        let connection = match usable {
            Some(connection) => connection,
            None => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let (connection, driver) = h2::client::handshake(stream).await?;
                tokio::spawn(driver);
                connection.ready().await?
            }
        };
        shared.insert(connection).clone()
    };
    let (mut head, body) = request.into_parts();
    // `:authority` has taken its place (RFC 9113 §8.3.1).
    head.headers.remove(http::header::HOST);
    let (response, mut stream) =
        connection.send_request(Request::from_parts(head, ()), body.is_empty())?;
    let response = if body.is_empty() {
        response.await?
    } else {
        let (_, response) = tokio::join!(send_body(&mut stream, body), response);
        response?
    };
    let (head, body) = response.into_parts();
    let body = read_body(body).await?;
    Ok(Reply {
        status: head.status,
        headers: head.headers,
        body,
    })
}

/// Sends a whole body, and its end.
async fn send_body(stream: &mut h2::SendStream<Bytes>, body: Bytes) -> anyhow::Result<()> {
    send_data(stream, body).await?;
    stream.send_data(Bytes::new(), true)?;
    Ok(())
}

/// Sends bytes of a body, as the other side makes room.
pub(crate) async fn send_data(
    stream: &mut h2::SendStream<Bytes>,
    mut body: Bytes,
) -> anyhow::Result<()> {
    while !body.is_empty() {
        stream.reserve_capacity(body.len());
        let room = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
        let room = room.context("the stream has ended")??;
        let now = body.split_to(room.min(body.len()));
        stream.send_data(now, false)?;
    }
    Ok(())
}

/// Reads a whole body.
pub(crate) async fn read_body(mut body: h2::RecvStream) -> Result<Bytes, h2::Error> {
    let mut whole = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece?;
        body.flow_control().release_capacity(piece.len())?;
        whole.extend_from_slice(&piece);
    }
    Ok(whole.into())
}
