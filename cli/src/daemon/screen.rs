//! How much of the manager's view a workstation follows.
//!
//! The view says which addresses and names go through the tunnel, and it comes from a cluster that may be somebody
//! else's by now. So it takes nothing that cannot be a cluster's, nothing of the Internet and nothing of the networks
//! that this machine is on, unless the user named it; and what it asks for later than at the start is said or waits for
//! the next `tp connect`. Pure: it reads no route table, and decides nothing about single connections.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use ipnet::IpNet;
use tp_manager_api::ClusterView;
use tp_tunnel::Host;

use super::overlap::Workstation;
use crate::proxy::rule::Rule;
use crate::proxy::split::UserRules;

/// Whose view it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A cluster's, which somebody else may govern.
    Cluster,
    /// A manager that the user named by address and key: it may serve any network, all of the Internet too.
    Pinned,
}

/// The screen of one connection. It remembers what the connection began with.
#[derive(Debug)]
pub struct Screen {
    source: Source,
    rules: UserRules,
    begun: OnceLock<Begun>,
}

/// What is left of a view, and what to tell the user of the rest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Screened {
    /// To be followed.
    pub view: ClusterView,
    /// One line each, with the flag that makes a difference.
    pub notes: Vec<String>,
}

/// What the first view of a connection took.
#[derive(Debug)]
struct Begun {
    domain: String,
    suffixes: Vec<String>,
    ranges: Vec<IpNet>,
}

impl Screen {
    /// For a connection with these rules, which are the user's consent.
    pub fn new(source: Source, rules: UserRules) -> Self {
        Self {
            source,
            rules,
            begun: OnceLock::new(),
        }
    }

    /// What the user wants to go where.
    pub fn rules(&self) -> &UserRules {
        &self.rules
    }

    /// What of `view` to follow on this workstation.
    pub fn pass(&self, mut view: ClusterView, workstation: &Workstation) -> Screened {
        let mut notes = BTreeSet::new();
        if view.everything && self.source == Source::Cluster {
            view.everything = false;
            notes.insert(
                "the manager asks for all connections, and gets the cluster's; `--all` sends them"
                    .to_owned(),
            );
        }
        for ranges in [&mut view.service_ranges, &mut view.pod_ranges] {
            let claimed = std::mem::take(ranges);
            for range in claimed {
                if self.may_be_taken(range, &mut notes) {
                    ranges.extend(self.left_by(workstation, range, &mut notes));
                }
            }
        }
        view.domain = normal(&view.domain);
        if !view.domain.is_empty() && !self.may_be_a_suffix(&view.domain, &mut notes) {
            view.domain.clear();
        }
        view.suffixes = view.suffixes.iter().map(|suffix| normal(suffix)).collect();
        view.suffixes
            .retain(|suffix| self.may_be_a_suffix(suffix, &mut notes));
        self.say_shadowed_domains(&view, &mut notes);
        self.settle(&mut view, &mut notes);
        Screened {
            view,
            notes: notes.into_iter().collect(),
        }
    }

    fn may_be_taken(&self, range: IpNet, notes: &mut BTreeSet<String>) -> bool {
        if overlaps_any(range, &NEVER) {
            notes.insert(format!(
                "the manager asks for {range}, which is no cluster's: left out"
            ));
            return false;
        }
        let private = PRIVATE
            .iter()
            .any(|private| parse(private).contains(&range));
        if private || self.source == Source::Pinned {
            return true;
        }
        if self.is_silent(range) {
            return false;
        }
        notes.insert(format!(
            "the cluster's {range} is not a private range and is left out; reach it with `--also-proxy {range}`"
        ));
        false
    }

