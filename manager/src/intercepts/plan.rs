//! What to do next: what is seen and what is under way in, what to begin and what to report out.
//!
//! Pure, and without memory: the same world gives the same plan, so it is asked again after every change. Each pod of an
//! intercepted workload goes through the same steps: an agent is put into it, the manager connects to that agent, and
//! the agent takes the routes. What does not go on has a [`Problem`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tp_manager_api::intercept::{AttachMode, Reason, Workload, WorkloadKind};
use tp_manager_api::route_table::{PortRoutes, Route, RouteTable};
use tp_manager_api::{AGENT_PORT, Matchers};

use super::container::container_name;
use super::pod::{AgentFacts, AgentState, PodFacts, number};
use super::problem::Problem;
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
    /// Which requests.
    pub(super) matchers: Matchers,
    /// No fallback.
    pub(super) strict: bool,
    /// Reset what was open before, once it is idle.
    pub(super) close_idle: bool,
    /// How to attach.
    pub(super) attach: AttachMode,
    /// Whether the workstation is connected at this moment.
    pub(super) connected: bool,
    /// What is wrong with the intercept itself. Its pods are then left alone.
    pub(super) problem: Option<Problem>,
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
    fn pods_of<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = &'a PodFacts> {
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
    },
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
    /// NetworkPolicies that may be what keeps us from a pod.
    pub(super) policies: &'a BTreeMap<PodUid, Vec<String>>,
    /// Namespace of the manager.
    pub(super) own_namespace: &'a str,
    /// Now.
    pub(super) now: Instant,
}

/// What to do.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Agents to put into pods.
    pub(super) attach: Vec<Attach>,
    /// Connections to agents that there are to be, with their routes; all others end.
    pub(super) links: BTreeMap<PodUid, Wanted>,
    /// What to say of each intercept.
    pub(super) reports: Vec<Report>,
    /// Workloads to look for.
    pub(super) look_for: BTreeSet<(Arc<str>, Workload)>,
    /// Pods whose NetworkPolicies to look for.
    pub(super) look_at: Vec<(Arc<str>, PodUid, BTreeMap<String, String>)>,
}

/// An agent to put into a pod.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Attach {
    /// Namespace of the pod.
    pub(super) namespace: Arc<str>,
    /// Name of the pod.
    pub(super) pod: Arc<str>,
    /// The pod.
    pub(super) uid: PodUid,
    /// Name of the container.
    pub(super) container: String,
}

/// A connection to an agent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Where the agent listens.
    pub(super) address: SocketAddr,
    /// Which one it is.
    pub(super) container: String,
    /// What it is told.
    pub(super) orders: Orders,
}

/// What this replica tells an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Orders {
    /// Its routes.
    pub(super) table: RouteTable,
    /// Whether it resets idle connections from before.
    pub(super) close_idle: bool,
}

/// What to say of an intercept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Report {
    /// The intercept.
    pub(super) name: ObjectName,
    /// What keeps it from being ready, if it is not.
    pub(super) problem: Option<Problem>,
    /// Its pods that count: running ones, and those that cannot be attached.
    pub(super) pods: Vec<(Arc<str>, Option<Problem>)>,
    /// Connections that were open before.
    pub(super) open_before: Option<u32>,
}

/// Decides.
pub(super) fn plan(world: &World<'_>) -> Plan {
    let mut plan = Plan::default();
    let mut steps: BTreeMap<PodUid, Step> = BTreeMap::new();
    for held in world.held {
        let report = match &held.problem {
            Some(problem) => Report::of(held, Some(problem.clone())),
            None => serve(world, held, &mut steps, &mut plan),
        };
        plan.reports.push(report);
    }
    plan
}

/// What a pod needs next.
#[derive(Clone, Debug)]
enum Step {
    Attach(String),
    Link(String),
    Nothing(Problem),
}

