//! A manager for one session, where none is installed: a Job in the user's own namespace.
//!
//! Asks for no right beyond making a Job there and looking at its pod, leaves nothing in the cluster, and knows
//! nothing of the session itself. The manager ends by itself when its session does, or when none came within its
//! lease, so a workstation that vanishes leaves only what Kubernetes clears away.

use std::time::Duration;

use futures::{AsyncBufReadExt, TryStreamExt};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::Api;
use kube::api::{DeleteParams, LogParams, PostParams};
use kube::runtime::watcher;
use serde_json::{Value, json};
use tp_tunnel::KeyHash;

use crate::install::diagnose::{self, Trouble};
use crate::install::scene::{Scene, Verdict, Watching};
use crate::install::{manifests, rollout};
use crate::kubeconfig::{Cluster, Right};
use crate::report::{Failure, OrFail};

/// A Job's pod is made at once or, where it is refused, not at all; who may not read events learns no more.
const MADE_WITHIN: Duration = Duration::from_secs(10);
/// Pulling the image is most of it.
const STARTED_WITHIN: Duration = Duration::from_secs(60);
/// The key is the first thing that the manager says.
const KEY_WITHIN: Duration = Duration::from_secs(10);
/// Longest life of a temporary manager: a working day, and then some.
const LIFETIME_SECONDS: u32 = 12 * 60 * 60;

const SEE_EVENTS: Right<'_> = Right {
    verb: "watch",
    group: "",
    resource: "events",
    subresource: "",
};

/// A running temporary manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemporaryManager {
    /// Pod to forward a port to.
    pub pod: String,
    /// Hash of the key that it shows.
    pub key_hash: KeyHash,
    /// Job that it belongs to.
    pub job: String,
}

/// Starts one in `namespace` for the client with this key and waits until it runs and has told its own key.
///
/// Dropping the future leaves a Job that ends by itself within the manager's lease.
///
/// # Errors
/// A missing right, or what keeps the pod from running; the Job is removed again.
pub async fn start(
    cluster: &Cluster,
    namespace: &str,
    image: &str,
    client_key: KeyHash,
) -> Result<TemporaryManager, Failure> {
    let job = format!("tp-temporary-{:08x}", rand::random::<u32>());
    let manifest = manifest(&job, namespace, image, &client_key.to_string());
    let wanted: Job = serde_json::from_value(manifest)
        .or_fail(|| "cannot describe the temporary manager".to_owned())?;
    let jobs: Api<Job> = Api::namespaced(cluster.client.clone(), namespace);
    let params = PostParams::default();
    let creating = async {
        match jobs.create(&params, &wanted).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            created => created.map(|_| true),
        }
    };
    if !cluster.in_time(creating).await? {
        return Err(Failure::new(format!("there is no namespace {namespace}"))
            .hint("choose one that exists with `-n`"));
    }
    match running(cluster, namespace, &job).await {
        Ok((pod, key_hash)) => Ok(TemporaryManager { pod, key_hash, job }),
        Err(failure) => {
            // What went wrong is worth more than whether it could be cleared away: the Job expires in any case.
            let _ = remove(cluster, namespace, &job).await;
            Err(failure.within(format!(
                "the temporary manager does not start in namespace {namespace}"
            )))
        }
    }
}

impl TemporaryManager {
    /// Removes the Job and its pod. One that is gone already is no failure.
    ///
    /// # Errors
    /// When the API server cannot be asked, or refuses.
    pub async fn stop(&self, cluster: &Cluster, namespace: &str) -> Result<(), Failure> {
        remove(cluster, namespace, &self.job).await
    }
}

async fn remove(cluster: &Cluster, namespace: &str, job: &str) -> Result<(), Failure> {
    let jobs: Api<Job> = Api::namespaced(cluster.client.clone(), namespace);
    let params = DeleteParams::background();
    let not_found_is_gone = async {
        match jobs.delete(job, &params).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            deleted => deleted.map(drop),
        }
    };
    cluster.in_time(not_found_is_gone).await
}

