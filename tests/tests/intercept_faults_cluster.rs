//! Intercepts under load, while things come, go and die on the cluster's side: agents, workers, pods, the application, the
//! manager. Every request is in the ledgers, and none is lost, executed twice, or answered by somebody it was not for. The
//! workstation's side is in `intercept_faults.rs`.

use std::time::Duration;

use tp_tests::ledger::now;
use tp_tests::ledger::scene::{FLOWS, PER_SECOND, Pods, Scene, kill_all, seeds, signal};
use tp_tests::manager::IMAGE;
use tp_tests::{Cluster, Laptop, eventually};

#[test]
fn a_workers_death_costs_no_more_than_what_it_held() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    for seed in seeds(6) {
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(10));
        scene.intercept(local.port);
        let load = scene.load_across_attachments();
        scene.book.see_sent(200);

        let mut workers = scene.processes(&Pods::All, "tp-agent");
        workers.retain(|pid| is_worker(*pid));
        assert_eq!(workers.len(), 2, "one in each pod");
        let killed = now();
        kill_all(&workers);

        let back = scene.until_mine_return(Duration::from_secs(5));
        scene.book.see_sent(200);
        // What no worker had taken by then waits for the next one, which has no routes yet.
        let report = scene.report(load, Some(killed - ON_THE_WAY..back));
        report.assert_clean(seed, u64::from(2 * FLOWS));
        report.assert_no_error_after(seed, killed + 500);
    }
}

#[test]
fn an_agents_death_leaves_the_application_to_everybody() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    for seed in seeds(7) {
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(10));
        scene.intercept(local.port);
        let load = scene.load_across_attachments();
        scene.book.see_sent(200);

        let agents = scene.processes(&Pods::All, "tp-agent");
        assert!(agents.len() >= 4, "a parent and a worker in each pod");
        let killed = now();
        kill_all(&agents);
        let dead = now();

        let back = scene.until_mine_return(Duration::from_secs(30));
        scene.book.see_sent(200);
        let report = scene.report(load, Some(killed - ON_THE_WAY..back));
        // For at most 3 s, until the kernel's set has expired, new connections are refused by nobody's port; each flow
        // that has lost its own tries at its pace.
        let most = u64::from(2 * PER_SECOND) * 7 / 2;
        report.assert_clean(seed, most);
        report.assert_no_error_after(seed, dead + 3_500);
    }
}

#[test]
fn a_rollout_of_the_workload_costs_nobody_a_request() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    for seed in seeds(8) {
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(10));
        scene.intercept(local.port);
        let load = scene.load_across_attachments();
        scene.book.see_sent(200);

        let rolled = now();
        cluster.roll(&scene.namespace.name, "deployment/app");

        let back = scene.until_mine_return(Duration::from_secs(20));
        scene.book.see_sent(200);
        let report = scene.report(load, Some(rolled..back));
        report.assert_clean(seed, 0);
        assert!(report.mine > 100, "{} reached the laptop", report.mine);
    }
}

#[test]
fn an_application_that_restarts_under_its_agent_takes_nothing_of_mine_along() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    for seed in seeds(9) {
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(10));
        scene.intercept(local.port);
        let load = scene.load();
        scene.book.see_sent(200);

        let app = scene.processes(&Pods::First, "ledger");
        assert_eq!(app.len(), 1, "{app:?}");
        signal("-KILL", app[0]);

        let restarted = || {
            let path = ".items[*].status.containerStatuses[0]['restartCount','ready']";
            let states = scene.namespace.value("pods", path);
            let mut states: Vec<_> = states.split_whitespace().collect();
            states.sort_unstable();
            (states == ["0", "1", "true", "true"]).then_some(())
        };
        let limit = Duration::from_secs(30);
        let (_, took) = eventually("the container runs again", limit, restarted);
        eprintln!("it was back after {took:?}");
        let back = now();
        scene.book.see_sent(200);
        let report = scene.report(load, None);
        let refused_for = took.as_secs() + 1;
        report.assert_clean(seed, u64::from(PER_SECOND) * refused_for);
        // Mine go to the laptop all the time, whoever has died behind the agent. But a kept connection that had others'
        // answers ends with the application's, and what is sent at that moment ends with it (RFC 9112 §9.5).
        let crossed =
            |(_, error): &&(_, String)| error == "connection closed before message completed";
        let failed: Vec<_> = report
            .mine_failed
            .iter()
            .filter(|failed| !crossed(failed))
            .collect();
        assert!(failed.is_empty(), "seed {seed}: {failed:?}");
        assert!(report.mine_failed.len() <= FLOWS as usize, "seed {seed}");
        report.assert_no_error_after(seed, back);
    }
}

