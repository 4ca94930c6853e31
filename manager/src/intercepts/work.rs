//! What the controller asks of the API server, each piece in a task of its own; what came of it is noted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::Api;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
    Preconditions,
};
use tokio::time::Instant;
use tp_manager_api::Intercept;
use tp_manager_api::intercept::{InterceptStatus, Workload, WorkloadKind};

use super::held::Replica;
use super::plan::Attach;
use super::problem::{self, Problem};
use super::world::{Held, NotLetIn, PodUid, Restrictions};
use super::{Controller, KEPT};
use crate::cluster::in_short;
use crate::dial::rights::Right;
use crate::sessions::ObjectName;

/// What a piece of work came to.
pub(super) enum Done {
    Attached(PodUid, Result<(), Option<Problem>>),
    Workload((Arc<str>, Workload), Option<bool>),
    Policies(PodUid, Vec<String>),
    Right(String, Option<bool>),
    Wrote(ObjectName, bool),
    /// A watch or a link ended, as told.
    Ended,
}

/// How often the right to an intercept is asked for again. Two of these pass before it ends at the latest.
const RECHECK: Duration = Duration::from_secs(25);

/// After a refusal to let an agent in.
pub(super) const AGAIN: Duration = Duration::from_secs(3);

/// How long an Intercept may be without its Session. A workstation that makes another one writes it into its Intercepts.
const ORPHANED: Duration = Duration::from_secs(60);

impl Controller {
    pub(super) fn attach(&mut self, attach: &Attach) {
        if !self.attaching.insert(Arc::clone(&attach.uid)) {
            return;
        }
        let pods = Api::<Pod>::namespaced(self.client.clone(), &attach.namespace);
        let mut patch = self.blueprint.patch(&attach.uid, &attach.container);
        // Not a later pod of the same name.
        patch["metadata"] = serde_json::json!({ "uid": *attach.uid });
        let seen = Arc::clone(&self.seen);
        let (pod, uid) = (Arc::clone(&attach.pod), Arc::clone(&attach.uid));
        let (namespace, container) = (Arc::clone(&attach.namespace), attach.container.clone());
        self.work.spawn(async move {
            let patch = Patch::Strategic(patch);
            let patched = pods
                .patch_ephemeral_containers(&pod, &PatchParams::default(), &patch)
                .await;
            match &patched {
                Ok(written) => {
                    tracing::info!(%namespace, %pod, container, "agent added");
                    seen.pod_written(&namespace, written);
                }
                Err(error) => {
                    tracing::warn!(%namespace, %pod, error = in_short(error), "no agent added");
                }
            }
            let refused = |error| Problem::not_let_in(&namespace, &error);
            Done::Attached(uid, patched.map(drop).map_err(refused))
        });
    }

    /// The API server asked when the Intercept was written; rights go without an event.
    pub(super) fn ask_rights(&mut self, held: &[Held]) {
        let now = Instant::now();
        let ids: BTreeSet<_> = held.iter().map(|held| held.id.as_str()).collect();
        self.rights.retain(|id, _| ids.contains(id.as_str()));
        for held in held {
            let fresh = |(_, at): &(bool, Instant)| now.duration_since(*at) < RECHECK;
            if self.rights.get(&held.id).is_some_and(fresh) || self.looking.contains(&held.id) {
                continue;
            }
            let seen = self.seen.now();
            let intercept = seen.intercepts.get(&held.name).map(|known| &known.object);
            let session = intercept.and_then(|intercept| {
                let name = (
                    Arc::clone(&held.name.0),
                    intercept.spec.session.as_str().into(),
                );
                self.sessions.get(&name)
            });
            let Some(session) = session else { continue };
            drop(seen);
            let (town, id) = (Arc::clone(&self.town), held.id.clone());
            let right = Right::Intercepts(Arc::clone(&held.name.0));
            // A refusal that is remembered may be older than the grant by which the object was written.
            let age = match self.rights.contains_key(&id) {
                true => RECHECK / 2,
                false => Duration::ZERO,
            };
            self.looking.insert(id.clone());
            self.work.spawn(async move {
                let asked = town.rights.allows_within(&session.user, &right, age);
                Done::Right(id, asked.await.ok())
            });
        }
    }

