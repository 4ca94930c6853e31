//! One session in one namespace, without an installed manager: a Job the user started in the own namespace.
//!
//! It holds no right in the cluster and asks the API server nothing. Its reach is what the namespace's own DNS names
//! resolve to; addresses are only reachable once such an answer held them. It exits when its one session stays away.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tp_manager_api::cluster_view::ManagerInfo;
use tp_manager_api::{ClusterView, PROTOCOL, TUNNEL_PORT};
use tp_tunnel::server::Service;
use tp_tunnel::{Identity, KeyHash};

use crate::dial::refuse::Surroundings;
use crate::dial::resolv_conf::ResolvConf;
use crate::dial::resolve::Resolver;
use crate::dial::{Destination, Dialer, Reach};
use crate::listen::{self, Admitted, Gate, Listener};
use crate::metrics::Metrics;
use crate::service::{SessionService, Views, with_version};

/// What the flags say.
#[derive(Clone, Debug)]
pub struct Options {
    /// Namespace the session is limited to.
    pub namespace: String,
    /// The one key that is admitted.
    pub client_key: KeyHash,
    /// How long to stay without a connection.
    pub lease: Duration,
}

/// Serves until `shutdown`, or until the lease has run out.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<()> {
    let identity = Identity::generate();
    let text =
        std::fs::read_to_string("/etc/resolv.conf").context("cannot read /etc/resolv.conf")?;
    let conf = ResolvConf::parse(&text);
    let socket = listen_everywhere(TUNNEL_PORT).await?;
    tracing::info!(key_hash = %identity.key_hash(), port = TUNNEL_PORT, "manager key {}", identity.key_hash());
    let metrics = Arc::new(Metrics::default());
    let reach = Arc::new(NamespaceReach {
        domain: conf.cluster_domain().unwrap_or("cluster.local").to_owned(),
        services: linked_services(&options.namespace, std::env::vars().map(|(name, _)| name)),
        namespace: options.namespace,
        nameservers: conf.nameservers.iter().map(SocketAddr::ip).collect(),
        heard: Mutex::default(),
    });
    let (present, presence) = watch::channel(0_usize);
    let gate = Arc::new(OneKey {
        key: options.client_key,
        name: crate::standalone::host_name(),
        dialer: Arc::new(Dialer::new(
            Resolver::new(conf, None),
            Arc::clone(&metrics),
            crate::DIAL_TIMEOUT,
        )),
        reach,
        present,
    });
    let listener = Listener {
        socket,
        identity,
        gate,
        metrics,
        most_strangers: listen::MOST_STRANGERS,
        drain: listen::DRAIN,
    };
    let over = async {
        tokio::select! {
            () = shutdown => {}
            () = absent(presence, options.lease) => tracing::info!("the session stayed away for its lease, exiting"),
        }
    };
    listen::serve(listener, over).await;
    Ok(())
}

/// All addresses of the pod, IPv6 ones too where the node has IPv6.
pub(crate) async fn listen_everywhere(port: u16) -> Result<TcpListener> {
    let everywhere = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port));
    let listener = match TcpListener::bind(everywhere).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind((std::net::Ipv4Addr::UNSPECIFIED, port)).await,
    };
    listener.with_context(|| format!("cannot listen on port {port}"))
}

