//! Intercepts under load, while things come, go and die: every request is in the ledgers, and none is lost, executed twice,
//! or answered by somebody it was not for.

use std::ops::Range;
use std::process::Command;
use std::time::Duration;

use tp_tests::ledger::{Book, Class, Expectation, Load, Report, Serving, now};
use tp_tests::process::tool;
use tp_tests::{Cluster, Laptop, Namespace, User, eventually};

const HEADER: &str = "x-tp-user: ada";
/// Flows of each of the two loads; at most so many requests of each are under way.
const FLOWS: u32 = 8;
const PER_SECOND: u32 = 100;
/// A client is told within this time, whatever dies (design: 502 within 3 s of the workstation's silence).
const DEADLINE: Duration = Duration::from_secs(5);

/// `app` with two replicas in the cluster, an unprivileged laptop with a server of its own, and both kinds of load.
struct Scene<'a> {
    cluster: &'a Cluster,
    namespace: Namespace<'a>,
    laptop: Laptop,
    seed: u64,
    book: Book,
}

impl<'a> Scene<'a> {
    fn new(cluster: &'a Cluster, seed: u64) -> Self {
        let namespace = cluster.namespace("faults");
        let user = User::of_namespace(cluster, "ada", &namespace);
        user.grant(cluster, &namespace.name, "tp-intercept");
        let laptop = Laptop::of(cluster, &user);
        let book = Book::new(seed);
        book.deploy(cluster, &namespace, "app", 2);
        laptop.tp(&["connect", "--listen", "127.0.0.1:0"]).ok();
        Self {
            cluster,
            namespace,
            laptop,
            seed,
            book,
        }
    }

    fn serve(&self, delay: Duration) -> Serving {
        self.book.serve(&self.laptop, "laptop", delay)
    }

    /// Mine and others', on connections that are kept.
    fn load(&self) -> [Load; 2] {
        [
            self.requests("h1", Some(HEADER)),
            self.requests("h2", Some(HEADER)),
        ]
    }

    /// Mine on new connections only, and others' on one that is open all the time: what is open before an agent comes
    /// bypasses it.
    fn load_across_attachments(&self) -> [Load; 2] {
        [
            self.requests("h1-fresh", Some(HEADER)),
            self.requests("h2", None),
        ]
    }

    fn requests(&self, version: &str, header: Option<&str>) -> Load {
        let address = self.namespace.value("svc/app", ".spec.clusterIP");
        let address = format!("{address}:80");
        self.book
            .load(self.cluster, &address, FLOWS, PER_SECOND, version, header)
    }

    #[track_caller]
    fn intercept(&self, port: u16) {
        let port = format!("{port}:80");
        self.laptop
            .tp(&[
                "intercept",
                "app",
                "--port",
                &port,
                "--http-header",
                "x-tp-user=ada",
            ])
            .ok();
    }

    /// Ends the load, and joins the ledgers. `excused` are the times at which the application may have had mine.
    #[track_caller]
    fn report(&self, load: [Load; 2], excused: impl IntoIterator<Item = Range<u64>>) -> Report {
        load.into_iter().for_each(Load::finish);
        let expected = Expectation {
            mine: "laptop".into(),
            others: "app".into(),
            deadline: DEADLINE,
            excused: excused.into_iter().collect(),
        };
        let report = self.book.report(&expected);
        eprintln!(
            "{:?}, {} mine, {} fallbacks",
            report.counts, report.mine, report.fallbacks
        );
        report
    }
}

#[test]
fn intercepts_come_and_go_under_load_without_one_error() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let times = if std::env::var_os("TP_SOAK").is_some() {
        100
    } else {
        10
    };
    let scene = Scene::new(&cluster, 1);
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
    report.assert_clean(scene.seed, 0);
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
    let scene = Scene::new(&cluster, 2);
    let local = scene.serve(Duration::from_millis(30));
    scene.intercept(local.port);
    let load = scene.load();
    scene.book.see_sent(200);

    let killed = now();
    signal("-KILL", scene.laptop.daemon());

    scene.book.see_sent(800);
    let report = scene.report(load, Some(killed..u64::MAX));
    report.assert_clean(scene.seed, u64::from(2 * FLOWS));
    assert!(report.mine > 50, "{} reached the laptop", report.mine);
    assert_eq!(late_errors(&report, killed + 3_000), 0);
}

