//! What an attachment needs to know of a pod, read off the object.
//!
//! Pure. Agents are the ephemeral containers whose names begin as ours do; the newest one counts, and before it the
//! sidecar with which a pod may have been made.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{self, ContainerState, PodSpec};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use tp_manager_api::{AGENT_PREFIX, SIDECAR};

use crate::sidecar::container::Sidecar;

/// One pod that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodFacts {
    /// Name.
    pub(super) name: Arc<str>,
    /// Tells it from a later one of the same name.
    pub(super) uid: Arc<str>,
    /// Once the node has given it one.
    pub(super) address: Option<IpAddr>,
    /// Kind and name of what made it.
    pub(super) controller: Option<(String, String)>,
    /// Whether its containers have been started.
    pub(super) running: bool,
    /// Whether it is on its way out.
    pub(super) terminating: bool,
    /// Whether it is on its node's network.
    pub(super) host_network: bool,
    /// Whether it shares its node's processes or IPC.
    pub(super) host_processes: bool,
    /// Whether the kubelet made it from a file.
    pub(super) is_static: bool,
    /// Whether it says that it is for Windows.
    pub(super) windows: bool,
    /// A service mesh's proxy in it.
    pub(super) mesh: Option<&'static str>,
    /// The node it is bound to.
    pub(super) node: Option<Arc<str>>,
    /// Its labels.
    pub(super) labels: BTreeMap<String, String>,
    /// Agents, in the order in which they were added. The API server keeps another one.
    pub(super) agents: Vec<AgentFacts>,
    /// The agent that it was made with, where it was.
    pub(super) sidecar: Option<SidecarFacts>,
}

/// An agent that a pod was made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SidecarFacts {
    /// Its container.
    pub(super) agent: AgentFacts,
    /// Its key and its ports.
    pub(super) sidecar: Sidecar,
}

/// One agent of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AgentFacts {
    /// Name of its container.
    pub(super) container: String,
    /// Its image, as the pod names it. A sidecar's is no matter: another one comes with another pod.
    pub(super) image: Option<String>,
    /// What the node says of it.
    pub(super) state: AgentState,
}

/// A container's state, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AgentState {
    /// The node has not said anything yet.
    New,
    /// Not started, and why.
    Waiting {
        /// One word.
        reason: String,
        /// A sentence, where there is one.
        message: String,
    },
    /// It runs.
    Running {
        /// Since when, by its node's clock.
        since: Option<Timestamp>,
    },
    /// It has ended, and will not start again.
    Ended {
        /// Its last words, on one line.
        message: String,
        /// How long it lived.
        lived: Duration,
    },
}

/// Containers of service meshes.
const MESHES: [(&str, &str); 3] = [
    ("istio-proxy", "Istio"),
    ("linkerd-proxy", "Linkerd"),
    ("kuma-sidecar", "Kuma"),
];

impl PodFacts {
    /// Reads a pod; `None` for one that has ended or has no name.
    pub(super) fn read(pod: &v1::Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        let status = pod.status.clone().unwrap_or_default();
        let phase = status.phase.as_deref().unwrap_or_default();
        if matches!(phase, "Succeeded" | "Failed") {
            return None;
        }
        let controller = pod
            .owner_references()
            .iter()
            .find(|owner| owner.controller == Some(true));
        Some(Self {
            name: pod.metadata.name.as_deref()?.into(),
            uid: pod.metadata.uid.as_deref()?.into(),
            address: status.pod_ip.as_deref().and_then(|text| text.parse().ok()),
            controller: controller.map(|owner| (owner.kind.clone(), owner.name.clone())),
            running: phase == "Running",
            terminating: pod.metadata.deletion_timestamp.is_some(),
            host_network: spec.host_network == Some(true),
            host_processes: spec.host_pid == Some(true) || spec.host_ipc == Some(true),
            is_static: pod
                .annotations()
                .contains_key("kubernetes.io/config.mirror"),
            windows: is_windows(spec),
            mesh: mesh(spec),
            node: spec.node_name.as_deref().map(Arc::from),
            labels: pod.labels().clone(),
            agents: agents(spec, &status),
            sidecar: sidecar(spec, &status),
        })
    }

    /// The sidecar, or else the newest agent.
    pub(super) fn agent(&self) -> Option<&AgentFacts> {
        match &self.sidecar {
            Some(sidecar) => Some(&sidecar.agent),
            None => self.agents.last(),
        }
    }
}

