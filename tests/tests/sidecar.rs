//! Agents that pods are made with: where no privilege is allowed, and when what adds them is away.

#[expect(dead_code, reason = "each test of intercepts needs a part of it")]
mod workstation;

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tp_tests::process::tool;
use tp_tests::{Cluster, Laptop, Namespace, User, eventually};

use workstation::{ANSWER, Workstation, condition};

/// Passes PodSecurity's `restricted` level by itself. Its probe goes by the name that the agent takes.
const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: $NS}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web$LABEL}}
    spec:
      terminationGracePeriodSeconds: 0
      securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: app
        image: lab.local/agnhost:lab
        args: [netexec, --http-port=8080, --udp-port=8081]
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: $NS}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}
"#;

const MINE: &str = "x-tp-user: ada";
const OTHERS: &str = "x-tp-user: eve";

/// A namespace of this PodSecurity level with the Deployment `web`, whose pods ask for the agent or do not.
fn web<'a>(cluster: &'a Cluster, level: &str, labelled: bool) -> Namespace<'a> {
    let namespace = cluster.namespace("sidecar");
    let enforce = format!("pod-security.kubernetes.io/enforce={level}");
    cluster.kubectl(&["label", "namespace", &namespace.name, &enforce]);
    let label = if labelled {
        ", tp.dev/sidecar: http"
    } else {
        ""
    };
    namespace.apply(&WEB.replace("$LABEL", label));
    namespace.wait_ready("app=web");
    namespace.wait_service("web", 80);
    namespace
}

/// The cluster with the webhook's pods ready.
fn with_webhook(cluster: &Cluster) {
    cluster.wait_rolled_out("tp-system", "deploy/tp-webhook");
}

/// The pods of `web` that stay, as objects.
fn pods(cluster: &Cluster, namespace: &Namespace<'_>) -> Vec<Value> {
    cluster.pods(&namespace.name, "app=web")
}

/// Waits until the Service leads to none of these pods any more. A rollout ends before the node's packet rules have heard of
/// it, and these pods do not linger: who asks meanwhile asks nobody.
fn have_left_the_service(cluster: &Cluster, pods: &[Value]) {
    for pod in pods {
        let address = pod["status"]["podIP"].as_str().expect("an address");
        let gone =
            format!("rules=$(nft list table ip kube-proxy) && ! grep -qwF {address} <<<\"$rules\"");
        eventually(
            "the Service has left a pod",
            Duration::from_secs(20),
            || cluster.try_on_node(&["bash", "-c", &gone]).then_some(()),
        );
    }
}

fn agent(pod: &Value) -> Option<&Value> {
    let mut first = pod["spec"]["initContainers"].as_array()?.iter();
    first.find(|container| container["name"] == "tp-agent-sidecar")
}

/// Who answers a request to the Service, or to a pod.
fn get(cluster: &Cluster, authority: &str, header: &str) -> String {
    let url = format!("http://{authority}/hostname");
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

/// Requests to the Service, several, since it chooses a pod for each.
#[track_caller]
fn each_goes_where_it_belongs(cluster: &Cluster, namespace: &Namespace<'_>) {
    let service = namespace.value("svc/web", ".spec.clusterIP");
    for _ in 0..8 {
        assert_eq!(get(cluster, &service, MINE), ANSWER);
        assert!(get(cluster, &service, OTHERS).starts_with("web-"));
    }
}

fn sidecar<'a>(workstation: &Workstation<'a>) -> workstation::Intercept<'a> {
    let matchers = json!([{ "header": { "name": "x-tp-user", "exact": "ada" } }]);
    let mut intercept = workstation.intercept("Deployment", "web", 8080, &matchers);
    intercept.object["spec"]["attach"] = json!("sidecar");
    intercept
}