fn serve(
    world: &World<'_>,
    held: &Held,
    steps: &mut BTreeMap<PodUid, Step>,
    plan: &mut Plan,
) -> Report {
    let namespace = &held.name.0;
    let Some(scene) = world.scenes.get(namespace).filter(|scene| scene.listed) else {
        let waiting = Problem::passing(Reason::Attaching, "looking at the namespace");
        return Report::of(held, Some(waiting));
    };
    let mut report = Report::of(held, None);
    for pod in scene.pods_of(&held.workload).filter(|pod| !pod.terminating) {
        let step = match pod_problem(world, held, pod) {
            Some(problem) => Step::Nothing(problem),
            None => {
                let step = steps
                    .entry(Arc::clone(&pod.uid))
                    .or_insert_with(|| next_step(world, pod));
                step.clone()
            }
        };
        take(world, held, pod, &step, plan);
        let problem = pod_state(world, held, pod, step, plan);
        let counts = pod.running || problem.as_ref().is_some_and(|p| p.cure.is_some());
        if counts {
            report.pods.push((Arc::clone(&pod.name), problem));
        }
        if let Some(LinkState::Connected { open_before, .. }) = link_state(world, pod) {
            let open = open_before.get(&held.port).copied();
            report.open_before = match (report.open_before, open) {
                (None, open) => open,
                (sum, None) => sum,
                (Some(sum), Some(open)) => Some(sum + open),
            };
        }
    }
    report.problem = overall(world, held, &report, plan);
    report
}

/// Turns a step into work.
fn take(world: &World<'_>, held: &Held, pod: &PodFacts, step: &Step, plan: &mut Plan) {
    match step {
        Step::Nothing(_) => {}
        Step::Attach(container) => {
            let known = plan.attach.iter().any(|attach| attach.uid == pod.uid);
            if !known && !world.attaching.contains(&pod.uid) {
                plan.attach.push(Attach {
                    namespace: Arc::clone(&held.name.0),
                    pod: Arc::clone(&pod.name),
                    uid: Arc::clone(&pod.uid),
                    container: container.clone(),
                });
            }
        }
        Step::Link(container) => {
            let Some(address) = pod.address else { return };
            let wanted = plan
                .links
                .entry(Arc::clone(&pod.uid))
                .or_insert_with(|| Wanted {
                    address: SocketAddr::new(address, AGENT_PORT),
                    container: container.clone(),
                    orders: Orders::default(),
                });
            wanted.orders.close_idle |= held.close_idle;
            add_route(&mut wanted.orders.table, held);
        }
    }
}

fn add_route(table: &mut RouteTable, held: &Held) {
    let route = Route {
        id: held.id.clone(),
        created: held.created,
        matchers: held.matchers.clone(),
        strict: held.strict,
    };
    match table.ports.iter_mut().find(|port| port.listen == held.port) {
        Some(port) => port.intercepts.push(route),
        None => table.ports.push(PortRoutes {
            listen: held.port,
            app: held.port,
            intercepts: vec![route],
        }),
    }
}

/// What keeps agents out of a pod, whatever was tried.
fn pod_problem(world: &World<'_>, held: &Held, pod: &PodFacts) -> Option<Problem> {
    let (namespace, name) = (&held.name.0, &pod.name);
    let node = pod.node.as_deref().and_then(|node| (world.node)(node));
    let windows = pod.windows || node.is_some_and(|node| node.system.as_deref() == Some("windows"));
    let never = |reason, what: String| {
        let cure = "intercept another workload; nothing can be attached to this one";
        Some(Problem::lasting(reason, what, cure))
    };
    if held.attach == AttachMode::Sidecar {
        return Some(Problem::lasting(
            Reason::Sidecar,
            "attaching as a sidecar is not there yet",
            "leave `--attach` away, or give `--attach ephemeral`",
        ));
    }
    if **namespace == *"kube-system" || **namespace == *world.own_namespace {
        let what = format!("nothing is attached to pods of namespace {namespace}");
        return never(Reason::Namespace, what);
    }
    if pod.is_static {
        return never(Reason::StaticPod, format!("pod {name} is its node's own"));
    }
    if pod.host_network {
        let what = format!("pod {name} uses its node's network (hostNetwork)");
        return never(Reason::HostNetwork, what);
    }
    if pod.host_processes {
        let what = format!("pod {name} shares its node's processes or IPC (hostPID, hostIPC)");
        return never(Reason::HostNetwork, what);
    }
    if windows {
        return never(
            Reason::OperatingSystem,
            format!("pod {name} runs on Windows"),
        );
    }
    let mesh = pod.mesh?;
    Some(Problem::lasting(
        Reason::Mesh,
        format!("pod {name} has the proxy of {mesh}, which takes its connections first"),
        "service meshes are not supported yet; intercept a workload outside of the mesh",
    ))
}

