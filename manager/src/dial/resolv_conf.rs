//! `/etc/resolv.conf`, and what a pod of another namespace would find in its own.
//!
//! Kubelet writes `<namespace>.svc.<domain> svc.<domain> <domain> …` into the search list, so the list of another
//! namespace's pod differs in one word. Pure; see resolv.conf(5).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// A parsed resolv.conf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvConf {
    /// At most three, as in libc; port 53 unless a test says otherwise.
    pub nameservers: Vec<SocketAddr>,
    /// In order, lower case, without dots at the ends.
    pub search: Vec<String>,
    /// Names with at least so many dots are first tried as they are.
    pub ndots: usize,
    /// How long one nameserver may take.
    pub timeout: Duration,
    /// How often the list of nameservers is gone through.
    pub attempts: u32,
}

impl Default for ResolvConf {
    fn default() -> Self {
        Self {
            nameservers: Vec::new(),
            search: Vec::new(),
            ndots: 1,
            timeout: Duration::from_secs(2),
            attempts: 2,
        }
    }
}

impl ResolvConf {
    /// Reads what it understands and skips the rest, as libc does.
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => conf.add_nameserver(words.next()),
                Some("search" | "domain") => conf.search = words.filter_map(normalise).collect(),
                Some("options") => words.for_each(|option| conf.set_option(option)),
                Some(_) | None => {}
            }
        }
        conf
    }

    fn add_nameserver(&mut self, word: Option<&str>) {
        let address = word
            .and_then(|word| word.split('%').next())
            .and_then(|word| word.parse().ok());
        if let (Some(address), true) = (address, self.nameservers.len() < MOST_NAMESERVERS) {
            self.nameservers.push(SocketAddr::new(address, 53));
        }
    }

    fn set_option(&mut self, option: &str) {
        let Some((name, Ok(value))) = option
            .split_once(':')
            .map(|(name, value)| (name, value.parse::<u32>()))
        else {
            return;
        };
        match name {
            "ndots" => self.ndots = value.min(15) as usize,
            "timeout" => self.timeout = Duration::from_secs(value.clamp(1, 2).into()),
            "attempts" => self.attempts = value.clamp(1, 5),
            _ => {}
        }
    }

    /// The cluster's domain, from the entry that starts with `svc.`.
    pub fn cluster_domain(&self) -> Option<&str> {
        self.search
            .iter()
            .find_map(|entry| entry.strip_prefix("svc."))
    }

    /// The names to ask for, in order, as a pod of `namespace` would; all fully qualified.
    pub fn candidates(&self, name: &str, namespace: Option<&str>) -> Vec<String> {
        let search = self
            .search
            .iter()
            .map(|entry| match (namespace, self.cluster_domain()) {
                (Some(namespace), Some(domain)) if is_namespace_entry(entry, domain) => {
                    format!("{namespace}.svc.{domain}")
                }
                _ => entry.clone(),
            });
        let searched = search
            .map(|entry| format!("{name}.{entry}"))
            .filter(|name| name.len() <= LONGEST_NAME);
        let dots = name.bytes().filter(|byte| *byte == b'.').count();
        if dots >= self.ndots {
            std::iter::once(name.to_owned()).chain(searched).collect()
        } else {
            searched.chain(std::iter::once(name.to_owned())).collect()
        }
    }

    /// Whether an address is one of the nameservers.
    pub fn is_nameserver(&self, address: IpAddr) -> bool {
        self.nameservers.iter().any(|server| server.ip() == address)
    }
}

const MOST_NAMESERVERS: usize = 3;

/// RFC 1035 §2.3.4, without the root's dot.
const LONGEST_NAME: usize = 253;

/// `<one label>.svc.<domain>`.
fn is_namespace_entry(entry: &str, domain: &str) -> bool {
    entry
        .strip_suffix(domain)
        .and_then(|rest| rest.strip_suffix(".svc."))
        .is_some_and(|namespace| !namespace.is_empty() && !namespace.contains('.'))
}

fn normalise(entry: &str) -> Option<String> {
    let entry = entry.trim_matches('.').to_ascii_lowercase();
    (!entry.is_empty()).then_some(entry)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POD: &str = "search tp-system.svc.cluster.local svc.cluster.local cluster.local corp.example\n\
                       nameserver 10.96.0.10\noptions ndots:5\n";

    #[test]
    fn a_pods_file_is_understood() {
        let conf = ResolvConf::parse(POD);

        assert_eq!(conf.nameservers, ["10.96.0.10:53".parse().unwrap()]);
        assert_eq!(conf.ndots, 5);
        assert_eq!(conf.cluster_domain(), Some("cluster.local"));
    }

    #[test]
    fn a_short_name_goes_through_the_sessions_namespace() {
        let conf = ResolvConf::parse(POD);

        assert_eq!(
            conf.candidates("web", Some("shop")),
            [
                "web.shop.svc.cluster.local",
                "web.svc.cluster.local",
                "web.cluster.local",
                "web.corp.example",
                "web"
            ]
        );
    }

    #[test]
    fn a_name_with_enough_dots_is_tried_as_it_is_first() {
        let conf = ResolvConf::parse(POD);

        let names = conf.candidates("a.web.shop.svc.cluster.local", Some("shop"));

        assert_eq!(names[0], "a.web.shop.svc.cluster.local");
        assert_eq!(names.len(), 5);
    }

    #[test]
    fn outside_of_a_cluster_the_list_stays_as_it_is() {
        let conf = ResolvConf::parse("search corp.example.\nnameserver 192.0.2.1\n");

        assert_eq!(conf.cluster_domain(), None);
        assert_eq!(
            conf.candidates("web", Some("shop")),
            ["web.corp.example", "web"]
        );
        assert_eq!(
            conf.candidates("web.example", None),
            ["web.example", "web.example.corp.example"]
        );
    }

    #[test]
    fn oddities_are_skipped() {
        let conf = ResolvConf::parse(
            "# nameserver 1.1.1.1\nnameserver\nnameserver x\nnameserver fe80::1%eth0\nsearch a b\nsearch . c.\n\
             options ndots:x ndots:99 rotate timeout:30 attempts:0\nnameserver ::1\nnameserver ::2\nnameserver ::3",
        );

        assert_eq!(conf.nameservers.len(), 3);
        assert_eq!(conf.search, ["c"]);
        assert_eq!((conf.ndots, conf.attempts), (15, 1));
        assert_eq!(conf.timeout, Duration::from_secs(2));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,400}", name in "[a-z.]{0,300}") {
            let conf = ResolvConf::parse(&text);
            prop_assert!(conf.candidates(&name, Some("n")).contains(&name));
        }
    }
}
