//! The side that clients connect to: what does a connection speak, and who parses it.

pub mod detect;
pub mod http1;
mod http2;
mod opaque;
pub(crate) mod tls;
mod unparsed;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tp_tunnel::{Flow, NotOpened, Workstation};

use crate::book::{Book, Live, Port};
use crate::budget::Budget;
use crate::heartbeat::Parent;
use crate::passing::Passing;
use crate::route::{Need, Via, need};
use crate::sightings::Sightings;
use crate::socket::Socket;
use crate::upstream::{Dialing, READ, dial, reset_on_close};
use detect::{Protocol, detect};
use unparsed::Unparsed;

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
    /// Whom requests of theirs are told.
    pub sightings: Arc<Sightings>,
    /// Who changes the packet filter; `None` where nobody redirects.
    pub parent: Option<Parent>,
    /// The pod's address, as the manager found it.
    pub own: OnceLock<IpAddr>,
    /// Where nobody redirects, what is passed on because nobody intercepts its port.
    pub passing: Passing,
    /// Connections are to end: what is idle at once, what is under way after its answer.
    pub stop: watch::Receiver<bool>,
}

/// Resolves when connections are to end. Cancel safe.
pub(crate) async fn stopping(stop: &mut watch::Receiver<bool>) {
    // An error means that the worker is gone, which is a stop too.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Where a connection came from and where it wanted to go.
#[derive(Clone, Debug)]
pub struct Place {
    /// Who connected.
    pub peer: SocketAddr,
    /// Port that it connected to.
    pub listen: u16,
    /// The application's address.
    pub app: SocketAddr,
    /// How the application is spoken to, where TLS was ended.
    inside: Option<Arc<tls::Inside>>,
}

impl Place {
    /// Of a connection as it came.
    pub fn new(peer: SocketAddr, listen: u16, app: SocketAddr) -> Self {
        Self {
            peer,
            listen,
            app,
            inside: None,
        }
    }

    fn decrypted(&self, inside: tls::Inside) -> Self {
        let inside = Some(Arc::new(inside));
        Self {
            inside,
            ..self.clone()
        }
    }

    /// What its bytes are inside of, once they are parsed.
    pub(crate) fn via(&self) -> Via {
        match &self.inside {
            Some(inside) => Via::Decrypted(inside.key),
            None => Via::Plain,
        }
    }

    /// Another connection to the application, of the same kind.
    pub(crate) async fn dial(&self) -> io::Result<Socket> {
        match &self.inside {
            Some(inside) => inside.connect(self.app).await,
            None => dial(self.app).await.map(Socket::Tcp),
        }
    }
}

/// Serves one connection to its end.
pub async fn connection(client: TcpStream, mut place: Place, shared: Arc<Shared>) {
    // Answers leave at once, as they left the application.
    let _ = client.set_nodelay(true);
    let port = shared.book.port(place.listen);
    if let Some(port) = &port {
        place.app.set_port(port.app);
    }
    let whole = |client| Unparsed {
        client: Socket::Tcp(client),
        place: place.clone(),
        app: None,
        bytes: BytesMut::new(),
    };
    match need(port.as_deref()) {
        Need::App => {
            let work = whole(client).pass_to_app();
            match shared.parent {
                Some(_) => work.await,
                None => shared.passing.pass(place.listen, place.peer, work).await,
            }
        }
        Need::Mine(live) => whole(client).pass_to(live).await,
        Need::Protocol => match first_bytes(&client, &place).await {
            Ok(first) => parsed(client, first, place, port, shared).await,
            Err(_) => reset_on_close(&client),
        },
    }
}

/// A connection whose first bytes are known.
async fn parsed(
    client: TcpStream,
    first: First,
    place: Place,
    port: Option<Arc<Port<Workstation>>>,
    shared: Arc<Shared>,
) {
    let opens = port.as_deref().filter(|port| tls::is_wanted(port));
    match (first.speaks, opens) {
        (Protocol::Tls, Some(opens)) => match shared.budget.take(tls::CHARGE) {
            Some(_share) => match tls::open(client, first.bytes, first.app, &place, opens).await {
                tls::Opened::Decrypted { client, app, place } => {
                    decrypted(client, app, place, shared).await;
                }
                tls::Opened::Sealed(client, bytes) => {
                    let unparsed = Unparsed {
                        client: Socket::Tcp(client),
                        place,
                        app: None,
                        bytes,
                    };
                    unparsed.pass_on(port, Via::Sealed).await;
                }
                tls::Opened::Lost => {}
            },
            None => {
                let unparsed = first.unparsed(Socket::Tcp(client), place);
                unparsed.pass_on(port, Via::Sealed).await;
            }
        },
        (Protocol::Tls, None) => {
            let unparsed = first.unparsed(Socket::Tcp(client), place);
            unparsed.pass_on(port, Via::Sealed).await;
        }
        (Protocol::Http1 | Protocol::Http2 | Protocol::Opaque, _) => {
            readable(Socket::Tcp(client), first, place, port, shared).await;
        }
    }
}

/// A connection of which the agent has ended TLS.
async fn decrypted(mut client: Socket, app: Option<Dialing>, place: Place, shared: Arc<Shared>) {
    let protocol = place
        .inside
        .as_ref()
        .map(|inside| inside.protocol.as_deref());
    let (speaks, bytes) = match protocol.flatten() {
        Some(b"h2") => (Protocol::Http2, BytesMut::new()),
        Some(b"http/1.1" | b"http/1.0") => (Protocol::Http1, BytesMut::new()),
        Some(_) => (Protocol::Opaque, BytesMut::new()),
        None => match first_decrypted(&mut client).await {
            Ok(first) => first,
            Err(_) => return client.reset_on_close(),
        },
    };
    let first = First { app, bytes, speaks };
    let port = shared.book.port(place.listen);
    readable(client, first, place, port, shared).await;
}

/// A connection whose bytes can be read.
async fn readable(
    client: Socket,
    first: First,
    place: Place,
    port: Option<Arc<Port<Workstation>>>,
    shared: Arc<Shared>,
) {
    let via = place.via();
    match first.speaks {
        Protocol::Http1 => http1::serve(client, first.bytes, first.app, place, &shared).await,
        Protocol::Http2 => match shared.budget.take(http2::CHARGE) {
            Some(_share) => {
                http2::serve(client, first.bytes, first.app, place, Arc::clone(&shared)).await;
            }
            None => first.unparsed(client, place).pass_to_app().await,
        },
        // TLS inside of TLS is nobody's to open.
        Protocol::Tls | Protocol::Opaque => {
            first.unparsed(client, place).pass_on(port, via).await;
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
async fn first_bytes(client: &TcpStream, place: &Place) -> io::Result<First> {
    let mut bytes = BytesMut::new();
    let deadline = tokio::time::sleep(DETECTION);
    tokio::pin!(deadline);
    let address = place.app;
    let mut dialing: Option<Dialing> =
        Some(Box::pin(
            async move { dial(address).await.map(Socket::Tcp) },
        ));
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

/// The same of what was decrypted. Nobody speaks first here that a client of HTTP would have to hear.
async fn first_decrypted(client: &mut Socket) -> io::Result<(Protocol, BytesMut)> {
    let mut bytes = BytesMut::new();
    let reading = async {
        loop {
            if client.read_buf(&mut bytes).await? == 0 {
                return Ok(Protocol::Opaque);
            }
            if let Some(speaks) = detect(&bytes) {
                return io::Result::Ok(speaks);
            }
        }
    };
    let speaks = tokio::time::timeout(DETECTION, reading).await;
    Ok((speaks.unwrap_or(Ok(Protocol::Opaque))?, bytes))
}

async fn dialed(dialing: Option<&mut Dialing>) -> io::Result<Socket> {
    match dialing {
        Some(dialing) => dialing.await,
        None => std::future::pending().await,
    }
}

/// Resolves when the application has said something, or ended.
async fn speaks_first(app: Option<&Socket>) -> bool {
    let Some(Socket::Tcp(app)) = app else {
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

impl First {
    fn unparsed(self, client: Socket, place: Place) -> Unparsed {
        let Self { app, bytes, .. } = self;
        Unparsed {
            client,
            place,
            app,
            bytes,
        }
    }
}

/// Offers a flow to a workstation. Nothing of the request has been sent before this returns.
pub(crate) async fn open(live: &Live<Workstation>, peer: SocketAddr) -> Result<Flow, NotOpened> {
    let opened = live.workstation.open(&live.route.id, peer).await;
    if let Err(error) = &opened {
        tracing::debug!(intercept = live.route.id, %error, "not opened");
    }
    opened
}
