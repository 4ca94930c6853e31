//! Intercepts under load, while things come, go and die on the cluster's side: agents, workers, pods, the application, the
//! manager. Every request is in the ledgers, and none is lost, executed twice, or answered by somebody it was not for. The
//! workstation's side is in `intercept_faults.rs`.

use std::time::Duration;

use tp_tests::ledger::now;
use tp_tests::ledger::scene::{FLOWS, PER_SECOND, Pods, Scene, kill_all, seeds, signal};
use tp_tests::{Cluster, eventually};

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
        let report = scene.report(load, Some(killed..back));
        report.assert_clean(seed, u64::from(2 * FLOWS));
        assert_eq!(report.errors_after(killed + 500), 0);
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

        let back = scene.until_mine_return(Duration::from_secs(30));
        scene.book.see_sent(200);
        let report = scene.report(load, Some(killed..back));
        // For at most 3 s, until the kernel's set has expired, new connections are refused by nobody's port; each flow
        // that has lost its own tries at its pace.
        let most = u64::from(2 * PER_SECOND) * 7 / 2;
        report.assert_clean(seed, most);
        assert_eq!(report.errors_after(killed + 3_500), 0);
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
        // Mine go to the laptop all the time, whoever has died behind the agent.
        let report = scene.report(load, None);
        let refused_for = took.as_secs() + 1;
        report.assert_clean(seed, u64::from(PER_SECOND) * refused_for);
        assert_eq!(report.mine_failed, 0);
        assert_eq!(report.errors_after(back), 0);
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

fn is_worker(pid: u32) -> bool {
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split('\0').any(|argument| argument == "--worker")
}
