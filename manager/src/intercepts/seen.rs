//! What the watches have seen: all Intercepts, and the pods of namespaces that have some.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, Object};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use serde::Deserialize;
use tokio::sync::watch;
use tp_manager_api::matcher::MatcherError;
use tp_manager_api::{Intercept, Matchers};

use super::pod::PodFacts;
use super::world::Scene;
use crate::cluster::{Change, follow, object_name};
use crate::sessions::ObjectName;

/// Shared by the watches that fill it and the controller that reads it.
pub(super) struct Seen {
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
}

/// What there is at one moment.
#[derive(Default)]
pub(super) struct Inner {
    /// All of them, of every namespace.
    pub(super) intercepts: BTreeMap<ObjectName, Known>,
    /// Whether they are complete.
    pub(super) listed: bool,
    /// The namespaces that are watched.
    pub(super) scenes: BTreeMap<Arc<str>, Scene>,
}

/// An Intercept, its matchers compiled once.
pub(super) struct Known {
    /// The object.
    pub(super) object: Intercept,
    /// Its matchers, or what is wrong with them.
    pub(super) matchers: Result<Matchers, MatcherError>,
    /// The name that it should have.
    pub(super) proper_name: Option<String>,
}

impl Known {
    /// Reads an object.
    pub(super) fn new(object: Intercept) -> Self {
        Self {
            matchers: Matchers::try_new(object.spec.matchers.iter().cloned()),
            proper_name: object.spec.object_name().ok(),
            object,
        }
    }
}

/// A spec of which nothing is read.
#[derive(Clone, Debug, Default, Deserialize)]
struct Unread {}

impl Seen {
    /// Nothing yet. `changed` hears of every change.
    pub(super) fn new(changed: watch::Sender<()>) -> Self {
        Self {
            inner: Mutex::default(),
            changed,
        }
    }

    /// What there is now. Do not hold it across an await.
    pub(super) fn now(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the API server said of a pod just now, ahead of the watch.
    pub(super) fn pod_written(&self, namespace: &Arc<str>, pod: &Pod) {
        let Some(facts) = PodFacts::read(pod) else {
            return;
        };
        let mut inner = self.now();
        let known = inner
            .scenes
            .get_mut(namespace)
            .and_then(|scene| scene.pods.get_mut(&facts.name));
        if let Some(known) = known.filter(|known| known.uid == facts.uid) {
            *known = facts;
        }
    }

    fn update(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.now());
        self.changed.send_replace(());
    }

    fn update_scene(&self, namespace: &Arc<str>, change: impl FnOnce(&mut Scene)) {
        self.update(|inner| change(inner.scenes.entry(Arc::clone(namespace)).or_default()));
    }

    /// Watches the Intercepts of all namespaces, for ever.
    pub(super) async fn watch_intercepts(&self, client: Client) -> Infallible {
        let mut unconfirmed = BTreeSet::new();
        follow(
            Api::<Intercept>::all(client),
            "intercepts",
            watcher::Config::default(),
            |change| match change {
                Change::ListBegins => unconfirmed = self.now().intercepts.keys().cloned().collect(),
                Change::Written(intercept) => {
                    let name = object_name(&intercept.metadata);
                    unconfirmed.remove(&name);
                    let known = Known::new(intercept);
                    self.update(|inner| drop(inner.intercepts.insert(name, known)));
                }
                Change::Deleted(intercept) => {
                    let name = object_name(&intercept.metadata);
                    self.update(|inner| drop(inner.intercepts.remove(&name)));
                }
                Change::ListEnds => {
                    let gone = std::mem::take(&mut unconfirmed);
                    self.update(|inner| {
                        inner.intercepts.retain(|name, _| !gone.contains(name));
                        inner.listed = true;
                    });
                }
            },
        )
        .await
    }

    /// Watches the pods of a namespace and what makes them, for ever.
    pub(super) async fn watch_namespace(&self, client: Client, namespace: Arc<str>) -> Infallible {
        let (pods, sets) = (watch::channel(false).0, watch::channel(false).0);
        let listed = || {
            if *pods.borrow() && *sets.borrow() {
                self.update_scene(&namespace, |scene| scene.listed = true);
            }
        };
        tokio::select! {
            never = self.watch_pods(client.clone(), &namespace, || { pods.send_replace(true); listed(); }) => never,
            never = self.watch_replica_sets(client, &namespace, || { sets.send_replace(true); listed(); }) => never,
        }
    }

    async fn watch_pods(
        &self,
        client: Client,
        namespace: &Arc<str>,
        listed: impl Fn(),
    ) -> Infallible {
        let api = Api::<Pod>::namespaced(client, namespace);
        let running =
            watcher::Config::default().fields("status.phase!=Succeeded,status.phase!=Failed");
        let mut unconfirmed = BTreeSet::new();
        follow(api, "pods to intercept", running, |change| match change {
            Change::ListBegins => {
                let inner = self.now();
                let scene = inner.scenes.get(namespace);
                unconfirmed = scene
                    .into_iter()
                    .flat_map(|scene| scene.pods.keys().cloned())
                    .collect();
            }
            Change::Written(pod) => {
                let name = object_name(&pod.metadata).1;
                unconfirmed.remove(&name);
                let facts = PodFacts::read(&pod);
                self.update_scene(namespace, |scene| match facts {
                    Some(facts) => drop(scene.pods.insert(name, facts)),
                    None => drop(scene.pods.remove(&name)),
                });
            }
            Change::Deleted(pod) => {
                let name = object_name(&pod.metadata).1;
                self.update_scene(namespace, |scene| drop(scene.pods.remove(&name)));
            }
            Change::ListEnds => {
                let gone = std::mem::take(&mut unconfirmed);
                self.update_scene(namespace, |scene| {
                    scene.pods.retain(|name, _| !gone.contains(name))
                });
                listed();
            }
        })
        .await
    }

    async fn watch_replica_sets(
        &self,
        client: Client,
        namespace: &Arc<str>,
        listed: impl Fn(),
    ) -> Infallible {
        let resource = ApiResource::erase::<ReplicaSet>(&());
        let api: Api<Object<Unread, Unread>> = Api::namespaced_with(client, namespace, &resource);
        // A set that is gone has no pods, so its entry decides nothing.
        follow(
            api,
            "replica sets",
            watcher::Config::default(),
            |change| match change {
                Change::ListBegins => {}
                Change::Written(set) => {
                    let owners = set.owner_references();
                    let owner = owners.iter().find(|owner| owner.controller == Some(true));
                    let Some(owner) = owner.map(|owner| (owner.kind.clone(), owner.name.clone()))
                    else {
                        return;
                    };
                    let name = object_name(&set.metadata).1;
                    self.update_scene(namespace, |scene| {
                        drop(scene.replica_sets.insert(name, owner))
                    });
                }
                Change::Deleted(set) => {
                    let name = object_name(&set.metadata).1;
                    self.update_scene(namespace, |scene| drop(scene.replica_sets.remove(&name)));
                }
                Change::ListEnds => listed(),
            },
        )
        .await
    }
}