/// An agent that ended sooner has failed.
const STAYED_UP: Duration = Duration::from_secs(10);

/// Agents that fail one after another before no other is added: entries in a pod stay for its life.
const FAILURES_MAX: usize = 3;

/// Agents that a pod may have had in all, whatever became of them.
const AGENTS_MAX: usize = 20;

fn next_step(world: &World<'_>, pod: &PodFacts) -> Step {
    let last = pod.agent().map_or(0, |agent| number(&agent.container));
    let attach = || {
        let refused = world.not_let_in.get(&pod.uid);
        match refused.filter(|refused| world.now < refused.again) {
            Some(refused) => Step::Nothing(refused.problem.clone()),
            None => Step::Attach(container_name(last + 1)),
        }
    };
    let Some(agent) = pod.agent() else {
        return attach();
    };
    match &agent.state {
        AgentState::Ended { message, .. } if message.contains("exec format error") => {
            Step::Nothing(architecture(world, pod))
        }
        AgentState::Ended { message, .. }
            if failures(pod) >= FAILURES_MAX || pod.agents.len() >= AGENTS_MAX =>
        {
            Step::Nothing(fails(pod, agent, message))
        }
        AgentState::Ended { .. } => attach(),
        AgentState::Waiting { message, .. } if message.contains("no match for platform") => {
            Step::Nothing(architecture(world, pod))
        }
        AgentState::Waiting { reason, message } if is_pull_failure(reason) => {
            Step::Nothing(Problem::lasting(
                Reason::ImagePull,
                format!(
                    "the node of pod {} cannot get the agent's image: {reason}: {message}",
                    pod.name
                ),
                "make the image that `tp install --image` names available to that node, and to the pull secrets of the pod",
            ))
        }
        AgentState::Waiting { reason, message } if is_start_failure(reason) => {
            Step::Nothing(fails(pod, agent, &format!("{reason}: {message}")))
        }
        AgentState::New | AgentState::Waiting { .. } | AgentState::Running => {
            Step::Link(agent.container.clone())
        }
    }
}

fn failures(pod: &PodFacts) -> usize {
    let failed = |agent: &&AgentFacts| matches!(agent.state, AgentState::Ended { lived, .. } if lived < STAYED_UP);
    pod.agents.iter().rev().take_while(failed).count()
}

fn is_pull_failure(reason: &str) -> bool {
    let known = [
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
    ];
    known.contains(&reason)
}

fn is_start_failure(reason: &str) -> bool {
    let known = [
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
    ];
    known.contains(&reason)
}

fn fails(pod: &PodFacts, agent: &AgentFacts, why: &str) -> Problem {
    Problem::lasting(
        Reason::AgentFails,
        format!("the agent in pod {} does not stay up: {why}", pod.name),
        format!(
            "`kubectl logs {} -c {}` shows more; a new pod gets a new agent",
            pod.name, agent.container
        ),
    )
}

fn architecture(world: &World<'_>, pod: &PodFacts) -> Problem {
    let node = pod.node.as_deref().unwrap_or("its node");
    let found = (world.node)(node).and_then(|node| node.architecture);
    Problem::lasting(
        Reason::Architecture,
        format!(
            "the agent's image has nothing for node {node}, which is {}",
            found.as_deref().unwrap_or("of another architecture")
        ),
        "install an image that has that architecture: `tp upgrade --image`",
    )
}

fn link_state<'a>(world: &World<'a>, pod: &PodFacts) -> Option<&'a LinkState> {
    let link = world.links.get(&pod.uid)?;
    let newest = pod
        .agent()
        .is_some_and(|agent| agent.container == link.container);
    newest.then_some(&link.state)
}

/// How long an agent may be silent before that is said.
const PATIENCE: Duration = Duration::from_millis(2500);

/// How long it may refuse: one that has ended does so until its node says that it has.
const RESTARTING: Duration = Duration::from_secs(8);