/// Resolves when nobody has been connected for `lease`.
async fn absent(mut presence: watch::Receiver<usize>, lease: Duration) {
    loop {
        // An error means that the gate is gone: nobody can come any more.
        if presence.wait_for(|present| *present == 0).await.is_err() {
            return;
        }
        match tokio::time::timeout(lease, presence.wait_for(|present| *present > 0)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

struct OneKey {
    key: KeyHash,
    name: Arc<str>,
    dialer: Arc<Dialer>,
    reach: Arc<NamespaceReach>,
    present: watch::Sender<usize>,
}

impl Gate for OneKey {
    fn admit(&self, key: KeyHash) -> BoxFuture<'_, Result<Admitted, String>> {
        let admitted = match key == self.key {
            true => Ok(Admitted {
                who: key.to_string(),
                service: self.service(),
                ended: Box::pin(present_until_dropped(self.present.clone())),
            }),
            false => Err("the key is not the session's".to_owned()),
        };
        Box::pin(std::future::ready(admitted))
    }
}

impl OneKey {
    fn service(&self) -> Arc<dyn Service> {
        Arc::new(SessionService {
            replica: Arc::clone(&self.name),
            dialer: Arc::clone(&self.dialer),
            reach: Arc::clone(&self.reach),
            views: OneView(self.reach.view(&self.name)),
        })
    }
}

/// Never resolves; counts the connection as present until it is dropped with it.
async fn present_until_dropped(present: watch::Sender<usize>) -> String {
    struct Present(watch::Sender<usize>);
    impl Drop for Present {
        fn drop(&mut self) {
            self.0.send_modify(|present| *present -= 1);
        }
    }
    present.send_modify(|present| *present += 1);
    let _present = Present(present);
    std::future::pending().await
}

/// One namespace, as its DNS shows it.
struct NamespaceReach {
    domain: String,
    namespace: String,
    services: Vec<String>,
    nameservers: Vec<IpAddr>,
    heard: Mutex<HashSet<IpAddr>>,
}

/// The Services of the pod's namespace, read off the variables that the kubelet makes of them (`WEB_API_SERVICE_HOST`).
///
/// It takes no right to know them, so their short names work here too. Headless ones have no variable, and those made
/// later are missed; both are reached by `name.namespace.svc`.
fn linked_services(namespace: &str, variables: impl Iterator<Item = String>) -> Vec<String> {
    let mut services: Vec<String> = variables
        .filter_map(|variable| {
            Some(
                variable
                    .strip_suffix("_SERVICE_HOST")?
                    .to_lowercase()
                    .replace('_', "-"),
            )
        })
        // Every pod is told where the API server is, whatever its namespace.
        .filter(|service| service != "kubernetes" || namespace == "default")
        .collect();
    services.sort();
    services
}

/// Addresses remembered; a namespace with more pods than this has to use names.
const MOST_HEARD: usize = 16 * 1024;

impl NamespaceReach {
    fn view(&self, name: &str) -> ClusterView {
        with_version(ClusterView {
            protocol: PROTOCOL,
            manager: ManagerInfo {
                name: name.to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            namespace: self.namespace.clone(),
            domain: self.domain.clone(),
            namespaces: vec![self.namespace.clone()],
            services: BTreeMap::from([(self.namespace.clone(), self.services.clone())]),
            ..ClusterView::default()
        })
    }

    /// Services of the namespace and pods behind them. Not `<address>.<namespace>.pod.<domain>`: in the cluster DNS's
    /// usual mode such a name exists for every address there is, so it proves nothing.
    fn is_own(&self, name: &str) -> bool {
        name.strip_suffix(&self.domain)
            .and_then(|rest| rest.strip_suffix(".svc."))
            .and_then(|rest| rest.strip_suffix(&self.namespace))
            .is_some_and(|rest| rest.ends_with('.'))
    }
}

impl Reach for NamespaceReach {
    fn surroundings(&self) -> &dyn Surroundings {
        self
    }

    fn namespace(&self) -> Option<&str> {
        Some(&self.namespace)
    }

    fn permit<'a>(&'a self, destination: &'a Destination) -> BoxFuture<'a, Result<(), String>> {
        let named = destination
            .name
            .as_deref()
            .is_some_and(|name| self.is_own(name));
        let heard = || {
            self.heard
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .contains(&destination.address)
        };
        let permit = match named || heard() {
            true => Ok(()),
            false => Err(format!(
                "{} is not in namespace {}, the reach of this temporary manager",
                destination
                    .name
                    .clone()
                    .unwrap_or_else(|| destination.address.to_string()),
                self.namespace
            )),
        };
        Box::pin(std::future::ready(permit))
    }

    fn heard(&self, name: &str, addresses: &[IpAddr]) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_own(name) && heard.len() + addresses.len() <= MOST_HEARD {
            heard.extend(addresses.iter().map(IpAddr::to_canonical));
        }
    }
}

impl Surroundings for NamespaceReach {
    fn is_nameserver(&self, address: IpAddr) -> bool {
        self.nameservers.contains(&address)
    }

    /// Nodes cannot be told apart without rights, so kubelet's and etcd's ports are refused everywhere.
    fn is_node(&self, _address: IpAddr) -> bool {
        true
    }

    fn is_manager(&self, address: IpAddr, _port: u16) -> bool {
        crate::standalone::is_local(address)
    }
}

struct OneView(ClusterView);

impl Views for OneView {
    fn view(&self) -> BoxFuture<'_, ClusterView> {
        Box::pin(std::future::ready(self.0.clone()))
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach() -> NamespaceReach {
        NamespaceReach {
            domain: "cluster.local".into(),
            namespace: "shop".into(),
            services: Vec::new(),
            nameservers: Vec::new(),
            heard: Mutex::default(),
        }
    }

    async fn permits(reach: &NamespaceReach, name: Option<&str>, address: &str) -> bool {
        let destination = Destination {
            name: name.map(str::to_owned),
            address: address.parse().unwrap(),
            port: 80,
        };
        reach.permit(&destination).await.is_ok()
    }

    #[test]
    fn services_are_known_from_the_pods_environment() {
        let variables = [
            "WEB_API_SERVICE_HOST",
            "WEB_API_SERVICE_PORT",
            "KUBERNETES_SERVICE_HOST",
            "HOME",
        ];
        let services =
            |namespace| linked_services(namespace, variables.iter().map(ToString::to_string));

        assert_eq!(services("shop"), ["web-api"]);
        assert_eq!(services("default"), ["kubernetes", "web-api"]);
    }

    #[tokio::test]
    async fn only_the_namespace_and_what_its_dns_answered_is_reached() {
        let reach = reach();
        assert!(permits(&reach, Some("web.shop.svc.cluster.local"), "10.96.0.5").await);
        assert!(permits(&reach, Some("db-0.db.shop.svc.cluster.local"), "10.244.0.5").await);
        for name in [
            "web.bank.svc.cluster.local",
            "shop.svc.cluster.local",
            "web.notshop.svc.cluster.local",
            "10-96-0-1.shop.pod.cluster.local",
            "web.shop.svc.cluster.local.evil.example",
            "example.com",
        ] {
            assert!(!permits(&reach, Some(name), "10.96.0.6").await, "{name}");
        }

        reach.heard(
            "web.bank.svc.cluster.local",
            &["10.96.0.7".parse().unwrap()],
        );
        reach.heard(
            "10-96-0-8.shop.pod.cluster.local",
            &["10.96.0.8".parse().unwrap()],
        );
        assert!(!permits(&reach, None, "10.96.0.7").await);
        assert!(!permits(&reach, None, "10.96.0.8").await);
        reach.heard(
            "web.shop.svc.cluster.local",
            &["10.96.0.5".parse().unwrap()],
        );
        assert!(permits(&reach, None, "10.96.0.5").await);
    }

    #[tokio::test(start_paused = true)]
    async fn the_lease_runs_only_while_nobody_is_connected() {
        let (present, presence) = watch::channel(0);
        let lease = Duration::from_secs(60);
        let over = tokio::spawn(absent(presence, lease));

        tokio::time::sleep(Duration::from_secs(59)).await;
        let connection = tokio::spawn(present_until_dropped(present.clone()));
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!over.is_finished());

        connection.abort();
        tokio::time::sleep(Duration::from_secs(59)).await;
        assert!(!over.is_finished());
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(over.is_finished());
    }
}
