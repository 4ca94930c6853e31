//! Taking the manager, or everything, out of a cluster again.
//!
//! Without more, what people depend on stays: definitions, Sessions, policies, roles, and the key, so that a new
//! installation is the same manager to its workstations. With *everything*, all that carries our labels goes, wherever
//! it is, and so do the objects that the manager wrote; what others bound to our roles is theirs and stays.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use kube::api::{DeleteParams, DynamicObject, ListParams, Preconditions, PropagationPolicy};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::{Value, json};
use tp_manager_api::{Intercept, KEY_SECRET, MANAGER_NAME};

use super::manifests::{self, Layer};
use super::webhook::Certificate;
use super::{OURS, Settings, apply};
use crate::kubeconfig::Cluster;
use crate::report::{Failure, is_denial};

/// Deletions under way at a time.
const AT_ONCE: usize = 8;

/// An object that was removed, as the user reads it: `deployments.apps tp-system/tp-manager`.
pub type Removed = String;

/// Removes the manager from `namespace` and leaves what people depend on.
///
/// # Errors
/// What the API server refuses, or an object that is not gone within `within`.
pub async fn manager(
    cluster: &Cluster,
    namespace: &str,
    within: Duration,
) -> Result<Vec<Removed>, Failure> {
    // More than one replica and a certificate, so that the disruption budget and the webhook are among what is looked for.
    let settings = Settings {
        namespace: namespace.to_owned(),
        replicas: 2,
        certificate: Some(Certificate::generate(namespace)?),
        ..Settings::default()
    };
    let ours = manifests::all(&settings)
        .into_iter()
        .filter(|manifest| manifest.layer == Layer::Manager);
    let (running, mut rest): (Vec<_>, Vec<_>) = ours
        .map(|manifest| manifest.object)
        // First what asks, then what answers.
        .rev()
        .partition(|object| object["kind"] == "Deployment" || object["kind"] == WEBHOOKS);
    rest.push(written_by_manager(namespace, "ConfigMap", MANAGER_NAME));
    gone_within(within, async {
        let mut removed = delete_named(&cluster.client, running).await?;
        rest.extend(apply::attaching(&cluster.client).await?);
        removed.extend(delete_named(&cluster.client, rest).await?);
        Ok(removed)
    })
    .await
}

/// Removes every object of ours. Intercepts go first, while the manager is there to take their routes out of agents.
///
/// # Errors
/// What the API server refuses, or an object that is not gone within `within`.
pub async fn everything(
    cluster: &Cluster,
    namespace: &str,
    within: Duration,
) -> Result<Vec<Removed>, Failure> {
    gone_within(within, async {
        let client = &cluster.client;
        let mut removed = intercepts(client).await?;
        for kinds in SWEEP {
            for kind in *kinds {
                removed.extend(sweep(client, kind).await?);
            }
        }
        let written = [("ConfigMap", MANAGER_NAME), ("Secret", KEY_SECRET)];
        let written = written.map(|(kind, name)| written_by_manager(namespace, kind, name));
        removed.extend(delete_named(client, written.into()).await?);
        removed.extend(sweep(client, &("v1", "Namespace")).await?);
        Ok(removed)
    })
    .await
}

type Kind = (&'static str, &'static str);

const WEBHOOKS: &str = "MutatingWebhookConfiguration";

/// What asks goes first, then what runs, then what it stood on. The policy's binding goes before the definition, so that nothing
/// refuses the deletion of Sessions.
const SWEEP: &[&[Kind]] = &[
    &[("admissionregistration.k8s.io/v1", WEBHOOKS)],
    &[("apps/v1", "Deployment"), ("batch/v1", "Job")],
    &[
        ("v1", "Service"),
        ("policy/v1", "PodDisruptionBudget"),
        ("networking.k8s.io/v1", "NetworkPolicy"),
    ],
    &[
        (
            "admissionregistration.k8s.io/v1",
            "ValidatingAdmissionPolicyBinding",
        ),
        (
            "admissionregistration.k8s.io/v1",
            "ValidatingAdmissionPolicy",
        ),
        ("apiextensions.k8s.io/v1", "CustomResourceDefinition"),
    ],
    &[
        ("rbac.authorization.k8s.io/v1", "RoleBinding"),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
        ("rbac.authorization.k8s.io/v1", "Role"),
        ("rbac.authorization.k8s.io/v1", "ClusterRole"),
        ("v1", "ServiceAccount"),
        ("v1", "Secret"),
    ],
];

