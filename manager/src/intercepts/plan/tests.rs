use std::cell::Cell;

use serde_json::{Value, json};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tp_manager_api::Matchers;
use tp_manager_api::intercept::{AttachMode, Reason, Workload, WorkloadKind};
use tp_manager_api::tls::Found;

use super::super::pod::PodFacts;
use super::super::pod::tests::{pod, with_agents, with_sidecar};
use super::super::secret::Secret;
use super::super::secret::tests::credential;
use super::super::world::{LinkView, NotLetIn, Restrictions, Scene};
use super::*;
use crate::inventory::Node;

/// A world that is built up step by step; asking it makes the plan.
struct Case {
    held: Vec<Held>,
    scene: Scene,
    links: BTreeMap<PodUid, LinkView>,
    attaching: BTreeSet<PodUid>,
    not_let_in: BTreeMap<PodUid, NotLetIn>,
    workloads: BTreeMap<(Arc<str>, Workload), bool>,
    policies: BTreeMap<PodUid, Restrictions>,
    node: Cell<Option<Node>>,
    image: &'static str,
    now: Instant,
}

fn held() -> Held {
    let matchers = json!([{ "header": { "name": "x-user", "exact": "ada" } }]);
    Held {
        name: ("shop".into(), "web-1".into()),
        id: "id-1".into(),
        user: "ada".into(),
        created: 7,
        workload: Workload {
            kind: WorkloadKind::Deployment,
            name: "web".into(),
        },
        port: 8080,
        protocol: Protocol::Tcp,
        matchers: serde_json::from_value(matchers).unwrap(),
        strict: false,
        tls: None,
        close_idle: false,
        attach: AttachMode::Auto,
        connected: true,
        problem: None,
        outgoing: false,
    }
}

impl Case {
    fn new(pods: Vec<PodFacts>) -> Self {
        let scene = Scene {
            pods: pods
                .into_iter()
                .map(|pod| (Arc::clone(&pod.name), pod))
                .collect(),
            replica_sets: [("web-5d".into(), ("Deployment".to_owned(), "web".to_owned()))].into(),
            listed: true,
        };
        Self {
            held: vec![held()],
            scene,
            links: BTreeMap::new(),
            attaching: BTreeSet::new(),
            not_let_in: BTreeMap::new(),
            workloads: BTreeMap::new(),
            policies: BTreeMap::new(),
            node: Cell::default(),
            image: "tp",
            now: Instant::now(),
        }
    }

    fn plan(&self) -> Plan {
        let scenes = [(Arc::from("shop"), self.scene.clone())].into();
        plan(&World {
            held: &self.held,
            scenes: &scenes,
            node: &|_| {
                let node = self.node.take();
                self.node.set(node.clone());
                node
            },
            links: &self.links,
            attaching: &self.attaching,
            not_let_in: &self.not_let_in,
            workloads: &self.workloads,
            policies: &self.policies,
            image: self.image,
            began: "2026-01-01T00:01:00Z".parse().unwrap(),
            own_namespace: "tp-system",
            now: self.now,
        })
    }

    fn reason(&self) -> Option<Reason> {
        let plan = self.plan();
        plan.reports[0]
            .problem
            .as_ref()
            .map(|problem| problem.reason)
    }

    fn linked(mut self, pod: &str, container: &str, state: LinkState) -> Self {
        let view = LinkView {
            container: container.into(),
            state,
        };
        self.links
            .insert(format!("uid-{pod}").as_str().into(), view);
        self
    }
}

fn running(name: &str) -> PodFacts {
    pod(
        name,
        with_agents(&[("tp-agent-0-1-0-1", json!({ "running": {} }))]),
    )
}

fn connected(ids: &[&str]) -> LinkState {
    LinkState::Connected {
        routed: ids.iter().map(|id| (*id).to_owned()).collect(),
        open_before: [(8080, 2)].into(),
        unopened: BTreeMap::new(),
    }
}

