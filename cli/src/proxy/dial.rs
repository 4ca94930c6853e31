//! Opens what a client asked for: decides by the split, then through the tunnel or from this workstation.
//!
//! Nothing here knows SOCKS or HTTP; a [`Refusal`] carries what both need to answer honestly. A tunnel that is being
//! replaced is waited for, and a flow that its end caught while opening is opened again on the next one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::{HeaderValue, StatusCode};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tp_tunnel::{
    DatagramFlow, DialError, DialErrorKind, Flow, OpenError, Target, Tunnel, set_up_flow_socket,
};

use super::counters::{Counters, Kind, OpenFlow};
use super::direct;
use super::split::{Route, Split};

/// Where flows go. Both ends change while the proxy runs.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// The tunnel in use; `None` while it is being re-established.
    pub tunnel: watch::Receiver<Option<Tunnel>>,
    /// Which destinations are the cluster's.
    pub split: watch::Receiver<Arc<Split>>,
}

/// A TCP flow to the destination.
pub(super) enum Outbound {
    Tunnel(Flow),
    Direct(TcpStream),
}

/// A UDP flow to the destination.
pub(super) enum OutboundUdp {
    Tunnel(DatagramFlow),
    Direct(UdpSocket),
}

/// Why there is no flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The dial failed, here or in the cluster.
    Dial(DialError),
    /// No tunnel came up in time.
    NoTunnel,
}

impl Refusal {
    /// The reply field of RFC 1928 §6.
    pub(super) fn socks_reply(&self) -> u8 {
        match self {
            Self::NoTunnel => 1,
            Self::Dial(error) => match error.kind {
                DialErrorKind::Forbidden => 2,
                DialErrorKind::TimedOut | DialErrorKind::Dns | DialErrorKind::Unreachable => 4,
                DialErrorKind::Refused => 5,
            },
        }
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NoTunnel => StatusCode::SERVICE_UNAVAILABLE,
            Self::Dial(error) => error.kind.status(),
        }
    }

    /// Value of `Proxy-Status` (RFC 9209).
    pub(super) fn proxy_status(&self) -> HeaderValue {
        match self {
            Self::NoTunnel => HeaderValue::from_static(
                "tp; error=destination_unavailable; details=\"the connection to the cluster is being re-established\"",
            ),
            Self::Dial(error) => error.to_header(),
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoTunnel => f.write_str("the connection to the cluster is being re-established"),
            Self::Dial(error) => {
                let what = match error.kind {
                    DialErrorKind::Refused => "connection refused",
                    DialErrorKind::TimedOut => "no answer in time",
                    DialErrorKind::Dns => "name not resolved",
                    DialErrorKind::Unreachable => "unreachable",
                    DialErrorKind::Forbidden => "not allowed",
                };
                write!(f, "{what}: {}", error.detail)
            }
        }
    }
}

impl From<DialError> for Refusal {
    fn from(error: DialError) -> Self {
        Self::Dial(error)
    }
}

/// Opens flows for every connection of one proxy.
#[derive(Debug)]
pub(super) struct Dialer {
    pub(super) upstream: Upstream,
    /// For waiting for a tunnel, and again for the dial itself.
    pub(super) timeout: Duration,
    /// Where the proxy itself listens: flows to it would loop.
    pub(super) own: Vec<SocketAddr>,
    pub(super) counters: Arc<Counters>,
}

impl Dialer {
    /// Opens a TCP flow. Returns only once the destination has accepted. Dropping the future cancels the dial.
    pub(super) async fn connect(
        &self,
        target: &Target,
        kind: Kind,
    ) -> Result<(Outbound, OpenFlow), Refusal> {
        let opened = match self.route(target) {
            Err(refusal) => Err(refusal),
            Ok(Opening::Direct) => self.connect_direct(target).await.map(Outbound::Direct),
            Ok(Opening::Tunnel) => self
                .through_tunnel(|tunnel| async move { tunnel.connect(target).await }.boxed())
                .await
                .map(Outbound::Tunnel),
        };
        self.count(target, kind, opened)
    }

    /// Opens a UDP flow.
    pub(super) async fn associate(
        &self,
        target: &Target,
    ) -> Result<(OutboundUdp, OpenFlow), Refusal> {
        let opened = match self.route(target) {
            Err(refusal) => Err(refusal),
            Ok(Opening::Direct) => associate_direct(target).await.map(OutboundUdp::Direct),
            Ok(Opening::Tunnel) => self
                .through_tunnel(|tunnel| async move { tunnel.associate(target).await }.boxed())
                .await
                .map(OutboundUdp::Tunnel),
        };
        self.count(target, Kind::Udp, opened)
    }

    fn count<T>(
        &self,
        target: &Target,
        kind: Kind,
        opened: Result<T, Refusal>,
    ) -> Result<(T, OpenFlow), Refusal> {
        match opened {
            Ok(flow) => Ok((flow, self.counters.open(kind))),
            Err(refusal) => {
                self.counters.refuse();
                tracing::debug!(%target, %refusal, "no flow");
                Err(refusal)
            }
        }
    }

