//! `Session`: one connected workstation, as the API server stores it.
//!
//! The workstation writes it with the user's own Kubernetes identity; the policy of [`crate::policy`] makes sure that
//! `user` and `groups` are the writer's. The manager admits a TLS key that a live Session lists, and no other.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a workstation asks for, and as whom.
#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[kube(
    group = "tp.dev",
    version = "v1alpha1",
    kind = "Session",
    plural = "sessions",
    namespaced,
    status = "SessionStatus",
    doc = "One connected workstation.",
    printcolumn = r#"{"name":"User","type":"string","jsonPath":".spec.user"}"#,
    printcolumn = r#"{"name":"Host","type":"string","jsonPath":".spec.client.host"}"#,
    printcolumn = r#"{"name":"Replica","type":"string","jsonPath":".status.replica"}"#,
    printcolumn = r#"{"name":"Expires","type":"string","format":"date-time","jsonPath":".spec.expiresAt"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct SessionSpec {
    /// User name, as the API server sees the writer (`SelfSubjectReview`).
    #[schemars(length(min = 1, max = 1024))]
    pub user: String,
    /// Groups of that user, as the API server sees them; the order does not matter.
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub groups: Vec<String>,
    /// SHA-256 of the public key that this session's TLS connections show: `sha256:` and 64 hexadecimal digits.
    #[schemars(regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub key_hash: String,
    /// When it ends unless it is renewed; at most an hour after the write.
    pub expires_at: Time,
    /// Who is connecting, for people who list sessions. Nothing is decided by it.
    #[serde(default)]
    pub client: ClientInfo,
}

/// The workstation, as it describes itself.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ClientInfo {
    /// Host name.
    #[serde(default)]
    #[schemars(length(max = 253))]
    pub host: String,
    /// Version of `tp`.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub version: String,
}

/// What the manager reports about a session.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct SessionStatus {
    /// Pod that holds the connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connected_at: Option<Time>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::CustomResourceExt;

    #[test]
    fn the_schema_bounds_what_a_user_may_write() {
        let crd = serde_json::to_value(Session::crd()).unwrap();
        let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];

        assert_eq!(crd["metadata"]["name"], "sessions.tp.dev");
        assert_eq!(
            spec["properties"]["keyHash"]["pattern"],
            "^sha256:[0-9a-f]{64}$"
        );
        assert_eq!(spec["properties"]["groups"]["maxItems"], 1024);
        assert_eq!(spec["properties"]["expiresAt"]["format"], "date-time");
        let required = spec["required"].as_array().unwrap();
        assert!(
            ["user", "keyHash", "expiresAt"]
                .iter()
                .all(|name| required.iter().any(|r| r == name))
        );
    }

    #[test]
    fn a_session_reads_back_as_it_was_written() {
        let text = r#"{"user":"ada","groups":["dev"],"keyHash":"sha256:00","expiresAt":"2026-01-01T00:00:00Z"}"#;

        let spec: SessionSpec = serde_json::from_str(text).unwrap();

        assert_eq!(spec.user, "ada");
        assert_eq!(spec.client, ClientInfo::default());
        assert_eq!(
            serde_json::to_value(&spec).unwrap()["expiresAt"],
            "2026-01-01T00:00:00Z"
        );
    }
}
