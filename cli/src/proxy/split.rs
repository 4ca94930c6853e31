//! Which connections go through the tunnel and which are dialled from here.
//!
//! Pure: it sees the manager's view of the cluster and the user's rules, and opens nothing. A name is the cluster's
//! only where something of that name exists there: a namespace `dev` must not capture all of `*.dev`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tp_manager_api::ClusterView;
use tp_tunnel::Host;

use super::rule::{Rule, is_below};

/// What the user asked for on the command line.
#[derive(Clone, Debug, Default)]
pub struct UserRules {
    /// `--all`: everything that is not excluded.
    pub all: bool,
    /// `--also-proxy`: to the cluster although it is not the cluster's.
    pub also_proxy: Vec<Rule>,
    /// `--never-proxy`: wins over everything else.
    pub never_proxy: Vec<Rule>,
}

/// Where a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Through the tunnel.
    Cluster,
    /// From this workstation.
    Direct,
    /// Nowhere, and why.
    Refused(&'static str),
}

/// The decision for every host, from one view of the cluster.
#[derive(Clone, Debug, Default)]
pub struct Split {
    view: ClusterView,
    services: BTreeMap<String, BTreeSet<String>>,
    /// Single labels that are not taken for Services, where all others are.
    any_label_but: Option<BTreeSet<String>>,
    rules: UserRules,
}

impl Split {
    /// Combines what the manager reports with what the user asked for.
    pub fn new(mut view: ClusterView, rules: UserRules) -> Self {
        let services = std::mem::take(&mut view.services)
            .into_iter()
            .map(|(namespace, names)| (namespace, names.into_iter().collect()))
            .collect();
        view.domain = normal(&view.domain);
        view.suffixes = view.suffixes.iter().map(|s| normal(s)).collect();
        Self {
            view,
            services,
            any_label_but: None,
            rules,
        }
    }

    /// Where nobody may say which Services there are, each single label is taken for one, but for those that are
    /// known to be the workstation's. Longer names are not: they would capture names of the Internet.
    pub fn with_any_label_but(mut self, own: BTreeSet<String>) -> Self {
        self.any_label_but = Some(own);
        self
    }

    /// The same cluster with more rules. Those of either side hold, and `--never-proxy` of either wins.
    pub fn with_rules(&self, more: &UserRules) -> Self {
        let mut split = self.clone();
        split.rules.all |= more.all;
        split.rules.also_proxy.extend_from_slice(&more.also_proxy);
        split.rules.never_proxy.extend_from_slice(&more.never_proxy);
        split
    }

    /// Where a connection to `host` goes.
    pub fn route(&self, host: &Host) -> Route {
        if is_loopback(host) {
            return Route::Refused("loopback is this machine itself and needs no proxy");
        }
        if self.rules.never_proxy.iter().any(|rule| rule.matches(host)) {
            return Route::Direct;
        }
        let cluster = self.everything()
            || self.rules.also_proxy.iter().any(|rule| rule.matches(host))
            || match host {
                Host::Name(name) => self.is_cluster_name(name),
                Host::Ip(address) => self.is_cluster_address(address.to_canonical()),
            };
        if cluster {
            Route::Cluster
        } else {
            Route::Direct
        }
    }

    /// Whether all that is not excluded goes to the cluster.
    pub(super) fn everything(&self) -> bool {
        self.rules.all || self.view.everything
    }

    /// The manager's view, but for the Services.
    pub fn view(&self) -> &ClusterView {
        &self.view
    }

    pub(super) fn any_label_but(&self) -> Option<&BTreeSet<String>> {
        self.any_label_but.as_ref()
    }

    pub(super) fn services(&self) -> &BTreeMap<String, BTreeSet<String>> {
        &self.services
    }

    pub(super) fn rules(&self) -> &UserRules {
        &self.rules
    }

    fn is_cluster_address(&self, address: IpAddr) -> bool {
        let view = &self.view;
        let mut ranges = view.service_ranges.iter().chain(&view.pod_ranges);
        ranges.any(|range| range.contains(&address))
    }