    fn route(&self, target: &Target) -> Result<Opening, Refusal> {
        if let tp_tunnel::Host::Ip(address) = target.host {
            let address = SocketAddr::new(address.to_canonical(), target.port);
            if self.own.contains(&address) {
                return Err(loops());
            }
        }
        let split = self.upstream.split.borrow().clone();
        match split.route(&target.host) {
            Route::Cluster => Ok(Opening::Tunnel),
            Route::Direct => Ok(Opening::Direct),
            Route::Refused(why) => Err(DialError::new(DialErrorKind::Forbidden, why).into()),
        }
    }

    /// Runs `open` on the tunnel in use. When that ends meanwhile nothing has reached a client yet, so the next
    /// tunnel is tried.
    async fn through_tunnel<'a, T>(
        &self,
        open: impl Fn(Tunnel) -> BoxFuture<'a, Result<T, OpenError>>,
    ) -> Result<T, Refusal> {
        let mut tunnels = self.upstream.tunnel.clone();
        let patience = Instant::now() + self.timeout;
        loop {
            let current = tunnels.borrow_and_update().clone();
            if let Some(tunnel) = current.filter(|tunnel| !tunnel.is_closed()) {
                let deadline = Instant::now() + self.timeout;
                match timeout_at(deadline, open(tunnel)).await {
                    Err(_) => return Err(self.timed_out()),
                    Ok(Ok(flow)) => return Ok(flow),
                    Ok(Err(error)) => refuse_unless_closed(error)?,
                }
            }
            match timeout_at(patience, tunnels.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(Refusal::NoTunnel),
            }
        }
    }

    async fn connect_direct(&self, target: &Target) -> Result<TcpStream, Refusal> {
        let deadline = Instant::now() + self.timeout;
        let Ok(dialled) = timeout_at(deadline, direct::dial(target)).await else {
            return Err(self.timed_out());
        };
        let stream = dialled?;
        if self.is_self(&stream) {
            return Err(loops());
        }
        set_up_flow_socket(&stream);
        Ok(stream)
    }

    /// A proxy on all addresses is reached by each of this machine's; then both ends have the same address.
    fn is_self(&self, stream: &TcpStream) -> bool {
        let (Ok(local), Ok(peer)) = (stream.local_addr(), stream.peer_addr()) else {
            return false;
        };
        local.ip() == peer.ip() && self.own.iter().any(|own| own.port() == peer.port())
    }

    fn timed_out(&self) -> Refusal {
        let detail = format!("nothing answered within {:?}", self.timeout);
        DialError::new(DialErrorKind::TimedOut, detail).into()
    }
}

enum Opening {
    Tunnel,
    Direct,
}

fn loops() -> Refusal {
    DialError::new(DialErrorKind::Forbidden, "this is the proxy itself").into()
}

fn refuse_unless_closed(error: OpenError) -> Result<(), Refusal> {
    match error {
        OpenError::Dial(error) => Err(error.into()),
        OpenError::Closed(_) => Ok(()),
        // What is left, and whatever is added, concerns this one stream.
        error @ (OpenError::Reset(_) | OpenError::Answer(_) | _) => {
            Err(DialError::new(DialErrorKind::Unreachable, error.to_string()).into())
        }
    }
}

async fn associate_direct(target: &Target) -> Result<UdpSocket, Refusal> {
    let addresses = direct::resolve(target).await?;
    let unreachable = |error: std::io::Error| Refusal::Dial(error.into());
    let address = addresses[0];
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0; 16], 0).into(),
    };
    let socket = UdpSocket::bind(any).await.map_err(unreachable)?;
    socket.connect(address).await.map_err(unreachable)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(kind: DialErrorKind) -> Refusal {
        DialError::new(kind, "because").into()
    }

    #[test]
    fn each_refusal_has_its_reply_and_status() {
        let table = [
            (
                refusal(DialErrorKind::Refused),
                5,
                502,
                "connection_refused",
            ),
            (
                refusal(DialErrorKind::TimedOut),
                4,
                504,
                "connection_timeout",
            ),
            (refusal(DialErrorKind::Dns), 4, 502, "dns_error"),
            (
                refusal(DialErrorKind::Unreachable),
                4,
                502,
                "destination_ip_unroutable",
            ),
            (
                refusal(DialErrorKind::Forbidden),
                2,
                403,
                "destination_ip_prohibited",
            ),
            (Refusal::NoTunnel, 1, 503, "destination_unavailable"),
        ];
        for (refusal, reply, status, error) in table {
            assert_eq!(refusal.socks_reply(), reply, "{refusal}");
            assert_eq!(refusal.status(), status, "{refusal}");
            let field = refusal.proxy_status();
            let field = field.to_str().unwrap();
            assert!(
                field.starts_with(&format!("tp; error={error}; details=\"")),
                "{field}"
            );
        }
    }
}
