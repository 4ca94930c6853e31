//! An upgrade of the manager reaches the agents in running pods, and costs nobody a request.

use std::time::Duration;

use tp_tests::ledger::now;
use tp_tests::ledger::scene::{Pods, Scene};
use tp_tests::manager::IMAGE;
use tp_tests::{Cluster, Laptop, eventually};

/// The image under test by another name, as a release has it.
const NEXT: &str = "lab.local/tp:next";

#[test]
fn an_upgrade_replaces_the_agents_of_running_pods() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let images = ["ctr", "-n", "k8s.io", "images"];
    cluster.on_node(&[&images[..], &["tag", "--force", IMAGE, NEXT]].concat());
    let scene = Scene::new(&cluster, 12);
    let local = scene.serve(Duration::from_millis(10));
    scene.intercept(local.port);
    let load = scene.load_across_attachments();
    scene.book.see_sent(200);
    let first = scene.processes(&Pods::All, "tp-agent");

    // Whoever comes after this test finds another manager than it expects.
    cluster.forget_manager();
    let upgraded = now();
    let admin = Laptop::admin(&cluster);
    admin.tp(&["upgrade", "--image", NEXT]).ok();

    let agents = || {
        let path = ".items[*].spec.ephemeralContainers[*].image";
        scene.namespace.value("pods", path)
    };
    eventually("each pod has two agents", Duration::from_secs(30), || {
        let mut images: Vec<_> = agents().split_whitespace().map(str::to_owned).collect();
        images.sort();
        (images == [IMAGE, IMAGE, NEXT, NEXT]).then_some(())
    });
    let back = scene.until_mine_return(Duration::from_secs(20));
    scene.book.see_sent(200);
    eventually("the old ones are gone", Duration::from_secs(40), || {
        let now = scene.processes(&Pods::All, "tp-agent");
        first.iter().all(|pid| !now.contains(pid)).then_some(())
    });
    // The rule is the new ones', whatever the old ones took away.
    let still = now();
    scene.book.see_sent(200);
    let holders = scene.book.holders_of_mine(still);

    let report = scene.report(load, Some(upgraded..back));
    report.assert_clean(12, 0);
    assert!(report.mine > 50, "{} reached the laptop", report.mine);
    assert_eq!(holders.into_iter().collect::<Vec<_>>(), ["laptop"]);
    cluster.on_node(&[&images[..], &["rm", NEXT]].concat());
}
