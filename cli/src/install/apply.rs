//! Server-side apply of manifests, all or nothing as far as the API server lets us know beforehand.
//!
//! Everything that can be is tried as a dry-run first, so that a missing right or a policy is met before the first
//! object exists. A namespace that others made is left as it is: it then is not ours to delete either.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, Resource, ResourceExt};
use serde_json::{Value, json};
use tp_manager_api::MANAGER_NAME;

use super::manifests::{self, Layer, Manifest};
use super::{ATTACH, FIELD_MANAGER, Installed, MANAGED_BY, OURS, Settings, is_manager};
use crate::kubeconfig::{Cluster, Right};
use crate::report::{Failure, is_denial};

/// An API server establishes a definition in well under a second.
const ESTABLISHED_WITHIN: Duration = Duration::from_secs(10);

/// Between two questions for a kind that is not served yet.
const SERVED_PAUSE: Duration = Duration::from_millis(100);

/// Finds the installation in `namespace`.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn installed(cluster: &Cluster, namespace: &str) -> Result<Option<Installed>, Failure> {
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), namespace);
    let found = cluster.in_time(deployments.get_opt(MANAGER_NAME)).await?;
    Ok(found.as_ref().map(Installed::read))
}

/// The namespace of an installation other than in `namespace`; a cluster has one. Without the right to look, none.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn installed_elsewhere(
    cluster: &Cluster,
    namespace: &str,
) -> Result<Option<String>, Failure> {
    let deployments: Api<Deployment> = Api::all(cluster.client.clone());
    let found = match deployments.list(&ListParams::default().labels(OURS)).await {
        Ok(found) => found,
        Err(error) if is_denial(&error) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut managers = found
        .items
        .iter()
        .filter(|deployment| is_manager(deployment));
    Ok(managers.find_map(|deployment| deployment.namespace().filter(|found| found != namespace)))
}

/// Whether the manager has to learn the Services' range without ServiceCIDR objects.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn lacks_service_cidrs(cluster: &Cluster) -> Result<bool, Failure> {
    let resources = cluster
        .in_time(
            cluster
                .client
                .list_api_group_resources("networking.k8s.io/v1"),
        )
        .await?;
    Ok(!resources
        .resources
        .iter()
        .any(|resource| resource.name == "servicecidrs"))
}

/// Whether Services find the named ports of native sidecars: the API server is of 1.32 or later.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn has_native_sidecars(cluster: &Cluster) -> Result<bool, Failure> {
    let version = cluster.in_time(cluster.client.apiserver_version()).await?;
    Ok(is_at_least(&version.major, &version.minor, (1, 32)))
}

/// Providers write `32+`.
fn is_at_least(major: &str, minor: &str, wanted: (u32, u32)) -> bool {
    let number = |text: &str| {
        let digits = text.split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
    };
    (number(major), number(minor)) >= wanted
}

/// Applies every manifest of the settings; returns the Deployment's generation to wait for.
///
/// # Errors
/// What the API server refuses, with the object's name.
pub async fn all(cluster: &Cluster, settings: &Settings) -> Result<i64, Failure> {
    let namespace = namespace(cluster, &settings.namespace).await?;
    let manifests: Vec<_> = manifests::all(settings)
        .into_iter()
        .filter(|manifest| manifest.layer != Layer::Namespace || !namespace.is_others())
        .collect();
    rehearse(cluster, &manifests, namespace != Home::Missing).await?;
    let mut generation = 0;
    for manifest in &manifests {
        let applied = one(&cluster.client, &manifest.object, false).await?;
        match kind(&manifest.object) {
            "CustomResourceDefinition" => {
                served(cluster, &applied.name_any(), &defined(&manifest.object)).await?;
            }
            "Deployment" if applied.name_any() == MANAGER_NAME => {
                generation = applied.meta().generation.unwrap_or_default()
            }
            _ => {}
        }
    }
    without_needless_budget(cluster, settings).await?;
    without_needless_bindings(cluster, &manifests).await?;
    Ok(generation)
}

/// What stands where the manager's namespace is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Home {
    Missing,
    Ours,
    Others,
}

