//! Where the cluster's ranges and names collide with the workstation's own.
//!
//! The narrower range wins, as in the kernel's own routing, and a network that this machine is on is never the
//! cluster's. What then goes to the cluster is said here, with the flag that says otherwise; what stays, by
//! [`super::screen`]. Reads the kernel's route tables and `/etc/hosts`; changes nothing.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use tp_manager_api::ClusterView;
use tp_tunnel::Host;

use crate::proxy::split::{Route as Decision, Split};

/// What this machine reaches by itself.
#[derive(Clone, Debug, Default)]
pub struct Workstation {
    routes: Vec<Route>,
    names: BTreeSet<String>,
}

/// A network that the kernel has a route to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Its addresses.
    pub range: IpNet,
    /// Where packets to it leave.
    pub device: String,
    /// Whether this machine is on that network, and not only led to it by a gateway or a tunnel.
    attached: bool,
}

impl Workstation {
    /// What the kernel and `/etc/hosts` say now. What cannot be read counts as empty.
    pub fn read() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let mut routes = routes_v4(&read("/proc/net/route"));
        routes.extend(routes_v6(&read("/proc/net/ipv6_route")));
        for route in &mut routes {
            let flags = read(&format!("/sys/class/net/{}/flags", route.device));
            route.attached &= !is_point_to_point(&flags);
        }
        let mut names = hosts_names(&read("/etc/hosts"));
        names.extend(
            read("/proc/sys/kernel/hostname")
                .split_whitespace()
                .map(str::to_lowercase),
        );
        Self { routes, names }
    }

    /// Networks of which nothing goes to a cluster that claims `range`: those that lie within it, and those that this
    /// machine is on.
    pub fn keeps(&self, range: IpNet) -> impl Iterator<Item = &Route> {
        self.routes.iter().filter(move |route| {
            range.contains(&route.range) || (route.attached && route.range.contains(&range))
        })
    }

    /// Names of its hosts file, in lower case.
    pub fn names(&self) -> &BTreeSet<String> {
        &self.names
    }

    /// One line for each collision that `split` would decide in favour of the cluster.
    pub fn overlaps(&self, view: &ClusterView, split: &Split) -> Vec<String> {
        let ranges = view.service_ranges.iter().chain(&view.pod_ranges);
        // A single address was met in the cluster; it hides nothing of what surrounds it here.
        let ranges = ranges.filter(|range| range.prefix_len() < range.max_prefix_len());
        let mut lines: BTreeSet<String> = ranges
            .flat_map(|range| self.overlaps_of(*range, split))
            .collect();
        lines.extend(self.names.iter().filter(|name| is_clusters(split, name)).map(|name| {
            format!("the name {name} of this machine is also the cluster's and goes there; keep it with `--never-proxy {name}`")
        }));
        lines.into_iter().collect()
    }

    fn overlaps_of(&self, range: IpNet, split: &Split) -> impl Iterator<Item = String> {
        self.routes
            .iter()
            .filter(move |route| overlap(range, route.range))
            .filter(move |route| split.route(&Host::Ip(narrower(range, route.range).network())) == Decision::Cluster)
            .map(move |route| {
                let kept = narrower(range, route.range);
                format!(
                    "the cluster's {range} overlaps {} on {}: addresses in both go to the cluster; keep them with `--never-proxy {kept}`",
                    route.range, route.device,
                )
            })
    }
}

/// `/sys/class/net/<device>/flags`: IFF_POINTOPOINT of netdevice(7), in hexadecimal. True of tunnels, whose routes lead
/// through them and not to their own network.
fn is_point_to_point(flags: &str) -> bool {
    let flags = flags.trim().trim_start_matches("0x");
    u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & 0x10 != 0)
}

/// RTF_GATEWAY of route(8): there is a router between.
const GATEWAY: u32 = 0x2;

fn is_clusters(split: &Split, name: &str) -> bool {
    name.parse()
        .is_ok_and(|host: Host| split.route(&host) == Decision::Cluster)
}

fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// What two overlapping ranges share: one holds the other.
fn narrower(a: IpNet, b: IpNet) -> IpNet {
    if a.prefix_len() >= b.prefix_len() {
        a.trunc()
    } else {
        b.trunc()
    }
}

/// `/proc/net/route`: interface, destination, gateway, flags, …, mask (8th); numbers as the host's memory holds them.
fn routes_v4(table: &str) -> Vec<Route> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let word = |index: usize| u32::from_str_radix(fields.get(index)?, 16).ok();
        let address = Ipv4Addr::from(word(1)?.to_ne_bytes());
        let prefix = Ipv4Addr::from(word(7)?.to_ne_bytes())
            .to_bits()
            .leading_ones();
        let attached = word(3)? & GATEWAY == 0;
        let prefix = u8::try_from(prefix).ok()?;
        route(fields.first()?, address.into(), prefix, attached)
    };
    table.lines().skip(1).filter_map(parse).collect()
}