fn dialing(now: Instant, ago: Duration, trouble: Option<Trouble>) -> LinkState {
    let since = now.checked_sub(ago).unwrap();
    LinkState::Dialing { since, trouble }
}

#[test]
fn a_pod_gets_an_agent_then_a_connection_then_routes() {
    let case = Case::new(vec![pod("a", json!({}))]);
    let plan = case.plan();
    assert_eq!(plan.attach[0].container, "tp-agent-0-1-0-1");
    assert!(plan.links.is_empty());
    assert_eq!(case.reason(), Some(Reason::Attaching));

    let mut under_way = Case::new(vec![pod("a", json!({}))]);
    under_way.attaching.insert("uid-a".into());
    assert!(under_way.plan().attach.is_empty());

    let added = with_agents(&[("tp-agent-0-1-0-1", Value::Null)]);
    let case = Case::new(vec![pod("a", added)]);
    let plan = case.plan();
    assert!(plan.attach.is_empty());
    let wanted = &plan.links["uid-a"];
    assert_eq!(wanted.address, "10.244.0.7:15008".parse().unwrap());
    assert_eq!(wanted.orders.table.ports[0].intercepts[0].id, "id-1");
    assert_eq!(wanted.orders.table.check(), Ok(()));
    assert_eq!(case.reason(), Some(Reason::Attaching));

    let case = Case::new(vec![running("a")]).linked("a", "tp-agent-0-1-0-1", connected(&[]));
    assert_eq!(case.reason(), Some(Reason::Attaching));
    let case = Case::new(vec![running("a")]).linked("a", "tp-agent-0-1-0-1", connected(&["id-1"]));
    assert_eq!(case.reason(), None);
    assert_eq!(case.plan().reports[0].open_before, Some(2));
}