#[test]
fn a_pod_that_may_have_no_privilege_is_made_with_the_agent() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    with_webhook(&cluster);
    for level in ["restricted", "baseline"] {
        let namespace = web(&cluster, level, true);
        let spec = || namespace.value("deploy/web", ".spec");
        let (before, pods) = (spec(), pods(&cluster, &namespace));
        assert_eq!(pods.len(), 2);
        for pod in &pods {
            let agent = agent(pod).unwrap_or_else(|| panic!("{level}: {pod:#}"));
            assert_eq!(agent["restartPolicy"], "Always");
            assert_eq!(agent["ports"][0]["name"], "http");
            let app = &pod["spec"]["containers"][0];
            assert_eq!(app["readinessProbe"]["httpGet"]["port"], 8080);
            // The pod's token is in the application, and nothing in its place in the agent.
            let mounted = |container: &Value| container["volumeMounts"][0]["name"].to_string();
            assert!(mounted(app).contains("kube-api-access"), "{app}");
            assert_eq!(mounted(agent), "\"tp-agent-no-token\"");
            assert_eq!(agent["volumeMounts"].as_array().map(Vec::len), Some(1));
        }
        let service = namespace.value("svc/web", ".spec.clusterIP");
        assert!(
            get(&cluster, &service, MINE).starts_with("web-"),
            "nobody intercepts"
        );
        let workstation = Workstation::connect(&cluster, &namespace.name);
        let intercept = sidecar(&workstation);

        let took = intercept.ready();

        eprintln!("{level}: ready after {took:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
        each_goes_where_it_belongs(&cluster, &namespace);
        assert_eq!(spec(), before, "the Deployment is as it was");
        // By its number the application is reached past the agent, as its probes are.
        let address = pods[0]["status"]["podIP"].as_str().expect("an address");
        let direct = get(&cluster, &format!("{address}:8080"), MINE);
        assert_eq!(Some(direct.as_str()), pods[0]["metadata"]["name"].as_str());

        intercept.delete();
        let limit = Duration::from_secs(2);
        eventually("all requests are the application's", limit, || {
            let mut answers = (0..4).map(|_| get(&cluster, &service, MINE));
            answers
                .all(|answer| answer.starts_with("web-"))
                .then_some(())
        });
    }
}

#[test]
fn an_agent_that_is_killed_is_started_again_and_takes_its_routes_back() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    with_webhook(&cluster);
    let namespace = web(&cluster, "restricted", true);
    let workstation = Workstation::connect(&cluster, &namespace.name);
    let intercept = sidecar(&workstation);
    intercept.ready();
    each_goes_where_it_belongs(&cluster, &namespace);
    let uids = pods(&cluster, &namespace)
        .iter()
        .map(|pod| pod["metadata"]["uid"].as_str().expect("a uid").to_owned() + " ")
        .collect::<String>();
    let agents = cluster.agent_processes(&uids);
    assert_eq!(agents.len(), 2, "one process a pod");

    // One of them: a Service refuses while none of its pods is ready.
    tool(Command::new("kill").args(["-9", &agents[0].to_string()]));

    let killed = Instant::now();
    let service = namespace.value("svc/web", ".spec.clusterIP");
    let ask = format!("curl -s --fail --max-time 2 -H '{MINE}' http://{service}/hostname");
    // Often enough that the Service has chosen both.
    let answered = format!(
        "for _ in $(seq 20); do [ \"$({ask})\" = {} ] || exit 1; done",
        ANSWER.trim()
    );
    eventually("the agent is back", Duration::from_secs(20), || {
        let again = cluster.agent_processes(&uids);
        let new = again.len() == 2 && !again.contains(&agents[0]);
        (new && cluster.try_on_node(&["bash", "-c", &answered])).then_some(())
    });
    eprintln!("back after {:?}", killed.elapsed());
    intercept.becomes("ready again", |status| {
        condition(status)["status"] == "True"
    });
    each_goes_where_it_belongs(&cluster, &namespace);
}

