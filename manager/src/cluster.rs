//! The watches: they keep the inventory and the session table as the API server has them.
//!
//! Objects are read with only the few fields that matter and put into our own maps, so a cluster of ten thousand pods
//! costs a few megabytes. A watch that breaks starts over with a backoff; what it missed shows in the next list.

mod objects;
mod ranges;

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, Object};
use kube::core::ObjectMeta;
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tp_manager_api::{MANAGER_NAME, Session};

use self::objects::{
    Empty, NodeFields, NodeStatus, PodFields, PodStatus, ServiceFields, pod_addresses, read_node,
    replica,
};
use self::ranges::Source;
use crate::inventory::{Inventory, Pod};
use crate::listen::chain;
use crate::sessions::{ObjectName, SessionTable};

/// The cluster as the watches see it.
pub struct Cluster {
    own_namespace: Arc<str>,
    inventory: RwLock<Inventory>,
    replicas: Mutex<BTreeMap<Arc<str>, Replica>>,
    views: watch::Sender<u64>,
    addresses: watch::Sender<()>,
    ready_replicas: watch::Sender<Vec<String>>,
    unsynced: watch::Sender<HashSet<&'static str>>,
}

/// One pod of the manager.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Replica {
    ready: bool,
    addresses: Vec<IpAddr>,
}

const WATCHED: [&str; 6] = [
    "services",
    "pods",
    "nodes",
    "namespaces",
    "servicecidrs",
    "sessions",
];

impl Cluster {
    /// Empty until [`Self::watch`] runs. `own_namespace` is where the manager's own pods are.
    pub fn new(own_namespace: Arc<str>) -> Self {
        Self {
            own_namespace,
            inventory: RwLock::default(),
            replicas: Mutex::default(),
            views: watch::channel(0).0,
            addresses: watch::channel(()).0,
            ready_replicas: watch::channel(Vec::new()).0,
            unsynced: watch::channel(HashSet::from(WATCHED)).0,
        }
    }

    /// What is known now. Do not hold it across an await.
    pub fn inventory(&self) -> RwLockReadGuard<'_, Inventory> {
        self.inventory
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the changes that a view may show.
    pub fn view_changes(&self) -> watch::Receiver<u64> {
        self.views.subscribe()
    }

    /// Names of the manager's ready pods, in order.
    pub fn ready_replicas(&self) -> watch::Receiver<Vec<String>> {
        self.ready_replicas.subscribe()
    }

    /// Whether every watch has shown a complete list.
    pub fn is_synced(&self) -> bool {
        self.unsynced.borrow().is_empty()
    }

    /// Resolves when [`Self::is_synced`].
    pub async fn synced(&self) {
        // The sender lives as long as `self`.
        let _ = self.unsynced.subscribe().wait_for(HashSet::is_empty).await;
    }

    /// The namespace of an address. One inside the cluster's ranges that nobody has yet may be a moment ahead of the
    /// watch: then this waits up to a second for it.
    pub async fn namespace_of(&self, address: IpAddr) -> Option<Arc<str>> {
        let mut changed = self.addresses.subscribe();
        let wait = async {
            loop {
                let (owner, inside) = {
                    let inventory = self.inventory();
                    (
                        inventory.namespace_of(address),
                        inventory.is_inside(address),
                    )
                };
                if owner.is_some() || !inside || changed.changed().await.is_err() {
                    return owner;
                }
            }
        };
        tokio::time::timeout(WATCH_LAG, wait).await.unwrap_or(None)
    }

    /// An address of one of the manager's pods or of its Service.
    pub fn is_manager(&self, address: IpAddr) -> bool {
        let service = (Arc::clone(&self.own_namespace), Arc::from(MANAGER_NAME));
        let of_service = || {
            self.inventory()
                .service(&service)
                .is_some_and(|own| own.addresses.contains(&address))
        };
        let replicas = self.replicas.lock().unwrap_or_else(PoisonError::into_inner);
        replicas
            .values()
            .any(|replica| replica.addresses.contains(&address))
            || of_service()
    }