#[test]
fn every_pod_of_the_workload_counts_and_no_other() {
    let other = json!({ "metadata": { "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "name": "other-7", "uid": "r", "controller": true }] } });
    let going = json!({ "metadata": { "deletionTimestamp": "2026-01-01T00:00:00Z" } });
    let coming = json!({ "status": { "phase": "Pending", "podIP": null } });
    let case = Case::new(vec![
        running("a"),
        running("b"),
        pod("c", other),
        pod("d", going),
        pod("e", coming),
    ])
    .linked("a", "tp-agent-0-1-0-1", connected(&["id-1"]))
    .linked("b", "tp-agent-0-1-0-1", connected(&["id-1"]));

    let plan = case.plan();

    // One that is about to start gets its agent now, and is not waited for.
    let attached: Vec<_> = plan.attach.iter().map(|attach| &*attach.pod).collect();
    assert_eq!(attached, ["e"]);
    let counted: Vec<_> = plan.reports[0]
        .pods
        .iter()
        .map(|(name, _)| &**name)
        .collect();
    assert_eq!(counted, ["a", "b"]);
    assert_eq!(plan.reports[0].problem, None);
    assert_eq!(plan.reports[0].open_before, Some(4));
}

#[test]
fn two_intercepts_of_a_pod_share_its_connection() {
    let mut case = Case::new(vec![running("a")]);
    let mut second = held();
    second.id = "id-2".into();
    second.matchers = Matchers::default();
    let mut third = held();
    (third.id, third.port) = ("id-3".into(), 9090);
    case.held.push(second);
    assert!(!case.plan().links["uid-a"].orders.close_idle);
    third.close_idle = true;
    case.held.push(third);
    assert!(case.plan().links["uid-a"].orders.close_idle);

    let table = &case.plan().links["uid-a"].orders.table;

    let ids = |port: &PortRoutes| -> Vec<String> {
        port.intercepts
            .iter()
            .map(|route| route.id.clone())
            .collect()
    };
    assert_eq!(ids(&table.ports[0]), ["id-1", "id-2"]);
    assert_eq!(
        (table.ports[1].listen, ids(&table.ports[1])),
        (9090, vec!["id-3".into()])
    );
}

#[test]
fn a_route_names_what_its_agent_is_given_and_an_application_of_another_key_is_named() {
    let mut case = Case::new(vec![running("a")]);
    case.held[0].tls = Some(Secret {
        name: "web-tls".to_owned(),
        credential: credential(),
    });

    let orders = case.plan().links["uid-a"].orders.clone();

    let id = orders.table.ports[0].intercepts[0].tls.clone().unwrap();
    assert_eq!(orders.credentials.keys().collect::<Vec<_>>(), [&id]);
    let mut state = connected(&["id-1"]);
    if let LinkState::Connected { unopened, .. } = &mut state {
        unopened.insert("id-1".to_owned(), Found::OtherCertificate);
    }
    case = case.linked("a", "tp-agent-0-1-0-1", connected(&["id-1"]));
    assert_eq!(case.reason(), None);
    case = case.linked("a", "tp-agent-0-1-0-1", state);
    assert_eq!(case.reason(), Some(Reason::TlsSecret));
    let report = &case.plan().reports[0];
    let what = &report.problem.as_ref().unwrap().what;
    assert!(what.contains("pod a") && what.contains("web-tls"), "{what}");
}

#[test]
fn an_intercept_with_a_problem_leaves_pods_alone() {
    let mut case = Case::new(vec![running("a"), pod("b", json!({}))]);
    case.held[0].problem = Some(Problem::passing(Reason::NoWorkstation, "away"));

    let plan = case.plan();

    assert!(plan.links.is_empty() && plan.attach.is_empty());
    assert_eq!(case.reason(), Some(Reason::NoWorkstation));
}

#[test]
fn a_workstation_that_left_a_moment_ago_keeps_its_routes() {
    let mut case =
        Case::new(vec![running("a")]).linked("a", "tp-agent-0-1-0-1", connected(&["id-1"]));
    case.held[0].connected = false;

    assert_eq!(case.reason(), Some(Reason::NoWorkstation));
    assert!(!case.plan().links["uid-a"].orders.table.ports.is_empty());
}

#[test]
fn an_agent_from_before_an_upgrade_makes_way_for_the_next_one() {
    let since =
        |second: &str| json!({ "running": { "startedAt": format!("2026-01-01T00:{second}Z") } });
    let case = |started: &str| {
        let mut case = Case::new(vec![pod(
            "a",
            with_agents(&[("tp-agent-0-1-0-1", since(started))]),
        )]);
        case.image = "tp:next";
        case
    };

    let old = case("00:30");
    let wanted = &old.plan().links["uid-a"];
    assert!(wanted.orders.yields && wanted.orders.table.ports.is_empty());
    assert!(old.plan().attach.is_empty());
    assert_eq!(old.reason(), Some(Reason::Attaching));

    let yielded = case("00:30").linked("a", "tp-agent-0-1-0-1", LinkState::Yielded);
    assert_eq!(yielded.plan().attach[0].container, "tp-agent-0-1-0-2");
    assert!(
        yielded.plan().links.contains_key("uid-a"),
        "or it would be forgotten"
    );

    // A younger one is that of a replica that came later.
    let young = case("01:30");
    assert!(!young.plan().links["uid-a"].orders.yields);
    let mut same = case("00:30");
    same.image = "tp";
    assert!(!same.plan().links["uid-a"].orders.yields);
}

#[test]
fn an_agent_that_has_ended_is_followed_by_another_until_too_many_failed() {
    let ended = |seconds: &str| {
        json!({ "terminated": { "exitCode": 1, "message": "no nf_tables",
        "startedAt": "2026-01-01T00:00:00Z", "finishedAt": format!("2026-01-01T00:00:{seconds}Z") } })
    };
    let case = |agents: &[(&str, Value)]| Case::new(vec![pod("a", with_agents(agents))]);

    let killed = case(&[("tp-agent-0-1-0-1", ended("30"))]);
    assert_eq!(killed.plan().attach[0].container, "tp-agent-0-1-0-2");
    // The API server puts the newest first.
    let swapped = case(&[
        ("tp-agent-0-1-0-2", json!({ "running": {} })),
        ("tp-agent-0-1-0-1", ended("30")),
    ]);
    assert!(swapped.plan().attach.is_empty());
    assert_eq!(swapped.plan().links["uid-a"].container, "tp-agent-0-1-0-2");
    let names: Vec<_> = (1..=20)
        .map(|number| format!("tp-agent-x-{number}"))
        .collect();
    let many: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), ended("30")))
        .collect();
    assert_eq!(case(&many).reason(), Some(Reason::AgentFails));
    let failed = [("x-1", ended("01")), ("x-2", ended("02"))]
        .map(|(name, state)| (format!("tp-agent-{name}"), state));
    let mut agents: Vec<_> = failed
        .iter()
        .map(|(name, state)| (name.as_str(), state.clone()))
        .collect();
    assert_eq!(case(&agents).plan().attach.len(), 1);
    agents.push(("tp-agent-x-3", ended("03")));
    let given_up = case(&agents);
    assert!(given_up.plan().attach.is_empty());
    assert_eq!(given_up.reason(), Some(Reason::AgentFails));
    // One that stayed up in between begins the count anew.
    agents.push(("tp-agent-x-4", ended("50")));
    assert_eq!(case(&agents).plan().attach.len(), 1);
}

