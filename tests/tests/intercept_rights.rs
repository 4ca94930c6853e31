//! Who may write, change and take away an Intercept, as the API server decides it.

#[expect(dead_code, reason = "each test of intercepts needs a part of it")]
mod workstation;

use std::time::Duration;

use serde_json::{Value, json};
use tp_tests::{Cluster, Laptop, Namespace, Run, User};

use workstation::{Workstation, condition};

/// A user who may intercept in the namespace, on a laptop.
fn developer(cluster: &Cluster, name: &str, namespace: &Namespace<'_>) -> (User, Laptop) {
    let user = User::who_intercepts(cluster, name, namespace);
    let laptop = Laptop::of(cluster, &user);
    (user, laptop)
}

fn groups() -> Value {
    json!(["developers", "system:authenticated"])
}

/// An Intercept of a workload that need not exist, with a name that nobody checks here.
fn intercept(namespace: &Namespace<'_>, user: &str, groups: &Value) -> Value {
    json!({
        "apiVersion": "tp.dev/v1alpha1",
        "kind": "Intercept",
        "metadata": { "name": "web-1", "namespace": namespace.name },
        "spec": {
            "name": "web", "user": user, "groups": groups, "session": "none", "port": 80,
            "workload": { "kind": "Deployment", "name": "web" },
        },
    })
}

fn create(laptop: &Laptop, object: &Value) -> Run {
    laptop.write_file("home/intercept.json", &object.to_string());
    laptop.kubectl(&["create", "-f", "intercept.json"])
}

#[track_caller]
fn refused_by(run: &Run, who: &str) {
    let said = run.err();
    assert!(!run.succeeded() && said.contains(who), "{}", run.report());
}

#[test]
fn nobody_may_intercept_in_another_name_or_touch_anothers_intercept() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("rights");
    let (ada, adas) = developer(&cluster, "ada", &namespace);
    let (_, bobs) = developer(&cluster, "bob", &namespace);
    let policy = "ValidatingAdmissionPolicy 'intercepts.tp.dev'";

    refused_by(
        &create(&bobs, &intercept(&namespace, &ada.name, &groups())),
        policy,
    );
    let masters = json!(["system:masters"]);
    refused_by(
        &create(&adas, &intercept(&namespace, &ada.name, &masters)),
        policy,
    );
    // The truth is accepted, so the refusals were for what they say.
    create(&adas, &intercept(&namespace, &ada.name, &groups())).ok();

    let object = "intercepts.tp.dev/web-1";
    let steal = r#"{"spec":{"session":"bobs"}}"#;
    refused_by(
        &bobs.kubectl(&["patch", object, "--type=merge", "-p", steal]),
        policy,
    );
    refused_by(&bobs.kubectl(&["delete", object]), policy);
    let status = r#"{"status":{"attached":7}}"#;
    refused_by(
        &bobs.kubectl(&[
            "patch",
            object,
            "--subresource=status",
            "--type=merge",
            "-p",
            status,
        ]),
        "forbidden",
    );
    for change in [
        r#"{"spec":{"port":81}}"#,
        r#"{"spec":{"workload":{"name":"other"}}}"#,
        r#"{"spec":{"matchers":[{"method":"GET"}]}}"#,
    ] {
        let run = adas.kubectl(&["patch", object, "--type=merge", "-p", change]);
        refused_by(&run, "cannot change");
    }
    adas.kubectl(&["patch", object, "--type=merge", "-p", steal])
        .ok();
    adas.kubectl(&["delete", object]).ok();
}

#[test]
fn what_the_definition_does_not_allow_is_refused_with_a_reason() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("rights");
    let (ada, adas) = developer(&cluster, "ada", &namespace);
    let with = |matchers: Value| {
        let mut object = intercept(&namespace, &ada.name, &groups());
        object["spec"]["matchers"] = matchers;
        create(&adas, &object)
    };

    let both = json!([{ "header": { "name": "x", "exact": "a", "prefix": "a" } }]);
    refused_by(&with(both), "exactly one of exact, prefix and regex");
    let none = json!([{ "path": {} }]);
    refused_by(&with(none), "exactly one of exact, prefix and regex");
    refused_by(
        &with(json!([{ "grpc": {} }])),
        "a service or a method is needed",
    );
    let two = json!([{ "method": "GET", "path": { "exact": "/" } }]);
    refused_by(&with(two), "spec.matchers[0]");
    let many: Vec<_> = (0..17)
        .map(|n| json!({ "method": format!("M{n}") }))
        .collect();
    refused_by(&with(json!(many)), "must have at most 16 items");
    let long = json!([{ "path": { "regex": "a".repeat(1025) } }]);
    refused_by(&with(long), "1024");
    with(json!([{ "path": { "regex": "/a|/b" } }])).ok();
}

#[test]
fn a_name_of_ones_own_choice_or_anothers_session_attaches_nothing() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("rights");
    namespace.probe("web");
    let workstation = Workstation::connect(&cluster, &namespace.name);
    let (ada, adas) = developer(&cluster, "ada", &namespace);
    let reason = |intercept: &workstation::Intercept<'_>, expected: &str| {
        let (status, _) =
            intercept.becomes(expected, |status| condition(status)["reason"] == expected);
        status
    };

    let mut misnamed = workstation.intercept("Pod", "web", 80, &json!([]));
    misnamed.rename("web-1");
    cluster.apply(&misnamed.object.to_string());
    reason(&misnamed, "Name");
    // Ada's own Intercept, that names the administrator's Session.
    let mut foreign = workstation.intercept("Pod", "web", 80, &json!([]));
    foreign.object["spec"]["user"] = json!(ada.name);
    foreign.object["spec"]["groups"] = groups();
    create(&adas, &foreign.object).ok();
    reason(&foreign, "Session");

    let agents = namespace.value("pod/web", ".spec.ephemeralContainers[*].name");
    assert_eq!(agents, "");
}

#[test]
fn of_many_equal_intercepts_at_once_exactly_one_is_made() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("rights");
    let token = cluster.kubectl(&["-n", "tp-system", "create", "token", "tp-manager"]);
    // An account that may create them, spoken for by fifty curls at once.
    namespace.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {name: racer, namespace: $NS}\n\
         roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: tp-intercept}\n\
         subjects: [{kind: ServiceAccount, name: tp-manager, namespace: tp-system}]\n",
    );
    let account = "system:serviceaccount:tp-system:tp-manager";
    let own = json!([
        "system:serviceaccounts",
        "system:serviceaccounts:tp-system",
        "system:authenticated"
    ]);
    let object = intercept(&namespace, account, &own);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let body = folder.path().join("intercept.json");
    std::fs::write(&body, object.to_string()).expect("our folder is writable");
    let server = cluster.kubectl(&[
        "config",
        "view",
        "--minify",
        "-o",
        "jsonpath={.clusters[0].cluster.server}",
    ]);
    let url = format!(
        "{server}/apis/tp.dev/v1alpha1/namespaces/{}/intercepts",
        namespace.name
    );
    let curl = "seq 50 | xargs -P 50 -I{} curl -sk -o /dev/null -w '%{http_code}\\n' -X POST \
                -H \"Authorization: Bearer $TOKEN\" -H 'Content-Type: application/json' -d @$BODY $URL";
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", curl])
        .env("TOKEN", token.trim())
        .env("BODY", &body)
        .env("URL", &url);

    let run = Run::new(command, b"", Duration::from_secs(60));

    let codes = run.out();
    let count = |code: &str| codes.lines().filter(|line| *line == code).count();
    assert_eq!((count("201"), count("409")), (1, 49), "{codes}");
}