    /// Watches for ever.
    pub async fn watch(self: Arc<Self>, client: Client, sessions: Arc<SessionTable>) -> Infallible {
        tokio::select! {
            never = self.watch_services(client.clone()) => never,
            never = self.watch_pods(client.clone()) => never,
            never = self.watch_nodes(client.clone()) => never,
            never = self.watch_namespaces(client.clone()) => never,
            never = self.watch_ranges(client.clone()) => never,
            never = self.watch_sessions(client, sessions) => never,
        }
    }

    /// Changes the inventory, and tells those who wait.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Inventory) -> bool) {
        let shown = change(
            &mut self
                .inventory
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.addresses.send_replace(());
        if shown {
            self.views.send_modify(|version| *version += 1);
        }
    }

    fn mark_synced(&self, what: &'static str) {
        self.unsynced
            .send_if_modified(|unsynced| unsynced.remove(what));
    }

    async fn watch_services(&self, client: Client) -> Infallible {
        let resource = ApiResource::erase::<v1::Service>(&());
        let api: Api<Object<ServiceFields, Empty>> = Api::all_with(client, &resource);
        let mut unconfirmed = HashSet::new();
        follow(
            api,
            "services",
            watcher::Config::default(),
            |change| match change {
                Change::ListBegins => unconfirmed = self.inventory().service_names(),
                Change::Written(service) => {
                    let name = object_name(&service.metadata);
                    unconfirmed.remove(&name);
                    self.update(|inventory| {
                        inventory.set_service(&name, Some(service.spec.read()))
                    });
                }
                Change::Deleted(service) => {
                    self.update(|inventory| {
                        inventory.set_service(&object_name(&service.metadata), None)
                    });
                }
                Change::ListEnds => {
                    for name in unconfirmed.drain() {
                        self.update(|inventory| inventory.set_service(&name, None));
                    }
                    self.mark_synced("services");
                }
            },
        )
        .await
    }

    async fn watch_pods(&self, client: Client) -> Infallible {
        let resource = ApiResource::erase::<v1::Pod>(&());
        let api: Api<Object<PodFields, PodStatus>> = Api::all_with(client, &resource);
        // A pod that has ended keeps its address in its status, though another may have it by now.
        let running =
            watcher::Config::default().fields("status.phase!=Succeeded,status.phase!=Failed");
        let mut unconfirmed = HashSet::new();
        follow(api, "pods", running, |change| match change {
            Change::ListBegins => unconfirmed = self.inventory().pod_names(),
            Change::Written(pod) => {
                let name = object_name(&pod.metadata);
                unconfirmed.remove(&name);
                self.set_replica(&name, replica(&pod));
                self.update(|inventory| {
                    inventory.set_pod(
                        &name,
                        Some(Pod {
                            addresses: pod_addresses(&pod),
                        }),
                    )
                });
            }
            Change::Deleted(pod) => self.forget_pod(&object_name(&pod.metadata)),
            Change::ListEnds => {
                for name in unconfirmed.drain() {
                    self.forget_pod(&name);
                }
                self.mark_synced("pods");
            }
        })
        .await
    }

    fn forget_pod(&self, name: &ObjectName) {
        self.set_replica(name, None);
        self.update(|inventory| inventory.set_pod(name, None));
    }

    fn set_replica(&self, name: &ObjectName, replica: Option<Replica>) {
        if name.0 != self.own_namespace {
            return;
        }
        let mut replicas = self.replicas.lock().unwrap_or_else(PoisonError::into_inner);
        match replica {
            Some(replica) => drop(replicas.insert(Arc::clone(&name.1), replica)),
            None => drop(replicas.remove(&name.1)),
        }
        let ready = replicas
            .iter()
            .filter(|(_, replica)| replica.ready)
            .map(|(name, _)| name.to_string())
            .collect();
        self.ready_replicas
            .send_if_modified(|known| std::mem::replace(known, Vec::clone(&ready)) != ready);
    }

