//! Intercepts on the real cluster: agents get into every pod, requests go where they belong, and what stands in the way is
//! named.

#[expect(dead_code, reason = "each test of intercepts needs a part of it")]
mod workstation;

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tp_tests::{Cluster, Laptop, Namespace, eventually, time_in};

use workstation::{ANSWER, Workstation, condition};

const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: $NS}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - {name: probe, image: "lab.local/probe:lab", readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 1}}
"#;

const MINE: &str = "x-tp-user: ada";

fn matchers() -> Value {
    json!([{ "header": { "name": "x-tp-user", "exact": "ada" } }])
}

/// A namespace with the Deployment `web` of two.
fn web(cluster: &Cluster) -> Namespace<'_> {
    let namespace = cluster.namespace("attach");
    // The probe's image is loaded with its first pod.
    namespace.probe("image");
    namespace.apply(WEB);
    namespace.wait_ready("app=web");
    cluster.wait_rolled_out(&namespace.name, "deploy/web");
    namespace
}

/// Names and addresses of the running pods of `web` that are to stay.
fn pods(cluster: &Cluster, namespace: &Namespace<'_>) -> Vec<(String, String)> {
    let staying = cluster.pods(&namespace.name, "app=web").into_iter();
    staying
        .filter(|pod| pod["status"]["phase"] == "Running")
        .map(|pod| {
            let text = |value: &Value| value.as_str().expect("a text").to_owned();
            (
                text(&pod["metadata"]["name"]),
                text(&pod["status"]["podIP"]),
            )
        })
        .collect()
}

/// What a client in the cluster gets, from a pod by its address.
fn get(cluster: &Cluster, address: &str, header: &str) -> String {
    let url = format!("http://{address}/hostname");
    cluster.on_node(&[
        "curl",
        "-sS",
        "--fail",
        "--max-time",
        "5",
        "-H",
        header,
        &url,
    ])
}

#[track_caller]
fn each_goes_where_it_belongs(
    cluster: &Cluster,
    namespace: &Namespace<'_>,
    pods: &[(String, String)],
) {
    assert!(!pods.is_empty());
    for (name, address) in pods {
        assert_eq!(
            get(cluster, address, MINE),
            ANSWER,
            "{name} in {}",
            namespace.name
        );
        assert_eq!(get(cluster, address, "x-tp-user: eve").trim(), name);
    }
}

#[test]
fn my_requests_reach_the_workstation_on_every_pod_also_after_a_rollout_and_a_scale_up() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let workstation = Workstation::connect(&cluster, &namespace.name);
    let intercept = workstation.intercept("Deployment", "web", 80, &matchers());
    let spec = || namespace.value("deploy/web", ".spec");
    let (before, first) = (spec(), pods(&cluster, &namespace));

    let took = intercept.ready();

    eprintln!("ready after {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    each_goes_where_it_belongs(&cluster, &namespace, &first);
    assert_eq!(pods(&cluster, &namespace), first, "no pod was restarted");
    assert_eq!(spec(), before, "the Deployment is as it was");

    cluster.kubectl(&["-n", &namespace.name, "scale", "deploy/web", "--replicas=3"]);
    cluster.roll(&namespace.name, "deploy/web");
    let (after, _) = eventually("three new pods", Duration::from_secs(30), || {
        let after = pods(&cluster, &namespace);
        let all_new = after.iter().all(|pod| !first.contains(pod));
        (after.len() == 3 && all_new).then_some(after)
    });
    intercept.becomes("attached to the new pods", |status| {
        status["attached"] == 3 && condition(status)["status"] == "True"
    });
    each_goes_where_it_belongs(&cluster, &namespace, &after);

    intercept.delete();
    let limit = Duration::from_secs(2);
    eventually("all requests are the application's", limit, || {
        let mut answers = after
            .iter()
            .map(|(name, address)| get(&cluster, address, MINE).trim() == name);
        answers.all(|own| own).then_some(())
    });
}

