//! The process that parses traffic. It has no capability and listens on few ports; what it is told, it is told by the
//! manager.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tp_tunnel::{Identity, KeyHash};

use crate::book::Book;
use crate::budget::{Budget, Share};
use crate::datagrams::Sockets;
use crate::front::{self, Place, Shared, stopping};
use crate::heartbeat::{Parent, Ports, Word};
use crate::passing::Passing;
use crate::workstation;

/// How often the worker tells its parent that it works.
pub const HEARTBEAT: Duration = Duration::from_millis(500);

/// How long new connections are taken after a stop. Nothing more is redirected then, but what the kernel has accepted, or
/// has half accepted, would be reset with the socket; it sends its answer to a lost SYN again after a second.
const LAST_CALL: Duration = Duration::from_secs(1);

/// How long open connections may go on after that.
const DRAIN: Duration = Duration::from_secs(20);

/// Managers that speak at a time; more are strangers trying keys.
const MANAGERS_MAX: usize = 64;

/// What a worker listens on.
#[derive(Debug)]
pub struct Listeners {
    /// Connections of the application's clients.
    pub inbound: Vec<Inbound>,
    /// The manager.
    pub control: TcpListener,
}

/// A port where clients of the application arrive.
#[derive(Debug)]
pub struct Inbound {
    /// Bound socket.
    pub socket: TcpListener,
    /// Where its connections wanted to go.
    pub destination: Destination,
}

/// How a connection's destination is found.
#[derive(Clone, Copy, Debug)]
pub enum Destination {
    /// The kernel redirected it and remembers.
    Redirected,
    /// They connected to the agent on purpose, which stands for this application.
    App(SocketAddr),
    /// The same, and the application is this port of the address that they connected to.
    Beside(u16),
}

/// All that a worker is told when it starts.
#[derive(Debug)]
pub struct Worker {
    /// Where it listens.
    pub listeners: Listeners,
    /// Its key; the manager expects it.
    pub identity: Identity,
    /// The only key that may push routes.
    pub manager: KeyHash,
    /// How long pushed routes hold.
    pub lease: Duration,
    /// Who changes the packet filter, and what it is asked for; `None` where nobody redirects.
    pub parent: Option<(Parent, mpsc::Receiver<Word>)>,
}

/// Serves until `shutdown`, then lets connections end for a while. `say` is told the ports that want traffic, twice a
/// second and whenever they change, and what is to be closed.
pub async fn serve(
    worker: Worker,
    mut say: impl FnMut(&Word) -> io::Result<()>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let Worker {
        listeners,
        identity,
        manager,
        lease,
        parent,
    } = worker;
    let (parent, mut wishes) = parent.unzip();
    let (stop_tx, stop) = watch::channel(false);
    let shared = Arc::new(Shared {
        book: Book::new(lease),
        budget: Budget::default(),
        changed: Notify::new(),
        sightings: Arc::default(),
        parent,
        passing: Passing::default(),
        stop: stop.clone(),
        own: OnceLock::new(),
    });
    let mut accepting = JoinSet::new();
    for inbound in listeners.inbound {
        accepting.spawn(accept_inbound(inbound, Arc::clone(&shared), stop.clone()));
    }
    accepting.spawn(accept_managers(
        listeners.control,
        identity,
        manager,
        Arc::clone(&shared),
        stop,
    ));
    let mut datagrams = Sockets::default();
    let mut ticks = tokio::time::interval(HEARTBEAT);
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            () = shared.changed.notified() => say(&wanted(&shared, &mut datagrams))?,
            wish = next_wish(wishes.as_mut()) => say(&wish)?,
            _ = ticks.tick() => {
                shared.book.expire(Instant::now());
                say(&wanted(&shared, &mut datagrams))?;
            }
            Some(ended) = accepting.join_next() => report_panic(ended),
        }
    }
    // Nothing new from the kernel, then the end of what is there.
    say(&Word::Live(Ports::default()))?;
    stop_tx.send_replace(true);
    while let Some(ended) = accepting.join_next().await {
        report_panic(ended);
    }
    Ok(())
}

/// The ports whose new connections and datagrams are to come here.
fn wanted(shared: &Arc<Shared>, datagrams: &mut Sockets) -> Word {
    if let Some(parent) = &shared.parent {
        parent.begin_word();
    }
    Word::Live(match shared.budget.is_strained() {
        // They go to the application by themselves then.
        true => Ports::default(),
        false => Ports {
            tcp: shared.book.ports(),
            udp: datagrams.follow(shared),
        },
    })
}