    async fn watch_nodes(&self, client: Client) -> Infallible {
        let resource = ApiResource::erase::<v1::Node>(&());
        let api: Api<Object<NodeFields, NodeStatus>> = Api::all_with(client, &resource);
        let mut unconfirmed = HashSet::new();
        follow(
            api,
            "nodes",
            watcher::Config::default(),
            |change| match change {
                Change::ListBegins => unconfirmed = self.inventory().node_names(),
                Change::Written(node) => {
                    let name = object_name(&node.metadata).1;
                    unconfirmed.remove(&name);
                    self.update(|inventory| inventory.set_node(&name, Some(read_node(&node))));
                }
                Change::Deleted(node) => {
                    self.update(|inventory| {
                        inventory.set_node(&object_name(&node.metadata).1, None)
                    });
                }
                Change::ListEnds => {
                    for name in unconfirmed.drain() {
                        self.update(|inventory| inventory.set_node(&name, None));
                    }
                    self.mark_synced("nodes");
                }
            },
        )
        .await
    }

    async fn watch_namespaces(&self, client: Client) -> Infallible {
        let resource = ApiResource::erase::<v1::Namespace>(&());
        let api: Api<Object<Empty, Empty>> = Api::all_with(client, &resource);
        let mut unconfirmed = HashSet::new();
        follow(
            api,
            "namespaces",
            watcher::Config::default(),
            |change| match change {
                Change::ListBegins => {
                    unconfirmed = self.inventory().namespaces().cloned().collect()
                }
                Change::Written(namespace) => {
                    let name = object_name(&namespace.metadata).1;
                    unconfirmed.remove(&name);
                    self.update(|inventory| inventory.set_namespace(&name, true));
                }
                Change::Deleted(namespace) => {
                    self.update(|inventory| {
                        inventory.set_namespace(&object_name(&namespace.metadata).1, false)
                    });
                }
                Change::ListEnds => {
                    for name in unconfirmed.drain() {
                        self.update(|inventory| inventory.set_namespace(&name, false));
                    }
                    self.mark_synced("namespaces");
                }
            },
        )
        .await
    }

    /// ServiceCIDR objects where the API server has them, else the range that it names when it refuses an address.
    async fn watch_ranges(&self, client: Client) -> Infallible {
        match ranges::find(&client, &self.own_namespace, ranges::RETRY).await {
            Source::Objects => self.watch_service_cidrs(Api::all(client)).await,
            Source::Refusal(ranges) => {
                self.update(|inventory| inventory.set_service_ranges(&"discovered".into(), ranges));
                self.mark_synced("servicecidrs");
                std::future::pending().await
            }
        }
    }

    async fn watch_service_cidrs(&self, api: Api<ServiceCIDR>) -> Infallible {
        let mut unconfirmed = HashSet::new();
        follow(
            api,
            "servicecidrs",
            watcher::Config::default(),
            |change| match change {
                Change::ListBegins => unconfirmed = self.inventory().service_range_sources(),
                Change::Written(range) => {
                    let name = object_name(&range.metadata).1;
                    unconfirmed.remove(&name);
                    let cidrs = range.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
                    let ranges = cidrs.iter().filter_map(|cidr| cidr.parse().ok()).collect();
                    self.update(|inventory| inventory.set_service_ranges(&name, ranges));
                }
                Change::Deleted(range) => {
                    let name = object_name(&range.metadata).1;
                    self.update(|inventory| inventory.set_service_ranges(&name, Vec::new()));
                }
                Change::ListEnds => {
                    for name in unconfirmed.drain() {
                        self.update(|inventory| inventory.set_service_ranges(&name, Vec::new()));
                    }
                    self.mark_synced("servicecidrs");
                }
            },
        )
        .await
    }

    async fn watch_sessions(&self, client: Client, table: Arc<SessionTable>) -> Infallible {
        follow(
            Api::<Session>::all(client),
            "sessions",
            watcher::Config::default(),
            |change| match change {
                Change::ListBegins => table.begin_list(),
                Change::Written(session) => table.apply(&session, Timestamp::now()),
                Change::Deleted(session) => table.delete(&session),
                Change::ListEnds => {
                    table.end_list();
                    self.mark_synced("sessions");
                }
            },
        )
        .await
    }
}

/// What the API server said, or what stood between us: kube's own text repeats the whole answer.
pub(crate) fn in_short(error: &kube::Error) -> String {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "another crate's list of errors"
    )]
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => chain(other),
    }
}