    /// What the workstation's own networks leave of a range.
    fn left_by(
        &self,
        workstation: &Workstation,
        range: IpNet,
        notes: &mut BTreeSet<String>,
    ) -> Vec<IpNet> {
        let mut left = vec![range];
        for own in workstation.keeps(range) {
            let kept = narrower(range, own.range);
            left = left
                .into_iter()
                .flat_map(|part| without(part, kept))
                .collect();
            if !self.is_silent(kept) {
                notes.insert(format!(
                    "the cluster's {range} overlaps {} on {}, which stays this machine's; reach the cluster there with `--also-proxy {kept}`",
                    own.range, own.device
                ));
            }
        }
        left
    }

    fn may_be_a_suffix(&self, suffix: &str, notes: &mut BTreeSet<String>) -> bool {
        if suffix
            .parse::<Host>()
            .is_ok_and(|host| host == Host::Name(suffix.to_owned()))
            && !is_or_below(suffix, "localhost")
        {
            if !is_public_suffix(suffix) || self.has_consent_below(suffix) {
                return true;
            }
            notes.insert(format!(
                "the manager asks for all names below {suffix}, which many own: left out; send them with `--also-proxy '*.{suffix}'`"
            ));
            return false;
        }
        notes.insert(format!(
            "the manager asks for all names below {suffix:?}, which is no cluster's: left out"
        ));
        false
    }

    /// A Service `api` of a namespace `dev` is called `api.dev`, and so is a site of the Internet.
    fn say_shadowed_domains(&self, view: &ClusterView, notes: &mut BTreeSet<String>) {
        let shadowing = view.services.iter().filter(|(namespace, services)| {
            !services.is_empty()
                && **namespace != view.namespace
                && is_top_level_domain(namespace)
                && !names_everything_below(&self.rules.never_proxy, namespace)
                && !self.has_consent_below(namespace)
        });
        for (namespace, services) in shadowing {
            notes.insert(format!(
                "{}.{namespace} is a Service here, although .{namespace} is a domain of the Internet; keep such names with `--never-proxy '*.{namespace}'`",
                services[0]
            ));
        }
    }

    /// Names are settled when a connection begins. Ranges grow with the cluster's nodes, so that is only said.
    fn settle(&self, view: &mut ClusterView, notes: &mut BTreeSet<String>) {
        let ranges = || view.service_ranges.iter().chain(&view.pod_ranges).copied();
        let begun = self.begun.get_or_init(|| Begun {
            domain: view.domain.clone(),
            suffixes: view.suffixes.clone(),
            ranges: ranges().collect(),
        });
        let known = |range: &IpNet| begun.ranges.iter().any(|known| known.contains(range));
        for range in ranges().filter(|range| !is_single(*range) && !known(range)) {
            notes.insert(format!(
                "{range} has become the cluster's since the connection began; keep it with `--never-proxy {range}`"
            ));
        }
        let later = |suffix: &String| {
            let new = !begun.suffixes.contains(suffix);
            new.then(|| format!("the manager asks for names below {suffix} as well, which counts from the next `tp connect` on"))
        };
        notes.extend(view.suffixes.iter().filter_map(later));
        view.suffixes
            .retain(|suffix| begun.suffixes.contains(suffix));
        if view.domain != begun.domain {
            notes.insert(format!(
                "the cluster's domain is {:?} by now, which counts from the next `tp connect` on",
                view.domain
            ));
            view.domain.clone_from(&begun.domain);
        }
    }

    /// Nothing is said of single addresses, which were met in the cluster, or of what the user has decided.
    fn is_silent(&self, range: IpNet) -> bool {
        let decided = |rules: &[Rule]| {
            let ends = [range.network(), range.broadcast()].map(Host::Ip);
            rules
                .iter()
                .any(|rule| ends.iter().all(|end| rule.matches(end)))
        };
        is_single(range) || decided(&self.rules.also_proxy) || decided(&self.rules.never_proxy)
    }

    fn has_consent_below(&self, suffix: &str) -> bool {
        names_everything_below(&self.rules.also_proxy, suffix)
    }
}