async fn running(
    cluster: &Cluster,
    namespace: &str,
    job: &str,
) -> Result<(String, KeyHash), Failure> {
    let client = &cluster.client;
    let of_job = watcher::Config::default().labels(&format!("batch.kubernetes.io/job-name={job}"));
    let mut watching =
        Watching::new().on(Api::<Pod>::namespaced(client.clone(), namespace), of_job);
    // They only make an explanation better, and a user of one namespace often may not see them.
    if cluster.may(&SEE_EVENTS, Some(namespace)).await? {
        let events = Api::<Event>::namespaced(client.clone(), namespace);
        watching = watching.also(events, watcher::Config::default());
    }
    match watching
        .until(MADE_WITHIN, |scene| made(scene, job))
        .await?
    {
        Some(Ok(())) => {}
        Some(Err(trouble)) => return Err(explained(cluster, namespace, &trouble).await),
        None => return Err(not_made(namespace)),
    }
    match watching
        .until(STARTED_WITHIN, |scene| look(scene, job))
        .await?
    {
        Some(Ok(pod)) => {
            let key_hash = key_of(cluster, namespace, &pod).await?;
            Ok((pod, key_hash))
        }
        Some(Err(trouble)) => Err(explained(cluster, namespace, &trouble).await),
        None => Err(not_running(namespace)),
    }
}

fn not_made(namespace: &str) -> Failure {
    Failure::new(format!(
        "no pod was made within {} s",
        MADE_WITHIN.as_secs()
    ))
    .hint(format!(
        "does a quota or a webhook refuse it? see `kubectl get events -n {namespace}`"
    ))
}

fn not_running(namespace: &str) -> Failure {
    Failure::new(format!(
        "its pod did not run within {} s",
        STARTED_WITHIN.as_secs()
    ))
    .hint(format!("`kubectl get events -n {namespace}` may say why"))
}

async fn explained(cluster: &Cluster, namespace: &str, trouble: &Trouble) -> Failure {
    let failure = rollout::explain(cluster, namespace, trouble).await;
    match trouble {
        Trouble::Image { .. } => failure.hint("name another with `--image`"),
        Trouble::Architecture { .. }
        | Trouble::Crash { .. }
        | Trouble::Start { .. }
        | Trouble::Refused { .. }
        | Trouble::Unschedulable { .. }
        | Trouble::Node { .. }
        | Trouble::Lost { .. } => failure,
    }
}

fn made(scene: &Scene, job: &str) -> Verdict<()> {
    if scene.pods.is_empty() {
        let trouble = diagnose::of_creation(job, scene.events.values());
        return trouble.map_or(Verdict::Wait, Verdict::Trouble);
    }
    Verdict::Done(())
}

fn look(scene: &Scene, job: &str) -> Verdict<String> {
    let pods: Vec<_> = scene.pods.values().collect();
    if let Some(running) = pods.iter().find(|pod| is_running(pod)) {
        return Verdict::Done(running.metadata.name.clone().unwrap_or_default());
    }
    let trouble = diagnose::of_pods(&pods, scene.events.values())
        .or_else(|| diagnose::of_creation(job, scene.events.values()));
    trouble.map_or(Verdict::Wait, Verdict::Trouble)
}

fn is_running(pod: &Pod) -> bool {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    let states = statuses
        .into_iter()
        .flatten()
        .filter_map(|status| status.state.as_ref());
    states.into_iter().any(|state| state.running.is_some())
}

/// Follows the log up to the line that names the key.
async fn key_of(cluster: &Cluster, namespace: &str, pod: &str) -> Result<KeyHash, Failure> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    let following = LogParams {
        follow: true,
        ..LogParams::default()
    };
    let reading = async {
        let mut lines = pods.log_stream(pod, &following).await?.lines();
        while let Some(line) = lines
            .try_next()
            .await
            .or_fail(|| format!("cannot read the log of {pod}"))?
        {
            if let Some(key) = key_in(&line) {
                return Ok(key);
            }
        }
        Err(Failure::new(
            "the temporary manager ended without telling its key",
        ))
    };
    match tokio::time::timeout(KEY_WITHIN, reading).await {
        Ok(read) => read,
        Err(_) => Err(
            Failure::new("the temporary manager did not tell its key in its log")
                .hint("is the image one of this release? `tp version` shows which this is"),
        ),
    }
}

