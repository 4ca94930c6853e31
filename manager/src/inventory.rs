//! What the cluster looks like: Services, pods, namespaces, nodes and the ranges they live in.
//!
//! Pure: watches feed it, reaches and views ask it. Its main answer is which namespace an address belongs to, since
//! that decides whose right is asked for. An address that could be a node's belongs to no namespace.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use crate::sessions::ObjectName;

/// One Service, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Cluster addresses; none when headless.
    pub addresses: Vec<IpAddr>,
    /// Whether it is an alias for a name elsewhere.
    pub external_name: bool,
}

/// One pod, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its addresses; none when it shares its node's.
    pub addresses: Vec<IpAddr>,
}

/// One node, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// All addresses it reports.
    pub addresses: Vec<IpAddr>,
    /// Ranges its pods get their addresses from.
    pub pod_ranges: Vec<IpNet>,
    /// As `amd64`.
    pub architecture: Option<String>,
    /// As `linux`.
    pub system: Option<String>,
}

/// Everything, at one moment.
#[derive(Debug, Default)]
pub struct Inventory {
    services: BTreeMap<ObjectName, Service>,
    pods: HashMap<ObjectName, Pod>,
    nodes: BTreeMap<Arc<str>, Node>,
    namespaces: BTreeSet<Arc<str>>,
    service_ranges: BTreeMap<Arc<str>, Vec<IpNet>>,
    owners: HashMap<IpAddr, ObjectName>,
}

impl Inventory {
    /// A Service was written, or deleted. True when what views show changed.
    pub fn set_service(&mut self, name: &ObjectName, service: Option<Service>) -> bool {
        let before = self.services.get(name).cloned();
        if before == service {
            return false;
        }
        self.move_addresses(
            name,
            before.as_ref().map_or(&[], |service| &service.addresses),
            service.as_ref().map_or(&[], |service| &service.addresses),
        );
        let listed = before.is_some() == service.is_some();
        match service {
            Some(service) => drop(self.services.insert(name.clone(), service)),
            None => drop(self.services.remove(name)),
        }
        !listed
    }

    /// A pod was written, or deleted or ended. True when what views show changed.
    pub fn set_pod(&mut self, name: &ObjectName, pod: Option<Pod>) -> bool {
        let before = self.pods.get(name).cloned().unwrap_or_default();
        let after = pod.unwrap_or_default();
        if before == after {
            return false;
        }
        self.move_addresses(name, &before.addresses, &after.addresses);
        let outside = before
            .addresses
            .iter()
            .chain(&after.addresses)
            .any(|address| !self.in_node_ranges(*address));
        if after.addresses.is_empty() {
            self.pods.remove(name);
        } else {
            self.pods.insert(name.clone(), after);
        }
        outside
    }

    /// A node was written, or deleted. True when what views show changed.
    pub fn set_node(&mut self, name: &Arc<str>, node: Option<Node>) -> bool {
        if self.nodes.get(name) == node.as_ref() {
            return false;
        }
        match node {
            Some(node) => drop(self.nodes.insert(Arc::clone(name), node)),
            None => drop(self.nodes.remove(name)),
        }
        true
    }

    /// A namespace came or went. True when that is news.
    pub fn set_namespace(&mut self, name: &Arc<str>, exists: bool) -> bool {
        if exists {
            self.namespaces.insert(Arc::clone(name))
        } else {
            self.namespaces.remove(name)
        }
    }

    /// The ranges of one ServiceCIDR object, or of the one source there is without such objects.
    pub fn set_service_ranges(&mut self, source: &Arc<str>, ranges: Vec<IpNet>) -> bool {
        let before = match ranges.is_empty() {
            true => self.service_ranges.remove(source),
            false => self
                .service_ranges
                .insert(Arc::clone(source), ranges.clone()),
        };
        before.unwrap_or_default() != ranges
    }

    /// Last writer wins: an address given to a new pod is the new pod's, also when the old one's end is seen later.
    fn move_addresses(&mut self, name: &ObjectName, from: &[IpAddr], to: &[IpAddr]) {
        for address in from {
            if self.owners.get(address) == Some(name) {
                self.owners.remove(address);
            }
        }
        self.owners
            .extend(to.iter().map(|address| (*address, name.clone())));
    }

