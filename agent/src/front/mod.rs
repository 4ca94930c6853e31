//! The side that clients connect to: what does a connection speak, and who parses it.

pub mod detect;
pub mod http1;
mod http2;
mod opaque;
mod prefixed;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tp_tunnel::{Flow, NotOpened, Workstation};

use crate::book::{Book, Live, Port};
use crate::budget::Budget;
use crate::heartbeat::Parent;
use crate::route::{Need, need, unparsed};
use crate::upstream::{Dialing, READ, dial, reset_on_close};
use detect::{Protocol, detect};

/// How long a connection may take to say what it speaks before it is passed on unparsed.
const DETECTION: Duration = Duration::from_secs(2);

/// Response header of a request that a workstation would have had, and the application answered instead.
const FALLBACK: &str = "x-tp-fallback";

/// What all connections share.
#[derive(Debug)]
pub struct Shared {
    /// Whose requests go where.
    pub book: Book<Workstation>,
    /// The memory that traffic may hold.
    pub budget: Budget,
    /// Told when routes were pushed, so that the kernel hears of it at once.
    pub changed: Notify,
    /// Who changes the packet filter; `None` where nobody redirects.
    pub parent: Option<Parent>,
    /// Connections are to end: what is idle at once, what is under way after its answer.
    pub stop: watch::Receiver<bool>,
}

/// Resolves when connections are to end. Cancel safe.
pub(crate) async fn stopping(stop: &mut watch::Receiver<bool>) {
    // An error means that the worker is gone, which is a stop too.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Where a connection came from and where it wanted to go.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Who connected.
    pub peer: SocketAddr,
    /// Port that it connected to.
    pub listen: u16,
    /// The application's address.
    pub app: SocketAddr,
}

/// Serves one connection to its end.
pub async fn connection(client: TcpStream, mut place: Place, shared: Arc<Shared>) {
    // Answers leave at once, as they left the application.
    let _ = client.set_nodelay(true);
    let port = shared.book.port(place.listen);
    if let Some(port) = &port {
        place.app.set_port(port.app);
    }
    match need(port.as_deref()) {
        Need::App => to_app(client, place, None, BytesMut::new()).await,
        Need::Mine(live) => unfiltered(client, place, live, None, BytesMut::new()).await,
        Need::Protocol => {
            let first = match first_bytes(&client, place).await {
                Ok(first) => first,
                Err(_) => return reset_on_close(&client),
            };
            let First { app, bytes, speaks } = first;
            match speaks {
                Protocol::Opaque => unparsed_connection(client, place, port, app, bytes).await,
                Protocol::Http1 => http1::serve(client, bytes, app, place, &shared).await,
                Protocol::Http2 => match shared.budget.take(http2::CHARGE) {
                    Some(_share) => {
                        http2::serve(client, bytes, app, place, Arc::clone(&shared)).await;
                    }
                    None => to_app(client, place, app, bytes).await,
                },
            }
        }
    }
}

/// What is known of a connection before it is parsed.
struct First {
    /// The connection to the application, unless it was refused.
    app: Option<Dialing>,
    /// Read and not yet used.
    bytes: BytesMut,
    speaks: Protocol,
}

/// Waits until the client's first bytes say what it speaks. The application is dialled meanwhile: if it speaks first, the
/// connection is no HTTP, and has not been delayed.
async fn first_bytes(client: &TcpStream, place: Place) -> io::Result<First> {
    let mut bytes = BytesMut::new();
    let deadline = tokio::time::sleep(DETECTION);
    tokio::pin!(deadline);
    let mut dialing: Option<Dialing> = Some(Box::pin(dial(place.app)));
    let mut app = None;
    let speaks = loop {
        tokio::select! {
            biased;
            readable = client.readable() => {
                readable?;
                bytes.reserve(READ);
                match client.try_read_buf(&mut bytes) {
                    Ok(0) => break Protocol::Opaque,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(error) => return Err(error),
                }
                if let Some(speaks) = detect(&bytes) {
                    break speaks;
                }
            }
            result = dialed(dialing.as_mut()) => {
                dialing = None;
                // An intercept may serve while the application is down.
                app = result.ok();
            }
            true = speaks_first(app.as_ref()) => break Protocol::Opaque,
            () = &mut deadline => break Protocol::Opaque,
        }
    };
    let app = match app {
        Some(app) => Some(Box::pin(std::future::ready(Ok(app))) as Dialing),
        None => dialing,
    };
    Ok(First { app, bytes, speaks })
}

async fn dialed(dialing: Option<&mut Dialing>) -> io::Result<TcpStream> {
    match dialing {
        Some(dialing) => dialing.await,
        None => std::future::pending().await,
    }
}

/// Resolves when the application has said something, or ended.
async fn speaks_first(app: Option<&TcpStream>) -> bool {
    let Some(app) = app else {
        return std::future::pending().await;
    };
    loop {
        if app.readable().await.is_err() {
            return true;
        }
        let mut bytes = [0; 9];
        match app.peek(&mut bytes).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Servers of HTTP/2 need not wait for the client's preface (RFC 9113 §3.4).
            Ok(9) if detect::is_settings(&bytes) => return std::future::pending().await,
            Ok(_) | Err(_) => return true,
        }
    }
}

async fn unparsed_connection(
    client: TcpStream,
    place: Place,
    port: Option<Arc<Port<Workstation>>>,
    app: Option<Dialing>,
    bytes: BytesMut,
) {
    match unparsed(port.as_deref()) {
        Some(live) => unfiltered(client, place, live, app, bytes).await,
        None => to_app(client, place, app, bytes).await,
    }
}

/// A whole connection for an intercept that takes everything.
async fn unfiltered(
    client: TcpStream,
    place: Place,
    live: &Live<Workstation>,
    app: Option<Dialing>,
    bytes: BytesMut,
) {
    match open(live, place.peer).await {
        Ok(flow) => opaque::to_workstation(client, flow, bytes.freeze(), Bytes::new()).await,
        Err(_) if live.route.strict => reset_on_close(&client),
        Err(_) => to_app(client, place, app, bytes).await,
    }
}

/// A whole connection for the application. Where it refuses, the client is reset: nobody has answered it.
async fn to_app(client: TcpStream, place: Place, app: Option<Dialing>, bytes: BytesMut) {
    let app = match app {
        Some(app) => app.await,
        None => dial(place.app).await,
    };
    match app {
        Ok(app) => opaque::to_app(client, app, bytes.freeze(), Bytes::new()).await,
        Err(error) => {
            tracing::debug!(app = %place.app, %error, "the application does not answer");
            reset_on_close(&client);
        }
    }
}

/// Offers a flow to a workstation. Nothing of the request has been sent before this returns.
async fn open(live: &Live<Workstation>, peer: SocketAddr) -> Result<Flow, NotOpened> {
    let opened = live.workstation.open(&live.route.id, peer).await;
    if let Err(error) = &opened {
        tracing::debug!(intercept = live.route.id, %error, "not opened");
    }
    opened
}