    pub(super) fn look_for(&mut self, place: (Arc<str>, Workload)) {
        if !self.looking.insert(format!("{}/{}", place.0, place.1)) {
            return;
        }
        let (group, version) = match place.1.kind {
            WorkloadKind::Pod => ("", "v1"),
            WorkloadKind::Deployment
            | WorkloadKind::StatefulSet
            | WorkloadKind::DaemonSet
            | WorkloadKind::ReplicaSet => ("apps", "v1"),
        };
        let kind = GroupVersionKind::gvk(group, version, place.1.kind.as_str());
        let resource = ApiResource::from_gvk(&kind);
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), &place.0, &resource);
        self.work.spawn(async move {
            let found = api.get_metadata_opt(&place.1.name).await;
            Done::Workload(place, found.ok().map(|found| found.is_some()))
        });
    }

    pub(super) fn look_at(
        &mut self,
        namespace: &Arc<str>,
        pod: &PodUid,
        labels: BTreeMap<String, String>,
    ) {
        if !self.looking.insert(pod.to_string()) {
            return;
        }
        let api = Api::<NetworkPolicy>::namespaced(self.client.clone(), namespace);
        let pod = Arc::clone(pod);
        self.work.spawn(async move {
            let found = api.list(&ListParams::default()).await;
            let policies = found.map(|found| found.items).unwrap_or_default();
            Done::Policies(pod, problem::restricting(policies, &labels))
        });
    }

    pub(super) fn write(&mut self, name: &ObjectName, status: InterceptStatus) {
        let api = Api::<Intercept>::namespaced(self.client.clone(), &name.0);
        let patch = Patch::Merge(serde_json::json!({ "status": status }));
        self.written.insert(name.clone(), status);
        self.writing.insert(name.clone());
        let name = name.clone();
        self.work.spawn(async move {
            let params = PatchParams::default();
            let written = match api.patch_status(&name.1, &params, &patch).await {
                Ok(_) => true,
                Err(kube::Error::Api(status)) if status.code == 404 => true,
                Err(error) => {
                    tracing::warn!(intercept = %name.1, error = in_short(&error), "cannot write the status");
                    tokio::time::sleep(KEPT).await;
                    false
                }
            };
            Done::Wrote(name, written)
        });
    }

    /// Removes Intercepts whose Sessions are gone: nobody else would, and they keep their names from others.
    pub(super) fn sweep(&mut self) {
        let seen = self.seen.now();
        let ready = self.town.cluster.ready_replicas().borrow().clone();
        let replica = Replica {
            name: &self.town.replica,
            ready: &ready,
        };
        let first = replica.is_first();
        let orphans: BTreeMap<_, _> = seen
            .intercepts
            .iter()
            .map(|(name, known)| (name, &known.object))
            .filter(|(_, intercept)| seen.listed && first && self.session_of(intercept).is_none())
            .map(|(name, intercept)| (name.clone(), intercept.metadata.uid.clone()))
            .collect();
        drop(seen);
        self.orphans.retain(|name, _| orphans.contains_key(name));
        for (name, uid) in orphans {
            let since = *self
                .orphans
                .entry(name.clone())
                .or_insert_with(Instant::now);
            if since.elapsed() < ORPHANED {
                continue;
            }
            self.orphans.insert(name.clone(), Instant::now());
            let api = Api::<Intercept>::namespaced(self.client.clone(), &name.0);
            self.work.spawn(async move {
                let exactly_this = DeleteParams {
                    preconditions: Some(Preconditions {
                        uid,
                        resource_version: None,
                    }),
                    ..DeleteParams::default()
                };
                match api.delete(&name.1, &exactly_this).await {
                    Ok(_) => tracing::info!(namespace = %name.0, intercept = %name.1, "Intercept without a Session removed"),
                    Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                    Err(error) => {
                        tracing::warn!(intercept = %name.1, error = in_short(&error), "cannot remove an Intercept");
                    }
                }
                Done::Ended
            });
        }
    }

    pub(super) fn note(&mut self, done: Result<Done, tokio::task::JoinError>) {
        match done {
            Ok(Done::Attached(pod, result)) => {
                self.attaching.remove(&pod);
                match result {
                    Ok(()) | Err(None) => drop(self.not_let_in.remove(&pod)),
                    Err(Some(problem)) => {
                        let again = Instant::now() + AGAIN;
                        self.not_let_in.insert(pod, NotLetIn { problem, again });
                    }
                }
            }
            Ok(Done::Workload(place, found)) => {
                self.looking.remove(&format!("{}/{}", place.0, place.1));
                if let Some(found) = found {
                    self.workloads.insert(place, (found, Instant::now()));
                }
            }
            Ok(Done::Policies(pod, names)) => {
                self.looking.remove(&*pod);
                let seen = Instant::now();
                self.policies.insert(pod, Restrictions { names, seen });
            }
            Ok(Done::Right(id, allowed)) => {
                self.looking.remove(&id);
                // While nobody can be asked the last answer stands.
                let before = self.rights.get(&id).is_none_or(|(allowed, _)| *allowed);
                let answer = (allowed.unwrap_or(before), Instant::now());
                self.rights.insert(id, answer);
            }
            Ok(Done::Wrote(name, written)) => {
                self.writing.remove(&name);
                if !written {
                    self.written.remove(&name);
                }
            }
            Ok(Done::Ended) => {}
            Err(error) if error.is_cancelled() => {}
            Err(error) => tracing::error!(%error, "a task of the controller ended abnormally"),
        }
    }
}