    /// The namespace of the Service or pod that has the address.
    pub fn namespace_of(&self, address: IpAddr) -> Option<Arc<str>> {
        self.owners
            .get(&address)
            .map(|(namespace, _)| Arc::clone(namespace))
    }

    /// A node's address, or one inside the pods' ranges that no pod has: a bridge or gateway, which is the node again.
    pub fn is_node(&self, address: IpAddr) -> bool {
        let reported = || {
            self.nodes
                .values()
                .any(|node| node.addresses.contains(&address))
        };
        !self.owners.contains_key(&address) && (self.in_node_ranges(address) || reported())
    }

    /// Whether Services or pods get their addresses from around here.
    pub fn is_inside(&self, address: IpAddr) -> bool {
        self.service_ranges
            .values()
            .flatten()
            .any(|range| range.contains(&address))
            || self.in_node_ranges(address)
    }

    fn in_node_ranges(&self, address: IpAddr) -> bool {
        self.nodes
            .values()
            .flat_map(|node| &node.pod_ranges)
            .any(|range| range.contains(&address))
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// The Service of that name.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// Names of all Services.
    pub fn service_names(&self) -> HashSet<ObjectName> {
        self.services.keys().cloned().collect()
    }

    /// Names of all pods with an address.
    pub fn pod_names(&self) -> HashSet<ObjectName> {
        self.pods.keys().cloned().collect()
    }

    /// Names of all nodes.
    pub fn node_names(&self) -> HashSet<Arc<str>> {
        self.nodes.keys().cloned().collect()
    }

    /// Names of the objects that [`Self::set_service_ranges`] was called with.
    pub fn service_range_sources(&self) -> HashSet<Arc<str>> {
        self.service_ranges.keys().cloned().collect()
    }

    /// All namespaces, in order.
    pub fn namespaces(&self) -> impl Iterator<Item = &Arc<str>> {
        self.namespaces.iter()
    }

    /// Names of a namespace's Services, in order.
    pub fn services_of(&self, namespace: &Arc<str>) -> Vec<String> {
        let first = (Arc::clone(namespace), Arc::from(""));
        let own = self
            .services
            .range(first..)
            .take_while(|((own, _), _)| own == namespace);
        own.map(|((_, name), _)| name.to_string()).collect()
    }

    /// Ranges of Services.
    pub fn service_ranges(&self) -> Vec<IpNet> {
        IpNet::aggregate(&self.service_ranges.values().flatten().copied().collect())
    }

    /// Ranges of pods: the nodes', and the addresses of pods outside of those.
    pub fn pod_ranges(&self) -> Vec<IpNet> {
        let mut ranges: Vec<IpNet> = self
            .nodes
            .values()
            .flat_map(|node| node.pod_ranges.clone())
            .collect();
        let addresses = self.pods.values().flat_map(|pod| &pod.addresses);
        let strays: Vec<IpNet> = addresses
            .filter(|a| !self.in_node_ranges(**a))
            .map(|a| IpNet::from(*a))
            .collect();
        let exact = IpNet::aggregate(&strays);
        match exact.len() > MOST_PIECES {
            true => ranges.extend(strays.iter().map(widened)),
            false => ranges.extend(exact),
        }
        IpNet::aggregate(&ranges)
    }
}

/// Pieces of a view. With more, an address stands for its /24: networks where pods share the nodes' subnets have
/// thousands of pods in few subnets.
const MOST_PIECES: usize = 256;

fn widened(range: &IpNet) -> IpNet {
    match range {
        IpNet::V4(v4) => IpNet::V4(Ipv4Net::new_assert(v4.addr(), 24).trunc()),
        IpNet::V6(_) => *range,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(namespace: &str, name: &str) -> ObjectName {
        (namespace.into(), name.into())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn service(addresses: &[&str]) -> Option<Service> {
        Some(Service {
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            external_name: false,
        })
    }

    fn pod(addresses: &[&str]) -> Option<Pod> {
        Some(Pod {
            addresses: addresses.iter().map(|text| ip(text)).collect(),
        })
    }

    fn cluster() -> Inventory {
        let mut inventory = Inventory::default();
        inventory.set_node(
            &"node-1".into(),
            Some(Node {
                addresses: vec![ip("10.99.0.1")],
                pod_ranges: vec!["10.244.0.0/24".parse().unwrap()],
                ..Node::default()
            }),
        );
        inventory.set_service_ranges(&"kubernetes".into(), vec!["10.96.0.0/16".parse().unwrap()]);
        inventory.set_service(&name("shop", "web"), service(&["10.96.0.5"]));
        inventory.set_pod(&name("shop", "web-1"), pod(&["10.244.0.7"]));
        inventory
    }

    #[test]
    fn an_address_belongs_to_the_namespace_of_its_service_or_pod() {
        let inventory = cluster();

        assert_eq!(
            inventory.namespace_of(ip("10.96.0.5")).as_deref(),
            Some("shop")
        );
        assert_eq!(
            inventory.namespace_of(ip("10.244.0.7")).as_deref(),
            Some("shop")
        );
        assert_eq!(inventory.namespace_of(ip("10.244.0.8")), None);
        assert_eq!(inventory.namespace_of(ip("10.99.0.1")), None);
        assert!(inventory.is_inside(ip("10.96.77.1")) && !inventory.is_inside(ip("10.99.0.1")));
    }

    #[test]
    fn an_address_given_to_another_pod_is_the_new_ones() {
        let mut inventory = cluster();

        inventory.set_pod(&name("bank", "vault"), pod(&["10.244.0.7"]));
        inventory.set_pod(&name("shop", "web-1"), None);

        assert_eq!(
            inventory.namespace_of(ip("10.244.0.7")).as_deref(),
            Some("bank")
        );
        inventory.set_pod(&name("bank", "vault"), None);
        assert_eq!(inventory.namespace_of(ip("10.244.0.7")), None);
    }

    #[test]
    fn gateways_of_the_pod_network_count_as_nodes() {
        let inventory = cluster();

        assert!(inventory.is_node(ip("10.99.0.1")));
        assert!(inventory.is_node(ip("10.244.0.1")));
        assert!(!inventory.is_node(ip("10.244.0.7")));
        assert!(!inventory.is_node(ip("192.0.2.1")));
    }

    #[test]
    fn views_change_with_what_they_show_only() {
        let mut inventory = cluster();

        assert!(!inventory.set_pod(&name("shop", "web-2"), pod(&["10.244.0.9"])));
        assert!(inventory.set_pod(&name("shop", "stray"), pod(&["10.7.0.9"])));
        assert!(!inventory.set_service(&name("shop", "web"), service(&["10.96.0.6"])));
        assert!(inventory.set_service(&name("shop", "db"), service(&[])));
        assert!(inventory.set_service(&name("shop", "db"), None));
        assert!(inventory.set_namespace(&"shop".into(), true));
        assert!(!inventory.set_namespace(&"shop".into(), true));
        assert!(
            !inventory
                .set_service_ranges(&"kubernetes".into(), vec!["10.96.0.0/16".parse().unwrap()])
        );
    }

    #[test]
    fn pods_outside_of_the_nodes_ranges_are_listed_and_many_of_them_widened() {
        let mut inventory = cluster();
        inventory.set_pod(&name("shop", "stray"), pod(&["10.7.0.9"]));
        let exact: Vec<IpNet> = ["10.7.0.9/32", "10.244.0.0/24"]
            .map(|range| range.parse().unwrap())
            .to_vec();
        assert_eq!(inventory.pod_ranges(), exact);

        for low in 0..=255 {
            for high in [2, 4, 6] {
                inventory.set_pod(
                    &name("many", &format!("{high}-{low}")),
                    pod(&[&format!("10.8.{high}.{low}")]),
                );
            }
        }
        assert_eq!(inventory.pod_ranges().len(), 5);

        for low in (0..=250).step_by(2) {
            for high in [2, 4, 6] {
                inventory.set_pod(&name("many", &format!("{high}-{low}")), None);
            }
        }
        let widened = inventory.pod_ranges();
        assert!(
            widened.contains(&"10.8.2.0/24".parse().unwrap()),
            "{widened:?}"
        );
        assert!(widened.len() < 10);
    }

    #[test]
    fn services_are_listed_by_namespace() {
        let mut inventory = cluster();
        inventory.set_service(&name("shop", "db"), service(&[]));
        inventory.set_service(&name("shopping", "cart"), service(&[]));
        inventory.set_service(&name("sho", "x"), service(&[]));

        assert_eq!(inventory.services_of(&"shop".into()), ["db", "web"]);
        assert!(inventory.services_of(&"none".into()).is_empty());
    }
}
