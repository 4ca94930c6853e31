//! What listens in the manager's pod, against a list that a person wrote.

use std::process::Command;

use tp_tests::Cluster;
use tp_tests::process::tool;

/// Tunnel, health, metrics. Nothing on loopback, since a port-forward reaches it, and nothing over UDP.
const GOLDEN: &str = "tcp *:8080\ntcp *:8443\ntcp *:9090\n";

#[test]
fn the_manager_listens_on_the_golden_ports_and_no_other() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    for (pod, pid) in cluster.manager_processes() {
        let listening =
            tool(Command::new("nsenter").args(["-t", &pid.to_string(), "-n", "ss", "-Hltun"]));
        let mut ports: Vec<String> = listening
            .lines()
            .filter_map(|line| {
                let columns: Vec<&str> = line.split_whitespace().collect();
                let (protocol, address) = (columns.first()?, columns.get(4)?);
                let address = address.replace("0.0.0.0:", "*:").replace("[::]:", "*:");
                // A UDP socket that is connected out, to a resolver, serves nobody.
                Some(format!("{protocol} {address}\n"))
            })
            .collect();
        ports.sort();
        ports.dedup();
        assert_eq!(ports.concat(), GOLDEN, "{pod}");
    }
}

#[test]
fn health_says_nothing_and_metrics_ask_who_you_are() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("ports");
    namespace.server("client", "nginx", &[80]);
    let pod = cluster.manager_pods().remove(0);
    let address = cluster.value("tp-system", &format!("pod/{pod}"), ".status.podIP");
    let get = |port: u16, path: &str, token: &str| {
        let script = format!(
            "import http.client as h\nc = h.HTTPConnection('{address}', {port}, timeout=5)\n\
             c.request('GET', '{path}', headers={{'Authorization': 'Bearer {token}'}} if '{token}' else {{}})\n\
             r = c.getresponse()\nprint(r.status, r.read().decode())"
        );
        namespace.exec("client", &["python3", "-c", &script])
    };

    let (health, ready) = (get(8080, "/healthz", ""), get(8080, "/readyz", ""));
    assert!(
        health.starts_with("200 ") && ready.starts_with("200 "),
        "{health} {ready}"
    );
    assert!(
        health.len() < 20 && ready.len() < 20,
        "a constant body: {health} {ready}"
    );
    assert!(get(8080, "/v1/cluster", "").starts_with("404"));

    assert!(get(9090, "/metrics", "").starts_with("401"), "no token");
    let nobody = cluster.kubectl(&["-n", &namespace.name, "create", "token", "default"]);
    assert!(
        get(9090, "/metrics", nobody.trim()).starts_with("403"),
        "a token without the right"
    );
}
