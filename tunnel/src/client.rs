//! The workstation's end of a connection: opens flows and asks small questions.

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use h2::client::{Connection, ResponseFuture, SendRequest};
use h2::ext::Protocol;
use h2::{RecvStream, SendStream};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use tokio::sync::watch;

use crate::carrier::ByteStream;
use crate::error::{OpenError, TunnelError};
use crate::flow_control::{Frame, Pulse, Role};
use crate::link::{Link, Wire, client_builder};
use crate::proxy_status::DialError;
use crate::settings::{CONTROL_RESPONSE_MAX, DNS_MESSAGE_MAX, Settings};
use crate::streams::accept::ACCEPT_PATH;
use crate::streams::body::{self, BodyError};
use crate::streams::{DatagramFlow, Flow, FlowSender, Incoming, datagram};
use crate::target::Target;

/// A handle on one connection; clones share it.
#[derive(Clone)]
pub struct Tunnel {
    requests: SendRequest<Frame>,
    link: Arc<Link>,
    state: watch::Receiver<State>,
}

/// Drives the connection; its owner spawns it. Ends when the connection does: `Ok` after a clean end with no flow left.
/// Dropping it cuts the carrier, which resets every flow.
#[must_use = "nothing moves unless the driver is polled"]
pub struct Driver {
    inner: BoxFuture<'static, Result<(), TunnelError>>,
}

/// What a connection carried so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Flows open now.
    pub flows: u64,
    /// Payload bytes sent to the peer.
    pub bytes_up: u64,
    /// Payload bytes received from the peer.
    pub bytes_down: u64,
}

/// `None` while new flows are welcome, then why they are not.
type State = Option<TunnelError>;

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").finish_non_exhaustive()
    }
}

impl Tunnel {
    /// Speaks HTTP/2 over a secured carrier. Returns when the peer has answered a first ping, so its settings are known
    /// and it has not refused us; one that refuses is [`TunnelError::NotAdmitted`].
    ///
    /// Dropping the future drops the carrier.
    pub async fn establish(io: impl ByteStream) -> Result<(Self, Driver), TunnelError> {
        Self::establish_with(io, Settings::default()).await
    }

    /// As [`Tunnel::establish`] with other limits.
    pub async fn establish_with(
        io: impl ByteStream,
        settings: Settings,
    ) -> Result<(Self, Driver), TunnelError> {
        let link = Link::new(settings);
        let wire = Wire::new(io, &link);
        let (requests, mut connection) = client_builder(&link.settings).handshake(wire).await?;
        let ping_pong = connection.ping_pong().expect("taken once");
        let pulse = Pulse::new(
            Role::Client,
            ping_pong,
            &link.settings,
            Arc::clone(&link.meter),
            Arc::clone(&link.holds),
        );
        let (state_tx, state) = watch::channel(None);
        let inner = Box::pin(drive(
            connection,
            pulse,
            requests.clone(),
            StateSender(state_tx),
        ));
        let mut driver = Driver { inner };
        let tunnel = Self {
            requests,
            link,
            state,
        };
        tunnel.answered(&mut driver).await?;
        Ok((tunnel, driver))
    }