#[test]
fn every_kind_of_workload_can_be_intercepted() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("attach");
    namespace.probe("bare");
    let template = "template: {metadata: {labels: {app: $KIND}}, spec: {terminationGracePeriodSeconds: 0, \
                    containers: [{name: probe, image: \"lab.local/probe:lab\"}]}}";
    let selector = "selector: {matchLabels: {app: $KIND}}";
    for (kind, more) in [
        ("StatefulSet", "serviceName: none,"),
        ("DaemonSet", ""),
        ("ReplicaSet", "replicas: 1,"),
    ] {
        let manifest = format!(
            "apiVersion: apps/v1\nkind: {kind}\nmetadata: {{name: web, namespace: $NS}}\n\
             spec: {{{more} {selector}, {template}}}\n"
        );
        namespace.apply(&manifest.replace("$KIND", &kind.to_lowercase()));
    }
    let workstation = Workstation::connect(&cluster, &namespace.name);

    for (kind, workload) in [
        ("StatefulSet", "web"),
        ("DaemonSet", "web"),
        ("ReplicaSet", "web"),
        ("Pod", "bare"),
    ] {
        let label = match kind {
            "Pod" => workload.to_owned(),
            _ => kind.to_lowercase(),
        };
        namespace.wait_ready(&format!("app={label}"));
        let pods = ["-n", &namespace.name, "get", "pods", "-l"];
        let path = "jsonpath={.items[0].status.podIP}";
        let label = format!("app={label}");
        let address = cluster.kubectl(&[&pods[..], &[&label, "-o", path]].concat());

        workstation
            .intercept(kind, workload, 80, &matchers())
            .ready();

        assert_eq!(get(&cluster, &address, MINE), ANSWER, "{kind}");
        assert_ne!(get(&cluster, &address, "x-tp-user: eve"), ANSWER, "{kind}");
    }
}

#[test]
fn the_second_of_two_equal_intercepts_is_refused_and_finds_who_holds_it() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let workstation = Workstation::connect(&cluster, &namespace.name);
    let intercept = workstation.intercept("Deployment", "web", 80, &matchers());
    intercept.ready();

    let mut command = cluster.kubectl_command(&["create", "-f", "-"]);
    let again = tp_tests::Run::new(
        std::mem::replace(&mut command, Command::new("true")),
        intercept.object.to_string().as_bytes(),
        Duration::from_secs(10),
    );

    assert!(again.err().contains("AlreadyExists"), "{}", again.report());
    let holder = namespace.value(
        &format!("intercepts.tp.dev/{}", intercept.name),
        ".spec.user",
    );
    assert_eq!(intercept.object["spec"]["user"], holder);
    // At the other replica, so that agents have routes from both.
    let other = Workstation::connect_to(&cluster, &namespace.name, 1);
    let everything = other.intercept("Deployment", "web", 80, &json!([]));
    everything.ready();
    // The older one still has its own; the newer one has the rest.
    for (_, address) in pods(&cluster, &namespace) {
        let (own, rest) = (workstation.served(), other.served());
        assert_eq!(get(&cluster, &address, MINE), ANSWER);
        assert_eq!(workstation.served(), own + 1);
        assert_eq!(get(&cluster, &address, "x-tp-user: eve"), ANSWER);
        // The kubelet's probes are among the rest.
        assert!(other.served() > rest);
        assert_eq!(workstation.served(), own + 1);
    }
    // The API server's clock has whole seconds; of two in one, the uid says which is older.
    let object = format!("intercepts.tp.dev/{}", everything.name);
    let created = namespace.value(&object, ".metadata.creationTimestamp");
    let limit = Duration::from_secs(3);
    eventually("another second begins", limit, || {
        (time_in(0) > created).then_some(())
    });
    let late = json!([{ "header": { "name": "x-tp-user", "exact": "late" } }]);
    let late = workstation.intercept("Deployment", "web", 80, &late);
    cluster.apply(&late.object.to_string());
    let (status, _) = late.becomes("in conflict", |status| {
        condition(status)["reason"] == "Conflict"
    });
    assert!(
        condition(&status)["message"].to_string().contains(&holder),
        "{status}"
    );
}