fn key_in(line: &str) -> Option<KeyHash> {
    let line: Value = serde_json::from_str(line).ok()?;
    let told = line["key_hash"]
        .as_str()
        .or_else(|| line["fields"]["key_hash"].as_str())?;
    told.parse().ok()
}

fn manifest(job: &str, namespace: &str, image: &str, client_key: &str) -> Value {
    let mut labels = manifests::our_labels();
    labels["app.kubernetes.io/component"] = "temporary".into();
    json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": { "name": job, "namespace": namespace, "labels": labels },
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "ttlSecondsAfterFinished": 30,
            "activeDeadlineSeconds": LIFETIME_SECONDS,
            "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": false,
                    // The manager learns the namespace's Services from them; it may not list them.
                    "enableServiceLinks": true,
                    "terminationGracePeriodSeconds": 5,
                    "nodeSelector": { "kubernetes.io/os": "linux" },
                    "securityContext": manifests::pod_security(),
                    "containers": [{
                        "name": "manager",
                        "image": image,
                        "imagePullPolicy": "IfNotPresent",
                        "args": ["--temporary", "--namespace", namespace, "--client-key", client_key],
                        "env": manifests::pod_fields(),
                        "resources": manifests::resources(),
                        "securityContext": manifests::container_security(),
                    }],
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    #[test]
    fn the_job_clears_itself_away_and_holds_no_token() {
        let job: Job =
            serde_json::from_value(manifest("tp-temporary-1", "shop", "example/tp:1", KEY))
                .unwrap();
        let spec = job.spec.unwrap();
        let pod = spec.template.spec.unwrap();

        assert_eq!(
            (spec.backoff_limit, spec.ttl_seconds_after_finished),
            (Some(0), Some(30))
        );
        assert!(spec.active_deadline_seconds.is_some());
        assert_eq!(pod.automount_service_account_token, Some(false));
        assert_eq!(pod.restart_policy.as_deref(), Some("Never"));
        assert!(pod.service_account_name.is_none());
        assert_eq!(
            pod.containers[0].args.as_ref().unwrap().join(" "),
            format!("--temporary --namespace shop --client-key {KEY}")
        );
    }

    #[test]
    fn the_key_is_read_from_its_field_only() {
        let nested = format!(
            r#"{{"level":"INFO","fields":{{"message":"manager key {KEY}","key_hash":"{KEY}"}}}}"#
        );
        let flat = format!(r#"{{"message":"x","key_hash":"{KEY}"}}"#);

        assert_eq!(key_in(&nested).unwrap().to_string(), KEY);
        assert_eq!(key_in(&flat).unwrap().to_string(), KEY);
        assert!(key_in(&format!(r#"{{"message":"{KEY}"}}"#)).is_none());
        assert!(key_in(KEY).is_none());
    }

    #[test]
    fn a_job_whose_pods_are_refused_is_trouble() {
        let mut scene = Scene::default();
        let event = json!({ "metadata": { "name": "e" }, "involvedObject": { "name": "tp-temporary-1" }, "reason": "FailedCreate", "message": "exceeded quota: q" });
        scene
            .events
            .insert("e".into(), serde_json::from_value(event).unwrap());

        assert!(matches!(
            look(&scene, "tp-temporary-1"),
            Verdict::Trouble(_)
        ));
        assert!(matches!(
            made(&scene, "tp-temporary-1"),
            Verdict::Trouble(_)
        ));
        assert!(matches!(made(&scene, "tp-temporary-2"), Verdict::Wait));
    }
}
