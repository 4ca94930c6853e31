//! Connections to origins, for absolute-form requests: one client connection keeps at most one of them.
//!
//! The origin's side is hyper's HTTP/1 client over a flow. A kept connection serves only the client connection that
//! opened it, so no client ever sees another's bytes.

use std::sync::Arc;

use http::{Response, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tp_tunnel::{BoxedStream, Target};

use super::super::counters::{Kind, OpenFlow};
use super::super::dial::{Dialer, Outbound, Refusal};
use super::super::flow_io::FlowIo;
use super::body::{self, BodySender, RequestBody};
use super::fields;
use super::head::{FIELDS_MAX, Framing, HEAD_MAX, Head};

/// The origin that the last request went to.
pub(super) struct Origin {
    dialer: Arc<Dialer>,
    kept: Option<Kept>,
    /// Drives the connections; dropped with the client's.
    connections: JoinSet<()>,
}

struct Kept {
    target: Target,
    sender: SendRequest<RequestBody>,
    flow: Arc<OpenFlow>,
}

/// Heads of 1xx responses on their way to the client.
pub(super) type Informational = mpsc::Receiver<Vec<u8>>;

/// Why there is no response.
#[derive(Debug)]
pub(super) enum ForwardError {
    /// The origin was not reached.
    Refused(Refusal),
    /// It broke off or does not speak HTTP.
    Broken(hyper::Error),
}

impl From<Refusal> for ForwardError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// A request that is ready to be sent.
pub(super) struct Exchange<'a> {
    head: &'a Head,
    target: &'a Target,
    path: &'a http::uri::PathAndQuery,
    informational_tx: mpsc::Sender<Vec<u8>>,
    body: Option<RequestBody>,
}

impl<'a> Exchange<'a> {
    /// The exchange, where its body is fed, and where 1xx responses come out.
    pub(super) fn new(
        head: &'a Head,
        target: &'a Target,
        path: &'a http::uri::PathAndQuery,
    ) -> (Self, BodySender, Informational) {
        let (body_tx, body) = body::channel(head.body);
        // An origin rarely sends two; more than fit here are dropped, as RFC 9110 §15.2 allows a proxy to.
        let (informational_tx, informational_rx) = mpsc::channel(4);
        let exchange = Self {
            head,
            target,
            path,
            informational_tx,
            body: Some(body),
        };
        (exchange, body_tx, informational_rx)
    }

    fn request(&self, body: RequestBody) -> http::Request<RequestBody> {
        let mut request = fields::forwarded(self.head, self.target, self.path, body);
        if self.head.http11 {
            let informational_tx = self.informational_tx.clone();
            hyper::ext::on_informational(&mut request, move |response| {
                let _ = informational_tx.try_send(fields::write_head(
                    response.status(),
                    None,
                    response.headers(),
                ));
            });
        }
        request
    }

    /// Whether sending it twice does no harm: nothing is changed by it (RFC 9110 §9.2.2), and its body is not spent.
    fn is_repeatable(&self) -> bool {
        self.head.method.is_safe() && matches!(self.head.body, Framing::None | Framing::Length(0))
    }
}

impl Origin {
    pub(super) fn new(dialer: Arc<Dialer>) -> Self {
        Self {
            dialer,
            kept: None,
            connections: JoinSet::new(),
        }
    }

    /// Sends the request and waits for the head of the response.
    ///
    /// An origin may close a kept connection just as it is used again; then the request goes out once more on a new
    /// one, if not a byte of it was sent or if it is repeatable.
    pub(super) async fn exchange(
        &mut self,
        exchange: &mut Exchange<'_>,
    ) -> Result<Response<Incoming>, ForwardError> {
        let mut body = exchange.body.take().expect("an exchange is sent once");
        if let Some(mut kept) = self.take_kept(exchange.target).await {
            match kept.sender.try_send_request(exchange.request(body)).await {
                Ok(response) => {
                    self.kept = Some(kept);
                    return Ok(response);
                }
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => body = unsent.into_body(),
                    None if exchange.is_repeatable() => body = body::channel(Framing::None).1,
                    None => return Err(ForwardError::Broken(failed.into_error())),
                },
            }
        }
        let mut kept = self.open(exchange.target).await?;
        let sent = kept.sender.send_request(exchange.request(body)).await;
        let response = sent.map_err(ForwardError::Broken)?;
        self.kept = Some(kept);
        Ok(response)
    }

    /// Counts payload of the exchange under way.
    pub(super) fn flow(&self) -> Option<Arc<OpenFlow>> {
        self.kept.as_ref().map(|kept| kept.flow.clone())
    }

    async fn take_kept(&mut self, target: &Target) -> Option<Kept> {
        let mut kept = self.kept.take().filter(|kept| kept.target == *target)?;
        kept.sender.ready().await.ok()?;
        Some(kept)
    }

    async fn open(&mut self, target: &Target) -> Result<Kept, ForwardError> {
        while self.connections.try_join_next().is_some() {}
        let (outbound, flow) = self.dialer.connect(target, Kind::HttpForward).await?;
        let stream: BoxedStream = match outbound {
            Outbound::Tunnel(flow) => Box::new(FlowIo::new(flow)),
            Outbound::Direct(stream) => Box::new(stream),
        };
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_MAX * 2).max_headers(FIELDS_MAX);
        let handshake = builder.handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(ForwardError::Broken)?;
        let flow = Arc::new(flow);
        let open = flow.clone();
        self.connections.spawn(async move {
            // Its error is what the exchange under way reports.
            let _ = connection.with_upgrades().await;
            drop(open);
        });
        Ok(Kept {
            target: target.clone(),
            sender,
            flow,
        })
    }
}

/// Whether the origin switched protocols without being asked.
pub(super) fn is_unasked_upgrade(head: &Head, status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS && !fields::wants_upgrade(head)
}
