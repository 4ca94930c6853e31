//! UDP passes through SOCKS5's UDP ASSOCIATE.

use std::time::Duration;

use tp_tests::process::LIMIT;
use tp_tests::{Cluster, Laptop, User};

#[test]
fn datagrams_of_every_size_come_back_unchanged() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("udp");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let service = namespace.value("svc/web", ".spec.clusterIP");
    let pod = namespace.value("pod/web", ".status.podIP");

    for (host, size) in [
        ("web", "1"),
        ("web", "0"),
        ("web", "1200"),
        ("web", "9000"),
        (service.as_str(), "512"),
        (pod.as_str(), "512"),
    ] {
        let run = tp.probe(&["udp", "PROXY", host, "7", "50", size]).ok();
        assert_eq!(run.json()["echoed"], 50, "{host} {size}: {}", run.report());
    }
}

#[test]
fn dig_asks_the_clusters_resolver() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("udp");
    namespace.probe("web");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    user.grant(&cluster, "kube-system", "tp-user");
    let laptop = Laptop::of(&cluster, &user);
    let tp = laptop.connect(&[]);
    let name = format!("web.{}.svc.cluster.local", namespace.name);

    let mut forward = tp.spawn_probe(&["udp-forward", "PROXY", "127.0.0.1:0", "10.96.0.10", "53"]);
    let listening = forward.line()["listening"].as_str().unwrap().to_owned();
    let (_, port) = listening.split_once(':').unwrap();
    let arguments = [
        "@127.0.0.1",
        "-p",
        port,
        "+short",
        "+tries=3",
        "+time=3",
        &name,
        "A",
    ];
    let run = laptop.run("dig", &arguments).ok();

    assert_eq!(
        run.out().trim(),
        namespace.value("svc/web", ".spec.clusterIP")
    );
    user.revoke(&cluster, "kube-system", "tp-user");
}

#[test]
fn many_associations_live_beside_each_other() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("udp");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);

    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..20)
            .map(|i| {
                let (tp, size) = (&tp, (100 + i).to_string());
                scope.spawn(move || {
                    tp.probe_with(&["udp", "PROXY", "web", "7", "30", &size], b"", LIMIT)
                })
            })
            .collect();
        for client in clients {
            let run = client.join().unwrap().ok();
            assert_eq!(run.json()["echoed"], 30, "{}", run.report());
        }
    });
}

#[test]
fn a_forbidden_destination_gets_no_datagram_and_the_association_goes_on() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("udp");
    let stranger = cluster.namespace("udp");
    namespace.probe("web");
    stranger.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let forbidden = stranger.value("pod/web", ".status.podIP");

    let limit = Duration::from_secs(20);
    let run = tp
        .probe_with(&["udp", "PROXY", &forbidden, "7", "1", "100"], b"", limit)
        .exits(1);
    assert!(run.out().contains("never answered"), "{}", run.report());

    tp.probe(&["udp", "PROXY", "web", "7", "5", "100"]).ok();
}
