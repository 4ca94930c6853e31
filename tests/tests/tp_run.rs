//! `tp run`: a program sees the cluster from a network of its own, made without root, and leaves nothing behind.

use std::process::Command;
use std::time::Duration;

use tp_tests::laptop::binary;
use tp_tests::process::LIMIT;
use tp_tests::{Cluster, Laptop, Namespace, Run, User, clients, eventually};

const LONG: Duration = Duration::from_secs(240);

/// A namespace with our probe as Service `web`, and a user who may use it.
fn with_probe<'a>(cluster: &'a Cluster, prefix: &str) -> (Namespace<'a>, Laptop) {
    let namespace = cluster.namespace(prefix);
    namespace.probe("web");
    let user = User::of_namespace(cluster, "ada", &namespace);
    let laptop = Laptop::of(cluster, &user);
    laptop.write_file("home/client.py", clients::SOCKET_CALLS);
    laptop.write_file("home/sandbox.py", clients::SANDBOX);
    laptop.write_file("home/terminal.py", clients::TERMINAL);
    let begun = "curl -s -o /dev/null -m 2 http://web/";
    // The node's rules for a new Service come a moment after it.
    eventually("the Service is served", Duration::from_secs(20), || {
        laptop
            .tp(&["run", "--", "sh", "-c", begun])
            .succeeded()
            .then_some(())
    });
    (namespace, laptop)
}

fn client(laptop: &Laptop, flags: &[&str], calls: &[&str]) -> Run {
    let arguments = [&["run"], flags, &["--", "python3", "client.py"], calls].concat();
    let command = laptop.command(&binary("tp"), &arguments);
    Run::new(command, b"", LONG)
}

/// The same command where /dev/net/tun is everybody's, as on most workstations.
fn with_tun(command: &Command) -> Command {
    let script = "mount -t tmpfs none /dev/net && mknod /dev/net/tun c 10 200 && chmod 666 /dev/net/tun && exec \"$@\"";
    let mut wrapped = Command::new("unshare");
    wrapped.args(["--mount", "sh", "-c", script, "sh"]);
    wrapped.arg(command.get_program()).args(command.get_args());
    if let Some(directory) = command.get_current_dir() {
        wrapped.current_dir(directory);
    }
    wrapped
}

/// What is left of a user's programs. Zombies are nobody's but a missing init's.
fn left(laptop: &Laptop) -> Vec<(u32, String)> {
    let mut processes = laptop.processes();
    processes.retain(|(_, line)| !line.is_empty());
    processes
}

#[test]
fn programs_reach_services_by_name_and_address() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (namespace, laptop) = with_probe(&cluster, "run");
    let hosts = [
        "web".to_owned(),
        format!("web.{}", namespace.name),
        format!("web.{}.svc.cluster.local", namespace.name),
        namespace.value("svc/web", ".spec.clusterIP"),
        namespace.value("pod/web", ".status.podIP"),
    ];
    let get_all = |how: &str| {
        for host in &hosts {
            let url = format!("http://{host}/");
            let run = laptop
                .tp(&["run", "--", "curl", "-sS", "--fail", "-m", "20", &url])
                .ok();
            assert_eq!(run.out(), "hello-from-probe\n", "{how}: {}", run.report());
        }
        // A static program that knows nothing of proxies, and none of our libraries in it.
        let request = b"GET /hostname HTTP/1.0\r\n\r\n";
        let arguments = ["run", "--", &binary("probe"), "raw", "web:80", "head"];
        let run = laptop
            .run_with(&binary("tp"), &arguments, request, LIMIT)
            .ok();
        assert!(run.out().contains("200 OK"), "{how}: {}", run.report());
    };

    get_all("on a connection of its own");
    assert!(left(&laptop).is_empty(), "{:?}", left(&laptop));
    let tp = laptop.connect(&[]);
    get_all("on the connection that is up");
    let run = laptop
        .tp(&["run", "--name", "nobody", "--", "true"])
        .exits(125);
    assert!(
        run.err().contains("no connection named nobody"),
        "{}",
        run.report()
    );
    drop(tp);
}

