//! `tp install` and `tp uninstall`: what they make, what they say when it does not work, and what they leave behind.
//! Alone on the cluster, since they change what every other test uses.

use std::time::Duration;

use tp_tests::manager::IMAGE;
use tp_tests::{Cluster, Laptop, User};

/// The cluster without a manager.
fn bare_cluster() -> Option<Cluster> {
    let cluster = Cluster::exclusive()?;
    cluster.forget_manager();
    cluster.load_manager_image();
    let admin = Laptop::admin(&cluster);
    admin.tp(&["uninstall", "--everything"]).ok();
    Some(cluster)
}

#[test]
fn uninstall_everything_leaves_the_cluster_as_it_was() {
    let Some(cluster) = bare_cluster() else {
        return;
    };
    let namespace = cluster.namespace("install");
    namespace.probe("web");
    let admin = Laptop::admin(&cluster);
    let user = User::without_rights(&cluster, "ada", &namespace.name);
    let laptop = Laptop::of(&cluster, &user);
    let before = cluster.objects();

    let install = admin
        .tp(&["install", "--image", IMAGE, "--replicas", "2"])
        .ok();
    assert!(
        install.took < Duration::from_secs(20),
        "{}",
        install.report()
    );
    assert_eq!(
        cluster.manager_pods().len(),
        2,
        "install returns when the replicas are ready"
    );
    cluster.let_developers_connect();
    user.grant(&cluster, &namespace.name, "tp-user");
    let tp = laptop.connect(&[]);
    assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
    let administrators = admin.connect(&["-n", &namespace.name]);
    assert_eq!(administrators.get("http://web/"), "hello-from-probe\n");
    user.revoke(&cluster, &namespace.name, "tp-user");

    admin.tp(&["uninstall", "--everything"]).ok();

    let mut after = Vec::new();
    // The API server takes a moment to forget a group of resources.
    for _ in 0..20 {
        after = cluster.objects();
        if after == before {
            break;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(after, before);
    let status = admin.tp(&["status", "--output", "json"]).json();
    assert_eq!(
        status["connections"],
        serde_json::json!([]),
        "the administrator's own connection has ended"
    );
}

#[test]
fn a_second_install_changes_nothing_and_an_upgrade_keeps_the_key() {
    let Some(cluster) = bare_cluster() else {
        return;
    };
    let admin = Laptop::admin(&cluster);
    admin.tp(&["install", "--image", IMAGE]).ok();
    let key = || cluster.value("tp-system", "configmap/tp-manager", ".data.manager\\.json");
    let generation = || cluster.value("tp-system", "deploy/tp-manager", ".metadata.generation");
    let key_hash = |text: String| -> String {
        let locator: serde_json::Value = serde_json::from_str(&text).unwrap();
        locator["keyHash"].as_str().unwrap().to_owned()
    };
    let (first_key, first_generation) = (key_hash(key()), generation());

    admin.tp(&["install", "--image", IMAGE]).ok();
    assert_eq!(generation(), first_generation);

    admin
        .tp(&["upgrade", "--image", IMAGE, "--replicas", "2"])
        .ok();
    assert_eq!(cluster.manager_pods().len(), 2);
    assert_eq!(key_hash(key()), first_key, "a rollout changes no pin");
}

#[test]
fn a_dry_run_prints_what_the_api_server_accepts_and_makes_nothing() {
    let Some(cluster) = bare_cluster() else {
        return;
    };
    let admin = Laptop::admin(&cluster);
    let before = cluster.objects();

    let manifests = admin.tp(&["install", "--image", IMAGE, "--dry-run"]).ok();

    assert_eq!(cluster.objects(), before);
    admin.write_file("home/manifests.yaml", &manifests.out());
    // Objects inside a namespace that does not exist yet cannot be tried on the server; the rest is.
    let tried = admin
        .kubectl(&[
            "apply",
            "--dry-run=client",
            "-o",
            "name",
            "-f",
            "manifests.yaml",
        ])
        .ok()
        .out();
    for object in [
        "namespace/tp-system",
        "customresourcedefinition.apiextensions.k8s.io/sessions.tp.dev",
        "deployment.apps/tp-manager",
        "clusterrole.rbac.authorization.k8s.io/tp-user",
        "clusterrole.rbac.authorization.k8s.io/tp-egress",
        "clusterrole.rbac.authorization.k8s.io/tp-admin",
        "validatingadmissionpolicy.admissionregistration.k8s.io/",
    ] {
        assert!(tried.contains(object), "{object} is missing in\n{tried}");
    }
    let pod_rules = manifests.out();
    for rule in [
        "runAsNonRoot",
        "readOnlyRootFilesystem",
        "allowPrivilegeEscalation",
        "seccompProfile",
    ] {
        assert!(pod_rules.contains(rule), "{rule}");
    }
}

#[test]
fn an_image_that_cannot_be_pulled_is_named_at_once() {
    let Some(cluster) = bare_cluster() else {
        return;
    };
    let admin = Laptop::admin(&cluster);

    let run = admin
        .tp(&["install", "--image", "lab.local/no-such-image:1"])
        .exits(1);

    assert!(run.took < Duration::from_secs(12), "{}", run.report());
    assert!(
        run.err().contains("lab.local/no-such-image:1"),
        "{}",
        run.report()
    );
    assert!(run.err().contains("hint: "), "{}", run.report());
    admin.tp(&["uninstall", "--everything"]).ok();
}

#[test]
fn a_quota_that_forbids_the_pods_is_named_at_once() {
    let Some(cluster) = bare_cluster() else {
        return;
    };
    let namespace = cluster.namespace("tight");
    namespace.apply(
        "apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: none, namespace: $NS}\nspec: {hard: {pods: \"0\"}}\n",
    );
    let admin = Laptop::admin(&cluster);

    let run = admin
        .tp(&[
            "install",
            "--image",
            IMAGE,
            "--manager-namespace",
            &namespace.name,
        ])
        .exits(1);

    assert!(run.took < Duration::from_secs(12), "{}", run.report());
    assert!(run.err().contains("quota"), "{}", run.report());
    admin
        .tp(&[
            "uninstall",
            "--everything",
            "--manager-namespace",
            &namespace.name,
        ])
        .ok();
}

#[test]
fn someone_without_the_right_to_install_is_told_which_right() {
    let Some(cluster) = bare_cluster() else {
        return;
    };
    let namespace = cluster.namespace("install");
    let laptop = Laptop::of(
        &cluster,
        &User::without_rights(&cluster, "eve", &namespace.name),
    );
    let before = cluster.objects();

    let run = laptop.tp(&["install", "--image", IMAGE]).exits(1);

    assert!(run.took < Duration::from_secs(5), "{}", run.report());
    assert!(run.err().contains("namespaces"), "{}", run.report());
    assert_eq!(cluster.objects(), before, "nothing half-made may stay");
}

#[test]
fn connecting_without_a_manager_names_both_ways_to_get_one() {
    let Some(cluster) = bare_cluster() else {
        return;
    };
    let admin = Laptop::admin(&cluster);

    let run = admin.tp(&["connect", "--listen", "127.0.0.1:0"]).exits(1);

    assert!(run.took < Duration::from_secs(5), "{}", run.report());
    assert!(run.err().contains("tp install"), "{}", run.report());
    assert!(run.err().contains("--temporary"), "{}", run.report());
    assert_eq!(admin.processes(), []);
}
