//! The manager's end of a connection: every stream is a request to a [`Service`].
//!
//! It knows the shapes of requests and answers and nothing of rights: those are the service's.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use futures::future::BoxFuture;
use h2::ext::Protocol;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::carrier::ByteStream;
use crate::client::DNS_MESSAGE;
use crate::error::TunnelError;
use crate::flow_control::{Frame, Pulse, Role};
use crate::link::{Link, Wire, server_builder};
use crate::proxy_status::{DialError, PROXY_STATUS};
use crate::settings::{CONTROL_REQUEST_MAX, DNS_MESSAGE_MAX, Settings, UNANSWERED_MAX};
use crate::streams::accept::ACCEPT_PATH;
use crate::streams::body::{self, BodyError};
use crate::streams::{DatagramFlow, Flow, FlowSender, Refusal, Workstation, datagram, relay};
use crate::target::Target;

/// What a connection may reach. One value per connection, so it knows whose it is.
pub trait Service: Send + Sync + 'static {
    /// Dials a TCP destination. Dropping the future must cancel the dial: the peer gave up.
    fn dial(&self, target: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>>;

    /// A UDP socket connected to the destination.
    fn associate(&self, target: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>>;

    /// Answers a DNS message, both in wire format.
    fn resolve(&self, query: Bytes) -> BoxFuture<'_, Bytes>;

    /// Answers a request on `/v1/…`, whose body is at most 64 KiB.
    fn control(&self, request: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>>;

    /// Told once, before the first stream: where to offer inbound flows to this connection. Nothing by default; then
    /// posted streams wait until the connection ends.
    fn connected(&self, workstation: Workstation) {
        drop(workstation);
    }
}

/// A socket connected to a destination, and what ends the right to it.
#[derive(Debug)]
pub struct Dialed<S> {
    /// The socket.
    pub socket: S,
    /// When it is cancelled the flow is reset; without one, it may last as long as its connection.
    pub revoked: Option<CancellationToken>,
}

impl<S> From<S> for Dialed<S> {
    fn from(socket: S) -> Self {
        Self {
            socket,
            revoked: None,
        }
    }
}

/// Serves one connection until the peer or `shutdown` ends it. After `shutdown` nothing new is taken (GOAWAY) and it
/// ends when the last flow has; dropping the future resets what is left.
pub async fn serve(
    io: impl ByteStream,
    service: Arc<dyn Service>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), TunnelError> {
    serve_with(io, service, Settings::default(), shutdown).await
}

/// As [`serve`] with other limits.
pub async fn serve_with(
    io: impl ByteStream,
    service: Arc<dyn Service>,
    settings: Settings,
    shutdown: impl Future<Output = ()>,
) -> Result<(), TunnelError> {
    let link = Link::new(settings);
    let mut shutdown = pin!(shutdown);
    let handshake = server_builder(&link.settings).handshake(Wire::new(io, &link));
    let mut connection: Connection<_, Frame> = tokio::select! {
        connection = tokio::time::timeout(link.settings.peer_silence, handshake) => {
            connection.map_err(|_| TunnelError::Silent(link.settings.peer_silence))??
        }
        () = &mut shutdown => return Ok(()),
    };
    let ping_pong = connection.ping_pong().expect("taken once");
    let mut pulse = Pulse::new(
        Role::Server,
        ping_pong,
        &link.settings,
        Arc::clone(&link.meter),
        Arc::clone(&link.holds),
    );
    let workstation = Workstation::new(Arc::clone(&link));
    service.connected(workstation.clone());
    let _closed = CloseOnDrop(workstation.clone());
    let mut streams = JoinSet::new();
    let unanswered = Arc::new(Semaphore::new(UNANSWERED_MAX));
    let mut draining = false;
    let ended = poll_fn(|cx| {
        if !draining && shutdown.as_mut().poll(cx).is_ready() {
            draining = true;
            // Posted streams would keep a draining connection open for ever.
            workstation.close();
            connection.graceful_shutdown();
        }
        loop {
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) if is_posted(&request) => {
                    // Refused by being dropped where nothing new is taken.
                    workstation.post(respond, request.into_body());
                }
                Poll::Ready(Some(Ok((request, mut respond)))) => {
                    let Ok(waiting) = Arc::clone(&unanswered).try_acquire_owned() else {
                        respond.send_reset(Reason::REFUSED_STREAM);
                        continue;
                    };
                    let handler = Handler {
                        service: Arc::clone(&service),
                        link: Arc::clone(&link),
                        waiting,
                    };
                    streams.spawn(handler.handle(request, respond));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(TunnelError::from(error))),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            }
        }
        while let Poll::Ready(Some(joined)) = streams.poll_join_next(cx) {
            report(joined);
        }
        match pulse.poll(cx, &mut connection) {
            Err(error) => Poll::Ready(Err(error)),
            Ok(()) => Poll::Pending,
        }
    })
    .await;
    workstation.close();
    // The carrier goes first: what is left then ends with a reset and not with a FIN.
    drop(connection);
    streams.shutdown().await;
    ended
}

