//! Kubernetes RBAC decides who reaches what: two users, two namespaces, and the world outside.

use std::time::Duration;

use tp_tests::{Cluster, Laptop, User, eventually, time_in};

#[test]
fn each_user_reaches_the_own_namespace_and_no_other() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (team_a, team_b) = (cluster.namespace("team-a"), cluster.namespace("team-b"));
    team_a.probe("web");
    team_b.probe("web");
    let ada = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &team_a));
    let bob = Laptop::of(&cluster, &User::of_namespace(&cluster, "bob", &team_b));
    let (ada, bob) = (ada.connect(&[]), bob.connect(&[]));

    for (tp, own, other) in [(&ada, &team_a, &team_b), (&bob, &team_b, &team_a)] {
        assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
        assert_eq!(
            tp.get(&format!("http://web.{}.svc/", own.name)),
            "hello-from-probe\n"
        );

        let hosts = [
            format!("web.{}.svc.cluster.local", other.name),
            other.value("svc/web", ".spec.clusterIP"),
            other.value("pod/web", ".status.podIP"),
        ];
        for host in hosts {
            assert_eq!(tp.socks_reply(&host, 80), 2, "{host}");
            let (status, details) = tp.http_connect(&format!("{host}:80"));
            assert_eq!(status, 403, "{host}: {details}");
            assert!(
                details.contains(&other.name),
                "the namespace must be named: {details}"
            );
        }
    }
}

#[test]
fn the_outside_needs_the_right_to_leave() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("team-a");
    namespace.probe("web");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    let laptop = Laptop::of(&cluster, &user);
    let tp = laptop.connect(&["--also-proxy", "10.99.0.0/24"]);
    let host = "10.99.0.1";

    // The API server's port of the node: outside of every namespace, and not forbidden in itself.
    assert_eq!(tp.socks_reply(host, 6443), 2);
    let (status, details) = tp.http_connect(&format!("{host}:6443"));
    assert_eq!(status, 403, "{details}");
    assert!(
        details.contains("egress"),
        "the missing right must be named: {details}"
    );

    user.grant(&cluster, &namespace.name, "tp-egress");
    eventually("the new right is known", Duration::from_secs(70), || {
        (tp.socks_reply(host, 6443) == 0).then_some(())
    });
}

#[test]
fn without_a_right_there_is_no_connection_and_the_right_is_named() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("team-a");
    let user = User::without_rights(&cluster, "eve", &namespace.name);
    let laptop = Laptop::of(&cluster, &user);

    let run = laptop.tp(&["connect", "--listen", "127.0.0.1:0"]).exits(1);

    let said = run.err();
    assert!(run.took < Duration::from_secs(5), "{}", run.report());
    for word in ["create", "sessions", &namespace.name] {
        assert!(said.contains(word), "{word} is missing: {}", run.report());
    }
    assert_eq!(laptop.processes(), [], "nothing half-made may stay");
    assert_eq!(
        cluster.kubectl(&[
            "-n",
            &namespace.name,
            "get",
            "sessions.tp.dev",
            "-o",
            "name"
        ]),
        ""
    );
}

#[test]
fn nobody_may_name_another_user_in_a_session() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("team-a");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    let ada = user.name.as_str();
    let laptop = Laptop::of(&cluster, &user);
    let session = |user: &str, groups: &str, expiry: &str| {
        format!(
            r#"
apiVersion: tp.dev/v1alpha1
kind: Session
metadata: {{name: forged, namespace: {}}}
spec:
  user: {user}
  groups: [{groups}]
  keyHash: "sha256:{}"
  expiresAt: "{expiry}"
  client: {{host: here, version: "0"}}
"#,
            namespace.name,
            "ab".repeat(32)
        )
    };
    let soon = time_in(600);
    let own_groups = r#"developers, "system:authenticated""#;
    let create = |manifest: String| {
        laptop.run_with(
            "sh",
            &["-c", "cat > session.yaml"],
            manifest.as_bytes(),
            Duration::from_secs(5),
        );
        laptop.kubectl(&["create", "-f", "session.yaml"])
    };

    for (user, groups, expiry, what) in [
        ("bob", own_groups, soon.as_str(), "another user"),
        (ada, r#""system:masters""#, &soon, "other groups"),
        (ada, own_groups, "2099-01-01T00:00:00Z", "too long a life"),
    ] {
        let refused = create(session(user, groups, expiry)).exits(1);
        assert!(
            refused.err().contains("ValidatingAdmissionPolicy"),
            "{what}: {}",
            refused.report()
        );
    }
    // The same with the truth in it is accepted, so the refusals above were for what they say.
    create(session(ada, own_groups, &soon)).ok();
    let patch = r#"{"spec":{"keyHash":"sha256:0000000000000000000000000000000000000000000000000000000000000000"}}"#;
    let changed = laptop.kubectl(&[
        "patch",
        "sessions.tp.dev",
        "forged",
        "--type=merge",
        "-p",
        patch,
    ]);
    assert!(
        !changed.succeeded(),
        "the key must be immutable: {}",
        changed.report()
    );
}

#[test]
fn deleting_the_session_cuts_its_flows_at_once() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("team-a");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let mut flow = tp.spawn_probe(&["tcp", "PROXY", "web", "13"]);
    flow.send(b"alive");
    eventually("the flow is open", Duration::from_secs(5), || {
        (tp.status()["flows"].as_u64() >= Some(1)).then_some(())
    });

    let start = std::time::Instant::now();
    cluster.kubectl(&["-n", &namespace.name, "delete", "sessions.tp.dev", "--all"]);
    let (received, end) = flow.wait();

    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(String::from_utf8_lossy(&received), "hello\nalive");
    assert_eq!(end.trim(), "end=rst");
}

#[test]
fn a_revoked_right_cuts_its_flows_within_a_minute_and_no_others() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (own, other) = (cluster.namespace("team-a"), cluster.namespace("team-b"));
    own.probe("web");
    other.probe("web");
    let user = User::of_namespace(&cluster, "ada", &own);
    user.grant(&cluster, &other.name, "tp-user");
    let laptop = Laptop::of(&cluster, &user);
    let tp = laptop.connect(&[]);
    // By its full name: a short one is the workstation's own again once the Services of that namespace left the view.
    let host = format!("web.{}.svc.cluster.local", other.name);
    let mut flow = tp.spawn_probe(&["tcp", "PROXY", &host, "13"]);
    flow.send(b"alive");
    let mut unconcerned = tp.spawn_probe(&["tcp", "PROXY", "web", "13"]);
    eventually("the flows are open", Duration::from_secs(5), || {
        (tp.status()["flows"].as_u64() >= Some(2)).then_some(())
    });

    let start = std::time::Instant::now();
    user.revoke(&cluster, &other.name, "tp-user");
    let (received, end) = flow.wait();

    assert!(
        start.elapsed() < Duration::from_secs(65),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(String::from_utf8_lossy(&received), "hello\nalive");
    assert_eq!(end.trim(), "end=rst");
    assert_eq!(tp.socks_reply(&host, 80), 2);
    unconcerned.send(b"still here");
    let (received, end) = unconcerned.finish();
    assert_eq!(
        (String::from_utf8_lossy(&received).as_ref(), end.trim()),
        ("hello\nstill here", "end=fin")
    );
    assert!(tp.status()["last_cut"].is_null(), "the connection went on");
}
