//! Many flows: a thousand at once, ten thousand idle ones, and many short ones, with the memory and descriptors they
//! cost. `make soak` (`TP_SOAK=1`) runs the long counts.

use std::time::Duration;

use tp_tests::process::{open_descriptors, resident_memory};
use tp_tests::{Cluster, Connection, Laptop, User, eventually};

const LONG: Duration = Duration::from_secs(900);

/// Memory and descriptors of both ends.
#[derive(Clone, Copy, Debug)]
struct Cost {
    daemon: u64,
    manager: u64,
    descriptors: usize,
    manager_descriptors: usize,
}

fn cost(cluster: &Cluster, tp: &Connection<'_>) -> Cost {
    let daemon = tp.laptop().daemon();
    let managers = cluster.manager_processes();
    Cost {
        daemon: resident_memory(daemon),
        manager: managers.iter().map(|(_, pid)| resident_memory(*pid)).sum(),
        descriptors: open_descriptors(daemon),
        manager_descriptors: managers.iter().map(|(_, pid)| open_descriptors(*pid)).sum(),
    }
}

#[test]
fn a_thousand_flows_at_once_move_every_byte() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let namespace = cluster.namespace("many");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);

    let mut flows = tp.spawn_probe(&["flows", "PROXY", "web", "7", "1000", "65536", "hold"]);
    let opened = flows.line();
    assert_eq!(opened["open"], 1000, "{opened}");
    assert_eq!(tp.status()["flows"], 1000);
    flows.end_input();
    let checked = flows.line();
    assert_eq!(checked["alive"], 1000, "{checked}");
    drop(flows);
    eventually("the flows are over", Duration::from_secs(10), || {
        (tp.status()["flows"] == 0).then_some(())
    });
}

#[test]
fn ten_thousand_idle_flows_fit_their_budget() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let namespace = cluster.namespace("many");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    tp.get("http://web/");
    let before = cost(&cluster, &tp);

    let mut flows = tp.spawn_probe(&["flows", "PROXY", "web", "7", "10000", "16", "hold"]);
    let opened = flows.line();
    assert_eq!(opened["open"], 10_000, "{opened}");
    let during = cost(&cluster, &tp);
    let each = |now: u64, base: u64| now.saturating_sub(base) / 10_000;
    let (daemon, manager) = (
        each(during.daemon, before.daemon),
        each(during.manager, before.manager),
    );
    println!(
        "10,000 idle flows: daemon {daemon} B and manager {manager} B a flow; opened in {} ms",
        opened["ms"]
    );
    // Beside them, a new request is as quick as ever.
    let start = std::time::Instant::now();
    assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
    let request = start.elapsed();

    flows.end_input();
    let checked = flows.line();
    assert_eq!(checked["alive"], 10_000, "{checked}");
    drop(flows);
    eventually("the flows are over", Duration::from_secs(30), || {
        (tp.status()["flows"] == 0).then_some(())
    });

    assert!(daemon <= 12 << 10, "{daemon} bytes a flow in the daemon");
    assert!(manager <= 20 << 10, "{manager} bytes a flow in the manager");
    assert!(request < Duration::from_secs(1), "{request:?}");
    eventually(
        "the descriptors are closed",
        Duration::from_secs(10),
        || {
            let after = cost(&cluster, &tp);
            let closed = after.descriptors <= before.descriptors + 8;
            (closed && after.manager_descriptors <= before.manager_descriptors + 16).then_some(())
        },
    );
}

#[test]
fn short_connections_leak_neither_memory_nor_streams_nor_descriptors() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let count: u64 = if std::env::var_os("TP_SOAK").is_some() {
        100_000
    } else {
        10_000
    };
    let namespace = cluster.namespace("many");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let short = |count: u64| {
        let run = tp
            .probe_with(
                &["short", "PROXY", "web", "7", &count.to_string(), "32"],
                b"",
                LONG,
            )
            .ok();
        assert_eq!(run.json()["done"], count, "{}", run.report());
        run.json()["ms"].as_u64().unwrap()
    };
    // Pools and caches fill first; what grows after that is a leak.
    short(3_000);
    let before = cost(&cluster, &tp);

    let ms = short(count);

    let (after, _) = eventually("the streams are over", Duration::from_secs(20), || {
        let after = cost(&cluster, &tp);
        let quiet = tp.status()["flows"] == 0
            && after.descriptors <= before.descriptors + 4
            && after.manager_descriptors <= before.manager_descriptors + 8;
        quiet.then_some(after)
    });
    println!("{count} short connections in {ms} ms: before {before:?}, after {after:?}");
    assert!(
        after.daemon < before.daemon + (8 << 20),
        "{before:?} {after:?}"
    );
    assert!(
        after.manager < before.manager + (16 << 20),
        "{before:?} {after:?}"
    );
}
