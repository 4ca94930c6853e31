//! What one pod needs next, and what keeps agents out of it.
//!
//! Pure: the pod's facts, what was refused before, and the node that it is on.

use std::time::Duration;

use tp_manager_api::intercept::{AttachMode, Reason};
use tp_manager_api::route_table::Protocol;
use tp_manager_api::{SIDECAR_LABEL, WEBHOOK_NAME};

use super::container::container_name;
use super::pod::{AgentFacts, AgentState, PodFacts, SidecarFacts, number};
use super::problem::Problem;
use super::world::{Held, LinkState, World};

/// What a pod needs next.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// An agent, in a container of this name.
    Attach(String),
    /// A connection to the agent in this container.
    Link(String),
    /// The same, for it to leave the pod to another one.
    Replace(String),
    /// Somebody has to do something first.
    Nothing(Problem),
}

/// What keeps agents out of a pod, whatever was tried.
pub(super) fn pod_problem(world: &World<'_>, held: &Held, pod: &PodFacts) -> Option<Problem> {
    let (namespace, name) = (&held.name.0, &pod.name);
    let node = pod.node.as_deref().and_then(|node| (world.node)(node));
    let windows = pod.windows || node.is_some_and(|node| node.system.as_deref() == Some("windows"));
    let never = |reason, what: String| {
        let cure = "intercept another workload; nothing can be attached to this one";
        Some(Problem::lasting(reason, what, cure))
    };
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
    if let Some(mesh) = pod.mesh {
        return Some(Problem::lasting(
            Reason::Mesh,
            format!("pod {name} has the proxy of {mesh}, which takes its connections first"),
            "service meshes are not supported yet; intercept a workload outside of the mesh",
        ));
    }
    match &pod.sidecar {
        Some(facts) => sidecar_problem(held, pod, facts),
        None if held.attach == AttachMode::Sidecar => Some(without_sidecar(pod)),
        None => None,
    }
}

/// The agent with which a pod was made takes the ports that it was made for, and no other agent goes beside it.
fn sidecar_problem(held: &Held, pod: &PodFacts, facts: &SidecarFacts) -> Option<Problem> {
    if held.protocol == Protocol::Udp {
        return Some(Problem::lasting(
            Reason::Sidecar,
            format!("the sidecar of pod {} takes no UDP", pod.name),
            format!(
                "pods without the label {SIDECAR_LABEL} get an agent that does, where it may have NET_ADMIN"
            ),
        ));
    }
    if facts.sidecar.port(held.port).is_some() {
        return None;
    }
    let apps: Vec<_> = facts.sidecar.apps().map(|port| port.to_string()).collect();
    Some(Problem::lasting(
        Reason::Sidecar,
        format!(
            "the sidecar of pod {} stands before port {} and not before {}",
            pod.name,
            apps.join(", "),
            held.port
        ),
        format!(
            "give port {} a name, and `--attach sidecar --restart-pods` makes the pods anew for it",
            held.port
        ),
    ))
}

fn without_sidecar(pod: &PodFacts) -> Problem {
    Problem::lasting(
        Reason::Sidecar,
        format!("pod {} was made without the agent", pod.name),
        format!(
            "`--attach sidecar --restart-pods` makes the pods anew with it; it takes the label {SIDECAR_LABEL} of the pod and \
             the webhook {WEBHOOK_NAME} in the manager's namespace"
        ),
    )
}

/// An agent that ended sooner has failed.
const STAYED_UP: Duration = Duration::from_secs(10);

/// Agents that fail one after another before no other is added: entries in a pod stay for its life.
const FAILURES_MAX: usize = 3;

/// Agents that a pod may have had in all, whatever became of them.
const AGENTS_MAX: usize = 20;

/// The next step of a pod that nothing else keeps agents out of.
pub(super) fn next_step(world: &World<'_>, pod: &PodFacts) -> Step {
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
    if let Some(LinkState::Yielded) = world.link_to(pod) {
        return attach();
    }
    if is_outdated(world, pod, agent) {
        return Step::Replace(agent.container.clone());
    }
    let kept_up = pod.sidecar.is_some();
    match &agent.state {
        AgentState::Ended { message, .. } if message.contains("exec format error") => {
            Step::Nothing(architecture(world, pod))
        }
        // Its node starts it again.
        AgentState::Ended { .. } if kept_up => Step::Link(agent.container.clone()),
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
        AgentState::Waiting { reason, message }
            if is_start_failure(reason) || (kept_up && reason == "CrashLoopBackOff") =>
        {
            Step::Nothing(fails(pod, agent, &format!("{reason}: {message}")))
        }
        AgentState::New | AgentState::Waiting { .. } | AgentState::Running { .. } => {
            Step::Link(agent.container.clone())
        }
    }
}

/// Whether an agent is from before an upgrade, and another one may come after it. During a rollout of the manager replicas of
/// two images see each other's agents, and each leaves alone what is younger than itself: so they do not replace one
/// another's for ever.
fn is_outdated(world: &World<'_>, pod: &PodFacts, agent: &AgentFacts) -> bool {
    let other = agent
        .image
        .as_deref()
        .is_some_and(|image| image != world.image);
    let older = match agent.state {
        AgentState::Running { since } => since.is_some_and(|since| since < world.began),
        AgentState::New | AgentState::Waiting { .. } | AgentState::Ended { .. } => false,
    };
    other && older && pod.agents.len() < AGENTS_MAX && !world.not_let_in.contains_key(&pod.uid)
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

/// An agent that is of no use.
pub(super) fn fails(pod: &PodFacts, agent: &AgentFacts, why: &str) -> Problem {
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
