//! Telling a workstation which requests were its own, for as long as somebody there watches.
//!
//! The first request of an intercept makes an offer ([`tp_manager_api::sighting`]). Where it is taken, that request and the
//! next ones are told on it; where it is refused, nothing is prepared or told for a while. A request never waits for
//! this: what finds no room is left out.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tp_manager_api::matcher::RequestHead;
use tp_manager_api::sighting::{AnsweredBy, LINE_MAX, OFFER, Sighting};
use tp_tunnel::Workstation;

use crate::book::Live;
use crate::budget::{Budget, Share};

/// Sightings of one intercept that wait to be sent.
const WAITING: usize = 32;

/// How long nobody is asked after a refusal.
const REST: Duration = Duration::from_secs(1);

/// Who is told, by intercept.
#[derive(Debug, Default)]
pub struct Sightings {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    listeners: HashMap<String, Listener>,
    tellers: JoinSet<()>,
}

#[derive(Debug)]
enum Listener {
    /// Asked, or listening.
    There(mpsc::Sender<Bytes>),
    Nobody {
        until: Instant,
    },
}

/// A request that is to be told once it was answered.
#[derive(Debug)]
pub(crate) struct Noted {
    sighting: Sighting,
    since: Instant,
}

impl Noted {
    /// Answered, to the end of the answer.
    pub(crate) fn answered(mut self, by: AnsweredBy, status: Option<u16>) -> Sighting {
        self.sighting.by = by;
        self.sighting.status = status;
        let took = self.since.elapsed().as_millis();
        self.sighting.took_ms = u64::try_from(took).unwrap_or(u64::MAX);
        self.sighting
    }
}

impl Sightings {
    /// Notes a request of the intercept, unless nobody wants to know.
    pub(crate) fn note(&self, id: &str, head: &RequestHead<'_>, peer: SocketAddr) -> Option<Noted> {
        let now = Instant::now();
        if let Some(Listener::Nobody { until }) = self.lock().listeners.get(id)
            && now < *until
        {
            return None;
        }
        let at = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let at = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
        let sighting = Sighting::new(head, peer.ip(), &pod(), at);
        Some(Noted {
            sighting,
            since: now,
        })
    }

    /// Tells the intercept's workstation.
    pub(crate) fn tell(
        self: &Arc<Self>,
        live: &Live<Workstation>,
        peer: SocketAddr,
        sighting: &Sighting,
        budget: &Budget,
    ) {
        let id = live.route.id.as_str();
        let mut inner = self.lock();
        while inner.tellers.try_join_next().is_some() {}
        match inner.listeners.get(id) {
            Some(Listener::There(line_tx)) => {
                // A workstation that does not keep up misses some.
                let _ = line_tx.try_send(sighting.line().into());
                return;
            }
            Some(Listener::Nobody { until }) if Instant::now() < *until => return,
            Some(Listener::Nobody { .. }) | None => {}
        }
        let Some(share) = budget.take(WAITING * LINE_MAX) else {
            return;
        };
        let (line_tx, line_rx) = mpsc::channel(WAITING);
        let _ = line_tx.try_send(sighting.line().into());
        inner
            .listeners
            .insert(id.to_owned(), Listener::There(line_tx));
        // It may outlive everything else for as long as somebody listens.
        let (sightings, live) = (Arc::downgrade(self), live.clone());
        inner.tellers.spawn(async move {
            let _share: Share = share;
            send(&live, peer, line_rx).await;
            if let Some(sightings) = sightings.upgrade() {
                sightings.nobody(live.route.id);
            }
        });
    }

    fn nobody(&self, id: String) {
        let until = Instant::now() + REST;
        let mut inner = self.lock();
        inner
            .listeners
            .retain(|_, listener| !matches!(listener, Listener::Nobody { until: old } if *old + REST < until));
        inner.listeners.insert(id, Listener::Nobody { until });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends lines until the workstation wants no more.
async fn send(live: &Live<Workstation>, peer: SocketAddr, mut lines: mpsc::Receiver<Bytes>) {
    let offer = format!("{OFFER}{}", live.route.id);
    let Ok(mut flow) = live.workstation.open(&offer, peer).await else {
        return;
    };
    loop {
        let line = tokio::select! {
            line = lines.recv() => line,
            // It says nothing, so this is its end.
            _ = flow.recv() => None,
        };
        let Some(line) = line else { return };
        if flow.send(line).await.is_err() {
            return;
        }
    }
}

/// A pod's host name is its name, unless its spec says otherwise.
fn pod() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}