#[test]
fn what_keeps_an_agent_out_is_named_with_its_cure() {
    let waiting = |reason: &str, message: &str| {
        let state = json!({ "waiting": { "reason": reason, "message": message } });
        with_agents(&[("tp-agent-0-1-0-1", state)])
    };
    for (change, reason) in [
        (
            json!({ "spec": { "hostNetwork": true } }),
            Reason::HostNetwork,
        ),
        (json!({ "spec": { "hostPID": true } }), Reason::HostNetwork),
        (
            json!({ "metadata": { "annotations": { "kubernetes.io/config.mirror": "x" } } }),
            Reason::StaticPod,
        ),
        (
            json!({ "spec": { "os": { "name": "windows" } } }),
            Reason::OperatingSystem,
        ),
        (
            json!({ "spec": { "containers": [{ "name": "linkerd-proxy", "image": "x" }] } }),
            Reason::Mesh,
        ),
        (waiting("ImagePullBackOff", "not found"), Reason::ImagePull),
        (
            waiting("ErrImagePull", "no match for platform in manifest"),
            Reason::Architecture,
        ),
        (
            waiting("CreateContainerError", "exists"),
            Reason::AgentFails,
        ),
    ] {
        let case = Case::new(vec![pod("a", change)]);
        let plan = case.plan();
        let problem = plan.reports[0].problem.clone().unwrap();
        assert_eq!(problem.reason, reason);
        assert!(
            problem.cure.is_some() && problem.reason.is_lasting(),
            "{problem:?}"
        );
        assert!(plan.attach.is_empty() && plan.links.is_empty(), "{reason}");
    }
    let mut case = Case::new(vec![pod("a", json!({}))]);
    case.held[0].attach = AttachMode::Sidecar;
    assert_eq!(case.reason(), Some(Reason::Sidecar));
    let case = Case::new(vec![pod("a", json!({}))]);
    case.node.set(Some(Node {
        system: Some("windows".into()),
        ..Node::default()
    }));
    assert_eq!(case.reason(), Some(Reason::OperatingSystem));
}

#[test]
fn a_pod_with_a_sidecar_gets_a_connection_to_it_whatever_was_asked_for() {
    for mode in [AttachMode::Auto, AttachMode::Ephemeral, AttachMode::Sidecar] {
        let mut case = Case::new(vec![pod("a", with_sidecar(json!({ "running": {} })))]);
        case.held[0].attach = mode;

        let plan = case.plan();

        assert!(plan.attach.is_empty());
        let wanted = &plan.links["uid-a"];
        assert_eq!(wanted.container, "tp-agent-sidecar");
        assert_eq!(wanted.seed, Some("ab".repeat(32)));
        let port = &wanted.orders.table.ports[0];
        assert_eq!((port.listen, port.app), (15100, 8080));
        let case = case.linked("a", "tp-agent-sidecar", connected(&["id-1"]));
        assert_eq!(case.reason(), None);
    }
}

