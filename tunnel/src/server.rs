//! The manager's end of a connection.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::net::{TcpStream, UdpSocket};

use crate::carrier::ByteStream;
use crate::error::TunnelError;
use crate::proxy_status::DialError;
use crate::settings::Settings;
use crate::target::Target;

/// What a connection may reach. One value per connection, so it knows whose it is.
pub trait Service: Send + Sync + 'static {
    /// Dials a TCP destination. Dropping the future must cancel the dial.
    fn dial(&self, target: Target) -> BoxFuture<'_, Result<TcpStream, DialError>>;

    /// A UDP socket connected to the destination.
    fn associate(&self, target: Target) -> BoxFuture<'_, Result<UdpSocket, DialError>>;

    /// Answers a DNS message, both in wire format.
    fn resolve(&self, query: Bytes) -> BoxFuture<'_, Bytes>;

    /// Answers a request on `/v1/…`.
    fn control(&self, request: http::Request<Bytes>) -> BoxFuture<'_, http::Response<Bytes>>;
}

/// Serves one connection until the peer or `shutdown` ends it. After `shutdown` nothing new is taken and flows go on;
/// dropping the future resets what is left.
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
    drop((io, service, settings, shutdown));
    Err(TunnelError::Closed)
}
