//! What keeps the manager's pods from running, read off the objects that Kubernetes writes about them.
//!
//! Pure: pods, events and conditions in, at most one [`Trouble`] out, the most telling one first. Serves the installed
//! manager and the temporary one alike.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateTerminated, ContainerStatus, Event, Pod,
};

use crate::report::Failure;

/// One reason why the manager does not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The image cannot be had.
    Image {
        /// As written in the pod.
        image: String,
        /// The kubelet's words.
        message: String,
        /// The pod forbids pulling, or the kubelet may not.
        never_pulled: bool,
    },
    /// The image holds nothing for the node's architecture.
    Architecture {
        /// As written in the pod.
        image: String,
        /// The node.
        node: String,
        /// The runtime's words.
        message: String,
    },
    /// The process started and ended.
    Crash {
        /// Pod whose log tells more.
        pod: String,
        /// Its node.
        node: String,
        /// Its image, as written in the pod.
        image: String,
        /// Exit code.
        code: i32,
        /// The runtime's word for it: `Error`, `OOMKilled`.
        reason: String,
    },
    /// The container cannot be made or started.
    Start {
        /// The kubelet's word for it.
        reason: String,
        /// The kubelet's words.
        message: String,
    },
    /// Pods are not even admitted: quota, PodSecurity, a webhook, a limit.
    Refused {
        /// The API server's words.
        message: String,
    },
    /// No node takes the pod.
    Unschedulable {
        /// The scheduler's words.
        message: String,
    },
    /// The node took the pod and cannot set it up: network, volumes.
    Node {
        /// The kubelet's words.
        message: String,
    },
    /// The node gave the pod up.
    Lost {
        /// Why, in one word.
        reason: String,
        /// The kubelet's words.
        message: String,
    },
}

impl Trouble {
    /// How long it must last before it is believed: some pass by themselves.
    #[must_use]
    pub fn patience(&self) -> Duration {
        match self {
            Self::Image { .. }
            | Self::Architecture { .. }
            | Self::Crash { .. }
            | Self::Start { .. } => Duration::from_secs(1),
            Self::Refused { .. } | Self::Unschedulable { .. } | Self::Lost { .. } => {
                Duration::from_secs(2)
            }
            Self::Node { .. } => Duration::from_secs(4),
        }
    }

    /// Whether `other` is the same trouble, told perhaps in newer words.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// The report to the user.
    #[must_use]
    pub fn failure(&self) -> Failure {
        match self {
            Self::Image { image, message, never_pulled: false } => {
                Failure::new(format!("the nodes cannot pull the image {image}"))
                    .because(message)
                    .hint("name another with `--image`, or the Secret that opens its registry with `--pull-secret`")
            }
            Self::Image { image, message, never_pulled: true } => {
                Failure::new(format!("the node does not hold the image {image}, and may not pull it"))
                    .because(message)
                    .hint("load the image into the nodes, or name one in a registry with `--image`")
            }
            Self::Architecture { image, node, message } => {
                Failure::new(format!("the image {image} has nothing for the architecture of node {node}"))
                    .because(message)
                    .hint("name an image that is built for it with `--image`")
            }
            Self::Crash { code, reason, .. } => {
                Failure::new(format!("the manager ends as soon as it has started ({reason}, exit code {code})"))
            }
            Self::Start { reason, message } => {
                Failure::new("the manager's container cannot start").because(format!("{reason}: {message}"))
            }
            Self::Refused { message } => refused(message),
            Self::Unschedulable { message } => Failure::new("no node takes the manager's pod")
                .because(message)
                .hint("it asks for 10m CPU and 32Mi memory on a Linux node"),
            Self::Node { message } => Failure::new("the node cannot set up the manager's pod").because(message),
            Self::Lost { reason, message } => {
                Failure::new("the node gave up the manager's pod").because(format!("{reason}: {message}"))
            }
        }
    }
}

fn refused(message: &str) -> Failure {
    let (what, hint) = if message.contains("exceeded quota") || message.contains("failed quota") {
        (
            "a quota of the namespace leaves no room for the manager's pod",
            "raise the ResourceQuota, or use another namespace",
        )
    } else if message.contains("violates PodSecurity") {
        (
            "PodSecurity refuses the manager's pod",
            "a webhook may have changed the pod: as we write it, it passes `restricted`",
        )
    } else if message.contains("ValidatingAdmissionPolicy") {
        (
            "an admission policy refuses the manager's pod",
            "ask whoever wrote that policy for an exception",
        )
    } else if message.contains("webhook") {
        (
            "an admission webhook refuses the manager's pod",
            "ask whoever runs that webhook for an exception",
        )
    } else {
        (
            "the cluster refuses the manager's pod",
            "ask a cluster administrator for an exception",
        )
    };
    Failure::new(what).because(message).hint(hint)
}