#[test]
fn a_sidecar_that_is_not_there_or_stands_elsewhere_is_named() {
    let mut case = Case::new(vec![pod("a", json!({}))]);
    case.held[0].attach = AttachMode::Sidecar;
    let plan = case.plan();
    let problem = plan.reports[0].problem.clone().unwrap();
    assert_eq!(problem.reason, Reason::Sidecar);
    assert!(problem.cure.unwrap().contains("--restart-pods"));
    assert!(plan.attach.is_empty() && plan.links.is_empty());

    let mut case = Case::new(vec![pod("a", with_sidecar(json!({ "running": {} })))]);
    case.held[0].port = 9090;
    let plan = case.plan();
    let problem = plan.reports[0].problem.clone().unwrap();
    assert!(
        problem.what.contains("8080 and not before 9090"),
        "{problem:?}"
    );
    assert!(plan.attach.is_empty(), "two agents would want one port");
}

#[test]
fn a_sidecar_that_ends_is_its_nodes_to_start_again() {
    let state = |state: Value| Case::new(vec![pod("a", with_sidecar(state))]);
    let ended = json!({ "terminated": { "exitCode": 137 } });
    let plan = state(ended).plan();
    assert!(plan.attach.is_empty() && plan.links.contains_key("uid-a"));
    let loops = json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off" } });
    assert_eq!(state(loops).reason(), Some(Reason::AgentFails));
    let pull = json!({ "waiting": { "reason": "ImagePullBackOff", "message": "no" } });
    assert_eq!(state(pull).reason(), Some(Reason::ImagePull));
}

#[test]
fn nothing_is_attached_in_the_clusters_own_namespace_and_the_managers() {
    for namespace in ["kube-system", "tp-system"] {
        let mut case = Case::new(vec![pod("a", json!({}))]);
        case.held[0].name.0 = namespace.into();
        let scenes = [(Arc::from(namespace), case.scene.clone())].into();
        let plan = plan(&World {
            held: &case.held,
            scenes: &scenes,
            node: &|_| None,
            links: &case.links,
            attaching: &case.attaching,
            not_let_in: &case.not_let_in,
            workloads: &case.workloads,
            policies: &case.policies,
            image: "tp",
            began: "2026-01-01T00:01:00Z".parse().unwrap(),
            own_namespace: "tp-system",
            now: case.now,
        });

        let problem = plan.reports[0].problem.clone().unwrap();
        assert_eq!(problem.reason, Reason::Namespace);
        assert!(plan.attach.is_empty());
    }
}

#[test]
fn a_refusal_stands_until_it_is_time_to_try_again() {
    let mut case = Case::new(vec![pod("a", json!({}))]);
    let problem = Problem::lasting(Reason::PodSecurity, "baseline", "relax it");
    let again = case.now + Duration::from_secs(5);
    case.not_let_in
        .insert("uid-a".into(), NotLetIn { problem, again });

    assert!(case.plan().attach.is_empty());
    assert_eq!(case.reason(), Some(Reason::PodSecurity));

    case.now = again;
    assert_eq!(case.plan().attach.len(), 1);
    // The same words until the answer is there.
    assert_eq!(case.reason(), Some(Reason::PodSecurity));
}

