//! Workloads of a namespace: which there are, their pods, and what keeps them from being intercepted.
//!
//! Asked of the API server as the user. What [`Found::obstacle`] says is pure, and only what can be seen from here:
//! admission policies and nodes are the manager's to find out.

use std::collections::BTreeMap;
use std::fmt::Debug;

use futures::future::join_all;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, PodTemplateSpec, Service};
use kube::api::ListParams;
use kube::{Api, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tp_manager_api::intercept::{Workload, WorkloadKind};

use super::ports::Scene;
use crate::kubeconfig::Cluster;
use crate::report::{Failure, is_denial};

/// One workload, as its object describes it.
#[derive(Debug, Clone)]
pub struct Found {
    /// Kind and name.
    pub workload: Workload,
    /// Labels of its pods.
    pub labels: BTreeMap<String, String>,
    /// Its pods.
    pub spec: PodSpec,
    /// Pods that are ready.
    pub ready: u32,
    /// Written by the kubelet from a file of the node.
    is_static: bool,
}

/// The workloads of a namespace.
#[derive(Debug, Default)]
pub struct Listing {
    /// By kind, then by name.
    pub workloads: Vec<Found>,
    /// Why some kinds are missing: the user may not list them.
    pub denied: Vec<Failure>,
}

impl Found {
    /// Its ports with the Services before it.
    #[must_use]
    pub fn scene<'a>(&'a self, services: &'a [Service]) -> Scene<'a> {
        Scene {
            labels: &self.labels,
            spec: &self.spec,
            services,
        }
    }

    /// One of a test's own.
    #[cfg(test)]
    pub(super) fn new(workload: Workload, labels: BTreeMap<String, String>, spec: PodSpec) -> Self {
        Self {
            workload,
            labels,
            spec,
            ready: 1,
            is_static: false,
        }
    }

    /// Why nothing of it can be intercepted, as far as it can be seen from here.
    #[must_use]
    pub fn obstacle(&self, namespace: &str) -> Option<&'static str> {
        let has = |label: &str, value: &str| self.labels.get(label).is_some_and(|v| v == value);
        let os = |os: &str| {
            let named = self.spec.os.as_ref().is_some_and(|given| given.name == os);
            let selector = self.spec.node_selector.as_ref();
            named || selector.is_some_and(|s| s.get("kubernetes.io/os").is_some_and(|v| v == os))
        };
        let found = [
            (
                namespace == "kube-system",
                "nothing is intercepted in kube-system",
            ),
            (
                has("app.kubernetes.io/name", "tp")
                    && has("app.kubernetes.io/component", "manager"),
                "it is the manager itself",
            ),
            (
                self.is_static,
                "it is a static pod, which only its node's kubelet changes",
            ),
            (
                self.spec.host_network == Some(true),
                "its pods use their node's network",
            ),
            (os("windows"), "its pods run on Windows"),
            (
                self.containers().any(is_mesh),
                "its pods have a service mesh's proxy",
            ),
        ];
        found
            .into_iter()
            .find_map(|(is_so, why)| is_so.then_some(why))
    }

    /// The container that is meant: the named one, the one that has a port, or the first.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn container(&self, named: Option<&str>, of_port: Option<&str>) -> Result<String, Failure> {
        let names = self.spec.containers.iter().map(|c| c.name.as_str());
        let names: Vec<&str> = names.collect();
        match named {
            Some(named) if !names.contains(&named) => {
                let what = format!("{} has no container {named}", self.workload);
                Err(Failure::new(what).because(format!("it has {}", names.join(", "))))
            }
            Some(named) => Ok(named.to_owned()),
            None => {
                let first = names.first().copied().unwrap_or_default();
                Ok(of_port.unwrap_or(first).to_owned())
            }
        }
    }

    fn containers(&self) -> impl Iterator<Item = &Container> {
        let first = self.spec.init_containers.iter().flatten();
        self.spec.containers.iter().chain(first)
    }

    fn of_template(
        kind: WorkloadKind,
        name: String,
        template: PodTemplateSpec,
        ready: Option<i32>,
    ) -> Self {
        Self {
            workload: Workload { kind, name },
            labels: template
                .metadata
                .and_then(|meta| meta.labels)
                .unwrap_or_default(),
            spec: template.spec.unwrap_or_default(),
            ready: ready
                .and_then(|ready| u32::try_from(ready).ok())
                .unwrap_or(0),
            is_static: false,
        }
    }
}

