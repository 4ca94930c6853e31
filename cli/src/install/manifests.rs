//! Every object of an installation, in the order in which it is applied.
//!
//! Pure: settings in, manifests out, so that `--dry-run` prints exactly what would be applied. The Deployment passes
//! PodSecurity's `restricted` level, and its namespace demands it.

use k8s_openapi::Resource;
use serde::Serialize;
use serde_json::{Value, json};
use tp_manager_api::{AGENT_IMAGE, HEALTH_PORT, MANAGER_NAME, METRICS_PORT, TUNNEL_PORT, policy};

use super::{IMAGE_CHOICE, NAMESPACES, Settings, VERSION, roles, webhook};

/// How long a replica may drain before it is killed; above the manager's own grace period.
const GRACE_SECONDS: u32 = 40;
/// Enough for 10,000 flows and the windows of several busy sessions.
const MEMORY_LIMIT: &str = "512Mi";

/// What an object belongs to, and so when it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// The manager's namespace.
    Namespace,
    /// Definitions, policies and the users' roles: they stay when only the manager is removed.
    Shared,
    /// The manager itself.
    Manager,
}

/// One object and where it belongs.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// When it is removed.
    pub layer: Layer,
    /// The object, with `apiVersion`, `kind` and labels.
    pub object: Value,
}

/// All objects: namespace, definitions, policies, roles, ServiceAccount, Deployment, Service.
#[must_use]
pub fn all(settings: &Settings) -> Vec<Manifest> {
    let definitions = policy::crds();
    let policies = policy::for_users();
    let shared = definitions
        .iter()
        .map(typed)
        .chain(policies.iter().map(|(policy, _)| typed(policy)))
        .chain(policies.iter().map(|(_, binding)| typed(binding)));
    let objects = std::iter::once((Layer::Namespace, namespace(settings)))
        .chain(
            shared
                .chain(roles::for_users())
                .map(|object| (Layer::Shared, object)),
        )
        .chain(
            manager(settings)
                .into_iter()
                .map(|object| (Layer::Manager, object)),
        );
    objects
        .map(|(layer, object)| Manifest {
            layer,
            object: labelled(object),
        })
        .collect()
}

/// The budget that keeps one replica during a drain of nodes; only there when there is more than one.
#[must_use]
pub fn disruption_budget(settings: &Settings) -> Value {
    json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": settings.metadata(MANAGER_NAME),
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": pod_labels() } },
    })
}

fn manager(settings: &Settings) -> Vec<Value> {
    // In force before the account that it binds has a right.
    let (fence, binding) = policy::fence::fence(&settings.namespace, settings.image());
    let mut objects = vec![typed(&fence), typed(&binding)];
    objects.extend(roles::for_manager(settings));
    objects.push(service_account(settings));
    objects.push(network_policy(settings));
    if settings.replicas > 1 {
        objects.push(disruption_budget(settings));
    }
    objects.push(deployment(settings));
    objects.push(service(settings));
    if let Some(certificate) = &settings.certificate {
        objects.extend(webhook::objects(settings, certificate));
    }
    objects
}

fn namespace(settings: &Settings) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": settings.namespace,
            "labels": { "pod-security.kubernetes.io/enforce": "restricted" },
        },
    })
}

/// Its token is mounted by the Deployment alone, not by whatever else may run under this account.
fn service_account(settings: &Settings) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": settings.metadata(MANAGER_NAME),
        "automountServiceAccountToken": false,
    })
}

/// Closes everything but the tunnel, which admits listed keys only, and the metrics, which ask for a token. A
/// port-forward and the kubelet's probes come from the node itself and need no opening.
fn network_policy(settings: &Settings) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": settings.metadata(MANAGER_NAME),
        "spec": {
            "podSelector": { "matchLabels": pod_labels() },
            "policyTypes": ["Ingress"],
            "ingress": [{ "ports": [
                { "protocol": "TCP", "port": TUNNEL_PORT },
                { "protocol": "TCP", "port": METRICS_PORT },
            ]}],
        },
    })
}

fn service(settings: &Settings) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": settings.metadata(MANAGER_NAME),
        "spec": {
            "selector": pod_labels(),
            "ports": [
                { "name": "tunnel", "port": TUNNEL_PORT, "targetPort": "tunnel", "protocol": "TCP" },
                { "name": "metrics", "port": METRICS_PORT, "targetPort": "metrics", "protocol": "TCP" },
            ],
        },
    })
}

fn deployment(settings: &Settings) -> Value {
    let choice = if settings.image.is_some() {
        "chosen"
    } else {
        "release"
    };
    let mut metadata = settings.metadata(MANAGER_NAME);
    metadata["annotations"] = json!({ IMAGE_CHOICE: choice });
    if !settings.namespaces.is_empty() {
        metadata["annotations"][NAMESPACES] = settings.namespaces.join(",").into();
    }
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": settings.replicas,
            "revisionHistoryLimit": 2,
            // A new replica is ready before an old one goes, so that sessions always find one.
            "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 0, "maxSurge": 1 } },
            "selector": { "matchLabels": pod_labels() },
            "template": {
                "metadata": { "labels": template_labels() },
                "spec": manager_pod(settings),
            },
        },
    })
}

