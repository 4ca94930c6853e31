//! The tunnel's port: accept, prove the key, ask the gate, serve.
//!
//! A stranger costs one task and one descriptor for at most ten seconds, and never reaches the HTTP parser: the TLS
//! handshake shows the key, the gate says whose it is, and only then is the first HTTP byte read. It knows nothing of
//! Sessions or Kubernetes.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tp_tunnel::carrier::tls::{ServerTls, accept_tls};
use tp_tunnel::server::{Service, serve as serve_tunnel};
use tp_tunnel::{Identity, KeyHash};

use crate::metrics::Metrics;

/// Decides who a key belongs to.
pub trait Gate: Send + Sync + 'static {
    /// Admits a key or says why not, for the log. May wait for news; the caller bounds it.
    fn admit(&self, key: KeyHash) -> BoxFuture<'_, Result<Admitted, String>>;
}

/// A peer that may speak HTTP.
pub struct Admitted {
    /// Who it is, for the log.
    pub who: String,
    /// What it may do.
    pub service: Arc<dyn Service>,
    /// Resolves with a reason when the right to be connected ends; the connection is then cut at once.
    pub ended: BoxFuture<'static, String>,
}

/// What a listener needs.
pub struct Listener {
    /// Bound socket.
    pub socket: TcpListener,
    /// The manager's key.
    pub identity: Identity,
    /// Who may come in.
    pub gate: Arc<dyn Gate>,
    /// Where to count.
    pub metrics: Arc<Metrics>,
    /// Strangers at a time; with one more the oldest is dropped.
    pub most_strangers: usize,
    /// How long open flows may go on after shutdown.
    pub drain: Duration,
}

/// Strangers at a time.
pub const MOST_STRANGERS: usize = 256;

/// How long open flows may go on after SIGTERM; shorter than the pod's termination grace period.
pub const DRAIN: Duration = Duration::from_secs(30);

/// From accept to the gate's decision.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// Accepts until `shutdown`, then lets open flows end for [`Listener::drain`] and resets what is left.
pub async fn serve(listener: Listener, shutdown: impl Future<Output = ()>) {
    let (stop_tx, stop_rx) = watch::channel(false);
    let shared = Arc::new(Shared {
        identity: listener.identity,
        gate: listener.gate,
        metrics: listener.metrics,
        strangers: Strangers::new(listener.most_strangers),
        stop: stop_rx,
    });
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.socket.accept() => match accepted {
                Ok((stream, peer)) => {
                    connections.spawn(Arc::clone(&shared).connection(stream, peer));
                }
                Err(error) => rest_after(&error).await,
            },
            Some(ended) = connections.join_next(), if !connections.is_empty() => report_panic(ended),
        }
    }
    drop(listener.socket);
    stop_tx.send_replace(true);
    let drained = tokio::time::timeout(listener.drain, async {
        while let Some(ended) = connections.join_next().await {
            report_panic(ended);
        }
    });
    if drained.await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "drain is over, resetting what is left"
        );
    }
}

/// Out of descriptors, `accept` fails at once and for as long as they are: without a rest it would spin.
async fn rest_after(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task ended abnormally");
    }
}

struct Shared {
    identity: Identity,
    gate: Arc<dyn Gate>,
    metrics: Arc<Metrics>,
    strangers: Strangers,
    stop: watch::Receiver<bool>,
}

