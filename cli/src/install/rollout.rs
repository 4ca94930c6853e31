//! Waiting until an installed manager works, and saying why when it does not.
//!
//! Only pods of the newest revision count, so that a pod of the version before cannot spoil an upgrade, and a manager
//! works once its replicas are ready and it has told where they are.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::Api;
use kube::api::LogParams;
use kube::runtime::wait::await_condition;
use kube::runtime::watcher;
use tp_manager_api::locator::LOCATOR_ENTRY;
use tp_manager_api::{MANAGER_NAME, ManagerLocator, WEBHOOK_NAME};

use super::diagnose::{self, Trouble};
use super::scene::{Scene, Verdict, Watching};
use super::{MANAGER_PODS, Settings};
use crate::kubeconfig::Cluster;
use crate::report::Failure;

const REVISION: &str = "deployment.kubernetes.io/revision";
const TEMPLATE_HASH: &str = "pod-template-hash";

/// Waits until `generation` of the manager's Deployment is rolled out and the manager can be found.
///
/// # Errors
/// What is wrong, a few seconds after Kubernetes knows it, or that `within` was not enough.
pub async fn wait(
    cluster: &Cluster,
    settings: &Settings,
    generation: i64,
    within: Duration,
) -> Result<ManagerLocator, Failure> {
    let mut watching = watch(cluster, settings);
    let replicas = usize::from(settings.replicas);
    let ended = watching
        .until(within, |scene| look(scene, generation, replicas))
        .await?;
    match ended {
        Some(Ok(locator)) => Ok(locator),
        Some(Err(trouble)) => Err(explain(cluster, &settings.namespace, &trouble)
            .await
            .hint_or(format!(
                "`kubectl logs -n {} -l {MANAGER_PODS}` shows more",
                settings.namespace
            ))),
        None => Err(not_in_time(watching.scene(), settings, within)),
    }
}

/// Waits until the webhook's pods are ready: what is made before has no sidecar.
///
/// # Errors
/// They are not ready within `within`.
pub async fn webhook(
    cluster: &Cluster,
    settings: &Settings,
    within: Duration,
) -> Result<(), Failure> {
    let namespace = &settings.namespace;
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), namespace);
    let ready = await_condition(deployments, WEBHOOK_NAME, |found: Option<&Deployment>| {
        let generation = found.and_then(|found| found.metadata.generation);
        found.is_some_and(|found| {
            has_observed(found, generation.unwrap_or_default()) && is_rolled_out(found)
        })
    });
    let what = "the webhook that adds sidecars is not ready";
    match tokio::time::timeout(within, ready).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(Failure::new(what).caused_by(&error)),
        Err(_) => Err(Failure::new(what)
            .because(format!(
                "its pods were not available within {} s",
                within.as_secs()
            ))
            .hint(format!(
                "`kubectl get pods,events -n {namespace}` shows why; nothing else depends on it"
            ))),
    }
}

fn watch(cluster: &Cluster, settings: &Settings) -> Watching {
    let (client, namespace) = (&cluster.client, &settings.namespace);
    let manager = || watcher::Config::default().fields(&format!("metadata.name={MANAGER_NAME}"));
    let pods = || watcher::Config::default().labels(MANAGER_PODS);
    Watching::new()
        .on(
            Api::<Deployment>::namespaced(client.clone(), namespace),
            manager(),
        )
        .on(
            Api::<ConfigMap>::namespaced(client.clone(), namespace),
            manager(),
        )
        .on(
            Api::<ReplicaSet>::namespaced(client.clone(), namespace),
            pods(),
        )
        .on(Api::<Pod>::namespaced(client.clone(), namespace), pods())
        .also(
            Api::<k8s_openapi::api::core::v1::Event>::namespaced(client.clone(), namespace),
            watcher::Config::default(),
        )
}

fn look(scene: &Scene, generation: i64, replicas: usize) -> Verdict<ManagerLocator> {
    let observed = scene
        .deployments
        .get(MANAGER_NAME)
        .filter(|deployment| has_observed(deployment, generation));
    let Some(deployment) = observed else {
        return Verdict::Wait;
    };
    let pods = newest_pods(scene, deployment);
    let found = locator(scene).filter(|locator| lists(locator, &pods) >= replicas);
    if let Some(locator) = found.filter(|_| is_rolled_out(deployment)) {
        return Verdict::Done(locator);
    }
    let trouble = diagnose::of_pods(&pods, scene.events.values())
        .or_else(|| diagnose::of_deployment(deployment));
    trouble.map_or(Verdict::Wait, Verdict::Trouble)
}

