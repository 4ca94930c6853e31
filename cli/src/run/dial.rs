//! Opens what a program asked for by address: through the tunnel where it is the cluster's, else from the workstation.
//!
//! A tunnel that is being replaced is waited for. Knows no packets; [`super::bridge`] turns a [`Refusal`] into what the
//! program's TCP or ICMP would have heard.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout, timeout_at};
use tp_tunnel::{
    DatagramFlow, DialError, DialErrorKind, Flow, Host, OpenError, Target, Tunnel,
    set_up_flow_socket,
};

use crate::proxy::split::Route;
use crate::proxy::{Split, Upstream};

/// For a dial, and for waiting until there is a tunnel (design §10).
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Opens flows of one `tp run`.
pub(super) struct Dialer {
    pub(super) upstream: Upstream,
    /// Only the cluster is reached.
    pub(super) offline: bool,
}

/// Where a flow goes.
pub(super) enum Outbound<T, D> {
    Tunnel(T),
    Direct(D),
}

/// Why there is no flow.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The dial failed, here or in the cluster.
    Dial(DialErrorKind),
    /// No tunnel came up in time.
    NoTunnel,
}

impl From<DialError> for Refusal {
    fn from(error: DialError) -> Self {
        Self::Dial(error.kind)
    }
}

impl Dialer {
    /// Opens a TCP flow. Returns once the destination has accepted. Dropping the future cancels the dial.
    pub(super) async fn connect(
        &self,
        target: &Target,
    ) -> Result<Outbound<Flow, TcpStream>, Refusal> {
        match self.way(&target.host)? {
            Way::Tunnel => self
                .through_tunnel(|tunnel| async move { tunnel.connect(target).await }.boxed())
                .await
                .map(Outbound::Tunnel),
            Way::Direct(address) => connect_direct(SocketAddr::new(address, target.port))
                .await
                .map(Outbound::Direct),
        }
    }

    /// Opens a UDP flow.
    pub(super) async fn associate(
        &self,
        target: &Target,
    ) -> Result<Outbound<DatagramFlow, UdpSocket>, Refusal> {
        match self.way(&target.host)? {
            Way::Tunnel => self
                .through_tunnel(|tunnel| async move { tunnel.associate(target).await }.boxed())
                .await
                .map(Outbound::Tunnel),
            Way::Direct(address) => associate_direct(SocketAddr::new(address, target.port))
                .await
                .map(Outbound::Direct),
        }
    }

    /// Which destinations are the cluster's at this moment.
    pub(super) fn split(&self) -> std::sync::Arc<Split> {
        self.upstream.split.borrow().clone()
    }

    /// Whether a program is left to connect by itself.
    pub(super) fn is_outside(&self, host: &Host) -> bool {
        matches!(self.way(host), Ok(Way::Direct(_)))
    }

    /// A name is dialled only where its address alone would not say that it is the cluster's.
    fn way(&self, host: &Host) -> Result<Way, Refusal> {
        match (self.split().route(host), host) {
            (Route::Cluster, _) | (Route::Direct, Host::Name(_)) => Ok(Way::Tunnel),
            (Route::Direct, Host::Ip(_)) if self.offline => {
                Err(Refusal::Dial(DialErrorKind::Forbidden))
            }
            (Route::Direct, Host::Ip(address)) => Ok(Way::Direct(*address)),
            (Route::Refused(_), _) => Err(Refusal::Dial(DialErrorKind::Unreachable)),
        }
    }

    /// Runs `open` on the tunnel in use. When that ends meanwhile nothing has reached the program yet, so the next
    /// tunnel is tried.
    pub(super) async fn through_tunnel<'a, T>(
        &self,
        open: impl Fn(Tunnel) -> BoxFuture<'a, Result<T, OpenError>>,
    ) -> Result<T, Refusal> {
        let mut tunnels = self.upstream.tunnel.clone();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let current = tunnels.borrow_and_update().clone();
            if let Some(tunnel) = current.filter(|tunnel| !tunnel.is_closed()) {
                match timeout(PATIENCE, open(tunnel)).await {
                    Err(_) => return Err(Refusal::Dial(DialErrorKind::TimedOut)),
                    Ok(Ok(opened)) => return Ok(opened),
                    Ok(Err(OpenError::Dial(error))) => return Err(error.into()),
                    Ok(Err(OpenError::Closed(_))) => {}
                    // What is left concerns this one stream.
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "no flow");
                        return Err(Refusal::Dial(DialErrorKind::Unreachable));
                    }
                }
            }
            match timeout_at(deadline, tunnels.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(Refusal::NoTunnel),
            }
        }
    }
}

enum Way {
    Tunnel,
    Direct(IpAddr),
}

async fn connect_direct(address: SocketAddr) -> Result<TcpStream, Refusal> {
    let Ok(dialled) = timeout(PATIENCE, TcpStream::connect(address)).await else {
        return Err(Refusal::Dial(DialErrorKind::TimedOut));
    };
    let stream = dialled.map_err(DialError::from)?;
    set_up_flow_socket(&stream);
    Ok(stream)
}

async fn associate_direct(address: SocketAddr) -> Result<UdpSocket, Refusal> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0; 16], 0).into(),
    };
    let socket = UdpSocket::bind(any).await.map_err(DialError::from)?;
    socket.connect(address).await.map_err(DialError::from)?;
    Ok(socket)
}
