//! The ground the other tests stand on: if one of these fails, what they say means nothing.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tp_tests::{Cluster, Laptop, Link, User};

#[test]
fn a_laptop_reaches_the_api_server_and_no_pod() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let namespace = cluster.namespace("harness");
    namespace.probe("web");
    let laptop = Laptop::admin(&cluster);

    laptop.kubectl(&["get", "namespaces"]).ok();

    for (object, path) in [("pod/web", ".status.podIP"), ("svc/web", ".spec.clusterIP")] {
        let address = namespace.value(object, path);
        let url = format!("http://{address}/");
        let direct = laptop.run("curl", &["--silent", "--max-time", "1", &url]);
        assert!(
            !direct.succeeded(),
            "{object} must be out of reach: {}",
            direct.report()
        );
    }
    // And it is not the server's fault.
    assert!(
        namespace
            .exec("web", &["/probe", "raw", "127.0.0.1:13", "1"])
            .contains("hello")
    );
}

#[test]
fn the_kubeconfig_of_the_laptop_is_worth_nothing_elsewhere() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let kubeconfig = cluster.directory().join("kubeconfig-laptop");
    let mut outside = cluster.kubectl_command(&["get", "namespaces", "--request-timeout=3s"]);

    let output = outside.env("KUBECONFIG", kubeconfig).output().unwrap();

    assert!(!output.status.success());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("node-1"),
        "{output:?}"
    );
}

#[test]
fn users_have_the_rights_they_were_given_and_no_other() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let namespace = cluster.namespace("harness");
    let user = User::without_rights(&cluster, "harness-user", &namespace.name);
    let laptop = Laptop::of(&cluster, &user);

    let refused = laptop.kubectl(&["get", "pods"]).exits(1);
    assert!(
        refused
            .err()
            .contains(&format!(r#"User "{}" cannot list"#, user.name)),
        "{}",
        refused.report()
    );

    user.grant(&cluster, &namespace.name, "view");
    tp_tests::eventually("the right is known", Duration::from_secs(5), || {
        laptop.kubectl(&["get", "pods"]).succeeded().then_some(())
    });

    user.revoke(&cluster, &namespace.name, "view");
    tp_tests::eventually("the right is gone", Duration::from_secs(5), || {
        (!laptop.kubectl(&["get", "pods"]).succeeded()).then_some(())
    });
}

#[test]
fn the_link_delays_and_cuts() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let laptop = Laptop::admin(&cluster);
    let mut link = Link::before_api_server(&laptop, 1);
    let time = || {
        let start = Instant::now();
        laptop.kubectl(&["get", "--raw", "/readyz"]).ok();
        start.elapsed()
    };
    time();

    link.order("delay 100");
    let delayed = time();
    // TLS and one request: two round trips.
    assert!(delayed >= Duration::from_millis(400), "{delayed:?}");

    link.order("delay 0");
    link.order("cut rst");
    laptop.kubectl(&["get", "--raw", "/readyz"]).exits(1);
    link.order("heal");
    laptop.kubectl(&["get", "--raw", "/readyz"]).ok();
}

#[test]
fn nothing_of_a_laptop_survives_it() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let laptop = Laptop::admin(&cluster);
    let (home, uid) = (laptop.path("home"), laptop.uid());
    let mut sleeper = laptop.command("sleep", &["100"]).spawn().unwrap();
    tp_tests::eventually("it sleeps", Duration::from_secs(5), || {
        laptop
            .processes()
            .iter()
            .any(|(_, line)| line.starts_with("sleep"))
            .then_some(())
    });

    drop(laptop);

    sleeper.wait().unwrap();
    assert!(!home.exists());
    let left = Command::new("pgrep")
        .args(["-u", &uid.to_string()])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&left.stdout), "");
}

#[test]
fn nothing_of_a_laptop_survives_a_runner_that_is_killed() {
    let Some(_cluster) = Cluster::shared() else {
        return;
    };
    let mut runner = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "a_runner_to_be_killed",
            "--nocapture",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(runner.stdout.take().unwrap()).lines();
    let said = lines.find_map(|line| Some(line.unwrap().split_once("uid ")?.1.to_owned()));
    let uid = said.expect("the runner says its laptop's uid");

    runner.kill().unwrap();
    runner.wait().unwrap();

    let folders = format!("tp-laptop-{}-", runner.id());
    tp_tests::eventually("nothing of it is left", Duration::from_secs(10), || {
        // What has ended may wait for init, whose business that is.
        let alive = ["--runstates", "D,I,R,S,T", "-u", &uid];
        let processes = Command::new("pgrep").args(alive).output().unwrap();
        let left = std::fs::read_dir(std::env::temp_dir()).unwrap().flatten();
        let folder = left
            .map(|entry| entry.file_name())
            .any(|name| name.to_string_lossy().starts_with(&folders));
        (processes.stdout.is_empty() && !folder).then_some(())
    });
}

#[test]
#[ignore = "it is the runner that another test starts and kills"]
fn a_runner_to_be_killed() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let laptop = Laptop::admin(&cluster);
    // As a daemon is: in a session of its own.
    let mut sleeper = laptop.command("setsid", &["sleep", "300"]).spawn().unwrap();
    tp_tests::eventually("it sleeps", Duration::from_secs(5), || {
        let processes = laptop.processes();
        processes
            .iter()
            .any(|(_, line)| line.starts_with("sleep"))
            .then_some(())
    });
    println!("uid {}", laptop.uid());
    sleeper.wait().unwrap();
}
