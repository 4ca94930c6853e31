//! Putting the manager into a cluster, changing it and taking it away.
//!
//! [`manifests`] says what is to be there, without talking to anyone; [`apply`] and [`remove`] make it so, with
//! server-side apply; [`rollout`] waits until it works and [`diagnose`] names what keeps it from working. Nothing here
//! knows of sessions or of the tunnel.

use k8s_openapi::api::apps::v1::Deployment;
use serde_json::{Value, json};
use tp_manager_api::{MANAGER_NAME, MANAGER_NAMESPACE};

pub mod agents;
pub mod apply;
pub mod diagnose;
pub mod manifests;
pub mod remove;
mod roles;
pub mod rollout;
pub(crate) mod scene;
pub mod webhook;

use webhook::Certificate;

/// Field manager of every object that we apply.
pub const FIELD_MANAGER: &str = "tp";

/// Label whose value is `tp` on every object that we made.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Label with the release that wrote an object.
pub const VERSION_LABEL: &str = "app.kubernetes.io/version";
/// Selects every object that we made.
pub const OURS: &str = "app.kubernetes.io/name=tp,app.kubernetes.io/managed-by=tp";
/// Selects the manager's pods.
pub const MANAGER_PODS: &str = "app.kubernetes.io/name=tp,app.kubernetes.io/component=manager";

/// Annotation of the Deployment: whether its image came with the release or was asked for.
const IMAGE_CHOICE: &str = "tp.dev/image";

/// Annotation of the Deployment: the namespaces that it may attach agents in, separated by commas, where not in all.
const NAMESPACES: &str = "tp.dev/namespaces";

/// Role with which the manager adds agents to pods, and its bindings.
const ATTACH: &str = "tp-manager-attach";

/// This release.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The image of this release. Builds that publish one set `TP_DEFAULT_IMAGE`.
pub const DEFAULT_IMAGE: &str = match option_env!("TP_DEFAULT_IMAGE") {
    Some(image) => image,
    None => "lab.local/tp:dev",
};

/// What an installation can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Namespace of the manager.
    pub namespace: String,
    /// Image; `None` takes the release's own.
    pub image: Option<String>,
    /// Replicas of the manager.
    pub replicas: u16,
    /// Secrets with which nodes pull the image.
    pub pull_secrets: Vec<String>,
    /// Namespaces in which agents may be added to pods; empty for all.
    pub namespaces: Vec<String>,
    /// Whether the API server has no ServiceCIDR objects (before Kubernetes 1.33), so that the manager has to learn
    /// the Services' range from a refused dry-run.
    pub ranges_by_dry_run: bool,
    /// What the webhook shows; without one there is no webhook.
    pub certificate: Option<Certificate>,
    /// Whether Services find the named ports of native sidecars (Kubernetes 1.32 and later).
    pub native_sidecars: bool,
}

impl Settings {
    /// Metadata of an object in the manager's namespace.
    fn metadata(&self, name: &str) -> Value {
        json!({ "name": name, "namespace": self.namespace })
    }

    /// The pull secrets as a pod has them.
    fn pull_references(&self) -> Value {
        let names = self.pull_secrets.iter();
        names.map(|name| json!({ "name": name })).collect()
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            namespace: MANAGER_NAMESPACE.to_owned(),
            image: None,
            replicas: 1,
            pull_secrets: Vec::new(),
            namespaces: Vec::new(),
            ranges_by_dry_run: false,
            certificate: None,
            native_sidecars: true,
        }
    }
}

impl Settings {
    /// The image that will run.
    #[must_use]
    pub fn image(&self) -> &str {
        self.image.as_deref().unwrap_or(DEFAULT_IMAGE)
    }
}

/// An installation as it is found in a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// What it was told, as far as an upgrade keeps it.
    pub settings: Settings,
    /// Image that it runs.
    pub image: String,
    /// Release that installed it.
    pub version: String,
}

impl Installed {
    /// Reads an installation back from its Deployment.
    #[must_use]
    pub fn read(deployment: &Deployment) -> Self {
        let metadata = &deployment.metadata;
        let label = |name| {
            metadata
                .labels
                .as_ref()
                .and_then(|labels| labels.get(name))
                .cloned()
        };
        let note = |name| {
            metadata
                .annotations
                .as_ref()
                .and_then(|notes| notes.get(name))
        };
        let chosen = note(IMAGE_CHOICE);
        let namespaces = note(NAMESPACES).map(|names| names.split(',').map(str::to_owned));
        let spec = deployment.spec.as_ref();
        let pod = spec.and_then(|spec| spec.template.spec.as_ref());
        let image = pod
            .and_then(|pod| pod.containers.first())
            .and_then(|container| container.image.clone())
            .unwrap_or_default();
        Self {
            settings: Settings {
                namespace: metadata.namespace.clone().unwrap_or_default(),
                image: chosen
                    .filter(|chosen| *chosen == "chosen")
                    .map(|_| image.clone()),
                replicas: spec
                    .and_then(|spec| spec.replicas)
                    .and_then(|n| u16::try_from(n).ok())
                    .unwrap_or(1),
                pull_secrets: pod
                    .and_then(|pod| pod.image_pull_secrets.clone())
                    .unwrap_or_default()
                    .into_iter()
                    .map(|secret| secret.name)
                    .collect(),
                namespaces: namespaces.into_iter().flatten().collect(),
                ..Settings::default()
            },
            image,
            version: label(VERSION_LABEL).unwrap_or_else(|| "an unknown version".to_owned()),
        }
    }
}

/// Whether a Deployment is the manager's.
#[must_use]
pub fn is_manager(deployment: &Deployment) -> bool {
    deployment.metadata.name.as_deref() == Some(MANAGER_NAME)
}
