//! `make demo`: a manager without Kubernetes, two services, and a workstation that reaches them by name.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tp_tests::{Cluster, Run, laptop};

#[test]
fn the_demo_shows_what_it_promises_and_leaves_nothing_behind() {
    // The demo needs no cluster; this is only for root, which its namespaces want on some machines.
    let Some(_cluster) = Cluster::shared() else {
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/demo.sh");
    let programs = Path::new(&laptop::binary("tp"))
        .parent()
        .unwrap()
        .to_owned();
    let manager = laptop::binary("tp-manager");
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(programs.join("tp"), folder.path().join("tp")).unwrap();
    std::fs::copy(manager, folder.path().join("tp-manager")).unwrap();
    let interfaces = || {
        Command::new("ip")
            .args(["-o", "link"])
            .output()
            .unwrap()
            .stdout
            .len()
    };
    let before = interfaces();
    let mut demo = Command::new(script);
    demo.env("TP_BIN_DIR", folder.path());

    let run = Run::new(demo, b"", Duration::from_secs(60)).ok();

    let said = run.out();
    for line in [
        "orders: 3 parcels to send",
        "stock: 12 parcels left",
        "7. tp quit",
    ] {
        assert!(said.contains(line), "{line} is missing\n{}", run.report());
    }
    assert_eq!(interfaces(), before);
    let left = Command::new("pgrep")
        .args(["-f", "tp-demo-"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&left.stdout), "");
    let files = std::fs::read_dir("/tmp").unwrap().flatten();
    let left: Vec<_> = files
        .filter(|f| f.file_name().to_string_lossy().starts_with("tp-demo-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