    fn is_cluster_name(&self, name: &str) -> bool {
        let under = |suffix: &str| name == suffix || is_below(name, suffix);
        if is_below(name, "svc") || under(&self.view.domain) {
            return true;
        }
        if self.view.suffixes.iter().any(|suffix| under(suffix)) {
            return true;
        }
        let own = self.view.namespace.as_str();
        let mut labels = name.split('.');
        match (labels.next(), labels.next(), labels.next(), labels.next()) {
            (Some(service), None, ..) => self.is_any_label(service) || self.exists(service, own),
            (Some(first), Some(second), None, _) => {
                self.exists(first, second) || (is_stateful_pod(first) && self.exists(second, own))
            }
            (Some(_), Some(service), Some(namespace), None) => self.exists(service, namespace),
            _ => false,
        }
    }

    fn is_any_label(&self, label: &str) -> bool {
        let but = self.any_label_but.as_ref();
        but.is_some_and(|own| !own.contains(label))
    }

    fn exists(&self, service: &str, namespace: &str) -> bool {
        let names = self.services.get(namespace);
        names.is_some_and(|names| names.contains(service))
    }
}

/// Pods of a StatefulSet end in `-<ordinal>`. Other first labels before a Service of the own namespace are not taken:
/// a Service called `dev` must not capture `*.dev` either.
fn is_stateful_pod(label: &str) -> bool {
    label.rsplit_once('-').is_some_and(|(set, ordinal)| {
        !set.is_empty() && !ordinal.is_empty() && ordinal.bytes().all(|b| b.is_ascii_digit())
    })
}

/// Loopback in every spelling that `Host` keeps apart from names (RFC 6761 §6.3 for `localhost`).
fn is_loopback(host: &Host) -> bool {
    match host {
        Host::Ip(address) => is_loopback_address(*address),
        Host::Name(name) => name == "localhost" || is_below(name, "localhost"),
    }
}

/// Loopback, or unspecified, which connects to loopback.
pub(super) fn is_loopback_address(address: IpAddr) -> bool {
    let address = address.to_canonical();
    address.is_loopback() || address.is_unspecified()
}

