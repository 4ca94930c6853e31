//! The agent's container in a pod that was made with it: written here by the webhook, read here by the manager.
//!
//! Nothing in it needs a privilege, so PodSecurity's `restricted` level lets it in. Its key is made by a random seed in its
//! own environment: the webhook knows no secret of the manager, and the pod has no uid yet.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Container;
use serde_json::{Value, json};
use tp_manager_api::{AGENT_PORT, AGENT_PROGRAM, AGENT_SEED, SIDECAR};
use tp_tunnel::KeyHash;

/// What all sidecars have in common.
#[derive(Clone, Debug)]
pub(super) struct Blueprint<'a> {
    /// Image that was installed.
    pub(super) image: &'a str,
    /// The only key that may push routes.
    pub(super) manager_key: KeyHash,
    /// Whether it is a native sidecar.
    pub(super) native: bool,
}

/// A port that an agent takes over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// Its name, which Services look for.
    pub(super) name: String,
    /// Where the application listens.
    pub(super) app: u16,
    /// Where the agent does.
    pub(super) listen: u16,
}

/// Name of the volume that stands where the account's token would be.
pub(super) const NO_TOKEN: &str = "tp-agent-no-token";

/// Kubernetes mounts the pod's token there into every container that mounts nothing.
const TOKEN_FOLDER: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

impl Blueprint<'_> {
    /// The container that takes these ports over.
    pub(super) fn container(&self, taken: &[Taken], seed: &str) -> Value {
        let mut arguments = vec!["--manager-key".to_owned(), self.manager_key.to_string()];
        arguments.extend(taken.iter().flat_map(|port| {
            let Taken { app, listen, .. } = port;
            ["--listen".to_owned(), format!("[::]:{listen}={app}")]
        }));
        let ports = taken.iter().map(
            |port| json!({ "name": port.name, "containerPort": port.listen, "protocol": "TCP" }),
        );
        let mut container = json!({
            "name": SIDECAR,
            "image": self.image,
            "imagePullPolicy": "IfNotPresent",
            "command": [AGENT_PROGRAM],
            "args": arguments,
            "env": [{ "name": AGENT_SEED, "value": seed }],
            "ports": ports.collect::<Vec<_>>(),
            // It listens on all of its ports or on none.
            "readinessProbe": { "tcpSocket": { "port": AGENT_PORT }, "periodSeconds": 2 },
            "resources": {
                "requests": { "cpu": "10m", "memory": "16Mi" },
                "limits": { "memory": MEMORY_LIMIT },
            },
            "securityContext": {
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "runAsNonRoot": true,
                "privileged": false,
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "volumeMounts": [{ "name": NO_TOKEN, "mountPath": TOKEN_FOLDER, "readOnly": true }],
            // What it said last shows in the pod's status.
            "terminationMessagePolicy": "FallbackToLogsOnError",
        });
        if self.native {
            // It starts before the application and ends after it.
            container["restartPolicy"] = "Always".into();
        }
        container
    }
}

/// Above the agent's own budget.
const MEMORY_LIMIT: &str = "64Mi";

/// 256 random bits as an agent takes them.
pub(super) fn random_seed() -> String {
    rand::random::<[u8; 32]>()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// What the manager needs to know of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sidecar {
    /// What makes its key.
    pub(crate) seed: String,
    /// Ports of the application, and where the agent listens in their place.
    ports: BTreeMap<u16, u16>,
}

impl Sidecar {
    /// Reads it off a container that [`Blueprint::container`] may have written.
    pub(crate) fn read(container: &Container) -> Option<Self> {
        let mut environment = container.env.iter().flatten();
        let seed = environment.find(|variable| variable.name == AGENT_SEED)?;
        let seed = seed.value.clone().filter(|seed| is_seed(seed))?;
        let arguments = container.args.iter().flatten();
        let ports = arguments.filter_map(|argument| {
            let (listen, app) = argument.strip_prefix("[::]:")?.split_once('=')?;
            Some((app.parse().ok()?, listen.parse().ok()?))
        });
        let ports = ports.collect();
        (container.name == SIDECAR).then_some(Self { seed, ports })
    }

    /// The port that clients connect to and the application's, of either of them.
    pub(crate) fn port(&self, port: u16) -> Option<(u16, u16)> {
        let mut ports = self.ports.iter().map(|(app, listen)| (*listen, *app));
        ports.find(|(listen, app)| port == *app || port == *listen)
    }

    /// The application's ports that it takes over.
    pub(crate) fn apps(&self) -> impl Iterator<Item = u16> {
        self.ports.keys().copied()
    }
}

fn is_seed(text: &str) -> bool {
    format!("sha256:{text}").parse::<KeyHash>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tp_tunnel::Identity;

    fn written(native: bool) -> Value {
        let blueprint = Blueprint {
            image: "registry.example/tp:1",
            manager_key: Identity::generate().key_hash(),
            native,
        };
        let port = |name: &str, app, listen| Taken {
            name: name.into(),
            app,
            listen,
        };
        let taken = [port("http", 8080, 15100), port("grpc", 9090, 15101)];
        blueprint.container(&taken, &"ab".repeat(32))
    }

    #[test]
    fn the_manager_reads_what_the_webhook_writes() {
        let container: Container = serde_json::from_value(written(true)).unwrap();

        let sidecar = Sidecar::read(&container).unwrap();

        assert_eq!(sidecar.seed, "ab".repeat(32));
        assert_eq!(sidecar.port(8080), Some((15100, 8080)));
        assert_eq!(sidecar.port(15101), Some((15101, 9090)));
        assert_eq!(sidecar.port(80), None);
        assert_eq!(sidecar.apps().collect::<Vec<_>>(), [8080, 9090]);
        let mut other = container.clone();
        other.name = "app".into();
        assert_eq!(Sidecar::read(&other), None);
        let mut forged = container;
        forged.env = serde_json::from_value(json!([{ "name": AGENT_SEED, "value": "x" }])).unwrap();
        assert_eq!(Sidecar::read(&forged), None);
    }

    #[test]
    fn a_sidecar_is_nobody_and_may_nothing() {
        let container = written(false);

        let security = &container["securityContext"];
        assert_eq!(security["runAsUser"], 65532);
        assert_eq!(security["capabilities"], json!({ "drop": ["ALL"] }));
        assert_eq!(security["allowPrivilegeEscalation"], false);
        assert_eq!(security["readOnlyRootFilesystem"], true);
        assert_eq!(container["image"], "registry.example/tp:1");
        // Nothing stands between a stop of the pod and the agent's own drain.
        assert!(container["lifecycle"].is_null() && container["restartPolicy"].is_null());
        assert_eq!(written(true)["restartPolicy"], "Always");
    }

    #[test]
    fn seeds_are_seeds_and_differ() {
        let (a, b) = (random_seed(), random_seed());
        assert!(is_seed(&a) && is_seed(&b) && a != b);
    }
}