fn has_observed(deployment: &Deployment, generation: i64) -> bool {
    let observed = deployment
        .status
        .as_ref()
        .and_then(|status| status.observed_generation);
    observed.is_some_and(|observed| observed >= generation)
}

fn is_rolled_out(deployment: &Deployment) -> bool {
    let wanted = deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1);
    deployment.status.as_ref().is_some_and(|status| {
        [
            status.replicas,
            status.updated_replicas,
            status.available_replicas,
        ]
        .into_iter()
        .all(|count| count.unwrap_or(0) == wanted)
    })
}

fn locator(scene: &Scene) -> Option<ManagerLocator> {
    let data = scene.config_maps.get(MANAGER_NAME)?.data.as_ref()?;
    serde_json::from_str(data.get(LOCATOR_ENTRY)?).ok()
}

/// How many of these pods the locator names; it may still name those of the revision before.
fn lists(locator: &ManagerLocator, pods: &[&Pod]) -> usize {
    let name = |pod: &Pod| pod.metadata.name.clone().unwrap_or_default();
    pods.iter()
        .filter(|pod| locator.pods.contains(&name(pod)))
        .count()
}

/// The pods of the newest revision that are to stay.
fn newest_pods<'a>(scene: &'a Scene, deployment: &Deployment) -> Vec<&'a Pod> {
    let annotation = |annotations: &Option<std::collections::BTreeMap<String, String>>| {
        annotations
            .as_ref()
            .and_then(|annotations| annotations.get(REVISION))
            .cloned()
    };
    let Some(revision) = annotation(&deployment.metadata.annotations) else {
        return Vec::new();
    };
    let newest = scene
        .replica_sets
        .values()
        .find(|set| annotation(&set.metadata.annotations).as_ref() == Some(&revision));
    let Some(hash) = newest.and_then(|set| label(&set.metadata.labels, TEMPLATE_HASH)) else {
        return Vec::new();
    };
    let of_revision = scene
        .pods
        .values()
        .filter(|pod| label(&pod.metadata.labels, TEMPLATE_HASH) == Some(hash));
    of_revision
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .collect()
}

fn label<'a>(
    labels: &'a Option<std::collections::BTreeMap<String, String>>,
    name: &str,
) -> Option<&'a str> {
    labels.as_ref()?.get(name).map(String::as_str)
}

/// The failure of a trouble. A crash gets the last line of its log; where that says so, it was the architecture.
pub(crate) async fn explain(cluster: &Cluster, namespace: &str, trouble: &Trouble) -> Failure {
    let failure = trouble.failure();
    let Trouble::Crash {
        pod, node, image, ..
    } = trouble
    else {
        return failure;
    };
    match last_words(cluster, namespace, pod).await {
        Some(message) if diagnose::tells_architecture(&message) => {
            let (image, node) = (image.clone(), node.clone());
            Trouble::Architecture {
                image,
                node,
                message,
            }
            .failure()
        }
        Some(line) => failure.because(line),
        None => failure,
    }
}

async fn last_words(cluster: &Cluster, namespace: &str, pod: &str) -> Option<String> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    for previous in [true, false] {
        let asked = LogParams {
            previous,
            tail_lines: Some(5),
            ..LogParams::default()
        };
        let log = cluster
            .in_time(pods.logs(pod, &asked))
            .await
            .unwrap_or_default();
        if let Some(line) = log.lines().rev().find(|line| !line.trim().is_empty()) {
            return Some(message_of(line));
        }
    }
    None
}

/// The message of a JSON log line, or the line itself.
fn message_of(line: &str) -> String {
    let parsed: Option<serde_json::Value> = serde_json::from_str(line).ok();
    let message = parsed.as_ref().and_then(|line| {
        let error = line["fields"]["error"]
            .as_str()
            .or_else(|| line["error"].as_str());
        let message = line["fields"]["message"]
            .as_str()
            .or_else(|| line["message"].as_str());
        match (message, error) {
            (Some(message), Some(error)) => Some(format!("{message}: {error}")),
            (message, error) => message.or(error).map(str::to_owned),
        }
    });
    message.unwrap_or_else(|| line.to_owned())
}