/// Ranges that hold no address of a cluster: this host and network, loopback, link-local, multicast and reserved ones,
/// and the forms of IPv6 that are another address in disguise (RFC 6890, 4291, 6052, 3056, 4380).
const NEVER: [&str; 12] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "255.255.255.255/32",
    "::/96",
    "::ffff:0:0/96",
    "64:ff9b::/96",
    "2001::/32",
    "2002::/16",
    "fe80::/10",
    "ff00::/8",
];

/// Where clusters have their addresses without taking anybody's: RFC 1918, 6598, 2544 and 4193, and class E, which GKE
/// gives to pods.
const PRIVATE: [&str; 7] = [
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "240.0.0.0/4",
    "fc00::/7",
];

fn parse(range: &str) -> IpNet {
    range.parse().expect("the constants above are ranges")
}

fn overlaps_any(range: IpNet, others: &[&str]) -> bool {
    others
        .iter()
        .map(|other| parse(other))
        .any(|other| other.contains(&range) || range.contains(&other))
}

fn is_single(range: IpNet) -> bool {
    range.prefix_len() == range.max_prefix_len()
}

/// What two overlapping ranges share: one holds the other.
fn narrower(a: IpNet, b: IpNet) -> IpNet {
    if a.prefix_len() >= b.prefix_len() {
        a.trunc()
    } else {
        b.trunc()
    }
}

/// `range` less `hole`, in ranges: each halving sets one half aside, so there are at most as many as bits between them.
fn without(range: IpNet, hole: IpNet) -> Vec<IpNet> {
    if hole.contains(&range) {
        return Vec::new();
    }
    if !range.contains(&hole) {
        return vec![range];
    }
    let halves = range.subnets(range.prefix_len() + 1);
    let halves = halves.expect("it holds a longer prefix, so it can be halved");
    halves.flat_map(|half| without(half, hole)).collect()
}

fn normal(suffix: &str) -> String {
    suffix.trim_matches('.').to_ascii_lowercase()
}

