//! The webhook's objects: a Deployment whose account has no right, and what makes the API server ask it.
//!
//! Pure but for [`certificate`]. Its certificate is made here, by whoever installs, and stands in the configuration as the
//! only one that the API server takes. So no account in the cluster needs a right to webhook configurations, with which it
//! could look into, and change, every object that anybody writes.

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use serde_json::{Value, json};
use tp_manager_api::locator::LOCATOR_ENTRY;
use tp_manager_api::{
    AGENT_IMAGE, INTERCEPT_LABEL, MANAGER_NAME, NATIVE_SIDECARS, SIDECAR_LABEL, WEBHOOK_FLAG,
    WEBHOOK_LOCATOR, WEBHOOK_NAME, WEBHOOK_PATH, WEBHOOK_PORT, WEBHOOK_TLS,
};

use super::manifests::{container_security, merge, our_labels, pod_security};
use super::{Settings, VERSION};
use crate::kubeconfig::Cluster;
use crate::report::{Failure, is_denial};

/// Name of the one webhook in the configuration.
const WEBHOOK: &str = "sidecars.tp.dev";

/// The API server waits so long for each pod that asks for an agent, and goes on without one then.
const TIMEOUT_SECONDS: u32 = 1;

/// What the webhook shows and the API server expects. Its `Debug` does not show the key.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Base64 of the PEM of a self-signed certificate for the Service's name.
    pub certificate: String,
    /// Base64 of the PEM of its key.
    pub key: String,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate").finish_non_exhaustive()
    }
}

impl Certificate {
    /// A new one for the webhook in `namespace`.
    ///
    /// # Errors
    /// A namespace that is no part of a DNS name.
    pub fn generate(namespace: &str) -> Result<Self, Failure> {
        let wrong = |error: rcgen::Error| {
            Failure::new(format!(
                "cannot make a certificate for namespace {namespace}"
            ))
            .caused_by(&error)
        };
        let name = format!("{WEBHOOK_NAME}.{namespace}.svc");
        let mut params = rcgen::CertificateParams::new(vec![name]).map_err(wrong)?;
        let common = &mut params.distinguished_name;
        common.push(rcgen::DnType::CommonName, WEBHOOK_NAME);
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        let key = rcgen::KeyPair::generate().map_err(wrong)?;
        let certificate = params.self_signed(&key).map_err(wrong)?;
        Ok(Self {
            certificate: base64(&certificate.pem()),
            key: base64(&key.serialize_pem()),
        })
    }
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// The certificate that is there, or else a new one: replacing it would leave the webhook unknown to the API server until
/// its pods have the new one. Who may not look is told what the installation as a whole needs, once that is tried.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn certificate(cluster: &Cluster, namespace: &str) -> Result<Certificate, Failure> {
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), namespace);
    let looking = async {
        match secrets.get_opt(WEBHOOK_NAME).await {
            Err(error) if is_denial(&error) => Ok(None),
            looked => looked,
        }
    };
    let found = cluster.in_time(looking).await?;
    match found.as_ref().and_then(kept) {
        Some(certificate) => Ok(certificate),
        None => Certificate::generate(namespace),
    }
}

fn kept(secret: &Secret) -> Option<Certificate> {
    let data = secret.data.as_ref()?;
    let entry = |name: &str| {
        let text = std::str::from_utf8(&data.get(name)?.0).ok()?;
        (!text.is_empty()).then(|| base64(text))
    };
    Some(Certificate {
        certificate: entry("tls.crt")?,
        key: entry("tls.key")?,
    })
}

/// All of it; what the API server asks comes last.
pub(super) fn objects(settings: &Settings, certificate: &Certificate) -> Vec<Value> {
    vec![
        secret(settings, certificate),
        service_account(settings),
        network_policy(settings),
        deployment(settings),
        service(settings),
        configuration(settings, certificate),
    ]
}

