//! What to do next: what is seen and what is under way in, what to begin and what to report out.
//!
//! Pure, and without memory: the same world gives the same plan, so it is asked again after every change. Each pod of an
//! intercepted workload goes through the same steps: an agent is put into it, the manager connects to that agent, and
//! the agent takes the routes. What does not go on has a [`Problem`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tp_manager_api::AGENT_PORT;
use tp_manager_api::intercept::{Reason, Workload};
use tp_manager_api::route_table::{PortRoutes, Protocol, Route, RouteTable};
use tp_manager_api::tls::Credential;

use super::pod::{AgentState, PodFacts};
use super::problem::Problem;
use super::secret::mismatch;
use super::step::{Step, fails, next_step, pod_problem};
use super::world::{Held, LinkState, PodUid, Trouble, World};
use crate::sessions::ObjectName;

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
    /// What makes its key, where the manager has not made it.
    pub(super) seed: Option<String>,
    /// What it is told.
    pub(super) orders: Orders,
}

/// What this replica tells an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Orders {
    /// Its routes.
    pub(super) table: RouteTable,
    /// What they open TLS with, by the ids in them.
    pub(super) credentials: BTreeMap<String, Credential>,
    /// Whether it resets idle connections from before.
    pub(super) close_idle: bool,
    /// Whether it leaves the pod to another agent.
    pub(super) yields: bool,
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
        if held.outgoing {
            keep(world, held, &mut plan);
            continue;
        }
        let report = match &held.problem {
            Some(problem) => Report::of(held, Some(problem.clone())),
            None => serve(world, held, &mut steps, &mut plan),
        };
        plan.reports.push(report);
    }
    plan
}

/// Leaves the routes of an intercept that another replica serves where they are.
fn keep(world: &World<'_>, held: &Held, plan: &mut Plan) {
    let scene = world.scenes.get(&held.name.0);
    let scene = scene.filter(|_| held.problem.is_none());
    for pod in scene.iter().flat_map(|scene| scene.pods_of(&held.workload)) {
        let is_routed = |state: &LinkState| matches!(state, LinkState::Connected { routed, .. } if routed.contains(&held.id));
        if let Some(agent) = pod
            .agent()
            .filter(|_| world.link_to(pod).is_some_and(is_routed))
        {
            let step = Step::Link(agent.container.clone());
            take(world, held, pod, &step, plan);
        }
    }
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
        // Datagrams have no connections.
        if let (Protocol::Tcp, Some(LinkState::Connected { open_before, .. })) =
            (held.protocol, world.link_to(pod))
        {
            let (listen, _) = ports(pod, held);
            let open = open_before.get(&listen).copied();
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
            // That it has yielded is known until the next one is seen.
            if let (Some(LinkState::Yielded), Some(agent)) = (world.link_to(pod), pod.agent()) {
                link(pod, &agent.container, plan);
            }
        }
        Step::Link(container) => {
            if let Some(wanted) = link(pod, container, plan) {
                wanted.orders.close_idle |= held.close_idle;
                wanted.orders.add(held, ports(pod, held));
            }
        }
        Step::Replace(container) => {
            if let Some(wanted) = link(pod, container, plan) {
                wanted.orders.yields = true;
            }
        }
    }
}

/// The connection to the agent of a pod that has an address.
fn link<'a>(pod: &PodFacts, container: &str, plan: &'a mut Plan) -> Option<&'a mut Wanted> {
    let address = SocketAddr::new(pod.address?, AGENT_PORT);
    let sidecar = pod.sidecar.as_ref().map(|facts| &facts.sidecar);
    let link = plan.links.entry(Arc::clone(&pod.uid));
    Some(link.or_insert_with(|| Wanted {
        address,
        container: container.to_owned(),
        seed: sidecar.map(|sidecar| sidecar.seed.clone()),
        orders: Orders::default(),
    }))
}

/// Port that clients connect to, and the application's: the kernel redirects, or a sidecar listens elsewhere.
fn ports(pod: &PodFacts, held: &Held) -> (u16, u16) {
    let sidecar = pod.sidecar.as_ref();
    let taken = sidecar.and_then(|facts| facts.sidecar.port(held.port));
    taken.unwrap_or((held.port, held.port))
}

impl Orders {
    fn add(&mut self, held: &Held, (listen, app): (u16, u16)) {
        let credential = held.tls.as_ref().map(|secret| &secret.credential);
        let id = credential.map(|credential| credential.id().to_owned());
        self.credentials.extend(id.clone().zip(credential.cloned()));
        let route = Route {
            id: held.id.clone(),
            created: held.created,
            matchers: held.matchers.clone(),
            strict: held.strict,
            tls: id,
        };
        let ports = &mut self.table.ports;
        let same = |port: &&mut PortRoutes| (port.protocol, port.listen) == (held.protocol, listen);
        match ports.iter_mut().find(same) {
            Some(port) => port.intercepts.push(route),
            None => ports.push(PortRoutes {
                protocol: held.protocol,
                listen,
                app,
                intercepts: vec![route],
            }),
        }
    }
}

/// How long an agent may be silent before that is said.
const PATIENCE: Duration = Duration::from_millis(2500);

/// How long an answer about a workload or its NetworkPolicies stands.
pub(super) const KEPT: Duration = Duration::from_secs(2);

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
        Step::Replace(_) => return coming("its agent makes way for that of another version"),
        Step::Link(_) => {}
    }
    match world.link_to(pod) {
        Some(LinkState::Connected {
            routed, unopened, ..
        }) if routed.contains(&held.id) => {
            let (secret, found) = held.tls.as_ref().zip(unopened.get(&held.id))?;
            Some(mismatch(secret, &pod.name, held.port, *found))
        }
        Some(LinkState::Connected { .. }) => coming("its agent gets the routes"),
        Some(LinkState::Dialing {
            since,
            trouble: Some(trouble),
        }) if is_running(pod) && world.now.duration_since(*since) >= patience(trouble) => {
            Some(out_of_reach(world, held, pod, trouble, plan))
        }
        Some(LinkState::Dialing { .. } | LinkState::Yielded) | None => coming("its agent starts"),
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
        .is_some_and(|agent| matches!(agent.state, AgentState::Running { .. }))
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
            let policies = world.policies.get(&pod.uid);
            if policies.is_none_or(|policies| world.now >= policies.seen + KEPT) {
                let (namespace, uid) = (Arc::clone(&held.name.0), Arc::clone(&pod.uid));
                plan.look_at.push((namespace, uid, pod.labels.clone()));
            }
            return match policies {
                Some(policies) => Problem::unreachable(world.own_namespace, &policies.names),
                None => {
                    let what = format!("pod {}: its agent does not answer", pod.name);
                    Problem::passing(Reason::Attaching, what)
                }
            };
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