#[test]
fn the_managers_death_takes_no_request_and_no_intercept_along() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    for seed in seeds(10) {
        // The kubelet waits longer each time before it restarts a container of the same pod.
        cluster.roll("tp-system", "deployment/tp-manager");
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(10));
        scene.intercept(local.port);
        let load = scene.load();
        scene.book.see_sent(200);

        let killed = now();
        for (_, pid) in cluster.manager_processes() {
            signal("-KILL", pid);
        }

        eventually(
            "the manager is gone for the laptop's requests",
            Duration::from_secs(10),
            || {
                let since = now();
                scene.book.see_sent(40);
                let holders = scene.book.holders_of_mine(since);
                (!holders.contains("laptop")).then_some(())
            },
        );
        let back = scene.until_mine_return(Duration::from_secs(60));
        scene.book.see_sent(200);
        let report = scene.report(load, Some(killed..back));
        report.assert_clean(seed, u64::from(2 * FLOWS));
    }
}

#[test]
fn a_rollout_of_the_manager_costs_nobody_a_request() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    for seed in seeds(11) {
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(10));
        scene.intercept(local.port);
        let load = scene.load();
        scene.book.see_sent(200);

        cluster.roll("tp-system", "deployment/tp-manager");

        scene.until_mine_return(Duration::from_secs(20));
        scene.book.see_sent(200);
        // No time is excused: until the laptop is back, the application says that it is in its place.
        let report = scene.report(load, None);
        report.assert_clean(seed, 0);
        assert!(report.mine > 100, "{} reached the laptop", report.mine);
    }
}

/// The image under test by another name, as a release has it.
const NEXT: &str = "lab.local/tp:next";

#[test]
fn an_upgrade_replaces_the_agents_of_running_pods_and_costs_nobody_a_request() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    for seed in seeds(12) {
        cluster.on_node(&[
            "ctr", "-n", "k8s.io", "images", "tag", "--force", IMAGE, NEXT,
        ]);
        let _as_before = AsBefore(&cluster);
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(10));
        scene.intercept(local.port);
        let load = scene.load_across_attachments();
        scene.book.see_sent(200);
        let first = scene.processes(&Pods::All, "tp-agent");

        let upgraded = now();
        upgrade(&cluster, NEXT);

        eventually("each pod has two agents", Duration::from_secs(30), || {
            let path = ".items[*].spec.ephemeralContainers[*].image";
            let images = scene.namespace.value("pods", path);
            let mut images: Vec<_> = images.split_whitespace().collect();
            images.sort_unstable();
            (images == [IMAGE, IMAGE, NEXT, NEXT]).then_some(())
        });
        let back = scene.until_mine_return(Duration::from_secs(20));
        eventually("the old ones are gone", Duration::from_secs(40), || {
            let left = scene.processes(&Pods::All, "tp-agent");
            let gone = first.iter().all(|pid| !left.contains(pid));
            gone.then_some(())
        });
        // The rule is the new ones', whatever the old ones took along.
        let alone = now();
        scene.book.see_sent(200);
        let holders = scene.book.holders_of_mine(alone);
        let report = scene.report(load, Some(upgraded..back));
        report.assert_clean(seed, 0);
        assert!(report.mine > 50, "{} reached the laptop", report.mine);
        assert_eq!(holders.into_iter().collect::<Vec<_>>(), ["laptop"]);
    }
}

/// The manager that other tests expect, once it is dropped.
struct AsBefore<'a>(&'a Cluster);

impl Drop for AsBefore<'_> {
    fn drop(&mut self) {
        upgrade(self.0, IMAGE);
        let remove = ["ctr", "-n", "k8s.io", "images", "rm", NEXT];
        self.0.try_on_node(&remove);
    }
}

fn upgrade(cluster: &Cluster, image: &str) {
    let admin = Laptop::admin(cluster);
    let upgraded = admin.tp(&["upgrade", "--image", image]);
    if !std::thread::panicking() {
        upgraded.ok();
    }
}

/// For so long a request may have been on its way to an agent when that died, in milliseconds.
const ON_THE_WAY: u64 = 1_000;

fn is_worker(pid: u32) -> bool {
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split('\0').any(|argument| argument == "--worker")
}
