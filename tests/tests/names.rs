//! Every kind of name that a pod can use works on the laptop.

use tp_tests::{Cluster, Laptop, User};

/// A StatefulSet behind a headless Service, a pod with an own hostname, and aliases of Services near and far.
const NAMES: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: db, namespace: $NS}
spec: {clusterIP: None, selector: {set: db}, ports: [{name: http, port: 80}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: $NS}
spec:
  serviceName: db
  replicas: 2
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db, set: db}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: probe, image: "lab.local/probe:lab", readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Pod
metadata: {name: named-pod, namespace: $NS, labels: {app: named, set: db}}
spec:
  hostname: named
  subdomain: db
  terminationGracePeriodSeconds: 0
  containers: [{name: probe, image: "lab.local/probe:lab", readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Service
metadata: {name: alias, namespace: $NS}
spec: {type: ExternalName, externalName: web.$NS.svc.cluster.local}
"#;

#[test]
fn services_pods_and_aliases_are_found_as_a_pod_would_find_them() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("names");
    let other = cluster.namespace("names");
    namespace.probe("web");
    other.probe("far");
    namespace.apply(NAMES);
    namespace.wait_ready("set=db");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    user.grant(&cluster, &other.name, "tp-user");
    let laptop = Laptop::of(&cluster, &user);
    let tp = laptop.connect(&[]);
    let (near, far) = (&namespace.name, &other.name);

    let names = [
        ("web".to_owned(), "web"),
        (format!("web.{near}"), "web"),
        (format!("web.{near}.svc"), "web"),
        (format!("web.{near}.svc.cluster.local"), "web"),
        (format!("web.{near}.svc.cluster.local."), "web"),
        (format!("WEB.{near}.SVC"), "web"),
        (format!("far.{far}"), "far"),
        (format!("far.{far}.svc.cluster.local"), "far"),
        ("alias".to_owned(), "web"),
        (format!("alias.{near}.svc"), "web"),
        (format!("db-0.db.{near}.svc.cluster.local"), "db-0"),
        (format!("db-1.db.{near}.svc"), "db-1"),
        (format!("named.db.{near}.svc"), "named"),
    ];
    for scheme in ["socks5h", "http"] {
        for (name, host) in &names {
            let url = format!("http://{name}/hostname");
            let run = tp.curl_through(scheme, &[&url]);
            assert_eq!(run.out().trim(), *host, "{scheme} {name}: {}", run.report());
        }
    }
    // The headless Service itself is one of its pods.
    let one = tp.get(&format!("http://db.{near}.svc/hostname"));
    assert!(["db-0", "db-1", "named"].contains(&one.trim()), "{one}");
}

#[test]
fn a_service_made_after_the_connect_is_reachable_by_its_short_name() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("names");
    namespace.probe("first");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    assert_eq!(tp.get("http://first/"), "hello-from-probe\n");

    namespace.probe("second");

    let (body, took) = tp_tests::eventually(
        "the new name is known",
        std::time::Duration::from_secs(10),
        || {
            let run = tp.curl(&["http://second/"]);
            run.succeeded().then(|| run.out())
        },
    );
    assert_eq!(body, "hello-from-probe\n");
    assert!(took.as_secs() < 5, "{took:?}");
}

#[test]
fn a_namespace_never_captures_a_public_suffix_of_the_same_name() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("names");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);

    // `web.<ns>` is a Service and goes through the tunnel; `nothing.<ns>` is none, and is the laptop's own business.
    // The laptop has no resolver, so a direct dial must fail there, and the cluster must not be asked.
    let (status, details) = tp.http_connect(&format!("nothing.{}:80", namespace.name));
    assert_eq!(status, 502, "{details}");
    assert!(!details.contains("tp-manager"), "{details}");
}