#[test]
fn a_workstation_that_sleeps_gets_nothing_new_and_nothing_twice() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let scene = Scene::new(&cluster, 3);
    let local = scene.serve(Duration::from_millis(30));
    scene.intercept(local.port);
    let load = scene.load();
    scene.book.see_sent(200);
    let daemon = scene.laptop.daemon();

    let asleep = now();
    signal("-STOP", daemon);
    scene.book.see_sent(2_000);
    signal("-CONT", daemon);

    // Without the user doing anything, requests come back.
    let (_, took) = eventually(
        "mine reach the laptop again",
        Duration::from_secs(20),
        || {
            let before = scene.book.received_by("laptop");
            scene.book.see_sent(40);
            (scene.book.received_by("laptop") > before).then_some(())
        },
    );
    eprintln!("back {took:?} after it woke");
    let awake = now();
    scene.book.see_sent(200);
    let report = scene.report(load, Some(asleep..awake));
    report.assert_clean(scene.seed, u64::from(2 * FLOWS));
    assert_eq!(late_errors(&report, asleep + 4_000), 0);
}

#[test]
fn a_closed_local_port_is_the_applications_turn() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let scene = Scene::new(&cluster, 4);
    let local = scene.serve(Duration::ZERO);
    let port = local.port;
    scene.intercept(port);
    let load = scene.load();
    scene.book.see_sent(100);

    drop(local);
    scene.book.see_sent(400);

    // No time is excused: whenever the application answers, it says that it was in the laptop's place.
    let report = scene.report(load, None);
    report.assert_clean(scene.seed, u64::from(2 * FLOWS));
    assert!(report.fallbacks > 50, "{} fallbacks", report.fallbacks);
}

#[test]
fn the_managers_death_takes_no_request_and_no_intercept_along() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let scene = Scene::new(&cluster, 5);
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
            let before = scene.book.received_by("laptop");
            scene.book.see_sent(40);
            (scene.book.received_by("laptop") == before).then_some(())
        },
    );
    let (_, took) = eventually(
        "mine reach the laptop again",
        Duration::from_secs(60),
        || {
            let before = scene.book.received_by("laptop");
            scene.book.see_sent(100);
            (scene.book.received_by("laptop") > before + 20).then_some(())
        },
    );
    eprintln!("back after {took:?}");
    let back = now();
    scene.book.see_sent(200);
    let report = scene.report(load, Some(killed..back));
    report.assert_clean(scene.seed, u64::from(2 * FLOWS));
}

#[test]
fn an_agents_death_leaves_the_application_to_everybody() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let scene = Scene::new(&cluster, 6);
    let local = scene.serve(Duration::from_millis(10));
    scene.intercept(local.port);
    let load = scene.load_across_attachments();
    scene.book.see_sent(200);

    let before = agents(&cluster, &scene.namespace);
    assert!(
        before.len() >= 4,
        "a parent and a worker in each pod: {before:?}"
    );
    let killed = now();
    kill_all(before);

    let (_, took) = eventually(
        "both pods have a new agent",
        Duration::from_secs(30),
        || {
            let path = "{.items[0].status.attached} {.items[0].status.conditions[0].status}";
            let path = format!("jsonpath={path}");
            let status = cluster.kubectl(&[
                "-n",
                &scene.namespace.name,
                "get",
                "intercepts",
                "-o",
                &path,
            ]);
            let alive = agents(&cluster, &scene.namespace).len();
            (status == "2 True" && alive >= 4).then_some(())
        },
    );
    eprintln!("back after {took:?}");
    let back = now();
    scene.book.see_sent(200);
    let report = scene.report(load, Some(killed..back));
    // For at most 3 s, until the kernel's set has expired, new connections are refused by nobody's port; each flow that has
    // lost its own tries at its pace.
    let most = u64::from(2 * PER_SECOND) * 7 / 2;
    report.assert_clean(scene.seed, most);
    assert_eq!(late_errors(&report, killed + 3_500), 0);
}

/// Clean errors of requests that were sent after that time.
fn late_errors(report: &Report, after: u64) -> usize {
    let errors = report
        .findings
        .iter()
        .filter(|finding| finding.class == Class::CleanError);
    errors
        .filter(|finding| finding.records[0].at > after)
        .count()
}

fn signal(signal: &str, pid: u32) {
    tool(Command::new("kill").args([signal, &pid.to_string()]));
}

/// Kills what is still there: a worker dies with its parent.
fn kill_all(pids: Vec<u32>) {
    let pids = pids.iter().map(u32::to_string);
    let _ = Command::new("kill").arg("-KILL").args(pids).output();
}

/// Processes of all agents in the namespace's pods.
fn agents(cluster: &Cluster, namespace: &Namespace<'_>) -> Vec<u32> {
    cluster.agent_processes(&namespace.value("pods", ".items[*].metadata.uid"))
}
