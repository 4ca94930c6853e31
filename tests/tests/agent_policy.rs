//! What the API server lets the manager's account add to a pod: the agent, and nothing else.

use std::process::Command;

use serde_json::{Value, json};
use tp_tests::Cluster;
use tp_tests::manager::IMAGE;
use tp_tests::process::tool;

#[test]
fn a_stolen_manager_account_adds_nothing_but_the_agent() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("policy");
    namespace.probe("web");
    namespace.apply("apiVersion: v1\nkind: Pod\nmetadata: {name: shared, namespace: $NS}\nspec: {hostPID: true, terminationGracePeriodSeconds: 0, containers: [{name: probe, image: \"lab.local/probe:lab\"}]}\n");
    let token = cluster.kubectl(&["-n", "tp-system", "create", "token", "tp-manager"]);
    let api = Api {
        cluster: &cluster,
        token,
    };
    let agent = json!({
        "name": "tp-agent-9", "image": IMAGE, "command": ["/tp-agent"], "args": ["--version"],
        "env": [{ "name": "TP_AGENT_SEED", "value": "00" }],
        "securityContext": {
            "runAsUser": 0, "allowPrivilegeEscalation": false, "seccompProfile": { "type": "RuntimeDefault" },
            "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN", "SETUID", "SETGID"] },
        },
    });
    let add = |namespace: &str, pod: &str, change: Value| {
        let mut container = agent.clone();
        merge(&mut container, change);
        let path =
            format!("/api/v1/namespaces/{namespace}/pods/{pod}/ephemeralcontainers?dryRun=All");
        api.patch(
            &path,
            &json!({ "spec": { "ephemeralContainers": [container] } }),
        )
    };

    // The agent as it is goes in, so what follows is refused for what it is.
    let (code, answer) = add(&namespace.name, "web", json!({}));
    assert_eq!(code, 200, "{answer}");
    for (what, change) in [
        ("a name", json!({ "name": "debugger" })),
        ("an image", json!({ "image": "lab.local/probe:lab" })),
        ("a program", json!({ "command": ["/tp-manager"] })),
        (
            "privilege",
            json!({ "securityContext": { "privileged": true } }),
        ),
        (
            "escalation",
            json!({ "securityContext": { "allowPrivilegeEscalation": true } }),
        ),
        (
            "a capability",
            json!({ "securityContext": { "capabilities": { "add": ["NET_ADMIN", "SYS_ADMIN"] } } }),
        ),
        (
            "all default capabilities",
            json!({ "securityContext": { "capabilities": { "drop": ["KILL"] } } }),
        ),
        (
            "no seccomp",
            json!({ "securityContext": { "seccompProfile": { "type": "Unconfined" } } }),
        ),
        (
            "unmasked proc",
            json!({ "securityContext": { "procMount": "Unmasked" } }),
        ),
        (
            "a value of a Secret",
            json!({ "env": [{ "name": "TP_AGENT_SEED", "value": null,
            "valueFrom": { "secretKeyRef": { "name": "s", "key": "k" } } }] }),
        ),
        (
            "all values of a Secret",
            json!({ "envFrom": [{ "secretRef": { "name": "s" } }] }),
        ),
        (
            "a mount",
            json!({ "volumeMounts": [{ "name": "v", "mountPath": "/v" }] }),
        ),
        (
            "the application's processes",
            json!({ "targetContainerName": "probe" }),
        ),
    ] {
        let (code, answer) = add(&namespace.name, "web", change);
        // 422 where Kubernetes itself finds the container impossible before any policy.
        assert!(code == 403 || code == 422, "{what}: {code} {answer}");
        assert!(
            code == 422 || answer.contains("agents.tp.dev"),
            "{what}: {answer}"
        );
    }
    let (code, answer) = add(&namespace.name, "shared", json!({}));
    assert!(
        code == 403 && answer.contains("agents.tp.dev"),
        "hostPID: {answer}"
    );
    let path = "jsonpath={.items[0].metadata.name}";
    let dns = ["-n", "kube-system", "get", "pods", "-l", "k8s-app=kube-dns"];
    let dns = cluster.kubectl(&[&dns[..], &["-o", path]].concat());
    let (code, answer) = add("kube-system", &dns, json!({}));
    assert!(
        code == 403 && answer.contains("agents.tp.dev"),
        "kube-system: {answer}"
    );
    let path = format!("/api/v1/namespaces/{}/pods/web?dryRun=All", namespace.name);
    let (code, _) = api.patch(&path, &json!({ "metadata": { "labels": { "x": "y" } } }));
    assert_eq!(code, 403, "a pod may not be changed otherwise");
}

/// The API server, spoken to with a stolen token.
struct Api<'a> {
    cluster: &'a Cluster,
    token: String,
}

impl Api<'_> {
    fn patch(&self, path: &str, patch: &Value) -> (u16, String) {
        let kubeconfig = self.cluster.directory().join("kubeconfig");
        let server = self.cluster.kubectl(&[
            "config",
            "view",
            "--minify",
            "-o",
            "jsonpath={.clusters[0].cluster.server}",
        ]);
        assert!(kubeconfig.exists());
        let output = tool(Command::new("curl").args([
            "-sSk",
            "-X",
            "PATCH",
            "-H",
            &format!("Authorization: Bearer {}", self.token.trim()),
            "-H",
            "Content-Type: application/strategic-merge-patch+json",
            "-w",
            "\n%{http_code}",
            "-d",
            &patch.to_string(),
            &format!("{server}{path}"),
        ]));
        let (answer, code) = output.rsplit_once('\n').expect("curl ends with the code");
        (code.parse().expect("a status code"), answer.to_owned())
    }
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}