/// The most telling trouble of the pods, if there is one. Events count only for the pods given.
#[must_use]
pub fn of_pods<'a>(
    pods: &[&'a Pod],
    events: impl Iterator<Item = &'a Event> + Clone,
) -> Option<Trouble> {
    let in_containers = pods.iter().find_map(|pod| of_containers(pod));
    in_containers
        .or_else(|| pods.iter().find_map(|pod| lost(pod)))
        .or_else(|| {
            pods.iter()
                .find_map(|pod| unschedulable(pod, events.clone()))
        })
        .or_else(|| pods.iter().find_map(|pod| not_set_up(pod, events.clone())))
}

/// Why a Deployment's pods are refused.
#[must_use]
pub fn of_deployment(deployment: &Deployment) -> Option<Trouble> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let failed = conditions
        .iter()
        .find(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True")?;
    Some(Trouble::Refused {
        message: failed.message.clone().unwrap_or_default(),
    })
}

/// Why the pods of the object `name` are refused, where it has no condition that says so.
#[must_use]
pub fn of_creation<'a>(name: &str, mut events: impl Iterator<Item = &'a Event>) -> Option<Trouble> {
    let failed = events.find(|event| is_about(event, name) && reason(event) == "FailedCreate")?;
    Some(Trouble::Refused {
        message: failed.message.clone().unwrap_or_default(),
    })
}

fn of_containers(pod: &Pod) -> Option<Trouble> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find_map(|status| of_container(pod, status))
}

fn of_container(pod: &Pod, status: &ContainerStatus) -> Option<Trouble> {
    let state = status.state.as_ref()?;
    let last = status.last_state.as_ref();
    let waiting = state.waiting.as_ref();
    let why = waiting
        .and_then(|waiting| waiting.reason.as_deref())
        .unwrap_or_default();
    let message = waiting
        .and_then(|waiting| waiting.message.clone())
        .unwrap_or_default();
    if let Some(trouble) = wrong_architecture(pod, status, &message) {
        return Some(trouble);
    }
    match why {
        "" => ended(pod, status, state),
        "ContainerCreating" | "PodInitializing" => None,
        "ErrImagePull"
        | "ImagePullBackOff"
        | "InvalidImageName"
        | "RegistryUnavailable"
        | "ImageInspectError" => Some(Trouble::Image {
            image: status.image.clone(),
            message,
            never_pulled: false,
        }),
        "ErrImageNeverPull" => Some(Trouble::Image {
            image: status.image.clone(),
            message,
            never_pulled: true,
        }),
        "CrashLoopBackOff" => last.and_then(|last| last.terminated.as_ref()).map_or_else(
            || {
                Some(Trouble::Start {
                    reason: why.to_owned(),
                    message,
                })
            },
            |terminated| Some(crash(pod, status, terminated)),
        ),
        // CreateContainerConfigError, CreateContainerError, RunContainerError, and whatever a runtime adds.
        _ => Some(Trouble::Start {
            reason: why.to_owned(),
            message,
        }),
    }
}

/// A pod of a Job may have ended well; one of a Deployment that does is started again, and then backs off.
fn ended(pod: &Pod, status: &ContainerStatus, state: &ContainerState) -> Option<Trouble> {
    let terminated = state.terminated.as_ref()?;
    (terminated.exit_code != 0).then(|| crash(pod, status, terminated))
}

/// The runtime has words of its own only where it is not the program that ended.
fn crash(pod: &Pod, status: &ContainerStatus, terminated: &ContainerStateTerminated) -> Trouble {
    let reason = terminated
        .reason
        .clone()
        .unwrap_or_else(|| "Error".to_owned());
    match terminated.message.clone().filter(|_| reason != "Error") {
        Some(message) => Trouble::Start { reason, message },
        None => Trouble::Crash {
            pod: name(pod).to_owned(),
            node: node(pod),
            image: status.image.clone(),
            code: terminated.exit_code,
            reason,
        },
    }
}

fn wrong_architecture(pod: &Pod, status: &ContainerStatus, waiting: &str) -> Option<Trouble> {
    let ends = [status.state.as_ref(), status.last_state.as_ref()];
    let told = ends
        .into_iter()
        .flatten()
        .filter_map(|state| state.terminated.as_ref()?.message.as_deref());
    let message = std::iter::once(waiting)
        .chain(told)
        .find(|message| tells_architecture(message))?;
    Some(Trouble::Architecture {
        image: status.image.clone(),
        node: node(pod),
        message: message.to_owned(),
    })
}

