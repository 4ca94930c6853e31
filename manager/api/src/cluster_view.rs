//! What a workstation needs to know of the cluster to send the right connections through the tunnel.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Answer to `GET /v1/cluster`.
///
/// With `?after=<version>` the manager answers once its version differs from that one, at the latest after 25 s.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ClusterView {
    /// Digest of the rest but `manager`, so that it means the same at every replica. Below 2^53, for readers of JSON.
    pub version: u64,
    /// Version of the protocol that the manager speaks.
    pub protocol: u32,
    /// The replica that answered.
    pub manager: ManagerInfo,
    /// Namespace of the session: short names are resolved as a pod of it would.
    pub namespace: String,
    /// Cluster domain, without dots at its ends; empty where there is no cluster.
    pub domain: String,
    /// Ranges that Services get their addresses from.
    pub service_ranges: Vec<IpNet>,
    /// Ranges that pods get their addresses from, and addresses of pods outside of those.
    pub pod_ranges: Vec<IpNet>,
    /// Namespaces that this user reaches.
    pub namespaces: Vec<String>,
    /// Names of the Services of each of these.
    pub services: BTreeMap<String, Vec<String>>,
    /// Further suffixes to resolve in the cluster, without a leading dot.
    pub suffixes: Vec<String>,
    /// Whether everything goes through the tunnel that is not excluded (a standalone manager with egress).
    pub everything: bool,
}

/// Which manager answered.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ManagerInfo {
    /// Name of the pod, or of the host for a standalone manager.
    pub name: String,
    /// Its release.
    pub version: String,
}

/// Answer to `GET /v1/health`.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// Name of the pod, or of the host for a standalone manager.
    pub replica: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_camel_case_json() {
        let view = ClusterView {
            version: 7,
            service_ranges: vec!["10.96.0.0/16".parse().unwrap()],
            ..ClusterView::default()
        };

        let text = serde_json::to_string(&view).unwrap();

        assert!(
            text.contains(r#""serviceRanges":["10.96.0.0/16"]"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<ClusterView>(&text).unwrap(), view);
    }
}
