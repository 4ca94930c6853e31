//! One connection's side of the tunnel: every request is answered for one session, within its reach.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};
use tp_manager_api::cluster_view::Health;
use tp_manager_api::tls::{Handover, handover_of};
use tp_manager_api::{CLUSTER_PATH, ClusterView, HEALTH_PATH};
use tp_tunnel::proxy_status::DialError;
use tp_tunnel::server::{Dialed, Service};
use tp_tunnel::{Target, Workstation};

use crate::dial::{Dialer, Reach};
use crate::intercepts::workstations::Seat;

/// Where the view of a session comes from.
pub trait Views: Send + Sync + 'static {
    /// The view as it is now.
    fn view(&self) -> BoxFuture<'_, ClusterView>;

    /// Resolves when the view may have changed, at the latest after a few seconds.
    fn changed(&self) -> BoxFuture<'_, ()>;
}

/// What a session asks for, answered within `reach`.
pub struct SessionService<R, V> {
    /// Name of the replica, for the end-to-end probe.
    pub replica: Arc<str>,
    /// Shared by all sessions.
    pub dialer: Arc<Dialer>,
    /// What this session may reach.
    pub reach: Arc<R>,
    /// What this session may see.
    pub views: V,
    /// Where inbound flows of its intercepts come from, if there are any.
    pub seat: Option<Seat>,
}

impl<R: Reach, V: Views> Service for SessionService<R, V> {
    fn dial(&self, target: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        Box::pin(async move { self.dialer.connect(&target, &*self.reach).await })
    }

    fn associate(&self, target: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        Box::pin(async move { self.dialer.associate(&target, &*self.reach).await })
    }

    fn resolve(&self, query: Bytes) -> BoxFuture<'_, Bytes> {
        Box::pin(async move { self.dialer.answer(&query, &*self.reach).await })
    }

    fn connected(&self, workstation: Workstation) {
        if let Some(seat) = &self.seat {
            seat.arrive(workstation);
        }
    }

    fn control(&self, request: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        Box::pin(async move {
            if let (&Method::PUT, Some(intercept)) =
                (request.method(), handover_of(request.uri().path()))
            {
                return self.hand_over(intercept, request.body());
            }
            if request.method() != Method::GET {
                return status(StatusCode::METHOD_NOT_ALLOWED);
            }
            match request.uri().path() {
                HEALTH_PATH => json(&Health {
                    replica: self.replica.to_string(),
                }),
                CLUSTER_PATH => match after(request.uri().query()) {
                    Ok(after) => {
                        if let Some(seat) = self.seat.as_ref().filter(|_| after.is_some()) {
                            seat.stay();
                        }
                        json(&self.newer_view(after).await)
                    }
                    Err(()) => status(StatusCode::BAD_REQUEST),
                },
                _ => status(StatusCode::NOT_FOUND),
            }
        })
    }
}

/// How long a view of the version the workstation knows is held back.
const LONG_POLL: Duration = Duration::from_secs(25);

impl<R: Reach, V: Views> SessionService<R, V> {
    /// What serde says of a body could show a part of it, so nobody hears it.
    fn hand_over(&self, intercept: &str, body: &[u8]) -> Response<Bytes> {
        let Some(seat) = &self.seat else {
            return status(StatusCode::NOT_FOUND);
        };
        let Ok(handover) = serde_json::from_slice::<Handover>(body) else {
            return status(StatusCode::BAD_REQUEST);
        };
        status(match seat.hand_over(intercept, handover) {
            true => StatusCode::NO_CONTENT,
            false => StatusCode::TOO_MANY_REQUESTS,
        })
    }

    async fn newer_view(&self, after: Option<u64>) -> ClusterView {
        let deadline = Instant::now() + LONG_POLL;
        loop {
            let view = self.views.view().await;
            if after != Some(view.version)
                || timeout_at(deadline, self.views.changed()).await.is_err()
            {
                return view;
            }
        }
    }
}

/// The version in `after=<version>`; other parameters are for later releases.
fn after(query: Option<&str>) -> Result<Option<u64>, ()> {
    let value = query
        .unwrap_or_default()
        .split('&')
        .find_map(|pair| pair.strip_prefix("after="));
    value.map(|value| value.parse().map_err(|_| ())).transpose()
}

fn json(value: &impl serde::Serialize) -> Response<Bytes> {
    let body =
        serde_json::to_vec(value).expect("maps with text keys, numbers and texts are always JSON");
    Response::builder()
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body.into())
        .expect("constant headers are valid")
}

fn status(code: StatusCode) -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = code;
    response
}

/// Gives a view the version that its contents have.
pub fn with_version(mut view: ClusterView) -> ClusterView {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let manager = std::mem::take(&mut view.manager);
    view.version = 0;
    let mut hasher = DefaultHasher::new();
    serde_json::to_vec(&view)
        .expect("a view is always JSON")
        .hash(&mut hasher);
    view.version = hasher.finish() >> 11;
    view.manager = manager;
    view
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_is_a_number_or_absent() {
        assert_eq!(after(None), Ok(None));
        assert_eq!(after(Some("a=b")), Ok(None));
        assert_eq!(after(Some("x=1&after=7")), Ok(Some(7)));
        assert_eq!(after(Some("after=-7")), Err(()));
    }

    #[test]
    fn the_version_follows_the_contents_at_every_replica() {
        let view = ClusterView {
            namespace: "shop".into(),
            ..ClusterView::default()
        };
        let mut elsewhere = view.clone();
        elsewhere.manager.name = "other".into();
        let mut changed = view.clone();
        changed.namespaces.push("shop".into());

        let versions = [view, elsewhere, changed].map(|view| with_version(view).version);

        assert_eq!(versions[0], versions[1]);
        assert_ne!(versions[0], versions[2]);
        assert!(versions.iter().all(|version| *version < 1 << 53));
    }
}