/// Whether a message, or the last line of a log, says that the program is for another kind of machine.
#[must_use]
pub fn tells_architecture(message: &str) -> bool {
    message.contains("exec format error") || message.contains("no match for platform")
}

/// A pod that has failed for a reason of its node, such as `Evicted` or `NodeAffinity`; a pod whose container ended
/// carries no reason.
fn lost(pod: &Pod) -> Option<Trouble> {
    let status = pod
        .status
        .as_ref()
        .filter(|status| status.phase.as_deref() == Some("Failed"))?;
    let reason = status.reason.clone().filter(|reason| !reason.is_empty())?;
    Some(Trouble::Lost {
        reason,
        message: status.message.clone().unwrap_or_default(),
    })
}

fn unschedulable<'a>(pod: &Pod, mut events: impl Iterator<Item = &'a Event>) -> Option<Trouble> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let failed = conditions.iter().find(|condition| {
        condition.type_ == "PodScheduled"
            && condition.status == "False"
            && condition.reason.as_deref() == Some("Unschedulable")
    })?;
    // An autoscaler is making a node.
    if events.any(|event| is_about(event, name(pod)) && reason(event) == "TriggeredScaleUp") {
        return None;
    }
    Some(Trouble::Unschedulable {
        message: failed.message.clone().unwrap_or_default(),
    })
}

fn not_set_up<'a>(pod: &Pod, mut events: impl Iterator<Item = &'a Event>) -> Option<Trouble> {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    if phase.is_some_and(|phase| phase != "Pending") {
        return None;
    }
    let told = events.find(|event| {
        is_about(event, name(pod))
            && matches!(
                reason(event),
                "FailedCreatePodSandBox" | "FailedMount" | "FailedAttachVolume" | "NetworkNotReady"
            )
    })?;
    Some(Trouble::Node {
        message: told.message.clone().unwrap_or_default(),
    })
}

fn is_about(event: &Event, name: &str) -> bool {
    event.involved_object.name.as_deref() == Some(name)
}

fn reason(event: &Event) -> &str {
    event.reason.as_deref().unwrap_or_default()
}

fn node(pod: &Pod) -> String {
    let spec = pod.spec.as_ref();
    spec.and_then(|spec| spec.node_name.clone())
        .unwrap_or_default()
}

fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: Value) -> Pod {
        let pod = json!({ "metadata": { "name": "tp-manager-0" }, "spec": { "nodeName": "node-1", "containers": [] }, "status": status });
        serde_json::from_value(pod).unwrap()
    }

    fn container(state: Value, last: Value) -> Pod {
        pod(json!({ "phase": "Pending", "containerStatuses": [{
            "name": "manager", "image": "example/tp:1", "imageID": "", "ready": false, "restartCount": 0,
            "state": state, "lastState": last,
        }]}))
    }

    fn waiting(reason: &str, message: &str) -> Pod {
        container(
            json!({ "waiting": { "reason": reason, "message": message } }),
            json!({}),
        )
    }

    fn event(reason: &str, about: &str, message: &str) -> Event {
        let event = json!({ "metadata": {}, "involvedObject": { "name": about }, "reason": reason, "message": message, "type": "Warning" });
        serde_json::from_value(event).unwrap()
    }

    fn diagnose(pod: &Pod, events: &[Event]) -> Option<Trouble> {
        of_pods(&[pod], events.iter())
    }

    #[test]
    fn a_pod_that_starts_is_no_trouble() {
        assert_eq!(diagnose(&waiting("ContainerCreating", ""), &[]), None);
        assert_eq!(
            diagnose(&container(json!({ "running": {} }), json!({})), &[]),
            None
        );
        assert_eq!(diagnose(&pod(json!({ "phase": "Pending" })), &[]), None);
    }

    #[test]
    fn an_image_that_cannot_be_pulled_is_named() {
        for reason in ["ErrImagePull", "ImagePullBackOff", "InvalidImageName"] {
            let failure = diagnose(&waiting(reason, "not found"), &[])
                .unwrap()
                .failure();

            assert_eq!(failure.what, "the nodes cannot pull the image example/tp:1");
            assert_eq!(failure.why, ["not found"]);
        }
        let never = diagnose(&waiting("ErrImageNeverPull", "not present"), &[]).unwrap();
        assert!(never.failure().what.contains("may not pull"));
    }

    #[test]
    fn an_image_for_other_nodes_is_named_with_the_node() {
        let pull = waiting(
            "ErrImagePull",
            "failed to pull: no match for platform in manifest: not found",
        );
        let start = container(
            json!({ "waiting": { "reason": "CrashLoopBackOff" } }),
            json!({ "terminated": { "exitCode": 128, "reason": "StartError", "message": "exec /tp-manager: exec format error" } }),
        );

        for pod in [pull, start] {
            let failure = diagnose(&pod, &[]).unwrap().failure();
            assert!(
                failure.what.contains("architecture of node node-1"),
                "{failure}"
            );
        }
    }

    #[test]
    fn a_crash_names_its_exit_code() {
        let ended = json!({ "terminated": { "exitCode": 1, "reason": "Error" } });
        let backing_off = container(
            json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off 10s" } }),
            ended.clone(),
        );

        for pod in [backing_off, container(ended, json!({}))] {
            let trouble = diagnose(&pod, &[]).unwrap();
            assert_eq!(
                trouble,
                Trouble::Crash {
                    pod: "tp-manager-0".into(),
                    node: "node-1".into(),
                    image: "example/tp:1".into(),
                    code: 1,
                    reason: "Error".into()
                }
            );
        }
    }

    #[test]
    fn a_manager_that_ends_well_again_and_again_crashes_too() {
        let pod = container(
            json!({ "waiting": { "reason": "CrashLoopBackOff" } }),
            json!({ "terminated": { "exitCode": 0, "reason": "Completed" } }),
        );

        let failure = diagnose(&pod, &[]).unwrap().failure();

        assert!(failure.what.contains("Completed, exit code 0"), "{failure}");
    }

    #[test]
    fn a_job_that_ended_well_is_no_trouble() {
        let ended = json!({ "terminated": { "exitCode": 0, "reason": "Completed" } });

        assert_eq!(diagnose(&container(ended, json!({})), &[]), None);
    }

    #[test]
    fn a_container_that_cannot_be_made_says_why() {
        let pod = waiting(
            "CreateContainerConfigError",
            "container has runAsNonRoot and image will run as root",
        );

        let failure = diagnose(&pod, &[]).unwrap().failure();

        assert!(
            failure.why[0].contains("image will run as root"),
            "{failure}"
        );
    }

    #[test]
    fn a_quota_and_a_webhook_are_told_apart() {
        let refused = |message: &str| {
            let deployment = json!({ "metadata": {}, "status": { "conditions": [
                { "type": "Progressing", "status": "False" },
                { "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message },
            ]}});
            of_deployment(&serde_json::from_value(deployment).unwrap())
                .unwrap()
                .failure()
        };

        assert!(
            refused("pods \"x\" is forbidden: exceeded quota: none, requested: pods=1")
                .what
                .contains("quota")
        );
        assert!(
            refused("pods \"x\" is forbidden: violates PodSecurity \"restricted:latest\"")
                .what
                .contains("PodSecurity")
        );
        assert!(
            refused("admission webhook \"w\" denied the request: no")
                .what
                .contains("webhook")
        );
    }

    #[test]
    fn a_refused_job_is_read_off_its_events() {
        let events = [
            event("FailedCreate", "other", "no"),
            event("FailedCreate", "tp-temporary-x", "exceeded quota: q"),
        ];

        let failure = of_creation("tp-temporary-x", events.iter())
            .unwrap()
            .failure();

        assert_eq!(failure.why, ["exceeded quota: q"]);
    }

    #[test]
    fn no_node_is_trouble_unless_one_is_being_made() {
        let pod = pod(json!({ "phase": "Pending", "conditions": [
            { "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available" },
        ]}));

        assert!(matches!(
            diagnose(&pod, &[]),
            Some(Trouble::Unschedulable { .. })
        ));
        assert_eq!(
            diagnose(&pod, &[event("TriggeredScaleUp", "tp-manager-0", "")]),
            None
        );
    }

    #[test]
    fn a_node_without_network_is_named_from_its_event() {
        let pod = waiting("ContainerCreating", "");

        let trouble = diagnose(
            &pod,
            &[event(
                "FailedCreatePodSandBox",
                "tp-manager-0",
                "no address left",
            )],
        );

        assert_eq!(
            trouble,
            Some(Trouble::Node {
                message: "no address left".into()
            })
        );
    }

    #[test]
    fn an_evicted_pod_is_named() {
        let pod =
            pod(json!({ "phase": "Failed", "reason": "Evicted", "message": "low on memory" }));

        assert!(matches!(diagnose(&pod, &[]), Some(Trouble::Lost { .. })));
    }
}
