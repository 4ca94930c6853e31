//! Objects as the watches read them: the few fields that matter, and what they mean here.

use std::net::IpAddr;

use ipnet::IpNet;
use kube::api::Object;
use serde::Deserialize;
use tp_manager_api::MANAGER_NAME;

use super::Replica;
use crate::inventory::{Node, Service};

/// Spec or status of which nothing is read.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Empty {}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceFields {
    #[serde(default)]
    cluster_ip: Option<String>,
    #[serde(default, rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    #[serde(default, rename = "type")]
    kind: Option<String>,
}

impl ServiceFields {
    /// A headless Service has the word `None` for an address.
    pub(super) fn read(&self) -> Service {
        let mut addresses: Vec<IpAddr> = self
            .cluster_ip
            .iter()
            .chain(&self.cluster_ips)
            .filter_map(|text| text.parse().ok())
            .collect();
        addresses.dedup();
        Service {
            addresses,
            external_name: self.kind.as_deref() == Some("ExternalName"),
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodFields {
    #[serde(default)]
    host_network: bool,
    #[serde(default)]
    service_account_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct PodStatus {
    #[serde(default, rename = "podIPs")]
    pod_ips: Vec<PodAddress>,
    #[serde(default)]
    conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Deserialize)]
struct PodAddress {
    ip: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

/// A pod on its node's network has the node's addresses: they are not its namespace's.
pub(super) fn pod_addresses(pod: &Object<PodFields, PodStatus>) -> Vec<IpAddr> {
    match &pod.status {
        Some(status) if !pod.spec.host_network => status
            .pod_ips
            .iter()
            .filter_map(|address| address.ip.parse().ok())
            .collect(),
        Some(_) | None => Vec::new(),
    }
}

pub(super) fn replica(pod: &Object<PodFields, PodStatus>) -> Option<Replica> {
    let own = pod.spec.service_account_name.as_deref() == Some(MANAGER_NAME);
    let conditions = pod.status.iter().flat_map(|status| &status.conditions);
    let ready = pod.metadata.deletion_timestamp.is_none()
        && conditions
            .clone()
            .any(|condition| condition.kind == "Ready" && condition.status == "True");
    own.then(|| Replica {
        ready,
        addresses: pod_addresses(pod),
    })
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct NodeFields {
    #[serde(default, rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NodeStatus {
    #[serde(default)]
    addresses: Vec<NodeAddress>,
    #[serde(default)]
    node_info: NodeInfo,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeInfo {
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    operating_system: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct NodeAddress {
    address: String,
}

pub(super) fn read_node(node: &Object<NodeFields, NodeStatus>) -> Node {
    let addresses = node.status.iter().flat_map(|status| &status.addresses);
    let mut pod_ranges: Vec<IpNet> = node
        .spec
        .pod_cidr
        .iter()
        .chain(&node.spec.pod_cidrs)
        .filter_map(|text| text.parse().ok())
        .collect();
    pod_ranges.dedup();
    let info = node.status.clone().unwrap_or_default().node_info;
    Node {
        addresses: addresses
            .filter_map(|address| address.address.parse().ok())
            .collect(),
        pod_ranges,
        architecture: info.architecture,
        system: info.operating_system,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_on_the_nodes_network_has_no_address_of_its_own() {
        let pod = |host_network: bool| -> Object<PodFields, PodStatus> {
            serde_json::from_value(serde_json::json!({
                "metadata": { "name": "x", "namespace": "shop" },
                "spec": { "hostNetwork": host_network, "serviceAccountName": "tp-manager", "containers": [] },
                "status": { "podIP": "10.244.0.7", "podIPs": [{ "ip": "10.244.0.7" }],
                            "conditions": [{ "type": "Ready", "status": "True" }] },
            }))
            .unwrap()
        };

        assert_eq!(pod_addresses(&pod(false)).len(), 1);
        assert!(pod_addresses(&pod(true)).is_empty());
        assert!(replica(&pod(false)).unwrap().ready);
    }

    #[test]
    fn headless_and_external_services_have_no_address() {
        let service = |text: &str| serde_json::from_str::<ServiceFields>(text).unwrap().read();

        assert!(
            service(r#"{"clusterIP":"None","clusterIPs":["None"],"type":"ClusterIP"}"#)
                .addresses
                .is_empty()
        );
        assert!(service(r#"{"type":"ExternalName","externalName":"db.example"}"#).external_name);
        assert_eq!(
            service(r#"{"clusterIP":"10.96.0.5","clusterIPs":["10.96.0.5","fd00::5"]}"#)
                .addresses
                .len(),
            2
        );
    }
}
