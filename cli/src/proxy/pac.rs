//! The proxy auto-configuration file: the split as a script that a browser runs.
//!
//! Pure. The script looks at literal addresses and names only and never resolves (`dnsResolve` would block the browser
//! and tell the workstation's resolver the names of the cluster). Where it is unsure it says `DIRECT`.

use std::net::SocketAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::rule::Rule;
use super::split::Split;

/// The script for a proxy that listens on `proxy`.
pub fn script(split: &Split, proxy: SocketAddr) -> String {
    let view = split.view();
    let mut suffixes = vec![view.domain.clone()];
    suffixes.extend(view.suffixes.iter().cloned());
    suffixes.retain(|suffix| !suffix.is_empty());
    let ranges = view.service_ranges.iter().chain(&view.pod_ranges);
    let tables = json!({
        "proxy": format!("SOCKS5 {proxy}; PROXY {proxy}"),
        "everything": split.everything(),
        "namespace": view.namespace,
        "services": split.services(),
        "anyLabelBut": split.any_label_but(),
        "suffixes": suffixes,
        "ranges": ranges.map(range).collect::<Vec<_>>(),
        "also": rules(&split.rules().also_proxy),
        "never": rules(&split.rules().never_proxy),
    });
    format!("var tp = {tables};\n{LOGIC}")
}

fn rules(rules: &[Rule]) -> Value {
    let mut table = json!({"names": [], "below": [], "ranges": []});
    for rule in rules {
        let (kind, value) = match rule {
            Rule::Name(name) => ("names", json!(name)),
            Rule::Below(suffix) => ("below", json!(suffix)),
            Rule::Range(net) => ("ranges", range(net)),
        };
        if let Some(list) = table[kind].as_array_mut() {
            list.push(value);
        }
    }
    table
}

/// `[network, mask]` for IPv4 (`isInNet`), `[prefix]` for IPv6 (`isInNetEx`).
fn range(net: &IpNet) -> Value {
    match net {
        IpNet::V4(net) => json!([net.network(), net.netmask()]),
        IpNet::V6(net) => json!([net.trunc().to_string()]),
    }
}

/// ECMAScript 3, since some systems still run these scripts in old engines.
const LOGIC: &str = include_str!("proxy.pac.js");

#[cfg(test)]
mod tests {
    use tp_manager_api::ClusterView;

    use super::super::split::UserRules;
    use super::*;

    fn example() -> String {
        let view = ClusterView {
            namespace: "shop".into(),
            domain: "cluster.local".into(),
            service_ranges: vec![
                "10.96.0.0/16".parse().unwrap(),
                "fd10::/112".parse().unwrap(),
            ],
            services: [(
                "shop".to_owned(),
                vec!["web".to_owned(), "\"];alert(1)//".to_owned()],
            )]
            .into(),
            ..ClusterView::default()
        };
        let rules = UserRules {
            never_proxy: vec!["10.96.9.0/24".parse().unwrap(), "*.lan".parse().unwrap()],
            ..UserRules::default()
        };
        script(&Split::new(view, rules), "127.0.0.1:1080".parse().unwrap())
    }

    #[test]
    fn the_script_holds_the_split_as_data() {
        let text = example();
        let tables = text.lines().next().unwrap();
        let tables = tables
            .strip_prefix("var tp = ")
            .unwrap()
            .strip_suffix(';')
            .unwrap();
        let tables: Value = serde_json::from_str(tables).unwrap();

        assert_eq!(
            tables["proxy"],
            "SOCKS5 127.0.0.1:1080; PROXY 127.0.0.1:1080"
        );
        assert_eq!(
            tables["ranges"],
            json!([["10.96.0.0", "255.255.0.0"], ["fd10::/112"]])
        );
        assert_eq!(tables["never"]["below"], json!(["lan"]));
        assert_eq!(tables["services"]["shop"][0], "\"];alert(1)//");
    }

    #[test]
    fn the_script_never_resolves() {
        let text = example();
        for forbidden in ["dnsResolve", "isResolvable", "myIpAddress"] {
            assert!(!text.contains(forbidden), "{forbidden}");
        }
    }
}