/// How far a watch may be behind a DNS answer.
const WATCH_LAG: Duration = Duration::from_secs(1);

/// What a watch says.
pub(crate) enum Change<K> {
    ListBegins,
    Written(K),
    Deleted(K),
    ListEnds,
}

/// Feeds `on` for ever. Errors are logged and the watch goes on after a backoff.
pub(crate) async fn follow<K>(
    api: Api<K>,
    what: &'static str,
    config: watcher::Config,
    mut on: impl FnMut(Change<K>),
) -> Infallible
where
    K: kube::Resource + Clone + std::fmt::Debug + Send + serde::de::DeserializeOwned + 'static,
{
    let mut events = std::pin::pin!(watcher(api, config.page_size(PAGE)).backoff(Again::default()));
    loop {
        match events.next().await {
            Some(Ok(watcher::Event::Init)) => on(Change::ListBegins),
            Some(Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object))) => {
                on(Change::Written(object))
            }
            Some(Ok(watcher::Event::Delete(object))) => on(Change::Deleted(object)),
            Some(Ok(watcher::Event::InitDone)) => on(Change::ListEnds),
            Some(Err(error)) => tracing::warn!(what, error = chain(&error), "watch interrupted"),
            None => tokio::time::sleep(Duration::from_secs(1)).await,
        }
    }
}

/// When a watch that broke is tried again. kube's own pauses grow to 30 s, for which whatever came after an outage of the API server
/// would be unknown to us; ours are few.
#[derive(Default)]
struct Again(watcher::DefaultBackoff);

impl Again {
    const LONGEST: Duration = Duration::from_secs(4);
}

impl Iterator for Again {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(Self::LONGEST))
    }
}

impl Backoff for Again {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Objects a list page holds: all of it is in memory at once.
const PAGE: u32 = 100;

pub(crate) fn object_name(metadata: &ObjectMeta) -> ObjectName {
    (
        metadata.namespace.as_deref().unwrap_or_default().into(),
        metadata.name.as_deref().unwrap_or_default().into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::Service;

    #[test]
    fn a_watch_is_tried_again_within_seconds_however_often_it_broke() {
        let pauses: Vec<_> = Again::default().take(20).collect();
        assert_eq!(pauses.len(), 20);
        assert!(pauses.iter().all(|pause| *pause <= Again::LONGEST));
        assert!(pauses[0] >= Duration::from_millis(800));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_a_moment_ahead_of_the_watch_is_waited_for() {
        let cluster = Arc::new(Cluster::new("tp-system".into()));
        cluster.update(|inventory| {
            inventory.set_service_ranges(&"x".into(), vec!["10.96.0.0/16".parse().unwrap()])
        });
        let writer = Arc::clone(&cluster);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let service = Service {
                addresses: vec!["10.96.0.9".parse().unwrap()],
                external_name: false,
            };
            writer.update(|inventory| {
                inventory.set_service(&("shop".into(), "new".into()), Some(service))
            });
        });

        assert_eq!(
            cluster
                .namespace_of("10.96.0.9".parse().unwrap())
                .await
                .as_deref(),
            Some("shop")
        );
        assert_eq!(
            cluster.namespace_of("10.96.0.10".parse().unwrap()).await,
            None
        );
        assert_eq!(
            cluster.namespace_of("192.0.2.9".parse().unwrap()).await,
            None
        );
    }

    #[test]
    fn ready_replicas_are_our_own_pods_only() {
        let cluster = Cluster::new("tp-system".into());
        let ready = || {
            Some(Replica {
                ready: true,
                addresses: vec!["10.244.0.3".parse().unwrap()],
            })
        };

        cluster.set_replica(&("tp-system".into(), "tp-manager-1".into()), ready());
        cluster.set_replica(&("shop".into(), "impostor".into()), ready());

        assert_eq!(*cluster.ready_replicas().borrow(), ["tp-manager-1"]);
        assert!(cluster.is_manager("10.244.0.3".parse().unwrap()));
        cluster.set_replica(&("tp-system".into(), "tp-manager-1".into()), None);
        assert!(cluster.ready_replicas().borrow().is_empty());
    }
}
