//! `tp run --method notify`: where user namespaces are refused, the program's system calls are answered.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use tp_tests::laptop::binary;
use tp_tests::process::{LIMIT, tool};
use tp_tests::{Cluster, Laptop, Namespace, Run, User, clients, eventually};

/// A namespace with our probe as Service `web`, and a user's laptop on which user namespaces are refused.
fn with_probe(cluster: &Cluster) -> (Namespace<'_>, Laptop) {
    let namespace = cluster.namespace("notify");
    namespace.probe("web");
    let user = User::of_namespace(cluster, "ada", &namespace);
    let laptop = Laptop::of(cluster, &user);
    laptop.write_file("home/client.py", clients::SOCKET_CALLS);
    laptop.write_file("home/asynchronous.py", clients::ASYNCHRONOUS);
    laptop.write_file("home/sandbox.py", clients::SANDBOX);
    laptop.write_file("home/terminal.py", clients::TERMINAL);
    let begun = ["curl", "-s", "-o", "/dev/null", "-m", "2", "http://web/"];
    // The node's rules for a new Service come a moment after it.
    eventually("the Service is served", Duration::from_secs(20), || {
        run(&laptop, &[], &begun).succeeded().then_some(())
    });
    (namespace, laptop)
}

/// `tp run` where `refused` is refused.
fn run_where(laptop: &Laptop, refused: &str, flags: &[&str], command: &[&str]) -> Run {
    let tp = binary("tp");
    let arguments = [
        &["sandbox.py", refused, &tp, "run"],
        flags,
        &["--"],
        command,
    ]
    .concat();
    laptop.run("python3", &arguments)
}

fn run(laptop: &Laptop, flags: &[&str], command: &[&str]) -> Run {
    run_where(laptop, "userns", flags, command)
}

fn python(laptop: &Laptop, script: &str, calls: &[&str]) -> Run {
    run(laptop, &[], &[&["python3", script], calls].concat())
}

fn explain(laptop: &Laptop, refused: &str) -> String {
    let arguments = ["sandbox.py", refused, &binary("tp"), "run", "--explain"];
    laptop.run("python3", &arguments).ok().out()
}

/// A static program that is none of ours, with a resolver of its own: it prints what an HTTP server says.
fn go_program() -> (TempDir, PathBuf) {
    let source = r#"package main

import ("bufio"; "fmt"; "net"; "os"; "sync"; "time")

func get(host string) string {
	c, err := net.DialTimeout("tcp", host + ":80", 10 * time.Second)
	if err != nil { return err.Error() }
	defer c.Close()
	fmt.Fprintf(c, "GET / HTTP/1.0\r\nHost: %s\r\n\r\n", host)
	last, scanner := "", bufio.NewScanner(c)
	for scanner.Scan() { last = scanner.Text() }
	return last
}

func main() {
	var all sync.WaitGroup
	for _, host := range os.Args[1:] {
		all.Add(1)
		go func() { defer all.Done(); fmt.Println(get(host)) }()
	}
	all.Wait()
}
"#;
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("main.go"), source).expect("our folder is writable");
    fs::write(folder.path().join("go.mod"), "module get\n\ngo 1.22\n").expect("our folder");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut build = Command::new("go");
    build
        .args(["build", "-o", "get", "."])
        .current_dir(folder.path())
        .env("PATH", format!("{path}:/usr/local/go/bin"))
        .env("CGO_ENABLED", "0");
    tool(&mut build);
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("our folder");
    let program = folder.path().join("get");
    (folder, program)
}

#[test]
fn it_is_chosen_where_namespaces_are_refused_and_reaches_services_by_name_and_address() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (namespace, laptop) = with_probe(&cluster);
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
            let curl = ["curl", "-sS", "--fail", "-m", "20", &url];
            let got = run(&laptop, &[], &curl).ok();
            assert_eq!(got.out(), "hello-from-probe\n", "{how}: {}", got.report());
            assert!(got.err().contains("--method notify"), "{}", got.report());
        }
    };

    let explained = explain(&laptop, "userns");
    for line in [
        "netns       refused when making namespaces",
        "notify      works",
        "method      notify",
        "limit       TCP and names only",
    ] {
        assert!(explained.contains(line), "{line}: {explained}");
    }
    get_all("on a connection of its own");
    assert!(laptop.processes().is_empty(), "{:?}", laptop.processes());
    let _tp = laptop.connect(&[]);
    get_all("on the connection that is up");
    let forced = laptop.tp(&[
        "run",
        "--method",
        "notify",
        "--",
        "curl",
        "-sS",
        "http://web/",
    ]);
    assert_eq!(
        forced.ok().out(),
        "hello-from-probe\n",
        "namespaces work here"
    );

    let (_folder, program) = go_program();
    let program = program.display().to_string();
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let got = run(&laptop, &[], &[&[program.as_str()], &hosts[..]].concat()).ok();
    assert_eq!(
        got.out(),
        "hello-from-probe\n".repeat(5),
        "{}",
        got.report()
    );
}