fn manager_pod(settings: &Settings) -> Value {
    let mut pod = json!({
        "serviceAccountName": MANAGER_NAME,
        "automountServiceAccountToken": true,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": { "kubernetes.io/os": "linux" },
        "securityContext": pod_security(),
        "topologySpreadConstraints": [{
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": { "matchLabels": pod_labels() },
        }],
        "containers": [manager_container(settings)],
    });
    if !settings.pull_secrets.is_empty() {
        pod["imagePullSecrets"] = settings.pull_references();
    }
    pod
}

fn manager_container(settings: &Settings) -> Value {
    let mut environment = pod_fields();
    if let Some(fields) = environment.as_array_mut() {
        // What runs in other people's pods, and what the fence lets in.
        fields.push(json!({ "name": AGENT_IMAGE, "value": settings.image() }));
    }
    json!({
        "name": "manager",
        "image": settings.image(),
        "imagePullPolicy": "IfNotPresent",
        "env": environment,
        "ports": [
            { "name": "tunnel", "containerPort": TUNNEL_PORT, "protocol": "TCP" },
            { "name": "health", "containerPort": HEALTH_PORT, "protocol": "TCP" },
            { "name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP" },
        ],
        "readinessProbe": { "httpGet": { "path": "/readyz", "port": "health" }, "periodSeconds": 1 },
        "livenessProbe": { "httpGet": { "path": "/healthz", "port": "health" }, "periodSeconds": 10 },
        "resources": resources(),
        "securityContext": container_security(),
    })
}

/// What a manager has to know of its own pod.
#[must_use]
pub fn pod_fields() -> Value {
    json!([
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        // All of them, separated by commas, where pods have two.
        field("POD_IP", "status.podIPs"),
    ])
}

fn field(name: &str, path: &str) -> Value {
    json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } })
}

/// No CPU limit: throttling would show as round-trip time of every session.
#[must_use]
pub fn resources() -> Value {
    json!({
        "requests": { "cpu": "10m", "memory": "32Mi" },
        "limits": { "memory": MEMORY_LIMIT },
    })
}

/// What PodSecurity's `restricted` level asks of a pod, and every port that it lets a pod have for its own connections: a
/// port serves one destination once a minute (TIME-WAIT), and the default range ends at 470 short connections a second to
/// one Service. The sysctl is one of those that Kubernetes calls safe, so it needs no consent of the kubelet's.
#[must_use]
pub fn pod_security() -> Value {
    json!({
        "runAsNonRoot": true,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "seccompProfile": { "type": "RuntimeDefault" },
        "sysctls": [{ "name": "net.ipv4.ip_local_port_range", "value": "1024 65535" }],
    })
}

/// What PodSecurity's `restricted` level asks of a container, and a read-only root.
#[must_use]
pub fn container_security() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
    })
}

fn pod_labels() -> Value {
    json!({ "app.kubernetes.io/name": "tp", "app.kubernetes.io/component": "manager" })
}

fn template_labels() -> Value {
    let mut labels = pod_labels();
    merge(&mut labels, &our_labels());
    labels
}

/// The labels by which our objects are found again.
#[must_use]
pub fn our_labels() -> Value {
    json!({
        "app.kubernetes.io/name": "tp",
        "app.kubernetes.io/managed-by": "tp",
        "app.kubernetes.io/version": VERSION,
    })
}

fn labelled(mut object: Value) -> Value {
    merge(&mut object["metadata"]["labels"], &our_labels());
    object
}

pub(super) fn merge(into: &mut Value, from: &Value) {
    for (key, value) in from.as_object().into_iter().flatten() {
        into[key] = value.clone();
    }
}

