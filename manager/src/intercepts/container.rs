//! The agent's container, and the key by which its manager knows it.

use ring::hmac;
use serde_json::{Value, json};
use tp_manager_api::policy::fence::CAPABILITIES;
use tp_manager_api::{AGENT_PREFIX, AGENT_PROGRAM, AGENT_SEED, REDIRECTED_PORT};
use tp_tunnel::{Identity, KeyHash};

/// What all agents of this manager have in common.
pub(super) struct Blueprint {
    /// Image that was installed.
    pub(super) image: String,
    identity: Identity,
    secret: hmac::Key,
}

impl Blueprint {
    /// Agents of `image` for the manager with this key.
    pub(super) fn new(image: String, identity: Identity) -> Self {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, identity.to_pem().as_bytes());
        Self {
            image,
            identity,
            secret,
        }
    }

    /// The manager's key.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The key that the agent in this container of this pod shows.
    pub(super) fn agent_key(&self, pod_uid: &str, container: &str) -> KeyHash {
        key_of(&self.seed(pod_uid, container))
    }

    /// All replicas share the manager's key, so all of them make the same seed. It says nothing about that key.
    fn seed(&self, pod_uid: &str, container: &str) -> String {
        let message = format!("agent {pod_uid} {container}");
        let tag = hmac::sign(&self.secret, message.as_bytes());
        tag.as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// A strategic merge patch of a pod that adds the container. The policy `fence` lets in exactly this.
    pub(super) fn patch(&self, pod_uid: &str, container: &str) -> Value {
        let agent = json!({
            "name": container,
            "image": self.image,
            "imagePullPolicy": "IfNotPresent",
            "command": [AGENT_PROGRAM],
            "args": [
                "--manager-key", self.identity.key_hash().to_string(),
                "--redirected", format!("[::]:{REDIRECTED_PORT}"),
            ],
            "env": [{ "name": AGENT_SEED, "value": self.seed(pod_uid, container) }],
            "securityContext": {
                // Its worker is nobody. Kubernetes gives other users no capabilities to begin with.
                "runAsUser": 0,
                "runAsGroup": 0,
                "runAsNonRoot": false,
                "privileged": false,
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"], "add": CAPABILITIES },
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            // What it said last shows in the pod's status.
            "terminationMessagePolicy": "FallbackToLogsOnError",
        });
        json!({ "spec": { "ephemeralContainers": [agent] } })
    }
}

/// The key that an agent with this seed, of 64 hexadecimal digits, shows.
pub(super) fn key_of(seed: &str) -> KeyHash {
    let agent = Identity::from_seed(seed);
    agent.expect("32 bytes are a seed").key_hash()
}

/// Name of the container of the `number`th agent of a pod.
pub(super) fn container_name(number: usize) -> String {
    let version: String = env!("CARGO_PKG_VERSION")
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .take(30)
        .collect();
    format!("{AGENT_PREFIX}{version}-{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_make_one_seed_and_other_pods_another() {
        let identity = Identity::generate();
        let [a, b] = [(); 2].map(|()| Blueprint::new("tp".into(), identity.clone()));

        assert_eq!(a.agent_key("uid", "x"), b.agent_key("uid", "x"));
        assert_ne!(a.agent_key("uid", "x"), a.agent_key("uid", "y"));
        assert_ne!(a.agent_key("uid", "x"), a.agent_key("uie", "x"));
        let stranger = Blueprint::new("tp".into(), Identity::generate());
        assert_ne!(a.agent_key("uid", "x"), stranger.agent_key("uid", "x"));
    }

    #[test]
    fn the_container_has_three_capabilities_and_no_mount() {
        let blueprint = Blueprint::new("registry.example/tp:1".into(), Identity::generate());

        let patch = blueprint.patch("uid", &container_name(2));

        let agent = &patch["spec"]["ephemeralContainers"][0];
        let name = agent["name"].as_str().unwrap();
        assert!(name.starts_with("tp-agent-") && name.ends_with("-2") && !name.contains('.'));
        let security = &agent["securityContext"];
        assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(
            security["capabilities"]["add"],
            json!(["NET_ADMIN", "SETGID", "SETUID"])
        );
        assert_eq!(security["allowPrivilegeEscalation"], false);
        assert!(agent["volumeMounts"].is_null() && agent["envFrom"].is_null());
        assert!(!patch.to_string().contains("PRIVATE"));
    }
}