/// Whether a pod says that it is for Windows.
pub(crate) fn is_windows(spec: &PodSpec) -> bool {
    let selected = spec.node_selector.as_ref();
    let selected = selected.and_then(|labels| labels.get("kubernetes.io/os"));
    spec.os.as_ref().is_some_and(|os| os.name == "windows")
        || selected.is_some_and(|os| os == "windows")
}

/// The service mesh whose proxy a pod has.
pub(crate) fn mesh(spec: &PodSpec) -> Option<&'static str> {
    let mut containers = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten());
    containers.find_map(|container| {
        let known = MESHES.iter().find(|(name, _)| container.name == *name);
        known.map(|(_, mesh)| *mesh)
    })
}

fn agents(spec: &PodSpec, status: &v1::PodStatus) -> Vec<AgentFacts> {
    let containers = spec.ephemeral_containers.iter().flatten();
    let mut agents: Vec<_> = containers
        .filter(|container| container.name.starts_with(AGENT_PREFIX))
        .map(|container| {
            let mut statuses = status.ephemeral_container_statuses.iter().flatten();
            let state = statuses
                .find(|status| status.name == container.name)
                .and_then(|status| status.state.as_ref());
            AgentFacts {
                container: container.name.clone(),
                image: container.image.clone(),
                state: state.map_or(AgentState::New, agent_state),
            }
        })
        .collect();
    agents.sort_by_key(|agent| number(&agent.container));
    agents
}

fn sidecar(spec: &PodSpec, status: &v1::PodStatus) -> Option<SidecarFacts> {
    let native = spec.init_containers.iter().flatten();
    let native = native.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let sidecar = native.chain(&spec.containers).find_map(Sidecar::read)?;
    let statuses = [&status.init_container_statuses, &status.container_statuses];
    let mut statuses = statuses.into_iter().flatten().flatten();
    let state = statuses
        .find(|status| status.name == SIDECAR)
        .and_then(|status| status.state.as_ref());
    let agent = AgentFacts {
        container: SIDECAR.to_owned(),
        image: None,
        state: state.map_or(AgentState::New, agent_state),
    };
    Some(SidecarFacts { agent, sidecar })
}

/// How many agents there were when this one was added, itself included.
pub(super) fn number(container: &str) -> usize {
    let last = container.rsplit('-').next().unwrap_or_default();
    last.parse().unwrap_or_default()
}