/// `/proc/net/ipv6_route`: destination, prefix length, …, flags (9th), interface (10th), in hexadecimal.
fn routes_v6(table: &str) -> Vec<Route> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let digits = fields.first().filter(|digits| digits.len() == 32)?;
        let address = Ipv6Addr::from(u128::from_str_radix(digits, 16).ok()?);
        let prefix = u8::from_str_radix(fields.get(1)?, 16).ok()?;
        let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
        route(fields.get(9)?, address.into(), prefix, flags & GATEWAY == 0)
    };
    table.lines().filter_map(parse).collect()
}

/// Default routes, loopback, link-local and multicast collide with nothing that a cluster owns.
fn route(device: &str, address: IpAddr, prefix: u8, attached: bool) -> Option<Route> {
    let special = match address {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_multicast(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_multicast(),
    };
    if special || prefix == 0 || device == "lo" {
        return None;
    }
    let range = IpNet::new(address, prefix).ok()?.trunc();
    Some(Route {
        range,
        device: device.to_owned(),
        attached,
    })
}

fn hosts_names(hosts: &str) -> BTreeSet<String> {
    let line = |line: &str| {
        let text = line.split('#').next().unwrap_or_default();
        text.split_whitespace()
            .skip(1)
            .map(str::to_lowercase)
            .collect::<Vec<_>>()
    };
    hosts
        .lines()
        .flat_map(line)
        .filter(|name| name != "localhost")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::split::UserRules;

    const ROUTES: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        tun0\t0000000A\t0102A8C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0\n";

    fn view() -> ClusterView {
        ClusterView {
            namespace: "shop".into(),
            service_ranges: vec!["10.96.0.0/12".parse().unwrap()],
            pod_ranges: vec!["10.244.0.0/16".parse().unwrap()],
            services: [("shop".to_owned(), vec!["db".to_owned()])].into(),
            ..ClusterView::default()
        }
    }

    impl Workstation {
        /// With these routes: range, device, and whether it is attached.
        pub(in crate::daemon) fn on(routes: &[(&str, &str, bool)]) -> Self {
            let route = |(range, device, attached): &(&str, &str, bool)| Route {
                range: range.parse().unwrap(),
                device: (*device).to_owned(),
                attached: *attached,
            };
            Self {
                routes: routes.iter().map(route).collect(),
                names: BTreeSet::new(),
            }
        }
    }

    fn workstation(routes: &str, hosts: &str) -> Workstation {
        Workstation {
            routes: routes_v4(routes),
            names: hosts_names(hosts),
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_vpns_wider_route_is_named_with_its_cure() {
        let split = Split::new(view(), UserRules::default());

        let lines = workstation(ROUTES, "").overlaps(&view(), &split);

        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines[1].contains("10.96.0.0/12 overlaps 10.0.0.0/8 on tun0"),
            "{lines:?}"
        );
        assert!(
            lines[1].ends_with("`--never-proxy 10.96.0.0/12`"),
            "{lines:?}"
        );
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn the_flag_silences_the_warning() {
        let rules = UserRules {
            never_proxy: vec!["10.0.0.0/8".parse().unwrap()],
            ..UserRules::default()
        };
        let split = Split::new(view(), rules);

        assert!(workstation(ROUTES, "").overlaps(&view(), &split).is_empty());
    }

    #[test]
    fn a_name_in_the_hosts_file_that_is_also_a_service_is_said() {
        let split = Split::new(view(), UserRules::default());

        let lines = workstation("", "127.0.0.1 localhost\n10.1.1.1 DB other # web\n")
            .overlaps(&view(), &split);

        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("`--never-proxy db`"), "{lines:?}");
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn networks_behind_a_gateway_or_a_tunnel_are_not_the_machines_own() {
        let attached: Vec<bool> = routes_v4(ROUTES)
            .iter()
            .map(|route| route.attached)
            .collect();

        assert_eq!(attached, [true, false]);
        assert!(is_point_to_point("0x1091\n"));
        assert!(!is_point_to_point("0x1003\n") && !is_point_to_point(""));
    }

    #[test]
    fn ipv6_routes_are_read() {
        let table = "fd100000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n\
            fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n\
            00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n";

        let expected = Route {
            range: "fd10::/64".parse().unwrap(),
            device: "eth0".into(),
            attached: true,
        };
        assert_eq!(routes_v6(table), [expected]);
    }

    #[test]
    fn broken_tables_are_empty() {
        for table in ["", "x", "a b c d e f g h i j", "h\neth0 zz 0 0 0 0 0 zz"] {
            assert!(routes_v4(table).is_empty());
            assert!(routes_v6(table).is_empty());
        }
    }
}
