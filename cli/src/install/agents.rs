//! Pods that keep an agent. Kubernetes never takes a container out of a pod, so it is there until the pod is replaced: an
//! ephemeral one ended, a sidecar passing everything to the application.

use std::time::Duration;

use futures::{StreamExt as _, stream};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use kube::api::{AttachParams, ListParams, Patch, PatchParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tp_manager_api::{AGENT_PREFIX, AGENT_PROGRAM, AGENT_RETIRE};

use super::FIELD_MANAGER;
use crate::kubeconfig::Cluster;
use crate::report::{Failure, is_denial};

/// Pods asked for at a time.
const PAGE: u32 = 500;

/// A pod with an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// The ephemeral container whose agent runs.
    running: Option<String>,
    controller: Option<(String, String)>,
}

/// All pods that have not ended and have an agent. Without the right to look everywhere, none.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn kept(cluster: &Cluster) -> Result<Vec<Kept>, Failure> {
    let pods: Api<Pod> = Api::all(cluster.client.clone());
    let (mut kept, mut next) = (Vec::new(), None);
    loop {
        let params = ListParams {
            limit: Some(PAGE),
            continue_token: next,
            ..ListParams::default()
        };
        let page = match pods.list(&params).await {
            Ok(page) => page,
            Err(error) if is_denial(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        kept.extend(page.items.iter().filter_map(with_agent));
        next = page.metadata.continue_.filter(|token| !token.is_empty());
        if next.is_none() {
            return Ok(kept);
        }
    }
}

fn with_agent(pod: &Pod) -> Option<Kept> {
    let spec = pod.spec.as_ref()?;
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    let first = spec.init_containers.iter().flatten();
    let mut names = ephemeral.map(|container| &container.name).chain(
        first
            .chain(&spec.containers)
            .map(|container| &container.name),
    );
    let has = names.any(|name| name.starts_with(AGENT_PREFIX));
    let lives =
        !matches!(phase, Some("Succeeded" | "Failed")) && pod.metadata.deletion_timestamp.is_none();
    (has && lives).then(|| Kept {
        namespace: pod.namespace().unwrap_or_default(),
        pod: pod.name_any(),
        running: running(pod).map(str::to_owned),
        controller: controller(pod.owner_references()),
    })
}

/// The ephemeral container whose agent runs.
fn running(pod: &Pod) -> Option<&str> {
    let status = pod.status.as_ref()?;
    let mut agents = status.ephemeral_container_statuses.iter().flatten();
    let running = agents.find(|agent| {
        let state = agent.state.as_ref();
        agent.name.starts_with(AGENT_PREFIX) && state.is_some_and(|state| state.running.is_some())
    });
    running.map(|agent| &*agent.name)
}

/// An agent that goes on.
#[derive(Debug)]
pub struct Left {
    /// Its pod, as `namespace/name`.
    pub pod: String,
    /// Why it goes on.
    pub why: Failure,
}

/// Ends the agents that run in ephemeral containers, each by a command in its container, and waits until they have ended.
/// Returns how many did, and those that go on.
pub async fn end(cluster: &Cluster, kept: &[Kept]) -> (usize, Vec<Left>) {
    let running = kept
        .iter()
        .filter_map(|kept| Some((kept, kept.running.as_deref()?)));
    let ends = running.map(|(kept, container)| async move {
        let ended = end_one(cluster, kept, container).await;
        let pod = format!("{}/{}", kept.namespace, kept.pod);
        ended.map_err(|why| Left { pod, why })
    });
    let ends: Vec<_> = stream::iter(ends).buffer_unordered(AT_ONCE).collect().await;
    let ended = ends.iter().filter(|end| end.is_ok()).count();
    (ended, ends.into_iter().filter_map(Result::err).collect())
}

async fn end_one(cluster: &Cluster, kept: &Kept, container: &str) -> Result<(), Failure> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &kept.namespace);
    let how = AttachParams::default()
        .container(container)
        .stdin(false)
        .stdout(false)
        .stderr(true);
    let words = [AGENT_PROGRAM, AGENT_RETIRE];
    let asked = pods.exec(&kept.pod, words, &how);
    let mut command = cluster.in_time(asked).await?;
    let ending = async {
        let mut said = String::new();
        if let Some(stderr) = command.stderr() {
            // Where all is well it says nothing, and may be gone with the agent.
            let _ = stderr.take(SAID_MAX).read_to_string(&mut said).await;
        }
        if let Some(why) = said.lines().find(|line| !line.trim().is_empty()) {
            return Err(Failure::new(why.trim()));
        }
        let has_ended = |pod: Option<&Pod>| pod.is_none_or(|pod| running(pod) != Some(container));
        let seen = await_condition(pods.clone(), &kept.pod, has_ended).await;
        seen.map(drop)
            .map_err(|error| Failure::new("its pod cannot be watched").caused_by(&error))
    };
    match tokio::time::timeout(DRAIN, ending).await {
        Ok(ended) => ended,
        Err(_) => Err(Failure::new(format!("it has not ended within {DRAIN:?}"))),
    }
}