#[test]
fn what_stands_in_the_way_is_named_with_its_cure() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("attach");
    let workstation = Workstation::connect(&cluster, &namespace.name);
    namespace.probe("plain");
    namespace.apply(HINDERED);
    namespace.wait_ready("app=hindered");
    let reason = |pod: &str, expected: &str| {
        let intercept = workstation.intercept("Pod", pod, 80, &matchers());
        let start = Instant::now();
        cluster.apply(&intercept.object.to_string());
        let (status, _) =
            intercept.becomes(expected, |status| condition(status)["reason"] == expected);
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{expected}: {:?}",
            start.elapsed()
        );
        let message = condition(&status)["message"].as_str().unwrap().to_owned();
        assert_eq!(message.lines().count(), 2, "what and what to do: {message}");
        intercept.delete();
        message
    };

    assert!(reason("on-the-node", "HostNetwork").contains("hostNetwork"));
    assert!(reason("in-a-mesh", "Mesh").contains("Istio"));
    assert!(reason("no-such-pod", "NoWorkload").contains("no-such-pod"));
    assert!(reason("walled", "Unreachable").contains("the-wall"));
    cluster.kubectl(&[
        "label",
        "namespace",
        &namespace.name,
        "pod-security.kubernetes.io/enforce=baseline",
    ]);
    assert!(reason("plain", "PodSecurity").contains("baseline"));
    cluster.kubectl(&[
        "label",
        "namespace",
        &namespace.name,
        "pod-security.kubernetes.io/enforce-",
        "tp.dev/intercept=disabled",
    ]);
    assert!(reason("plain", "Namespace").contains("tp.dev/intercept"));
}

