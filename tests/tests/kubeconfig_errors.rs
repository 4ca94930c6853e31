//! What goes wrong before a connection: one error, its causes, one hint, in less than five seconds.

use std::time::Duration;

use tp_tests::snapshot::assert_snapshot;
use tp_tests::{Cluster, Laptop, Run, User};

/// What the errors have in common, and their text against the snapshot.
#[track_caller]
fn assert_error(name: &str, laptop: &Laptop, namespace: &str, run: Run) {
    let run = run.exits(1);
    assert!(run.took < Duration::from_secs(5), "{}", run.report());
    assert_eq!(run.out(), "", "stdout is for data");
    let text = run.err();
    let starting = |word: &str| text.lines().filter(|line| line.starts_with(word)).count();
    assert_eq!(starting("error: "), 1, "{text}");
    assert_eq!(starting("hint: "), 1, "{text}");
    assert_eq!(laptop.processes(), [], "no daemon may stay behind");
    let home = laptop.path("home").display().to_string();
    assert_snapshot(name, &text, &[(&home, "$HOME"), (namespace, "$NAMESPACE")]);
}

#[test]
fn each_broken_kubeconfig_is_named() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("errors");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    let connect = ["connect", "--listen", "127.0.0.1:0"];
    let with = |laptop: &Laptop, more: &[&str]| laptop.tp(&[&connect, more].concat());

    let laptop = Laptop::of(&cluster, &user);
    assert_error(
        "wrong_context",
        &laptop,
        &namespace.name,
        with(&laptop, &["--context", "nowhere"]),
    );
    assert_error(
        "wrong_kubeconfig",
        &laptop,
        &namespace.name,
        with(&laptop, &["--kubeconfig", "missing"]),
    );
    assert_error(
        "no_such_namespace",
        &laptop,
        &namespace.name,
        with(&laptop, &["-n", "no-such-namespace"]),
    );

    let certificate = user
        .kubeconfig
        .lines()
        .find(|line| line.starts_with("users:"))
        .unwrap();
    let token = format!("users: [{{name: {}, user: {{token: expired}}}}]", user.name);
    let laptop = Laptop::with_kubeconfig(&cluster, &user.kubeconfig.replace(certificate, &token));
    assert_error("bad_token", &laptop, &namespace.name, with(&laptop, &[]));

    let laptop = Laptop::with_kubeconfig(&cluster, "");
    std::fs::remove_file(laptop.kubeconfig()).unwrap();
    assert_error(
        "no_kubeconfig",
        &laptop,
        &namespace.name,
        with(&laptop, &[]),
    );

    let laptop =
        Laptop::with_kubeconfig(&cluster, "apiVersion: v1\nkind: Config\nclusters: {broken");
    assert_error(
        "broken_kubeconfig",
        &laptop,
        &namespace.name,
        with(&laptop, &[]),
    );

    for (name, server) in [
        ("refused_server", "https://node-1:1"),
        ("unresolved_server", "https://no-such-host:6443"),
    ] {
        let laptop = Laptop::with_kubeconfig(
            &cluster,
            &user.kubeconfig.replace("https://node-1:6443", server),
        );
        assert_error(name, &laptop, &namespace.name, with(&laptop, &[]));
    }

    let eve = User::without_rights(&cluster, "eve", &namespace.name);
    let laptop = Laptop::of(&cluster, &eve);
    assert_error("no_right", &laptop, &namespace.name, with(&laptop, &[]));
}

#[test]
fn an_api_server_that_does_not_answer_is_given_up_in_time() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("errors");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    // Nobody has this address, so packets to it vanish.
    let laptop = Laptop::with_kubeconfig(
        &cluster,
        &user.kubeconfig.replace("//node-1:", "//10.99.0.77:"),
    );

    let run = laptop.tp(&["connect", "--listen", "127.0.0.1:0"]).exits(1);

    assert!(run.took < Duration::from_secs(5), "{}", run.report());
    assert!(run.err().contains("10.99.0.77:6443"), "{}", run.report());
    assert_eq!(laptop.processes(), []);
}

#[test]
fn a_manager_of_another_protocol_is_refused_with_the_side_to_upgrade() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("errors");
    let locator = cluster.value("tp-system", "configmap/tp-manager", ".data.manager\\.json");
    let current: serde_json::Value = serde_json::from_str(&locator).unwrap();
    let laptop = Laptop::admin(&cluster);
    let connect = [
        "connect",
        "--listen",
        "127.0.0.1:0",
        "--manager-namespace",
        &namespace.name,
    ];

    for (protocol, oldest, side) in [(99, 99, "workstation"), (0, 0, "manager")] {
        let mut other = current.clone();
        other["protocol"] = protocol.into();
        other["oldestProtocol"] = oldest.into();
        let manifest = serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "tp-manager", "namespace": namespace.name},
            "data": {"manager.json": other.to_string()},
        });
        cluster.apply(&manifest.to_string());

        let run = laptop.tp(&connect).exits(1);

        assert!(run.took < Duration::from_secs(5), "{}", run.report());
        assert!(run.err().contains("upgrade"), "{side}: {}", run.report());
        let command = if side == "manager" {
            "tp upgrade"
        } else {
            "tp"
        };
        assert!(run.err().contains(command), "{side}: {}", run.report());
        assert_eq!(laptop.processes(), []);
    }
}
