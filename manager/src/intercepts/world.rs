//! What a plan is made of: intercepts, pods, connections, and what was tried before.
//!
//! Pure. Owners lead from a pod to its workload, so that a pod belongs from the moment it exists.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;
use tp_manager_api::Matchers;
use tp_manager_api::intercept::{AttachMode, Workload, WorkloadKind};
use tp_manager_api::route_table::Protocol;
use tp_manager_api::tls::Found;

use super::pod::PodFacts;
use super::problem::Problem;
use super::secret::Secret;
use crate::inventory::Node;
use crate::sessions::ObjectName;

/// A pod's uid.
pub(super) type PodUid = Arc<str>;

/// An intercept that this replica serves.
#[derive(Clone, Debug)]
pub(super) struct Held {
    /// Namespace and name of the object.
    pub(super) name: ObjectName,
    /// Uid of the object, by which agent and workstation know it.
    pub(super) id: String,
    /// Whose it is.
    pub(super) user: String,
    /// Milliseconds since 1970 of its creation.
    pub(super) created: i64,
    /// What is intercepted.
    pub(super) workload: Workload,
    /// Port of the pods.
    pub(super) port: u16,
    /// What is carried to it.
    pub(super) protocol: Protocol,
    /// Which requests.
    pub(super) matchers: Matchers,
    /// No fallback.
    pub(super) strict: bool,
    /// What opens TLS for it.
    pub(super) tls: Option<Secret>,
    /// Reset what was open before, once it is idle.
    pub(super) close_idle: bool,
    /// How to attach.
    pub(super) attach: AttachMode,
    /// Whether the workstation is connected at this moment.
    pub(super) connected: bool,
    /// What is wrong with the intercept itself. Its pods are then left alone.
    pub(super) problem: Option<Problem>,
    /// Another replica serves it now; agents that this one is connected to keep its route for a moment.
    pub(super) outgoing: bool,
}

/// What is seen of a namespace.
#[derive(Clone, Debug, Default)]
pub(super) struct Scene {
    /// Pods that have not ended, by name.
    pub(super) pods: BTreeMap<Arc<str>, PodFacts>,
    /// Kind and name of what made a ReplicaSet, by the ReplicaSet's name.
    pub(super) replica_sets: BTreeMap<Arc<str>, (String, String)>,
    /// Whether both lists are complete.
    pub(super) listed: bool,
}

impl Scene {
    /// The pods of a workload.
    pub(super) fn pods_of<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = &'a PodFacts> {
        self.pods.values().filter(|pod| self.belongs(pod, workload))
    }

    fn belongs(&self, pod: &PodFacts, workload: &Workload) -> bool {
        let is = |made_by: &(String, String)| {
            made_by.0 == workload.kind.as_str() && made_by.1 == workload.name
        };
        match (workload.kind, &pod.controller) {
            (WorkloadKind::Pod, _) => *pod.name == *workload.name,
            (_, None) => false,
            (WorkloadKind::Deployment, Some((kind, name))) => {
                let made_by = self.replica_sets.get(name.as_str());
                kind == "ReplicaSet" && made_by.is_some_and(is)
            }
            (
                WorkloadKind::StatefulSet | WorkloadKind::DaemonSet | WorkloadKind::ReplicaSet,
                Some(controller),
            ) => is(controller),
        }
    }
}

/// How a connection to an agent stands.
#[derive(Clone, Debug)]
pub(super) struct LinkView {
    /// The agent.
    pub(super) container: String,
    /// Where it got to.
    pub(super) state: LinkState,
}

/// Where a connection to an agent got to.
#[derive(Clone, Debug)]
pub(super) enum LinkState {
    /// Not connected.
    Dialing {
        /// Since when.
        since: Instant,
        /// How the last try ended.
        trouble: Option<Trouble>,
    },
    /// Connected.
    Connected {
        /// Ids of the intercepts in the table that the agent took last.
        routed: BTreeSet<String>,
        /// Connections to each intercepted port that were open before, once the agent has said.
        open_before: BTreeMap<u16, u32>,
        /// By intercept, what keeps the agent from opening TLS.
        unopened: BTreeMap<String, Found>,
    },
    /// It has left the pod to the next agent.
    Yielded,
}

/// Why an agent was not reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// No answer.
    Silent,
    /// Nothing listens.
    Refused,
    /// Something else.
    Other(String),
}

/// A refusal to let an agent in, and when to try again.
#[derive(Clone, Debug)]
pub(super) struct NotLetIn {
    /// Why.
    pub(super) problem: Problem,
    /// Not before.
    pub(super) again: Instant,
}

/// NetworkPolicies that select a pod and restrict what comes in.
#[derive(Clone, Debug)]
pub(super) struct Restrictions {
    /// Their names.
    pub(super) names: Vec<String>,
    /// When they were looked for.
    pub(super) seen: Instant,
}

/// All that a plan is made of.
pub(super) struct World<'a> {
    /// What this replica serves.
    pub(super) held: &'a [Held],
    /// Namespaces that are watched.
    pub(super) scenes: &'a BTreeMap<Arc<str>, Scene>,
    /// A node by its name.
    pub(super) node: &'a dyn Fn(&str) -> Option<Node>,
    /// Connections to agents.
    pub(super) links: &'a BTreeMap<PodUid, LinkView>,
    /// Pods into which an agent is being put.
    pub(super) attaching: &'a BTreeSet<PodUid>,
    /// Pods into which none was let.
    pub(super) not_let_in: &'a BTreeMap<PodUid, NotLetIn>,
    /// Workloads that were looked for, and whether they exist.
    pub(super) workloads: &'a BTreeMap<(Arc<str>, Workload), bool>,
    /// What may be keeping us from a pod, for those that were looked at.
    pub(super) policies: &'a BTreeMap<PodUid, Restrictions>,
    /// Namespace of the manager.
    pub(super) own_namespace: &'a str,
    /// Image of the agents that this replica adds.
    pub(super) image: &'a str,
    /// When this replica began, by its node's clock.
    pub(super) began: Timestamp,
    /// Now.
    pub(super) now: Instant,
}

impl<'a> World<'a> {
    /// How the connection to the agent of a pod stands.
    pub(super) fn link_to(&self, pod: &PodFacts) -> Option<&'a LinkState> {
        let link = self.links.get(&pod.uid)?;
        let newest = pod
            .agent()
            .is_some_and(|agent| agent.container == link.container);
        newest.then_some(&link.state)
    }
}
