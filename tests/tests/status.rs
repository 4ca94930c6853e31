//! What `tp` tells people and programs about itself.

use std::time::Duration;

use serde_json::Value;
use tp_tests::{Cluster, Laptop, User, eventually};

#[test]
fn status_shows_what_was_just_seen() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("status");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    assert_eq!(laptop.status()["connections"], serde_json::json!([]));
    let tp = laptop.connect(&["--name", "mine"]);

    let status = tp.status();
    assert_eq!(status["name"], "mine");
    assert_eq!(status["namespace"], namespace.name.as_str());
    assert_eq!(status["state"], "connected");
    assert_eq!(status["mode"], "proxy");
    assert_eq!(status["flows"], 0);
    assert_eq!(status["last_cut"], Value::Null);
    let carrier = &status["carriers"][0];
    assert_eq!(carrier["kind"], "port-forward");
    assert!(
        carrier["round_trip_ms"]
            .as_f64()
            .is_some_and(|ms| ms > 0.0 && ms < 1000.0),
        "{carrier}"
    );
    assert!(
        carrier["up_since"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z')),
        "{carrier}"
    );
    let manager = status["manager"].to_string();
    assert!(
        cluster
            .manager_pods()
            .iter()
            .any(|pod| manager.contains(pod)),
        "{manager}"
    );

    let (up, down) = (
        status["bytes_up"].as_u64().unwrap(),
        status["bytes_down"].as_u64().unwrap(),
    );
    let mut flow = tp.spawn_probe(&["tcp", "PROXY", "web", "7"]);
    flow.send(&[b'x'; 100_000]);
    let (after, _) = eventually("the bytes are counted", Duration::from_secs(5), || {
        let after = tp.status();
        let moved = |key: &str, before: u64| after[key].as_u64().unwrap() - before >= 100_000;
        (moved("bytes_up", up) && moved("bytes_down", down)).then_some(after)
    });
    assert_eq!(after["flows"], 1);
    assert_eq!(flow.finish().0.len(), 100_000);
    eventually("the flow is over", Duration::from_secs(5), || {
        (tp.status()["flows"] == 0).then_some(())
    });
}

#[test]
fn every_command_speaks_json_and_yaml() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("status");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let _tp = laptop.connect(&[]);

    for command in [
        &["status"][..],
        &["version"],
        &["list-namespaces"],
        &["env"],
    ] {
        let run = laptop.tp(&[command, &["--output", "json"]].concat()).ok();
        assert!(
            run.json().is_object() || run.json().is_array(),
            "{}",
            run.report()
        );
        let yaml = laptop
            .tp(&[command, &["--output", "yaml"]].concat())
            .ok()
            .out();
        laptop.write_file("home/out.yaml", &yaml);
        let convert = "import sys, json, yaml; print(json.dumps(yaml.safe_load(open('out.yaml'))))";
        let parsed = laptop.run("python3", &["-c", convert]);
        if parsed.succeeded() {
            assert_eq!(keys(&parsed.json()), keys(&run.json()), "{command:?}");
        } else {
            // Without a YAML parser on this machine: at least it is not JSON, and names the same keys.
            for key in keys(&run.json()) {
                assert!(
                    yaml.contains(&format!("{key}:")),
                    "{command:?}: {key} is missing in {yaml}"
                );
            }
        }
    }
    let list = laptop
        .tp(&["list-namespaces", "--output", "json"])
        .ok()
        .out();
    assert!(list.contains(&namespace.name), "{list}");
    assert!(
        !list.contains("kube-system"),
        "only what this user reaches: {list}"
    );
}

fn keys(value: &Value) -> Vec<String> {
    value
        .as_object()
        .map(|object| object.keys().cloned().collect())
        .unwrap_or_default()
}

#[test]
fn usage_errors_and_help_have_their_own_exit_codes() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let laptop = Laptop::admin(&cluster);

    let unknown = laptop.tp(&["connect", "--no-such-flag"]).exits(2);
    assert!(
        unknown.err().contains("--no-such-flag"),
        "{}",
        unknown.report()
    );
    assert_eq!(unknown.out(), "");
    laptop.tp(&["--help"]).ok();
    laptop
        .tp(&["connect", "--listen", "127.0.0.1:70000"])
        .exits(2);
    laptop
        .tp(&["connect", "--never-proxy", "10.0.0.0/99"])
        .exits(2);
    laptop.tp(&["quit"]).ok();
    laptop.tp(&["status", "nothing"]).exits(1);
}

#[test]
fn completion_is_a_script_that_the_shell_accepts() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let laptop = Laptop::admin(&cluster);

    let script = laptop.tp(&["completion", "bash"]).ok().out();
    assert!(script.contains("list-namespaces"), "{script}");
    laptop.write_file("home/completion", &script);
    laptop.run("bash", &["-n", "completion"]).ok();
}