/// Pods whose agents are ended at a time.
const AT_ONCE: usize = 8;

/// Bytes of what a command says.
const SAID_MAX: u64 = 4096;

/// How long an agent may take: it drains its connections first, and its node is a moment behind.
const DRAIN: Duration = Duration::from_secs(40);

fn controller(owners: &[OwnerReference]) -> Option<(String, String)> {
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    Some((owner.kind.clone(), owner.name.clone()))
}

/// Rolls the workloads of these pods, each once, as `kubectl rollout restart` does. Returns what was rolled; pods that
/// nothing makes anew are left alone.
///
/// # Errors
/// What the API server refuses.
pub async fn restart(cluster: &Cluster, kept: &[Kept]) -> Result<Vec<String>, Failure> {
    let client = &cluster.client;
    let mut workloads = Vec::new();
    for pod in kept {
        if let Some(workload) = workload(client, pod).await? {
            workloads.push((pod.namespace.clone(), workload));
        }
    }
    workloads.sort();
    workloads.dedup();
    let mut rolled = Vec::new();
    for (namespace, (kind, name)) in workloads {
        let known = match kind.as_str() {
            "Deployment" => roll::<Deployment>(client, &namespace, &name).await,
            "StatefulSet" => roll::<StatefulSet>(client, &namespace, &name).await,
            "DaemonSet" => roll::<DaemonSet>(client, &namespace, &name).await,
            _ => continue,
        };
        known?;
        rolled.push(format!("{kind} {namespace}/{name}"));
    }
    Ok(rolled)
}

async fn workload(client: &Client, pod: &Kept) -> Result<Option<(String, String)>, Failure> {
    match &pod.controller {
        Some((kind, name)) if kind == "ReplicaSet" => {
            let sets: Api<ReplicaSet> = Api::namespaced(client.clone(), &pod.namespace);
            let set = sets.get_opt(name).await?;
            Ok(set.and_then(|set| controller(set.owner_references())))
        }
        other => Ok(other.clone()),
    }
}

async fn roll<K>(client: &Client, namespace: &str, name: &str) -> Result<(), Failure>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let workloads: Api<K> = Api::namespaced(client.clone(), namespace);
    let annotations = json!({ "kubectl.kubernetes.io/restartedAt": Timestamp::now().to_string() });
    let patch = json!({ "spec": { "template": { "metadata": { "annotations": annotations } } } });
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    match workloads
        .patch(name, &params, &Patch::Strategic(patch))
        .await
    {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        patched => patched.map(drop).map_err(Failure::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn pod(spec: Value, phase: &str) -> Option<Kept> {
        with_status(spec, json!({ "phase": phase }))
    }

    fn with_status(spec: Value, status: Value) -> Option<Kept> {
        let pod = json!({
            "metadata": { "name": "web-1", "namespace": "shop", "ownerReferences": [
                { "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d", "uid": "u", "controller": true }] },
            "spec": spec, "status": status,
        });
        with_agent(&serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn only_living_pods_with_an_agent_of_ours_count() {
        let with = |name: &str| json!({ "containers": [], "ephemeralContainers": [{ "name": name, "image": "x" }] });

        let found = pod(with("tp-agent-0-1-0-1"), "Running").unwrap();
        assert_eq!((&*found.namespace, &*found.pod), ("shop", "web-1"));
        assert_eq!(
            found.controller,
            Some(("ReplicaSet".into(), "web-5d".into()))
        );
        let sidecar =
            json!({ "containers": [], "initContainers": [{ "name": "tp-agent-sidecar" }] });
        assert!(pod(sidecar, "Running").is_some());
        assert_eq!(found.running, None);
        let states = json!({ "phase": "Running", "ephemeralContainerStatuses": [
            { "name": "tp-agent-0-1-0-1", "image": "x", "imageID": "", "ready": false, "restartCount": 0,
              "state": { "terminated": { "exitCode": 0 } } },
            { "name": "tp-agent-0-1-0-2", "image": "x", "imageID": "", "ready": false, "restartCount": 0,
              "state": { "running": {} } },
        ]});
        let found = with_status(with("tp-agent-0-1-0-2"), states).unwrap();
        assert_eq!(found.running.as_deref(), Some("tp-agent-0-1-0-2"));
        assert_eq!(pod(with("debugger-x"), "Running"), None);
        assert_eq!(pod(with("tp-agent-0-1-0-1"), "Succeeded"), None);
        assert_eq!(pod(json!({ "containers": [] }), "Running"), None);
    }
}