impl Home {
    fn is_others(self) -> bool {
        self == Self::Others
    }
}

async fn namespace(cluster: &Cluster, name: &str) -> Result<Home, Failure> {
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let found = cluster.in_time(namespaces.get_opt(name)).await?;
    match found {
        None => Ok(Home::Missing),
        Some(found) if found.metadata.deletion_timestamp.is_some() => {
            Err(Failure::new(format!("namespace {name} is being deleted"))
                .hint("try again once it is gone: `kubectl get namespaces`"))
        }
        Some(found) if found.labels().get(MANAGED_BY).is_some_and(|by| by == "tp") => {
            Ok(Home::Ours)
        }
        Some(_) => Ok(Home::Others),
    }
}

/// Objects of a namespace that does not exist yet cannot be tried; for those the right alone is asked for.
async fn rehearse(
    cluster: &Cluster,
    manifests: &[Manifest],
    namespace_exists: bool,
) -> Result<(), Failure> {
    for Manifest { object, .. } in manifests {
        match object["metadata"]["namespace"].as_str() {
            Some(namespace) if !namespace_exists => may_create(cluster, object, namespace).await?,
            _ => {
                one(&cluster.client, object, true).await?;
            }
        }
    }
    Ok(())
}

async fn may_create(cluster: &Cluster, object: &Value, namespace: &str) -> Result<(), Failure> {
    let resource = resource(object);
    for verb in ["create", "patch"] {
        let right = Right {
            verb,
            group: &resource.group,
            resource: &resource.plural,
            subresource: "",
        };
        if !cluster.may(&right, Some(namespace)).await? {
            return Err(Failure::new(format!(
                "you may not {verb} {} in namespace {namespace}",
                resource.plural
            ))
            .hint("installing takes a cluster administrator's rights"));
        }
    }
    Ok(())
}

async fn one(client: &Client, object: &Value, rehearsal: bool) -> Result<DynamicObject, Failure> {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let mut params = PatchParams::apply(FIELD_MANAGER).force();
    params.dry_run = rehearsal;
    let applied = api(client, object)
        .patch(name, &params, &Patch::Apply(object))
        .await;
    applied.map_err(|error| refused(error, object))
}

fn refused(error: kube::Error, object: &Value) -> Failure {
    if is_denial(&error) {
        return Failure::from(error).hint("installing takes a cluster administrator's rights");
    }
    let unknown = matches!(&error, kube::Error::Api(status) if status.code == 404);
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let failure = Failure::from(error).within(format!("cannot apply {} {name}", kind(object)));
    if unknown && object["metadata"]["namespace"].is_null() {
        return failure
            .hint("tp needs Kubernetes 1.30 or newer; `kubectl version` shows the server's");
    }
    failure
}

/// The kind that a definition of ours, which has one version, defines.
fn defined(definition: &Value) -> ApiResource {
    let spec = &definition["spec"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let version = text(&spec["versions"][0]["name"]);
    let kind = GroupVersionKind::gvk(
        &text(&spec["group"]),
        &version,
        &text(&spec["names"]["kind"]),
    );
    ApiResource::from_gvk_with_plural(&kind, &text(&spec["names"]["plural"]))
}

/// Waits until objects of this kind can be asked for. A definition that is established has no storage yet for a moment,
/// in which the API server answers 429.
async fn served(cluster: &Cluster, name: &str, kind: &ApiResource) -> Result<(), Failure> {
    let definitions: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    let objects: Api<DynamicObject> = Api::all_with(cluster.client.clone(), kind);
    let served = async {
        await_condition(definitions, name, conditions::is_crd_established()).await?;
        let one = ListParams::default().limit(1);
        while let Err(kube::Error::Api(status)) = objects.list(&one).await
            && status.code == 429
        {
            tokio::time::sleep(SERVED_PAUSE).await;
        }
        Ok::<_, kube::runtime::wait::Error>(())
    };
    match tokio::time::timeout(ESTABLISHED_WITHIN, served).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            Err(Failure::new(format!("cannot watch the definition {name}")).caused_by(&error))
        }
        Err(_) => Err(Failure::new(format!(
            "the API server does not accept the definition {name}"
        ))
        .hint(format!("`kubectl describe crd {name}` names a conflict"))),
    }
}