#[test]
fn each_end_of_a_connection_is_what_the_destination_said() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let _tp = laptop.connect(&[]);

    let calls = [
        "refused('web', 81)",
        "half_close('web')",
        "reset('web')",
        "many('web', 200)",
    ];
    let run = client(&laptop, &[], &calls).ok();

    assert_eq!(
        run.out(),
        "ECONNREFUSED at once\nTrue\nECONNRESET\n200\n",
        "{}",
        run.report()
    );
}

#[test]
fn datagrams_pings_and_names_pass() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (namespace, laptop) = with_probe(&cluster, "run");
    let _tp = laptop.connect(&[]);
    let service = namespace.value("svc/web", ".spec.clusterIP");

    let calls = [
        "udp('web', 0)",
        "udp('web', 1400)",
        "udp('web', 60000)",
        "ping('web')",
    ];
    let run = client(&laptop, &[], &calls).ok();
    assert_eq!(
        run.out(),
        "same\nsame\nsame\nanswered\n",
        "{}",
        run.report()
    );

    let dig = |arguments: &[&str]| {
        let base = ["run", "--", "dig", "+tries=1", "+time=5"];
        laptop.tp(&[&base[..], arguments].concat()).ok().out()
    };
    let name = format!("web.{}.svc.cluster.local", namespace.name);
    assert_eq!(dig(&["+short", &name]).trim(), service);
    assert_eq!(dig(&["+short", "+tcp", &name]).trim(), service);
    assert_eq!(dig(&["+short", "+search", "web"]).trim(), service);
    let srv = dig(&["+short", "srv", &format!("_http._tcp.{name}")]);
    assert!(srv.contains(&format!("80 {name}.")), "{srv}");
    let none = dig(&["aaaa", &name]);
    assert!(
        none.contains("status: NOERROR") && none.contains("ANSWER: 0"),
        "{none}"
    );
    let missing = dig(&[&format!("nobody.{}.svc.cluster.local", namespace.name)]);
    assert!(
        missing.contains("status: NXDOMAIN") && missing.contains("SOA"),
        "{missing}"
    );
}

#[test]
fn a_large_transfer_arrives_whole_on_both_devices() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let _tp = laptop.connect(&[]);

    let run = client(&laptop, &["--device", "veth"], &["echo('web', 256)"]).ok();
    assert_eq!(run.out(), "268435456 True\n", "{}", run.report());

    let arguments = [
        "run",
        "--device",
        "tun",
        "--",
        "python3",
        "client.py",
        "echo('web', 64)",
    ];
    let command = with_tun(&laptop.command(&binary("tp"), &arguments));
    let run = Run::new(command, b"", LONG).ok();
    assert_eq!(run.out(), "67108864 True\n", "{}", run.report());
}

#[test]
fn a_tun_device_is_preferred_where_it_may_be_used() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let _tp = laptop.connect(&[]);
    let explain = ["run", "--explain"];

    let without = laptop.tp(&explain).ok();
    let with = Run::new(
        with_tun(&laptop.command(&binary("tp"), &explain)),
        b"",
        LIMIT,
    )
    .ok();

    let refused = without.out();
    assert!(refused.contains("tun cannot be made here"), "{refused}");
    assert!(refused.contains("veth is used"), "{refused}");
    assert!(with.out().contains("tun is used"), "{}", with.report());
    let calls = [
        "refused('web', 81)",
        "half_close('web')",
        "reset('web')",
        "udp('web', 9000)",
        "ping('web')",
    ];
    let arguments = [&["run", "--", "python3", "client.py"][..], &calls].concat();
    let run = Run::new(
        with_tun(&laptop.command(&binary("tp"), &arguments)),
        b"",
        LIMIT,
    )
    .ok();
    assert_eq!(
        run.out(),
        "ECONNREFUSED at once\nTrue\nECONNRESET\nsame\nanswered\n",
        "{}",
        run.report()
    );
    let forced = laptop
        .tp(&["run", "--device", "tun", "--", "true"])
        .exits(125);
    assert!(forced.err().contains("tun:"), "{}", forced.report());
}