const HINDERED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: on-the-node, namespace: $NS, labels: {app: hindered}}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers: [{name: sleep, image: "lab.local/nettools:lab", command: [/bin/sh, -c, "exec sleep 100000"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: in-a-mesh, namespace: $NS, labels: {app: hindered}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: istio-proxy, image: "lab.local/nettools:lab", command: [/bin/sh, -c, "exec sleep 100000"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: walled, namespace: $NS, labels: {app: hindered}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: nft
    image: lab.local/nettools:lab
    securityContext: {privileged: true}
    command: [/bin/sh, -c]
    args: ["nft 'add table inet wall; add chain inet wall in { type filter hook input priority 0 ; }; add rule inet wall in tcp dport 15008 drop' && touch /tmp/ready && exec sleep 100000"]
    readinessProbe: {exec: {command: [/bin/test, -e, /tmp/ready]}, periodSeconds: 1}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: the-wall, namespace: $NS}
spec: {podSelector: {matchLabels: {app: hindered}}}
"#;

#[test]
fn when_every_process_of_an_agent_is_killed_the_application_answers_and_a_new_agent_comes() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let workstation = Workstation::connect(&cluster, &namespace.name);
    let intercept = workstation.intercept("Deployment", "web", 80, &matchers());
    intercept.ready();
    let (name, address) = pods(&cluster, &namespace)[0].clone();
    assert_eq!(get(&cluster, &address, MINE), ANSWER);

    let uid = namespace.value(&format!("pod/{name}"), ".metadata.uid");
    let agents = cluster.agent_processes(&uid);
    assert!(agents.len() >= 2, "parent and worker: {agents:?}");
    // The worker goes with its parent, so one of them may be gone already.
    let all = agents.iter().map(ToString::to_string);
    let _ = Command::new("kill").arg("-9").args(all).output();
    let killed = Instant::now();

    let curl = ["curl", "-sS", "--max-time", "1", "-H", "x-tp-user: eve"];
    let url = format!("http://{address}/hostname");
    eventually("the application answers", Duration::from_secs(4), || {
        cluster
            .try_on_node(&[&curl[..], &[&url]].concat())
            .then_some(())
    });
    let open = killed.elapsed();
    eprintln!("the application answered after {open:?}");
    assert!(open <= Duration::from_millis(3500), "{open:?}");
    eventually("a new agent is there", Duration::from_secs(20), || {
        (get(&cluster, &address, MINE) == ANSWER).then_some(())
    });
    eprintln!("my requests came back after {:?}", killed.elapsed());
    assert_eq!(get(&cluster, &address, "x-tp-user: eve").trim(), name);
}

#[test]
fn connections_from_before_are_counted_and_closed_once_idle_where_that_is_asked_for() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let workstation = Workstation::connect(&cluster, &namespace.name);
    let (_, address) = pods(&cluster, &namespace)[0].clone();
    let hold = format!("exec 3<>/dev/tcp/{address}/80; echo open; cat <&3");
    let mut before = cluster
        .node_command(&["bash", "-c", &hold])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("bash starts");
    let mut line = [0; 5];
    let stdout = before.stdout.as_mut().expect("stdout is a pipe");
    std::io::Read::read_exact(stdout, &mut line).expect("it has connected");
    let intercept = workstation.intercept("Deployment", "web", 80, &matchers());

    intercept.ready();

    intercept.becomes("counted", |status| status["openBefore"] == 1);
    assert!(
        before.try_wait().expect("the child is ours").is_none(),
        "nobody asked to close it"
    );
    let patch = r#"{"spec":{"closeIdle":true}}"#;
    let object = format!("intercepts.tp.dev/{}", intercept.name);
    cluster.kubectl(&[
        "-n",
        &namespace.name,
        "patch",
        &object,
        "--type=merge",
        "-p",
        patch,
    ]);
    eventually("it is closed", Duration::from_secs(10), || {
        before.try_wait().expect("the child is ours")
    });
    intercept.becomes("none left", |status| status["openBefore"] == 0);
}

#[test]
fn a_workstation_that_vanishes_leaves_its_requests_to_the_application() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let mut workstation = Workstation::connect(&cluster, &namespace.name);
    let intercept = workstation.intercept("Deployment", "web", 80, &matchers());
    intercept.ready();
    let (name, address) = pods(&cluster, &namespace)[0].clone();
    assert_eq!(get(&cluster, &address, MINE), ANSWER);
    assert!(workstation.served() > 0);

    workstation.vanish();

    let (_, took) = eventually("the application answers", Duration::from_secs(3), || {
        (get(&cluster, &address, MINE).trim() == name).then_some(())
    });
    eprintln!("the application answered after {took:?}");
    intercept.becomes("said", |status| {
        condition(status)["reason"] == "NoWorkstation"
    });
}

#[test]
fn uninstalling_everything_takes_the_routes_back_and_names_pods_that_keep_an_agent() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let workstation = Workstation::connect(&cluster, &namespace.name);
    let intercept = workstation.intercept("Deployment", "web", 80, &matchers());
    intercept.ready();
    let pods = pods(&cluster, &namespace);
    let admin = Laptop::admin(&cluster);
    cluster.forget_manager();

    let run = admin
        .tp(&["uninstall", "--everything", "--output", "json"])
        .ok();

    let gone = run.json();
    assert_eq!(gone["agents_ended"], pods.len(), "{gone}");
    assert_eq!(gone["warnings"], json!([]));
    for (name, address) in &pods {
        assert_eq!(get(&cluster, address, MINE).trim(), name);
        let uid = namespace.value(&format!("pod/{name}"), ".metadata.uid");
        assert_eq!(cluster.agent_processes(&uid), [0_u32; 0], "{name}");
        let kept = json!(format!("{}/{name}", namespace.name));
        let listed = gone["pods_with_agents"].as_array().expect("a list");
        assert!(listed.contains(&kept), "{gone}");
    }
    let removed = gone["removed"].to_string();
    assert!(removed.contains(&intercept.name), "{removed}");
}