#[test]
fn each_end_of_a_connection_is_what_the_destination_said() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    let _tp = laptop.connect(&[]);

    let calls = [
        "refused('web', 81)",
        "half_close('web')",
        "reset('web')",
        "many('web', 200)",
        "echo('web', 64)",
        "peer('web')",
        "interrupted('web')",
    ];
    let blocking = python(&laptop, "client.py", &calls).ok();
    let calls = [
        "one('web')",
        "failure('web', 81)",
        "many('web', 200)",
        "progress('web', 80)",
        "progress('web', 81)",
    ];
    let asynchronous = python(&laptop, "asynchronous.py", &calls).ok();

    assert_eq!(
        blocking.out(),
        "ECONNREFUSED at once\nTrue\nECONNRESET\n200\n67108864 True\nTrue\nTrue\n",
        "{}",
        blocking.report()
    );
    assert_eq!(
        asynchronous.out(),
        "True\n\
         ECONNREFUSED at once\n\
         200 together\n\
         EINPROGRESS 0 0 True\n\
         EINPROGRESS ECONNREFUSED 0 no peer\n",
        "{}",
        asynchronous.report()
    );
}

#[test]
fn a_destination_that_does_not_answer_delays_nobody_else() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (namespace, laptop) = with_probe(&cluster);
    let _tp = laptop.connect(&[]);
    // A pod's neighbour that is not there.
    let pod = namespace.value("pod/web", ".status.podIP");
    let (range, _) = pod.rsplit_once('.').expect("an IPv4 address");
    let silent = format!("{range}.253");

    let asynchronous = format!("beside('{silent}', 'web')");
    let asynchronous = python(&laptop, "asynchronous.py", &[&asynchronous]).ok();
    let threads = format!("beside('{silent}', 'web')");
    let threads = python(&laptop, "client.py", &[&threads]).ok();

    for run in [asynchronous, threads] {
        assert_eq!(run.out(), "True True False True\n", "{}", run.report());
    }
}

#[test]
fn names_are_the_clusters_and_the_workstations() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (namespace, laptop) = with_probe(&cluster);
    let _tp = laptop.connect(&[]);
    let service = namespace.value("svc/web", ".spec.clusterIP");
    let dig = |arguments: &[&str]| {
        let base = ["dig", "+tries=1", "+time=5"];
        run(&laptop, &[], &[&base[..], arguments].concat())
            .ok()
            .out()
    };
    let name = format!("web.{}.svc.cluster.local", namespace.name);

    assert_eq!(dig(&["+short", &name]).trim(), service);
    assert_eq!(dig(&["+short", "+tcp", &name]).trim(), service);
    let short = dig(&["+short", "web"]);
    assert_eq!(short, format!("{name}.\n{service}\n"));
    let none = dig(&["aaaa", &name]);
    assert!(
        none.contains("status: NOERROR") && none.contains("ANSWER: 0"),
        "{none}"
    );
    let missing = dig(&[&format!("nobody.{}.svc.cluster.local", namespace.name)]);
    assert!(missing.contains("status: NXDOMAIN"), "{missing}");
    let unknown = format!("unknown('nobody.{}.svc.cluster.local')", namespace.name);
    let unknown = python(&laptop, "client.py", &[&unknown, "outside('node-1')"]).ok();
    assert_eq!(
        unknown.out(),
        "no such name at once\nTrue\n",
        "{}",
        unknown.report()
    );

    let get = "curl -sk -m 20 -w %{http_code} -o /dev/null https://node-1:6443/version";
    let outside = run(&laptop, &[], &["sh", "-c", get]).ok();
    assert!(
        ["200", "401", "403"].contains(&outside.out().as_str()),
        "{}",
        outside.report()
    );
}

#[test]
fn children_inherit_it_and_io_uring_is_not_there() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    let _tp = laptop.connect(&[]);

    let script = "for i in 1 2 3; do curl -sS -m 20 http://web/ & done; wait; (setsid sh -c 'sleep 0.1; \
                  curl -sS -m 20 http://web/ > late') & sleep 3; cat late";
    let forked = run(&laptop, &[], &["sh", "-c", script]).ok();
    let ring = python(&laptop, "client.py", &["io_uring()"]).ok();

    assert_eq!(forked.out(), "hello-from-probe\n".repeat(4));
    assert_eq!(ring.out(), "ENOSYS\n");
}