async fn next_wish(wishes: Option<&mut mpsc::Receiver<Word>>) -> Word {
    let next = match wishes {
        Some(wishes) => wishes.recv().await,
        None => None,
    };
    match next {
        Some(wish) => wish,
        // Nobody asks any more.
        None => std::future::pending().await,
    }
}

async fn accept_inbound(inbound: Inbound, shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
    let own = inbound.socket.local_addr();
    let mut connections = JoinSet::new();
    let last_call = async {
        stopping(&mut stop).await;
        tokio::time::sleep(LAST_CALL).await;
    };
    tokio::pin!(last_call);
    loop {
        tokio::select! {
            () = &mut last_call => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => report_panic(ended),
            accepted = accept(&inbound.socket, &shared) => {
                let Some((tcp, peer, share)) = accepted else { continue };
                match place(&tcp, peer, inbound.destination, own.as_ref().ok()) {
                    Ok(place) => {
                        let serving = front::connection(tcp, place, Arc::clone(&shared));
                        connections.spawn(async move {
                            let _share = share;
                            serving.await;
                        });
                    }
                    Err(error) => tracing::debug!(%peer, %error, "connection refused"),
                }
            }
        }
    }
    drop(inbound.socket);
    let drained = async {
        while let Some(ended) = connections.join_next().await {
            report_panic(ended);
        }
    };
    // What is left is reset.
    let _ = tokio::time::timeout(DRAIN, drained).await;
}

/// The next connection that there is a place for; others wait in the kernel.
async fn accept(socket: &TcpListener, shared: &Shared) -> Option<(TcpStream, SocketAddr, Share)> {
    match socket.accept().await {
        Ok((tcp, peer)) => match shared.budget.connection() {
            Some(share) => Some((tcp, peer, share)),
            None => {
                crate::upstream::reset_on_close(&tcp);
                None
            }
        },
        Err(error) => {
            tracing::warn!(%error, "cannot accept a connection");
            // Out of descriptors, it fails at once and for as long as they are.
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

fn place(
    tcp: &TcpStream,
    peer: SocketAddr,
    destination: Destination,
    own: Option<&SocketAddr>,
) -> io::Result<Place> {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    match destination {
        Destination::App(app) => Ok(Place::new(peer, tcp.local_addr()?.port(), app)),
        Destination::Beside(port) => {
            let own = tcp.local_addr()?;
            let app = SocketAddr::new(own.ip().to_canonical(), port);
            Ok(Place::new(peer, own.port(), app))
        }
        Destination::Redirected => {
            let app = original_destination(tcp)?;
            // Nobody redirected it: to dial it would be to dial ourselves, for ever.
            if own.is_none_or(|own| own.port() == app.port()) {
                return Err(io::Error::other("it was not redirected"));
            }
            Ok(Place::new(peer, app.port(), app))
        }
    }
}

/// Where a redirected connection wanted to go (`SO_ORIGINAL_DST`).
fn original_destination(tcp: &TcpStream) -> io::Result<SocketAddr> {
    let is_v4 = matches!(tcp.peer_addr()?.ip().to_canonical(), IpAddr::V4(_));
    Ok(match is_v4 {
        true => rustix::net::sockopt::ip_original_dst(tcp)?.into(),
        false => rustix::net::sockopt::ipv6_original_dst(tcp)?.into(),
    })
}

async fn accept_managers(
    socket: TcpListener,
    identity: Identity,
    manager: KeyHash,
    shared: Arc<Shared>,
    mut stop: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let (drain, stopped) = oneshot::channel::<()>();
    let stopped = futures::FutureExt::shared(async move { drop(stopped.await) });
    loop {
        tokio::select! {
            () = stopping(&mut stop) => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => report_panic(ended),
            accepted = socket.accept(), if connections.len() < MANAGERS_MAX => match accepted {
                Ok((tcp, _)) => {
                    let (identity, shared) = (identity.clone(), Arc::clone(&shared));
                    let stopped = stopped.clone();
                    connections.spawn(async move {
                        workstation::serve(tcp, &identity, manager, shared, stopped).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a manager");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop((socket, drain));
    let drained = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(DRAIN, drained).await;
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task ended abnormally");
    }
}