fn agent_state(state: &ContainerState) -> AgentState {
    if let Some(ended) = &state.terminated {
        let lived = match (&ended.started_at, &ended.finished_at) {
            (Some(start), Some(end)) => end.0.duration_since(start.0).try_into(),
            (None, _) | (_, None) => Ok(Duration::ZERO),
        };
        let text = ended.message.as_deref().unwrap_or_default();
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        let reason = ended.reason.as_deref().unwrap_or("it ended");
        return AgentState::Ended {
            message: match last {
                Some(last) => last.trim().to_owned(),
                None => format!("{reason}, exit code {}", ended.exit_code),
            },
            lived: lived.unwrap_or_default(),
        };
    }
    match &state.waiting {
        Some(waiting) => AgentState::Waiting {
            reason: waiting.reason.clone().unwrap_or_default(),
            message: waiting.message.clone().unwrap_or_default(),
        },
        None => match &state.running {
            Some(running) => AgentState::Running {
                since: running.started_at.as_ref().map(|time| time.0),
            },
            None => AgentState::New,
        },
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::{Value, json};

    const RUNNING: AgentState = AgentState::Running { since: None };

    pub(in crate::intercepts) fn pod(name: &str, change: Value) -> PodFacts {
        let mut object = json!({
            "metadata": { "name": name, "namespace": "shop", "uid": format!("uid-{name}"),
                "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d", "uid": "r", "controller": true }] },
            "spec": { "nodeName": "node-1", "containers": [{ "name": "web", "image": "web" }] },
            "status": { "phase": "Running", "podIP": "10.244.0.7" },
        });
        merge(&mut object, change);
        PodFacts::read(&serde_json::from_value(object).unwrap()).unwrap()
    }

    fn merge(into: &mut Value, from: Value) {
        match (into, from) {
            (Value::Object(into), Value::Object(from)) => {
                for (key, value) in from {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, from) => *into = from,
        }
    }

    /// What a pod with these agents looks like; a state is that of Kubernetes.
    pub(in crate::intercepts) fn with_agents(agents: &[(&str, Value)]) -> Value {
        let containers: Vec<_> = agents
            .iter()
            .map(|(name, _)| json!({ "name": name, "image": "tp" }))
            .collect();
        let statuses: Vec<_> = agents
            .iter()
            .filter(|(_, state)| !state.is_null())
            .map(|(name, state)| {
                json!({ "name": name, "image": "tp", "imageID": "", "ready": false, "restartCount": 0, "state": state })
            })
            .collect();
        json!({
            "spec": { "ephemeralContainers": containers },
            "status": { "ephemeralContainerStatuses": statuses },
        })
    }

    #[test]
    fn agents_are_read_in_order_and_other_debuggers_are_not_ours() {
        let mut change = with_agents(&[
            ("tp-agent-0-10", Value::Null),
            (
                "tp-agent-0-1",
                json!({ "terminated": { "exitCode": 1, "message": "first\nno NET_ADMIN\n\n",
                    "startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:02Z" } }),
            ),
            ("tp-agent-0-2", json!({ "running": {} })),
        ]);
        change["spec"]["ephemeralContainers"]
            .as_array_mut()
            .unwrap()
            .insert(0, json!({ "name": "debugger-x", "image": "busybox" }));

        let states: Vec<_> = pod("web", change)
            .agents
            .into_iter()
            .map(|agent| agent.state)
            .collect();

        let ended = AgentState::Ended {
            message: "no NET_ADMIN".into(),
            lived: Duration::from_secs(2),
        };
        assert_eq!(states, [ended, RUNNING, AgentState::New]);
    }

    #[test]
    fn what_keeps_an_agent_out_is_read() {
        let plain = pod("web", json!({}));
        assert!(plain.running && plain.mesh.is_none() && !plain.windows && !plain.is_static);
        assert_eq!(
            plain.controller,
            Some(("ReplicaSet".into(), "web-5d".into()))
        );
        let mesh =
            json!({ "spec": { "initContainers": [{ "name": "istio-proxy", "image": "x" }] } });
        assert_eq!(pod("web", mesh).mesh, Some("Istio"));
        let windows = json!({ "spec": { "nodeSelector": { "kubernetes.io/os": "windows" } } });
        assert!(pod("web", windows).windows);
        let mirror =
            json!({ "metadata": { "annotations": { "kubernetes.io/config.mirror": "x" } } });
        assert!(pod("web", mirror).is_static);
        assert!(pod("web", json!({ "spec": { "hostPID": true } })).host_processes);
    }

    /// What a pod looks like that was made with the agent in place of port 8080.
    pub(in crate::intercepts) fn with_sidecar(state: Value) -> Value {
        let container = json!({
            "name": "tp-agent-sidecar", "image": "tp", "restartPolicy": "Always",
            "args": ["--listen", "[::]:15100=8080"],
            "env": [{ "name": "TP_AGENT_SEED", "value": "ab".repeat(32) }],
        });
        let status = json!({ "name": "tp-agent-sidecar", "image": "tp", "imageID": "", "ready": true,
            "restartCount": 0, "state": state });
        json!({
            "spec": { "initContainers": [container] },
            "status": { "initContainerStatuses": [status] },
        })
    }

    #[test]
    fn a_sidecar_is_the_agent_of_its_pod() {
        let mut change = with_sidecar(json!({ "running": {} }));
        merge(
            &mut change,
            with_agents(&[("tp-agent-0-1", json!({ "running": {} }))]),
        );

        let pod = pod("web", change.clone());

        assert_eq!(pod.agent().unwrap().container, "tp-agent-sidecar");
        assert_eq!(pod.agent().unwrap().state, RUNNING);
        assert_eq!(pod.sidecar.unwrap().sidecar.port(8080), Some((15100, 8080)));
        // One that ends before the application starts is none.
        change["spec"]["initContainers"][0]["restartPolicy"] = Value::Null;
        let pod = self::pod("web", change);
        assert_eq!(
            (&*pod.agent().unwrap().container, &pod.sidecar),
            ("tp-agent-0-1", &None)
        );
    }

    #[test]
    fn a_pod_that_has_ended_is_none() {
        let pod: v1::Pod = serde_json::from_value(json!({
            "metadata": { "name": "job", "uid": "u" },
            "spec": { "containers": [] }, "status": { "phase": "Succeeded" },
        }))
        .unwrap();

        assert_eq!(PodFacts::read(&pod), None);
    }
}