fn normal(suffix: &str) -> String {
    suffix.trim_matches('.').to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn view() -> ClusterView {
        ClusterView {
            namespace: "shop".into(),
            domain: "cluster.local".into(),
            service_ranges: vec![
                "10.96.0.0/16".parse().unwrap(),
                "fd10::/112".parse().unwrap(),
            ],
            pod_ranges: vec!["10.244.0.0/16".parse().unwrap()],
            namespaces: vec!["shop".into(), "dev".into()],
            services: [
                (
                    "shop".to_owned(),
                    vec!["web".to_owned(), "db".to_owned(), "io".to_owned()],
                ),
                ("dev".to_owned(), vec!["api".to_owned()]),
            ]
            .into(),
            suffixes: vec![".Corp.Internal".into()],
            ..ClusterView::default()
        }
    }

    fn rules(all: bool, also: &[&str], never: &[&str]) -> UserRules {
        let parse = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect();
        UserRules {
            all,
            also_proxy: parse(also),
            never_proxy: parse(never),
        }
    }

    fn route(split: &Split, host: &str) -> Route {
        split.route(&host.parse().unwrap())
    }

    #[test]
    fn while_services_are_unknown_single_labels_go_to_the_cluster_and_no_longer_names() {
        let own = ["laptop".to_owned()].into();
        let split = Split::new(view(), UserRules::default()).with_any_label_but(own);

        for name in ["web", "whatever", "web.shop", "whatever.svc"] {
            assert_eq!(route(&split, name), Route::Cluster, "{name}");
        }
        for name in ["whatever.shop", "pod-1.whatever", "example.com", "laptop"] {
            assert_eq!(route(&split, name), Route::Direct, "{name}");
        }
    }

    #[test]
    fn names_and_addresses_of_the_cluster_go_to_it_and_no_others() {
        let split = Split::new(view(), UserRules::default());
        let cluster = [
            "web",
            "WEB.",
            "web.shop",
            "api.dev",
            "api.dev.svc",
            "x.svc",
            "anything.at.all.svc",
            "web.shop.svc.cluster.local",
            "10-244-0-9.shop.pod.cluster.local",
            "cluster.local",
            "db-0.db.shop",
            "pod.web.shop",
            "db-0.db",
            "db-12.db",
            "git.corp.internal",
            "corp.internal",
            "10.96.0.1",
            "10.244.255.255",
            "::ffff:10.96.0.1",
            "fd10::5",
        ];
        let direct = [
            "api",
            "web.dev",
            "example.dev",
            "www.example.dev",
            "web.other",
            "svc",
            "shop",
            "dev",
            "foo.io",
            "web.io",
            "db-x.db",
            "a.b.web.shop",
            "mysvc",
            "xcluster.local",
            "cluster.local.example",
            "example.com",
            "10.97.0.1",
            "192.168.1.1",
            "fd11::5",
            "169.254.169.254",
        ];
        for host in cluster {
            assert_eq!(route(&split, host), Route::Cluster, "{host}");
        }
        for host in direct {
            assert_eq!(route(&split, host), Route::Direct, "{host}");
        }
    }

    #[test]
    fn never_wins_and_also_adds() {
        let also = ["*.db.example", "203.0.113.0/24", "one.example"];
        let never = ["web.shop", "10.96.7.0/24", "*.eu.db.example"];
        let split = Split::new(view(), rules(false, &also, &never));
        let table = [
            ("x.db.example", Route::Cluster),
            ("db.example", Route::Direct),
            ("one.example", Route::Cluster),
            ("x.one.example", Route::Direct),
            ("203.0.113.9", Route::Cluster),
            ("x.eu.db.example", Route::Direct),
            ("web.shop", Route::Direct),
            ("web", Route::Cluster),
            ("10.96.7.7", Route::Direct),
            ("::ffff:10.96.7.7", Route::Direct),
        ];
        for (host, expected) in table {
            assert_eq!(route(&split, host), expected, "{host}");
        }
    }

    #[test]
    fn all_sends_everything_but_what_is_excluded() {
        let everything = ClusterView {
            everything: true,
            ..ClusterView::default()
        };
        for split in [
            Split::new(view(), rules(true, &[], &["*.lan"])),
            Split::new(everything, rules(false, &[], &["*.lan"])),
        ] {
            assert_eq!(route(&split, "example.com"), Route::Cluster);
            assert_eq!(route(&split, "8.8.8.8"), Route::Cluster);
            assert_eq!(route(&split, "printer.lan"), Route::Direct);
        }
    }

    #[test]
    fn loopback_is_refused_in_every_spelling_and_whatever_the_rules() {
        let split = Split::new(view(), rules(true, &["127.0.0.0/8", "localhost"], &[]));
        for host in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "::ffff:127.0.0.1",
            "0.0.0.0",
            "::",
            "localhost",
            "LOCALHOST.",
            "app.localhost",
        ] {
            assert!(matches!(route(&split, host), Route::Refused(_)), "{host}");
        }
    }

    #[test]
    fn without_a_cluster_domain_nothing_is_captured_by_it() {
        let split = Split::new(ClusterView::default(), UserRules::default());
        for host in ["example.com", "a", "10.0.0.1"] {
            assert_eq!(route(&split, host), Route::Direct, "{host}");
        }
    }

    fn label() -> impl Strategy<Value = String> {
        proptest::sample::select(vec![
            "web", "db", "dev", "shop", "svc", "io", "a-0", "local",
        ])
        .prop_map(str::to_owned)
    }

    proptest! {
        #[test]
        fn what_is_the_clusters_stays_so_when_the_cluster_grows(
            labels in proptest::collection::vec(label(), 1..5),
            namespace in label(),
            service in label(),
        ) {
            let host = Host::Name(labels.join("."));
            let before = Split::new(view(), UserRules::default()).route(&host);
            let mut grown = view();
            grown.services.entry(namespace).or_default().push(service);
            let after = Split::new(grown, UserRules::default()).route(&host);
            prop_assert!(before != Route::Cluster || after == Route::Cluster, "{host:?}: {before:?}, {after:?}");
        }

        #[test]
        fn any_name_has_a_route(name in "\\PC{0,80}", address in any::<[u8; 16]>()) {
            let split = Split::new(view(), UserRules::default());
            split.route(&Host::Name(name));
            split.route(&Host::Ip(IpAddr::from(address)));
        }
    }
}