#[test]
fn connections_from_before_the_intercept_are_counted_and_closed_once_idle_where_that_is_asked_for()
{
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    with_webhook(&cluster);
    let namespace = web(&cluster, "restricted", true);
    let service = namespace.value("svc/web", ".spec.clusterIP");
    let hold = format!("exec 3<>/dev/tcp/{service}/80; echo open; cat <&3");
    let mut before = cluster
        .node_command(&["bash", "-c", &hold])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("bash starts");
    let mut line = [0; 5];
    let stdout = before.stdout.as_mut().expect("stdout is a pipe");
    std::io::Read::read_exact(stdout, &mut line).expect("it has connected");
    let workstation = Workstation::connect(&cluster, &namespace.name);
    let intercept = sidecar(&workstation);

    intercept.ready();

    intercept.becomes("counted", |status| status["openBefore"] == 1);
    assert!(
        before.try_wait().expect("the child is ours").is_none(),
        "nobody asked to close it"
    );
    let object = format!("intercepts.tp.dev/{}", intercept.name);
    let patch = r#"{"spec":{"closeIdle":true}}"#;
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
fn pods_without_the_agent_are_named_and_made_anew_when_their_user_says_so() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    with_webhook(&cluster);
    let namespace = web(&cluster, "restricted", false);
    let ada = User::who_intercepts(&cluster, "ada", &namespace);
    let laptop = Laptop::of(&cluster, &ada);
    let _tp = laptop.connect(&[]);
    let intercept = |more: &[&str]| {
        let flags = [
            "intercept",
            "web",
            "-p",
            "1",
            "--http-header",
            "x-tp-user=ada",
        ];
        laptop.tp(&[&flags[..], more].concat())
    };
    let without = pods(&cluster, &namespace);
    assert!(without.iter().all(|pod| agent(pod).is_none()));

    // What the level does not let in by itself is named with the way that it does.
    let refused = intercept(&[]);
    assert!(
        refused.err().contains("restricted") && refused.err().contains("--attach sidecar"),
        "{}",
        refused.report()
    );
    let refused = intercept(&["--attach", "sidecar"]);
    assert!(
        refused.err().contains("--restart-pods"),
        "{}",
        refused.report()
    );
    // It is done with the user's own rights.
    let refused = intercept(&["--attach", "sidecar", "--restart-pods"]);
    assert!(
        refused.err().contains("may not patch deployments.apps"),
        "{}",
        refused.report()
    );
    ada.grant(&cluster, &namespace.name, "edit");
    intercept(&["--attach", "sidecar", "--restart-pods"]).ok();

    assert!(
        pods(&cluster, &namespace)
            .iter()
            .all(|pod| agent(pod).is_some())
    );
    have_left_the_service(&cluster, &without);
    let service = namespace.value("svc/web", ".spec.clusterIP");
    let answer = cluster.on_node(&[
        "curl",
        "-sS",
        "-i",
        "-H",
        MINE,
        &format!("http://{service}/hostname"),
    ]);
    // Nobody listens on the laptop's port 1.
    assert!(
        answer.to_lowercase().contains("x-tp-fallback: 1"),
        "{answer}"
    );
    assert!(get(&cluster, &service, OTHERS).starts_with("web-"));

    laptop.tp(&["leave", "web", "--restart-pods"]).ok();
    assert!(
        pods(&cluster, &namespace)
            .iter()
            .all(|pod| agent(pod).is_none())
    );
    let label = namespace.value("deploy/web", ".spec.template.metadata.labels");
    assert_eq!(label, r#"{"app":"web"}"#);

    // A Service that leads by number goes past every sidecar.
    let by_number = r#"{"spec":{"ports":[{"name":"http","port":80,"targetPort":8080}]}}"#;
    cluster.kubectl(&[
        "-n",
        &namespace.name,
        "patch",
        "service",
        "web",
        "--type=merge",
        "-p",
        by_number,
    ]);
    let refused = intercept(&["--attach", "sidecar"]);
    assert!(refused.err().contains("targetPort"), "{}", refused.report());
}

/// A pod that asks for the agent.
const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: $NAME, namespace: $NS, labels: {tp.dev/sidecar: http}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: app, image: "lab.local/busybox:1.35", command: [sleep, "1000"], ports: [{name: http, containerPort: 80}]}]
"#;

/// Makes a pod; says how long that took and whether it has the agent.
fn made(cluster: &Cluster, namespace: &Namespace<'_>, name: &str) -> (Duration, bool) {
    let start = Instant::now();
    namespace.apply(&POD.replace("$NAME", name));
    let took = start.elapsed();
    let object: Value = serde_json::from_str(&cluster.kubectl(&[
        "-n",
        &namespace.name,
        "get",
        "pod",
        name,
        "-o",
        "json",
    ]))
    .expect("kubectl writes JSON");
    eprintln!(
        "{name}: made within {took:?}, agent: {}",
        agent(&object).is_some()
    );
    (took, agent(&object).is_some())
}

/// Longest delay of a pod's creation, kubectl's own time included.
const DELAY: Duration = Duration::from_secs(2);

#[test]
fn pods_are_made_in_time_when_the_webhook_is_down_slow_or_somebody_else() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    with_webhook(&cluster);
    let namespace = cluster.namespace("sidecar");
    let webhook =
        |arguments: &[&str]| cluster.kubectl(&[&["-n", "tp-system"][..], arguments].concat());
    let configuration = "mutatingwebhookconfigurations/tp-webhook";
    let bundle = "/webhooks/0/clientConfig/caBundle";
    let replicas = namespace_value(&cluster, "deploy/tp-webhook", ".spec.replicas");
    let authority = namespace_value(
        &cluster,
        configuration,
        ".webhooks[0].clientConfig.caBundle",
    );
    assert!(made(&cluster, &namespace, "before").1);

    // Stopped processes still have their connections accepted, by the kernel.
    let processes: Vec<_> = cluster
        .webhook_processes()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(!processes.is_empty());
    tool(Command::new("kill").arg("-STOP").args(&processes));
    let (slow, with_agent) = made(&cluster, &namespace, "slow");
    tool(Command::new("kill").arg("-CONT").args(&processes));
    assert!(
        slow < DELAY && slow > Duration::from_millis(900) && !with_agent,
        "{slow:?}"
    );
    with_webhook(&cluster);

    let other = tp_tunnel::Identity::generate().to_pem();
    let other = &other[other.find("-----BEGIN CERTIFICATE").expect("it has one")..];
    let patch = json!([{ "op": "replace", "path": bundle, "value": base64(other) }]).to_string();
    cluster.kubectl(&["patch", configuration, "--type=json", "-p", &patch]);
    let mut number = 0;
    eventually("the API server knows", Duration::from_secs(10), || {
        number += 1;
        let (took, with_agent) = made(&cluster, &namespace, &format!("stranger-{number}"));
        assert!(took < DELAY, "{took:?}");
        (!with_agent).then_some(())
    });
    let patch = json!([{ "op": "replace", "path": bundle, "value": authority }]).to_string();
    cluster.kubectl(&["patch", configuration, "--type=json", "-p", &patch]);

    webhook(&["scale", "deploy/tp-webhook", "--replicas=0"]);
    eventually("its pods are gone", Duration::from_secs(60), || {
        let pods = webhook(&[
            "get",
            "pods",
            "-l",
            "app.kubernetes.io/component=webhook",
            "-o",
            "name",
        ]);
        pods.is_empty().then_some(())
    });
    let (down, with_agent) = made(&cluster, &namespace, "down");
    assert!(down < DELAY && !with_agent, "{down:?}");

    webhook(&[
        "scale",
        "deploy/tp-webhook",
        &format!("--replicas={replicas}"),
    ]);
    with_webhook(&cluster);
    let mut number = 0;
    eventually("it is asked again", Duration::from_secs(20), || {
        number += 1;
        made(&cluster, &namespace, &format!("after-{number}"))
            .1
            .then_some(())
    });
}