#[test]
fn an_agent_out_of_reach_is_named_after_a_moment() {
    let now = Instant::now();
    let at = |ago: u64, trouble| {
        let mut case = Case::new(vec![running("a")]);
        case.now = now;
        let state = dialing(now, Duration::from_millis(ago), Some(trouble));
        case.linked("a", "tp-agent-0-1-0-1", state)
    };

    assert_eq!(at(2000, Trouble::Silent).reason(), Some(Reason::Attaching));
    let mut silent = at(3000, Trouble::Silent);
    // Not a word of what is in the way before that was looked for.
    assert_eq!(silent.reason(), Some(Reason::Attaching));
    assert_eq!(silent.plan().look_at.len(), 1);
    for (ago, looks_again) in [(0, 0), (3, 1)] {
        let policies = Restrictions {
            names: vec!["deny-all".into()],
            seen: now - Duration::from_secs(ago),
        };
        silent.policies.insert("uid-a".into(), policies);
        let plan = silent.plan();
        assert_eq!(plan.look_at.len(), looks_again);
        let problem = plan.reports[0].problem.as_ref().unwrap();
        assert_eq!(problem.reason, Reason::Unreachable);
        assert!(problem.message().contains("deny-all"));
    }
    // An agent that has just ended refuses, until its node says that it has.
    let refused = |ago| at(ago, Trouble::Refused).reason();
    assert_eq!(refused(3000), Some(Reason::Attaching));
    assert_eq!(refused(9000), Some(Reason::AgentFails));
    // A connection to the agent before says nothing about this one.
    let before =
        Case::new(vec![running("a")]).linked("a", "tp-agent-0-1-0-0", connected(&["id-1"]));
    assert_eq!(before.reason(), Some(Reason::Attaching));
}

#[test]
fn a_workload_that_is_not_there_is_told_from_one_without_pods() {
    let mut case = Case::new(vec![]);
    assert_eq!(case.reason(), Some(Reason::NoPods));
    let place = case.plan().look_for.into_iter().next().unwrap();

    case.workloads.insert(place.clone(), true);
    assert_eq!(case.reason(), Some(Reason::NoPods));
    assert!(case.plan().look_for.is_empty());
    case.workloads.insert(place, false);
    assert_eq!(case.reason(), Some(Reason::NoWorkload));
    // Nothing is said before everything was seen.
    case.scene.listed = false;
    assert_eq!(case.reason(), Some(Reason::Attaching));
}

#[test]
fn each_kind_of_workload_finds_its_pods() {
    let of = |kind: &str, name: &str| {
        json!({ "metadata": { "ownerReferences": [{ "apiVersion": "apps/v1", "kind": kind, "name": name,
            "uid": "o", "controller": true }] } })
    };
    let scene = Case::new(vec![
        pod("deployed", json!({})),
        pod("stateful", of("StatefulSet", "web")),
        pod("daemon", of("DaemonSet", "web")),
        pod("bare", json!({ "metadata": { "ownerReferences": [] } })),
    ])
    .scene;
    for (kind, name, expected) in [
        (WorkloadKind::Deployment, "web", "deployed"),
        (WorkloadKind::ReplicaSet, "web-5d", "deployed"),
        (WorkloadKind::StatefulSet, "web", "stateful"),
        (WorkloadKind::DaemonSet, "web", "daemon"),
        (WorkloadKind::Pod, "bare", "bare"),
    ] {
        let workload = Workload {
            kind,
            name: name.into(),
        };
        let found: Vec<_> = scene.pods_of(&workload).map(|pod| &*pod.name).collect();
        assert_eq!(found, [expected], "{workload}");
    }
}

#[test]
fn what_another_replica_serves_is_left_where_it_is_and_nothing_else_is_done_for_it() {
    let at = |state| {
        let mut case = Case::new(vec![running("a"), pod("b", json!({}))]);
        case.held[0].outgoing = true;
        case.linked("a", "tp-agent-0-1-0-1", state).plan()
    };
    let connected = |routed: &[&str]| LinkState::Connected {
        routed: routed.iter().map(|id| (*id).to_owned()).collect(),
        open_before: BTreeMap::new(),
        unopened: BTreeMap::new(),
    };

    let kept = at(connected(&["id-1"]));
    let table = &kept.links["uid-a"].orders.table;
    assert_eq!(table.ports[0].intercepts[0].id, "id-1");
    for plan in [kept, at(connected(&[]))] {
        assert!(plan.attach.is_empty() && plan.reports.is_empty());
        assert!(plan.look_for.is_empty() && plan.look_at.is_empty());
    }
    assert!(at(connected(&[])).links.is_empty());
}