/// What keeps one pod from being attached; `None` when it is.
fn pod_state(
    world: &World<'_>,
    held: &Held,
    pod: &PodFacts,
    step: Step,
    plan: &mut Plan,
) -> Option<Problem> {
    let coming = |what: &str| {
        Some(Problem::passing(
            Reason::Attaching,
            format!("pod {}: {what}", pod.name),
        ))
    };
    match step {
        Step::Nothing(problem) => return Some(problem),
        // It was refused before, and is tried again.
        Step::Attach(_) => match world.not_let_in.get(&pod.uid) {
            Some(refused) => return Some(refused.problem.clone()),
            None => return coming("an agent is being added"),
        },
        Step::Link(_) => {}
    }
    match link_state(world, pod) {
        Some(LinkState::Connected { routed, .. }) if routed.contains(&held.id) => None,
        Some(LinkState::Connected { .. }) => coming("its agent gets the routes"),
        Some(LinkState::Dialing {
            since,
            trouble: Some(trouble),
        }) if is_running(pod) && world.now.duration_since(*since) >= patience(trouble) => {
            Some(out_of_reach(world, held, pod, trouble, plan))
        }
        Some(LinkState::Dialing { .. }) | None => coming("its agent starts"),
    }
}

fn patience(trouble: &Trouble) -> Duration {
    match trouble {
        Trouble::Silent => PATIENCE,
        Trouble::Refused | Trouble::Other(_) => RESTARTING,
    }
}

fn is_running(pod: &PodFacts) -> bool {
    pod.agent()
        .is_some_and(|agent| agent.state == AgentState::Running)
}

fn out_of_reach(
    world: &World<'_>,
    held: &Held,
    pod: &PodFacts,
    trouble: &Trouble,
    plan: &mut Plan,
) -> Problem {
    let why = match trouble {
        Trouble::Silent => {
            let known = world.policies.get(&pod.uid);
            if known.is_none() {
                let (namespace, uid) = (Arc::clone(&held.name.0), Arc::clone(&pod.uid));
                plan.look_at.push((namespace, uid, pod.labels.clone()));
            }
            let policies = known.map_or(&[][..], Vec::as_slice);
            return Problem::unreachable(world.own_namespace, policies);
        }
        Trouble::Refused => format!("nothing listens on port {AGENT_PORT}"),
        Trouble::Other(why) => format!("port {AGENT_PORT}: {why}"),
    };
    match pod.agent() {
        Some(agent) => fails(pod, agent, &why),
        None => Problem::passing(Reason::Attaching, why),
    }
}

/// What keeps the whole intercept from being ready: what lasts before what passes.
fn overall(world: &World<'_>, held: &Held, report: &Report, plan: &mut Plan) -> Option<Problem> {
    let problems = || {
        report
            .pods
            .iter()
            .filter_map(|(_, problem)| problem.as_ref())
    };
    if let Some(lasting) = problems().find(|problem| problem.reason.is_lasting()) {
        return Some(lasting.clone());
    }
    if !held.connected {
        let what = "the workstation is not connected; the application answers";
        return Some(Problem::passing(Reason::NoWorkstation, what));
    }
    if report.pods.is_empty() {
        return Some(without_pods(world, held, plan));
    }
    problems().next().cloned()
}

fn without_pods(world: &World<'_>, held: &Held, plan: &mut Plan) -> Problem {
    let place = (Arc::clone(&held.name.0), held.workload.clone());
    match world.workloads.get(&place) {
        Some(false) => Problem::lasting(
            Reason::NoWorkload,
            format!("there is no {} in namespace {}", held.workload, place.0),
            "`tp list` shows what there is",
        ),
        known => {
            if known.is_none() {
                plan.look_for.insert(place);
            }
            Problem::passing(
                Reason::NoPods,
                format!("{} has no running pod", held.workload),
            )
        }
    }
}

impl Report {
    fn of(held: &Held, problem: Option<Problem>) -> Self {
        Self {
            name: held.name.clone(),
            problem,
            pods: Vec::new(),
            open_before: None,
        }
    }
}

#[cfg(test)]
mod tests;
