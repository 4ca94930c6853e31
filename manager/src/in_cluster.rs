//! The manager as a pod: watches, ports and sessions put together.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use futures::future::BoxFuture;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use tokio::sync::SetOnce;
use tokio::task::JoinSet;
use tp_manager_api::{AGENT_IMAGE, HEALTH_PORT, METRICS_PORT, Session, TUNNEL_PORT};
use tp_tunnel::KeyHash;

use crate::cluster::{Cluster, in_short};
use crate::dial::Dialer;
use crate::dial::resolv_conf::ResolvConf;
use crate::dial::resolve::Resolver;
use crate::dial::rights::Rights;
use crate::guarded_http::{self, HealthPage, MetricsPage};
use crate::intercepts;
use crate::intercepts::workstations::{Seat, Workstations};
use crate::listen::{self, Admitted, Gate, Listener};
use crate::metrics::Metrics;
use crate::reach::{KubeReviewer, SessionReach, SessionViews, Town};
use crate::service::SessionService;
use crate::sessions::{LiveSession, SessionTable};
use crate::temporary::listen_everywhere;
use crate::{locator, shared_key};

/// What the pod's environment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `POD_NAME`.
    pub pod: String,
    /// `POD_NAMESPACE`.
    pub namespace: String,
    /// `POD_IP`, or several separated by commas.
    pub addresses: Vec<IpAddr>,
    /// `TP_AGENT_IMAGE`. Without it, as in a Deployment of an older release, intercepts are nobody's.
    pub agent_image: Option<String>,
}

impl Options {
    /// Reads the variables that the Deployment sets by the downward API.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let needed = |name: &str| {
            let value = variable(name).filter(|value| !value.is_empty());
            value.ok_or_else(|| {
                format!("{name} is not set: is this a pod? Elsewhere, use --standalone")
            })
        };
        let addresses = needed("POD_IP")?;
        let addresses: Result<Vec<IpAddr>, _> = addresses
            .split(',')
            .map(|text| text.trim().parse())
            .collect();
        Ok(Self {
            pod: needed("POD_NAME")?,
            namespace: needed("POD_NAMESPACE")?,
            addresses: addresses.map_err(|_| "POD_IP is not an address".to_owned())?,
            agent_image: variable(AGENT_IMAGE).filter(|image| !image.is_empty()),
        })
    }
}

/// Serves until `shutdown`, then drains.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<()> {
    let client = Client::try_default()
        .await
        .context("cannot set up a client for the API server")?;
    let text =
        std::fs::read_to_string("/etc/resolv.conf").context("cannot read /etc/resolv.conf")?;
    let conf = ResolvConf::parse(&text);
    let metrics = Arc::new(Metrics::default());
    let cluster = Arc::new(Cluster::new(options.namespace.as_str().into()));
    let sessions = Arc::new(SessionTable::default());
    let serving = Arc::new(AtomicBool::new(false));

    let mut work = JoinSet::new();
    let page = HealthPage {
        ready: {
            let serving = Arc::clone(&serving);
            move || serving.load(Relaxed)
        },
    };
    spawn_page(&mut work, HEALTH_PORT, page).await?;
    spawn_page(
        &mut work,
        METRICS_PORT,
        MetricsPage {
            metrics: Arc::clone(&metrics),
            client: client.clone(),
        },
    )
    .await?;
    work.spawn(forever(
        Arc::clone(&cluster).watch(client.clone(), Arc::clone(&sessions)),
    ));
    work.spawn(sweep(client.clone(), Arc::clone(&sessions)));

    let started = async {
        let identity = shared_key::load(client.clone(), &options.namespace).await;
        cluster.synced().await;
        identity
    };
    tokio::pin!(shutdown);
    let identity = tokio::select! {
        identity = started => identity,
        () = &mut shutdown => return Ok(()),
        error = first_end(&mut work) => return Err(error),
    };
    let socket = listen_everywhere(TUNNEL_PORT).await?;
    let key = identity.key_hash();
    tracing::info!(key_hash = %key, port = TUNNEL_PORT, "manager key {key}");
    let (namespace, ready) = (options.namespace.clone(), cluster.ready_replicas());
    let locating = client.clone();
    work.spawn(async move { locator::keep(locating, &namespace, key, ready).await });
    let town = Arc::new(Town {
        cluster,
        rights: Rights::new(KubeReviewer {
            client: client.clone(),
        }),
        own_addresses: options.addresses,
        nameservers: conf.nameservers.iter().map(SocketAddr::ip).collect(),
        domain: conf.cluster_domain().unwrap_or("cluster.local").to_owned(),
        replica: options.pod.as_str().into(),
    });
    let workstations = Arc::new(Workstations::new(Arc::clone(&metrics)));
    match options.agent_image {
        Some(image) => {
            let setting = intercepts::Setting {
                client: client.clone(),
                town: Arc::clone(&town),
                sessions: Arc::clone(&sessions),
                workstations: Arc::clone(&workstations),
                metrics: Arc::clone(&metrics),
                image,
                identity: identity.clone(),
                namespace: options.namespace.as_str().into(),
            };
            work.spawn(forever(intercepts::control(setting)));
        }
        None => tracing::warn!("TP_AGENT_IMAGE is not set: there are no intercepts"),
    }
    let dialer = Dialer::new(
        Resolver::new(conf, None),
        Arc::clone(&metrics),
        crate::DIAL_TIMEOUT,
    );
    let gate = Arc::new(SessionGate {
        town,
        sessions,
        dialer: Arc::new(dialer),
        workstations,
        client,
    });
    let listener = Listener {
        socket,
        identity,
        gate,
        metrics,
        most_strangers: listen::MOST_STRANGERS,
        drain: listen::DRAIN,
    };
    serving.store(true, Relaxed);
    let stopping = async {
        shutdown.await;
        serving.store(false, Relaxed);
    };
    tokio::select! {
        () = listen::serve(listener, stopping) => Ok(()),
        error = first_end(&mut work) => Err(error),
    }
}