#[test]
fn exit_codes_and_signals_pass_through() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let _tp = laptop.connect(&[]);
    let run = |arguments: &[&str]| laptop.tp(&[&["run", "--"], arguments].concat());

    run(&["true"]).exits(0);
    run(&["sh", "-c", "exit 42"]).exits(42);
    run(&["sh", "-c", "kill -KILL $$"]).exits(137);
    run(&["/usr/bin/no-such-program"]).exits(127);
    run(&["/etc/passwd"]).exits(126);
    let script = "trap 'echo heard; exit 5' TERM; echo $PPID; while :; do sleep 0.05; done";
    let wrapper = format!(
        "{} run -- sh -c \"{}\" > out & until [ -s out ]; do sleep 0.05; done; kill -TERM $!; wait $!; echo $?; cat out",
        binary("tp"),
        script.replace('$', "\\$")
    );
    let signalled = laptop.run("bash", &["-c", &wrapper]).ok();
    let lines: Vec<String> = signalled.out().lines().map(str::to_owned).collect();
    assert_eq!(
        lines.first().map(String::as_str),
        Some("5"),
        "{}",
        signalled.report()
    );
    assert_eq!(
        lines.last().map(String::as_str),
        Some("heard"),
        "{}",
        signalled.report()
    );
}

#[test]
fn a_shell_has_its_terminal_and_job_control() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let _tp = laptop.connect(&[]);

    let tp = binary("tp");
    let shell = ["env", "PS1=READY> ", "TERM=dumb", "bash", "--norc", "-i"];
    let arguments = [&["terminal.py", &tp, "run", "--"], &shell[..]].concat();
    let run = laptop.run("python3", &arguments).ok();

    assert_eq!(run.out(), "7\n", "{}", run.report());
}

#[test]
fn nothing_is_left_however_it_ends() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").expect("proc is mounted");
    let before = mounts();

    let daemonising = "setsid sleep 300 & (setsid sleep 301 &) ; sleep 0.2";
    let run = laptop.tp(&["run", "--", "sh", "-c", daemonising]).ok();
    assert!(run.err().contains("2 programs"), "{}", run.report());
    assert!(left(&laptop).is_empty(), "{:?}", left(&laptop));

    let _tp = laptop.connect(&[]);
    let daemon = left(&laptop);
    let script = "sleep 302 & trap '' TERM HUP INT; sleep 303";
    let mut killed = laptop.spawn_tp(&["run", "--", "sh", "-c", script]);
    let command = || {
        let ours = |(_, line): &(u32, String)| line.contains("/tp run -- sh");
        laptop
            .processes()
            .into_iter()
            .find(ours)
            .map(|(pid, _)| pid)
    };
    let running = || {
        left(&laptop)
            .iter()
            .filter(|(_, line)| line.contains("sleep 30"))
            .count()
            >= 3
    };
    eventually("the program runs", LIMIT, || running().then_some(()));
    let pid = command().expect("tp run is there").to_string();
    tp_tests::process::tool(Command::new("kill").args(["-KILL", &pid]));
    let _ = killed.wait();
    eventually("everything has gone", Duration::from_secs(5), || {
        (left(&laptop) == daemon).then_some(())
    });

    assert_eq!(mounts(), before);
}

#[test]
fn what_is_outside_is_reached_from_the_workstation_unless_offline() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let _tp = laptop.connect(&[]);
    let curl = [
        "--",
        "curl",
        "-sk",
        "-m",
        "20",
        "-w",
        "%{http_code}",
        "-o",
        "/dev/null",
    ];
    let api_server = "https://node-1:6443/version";

    let direct = laptop
        .tp(&[&["run"], &curl[..], &[api_server]].concat())
        .ok();
    let offline = laptop.tp(&[&["run", "--offline"], &curl[..], &[api_server]].concat());
    let cluster_only = laptop.tp(&[&["run", "--offline"], &curl[..], &["http://web/"]].concat());

    assert!(
        ["200", "401", "403"].contains(&direct.out().as_str()),
        "{}",
        direct.report()
    );
    assert_eq!(offline.out(), "000", "{}", offline.report());
    assert_eq!(cluster_only.ok().out(), "200");
}

