//! Connections that are started twice, killed, starved of disk or short of a port: each case is handled and named, and
//! none needs a clean-up by hand.

use std::process::Command;
use std::time::Duration;

use tp_tests::laptop::binary;
use tp_tests::process::tool;
use tp_tests::{Cluster, Laptop, User};

#[test]
fn a_second_connect_says_that_it_is_connected() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("life");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let first = laptop.daemon();

    let again = laptop.tp(&["connect", "--listen", "127.0.0.1:0"]).ok();

    assert!(
        (again.out() + &again.err()).contains("already connected"),
        "{}",
        again.report()
    );
    assert_eq!(laptop.daemon(), first);
    assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
}

#[test]
fn two_connections_of_other_names_live_beside_each_other() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (one, two) = (cluster.namespace("life"), cluster.namespace("life"));
    one.probe("web");
    two.probe("web");
    let user = User::of_namespace(&cluster, "ada", &one);
    user.grant(&cluster, &two.name, "tp-user");
    let laptop = Laptop::of(&cluster, &user);
    for (name, namespace) in [("one", &one), ("two", &two)] {
        let listen = [
            "connect",
            "--listen",
            "127.0.0.1:0",
            "--name",
            name,
            "-n",
            &namespace.name,
        ];
        laptop.tp(&listen).ok();
    }
    let status = laptop.status();
    let connections = status["connections"].as_array().unwrap();
    assert_eq!(connections.len(), 2, "{status}");

    laptop.tp(&["quit", "one"]).ok();

    let status = laptop.status();
    assert_eq!(
        status["connections"].as_array().unwrap().len(),
        1,
        "{status}"
    );
    let proxy = format!(
        "socks5h://{}",
        status["connections"][0]["proxy"]["address"]
            .as_str()
            .unwrap()
    );
    let url = "http://web/";
    assert_eq!(
        laptop.run("curl", &["-sS", "-x", &proxy, url]).ok().out(),
        "hello-from-probe\n"
    );
    laptop.tp(&["quit", "--all"]).ok();
    assert_eq!(laptop.processes(), []);
}

#[test]
fn what_a_killed_daemon_leaves_behind_is_no_obstacle() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("life");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    drop(laptop.tp(&["connect", "--listen", "127.0.0.1:0"]).ok());
    tool(Command::new("kill").args(["-9", &laptop.daemon().to_string()]));
    tp_tests::eventually("it is gone", Duration::from_secs(3), || {
        laptop.processes().is_empty().then_some(())
    });

    assert_eq!(laptop.status()["connections"], serde_json::json!([]));
    laptop.tp(&["quit"]).ok();
    let tp = laptop.connect(&[]);
    assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
    // The Session of the dead one goes with its lease at the latest; the new one does not pile up on others.
    laptop.tp(&["quit"]).ok();
}

#[test]
fn a_busy_default_port_means_the_next_one_and_is_said() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let namespace = cluster.namespace("life");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let listen = "import socket, time\ns = socket.create_server(('127.0.0.1', 1080))\nprint('listening', flush=True)\ntime.sleep(60)";
    let mut command = laptop.command("python3", &["-c", listen]);
    let mut holder = command
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 9];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut line).unwrap();

    let run = laptop.tp(&["connect"]).ok();

    assert!(
        (run.out() + &run.err()).contains("1081"),
        "{}",
        run.report()
    );
    let url = ["-sS", "-x", "socks5h://127.0.0.1:1081", "http://web/"];
    assert_eq!(laptop.run("curl", &url).ok().out(), "hello-from-probe\n");
    let asked = laptop
        .tp(&["connect", "--name", "other", "--listen", "127.0.0.1:1080"])
        .exits(1);
    assert!(asked.err().contains("127.0.0.1:1080"), "{}", asked.report());
    let _ = holder.kill();
    let _ = holder.wait();
}

#[test]
fn a_command_gets_the_proxy_and_gives_its_exit_code() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("life");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let connect =
        |more: &[&str]| laptop.tp(&[&["connect", "--listen", "127.0.0.1:0"], more].concat());

    let run = connect(&["--", "curl", "-sS", "--fail", "http://web/"]).ok();
    assert_eq!(run.out(), "hello-from-probe\n");
    connect(&["--", "sh", "-c", "exit 42"]).exits(42);
    connect(&["--", "sh", "-c", "kill -TERM $$"]).exits(128 + 15);
    connect(&["--", "no-such-program"]).exits(127);
    connect(&["--", "/etc/hostname"]).exits(126);
    connect(&["--context", "nowhere", "--", "true"]).exits(125);
    assert_eq!(
        laptop.processes(),
        [],
        "the connection ends with its command"
    );
    let sessions = cluster.kubectl(&[
        "-n",
        &namespace.name,
        "get",
        "sessions.tp.dev",
        "-o",
        "name",
    ]);
    assert_eq!(sessions, "");
}

