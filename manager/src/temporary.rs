//! One session in one namespace, without an installed manager: a Job the user started in the own namespace.
//!
//! It holds no right in the cluster and asks the API server nothing. Its reach is what the namespace's own DNS names
//! resolve to; addresses are only reachable once such an answer held them. It exits when its one session stays away.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::BoxFuture;
use ipnet::IpNet;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tp_manager_api::cluster_view::ManagerInfo;
use tp_manager_api::{ClusterView, PROTOCOL, TUNNEL_PORT};
use tp_tunnel::server::Service;
use tp_tunnel::{Identity, KeyHash};

use crate::dial::refuse::Surroundings;
use crate::dial::resolv_conf::ResolvConf;
use crate::dial::resolve::Resolver;
use crate::dial::{Destination, Dialer, Permit, Reach};
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
    let linked = linked_services(&options.namespace, std::env::vars());
    let reach = Arc::new(NamespaceReach {
        domain: conf.cluster_domain().unwrap_or("cluster.local").to_owned(),
        heard: watch::Sender::new(linked.values().copied().collect()),
        services: linked.into_keys().collect(),
        namespace: options.namespace,
        nameservers: conf.nameservers.iter().map(SocketAddr::ip).collect(),
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
            seat: None,
            views: OneView {
                name: Arc::clone(&self.name),
                reach: Arc::clone(&self.reach),
            },
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
    /// Addresses of the namespace, as far as an answer has held them.
    heard: watch::Sender<BTreeSet<IpAddr>>,
}

/// The Services of the pod's namespace and their addresses, read off the variables that the kubelet makes of them
/// (`WEB_API_SERVICE_HOST`).
///
/// It takes no right to know them, so they work here even where the user may not list Services. Headless ones have no
/// variable, and those made later are missed.
fn linked_services(
    namespace: &str,
    variables: impl Iterator<Item = (String, String)>,
) -> BTreeMap<String, IpAddr> {
    variables
        .filter_map(|(variable, value)| {
            let service = variable.strip_suffix("_SERVICE_HOST")?;
            Some((
                service.to_lowercase().replace('_', "-"),
                value.parse().ok()?,
            ))
        })
        // Every pod is told where the API server is, whatever its namespace.
        .filter(|(service, _)| service != "kubernetes" || namespace == "default")
        .collect()
}

/// Addresses remembered; a namespace with more pods than this has to use names. The workstation is told all of them,
/// so it bounds that message too.
const MOST_HEARD: usize = 4 * 1024;

/// How long changes of what was heard are gathered before the workstation is told.
const GATHERED_FOR: Duration = Duration::from_millis(200);

/// A change that came between a view and the wait for the next one is found after this.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

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
            pod_ranges: self
                .heard
                .borrow()
                .iter()
                .copied()
                .map(IpNet::from)
                .collect(),
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

    fn permit<'a>(&'a self, destination: &'a Destination) -> BoxFuture<'a, Result<Permit, String>> {
        let named = destination
            .name
            .as_deref()
            .is_some_and(|name| self.is_own(name));
        let heard = || self.heard.borrow().contains(&destination.address);
        let permit = match named || heard() {
            true => Ok(None),
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
        if !self.is_own(name) {
            return;
        }
        self.heard.send_if_modified(|heard| {
            let before = heard.len();
            let room = MOST_HEARD.saturating_sub(before);
            heard.extend(addresses.iter().take(room).map(IpAddr::to_canonical));
            heard.len() > before
        });
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

/// The namespace with the addresses heard so far, so that the workstation sends those here too.
struct OneView {
    name: Arc<str>,
    reach: Arc<NamespaceReach>,
}

impl Views for OneView {
    fn view(&self) -> BoxFuture<'_, ClusterView> {
        Box::pin(std::future::ready(self.reach.view(&self.name)))
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        let mut heard = self.reach.heard.subscribe();
        Box::pin(async move {
            if let Ok(Ok(())) = tokio::time::timeout(LOOK_AGAIN, heard.changed()).await {
                tokio::time::sleep(GATHERED_FOR).await;
            }
        })
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
            heard: watch::Sender::default(),
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
            ("WEB_API_SERVICE_HOST", "10.96.0.5"),
            ("WEB_API_SERVICE_PORT", "80"),
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            ("HOME", "/"),
        ];
        let services = |namespace| {
            let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
            linked_services(namespace, variables.into_iter())
        };
        let own = ("web-api".to_owned(), "10.96.0.5".parse().unwrap());
        let first = ("kubernetes".to_owned(), "10.96.0.1".parse().unwrap());

        assert_eq!(services("shop"), [own.clone()].into());
        assert_eq!(services("default"), [first, own].into());
    }

    #[tokio::test(start_paused = true)]
    async fn the_view_tells_the_addresses_of_answers() {
        let reach = Arc::new(reach());
        let views = OneView {
            name: "m".into(),
            reach: Arc::clone(&reach),
        };
        let before = views.view().await;
        assert_eq!(before.pod_ranges, []);

        let heard = async {
            reach.heard(
                "web.shop.svc.cluster.local",
                &["10.96.0.5".parse().unwrap()],
            );
            reach.heard(
                "web.bank.svc.cluster.local",
                &["10.96.0.7".parse().unwrap()],
            );
        };
        let begun = tokio::time::Instant::now();
        tokio::join!(views.changed(), heard);
        let after = views.view().await;

        assert_eq!(begun.elapsed(), GATHERED_FOR);
        assert_eq!(after.pod_ranges, ["10.96.0.5/32".parse().unwrap()]);
        assert_ne!(after.version, before.version);
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