async fn gone_within<T>(
    within: Duration,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(within, work).await {
        Ok(done) => done,
        Err(_) => Err(Failure::new(format!(
            "not everything was gone within {} s",
            within.as_secs()
        ))
        .because("an object's finalizer is still waited for")
        .hint("run it again, or see `kubectl get all,crd -A -l app.kubernetes.io/managed-by=tp`")),
    }
}

/// Users made them, so they have no label of ours.
async fn intercepts(client: &Client) -> Result<Vec<Removed>, Failure> {
    let (version, kind) = (Intercept::api_version(&()), Intercept::kind(&()));
    let all: Api<Intercept> = Api::all(client.clone());
    let found = match all.list(&ListParams::default()).await {
        Ok(found) => found.items,
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let objects = found.iter().map(|intercept| {
        json!({
            "apiVersion": version,
            "kind": kind,
            "metadata": { "name": intercept.name_any(), "namespace": intercept.namespace() },
        })
    });
    delete_named(client, objects.collect()).await
}

async fn sweep(client: &Client, (version, kind): &Kind) -> Result<Vec<Removed>, Failure> {
    let probe = json!({ "apiVersion": version, "kind": kind, "metadata": {} });
    let found = match apply::api(client, &probe)
        .list(&ListParams::default().labels(OURS))
        .await
    {
        Ok(found) => found.items,
        // Jobs of temporary managers live in any namespace; who may not see them leaves them to expire.
        Err(error) if *kind == "Job" && is_denial(&error) => return Ok(Vec::new()),
        // A kind that this API server does not know.
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let objects = found
        .iter()
        .map(|object| identity(version, kind, object))
        .collect();
    delete_named(client, objects).await
}

fn identity(version: &str, kind: &str, object: &DynamicObject) -> Value {
    json!({
        "apiVersion": version,
        "kind": kind,
        "metadata": { "name": object.name_any(), "namespace": object.namespace() },
    })
}

fn written_by_manager(namespace: &str, kind: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": kind,
        "metadata": { "name": name, "namespace": namespace },
    })
}

async fn delete_named(client: &Client, objects: Vec<Value>) -> Result<Vec<Removed>, Failure> {
    let deletions = stream::iter(objects)
        .map(|object| delete(client, object))
        .buffered(AT_ONCE);
    let removed: Vec<Option<Removed>> = deletions.try_collect().await?;
    Ok(removed.into_iter().flatten().collect())
}

/// Deletes one object and waits until it is gone; `None` when it was not there.
async fn delete(client: &Client, object: Value) -> Result<Option<Removed>, Failure> {
    let api = apply::api(client, &object);
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let Some(found) = present(&api, name).await? else {
        return Ok(None);
    };
    let uid = found.uid().unwrap_or_default();
    let params = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Foreground),
        preconditions: Some(Preconditions {
            uid: Some(uid.clone()),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    match api.delete(name, &params).await {
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(None),
        deleted => deleted.map(drop).map_err(Failure::from)?,
    }
    let gone = await_condition(api, name, conditions::is_deleted(&uid)).await;
    gone.map_err(|error| {
        Failure::new(format!("cannot see whether {name} is gone")).caused_by(&error)
    })?;
    Ok(Some(described(&object)))
}

async fn present(api: &Api<DynamicObject>, name: &str) -> Result<Option<DynamicObject>, Failure> {
    api.get_opt(name).await.map_err(Failure::from)
}

fn described(object: &Value) -> Removed {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    match metadata["namespace"].as_str() {
        Some(namespace) => format!(
            "{} {namespace}/{}",
            text(&object["kind"]),
            text(&metadata["name"])
        ),
        None => format!("{} {}", text(&object["kind"]), text(&metadata["name"])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_that_is_applied_is_also_swept() {
        let settings = Settings {
            replicas: 2,
            certificate: Some(Certificate::generate("tp-system").unwrap()),
            ..Settings::default()
        };
        let swept: Vec<&str> = SWEEP
            .iter()
            .flat_map(|kinds| kinds.iter())
            .map(|(_, kind)| *kind)
            .collect();

        for manifest in manifests::all(&settings)
            .iter()
            .filter(|manifest| manifest.layer != Layer::Namespace)
        {
            let kind = manifest.object["kind"].as_str().unwrap();
            assert!(swept.contains(&kind), "{kind}");
        }
    }
}