async fn spawn_page(
    work: &mut JoinSet<()>,
    port: u16,
    page: impl guarded_http::Page,
) -> Result<()> {
    let listener = listen_everywhere(port).await?;
    work.spawn(forever(guarded_http::serve(listener, Arc::new(page))));
    Ok(())
}

async fn forever(task: impl Future<Output = std::convert::Infallible>) {
    match task.await {}
}

/// None of the background tasks ends by itself: one that does has panicked, and the pod had better start anew.
async fn first_end(work: &mut JoinSet<()>) -> anyhow::Error {
    match work.join_next().await {
        Some(Err(error)) => anyhow!(error).context("a background task ended abnormally"),
        Some(Ok(())) | None => anyhow!("a background task ended"),
    }
}

/// Removes Sessions whose workstations never came back to do so.
async fn sweep(client: Client, sessions: Arc<SessionTable>) {
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        for (namespace, name, uid) in sessions.expired(LEFT_BEHIND) {
            let api = Api::<Session>::namespaced(client.clone(), &namespace);
            let exactly_this = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: Some(uid),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            match api.delete(&name, &exactly_this).await {
                Ok(_) => tracing::info!(%namespace, session = %name, "expired Session removed"),
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => {
                    tracing::warn!(%namespace, session = %name, error = in_short(&error), "cannot remove an expired Session");
                }
            }
        }
    }
}

const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// After its end. A workstation that wakes up renews the same object instead of making a new one.
const LEFT_BEHIND: Duration = Duration::from_secs(600);

/// Admits keys of live Sessions whose users still hold the right they were made with.
struct SessionGate {
    town: Arc<Town>,
    sessions: Arc<SessionTable>,
    dialer: Arc<Dialer>,
    workstations: Arc<Workstations>,
    client: Client,
}

impl Gate for SessionGate {
    fn admit(&self, key: KeyHash) -> BoxFuture<'_, Result<Admitted, String>> {
        Box::pin(async move {
            let session = self
                .sessions
                .admit(key)
                .await
                .map_err(|reason| reason.to_string())?;
            let reach = Arc::new(SessionReach::new(
                Arc::clone(&self.town),
                Arc::clone(&session),
            ));
            reach.check_session().await?;
            let stays = Arc::new(SetOnce::new());
            let seat = Seat::new(
                Arc::clone(&self.workstations),
                &session.uid,
                Arc::clone(&stays),
            );
            let service = SessionService {
                replica: Arc::clone(&self.town.replica),
                dialer: Arc::clone(&self.dialer),
                reach: Arc::clone(&reach),
                views: SessionViews::new(Arc::clone(&self.town), Arc::clone(&session)),
                seat: Some(seat),
            };
            Ok(Admitted {
                who: format!(
                    "{} in {} ({})",
                    session.user.name, session.namespace, session.name
                ),
                service: Arc::new(service),
                ended: Box::pin(ended(
                    self.client.clone(),
                    Arc::clone(&self.town.replica),
                    session,
                    reach,
                    stays,
                )),
            })
        })
    }
}

/// Resolves when the session is over or a right it used is gone. Says in the Session's status who serves it, once the
/// workstation stays: what it tried beside that must not have the last word.
async fn ended(
    client: Client,
    replica: Arc<str>,
    session: Arc<LiveSession>,
    reach: Arc<SessionReach>,
    stays: Arc<SetOnce<()>>,
) -> String {
    let report = async {
        stays.wait().await;
        report_replica(client, &replica, &session).await;
        std::future::pending().await
    };
    tokio::select! {
        reason = session.ended() => reason.to_string(),
        reason = reach.revoked() => reason,
        never = report => never,
    }
}

async fn report_replica(client: Client, replica: &str, session: &LiveSession) {
    let api = Api::<Session>::namespaced(client, &session.namespace);
    let status = serde_json::json!({ "status": { "replica": replica, "connectedAt": Timestamp::now().to_string() } });
    let patched = api
        .patch_status(
            &session.name,
            &PatchParams::default(),
            &Patch::Merge(&status),
        )
        .await;
    if let Err(error) = patched {
        tracing::warn!(session = %session.name, error = in_short(&error), "cannot write the Session's status");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_environment_is_needed() {
        let pod = |name: &str| match name {
            "POD_NAME" => Some("tp-manager-1".to_owned()),
            "POD_NAMESPACE" => Some("tp-system".to_owned()),
            "POD_IP" => Some("10.244.0.3,fd00::3".to_owned()),
            _ => None,
        };

        assert_eq!(Options::from_env(pod).unwrap().addresses.len(), 2);
        assert!(
            Options::from_env(|_| None)
                .unwrap_err()
                .contains("--standalone")
        );
        assert!(Options::from_env(|_| Some("x".to_owned())).is_err());
    }
}