fn is_or_below(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Below which names belong to different people: `com`, `co.uk`, `github.io`, and every single label.
fn is_public_suffix(name: &str) -> bool {
    !name.contains('.')
        || psl::suffix(name.as_bytes())
            .is_some_and(|suffix| suffix.is_known() && suffix == name.as_bytes())
}

fn is_top_level_domain(label: &str) -> bool {
    psl::suffix(label.as_bytes()).is_some_and(|suffix| suffix.is_known())
}

fn names_everything_below(rules: &[Rule], suffix: &str) -> bool {
    let any = Host::Name(format!("any.{suffix}"));
    rules
        .iter()
        .any(|rule| matches!(rule, Rule::Below(_)) && rule.matches(&any))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules(also: &[&str], never: &[&str]) -> UserRules {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        UserRules {
            all: false,
            also_proxy: parse(also),
            never_proxy: parse(never),
        }
    }

    fn ranges(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn with_ranges(texts: &[&str]) -> ClusterView {
        ClusterView {
            pod_ranges: ranges(texts),
            ..ClusterView::default()
        }
    }

    fn with_suffix(suffix: &str) -> ClusterView {
        ClusterView {
            suffixes: vec![suffix.to_owned()],
            ..ClusterView::default()
        }
    }

    /// A LAN, a VPN for all of 10/8 and one for a part of it.
    fn workstation() -> Workstation {
        Workstation::on(&[
            ("192.168.2.0/24", "eth0", true),
            ("10.0.0.0/8", "tun0", false),
            ("10.96.5.0/24", "tun1", false),
        ])
    }

    fn pass(source: Source, rules: UserRules, view: ClusterView) -> Screened {
        Screen::new(source, rules).pass(view, &workstation())
    }

    #[test]
    fn ranges_of_a_cluster_are_taken_and_others_are_not() {
        let both = [Source::Cluster, Source::Pinned];
        let table: [(&str, &[Source]); 22] = [
            ("10.244.0.0/16", &both),
            ("10.0.0.0/8", &[]),
            ("100.64.0.0/10", &both),
            ("172.16.0.0/12", &both),
            ("192.168.0.0/24", &both),
            ("240.0.0.0/8", &both),
            ("fd10::/112", &both),
            ("8.8.8.0/24", &[Source::Pinned]),
            ("8.8.8.8/32", &[Source::Pinned]),
            ("2606:4700::/32", &[Source::Pinned]),
            ("172.0.0.0/8", &[Source::Pinned]),
            ("0.0.0.0/0", &[]),
            ("0.0.0.0/1", &[]),
            ("::/0", &[]),
            ("127.0.0.0/8", &[]),
            ("127.0.0.53/32", &[]),
            ("169.254.169.254/32", &[]),
            ("224.0.0.0/8", &[]),
            ("::1/128", &[]),
            ("::ffff:10.0.0.0/104", &[]),
            ("fe80::/64", &[]),
            ("64:ff9b::a00:1/128", &[]),
        ];
        for (range, taken_from) in table {
            for source in both {
                let screened = pass(source, UserRules::default(), with_ranges(&[range]));
                let whole = screened.view.pod_ranges == ranges(&[range]);
                let expected = taken_from.contains(&source);
                // 10.0.0.0/8 is the workstation's as a whole.
                assert_eq!(whole, expected, "{range} of {source:?}: {screened:?}");
                let single = range.ends_with("/32") || range.ends_with("/128");
                assert!(
                    whole || single || !screened.notes.is_empty(),
                    "{range}: nothing was said"
                );
            }
        }
    }

    #[test]
    fn own_networks_stay_but_for_a_wider_route_elsewhere() {
        for (claimed, left, said) in [
            // Inside the VPN's 10/8, which is wider: the cluster's, and said as an overlap.
            ("10.244.0.0/16", vec!["10.244.0.0/16"], None),
            // The whole LAN, a part of it, and more than it.
            (
                "192.168.2.0/24",
                vec![],
                Some("--also-proxy 192.168.2.0/24"),
            ),
            (
                "192.168.2.128/25",
                vec![],
                Some("--also-proxy 192.168.2.128/25"),
            ),
            (
                "192.168.0.0/22",
                vec!["192.168.0.0/23", "192.168.3.0/24"],
                Some("192.168.2.0/24 on eth0, which stays"),
            ),
            // The narrower VPN inside of the cluster's range.
            (
                "10.96.4.0/23",
                vec!["10.96.4.0/24"],
                Some("--also-proxy 10.96.5.0/24"),
            ),
            // An address that was met in the cluster and is on the LAN as well.
            ("192.168.2.7/32", vec![], None),
        ] {
            let screened = pass(
                Source::Cluster,
                UserRules::default(),
                with_ranges(&[claimed]),
            );

            assert_eq!(screened.view.pod_ranges, ranges(&left), "{claimed}");
            match said {
                Some(said) => assert!(screened.notes[0].contains(said), "{:?}", screened.notes),
                None => assert_eq!(screened.notes, [""; 0], "{claimed}"),
            }
        }
    }

    #[test]
    fn what_the_user_decided_is_not_said_again() {
        let claimed = ["192.168.2.0/24", "8.8.8.0/24"];
        for rules in [rules(&claimed, &[]), rules(&[], &claimed)] {
            let screened = pass(Source::Cluster, rules, with_ranges(&claimed));

            assert_eq!(screened.notes, [""; 0]);
        }
    }

    #[test]
    fn suffixes_that_many_own_need_consent() {
        for (suffix, taken) in [
            ("cluster.local", true),
            (".K8s.Corp.Example.", true),
            ("github.com", true),
            ("com", false),
            ("dev", false),
            ("k8s", false),
            ("co.uk", false),
            ("github.io", false),
            ("", false),
            (".", false),
            ("localhost", false),
            ("app.localhost", false),
            ("a b", false),
            ("10.0.0.1", false),
        ] {
            let screened = pass(Source::Pinned, UserRules::default(), with_suffix(suffix));
            assert_eq!(screened.view.suffixes.len(), usize::from(taken), "{suffix}");
            assert_eq!(screened.notes.is_empty(), taken, "{suffix}");

            let domain = ClusterView {
                domain: suffix.to_owned(),
                ..ClusterView::default()
            };
            let screened = pass(Source::Cluster, UserRules::default(), domain);
            assert_eq!(!screened.view.domain.is_empty(), taken, "{suffix}");
        }
        let agreed = pass(
            Source::Cluster,
            rules(&["*.co.uk"], &[]),
            with_suffix("co.uk"),
        );
        assert_eq!(agreed.view.suffixes, ["co.uk"]);
    }

    #[test]
    fn only_a_manager_the_user_named_may_ask_for_everything() {
        let view = || ClusterView {
            everything: true,
            ..ClusterView::default()
        };
        let cluster = pass(Source::Cluster, UserRules::default(), view());
        let pinned = pass(Source::Pinned, UserRules::default(), view());

        assert!(!cluster.view.everything && cluster.notes[0].contains("`--all`"));
        assert!(pinned.view.everything && pinned.notes.is_empty());
    }

    #[test]
    fn a_namespace_that_is_also_a_top_level_domain_is_said() {
        let view = |namespace: &str| ClusterView {
            namespace: "shop".into(),
            services: [(namespace.to_owned(), vec!["github".to_owned()])].into(),
            ..ClusterView::default()
        };
        let notes = |rules, namespace| pass(Source::Cluster, rules, view(namespace)).notes;

        assert!(notes(UserRules::default(), "com")[0].contains("--never-proxy '*.com'"));
        assert_eq!(notes(rules(&[], &["*.com"]), "com"), [""; 0]);
        assert_eq!(notes(UserRules::default(), "team-a"), [""; 0]);
        assert_eq!(notes(UserRules::default(), "shop"), [""; 0]);
    }

    #[test]
    fn later_names_wait_for_the_next_connect_and_later_ranges_are_said() {
        let screen = Screen::new(Source::Cluster, UserRules::default());
        let mut view = with_ranges(&["10.244.0.0/16"]);
        view.domain = "cluster.local".into();
        assert_eq!(screen.pass(view.clone(), &workstation()).notes, [""; 0]);

        view.pod_ranges = ranges(&["10.244.3.0/24", "10.245.0.0/16", "10.246.0.1/32"]);
        view.suffixes = vec!["bank.example".into()];
        view.domain = "bank.example".into();
        let later = screen.pass(view, &workstation());

        assert_eq!(later.view.pod_ranges.len(), 3);
        assert_eq!(later.view.suffixes, [""; 0]);
        assert_eq!(later.view.domain, "cluster.local");
        assert_eq!(later.notes.len(), 3, "{:?}", later.notes);
        assert!(
            later
                .notes
                .iter()
                .any(|note| note.contains("--never-proxy 10.245.0.0/16"))
        );
    }

    proptest! {
        #[test]
        fn a_hole_is_all_that_a_range_loses(
            network: u32, length in 0_u8..=32, hole: u32, hole_length in 0_u8..=32, probe: u32,
        ) {
            let net = |bits: u32, length| IpNet::new(std::net::Ipv4Addr::from(bits).into(), length).unwrap().trunc();
            let (range, hole) = (net(network, length), net(hole, hole_length));
            // Near the edges, where a mistake would be.
            for bits in [probe, network, network ^ probe >> length.min(31)] {
                let address = IpNet::from(std::net::IpAddr::from(std::net::Ipv4Addr::from(bits)));
                let left = without(range, hole);
                let expected = range.contains(&address) && !hole.contains(&address);
                prop_assert_eq!(left.iter().any(|part| part.contains(&address)), expected);
                prop_assert!(left.len() <= 32);
            }
        }
    }
}