/// A budget of an earlier, larger installation would keep the one replica on its node for ever.
async fn without_needless_budget(cluster: &Cluster, settings: &Settings) -> Result<(), Failure> {
    if settings.replicas > 1 {
        return Ok(());
    }
    let budget = manifests::disruption_budget(settings);
    match api(&cluster.client, &budget)
        .delete(MANAGER_NAME, &DeleteParams::default())
        .await
    {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        deleted => deleted.map(drop).map_err(Failure::from),
    }
}

/// An earlier installation may have let the manager attach agents in other namespaces.
async fn without_needless_bindings(
    cluster: &Cluster,
    manifests: &[Manifest],
) -> Result<(), Failure> {
    let wanted: Vec<_> = manifests
        .iter()
        .map(|manifest| identity(&manifest.object))
        .collect();
    for binding in attaching(&cluster.client).await? {
        if wanted.contains(&identity(&binding)) {
            continue;
        }
        let name = binding["metadata"]["name"].as_str().unwrap_or_default();
        match api(&cluster.client, &binding)
            .delete(name, &DeleteParams::default())
            .await
        {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            deleted => drop(deleted.map_err(Failure::from)?),
        }
    }
    Ok(())
}

/// The bindings in the cluster by which the manager may attach agents, as far as apply made them.
pub(super) async fn attaching(client: &Client) -> Result<Vec<Value>, Failure> {
    let mut bindings = Vec::new();
    for kind in ["ClusterRoleBinding", "RoleBinding"] {
        let probe =
            json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {} });
        let found = api(client, &probe)
            .list(&ListParams::default().labels(OURS))
            .await?;
        let of_manager = found
            .into_iter()
            .filter(|object| object.name_any() == ATTACH);
        bindings.extend(of_manager.map(|object| {
            let mut binding = probe.clone();
            binding["metadata"] = json!({ "name": ATTACH, "namespace": object.namespace() });
            binding
        }));
    }
    Ok(bindings)
}

fn identity(object: &Value) -> (&Value, &Value, &Value) {
    let metadata = &object["metadata"];
    (&object["kind"], &metadata["name"], &metadata["namespace"])
}

/// Where objects of this one's kind are, in its namespace or the cluster.
pub(super) fn api(client: &Client, object: &Value) -> Api<DynamicObject> {
    let resource = resource(object);
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

fn resource(object: &Value) -> ApiResource {
    let version = object["apiVersion"].as_str().unwrap_or_default();
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind(object)))
}

fn kind(object: &Value) -> &str {
    object["kind"].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::webhook::Certificate;

    #[test]
    fn a_providers_version_is_a_version() {
        for (major, minor, expected) in [
            ("1", "36", true),
            ("1", "32+", true),
            ("1", "31+", false),
            ("2", "0", true),
            ("1", "", false),
        ] {
            assert_eq!(
                is_at_least(major, minor, (1, 32)),
                expected,
                "{major}.{minor}"
            );
        }
    }

    #[test]
    fn the_plural_of_every_kind_is_the_api_servers() {
        let settings = Settings {
            replicas: 2,
            certificate: Some(Certificate::generate("tp-system").unwrap()),
            ..Settings::default()
        };
        let mut plurals: Vec<_> = manifests::all(&settings)
            .iter()
            .map(|manifest| resource(&manifest.object).plural)
            .collect();
        plurals.dedup();

        assert_eq!(
            plurals,
            [
                "namespaces",
                "customresourcedefinitions",
                "validatingadmissionpolicies",
                "validatingadmissionpolicybindings",
                "clusterroles",
                "validatingadmissionpolicies",
                "validatingadmissionpolicybindings",
                "clusterroles",
                "clusterrolebindings",
                "clusterroles",
                "clusterrolebindings",
                "roles",
                "rolebindings",
                "roles",
                "serviceaccounts",
                "networkpolicies",
                "poddisruptionbudgets",
                "deployments",
                "services",
                "secrets",
                "serviceaccounts",
                "networkpolicies",
                "deployments",
                "services",
                "mutatingwebhookconfigurations",
            ]
        );
    }
}