#[test]
fn ports_are_forwarded_both_ways_where_asked() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let _tp = laptop.connect(&[]);
    laptop.write_file("home/page", "from-the-workstation\n");
    let tp = binary("tp");
    let script = format!(
        "python3 -m http.server --bind 127.0.0.1 18080 > /dev/null 2>&1 & server=$!
         until curl -s -o /dev/null http://127.0.0.1:18080/; do sleep 0.1; done
         {tp} run --host-loopback 8081:18080 -- curl -sS http://localhost:8081/page
         {tp} run -- curl -s -m 5 http://localhost:8081/page || echo not without it
         kill $server
         {tp} run --publish 18090:80 -- python3 -m http.server --bind 127.0.0.1 80 > /dev/null 2>&1 & server=$!
         for i in $(seq 100); do curl -s http://127.0.0.1:18090/page && break; sleep 0.1; done
         kill $server; wait"
    );

    let run = laptop.run("bash", &["-c", &script]).ok();

    assert_eq!(
        run.out(),
        "from-the-workstation\nnot without it\nfrom-the-workstation\n",
        "{}",
        run.report()
    );
}

#[test]
fn proxy_variables_serve_where_all_else_is_refused() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let _tp = laptop.connect(&[]);
    let tp = binary("tp");
    let run = |flags: &[&str]| {
        let curl = ["--", "curl", "-sS", "-m", "20", "http://web/"];
        let arguments = [
            &["sandbox.py", "userns,seccomp", &tp, "run"],
            flags,
            &curl[..],
        ]
        .concat();
        laptop.run("python3", &arguments)
    };

    let explained = laptop
        .run(
            "python3",
            &["sandbox.py", "userns,seccomp", &tp, "run", "--explain"],
        )
        .ok();
    let automatic = run(&[]).ok();
    let forced = run(&["--method", "netns"]).exits(125);
    let offline = run(&["--offline"]).exits(125);
    let chosen = run(&["--method", "proxy-env"]).ok();

    assert!(
        explained.out().contains("method      proxy-env"),
        "{}",
        explained.report()
    );
    assert_eq!(automatic.out(), "hello-from-probe\n");
    assert!(
        automatic.err().contains("proxy variables"),
        "{}",
        automatic.report()
    );
    assert!(
        forced.err().contains("making namespaces"),
        "{}",
        forced.report()
    );
    assert_eq!(chosen.out(), "hello-from-probe\n");
    for what in ["making namespaces", "--method notify", "--method proxy-env"] {
        assert!(offline.err().contains(what), "{what}: {}", offline.report());
    }
}

#[test]
fn a_connection_that_ends_resets_its_flows_and_is_said() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster, "run");
    let tp = laptop.connect(&[]);
    let script = r#"
import socket
s = socket.create_connection(("web", 7), timeout=20)
s.sendall(b"x"); print(s.recv(1).decode(), flush=True)
try:
    print(s.recv(1))
except OSError as error:
    print(type(error).__name__)
"#;
    laptop.write_file("home/cut.py", script);
    let command = format!(
        "{tp} run -- python3 cut.py > out & until [ -s out ]; do sleep 0.05; done; {tp} quit --all; wait $!; cat out",
        tp = binary("tp")
    );

    let run = laptop.run("bash", &["-c", &command]).ok();

    assert!(
        run.out().ends_with("x\nConnectionResetError\n"),
        "{}",
        run.report()
    );
    assert!(
        run.err().contains("connection was ended"),
        "{}",
        run.report()
    );
    drop(tp);
}
