//! Addresses that are nobody's destination.
//!
//! A manager that dials for others must not become a way to the node, to the cloud's metadata or back into itself. The
//! check is on the address that will be dialled, after resolving, and looks inside every form that carries an IPv4
//! address in an IPv6 one. Pure: what lies around the manager is asked of [`Surroundings`].

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What this manager knows of its neighbourhood.
pub trait Surroundings: Send + Sync {
    /// The nameservers this pod is configured with: allowed on port 53 wherever they are (NodeLocal DNS is link-local).
    fn is_nameserver(&self, address: IpAddr) -> bool;

    /// An address of a node, or one that may be: kubelet and etcd are refused there.
    fn is_node(&self, address: IpAddr) -> bool;

    /// The manager itself, its other replicas and its Service.
    fn is_manager(&self, address: IpAddr, port: u16) -> bool;
}

/// Why an address is never dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 127.0.0.0/8, `::1`.
    Loopback,
    /// 0.0.0.0/8, `::`.
    Unspecified,
    /// Multicast or broadcast.
    Multicast,
    /// 169.254.0.0/16, fe80::/10.
    LinkLocal,
    /// A cloud's metadata service.
    Metadata,
    /// The manager.
    Manager,
    /// Kubelet or kube-proxy on a node.
    Kubelet,
    /// etcd on a node.
    Etcd,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "a loopback address, which is never a destination",
            Self::Unspecified => "an unspecified address, which is never a destination",
            Self::Multicast => "a multicast or broadcast address, which is never a destination",
            Self::LinkLocal => "a link-local address, which is never a destination",
            Self::Metadata => "a cloud metadata service, which is never a destination",
            Self::Manager => "the manager itself, which is never a destination",
            Self::Kubelet => "a node, whose kubelet ports are never a destination",
            Self::Etcd => "a node, whose etcd ports are never a destination",
        })
    }
}

/// The address to dial, in canonical form, unless it is refused.
pub fn check(address: IpAddr, port: u16, around: &dyn Surroundings) -> Result<IpAddr, Refusal> {
    let address = address.to_canonical();
    if port == DNS && around.is_nameserver(address) {
        return Ok(address);
    }
    let inside = match address {
        IpAddr::V4(_) => Vec::new(),
        IpAddr::V6(v6) => embedded(v6),
    };
    let forms = std::iter::once(address).chain(inside.into_iter().map(IpAddr::V4));
    match forms.filter_map(|form| refusal(form, port, around)).next() {
        Some(refusal) => Err(refusal),
        None => Ok(address),
    }
}

const DNS: u16 = 53;

fn refusal(address: IpAddr, port: u16, around: &dyn Surroundings) -> Option<Refusal> {
    let always = match address {
        IpAddr::V4(v4) => always_v4(v4),
        IpAddr::V6(v6) => always_v6(v6),
    };
    always
        .or_else(|| around.is_manager(address, port).then_some(Refusal::Manager))
        .or_else(|| {
            let node_only = node_port(port)?;
            around.is_node(address).then_some(node_only)
        })
}

fn always_v4(address: Ipv4Addr) -> Option<Refusal> {
    match address.octets() {
        [127, ..] => Some(Refusal::Loopback),
        [0, ..] => Some(Refusal::Unspecified),
        [224..=239, ..] | [255, 255, 255, 255] => Some(Refusal::Multicast),
        [169, 254, ..] => Some(Refusal::LinkLocal),
        [100, 100, 100, 200] | [168, 63, 129, 16] => Some(Refusal::Metadata),
        _ => None,
    }
}

fn always_v6(address: Ipv6Addr) -> Option<Refusal> {
    let segments = address.segments();
    match segments {
        [0, 0, 0, 0, 0, 0, 0, 1] => Some(Refusal::Loopback),
        [0, 0, 0, 0, 0, 0, 0, 0] => Some(Refusal::Unspecified),
        [0xff00..=0xffff, ..] => Some(Refusal::Multicast),
        [0xfe80..=0xfebf, ..] => Some(Refusal::LinkLocal),
        [0xfd00, 0x0ec2, ..] | [0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x0254] => Some(Refusal::Metadata),
        _ => None,
    }
}