fn secret(settings: &Settings, certificate: &Certificate) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": settings.metadata(WEBHOOK_NAME),
        "type": "kubernetes.io/tls",
        "data": { "tls.crt": certificate.certificate, "tls.key": certificate.key },
    })
}

/// Nothing is bound to it.
fn service_account(settings: &Settings) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": settings.metadata(WEBHOOK_NAME),
        "automountServiceAccountToken": false,
    })
}

/// It is asked, and asks nobody.
fn network_policy(settings: &Settings) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": settings.metadata(WEBHOOK_NAME),
        "spec": {
            "podSelector": { "matchLabels": pod_labels() },
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{ "ports": [{ "protocol": "TCP", "port": WEBHOOK_PORT }] }],
        },
    })
}

fn deployment(settings: &Settings) -> Value {
    let mut labels = pod_labels();
    merge(&mut labels, &our_labels());
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": settings.metadata(WEBHOOK_NAME),
        "spec": {
            "replicas": settings.replicas,
            "revisionHistoryLimit": 2,
            "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 0, "maxSurge": 1 } },
            "selector": { "matchLabels": pod_labels() },
            "template": { "metadata": { "labels": labels }, "spec": pod(settings) },
        },
    })
}

fn pod(settings: &Settings) -> Value {
    let mut security = pod_security();
    if let Some(fields) = security.as_object_mut() {
        // It opens no connection.
        fields.remove("sysctls");
    }
    let mut pod = json!({
        "serviceAccountName": WEBHOOK_NAME,
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "nodeSelector": { "kubernetes.io/os": "linux" },
        "securityContext": security,
        "containers": [container(settings)],
        "volumes": [
            { "name": "tls", "secret": { "secretName": WEBHOOK_NAME } },
            // It waits for what the manager writes there.
            { "name": "manager", "configMap": {
                "name": MANAGER_NAME, "items": [{ "key": LOCATOR_ENTRY, "path": LOCATOR_ENTRY }] } },
        ],
    });
    if !settings.pull_secrets.is_empty() {
        pod["imagePullSecrets"] = settings.pull_references();
    }
    pod
}

fn container(settings: &Settings) -> Value {
    json!({
        "name": "webhook",
        "image": settings.image(),
        "imagePullPolicy": "IfNotPresent",
        "args": [WEBHOOK_FLAG],
        "env": [
            { "name": AGENT_IMAGE, "value": settings.image() },
            { "name": NATIVE_SIDECARS, "value": settings.native_sidecars.to_string() },
        ],
        "ports": [{ "name": "webhook", "containerPort": WEBHOOK_PORT, "protocol": "TCP" }],
        "readinessProbe": {
            "httpGet": { "path": "/readyz", "port": "webhook", "scheme": "HTTPS" },
            "periodSeconds": 1,
        },
        "livenessProbe": { "tcpSocket": { "port": "webhook" }, "periodSeconds": 10 },
        "resources": {
            "requests": { "cpu": "5m", "memory": "8Mi" },
            "limits": { "memory": MEMORY_LIMIT },
        },
        "securityContext": container_security(),
        "volumeMounts": [
            { "name": "tls", "mountPath": WEBHOOK_TLS, "readOnly": true },
            { "name": "manager", "mountPath": WEBHOOK_LOCATOR, "readOnly": true },
        ],
    })
}

/// Sixty-four strangers with a review of the largest size each, parsed.
const MEMORY_LIMIT: &str = "256Mi";

fn service(settings: &Settings) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": settings.metadata(WEBHOOK_NAME),
        "spec": {
            "selector": pod_labels(),
            "ports": [{ "name": "webhook", "port": 443, "targetPort": "webhook", "protocol": "TCP" }],
        },
    })
}