#[test]
fn exit_codes_signals_and_the_terminal_pass_through() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    let _tp = laptop.connect(&[]);

    run(&laptop, &[], &["sh", "-c", "exit 42"]).exits(42);
    run(&laptop, &[], &["sh", "-c", "kill -KILL $$"]).exits(137);
    run(&laptop, &[], &["/usr/bin/no-such-program"]).exits(127);
    run(&laptop, &[], &["/etc/passwd"]).exits(126);
    run(&laptop, &["--offline"], &["true"]).exits(125);
    let limit = |tp: &str| format!("ulimit -n 333; {tp} sh -c 'ulimit -n'");
    let through = format!("python3 sandbox.py userns {} run --", binary("tp"));
    let limited = laptop.run("bash", &["-c", &limit(&through)]).ok();
    assert_eq!(limited.out(), "333\n", "{}", limited.report());

    let script = "trap 'echo heard; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let wrapper = format!(
        "{through} sh -c \"{script}\" > out & until [ -s out ]; do sleep 0.05; done; kill -TERM $!; wait $!; echo $?; cat out"
    );
    let signalled = laptop.run("bash", &["-c", &wrapper]).ok();
    assert_eq!(
        signalled.out(),
        "5\nready\nheard\n",
        "{}",
        signalled.report()
    );

    let tp = binary("tp");
    let shell = ["env", "PS1=READY> ", "TERM=dumb", "bash", "--norc", "-i"];
    let through = [
        "terminal.py",
        "python3",
        "sandbox.py",
        "userns",
        &tp,
        "run",
        "--",
    ];
    let terminal = laptop.run("python3", &[&through[..], &shell].concat()).ok();
    assert_eq!(terminal.out(), "7\n", "{}", terminal.report());
}

#[test]
fn nothing_is_left_however_it_ends() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    let daemonising = "setsid sleep 300 & (setsid sleep 301 &) ; sleep 0.2";

    // Those of the first attempts, which may have failed.
    let files = || fs::read_dir(laptop.path("run/tp")).map_or(0, Iterator::count);
    let before = files();

    let ended = run(&laptop, &[], &["sh", "-c", daemonising]).ok();
    assert_eq!(files(), before, "a program that ended well leaves no file");
    assert!(ended.err().contains("2 programs"), "{}", ended.report());
    assert!(laptop.processes().is_empty(), "{:?}", laptop.processes());

    let _tp = laptop.connect(&[]);
    let daemon = laptop.processes();
    let script = "sleep 302 & trap '' TERM HUP INT; sleep 303";
    let mut killed = laptop.spawn_tp(&["run", "--method", "notify", "--", "sh", "-c", script]);
    let line = |text: &str| {
        let processes = laptop.processes();
        let found = processes
            .into_iter()
            .filter(|(_, line)| line.contains(text));
        found.map(|(pid, _)| pid).collect::<Vec<_>>()
    };
    let runs = |(_, line): &(u32, String)| line.trim() == "sleep 303";
    eventually("the program runs", LIMIT, || {
        laptop.processes().iter().any(runs).then_some(())
    });
    let pid = line("tp run --method")
        .first()
        .expect("it runs")
        .to_string();
    tool(Command::new("kill").args(["-KILL", &pid]));
    let _ = killed.wait();
    eventually("everything has gone", Duration::from_secs(5), || {
        (laptop.processes() == daemon).then_some(())
    });
}

#[test]
fn a_connection_that_ends_resets_its_flows_and_is_said() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    let tp = laptop.connect(&[]);
    let command = format!(
        "python3 sandbox.py userns {tp} run -- python3 client.py \"cut('web')\" > out & \
         until [ -s out ]; do sleep 0.05; done; {tp} quit --all; wait $!; cat out",
        tp = binary("tp")
    );

    let run = laptop.run("bash", &["-c", &command]).ok();

    assert!(
        run.out().ends_with("x\nECONNRESET ENETUNREACH\n"),
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

#[test]
fn what_stands_in_its_way_is_said() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    let _tp = laptop.connect(&[]);
    let forced = |refused: &str| {
        run_where(&laptop, refused, &["--method", "notify"], &["true"])
            .exits(125)
            .err()
    };

    assert!(explain(&laptop, "userns,seccomp").contains("method      proxy-env"));
    assert!(forced("seccomp").contains("putting the program under a filter"));
    let listener = forced("listener");
    assert!(
        listener.contains("listens to its system calls already"),
        "{listener}"
    );
    let curl = ["curl", "-sS", "-m", "20", "http://web/"];
    let last = run_where(&laptop, "userns,listener", &[], &curl).ok();
    assert_eq!(last.out(), "hello-from-probe\n", "{}", last.report());
    assert!(last.err().contains("proxy variables"), "{}", last.report());
}
