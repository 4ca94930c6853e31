//! The manager's port and those who have no business there: they learn nothing, and disturb nobody.

use std::time::{Duration, Instant};

use serde_json::Value;
use tp_tests::process::resident_memory;
use tp_tests::{Cluster, Laptop, Namespace, User, time_in};

const PEER: &str = include_str!("hostile_peer.py");

/// A pod without any right that runs our hostile peer, and the address of one replica.
struct Attacker<'a> {
    namespace: Namespace<'a>,
    replica: String,
}

impl<'a> Attacker<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let namespace = cluster.namespace("hostile");
        namespace.server("attacker", "nginx", &[80]);
        let pod = cluster.manager_pods().remove(0);
        let replica = cluster.value("tp-system", &format!("pod/{pod}"), ".status.podIP");
        let attacker = Self { namespace, replica };
        attacker.write("/peer.py", PEER);
        attacker
    }

    fn write(&self, path: &str, text: &str) {
        // Not through stdin, of which exec may lose a short one.
        let script = format!("cat > {path} <<'END_OF_FILE'\n{text}\nEND_OF_FILE");
        self.namespace.exec("attacker", &["sh", "-c", &script]);
    }

    /// Runs one case of `hostile_peer.py`.
    fn case(&self, case: &str, key: bool) -> Value {
        let mut command = vec!["python3", "/peer.py", case, &self.replica];
        if key {
            command.extend(["/certificate", "/key"]);
        }
        let said = self.namespace.exec("attacker", &command);
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{case}: {error}: {said}"))
    }

    /// Makes a key pair in the pod and gives its hash as a Session lists it.
    fn make_key(&self) -> String {
        let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=peer \
                      -keyout /key -out /certificate 2>/dev/null; \
                      openssl x509 -in /certificate -noout -pubkey | openssl pkey -pubin -outform DER | sha256sum";
        let sum = self.namespace.exec("attacker", &["sh", "-c", script]);
        format!(
            "sha256:{}",
            sum.split_whitespace().next().unwrap_or_default()
        )
    }

    /// Lists the key in a Session of `user`, through the user's own laptop.
    fn list_key(&self, laptop: &Laptop, user: &User, hash: &str) {
        let session = format!(
            "apiVersion: tp.dev/v1alpha1\nkind: Session\nmetadata: {{name: peer, namespace: {}}}\n\
             spec: {{user: {}, groups: [developers, \"system:authenticated\"], keyHash: \"{hash}\", \
             expiresAt: \"{}\", client: {{host: pod, version: \"0\"}}}}\n",
            self.namespace.name,
            user.name,
            time_in(600)
        );
        laptop.write_file("home/session.yaml", &session);
        laptop.kubectl(&["create", "-f", "session.yaml"]).ok();
    }
}

/// A TLS alert, or nothing.
fn assert_only_an_alert(what: &str, said: &Value) {
    assert!(said["bytes"].as_u64() <= Some(64), "{what}: {said}");
    assert!(
        ["", "15"].contains(&said["record"].as_str().unwrap_or_default()),
        "{what}: {said}"
    );
    assert_ne!(said["end"], "open", "{what}: {said}");
}

#[test]
fn strangers_get_a_tls_alert_at_most() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let attacker = Attacker::new(&cluster);

    assert_only_an_alert("garbage", &attacker.case("garbage", false));
    assert_only_an_alert("plain HTTP", &attacker.case("plain-http", false));
    // No key: TLS ends before any HTTP.
    let without_key = attacker.case("request", false);
    assert_eq!(
        without_key["bytes"].as_u64().unwrap_or_default(),
        0,
        "{without_key}"
    );
    assert_ne!(without_key["end"], "open", "{without_key}");
    // Somebody who says nothing does not hold a connection for ever.
    let silent = attacker.case("silence", false);
    assert_eq!(
        (silent["bytes"].as_u64(), silent["end"] == "open"),
        (Some(0), false),
        "{silent}"
    );
    assert!(silent["ms"].as_u64() < Some(20_000), "{silent}");
}

