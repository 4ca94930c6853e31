//! What cannot be reached is refused with the cause, in the words of the protocol the program speaks: never "connected,
//! then closed".

use std::time::{Duration, Instant};

use tp_tests::{Cluster, Laptop, User};

/// A pod that drops what comes to port 80.
const FILTERED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: wall, namespace: $NS, labels: {app: wall}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: nft
    image: lab.local/nettools:lab
    securityContext: {privileged: true}
    command: [/bin/sh, -c]
    args: ["nft 'add table inet wall; add chain inet wall in { type filter hook input priority 0 ; }; add rule inet wall in tcp dport 80 drop' && touch /tmp/ready && exec sleep 100000"]
    readinessProbe: {exec: {command: [/bin/test, -e, /tmp/ready]}, periodSeconds: 1}
"#;

#[test]
fn closed_filtered_and_unknown_are_told_apart() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("refuse");
    namespace.probe("web");
    namespace.apply(FILTERED);
    namespace.wait_ready("app=wall");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    // Pods by address: a Service refuses everything until kube-proxy has heard of its first ready pod.
    let pod = namespace.value("pod/web", ".status.podIP");
    let wall = namespace.value("pod/wall", ".status.podIP");
    let unknown = format!("nothing.{}.svc.cluster.local", namespace.name);

    for (host, port, reply, status, error) in [
        ("web", 81, 5, 502, "connection_refused"),
        (pod.as_str(), 4444, 5, 502, "connection_refused"),
        (wall.as_str(), 80, 4, 504, "connection_timeout"),
        (unknown.as_str(), 80, 4, 502, "dns_error"),
    ] {
        let start = Instant::now();
        assert_eq!(tp.socks_reply(host, port), reply, "SOCKS5 {host}:{port}");
        let took = start.elapsed();
        assert!(took < Duration::from_secs(7), "{host}:{port} took {took:?}");

        let (code, details) = tp.http_connect(&format!("{host}:{port}"));
        assert_eq!(code, status, "CONNECT {host}:{port}: {details}");
        assert!(
            details.contains(&format!("error={error}")),
            "{host}:{port}: {details}"
        );

        let request = format!("GET http://{host}:{port}/ HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n");
        let (code, details) = tp.http(request.as_bytes());
        assert_eq!(code, status, "GET {host}:{port}: {details}");
        assert!(
            details.contains(&format!("error={error}")),
            "{host}:{port}: {details}"
        );
    }
}

#[test]
fn dangerous_addresses_are_refused_even_to_who_may_leave_the_cluster() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("refuse");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    user.grant(&cluster, &namespace.name, "tp-egress");
    let laptop = Laptop::of(&cluster, &user);
    let tp = laptop.connect(&["--all"]);
    let manager = cluster.value("tp-system", "svc/tp-manager", ".spec.clusterIP");
    let pods = cluster.kubectl(&[
        "-n",
        "tp-system",
        "get",
        "pods",
        "-o",
        "jsonpath={.items[*].status.podIP}",
    ]);
    let mut destinations = vec![
        ("10.99.0.1", 10250),
        ("10.99.0.1", 10255),
        ("10.99.0.1", 2379),
        ("10.99.0.1", 2380),
    ];
    destinations.extend(pods.split_whitespace().map(|pod| (pod, 8443)));
    if !["None", ""].contains(&manager.as_str()) {
        destinations.push((&manager, 8443));
    }
    destinations.extend(METADATA_AND_LOOPBACK.map(|address| (address, 80)));

    for (host, port) in destinations {
        assert_eq!(tp.socks_reply(host, port), 2, "SOCKS5 {host}:{port}");
        let authority = if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        let (status, details) = tp.http_connect(&authority);
        assert_eq!(status, 403, "{authority}: {details}");
        assert!(
            details.contains("error=destination_ip_prohibited"),
            "{authority}: {details}"
        );
    }
}

/// Cloud metadata and loopback, in the ways that attackers write them.
const METADATA_AND_LOOPBACK: [&str; 18] = [
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "168.63.129.16",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "127.0.0.1",
    "127.8.8.8",
    "::1",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::1",
    "0.0.0.0",
    "224.0.0.1",
];

#[test]
fn odd_spellings_of_loopback_are_no_way_in() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("refuse");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    user.grant(&cluster, &namespace.name, "tp-egress");
    let laptop = Laptop::of(&cluster, &user);
    let tp = laptop.connect(&["--all"]);

    // As names: whether taken for an address or for a name that does not exist, nothing is connected.
    for name in [
        "2130706433",
        "0x7f000001",
        "017700000001",
        "127.1",
        "localhost",
        "localhost.",
        "2852039166",
    ] {
        let reply = tp.socks_reply(name, 8080);
        assert!([2, 4].contains(&reply), "{name}: reply {reply}");
        let (status, details) = tp.http_connect(&format!("{name}:8080"));
        assert!(
            [400, 403, 502].contains(&status),
            "{name}: {status} {details}"
        );
    }
}

#[test]
fn a_name_that_leads_to_a_forbidden_address_is_refused_on_the_address() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("refuse");
    // A Service of the user's own whose only endpoint is the node.
    namespace.apply(
        r#"
apiVersion: v1
kind: Service
metadata: {name: trap, namespace: $NS}
spec: {clusterIP: None, ports: [{name: kubelet, port: 10250}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: trap, namespace: $NS, labels: {kubernetes.io/service-name: trap}}
addressType: IPv4
endpoints: [{addresses: [10.99.0.1], conditions: {ready: true}}]
ports: [{name: kubelet, port: 10250}]
"#,
    );
    let user = User::of_namespace(&cluster, "ada", &namespace);
    user.grant(&cluster, &namespace.name, "tp-egress");
    let laptop = Laptop::of(&cluster, &user);
    let tp = laptop.connect(&[]);
    let trap = format!("trap.{}.svc.cluster.local", namespace.name);

    let (reply, _) = tp_tests::eventually("the name resolves", Duration::from_secs(15), || {
        let reply = tp.socks_reply(&trap, 10250);
        (reply != 4).then_some(reply)
    });

    assert_eq!(reply, 2);
    assert_eq!(tp.socks_reply(&trap, 2379), 2);
}

#[test]
fn the_proxy_does_not_lead_to_itself_or_to_the_laptops_loopback() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("refuse");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let (host, port) = tp.proxy.split_once(':').unwrap();
    let port: u16 = port.parse().unwrap();

    assert_eq!(tp.socks_reply(host, port), 2);
    assert_eq!(tp.socks_reply("localhost", port), 2);
    assert_eq!(tp.socks_reply("::1", port), 2);
    assert_eq!(tp.http_connect(&tp.proxy).0, 403);
    assert_eq!(tp.http_connect("127.0.0.1:22").0, 403);
}