    /// Drives the connection until the first pong.
    async fn answered(&self, driver: &mut Driver) -> Result<(), TunnelError> {
        poll_fn(|cx| match Pin::new(&mut *driver).poll(cx) {
            Poll::Ready(_) if self.link.meter.turned_away() => {
                Poll::Ready(Err(TunnelError::NotAdmitted))
            }
            Poll::Ready(ended) => Poll::Ready(Err(ended.err().unwrap_or(TunnelError::GoingAway))),
            Poll::Pending if self.round_trip().is_some() => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    /// Opens a TCP flow; returns when the peer's dial has succeeded. Dropping the future cancels the dial.
    pub async fn connect(&self, target: &Target) -> Result<Flow, OpenError> {
        let uri = Uri::builder()
            .authority(target.to_string())
            .build()
            .map_err(unusable)?;
        let (body, stream) = self.open(request(Method::CONNECT, uri)).await?;
        Ok(Flow::new(stream, body, Arc::clone(&self.link)))
    }

    /// Opens a UDP flow; returns when the peer has a socket for it. Dropping the future cancels that.
    pub async fn associate(&self, target: &Target) -> Result<DatagramFlow, OpenError> {
        let mut request = request(Method::CONNECT, uri(&datagram::to_path(target))?);
        request
            .extensions_mut()
            .insert(Protocol::from_static("connect-udp"));
        request
            .headers_mut()
            .insert("capsule-protocol", HeaderValue::from_static("?1"));
        if !self.requests.is_extended_connect_protocol_enabled() {
            return Err(OpenError::Answer("it does not offer UDP (RFC 9298)".into()));
        }
        let (body, stream) = self.open(request).await?;
        Ok(DatagramFlow::new(stream, body, Arc::clone(&self.link)))
    }

    /// Waits for the next inbound flow on a stream posted for it. As many flows as calls wait at a time can arrive at
    /// once, so a workstation keeps a handful waiting and calls again as soon as one returns. Dropping the future takes
    /// the posted stream back.
    ///
    /// [`OpenError::Reset`] says that the serving side gave the stream back; ask again after a pause, unless the
    /// connection [is closed](Self::is_closed).
    pub async fn accept(&self) -> Result<Incoming, OpenError> {
        let (response, stream) = self.send(request(Method::POST, uri(ACCEPT_PATH)?)).await?;
        let answer = self.explain(response.await)?;
        let (head, body) = answer.into_parts();
        match head.status.is_success() {
            true => Incoming::new(&head.headers, body, stream, self.clone()),
            false => Err(OpenError::Answer(format!(
                "status {} to a posted stream",
                head.status.as_u16()
            ))),
        }
    }

    /// Asks one DNS question in wire format (RFC 8484) and returns the answer in wire format.
    pub async fn dns_query(&self, message: Bytes) -> Result<Bytes, OpenError> {
        let mut request = request(Method::POST, uri("/dns-query")?);
        request
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static(DNS_MESSAGE));
        let response = self.exchange(request, message, DNS_MESSAGE_MAX).await?;
        match response.status() {
            StatusCode::OK => Ok(response.into_body()),
            status => Err(OpenError::Answer(format!(
                "status {} to a DNS question",
                status.as_u16()
            ))),
        }
    }

    /// One request on `/v1/…`, with any status as its answer. The answer's body is at most 4 MiB.
    pub async fn control(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Bytes>, OpenError> {
        self.exchange(request(method, uri(path)?), body, CONTROL_RESPONSE_MAX)
            .await
    }

    /// The round trip of the last ping.
    pub fn round_trip(&self) -> Option<Duration> {
        self.link.meter.round_trip()
    }

    /// Waits until the connection has ended or takes no new flows. Cancel safe.
    pub async fn closed(&self) {
        let mut state = self.state.clone();
        // An error means that the driver is gone, which is an end too.
        let _ = state.wait_for(Option::is_some).await;
    }

    /// Whether the connection has ended or takes no new flows.
    pub fn is_closed(&self) -> bool {
        self.why_closed().is_some()
    }

    /// Why it is closed, if it is.
    pub fn why_closed(&self) -> Option<TunnelError> {
        let known = self.state.borrow().clone();
        known.or_else(|| {
            self.state
                .has_changed()
                .is_err()
                .then_some(TunnelError::Closed)
        })
    }

    /// How often nothing was heard of the peer for a while.
    pub(crate) fn gaps(&self) -> u64 {
        self.link.meter.gaps()
    }

    /// What its flows share.
    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// What it carried so far.
    pub fn traffic(&self) -> Traffic {
        let meter = &self.link.meter;
        Traffic {
            flows: meter.flows(),
            bytes_up: meter.sent(),
            bytes_down: meter.received(),
        }
    }

    /// Opens a stream that is a flow: any 2xx is success (RFC 9110 §9.3.6).
    async fn open(
        &self,
        request: Request<()>,
    ) -> Result<(RecvStream, SendStream<Frame>), OpenError> {
        let (response, stream) = self.send(request).await?;
        let (head, body) = self.explain(response.await)?.into_parts();
        match head.status.is_success() {
            true => Ok((body, stream)),
            false => Err(DialError::from_response(head.status, &head.headers).into()),
        }
    }

    async fn exchange(
        &self,
        request: Request<()>,
        body: Bytes,
        max: usize,
    ) -> Result<Response<Bytes>, OpenError> {
        let (response, stream) = self.send(request).await?;
        let mut sender = FlowSender::new(stream, Arc::clone(&self.link));
        let mut response = pin!(response);
        let early = {
            let mut sending = pin!(sender.send_last(body));
            // A peer may answer before it has read everything, and then it reads no more.
            tokio::select! {
                biased;
                answer = &mut response => Some(answer),
                _ = &mut sending => None,
            }
        };
        let answer = match early {
            Some(answer) => answer,
            None => response.await,
        };
        let (head, body) = self.explain(answer)?.into_parts();
        let body = body::collect(body, max)
            .await
            .map_err(|error| match error {
                BodyError::TooLarge => OpenError::Answer(format!("more than {max} bytes")),
                BodyError::Stream(error) => error.into(),
            })?;
        Ok(Response::from_parts(head, body))
    }

    async fn send(
        &self,
        request: Request<()>,
    ) -> Result<(ResponseFuture, SendStream<Frame>), OpenError> {
        if let Some(error) = self.why_closed() {
            return Err(error.into());
        }
        let mut requests = self.explain(self.requests.clone().ready().await)?;
        self.explain(requests.send_request(request, false))
    }

    /// h2 names the first thing that noticed; the driver knows the cause.
    fn explain<T>(&self, result: Result<T, h2::Error>) -> Result<T, OpenError> {
        result.map_err(|error| match (error.is_reset(), self.why_closed()) {
            (false, Some(cause)) => cause.into(),
            (true, _) | (false, None) => error.into(),
        })
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl Future for Driver {
    type Output = Result<(), TunnelError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.inner.as_mut().poll(cx)
    }
}

pub(crate) const DNS_MESSAGE: &str = "application/dns-message";

fn request(method: Method, uri: Uri) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    request
}

/// HTTP/2 demands a scheme and an authority; the pinned key already says whom we speak to.
fn uri(path: &str) -> Result<Uri, OpenError> {
    Uri::builder()
        .scheme("https")
        .authority("tp")
        .path_and_query(path)
        .build()
        .map_err(unusable)
}

fn unusable(error: http::Error) -> OpenError {
    OpenError::Answer(format!("this request cannot be written: {error}"))
}

/// Says `Closed` when the driver is dropped before the connection ended.
struct StateSender(watch::Sender<State>);

impl StateSender {
    fn set(&self, error: TunnelError) {
        self.0.send_if_modified(|state| {
            let first = state.is_none();
            state.get_or_insert(error);
            first
        });
    }
}

impl Drop for StateSender {
    fn drop(&mut self) {
        self.set(TunnelError::Closed);
    }
}

async fn drive<IO: ByteStream>(
    mut connection: Connection<Wire<IO>, Frame>,
    mut pulse: Pulse,
    mut probe: SendRequest<Frame>,
    state: StateSender,
) -> Result<(), TunnelError> {
    let ended = poll_fn(|cx| {
        if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
            return Poll::Ready(ended.map_err(TunnelError::from));
        }
        if let Err(error) = pulse.poll(cx, &mut connection) {
            return Poll::Ready(Err(error));
        }
        // After a GOAWAY old flows go on, but new ones need another connection.
        if let Poll::Ready(Err(error)) = probe.poll_ready(cx) {
            state.set(error.into());
        }
        Poll::Pending
    })
    .await;
    state.set(
        ended
            .as_ref()
            .err()
            .cloned()
            .unwrap_or(TunnelError::GoingAway),
    );
    ended
}