fn namespace_value(cluster: &Cluster, object: &str, path: &str) -> String {
    cluster.value("tp-system", object, path)
}

fn base64(text: &str) -> String {
    use std::io::Write as _;
    let mut child = Command::new("base64")
        .arg("-w0")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("base64 starts");
    let mut input = child.stdin.take().expect("stdin is a pipe");
    input.write_all(text.as_bytes()).expect("it reads");
    drop(input);
    let output = child.wait_with_output().expect("base64 ends");
    String::from_utf8(output.stdout).expect("base64 is text")
}

#[test]
fn whoever_reaches_or_breaks_the_webhook_has_no_right_by_it() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    with_webhook(&cluster);
    let account = "--as=system:serviceaccount:tp-system:tp-webhook";
    let may = |account: &str, verb: &str, what: &str| {
        cluster
            .try_kubectl(&["auth", "can-i", verb, what, "-A", account])
            .succeeded()
    };
    for (verb, what) in [
        ("get", "pods"),
        ("list", "secrets"),
        ("get", "configmaps"),
        ("get", "intercepts.tp.dev"),
        ("create", "pods"),
    ] {
        assert!(!may(account, verb, what), "{verb} {what}");
    }
    // Nor can the manager change what the API server asks, or make pods.
    let manager = "--as=system:serviceaccount:tp-system:tp-manager";
    for (verb, what) in [
        ("update", "mutatingwebhookconfigurations"),
        ("patch", "mutatingwebhookconfigurations"),
        ("create", "pods"),
        ("patch", "deployments"),
    ] {
        assert!(!may(manager, verb, what), "{verb} {what}");
    }
    let pods = cluster.kubectl(&[
        "-n",
        "tp-system",
        "get",
        "pods",
        "-l",
        "app.kubernetes.io/component=webhook",
        "-o",
        "json",
    ]);
    assert!(!pods.contains("kube-api-access"), "no token is mounted");
    for pid in cluster.webhook_processes() {
        let listening =
            tool(Command::new("nsenter").args(["-t", &pid.to_string(), "-n", "ss", "-Hltun"]));
        let ports: Vec<_> = listening.lines().collect();
        assert!(ports.len() == 1 && ports[0].contains(":9443"), "{ports:?}");
    }

    // Nonsense from any pod is refused, and nothing comes of a review that nobody asked for.
    let service = namespace_value(&cluster, "svc/tp-webhook", ".spec.clusterIP");
    let ask = |arguments: &[&str]| {
        let status = [
            "curl",
            "-sk",
            "--max-time",
            "5",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
        ];
        let url = format!("https://{service}/pods");
        cluster.on_node(&[&status[..], arguments, &[&url]].concat())
    };
    assert_eq!(ask(&[]), "405");
    assert_eq!(ask(&["-d", "nonsense"]), "400");
    assert_eq!(
        ask(&[
            "-d",
            r#"{"request":{"uid":"u","operation":"CREATE","object":{"spec":"x"}}}"#
        ]),
        "400"
    );
    assert_eq!(
        ask(&[
            "-d",
            r#"{"request":{"uid":"u","operation":"CREATE","object":null}}"#
        ]),
        "200"
    );
    assert_eq!(
        ask(&[
            "-H",
            "content-type: application/json",
            "-d",
            &format!("\"{}\"", "x".repeat(100_000))
        ]),
        "400"
    );
}