impl Shared {
    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        if let Err(error) = tp_tunnel::carrier::tune(&stream) {
            tracing::debug!(%peer, %error, "cannot set socket options");
        }
        let (place, pushed_out) = self.strangers.enter();
        let introduced = tokio::select! {
            introduced = tokio::time::timeout(INTRODUCTION, self.introduce(stream)) => {
                introduced.unwrap_or_else(|_| Err("no admission within 10 s".to_owned()))
            }
            _ = pushed_out => Err("too many unauthenticated connections, this was the oldest".to_owned()),
            () = stopped(self.stop.clone()) => Err("the manager is shutting down".to_owned()),
        };
        self.strangers.leave(place);
        match introduced {
            Ok((stream, admitted)) => self.serve(stream, peer, admitted).await,
            Err(reason) => {
                self.metrics.refused_peer();
                tracing::warn!(%peer, reason, "peer refused");
            }
        }
    }

    async fn introduce(
        &self,
        stream: TcpStream,
    ) -> Result<(ServerTls<TcpStream>, Admitted), String> {
        let (stream, key) = accept_tls(stream, &self.identity)
            .await
            .map_err(|error| chain(&error))?;
        match self.gate.admit(key).await {
            Ok(admitted) => Ok((stream, admitted)),
            Err(reason) => {
                turn_away(stream).await;
                Err(format!("{key}: {reason}"))
            }
        }
    }

    async fn serve(&self, stream: ServerTls<TcpStream>, peer: SocketAddr, admitted: Admitted) {
        let Admitted {
            who,
            service,
            ended,
        } = admitted;
        let _open = self.metrics.admitted();
        tracing::info!(%peer, who, "connected");
        let serving = serve_tunnel(stream, service, stopped(self.stop.clone()));
        let reason = tokio::select! {
            outcome = serving => match outcome {
                Ok(()) => "closed".to_owned(),
                Err(error) => chain(&error),
            },
            reason = ended => reason,
        };
        tracing::info!(%peer, who, reason, "disconnected");
    }
}

/// How long a peer that is turned away may take to hear of it, and how much of what it says is thrown away meanwhile.
const FAREWELL: (Duration, u64) = (Duration::from_secs(1), 64 * 1024);

/// Ends TLS in good order, so that the peer can tell a refusal from a cut. What it has sent is taken off the socket
/// unread and undecrypted: closing over it would be a reset, which overtakes the farewell.
async fn turn_away(mut stream: ServerTls<TcpStream>) {
    let (patience, most) = FAREWELL;
    let farewell = async {
        stream.shutdown().await?;
        let (socket, _) = stream.get_mut();
        tokio::io::copy(&mut socket.take(most), &mut tokio::io::sink()).await
    };
    // The peer may be gone, or may not listen: then there is nobody to tell.
    let _ = tokio::time::timeout(patience, farewell).await;
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the listener is gone, which is a stop too.
    let _ = stop.wait_for(|stopped| *stopped).await;
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Who is connected and not yet known. Bounded, first in first out.
struct Strangers {
    most: usize,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    last: u64,
    waiting: VecDeque<Stranger>,
}

/// Dropping it tells the stranger's task that the place is lost.
struct Stranger {
    place: u64,
    _place_lost: oneshot::Sender<()>,
}

impl Strangers {
    fn new(most: usize) -> Self {
        Self {
            most,
            queue: Mutex::default(),
        }
    }

    /// Takes a place, the oldest stranger's if there is none left. The receiver resolves when the place is lost.
    fn enter(&self) -> (u64, oneshot::Receiver<()>) {
        let (tx, rx) = oneshot::channel();
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.last += 1;
        let place = queue.last;
        if queue.waiting.len() >= self.most {
            queue.waiting.pop_front();
        }
        queue.waiting.push_back(Stranger {
            place,
            _place_lost: tx,
        });
        (place, rx)
    }

    fn leave(&self, place: u64) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.waiting.retain(|stranger| stranger.place != place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_stranger_makes_room() {
        let strangers = Strangers::new(2);
        let (_, first) = strangers.enter();
        let (second, mut second_out) = strangers.enter();
        assert!(second_out.try_recv().is_err());

        let (_, mut third_out) = strangers.enter();

        assert!(first.await.is_err(), "pushed out");
        strangers.leave(second);
        strangers.enter();
        assert!(
            matches!(
                third_out.try_recv(),
                Err(oneshot::error::TryRecvError::Empty)
            ),
            "there was room"
        );
    }
}