fn is_mesh(container: &Container) -> bool {
    matches!(container.name.as_str(), "istio-proxy" | "linkerd-proxy")
}

/// An object that is a workload, unless another one manages it.
trait Kind:
    Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned
{
    fn found(self) -> Found;
}

impl Kind for Deployment {
    fn found(self) -> Found {
        let (name, spec) = (self.name_any(), self.spec.unwrap_or_default());
        let ready = self.status.and_then(|status| status.ready_replicas);
        Found::of_template(WorkloadKind::Deployment, name, spec.template, ready)
    }
}

impl Kind for StatefulSet {
    fn found(self) -> Found {
        let (name, spec) = (self.name_any(), self.spec.unwrap_or_default());
        let ready = self.status.and_then(|status| status.ready_replicas);
        Found::of_template(WorkloadKind::StatefulSet, name, spec.template, ready)
    }
}

impl Kind for DaemonSet {
    fn found(self) -> Found {
        let (name, spec) = (self.name_any(), self.spec.unwrap_or_default());
        let ready = self.status.map(|status| status.number_ready);
        Found::of_template(WorkloadKind::DaemonSet, name, spec.template, ready)
    }
}

impl Kind for ReplicaSet {
    fn found(self) -> Found {
        let (name, spec) = (self.name_any(), self.spec.unwrap_or_default());
        let ready = self.status.and_then(|status| status.ready_replicas);
        Found::of_template(
            WorkloadKind::ReplicaSet,
            name,
            spec.template.unwrap_or_default(),
            ready,
        )
    }
}

impl Kind for Pod {
    fn found(self) -> Found {
        let is_static = self
            .annotations()
            .contains_key("kubernetes.io/config.mirror");
        let ready = i32::from(is_ready(&self));
        let (name, labels) = (self.name_any(), self.labels().clone());
        let template = PodTemplateSpec {
            metadata: Some(kube::core::ObjectMeta {
                labels: Some(labels),
                ..Default::default()
            }),
            spec: self.spec,
        };
        Found {
            is_static,
            ..Found::of_template(WorkloadKind::Pod, name, template, Some(ready))
        }
    }
}

/// Whether a pod runs and is ready.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    pod.metadata.deletion_timestamp.is_none() && ready.any(|condition| condition.status == "True")
}

/// The workload that `name` means: `web`, or `deployment/web` where there are several.
///
/// # Errors
/// There is none, there are several, or the API server refused.
pub async fn find(cluster: &Cluster, namespace: &str, name: &str) -> Result<Found, Failure> {
    let (kinds, name) = meant(name)?;
    let asked = kinds
        .iter()
        .map(|kind| get(cluster, namespace, *kind, name));
    let (mut found, mut denied) = (Vec::new(), Vec::new());
    for answer in join_all(asked).await {
        match answer? {
            Ok(workload) => found.extend(workload),
            Err(denial) => denied.push(denial),
        }
    }
    let names: Vec<_> = found
        .iter()
        .map(|found| found.workload.to_string())
        .collect();
    match (found.len(), denied.pop()) {
        (1, _) => Ok(found.remove(0)),
        (0, Some(denial)) => Err(denial),
        (0, None) => Err(Failure::new(format!("there is no workload {name} in namespace {namespace}"))
            .hint("`tp list` shows what there is; another name than the workload's goes with `-w WORKLOAD`")),
        (_, _) => Err(Failure::new(format!("there are several workloads named {name}"))
            .hint(format!("say which: {}", names.join(", ")))),
    }
}