/// Pods that do not ask for an agent never come to it, and those that do are made without one when it does not answer.
fn configuration(settings: &Settings, certificate: &Certificate) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": { "name": WEBHOOK_NAME, "labels": { "app.kubernetes.io/version": VERSION } },
        "webhooks": [{
            "name": WEBHOOK,
            "admissionReviewVersions": ["v1"],
            "clientConfig": {
                "service": {
                    "name": WEBHOOK_NAME, "namespace": settings.namespace, "path": WEBHOOK_PATH, "port": 443,
                },
                "caBundle": certificate.certificate,
            },
            "rules": [{
                "apiGroups": [""],
                "apiVersions": ["v1"],
                "operations": ["CREATE"],
                "resources": ["pods"],
                "scope": "Namespaced",
            }],
            "objectSelector": { "matchExpressions": [{ "key": SIDECAR_LABEL, "operator": "Exists" }] },
            "namespaceSelector": { "matchExpressions": [
                { "key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system", settings.namespace] },
                { "key": INTERCEPT_LABEL, "operator": "NotIn", "values": ["disabled"] },
            ]},
            "failurePolicy": "Ignore",
            "timeoutSeconds": TIMEOUT_SECONDS,
            "sideEffects": "None",
            "matchPolicy": "Equivalent",
            "reinvocationPolicy": "IfNeeded",
        }],
    })
}

fn pod_labels() -> Value {
    json!({ "app.kubernetes.io/name": "tp", "app.kubernetes.io/component": "webhook" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Value> {
        let settings = Settings::default();
        objects(&settings, &Certificate::generate("tp-system").unwrap())
    }

    fn of_kind(kind: &str) -> Value {
        among(&all(), kind)
    }

    fn among(all: &[Value], kind: &str) -> Value {
        let found = all.iter().find(|object| object["kind"] == kind);
        found.unwrap().clone()
    }

    #[test]
    fn ordinary_pods_never_come_to_it_and_labelled_ones_do_not_wait_long() {
        let all = all();
        let configuration = among(&all, "MutatingWebhookConfiguration");

        let webhook = &configuration["webhooks"][0];
        assert_eq!(webhook["failurePolicy"], "Ignore");
        assert_eq!(webhook["timeoutSeconds"], 1);
        assert_eq!(webhook["sideEffects"], "None");
        let label = &webhook["objectSelector"]["matchExpressions"][0];
        assert_eq!(
            (&label["key"], &label["operator"]),
            (&json!("tp.dev/sidecar"), &json!("Exists"))
        );
        let namespaces = webhook["namespaceSelector"].to_string();
        assert!(namespaces.contains("kube-system") && namespaces.contains("tp-system"));
        assert_eq!(webhook["rules"][0]["operations"], json!(["CREATE"]));
        assert_eq!(webhook["rules"][0]["resources"], json!(["pods"]));
        let secret = among(&all, "Secret");
        assert_eq!(
            webhook["clientConfig"]["caBundle"],
            secret["data"]["tls.crt"]
        );
    }

    #[test]
    fn its_pod_has_no_token_and_passes_the_restricted_level() {
        let pod = &of_kind("Deployment")["spec"]["template"]["spec"];
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["serviceAccountName"], WEBHOOK_NAME);
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        let security = &pod["containers"][0]["securityContext"];
        assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(security["allowPrivilegeEscalation"], false);
        for object in all() {
            let kind = object["kind"].as_str().unwrap();
            assert!(!kind.contains("Role"), "{kind}");
        }
    }

    #[test]
    fn a_certificate_that_is_there_is_kept() {
        let made = Certificate::generate("tools").unwrap();
        let mut secret = of_kind("Secret");
        secret["data"] = json!({ "tls.crt": made.certificate, "tls.key": made.key });
        let read = |secret: &Value| kept(&serde_json::from_value(secret.clone()).unwrap());

        assert_eq!(read(&secret), Some(made.clone()));
        secret["data"]["tls.key"] = json!("");
        assert_eq!(read(&secret), None);
        assert_eq!(format!("{made:?}"), "Certificate { .. }");
    }
}