/// Offers to a connection whose future was dropped must end too.
struct CloseOnDrop(Workstation);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn is_posted(request: &Request<RecvStream>) -> bool {
    request.method() == Method::POST
        && request.uri().path() == ACCEPT_PATH
        && !request.body().is_end_stream()
}

/// A panic ends one stream only.
fn report(joined: Result<(), tokio::task::JoinError>) {
    if let Err(error) = joined {
        tracing::error!(%error, "a stream's task failed");
    }
}

/// Answers one stream.
struct Handler {
    service: Arc<dyn Service>,
    link: Arc<Link>,
    /// One of the places for streams without an answer yet.
    waiting: OwnedSemaphorePermit,
}

type Respond = SendResponse<Frame>;

impl Handler {
    async fn handle(self, request: Request<RecvStream>, mut respond: Respond) {
        let answered = match (request.method(), request.extensions().get::<Protocol>()) {
            (&Method::CONNECT, None) => self.tcp(request, &mut respond).await,
            (&Method::CONNECT, Some(protocol)) if protocol.as_str() == "connect-udp" => {
                self.udp(request, &mut respond).await
            }
            (&Method::CONNECT, Some(_)) => refuse(&mut respond, StatusCode::NOT_IMPLEMENTED),
            (_, Some(_) | None) => self.resource(request, &mut respond).await,
        };
        if let Err(error) = answered {
            tracing::debug!(%error, "stream ended before its answer");
        }
    }

    async fn tcp(
        self,
        request: Request<RecvStream>,
        respond: &mut Respond,
    ) -> Result<(), h2::Error> {
        let target = request
            .uri()
            .authority()
            .map(|authority| authority.as_str().parse::<Target>());
        let Some(Ok(target)) = target else {
            return refuse(respond, StatusCode::BAD_REQUEST);
        };
        // The request's body stays untouched meanwhile: what the client sends early waits in the stream's window.
        match unless_cancelled(respond, self.service.dial(target)).await? {
            Ok(dialed) => {
                drop(self.waiting);
                let stream = respond.send_response(Response::new(()), false)?;
                let flow = Flow::new(stream, request.into_body(), self.link);
                unless_revoked(dialed.revoked, pin!(relay(flow, dialed.socket))).await;
                Ok(())
            }
            Err(error) => fail(respond, &error),
        }
    }

    async fn udp(
        self,
        request: Request<RecvStream>,
        respond: &mut Respond,
    ) -> Result<(), h2::Error> {
        let Some(target) = datagram::from_path(request.uri().path()) else {
            return refuse(respond, StatusCode::BAD_REQUEST);
        };
        match unless_cancelled(respond, self.service.associate(target)).await? {
            Ok(dialed) => {
                drop(self.waiting);
                let mut response = Response::new(());
                response
                    .headers_mut()
                    .insert("capsule-protocol", HeaderValue::from_static("?1"));
                let stream = respond.send_response(response, false)?;
                let idle = self.link.settings.datagram_idle;
                let flow = DatagramFlow::new(stream, request.into_body(), self.link);
                let relay = datagram::relay_datagrams(flow, dialed.socket, idle, Refusal::IsLost);
                let relay = pin!(relay);
                unless_revoked(dialed.revoked, relay).await;
                Ok(())
            }
            Err(error) => fail(respond, &error),
        }
    }