#[test]
fn foreground_ends_cleanly_on_sigterm() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("life");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let mut child = laptop.spawn_tp(&["connect", "--foreground", "--listen", "127.0.0.1:0"]);
    let sessions = || {
        cluster.kubectl(&[
            "-n",
            &namespace.name,
            "get",
            "sessions.tp.dev",
            "-o",
            "name",
        ])
    };
    tp_tests::eventually("it is connected", Duration::from_secs(10), || {
        (laptop.status()["connections"][0]["state"] == "connected").then_some(())
    });
    assert_ne!(sessions(), "");

    tool(Command::new("kill").args(["-TERM", &laptop.daemon().to_string()]));

    let (status, took) = tp_tests::eventually("it has ended", Duration::from_secs(5), || {
        child.try_wait().unwrap()
    });
    assert!(status.success(), "{status}");
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!(sessions(), "");
}

/// A small file system over one of the laptop's folders; gone when dropped.
struct Small<'a>(&'a Laptop, &'static str);

impl<'a> Small<'a> {
    fn mount(laptop: &'a Laptop, folder: &'static str, options: &str) -> Self {
        let owner = format!("{options},uid={0},gid={0},mode=700", laptop.uid());
        tool(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &owner, "tmpfs"])
                .arg(laptop.path(folder)),
        );
        Self(laptop, folder)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.0.path(self.1))
            .status();
    }
}

#[test]
fn a_full_disk_costs_a_warning_at_most() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("life");
    namespace.probe("web");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    let laptop = Laptop::of(&cluster, &user);
    let (_home, _run) = (
        Small::mount(&laptop, "home", "size=64k"),
        Small::mount(&laptop, "run", "size=64k"),
    );
    laptop.run("mkdir", &["-p", ".kube"]).ok();
    laptop.write_file("home/.kube/config", &user.kubeconfig);
    for folder in ["home", "run"] {
        let path = laptop.path(folder).join("filler").display().to_string();
        laptop
            .run("dd", &["if=/dev/zero", &format!("of={path}"), "bs=4k"])
            .exits(1);
    }

    let tp = laptop.connect(&[]);

    for _ in 0..50 {
        assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
    }
    assert_eq!(tp.status()["state"], "connected");
    laptop.tp(&["quit"]).ok();
    // tmpfs over the folder: nothing may hold it any more.
    tp_tests::eventually("it has ended", Duration::from_secs(3), || {
        laptop.processes().is_empty().then_some(())
    });
}

#[test]
fn a_home_that_cannot_be_written_is_no_obstacle() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("life");
    namespace.probe("web");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    let laptop = Laptop::of(&cluster, &user);
    for folder in ["home/.kube", "home", "run"] {
        tool(Command::new("chown").arg("root").arg(laptop.path(folder)));
        tool(Command::new("chmod").arg("0755").arg(laptop.path(folder)));
    }
    laptop.run("touch", &["file"]).exits(1);
    let environment = [("XDG_RUNTIME_DIR", "/nonexistent")];

    laptop
        .tp_with(&environment, &["connect", "--listen", "127.0.0.1:0"])
        .ok();

    let status = laptop
        .tp_with(&environment, &["status", "--output", "json"])
        .ok()
        .json();
    let proxy = format!(
        "socks5h://{}",
        status["connections"][0]["proxy"]["address"]
            .as_str()
            .unwrap()
    );
    let url = "http://web/";
    assert_eq!(
        laptop.run("curl", &["-sS", "-x", &proxy, url]).ok().out(),
        "hello-from-probe\n"
    );
    laptop.tp_with(&environment, &["quit", "--all"]).ok();
}

#[test]
fn ranges_that_the_laptop_uses_itself_are_said_with_the_flag_that_helps() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let namespace = cluster.namespace("life");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let ip = |arguments: &[&str]| {
        tool(
            Command::new("ip")
                .args(["-n", "k8s-laptop"])
                .args(arguments),
        )
    };
    ip(&[
        "link", "add", "overlap0", "type", "veth", "peer", "name", "overlap1",
    ]);
    ip(&["link", "set", "overlap1", "up"]);
    ip(&["addr", "add", "10.96.7.1/24", "dev", "overlap0"]);
    ip(&["link", "set", "overlap0", "up"]);

    let run = laptop.tp(&["connect", "--listen", "127.0.0.1:0"]);

    ip(&["link", "del", "overlap0"]);
    let said = run.ok().err();
    assert!(
        said.contains("10.96.7.0/24") && said.contains("overlap0"),
        "{said}"
    );
    assert!(said.contains("--also-proxy 10.96.7.0/24"), "{said}");
}

#[test]
fn programs_are_where_the_tests_think() {
    // Whoever runs the tests should see at once when nothing was built.
    assert!(std::path::Path::new(&binary("tp")).exists());
}

#[test]
fn the_proxys_password_does_not_stay_in_the_daemons_environment() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("life");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let connect = ["connect", "--listen", "127.0.0.1:0", "--proxy-user", "ada"];
    laptop
        .tp_with(&[("TP_PROXY_PASSWORD", "hunter2")], &connect)
        .ok();

    let environment = std::fs::read(format!("/proc/{}/environ", laptop.daemon())).unwrap();

    assert!(!String::from_utf8_lossy(&environment).contains("hunter2"));
    let status = laptop.status();
    let proxy = status["connections"][0]["proxy"]["address"]
        .as_str()
        .unwrap();
    let with_password = format!("http://ada:hunter2@{proxy}");
    let curl = laptop.run("curl", &["-sS", "-x", &with_password, "http://web/"]);
    assert_eq!(curl.ok().out(), "hello-from-probe\n");
}