/// Ports that kubelet, kube-proxy, scheduler and controller manager (10248-10259) and etcd open on nodes.
fn node_port(port: u16) -> Option<Refusal> {
    match port {
        10248..=10250 | 10255..=10259 => Some(Refusal::Kubelet),
        2379..=2380 => Some(Refusal::Etcd),
        _ => None,
    }
}

/// Every IPv4 address that a translator or tunnel on the way may read out of this one. 0.0.0.0/8 is not reported: there it
/// means that this was not the place to read.
fn embedded(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let mut places = places(address);
    places.retain(|v4| v4.octets()[0] != 0);
    places
}

fn places(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let b = address.octets();
    let v4 = |a: usize| Ipv4Addr::new(b[a], b[a + 1], b[a + 2], b[a + 3]);
    match address.segments() {
        // IPv4-compatible (deprecated) and IPv4-translated (RFC 2765). `::` and `::1` are judged as they are.
        [0, 0, 0, 0, 0, 0, high, _] if high != 0 => vec![v4(12)],
        [0, 0, 0, 0, 0xffff, 0, _, _] => vec![v4(12)],
        // NAT64, well-known prefix (RFC 6052).
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => vec![v4(12)],
        // NAT64, local use (RFC 8215): an operator picks the prefix length, so every place of RFC 6052 §2.2 counts.
        [0x64, 0xff9b, 1, ..] => vec![
            Ipv4Addr::new(b[6], b[7], b[9], b[10]),
            Ipv4Addr::new(b[7], b[9], b[10], b[11]),
            v4(9),
            v4(12),
        ],
        // 6to4 (RFC 3056).
        [0x2002, ..] => vec![v4(2)],
        // Teredo (RFC 4380): server, and the client's address inverted.
        [0x2001, 0, ..] => vec![v4(4), Ipv4Addr::from_bits(!v4(12).to_bits())],
        // ISATAP (RFC 5214).
        [_, _, _, _, 0 | 0x0200, 0x5efe, _, _] => vec![v4(12)],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Town;

    impl Surroundings for Town {
        fn is_nameserver(&self, address: IpAddr) -> bool {
            address == ip("169.254.20.10") || address == ip("10.96.0.10")
        }

        fn is_node(&self, address: IpAddr) -> bool {
            address == ip("10.99.0.1")
        }

        fn is_manager(&self, address: IpAddr, _port: u16) -> bool {
            address == ip("10.244.0.9") || address == ip("10.96.7.7")
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_never_dialled_is_refused_in_every_form() {
        use Refusal::{
            Etcd, Kubelet, LinkLocal, Loopback, Manager, Metadata, Multicast, Unspecified,
        };
        for (address, port, expected) in [
            ("127.0.0.1", 80, Loopback),
            ("127.255.1.2", 80, Loopback),
            ("::1", 80, Loopback),
            ("::ffff:127.0.0.1", 80, Loopback),
            ("::127.0.0.1", 80, Loopback),
            ("::ffff:0:127.0.0.1", 80, Loopback),
            ("64:ff9b::127.0.0.1", 80, Loopback),
            ("2002:7f00:1::", 80, Loopback),
            ("0.0.0.0", 80, Unspecified),
            ("0.1.2.3", 80, Unspecified),
            ("::", 80, Unspecified),
            ("224.0.0.251", 5353, Multicast),
            ("255.255.255.255", 67, Multicast),
            ("ff02::1", 80, Multicast),
            ("169.254.169.254", 80, LinkLocal),
            ("::ffff:169.254.169.254", 80, LinkLocal),
            ("::ffff:a9fe:a9fe", 80, LinkLocal),
            ("64:ff9b::a9fe:a9fe", 80, LinkLocal),
            ("64:ff9b:1:a9fe:a9:fe00::", 80, LinkLocal),
            ("64:ff9b:1:a9:fe:a9fe::", 80, LinkLocal),
            ("64:ff9b:1::a9:fea9:fe00:0", 80, LinkLocal),
            ("64:ff9b:1::a9fe:a9fe", 80, LinkLocal),
            ("2002:a9fe:a9fe::1", 80, LinkLocal),
            ("2001:0:a9fe:a9fe::", 80, LinkLocal),
            ("2001::5601:5601", 80, LinkLocal),
            ("2001:db8::5efe:a9fe:a9fe", 80, LinkLocal),
            ("fe80::1", 80, LinkLocal),
            ("169.254.20.10", 54, LinkLocal),
            ("100.100.100.200", 80, Metadata),
            ("168.63.129.16", 32526, Metadata),
            ("fd00:ec2::254", 80, Metadata),
            ("fd20:ce::254", 80, Metadata),
            ("10.244.0.9", 8443, Manager),
            ("::ffff:10.244.0.9", 9090, Manager),
            ("10.96.7.7", 443, Manager),
            ("10.99.0.1", 10250, Kubelet),
            ("10.99.0.1", 10255, Kubelet),
            ("10.99.0.1", 10248, Kubelet),
            ("10.99.0.1", 10249, Kubelet),
            ("10.99.0.1", 10256, Kubelet),
            ("10.99.0.1", 10259, Kubelet),
            ("64:ff9b::10.99.0.1", 10250, Kubelet),
            ("10.99.0.1", 2379, Etcd),
            ("::ffff:10.99.0.1", 2380, Etcd),
        ] {
            assert_eq!(
                check(ip(address), port, &Town),
                Err(expected),
                "{address} {port}"
            );
        }
    }

    #[test]
    fn what_people_work_with_is_not_refused() {
        for (address, port, dialled) in [
            ("10.0.0.1", 80, "10.0.0.1"),
            ("192.168.1.1", 443, "192.168.1.1"),
            ("172.16.0.1", 5432, "172.16.0.1"),
            ("100.64.0.1", 80, "100.64.0.1"),
            ("::ffff:10.0.0.1", 80, "10.0.0.1"),
            ("fd00::1", 80, "fd00::1"),
            ("2001:db8::1", 80, "2001:db8::1"),
            ("64:ff9b::8.8.8.8", 53, "64:ff9b::8.8.8.8"),
            ("64:ff9b:1::8.8.8.8", 443, "64:ff9b:1::8.8.8.8"),
            ("10.244.0.8", 10250, "10.244.0.8"),
            ("10.99.0.1", 6443, "10.99.0.1"),
            ("10.99.0.1", 10251, "10.99.0.1"),
            ("169.254.20.10", 53, "169.254.20.10"),
            ("10.96.0.10", 53, "10.96.0.10"),
        ] {
            assert_eq!(
                check(ip(address), port, &Town),
                Ok(ip(dialled)),
                "{address} {port}"
            );
        }
    }

    proptest! {
        #[test]
        fn an_embedded_refused_address_is_refused(last in any::<[u8; 2]>(), port in any::<u16>()) {
            let bad = Ipv4Addr::new(169, 254, last[0], last[1]);
            prop_assume!(!Town.is_nameserver(bad.into()));
            let bits = u128::from(bad.to_bits());
            for form in [
                Ipv6Addr::from_bits(0xffff << 32 | bits),
                Ipv6Addr::from_bits(bits),
                Ipv6Addr::from_bits(0x0064_ff9b << 96 | bits),
                Ipv6Addr::from_bits(0x2002 << 112 | bits << 80),
                Ipv6Addr::from_bits(0x2001_0000 << 96 | u128::from(!bad.to_bits())),
            ] {
                prop_assert_eq!(check(form.into(), port, &Town), Err(Refusal::LinkLocal), "{}", form);
            }
        }

        #[test]
        fn what_is_dialled_never_hides_an_ipv4_address(bits in any::<u128>(), port in any::<u16>()) {
            if let Ok(IpAddr::V6(v6)) = check(Ipv6Addr::from_bits(bits).into(), port, &Town) {
                prop_assert_eq!(v6.to_ipv4_mapped(), None);
            }
        }
    }
}