    async fn resource(
        self,
        request: Request<RecvStream>,
        respond: &mut Respond,
    ) -> Result<(), h2::Error> {
        let (head, body) = request.into_parts();
        match (head.uri.path(), &head.method) {
            ("/dns-query", &Method::POST) => {
                if head
                    .headers
                    .get(CONTENT_TYPE)
                    .is_none_or(|kind| kind != DNS_MESSAGE)
                {
                    return refuse(respond, StatusCode::UNSUPPORTED_MEDIA_TYPE);
                }
                let query = match body::collect(body, DNS_MESSAGE_MAX).await {
                    Ok(query) => query,
                    Err(error) => return refuse_body(respond, error),
                };
                let answer = unless_cancelled(respond, self.service.resolve(query)).await?;
                let mut response = Response::new(answer);
                response
                    .headers_mut()
                    .insert(CONTENT_TYPE, HeaderValue::from_static(DNS_MESSAGE));
                self.answer(respond, response).await
            }
            (
                path,
                &(Method::GET | Method::POST | Method::PUT | Method::PATCH | Method::DELETE),
            ) if path.starts_with("/v1/") => {
                let body = match body::collect(body, CONTROL_REQUEST_MAX).await {
                    Ok(body) => body,
                    Err(error) => return refuse_body(respond, error),
                };
                let request = Request::from_parts(head, body);
                let response = unless_cancelled(respond, self.service.control(request)).await?;
                self.answer(respond, response).await
            }
            (path, _) if path == "/dns-query" || path.starts_with("/v1/") => {
                refuse(respond, StatusCode::METHOD_NOT_ALLOWED)
            }
            _ => refuse(respond, StatusCode::NOT_FOUND),
        }
    }

    async fn answer(
        self,
        respond: &mut Respond,
        response: Response<Bytes>,
    ) -> Result<(), h2::Error> {
        let (head, body) = response.into_parts();
        let stream = respond.send_response(Response::from_parts(head, ()), body.is_empty())?;
        if !body.is_empty() {
            let sent = FlowSender::new(stream, self.link).send_last(body).await;
            sent.unwrap_or_else(
                |error| tracing::debug!(%error, "the peer did not wait for its answer"),
            );
        }
        Ok(())
    }
}

/// Work for a peer that has given up is dropped, and with it the dial.
async fn unless_cancelled<T>(
    respond: &mut Respond,
    work: BoxFuture<'_, T>,
) -> Result<T, h2::Error> {
    tokio::select! {
        done = work => Ok(done),
        reason = poll_fn(|cx| respond.poll_reset(cx)) => Err(reason.map_or_else(|error| error, h2::Error::from)),
    }
}

/// The caller drops the relay after this, which resets both sides of one that had not ended. By reference: moved through
/// here, a relay would take its room several times over for as long as it lives.
async fn unless_revoked<T>(
    revoked: Option<CancellationToken>,
    relay: Pin<&mut impl Future<Output = T>>,
) {
    match revoked {
        Some(revoked) => drop(revoked.run_until_cancelled(relay).await),
        None => drop(relay.await),
    }
}

fn fail(respond: &mut Respond, error: &DialError) -> Result<(), h2::Error> {
    let mut response = Response::new(());
    *response.status_mut() = error.kind.status();
    response
        .headers_mut()
        .insert(PROXY_STATUS, error.to_header());
    respond.send_response(response, true).map(drop)
}

fn refuse(respond: &mut Respond, status: StatusCode) -> Result<(), h2::Error> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    let value = HeaderValue::from_static("tp; error=http_request_error");
    response.headers_mut().insert(PROXY_STATUS, value);
    respond.send_response(response, true).map(drop)
}

fn refuse_body(respond: &mut Respond, error: BodyError) -> Result<(), h2::Error> {
    match error {
        BodyError::TooLarge => refuse(respond, StatusCode::PAYLOAD_TOO_LARGE),
        BodyError::Stream(error) => Err(error),
    }
}
