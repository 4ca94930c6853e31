//! `tp connect --temporary`: a manager for one session, with no rights but the user's own, that goes by itself.

use std::process::Command;
use std::time::Duration;

use tp_tests::manager::IMAGE;
use tp_tests::{Cluster, Laptop, Namespace, User, eventually};

/// A user who may run Jobs in the namespace and has no right of the product.
fn ordinary_user(cluster: &Cluster, namespace: &Namespace<'_>) -> User {
    cluster.load_manager_image();
    let user = User::without_rights(cluster, "tina", &namespace.name);
    user.grant(cluster, &namespace.name, "edit");
    user
}

/// What a temporary manager consists of, beside the probes `web` and `late`.
fn objects(cluster: &Cluster, namespace: &Namespace<'_>) -> String {
    let kinds =
        "jobs,pods,secrets,configmaps,serviceaccounts,services,rolebindings,networkpolicies";
    let names = cluster.kubectl(&["-n", &namespace.name, "get", kinds, "-o", "name"]);
    let ours = names
        .lines()
        .filter(|name| !name.ends_with("/web") && !name.ends_with("/late"));
    ours.map(|name| format!("{name}\n")).collect()
}

#[test]
fn it_reaches_its_namespace_and_no_other_and_leaves_nothing_behind() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let (namespace, other) = (
        cluster.namespace("temporary"),
        cluster.namespace("temporary"),
    );
    namespace.probe("web");
    other.probe("far");
    let laptop = Laptop::of(&cluster, &ordinary_user(&cluster, &namespace));
    let before = objects(&cluster, &namespace);

    let tp = laptop.connect(&["--temporary", "--image", IMAGE]);
    assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
    assert_eq!(
        tp.get(&format!("http://web.{}.svc.cluster.local/", namespace.name)),
        "hello-from-probe\n"
    );
    tp.probe(&["udp", "PROXY", "web", "7", "5", "100"]).ok();
    // A Service that is younger than its manager.
    namespace.probe("late");
    let short = format!("http://late.{}/", namespace.name);
    assert_eq!(tp.get("http://late/"), "hello-from-probe\n");
    assert_eq!(tp.get(&short), "hello-from-probe\n");
    let address = namespace.value("svc/late", ".spec.clusterIP");
    eventually("its address goes there too", Duration::from_secs(5), || {
        (tp.socks_reply(&address, 80) == 0).then_some(())
    });
    assert_eq!(
        tp.socks_reply("169.254.169.254", 80),
        tp.socks_reply("169.254.170.2", 80)
    );
    let far = other.value("pod/far", ".status.podIP");
    assert_ne!(
        tp.socks_reply(&far, 80),
        0,
        "another namespace is out of reach"
    );
    assert_ne!(objects(&cluster, &namespace), before);

    laptop.tp(&["quit"]).ok();
    eventually("nothing of it is left", Duration::from_secs(45), || {
        (objects(&cluster, &namespace) == before).then_some(())
    });
}

#[test]
fn it_disappears_when_the_workstation_dies() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let namespace = cluster.namespace("temporary");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &ordinary_user(&cluster, &namespace));
    let before = objects(&cluster, &namespace);
    let tp = laptop.connect(&["--temporary", "--image", IMAGE]);
    assert_eq!(tp.get("http://web/"), "hello-from-probe\n");

    let killed = Command::new("kill")
        .args(["-9", &laptop.daemon().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());

    eventually("nothing of it is left", Duration::from_secs(150), || {
        (objects(&cluster, &namespace) == before).then_some(())
    });
}

#[test]
fn without_the_right_to_run_a_job_the_right_is_named() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let namespace = cluster.namespace("temporary");
    let user = User::without_rights(&cluster, "eve", &namespace.name);
    let laptop = Laptop::of(&cluster, &user);

    let run = laptop
        .tp(&[
            "connect",
            "--listen",
            "127.0.0.1:0",
            "--temporary",
            "--image",
            IMAGE,
        ])
        .exits(1);

    assert!(run.took < Duration::from_secs(5), "{}", run.report());
    for word in ["create", "jobs", &namespace.name] {
        assert!(
            run.err().contains(word),
            "{word} is missing: {}",
            run.report()
        );
    }
    assert_eq!(laptop.processes(), []);
}