#[test]
fn a_key_opens_the_tunnel_only_while_a_session_lists_it() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let attacker = Attacker::new(&cluster);
    let user = User::of_namespace(&cluster, "ada", &attacker.namespace);
    let laptop = Laptop::of(&cluster, &user);
    let hash = attacker.make_key();

    let unknown = attacker.case("request", true);
    assert_eq!(
        unknown["bytes"].as_u64().unwrap_or_default(),
        0,
        "not one byte of HTTP: {unknown}"
    );
    assert_ne!(unknown["end"], "open", "{unknown}");
    assert!(unknown["ms"].as_u64() < Some(5_000), "{unknown}");

    attacker.list_key(&laptop, &user, &hash);
    let listed = attacker.case("request", true);
    assert!(
        listed["bytes"].as_u64() > Some(200),
        "the same key, listed, gets the cluster's view: {listed}"
    );

    laptop.kubectl(&["delete", "sessions.tp.dev", "peer"]).ok();
    let deleted = attacker.case("request", true);
    assert_eq!(
        deleted["bytes"].as_u64().unwrap_or_default(),
        0,
        "{deleted}"
    );
    assert_ne!(deleted["end"], "open", "{deleted}");
}

#[test]
fn a_flood_of_one_session_disturbs_no_other() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let attacker = Attacker::new(&cluster);
    attacker.namespace.probe("web");
    let hash = attacker.make_key();
    let user = User::of_namespace(&cluster, "mallory", &attacker.namespace);
    let mallory = Laptop::of(&cluster, &user);
    attacker.list_key(&mallory, &user, &hash);
    let laptop = Laptop::of(
        &cluster,
        &User::of_namespace(&cluster, "ada", &attacker.namespace),
    );
    let tp = laptop.connect(&[]);
    let memory = || -> u64 {
        cluster
            .manager_processes()
            .iter()
            .map(|(_, pid)| resident_memory(*pid))
            .sum()
    };
    let (memory_before, processes_before) = (memory(), cluster.manager_processes());
    let mut flow = tp.spawn_probe(&["tcp", "PROXY", "web", "7"]);

    let floods = [
        "settings-flood",
        "ping-flood",
        "continuation",
        "empty-data",
        "rapid-reset",
        "header-bomb",
    ];
    for case in floods {
        let (mut slowest, mut largest) = (Duration::ZERO, 0);
        let said = std::thread::scope(|scope| {
            let flood = scope.spawn(|| attacker.case(case, true));
            while !flood.is_finished() {
                let start = Instant::now();
                assert_eq!(tp.get("http://web/"), "hello-from-probe\n", "{case}");
                slowest = slowest.max(start.elapsed());
                assert_eq!(
                    cluster.manager_processes(),
                    processes_before,
                    "{case} ended a replica"
                );
                largest = largest.max(memory());
            }
            flood.join().unwrap()
        });
        let grown = largest.saturating_sub(memory_before);
        println!(
            "{case}: slowest request {slowest:?}, managers grew by {grown} bytes at most, the flood saw {said}"
        );
        assert!(
            slowest < Duration::from_secs(1),
            "{case}: a request took {slowest:?}: {said}"
        );
        assert!(
            grown < 96 << 20,
            "{case}: the managers grew by {grown} bytes: {said}"
        );
    }
    flow.send(b"still the same flow");
    let (received, end) = flow.finish();
    assert_eq!(
        (String::from_utf8_lossy(&received).as_ref(), end.trim()),
        ("still the same flow", "end=fin")
    );
    assert_eq!(
        cluster.manager_processes(),
        processes_before,
        "no replica has ended"
    );
}

#[test]
fn no_right_of_the_managers_account_goes_beyond_what_it_needs() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let may = |verb: &str, resource: &str| {
        let account = "--as=system:serviceaccount:tp-system:tp-manager";
        cluster
            .try_kubectl(&["auth", "can-i", verb, resource, "-n", "default", account])
            .succeeded()
    };

    assert!(may("list", "services") && may("watch", "sessions.tp.dev"));
    for (verb, resource) in [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "pods"),
        ("create", "pods/exec"),
        ("create", "sessions.tp.dev"),
        ("update", "deployments"),
        ("impersonate", "users"),
        ("create", "rolebindings"),
    ] {
        assert!(!may(verb, resource), "the manager may {verb} {resource}");
    }
}