fn not_in_time(scene: &Scene, settings: &Settings, within: Duration) -> Failure {
    let ready = |pod: &&Pod| {
        let conditions = pod
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_ref());
        conditions
            .into_iter()
            .flatten()
            .any(|c| c.type_ == "Ready" && c.status == "True")
    };
    let count = scene.pods.values().filter(ready).count();
    let failure = Failure::new(format!(
        "the manager was not ready within {} s",
        within.as_secs()
    ))
    .because(format!(
        "{count} of {} replicas are ready",
        settings.replicas
    ));
    let warning = scene
        .events
        .values()
        .filter(|event| event.type_.as_deref() == Some("Warning"))
        .max_by_key(|event| event.last_timestamp.clone());
    let failure = match warning.and_then(|event| event.message.clone()) {
        Some(message) => failure.because(message),
        None if locator(scene).is_none() => {
            failure.because("it has not told yet where it is (ConfigMap tp-manager)")
        }
        None => failure,
    };
    failure.hint(format!(
        "`kubectl get pods,events -n {}` shows more; `--timeout` waits longer",
        settings.namespace
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scene(revision: &str, image_state: serde_json::Value) -> Scene {
        let mut scene = Scene::default();
        let deployment = json!({
            "metadata": { "name": "tp-manager", "annotations": { REVISION: revision } },
            "spec": { "replicas": 1, "selector": {}, "template": {} },
            "status": { "observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1 },
        });
        let set = |name: &str, revision: &str| {
            json!({
                "metadata": { "name": name, "annotations": { REVISION: revision }, "labels": { TEMPLATE_HASH: name } },
            })
        };
        let pod = json!({
            "metadata": { "name": "new-1", "labels": { TEMPLATE_HASH: "new" } },
            "status": { "containerStatuses": [{ "name": "manager", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": image_state }] },
        });
        scene.deployments.insert(
            "tp-manager".into(),
            serde_json::from_value(deployment).unwrap(),
        );
        for (name, revision) in [("old", "1"), ("new", "2")] {
            scene.replica_sets.insert(
                name.into(),
                serde_json::from_value(set(name, revision)).unwrap(),
            );
        }
        scene
            .pods
            .insert("new-1".into(), serde_json::from_value(pod).unwrap());
        scene
    }

    fn with_locator(mut scene: Scene, pods: &[&str]) -> Scene {
        let locator = json!({ "protocol": 1, "oldestProtocol": 1, "version": "1", "keyHash": "sha256:0", "port": 8443, "pods": pods });
        let map = json!({ "metadata": { "name": "tp-manager" }, "data": { LOCATOR_ENTRY: locator.to_string() } });
        scene
            .config_maps
            .insert("tp-manager".into(), serde_json::from_value(map).unwrap());
        scene
    }

    #[test]
    fn a_manager_works_once_it_is_ready_and_can_be_found() {
        let running = json!({ "running": {} });

        assert!(matches!(
            look(&scene("2", running.clone()), 2, 1),
            Verdict::Wait
        ));
        assert!(matches!(
            look(&with_locator(scene("2", running.clone()), &[]), 2, 1),
            Verdict::Wait
        ));
        assert!(matches!(
            look(&with_locator(scene("2", running.clone()), &["old-1"]), 2, 1),
            Verdict::Wait
        ));
        assert!(matches!(
            look(&with_locator(scene("2", running.clone()), &["new-1"]), 3, 1),
            Verdict::Wait
        ));
        assert!(matches!(
            look(&with_locator(scene("2", running), &["new-1"]), 2, 1),
            Verdict::Done(_)
        ));
    }

    #[test]
    fn only_pods_of_the_newest_revision_are_looked_at() {
        let broken = json!({ "waiting": { "reason": "ErrImagePull", "message": "no" } });

        assert!(matches!(
            look(&scene("2", broken.clone()), 2, 1),
            Verdict::Trouble(Trouble::Image { .. })
        ));
        assert!(matches!(look(&scene("1", broken), 2, 1), Verdict::Wait));
    }

    #[test]
    fn the_last_log_line_is_read_for_its_message() {
        assert_eq!(
            message_of(r#"{"fields":{"message":"cannot listen","error":"in use"}}"#),
            "cannot listen: in use"
        );
        assert_eq!(message_of(r#"{"message":"bye"}"#), "bye");
        assert_eq!(message_of("panicked at x"), "panicked at x");
    }
}