/// A typed object with its `apiVersion` and `kind`, and without fields that are null or belong to the server.
fn typed<K: Resource + Serialize>(object: &K) -> Value {
    let mut value = serde_json::to_value(object).expect("Kubernetes objects have a JSON form");
    value["apiVersion"] = K::API_VERSION.into();
    value["kind"] = K::KIND.into();
    if let Some(fields) = value.as_object_mut() {
        fields.remove("status");
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::apps::v1::Deployment;

    fn settings() -> Settings {
        Settings {
            replicas: 2,
            pull_secrets: vec!["regcred".into()],
            namespaces: vec!["shop".into(), "billing".into()],
            certificate: Some(webhook::Certificate::generate("tp-system").unwrap()),
            ..Settings::default()
        }
    }

    fn kinds(settings: &Settings) -> Vec<String> {
        let kind = |manifest: Manifest| manifest.object["kind"].as_str().unwrap().to_owned();
        all(settings).into_iter().map(kind).collect()
    }

    fn of_kind(kind: &str) -> Value {
        let mut manifests = all(&settings()).into_iter();
        manifests
            .find(|manifest| manifest.object["kind"] == kind)
            .unwrap()
            .object
    }

    #[test]
    fn what_others_stand_on_comes_first() {
        let kinds = kinds(&settings());
        let position = |kind: &str| kinds.iter().position(|k| k == kind).unwrap();

        let order = [
            "Namespace",
            "CustomResourceDefinition",
            "ValidatingAdmissionPolicy",
            "ValidatingAdmissionPolicyBinding",
            "ClusterRole",
            "Role",
            "ServiceAccount",
            "Deployment",
            "Service",
        ];

        assert!(order.is_sorted_by_key(|kind| position(kind)), "{kinds:?}");
    }

    #[test]
    fn every_object_can_be_found_again_by_its_labels() {
        for Manifest { object, .. } in all(&settings()) {
            let labels = &object["metadata"]["labels"];
            assert_eq!(labels["app.kubernetes.io/managed-by"], "tp", "{object}");
            assert_eq!(labels["app.kubernetes.io/version"], VERSION, "{object}");
            assert!(object["apiVersion"].is_string(), "{object}");
        }
    }

    #[test]
    fn the_pod_passes_the_restricted_level() {
        let pod = &of_kind("Deployment")["spec"]["template"]["spec"];
        let container = &pod["containers"][0]["securityContext"];

        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );
        assert_eq!(container["allowPrivilegeEscalation"], false);
        assert_eq!(container["readOnlyRootFilesystem"], true);
        assert_eq!(container["capabilities"]["drop"], json!(["ALL"]));
        assert!(container["capabilities"]["add"].is_null());
        assert!(pod["hostNetwork"].is_null() && pod["volumes"].is_null());
        assert_eq!(
            of_kind("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"],
            "restricted"
        );
    }

    #[test]
    fn agents_run_the_image_that_the_fence_lets_in() {
        let told = Settings {
            image: Some("registry.example/tp:1".into()),
            ..settings()
        };
        let objects: Vec<Value> = all(&told).into_iter().map(|one| one.object).collect();
        let named = |kind: &str, name: &str| {
            let mut found = objects.iter();
            found
                .position(|object| object["kind"] == kind && object["metadata"]["name"] == name)
                .unwrap()
        };

        let fence = named("ValidatingAdmissionPolicyBinding", policy::fence::FENCE);
        assert!(fence < named("ClusterRoleBinding", MANAGER_NAME));
        let fence = named("ValidatingAdmissionPolicy", policy::fence::FENCE);
        assert!(objects[fence].to_string().contains("registry.example/tp:1"));
        let pod = &objects[named("Deployment", MANAGER_NAME)]["spec"]["template"]["spec"];
        let environment = pod["containers"][0]["env"].as_array().unwrap();
        assert!(
            environment
                .contains(&json!({ "name": "TP_AGENT_IMAGE", "value": "registry.example/tp:1" }))
        );
    }

    #[test]
    fn the_deployment_selects_the_pods_it_makes() {
        let deployment = of_kind("Deployment");
        let made = &deployment["spec"]["template"]["metadata"]["labels"];

        for (key, value) in deployment["spec"]["selector"]["matchLabels"]
            .as_object()
            .unwrap()
        {
            assert_eq!(&made[key], value);
        }
    }

    #[test]
    fn a_budget_is_there_only_for_several_replicas() {
        let one = Settings::default();

        assert!(!kinds(&one).contains(&"PodDisruptionBudget".to_owned()));
        assert!(kinds(&settings()).contains(&"PodDisruptionBudget".to_owned()));
    }

    #[test]
    fn an_upgrade_reads_back_what_was_set() {
        let told = Settings {
            namespace: "tools".into(),
            image: Some("registry.example/tp:1".into()),
            ..settings()
        };
        let manifests = all(&told);
        let found = manifests
            .iter()
            .find(|manifest| manifest.object["kind"] == "Deployment");
        let deployment: Deployment = serde_json::from_value(found.unwrap().object.clone()).unwrap();

        let installed = super::super::Installed::read(&deployment);

        // The certificate and what the API server can do are asked for anew.
        let told = Settings {
            certificate: None,
            ..told
        };
        assert_eq!(installed.settings, told);
        assert_eq!(
            (installed.image.as_str(), installed.version.as_str()),
            ("registry.example/tp:1", VERSION)
        );
    }

    #[test]
    fn the_releases_image_is_not_kept_by_an_upgrade() {
        let deployment: Deployment = serde_json::from_value(of_kind("Deployment")).unwrap();

        assert_eq!(
            super::super::Installed::read(&deployment).settings.image,
            None
        );
    }
}