/// Kinds that a name may be of, and the name without its kind.
fn meant(name: &str) -> Result<(Vec<WorkloadKind>, &str), Failure> {
    let Some((kind, name)) = name.split_once('/') else {
        return Ok((WorkloadKind::ALL.to_vec(), name));
    };
    let matches = |known: &WorkloadKind| {
        let known = known.as_str().to_ascii_lowercase();
        let short = match known.as_str() {
            "deployment" => "deploy",
            "statefulset" => "sts",
            "daemonset" => "ds",
            "replicaset" => "rs",
            _ => "po",
        };
        let kind = kind.to_ascii_lowercase();
        kind == known || kind == format!("{known}s") || kind == short
    };
    match WorkloadKind::ALL.into_iter().find(matches) {
        Some(kind) => Ok((vec![kind], name)),
        None => Err(Failure::new(format!("{kind} is no kind of workload"))
            .because("there are deployment, statefulset, daemonset, replicaset and pod")
            .exit(crate::report::USAGE)),
    }
}

/// A denial is an answer: a name may be of a kind that the user may see.
async fn get(
    cluster: &Cluster,
    namespace: &str,
    kind: WorkloadKind,
    name: &str,
) -> Result<Result<Option<Found>, Failure>, Failure> {
    match kind {
        WorkloadKind::Deployment => get_one::<Deployment>(cluster, namespace, name).await,
        WorkloadKind::StatefulSet => get_one::<StatefulSet>(cluster, namespace, name).await,
        WorkloadKind::DaemonSet => get_one::<DaemonSet>(cluster, namespace, name).await,
        WorkloadKind::ReplicaSet => get_one::<ReplicaSet>(cluster, namespace, name).await,
        WorkloadKind::Pod => get_one::<Pod>(cluster, namespace, name).await,
    }
}

async fn get_one<K: Kind>(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
) -> Result<Result<Option<Found>, Failure>, Failure> {
    let api: Api<K> = Api::namespaced(cluster.client.clone(), namespace);
    let asked = async { Ok(api.get_opt(name).await) };
    match cluster.in_time(asked).await? {
        Err(denied) if is_denial(&denied) => Ok(Err(denied.into())),
        answer => Ok(Ok(answer?.map(Kind::found))),
    }
}

/// Every workload of a namespace that no other one manages.
///
/// # Errors
/// The API server cannot be asked, or lets the user see none of the kinds.
pub async fn list(cluster: &Cluster, namespace: &str) -> Result<Listing, Failure> {
    let (deployments, stateful_sets, daemon_sets, replica_sets, pods) = futures::join!(
        list_one::<Deployment>(cluster, namespace),
        list_one::<StatefulSet>(cluster, namespace),
        list_one::<DaemonSet>(cluster, namespace),
        list_one::<ReplicaSet>(cluster, namespace),
        list_one::<Pod>(cluster, namespace),
    );
    let mut listing = Listing::default();
    let kinds = [deployments, stateful_sets, daemon_sets, replica_sets, pods];
    let number = kinds.len();
    for kind in kinds {
        match kind? {
            Ok(found) => listing.workloads.extend(found),
            Err(denial) => listing.denied.push(denial),
        }
    }
    match listing.denied.pop() {
        Some(denial) if listing.denied.len() + 1 == number => Err(denial),
        Some(denial) => {
            listing.denied.push(denial);
            Ok(listing)
        }
        None => Ok(listing),
    }
}

async fn list_one<K: Kind>(
    cluster: &Cluster,
    namespace: &str,
) -> Result<Result<Vec<Found>, Failure>, Failure> {
    let api: Api<K> = Api::namespaced(cluster.client.clone(), namespace);
    let everything = ListParams::default();
    let asked = async { Ok(api.list(&everything).await) };
    match cluster.in_time(asked).await? {
        Err(denied) if is_denial(&denied) => Ok(Err(denied.into())),
        answer => Ok(Ok(answer?
            .items
            .into_iter()
            .filter(is_own)
            .map(Kind::found)
            .collect())),
    }
}

/// Whether no other object makes it anew. A node owns its static pods.
fn is_own(object: &impl Resource) -> bool {
    let owners = object.meta().owner_references.iter().flatten();
    let mut controllers = owners.filter(|owner| owner.controller == Some(true));
    controllers.all(|owner| owner.kind == "Node")
}

