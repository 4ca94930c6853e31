//! Intercepts under load, while things come, go and die on the workstation's side: every request is in the ledgers, and
//! none is lost, executed twice, or answered by somebody it was not for. The cluster's side is in
//! `intercept_faults_cluster.rs`.

use std::time::Duration;

use tp_tests::ledger::now;
use tp_tests::ledger::scene::{FLOWS, Scene, seeds, signal};
use tp_tests::{Cluster, eventually};

#[test]
fn intercepts_come_and_go_under_load_without_one_error() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let times = match std::env::var_os("TP_SOAK") {
        Some(_) => 100,
        None => 10,
    };
    let seed = 1;
    let scene = Scene::new(&cluster, seed);
    let local = scene.serve(Duration::ZERO);
    let load = scene.load_across_attachments();
    let mut without = Vec::new();
    let mut left = 0;

    for _ in 0..times {
        scene.intercept(local.port);
        // Mine from the moment the command returned. Whatever was sent before may have met either.
        without.push(left..now());
        scene.book.see_sent(60);
        left = now();
        scene.laptop.tp(&["leave", "app"]).ok();
    }

    without.push(left..u64::MAX);
    let report = scene.report(load, without);
    report.assert_clean(seed, 0);
    assert!(
        report.mine > 10 * times,
        "{} reached the laptop",
        report.mine
    );
}

#[test]
fn a_workstation_that_dies_costs_no_more_than_what_it_held() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    for seed in seeds(2) {
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(30));
        scene.intercept(local.port);
        let load = scene.load();
        scene.book.see_sent(200);

        let killed = now();
        signal("-KILL", scene.laptop.daemon());

        scene.book.see_sent(800);
        let report = scene.report(load, Some(killed..u64::MAX));
        report.assert_clean(seed, u64::from(2 * FLOWS));
        assert!(report.mine > 50, "{} reached the laptop", report.mine);
        report.assert_no_error_after(seed, killed + 3_000);
    }
}

#[test]
fn a_workstation_that_sleeps_gets_nothing_new_nothing_twice_and_nothing_that_has_failed() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    for seed in seeds(3) {
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(30));
        scene.intercept(local.port);
        let load = scene.load();
        scene.book.see_sent(200);
        let daemon = scene.laptop.daemon();

        let asleep = now();
        signal("-STOP", daemon);
        // Five seconds; a minute, longer than every lease, for one seed of many.
        let long = seed == 3 && std::env::var_os("TP_SOAK").is_some();
        for _ in 0..if long { 12 } else { 1 } {
            scene.book.see_sent(1_000);
        }
        signal("-CONT", daemon);

        // Without the user doing anything.
        let awake = scene.until_mine_return(Duration::from_secs(20));
        scene.book.see_sent(200);
        let report = scene.report(load, Some(asleep..awake));
        report.assert_clean(seed, u64::from(2 * FLOWS));
        report.assert_no_error_after(seed, asleep + 4_000);
        assert!(report.stale.is_empty(), "seed {seed}: {:?}", report.stale);
    }
}

#[test]
fn a_local_program_that_crashes_in_the_middle_of_replies_leaves_the_rest_to_the_application() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    for seed in seeds(4) {
        let scene = Scene::new(&cluster, seed);
        // Half of that is in the middle of a reply's body.
        let delay = Duration::from_millis(30);
        let mut local = scene.serve(delay);
        let port = local.port;
        scene.intercept(port);
        let load = scene.load();
        scene.book.see_sent(100);

        let crashes = 3;
        for _ in 0..crashes {
            drop(local);
            scene.book.see_sent(150);
            local = scene.book.serve(&scene.laptop, "laptop", port, delay);
            scene.until_mine_return(Duration::from_secs(5));
        }

        // No time is excused: whenever the application answers, it says that it was in the laptop's place.
        let report = scene.report(load, None);
        report.assert_clean(seed, u64::from(2 * FLOWS * crashes));
        assert!(report.fallbacks > 50, "{} fallbacks", report.fallbacks);
    }
}

#[test]
fn a_local_program_that_stalls_keeps_its_own_requests_and_nobody_elses() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    for seed in seeds(5) {
        let scene = Scene::new(&cluster, seed);
        let local = scene.serve(Duration::from_millis(30));
        scene.intercept(local.port);
        let mut load = scene.load();
        load.push(scene.requests("h1", None));
        scene.book.see_sent(200);

        let stalled = now();
        signal("-STOP", local.pid());
        eventually("it has stalled for three seconds", STALL * 2, || {
            scene.book.see_sent(20);
            (Duration::from_millis(now() - stalled) > STALL).then_some(())
        });
        signal("-CONT", local.pid());

        scene.book.see_sent(200);
        let report = scene.report(load, None);
        report.assert_clean(seed, 0);
        assert_eq!(report.fallbacks, 0, "it is slow, and it is there");
        let slowest = report.slowest_other;
        assert!(
            slowest.is_some_and(|(took, _)| took < STALL / 2),
            "seed {seed}: others waited for it: {slowest:?}"
        );
    }
}

/// Less than a client's deadline in a scene.
const STALL: Duration = Duration::from_secs(3);