/// The Services of a namespace; none where the user may not list them.
///
/// # Errors
/// The API server cannot be asked.
pub async fn services(cluster: &Cluster, namespace: &str) -> Result<Vec<Service>, Failure> {
    let api: Api<Service> = Api::namespaced(cluster.client.clone(), namespace);
    let everything = ListParams::default();
    let asked = async { Ok(api.list(&everything).await) };
    match cluster.in_time(asked).await? {
        Err(denied) if is_denial(&denied) => Ok(Vec::new()),
        answer => Ok(answer?.items),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn deployment(pod: Value) -> Found {
        let object: Deployment = serde_json::from_value(json!({
            "metadata": { "name": "web" },
            "spec": { "selector": {}, "template": { "metadata": { "labels": { "app": "web" } }, "spec": pod } },
            "status": { "readyReplicas": 2 },
        }))
        .unwrap();
        object.found()
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        let plain = json!([{ "name": "app" }]);
        let web = deployment(json!({ "containers": plain }));
        assert_eq!(web.workload.to_string(), "deployment/web");
        assert_eq!((web.ready, web.obstacle("shop")), (2, None));
        assert!(web.obstacle("kube-system").is_some());
        for (pod, part) in [
            (
                json!({ "containers": plain, "hostNetwork": true }),
                "network",
            ),
            (
                json!({ "containers": plain, "os": { "name": "windows" } }),
                "Windows",
            ),
            (
                json!({ "containers": plain, "nodeSelector": { "kubernetes.io/os": "windows" } }),
                "Windows",
            ),
            (json!({ "containers": [{ "name": "istio-proxy" }] }), "mesh"),
            (
                json!({ "containers": plain, "initContainers": [{ "name": "linkerd-proxy" }] }),
                "mesh",
            ),
        ] {
            let obstacle = deployment(pod).obstacle("shop").unwrap();
            assert!(obstacle.contains(part), "{obstacle}");
        }
    }

    #[test]
    fn a_container_is_the_named_one_the_ports_or_the_first() {
        let web = deployment(json!({ "containers": [{ "name": "app" }, { "name": "side" }] }));
        assert_eq!(web.container(None, None).unwrap(), "app");
        assert_eq!(web.container(None, Some("side")).unwrap(), "side");
        assert_eq!(web.container(Some("side"), Some("app")).unwrap(), "side");
        let missing = web.container(Some("x"), None).unwrap_err();
        assert_eq!(missing.why, ["it has app, side"]);
    }

    #[test]
    fn a_name_may_carry_its_kind_as_kubectl_takes_it() {
        for (text, kinds, name) in [
            ("web", &WorkloadKind::ALL[..], "web"),
            ("deploy/web", &[WorkloadKind::Deployment], "web"),
            ("Deployments/web", &[WorkloadKind::Deployment], "web"),
            ("sts/db", &[WorkloadKind::StatefulSet], "db"),
            ("ds/x", &[WorkloadKind::DaemonSet], "x"),
            ("rs/x", &[WorkloadKind::ReplicaSet], "x"),
            ("pod/x", &[WorkloadKind::Pod], "x"),
        ] {
            assert_eq!(meant(text).unwrap(), (kinds.to_vec(), name), "{text}");
        }
        assert_eq!(meant("job/x").unwrap_err().exit, crate::report::USAGE);
    }

    #[test]
    fn what_another_object_manages_is_no_workload_of_its_own() {
        let pod = |owner: Value| -> Pod {
            serde_json::from_value(
                json!({ "metadata": { "name": "web-1", "ownerReferences": owner } }),
            )
            .unwrap()
        };
        let owner = |kind: &str| json!([{ "apiVersion": "v1", "kind": kind, "name": "x", "uid": "u", "controller": true }]);
        assert!(is_own(&pod(json!([]))));
        assert!(is_own(&pod(owner("Node"))));
        assert!(!is_own(&pod(owner("ReplicaSet"))));
        assert!(!is_own(&pod(owner("Job"))));
    }
}
