//! Personal intercepts: requests that match reach the laptop, all others stay with the application.

use std::time::Duration;

use tp_tests::{Cluster, Connection, Laptop, Namespace, Program, User, eventually};

/// Two replicas that answer `app`, and a container environment.
const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: $NS}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: httpd
        image: lab.local/busybox:1.35
        command: [sh, -c, "mkdir /www; echo app >/www/index.html; exec httpd -f -p 8080 -h /www"]
        env:
        - {name: GREETING, value: "it's $5 \"a\" day"}
        - {name: NODE_OPTIONS, value: "--require /nowhere.js"}
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {tcpSocket: {port: http}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: $NS}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: exec, namespace: $NS}
rules: [{apiGroups: [""], resources: [pods/exec], verbs: [create, get]}]
"#;

/// A program of the laptop that answers with its name, on a port of the kernel's choice that it prints.
const PROGRAM: &str = r#"
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = sys.argv[1].encode() + b"\n"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer.handle_error = lambda *a: None
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"#;

fn web(cluster: &Cluster) -> Namespace<'_> {
    let namespace = cluster.namespace("intercept");
    namespace.apply(WEB);
    namespace.wait_ready("app=web");
    namespace.wait_service("web", 80);
    namespace
}

/// Arguments of `tp` by which Ada's requests to `web` lead to the program.
fn of_ada(program: &Program) -> [&str; 6] {
    [
        "intercept",
        "web",
        "--http-header",
        "x-user=ada",
        "-p",
        &program.port,
    ]
}

/// What answers a request with this header, its answer's head included.
#[track_caller]
fn answer(tp: &Connection<'_>, header: &str) -> String {
    tp.curl(&["--include", "--header", header, "http://web/"])
        .ok()
        .out()
}

/// Who answered: the last line, and whether somebody else should have.
#[track_caller]
fn answerer(tp: &Connection<'_>, header: &str) -> String {
    let answer = answer(tp, header).to_ascii_lowercase();
    let last = answer.lines().last().unwrap_or_default();
    match answer.contains("x-tp-fallback: 1") {
        true => format!("{last} instead"),
        false => last.to_owned(),
    }
}

fn intercepts(namespace: &Namespace<'_>, cluster: &Cluster) -> String {
    let arguments = [
        "-n",
        &namespace.name,
        "get",
        "intercepts.tp.dev",
        "-o",
        "name",
    ];
    cluster.kubectl(&arguments)
}

#[test]
fn matching_requests_reach_the_laptop_and_all_others_the_application() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let laptop = Laptop::of(&cluster, &User::who_intercepts(&cluster, "ada", &namespace));
    let program = Program::start(&laptop, PROGRAM, &["laptop"]);
    let tp = laptop.connect(&[]);
    assert_eq!(answerer(&tp, "x-user: ada"), "app");

    let run = laptop.tp(&of_ada(&program)).ok();

    for _ in 0..20 {
        assert_eq!(answerer(&tp, "x-user: ada"), "laptop", "{}", run.report());
        assert_eq!(answerer(&tp, "x-user: bob"), "app");
        assert_eq!(answerer(&tp, "x-other: ada"), "app");
    }
    assert!(run.err().contains("guesses"), "{}", run.report());
    let status = tp.status();
    let intercept = &status["intercepts"][0];
    assert_eq!(intercept["ready"], true, "{status}");
    assert_eq!(intercept["pods_attached"], 2, "{status}");
    assert!(intercept["flows"].as_u64() >= Some(1), "{status}");
    let list = laptop.tp(&["list", "-i"]).ok().out();
    assert!(
        list.contains("header x-user") && !list.contains("= ada"),
        "{list}"
    );
    let explained = laptop
        .tp(&["explain", "-H", "x-user: ada", "http://web/"])
        .ok()
        .out();
    assert!(
        explained.contains("answered by the workstation"),
        "{explained}"
    );

    watching_shows_mine_and_no_secret(&laptop, &tp);

    laptop.tp(&["leave", "web"]).ok();
    assert_eq!(answerer(&tp, "x-user: ada"), "app");
    assert_eq!(intercepts(&namespace, &cluster), "");
}

fn watching_shows_mine_and_no_secret(laptop: &Laptop, tp: &Connection<'_>) {
    use std::io::BufRead as _;
    let mut watching = laptop.spawn_tp(&["intercept", "web", "--watch", "--output", "json"]);
    let stdout = watching.stdout.take().expect("stdout is a pipe");
    let (line_tx, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let lines = std::io::BufReader::new(stdout).lines();
        lines
            .map_while(Result::ok)
            .all(|line| line_tx.send(line).is_ok())
    });
    let ask = |path: &str, header: &str| {
        let (secret, url) = (
            "authorization: Bearer s3cret",
            format!("http://web/?{path}"),
        );
        tp.curl(&["--header", header, "--header", secret, &url])
            .ok();
    };
    // Requests from before may keep the agents from asking again for a second.
    let (line, _) = eventually("a request is told", Duration::from_secs(10), || {
        ask("others", "x-user: bob");
        ask("mine", "x-user: ada");
        lines.try_recv().ok()
    });
    watching.kill().expect("our child");
    watching.wait().expect("our child");

    let seen: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(seen["target"], "/?mine", "{line}");
    assert_eq!(seen["by"], "workstation", "{line}");
    assert!(
        line.contains("x-user") && !line.contains("s3cret"),
        "{line}"
    );
}

#[test]
fn without_a_flag_a_random_header_chooses_and_the_printed_line_works() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let laptop = Laptop::of(&cluster, &User::who_intercepts(&cluster, "ada", &namespace));
    let program = Program::start(&laptop, PROGRAM, &["laptop"]);
    let tp = laptop.connect(&[]);

    let arguments = ["intercept", "web", "-p", &program.port, "--output", "json"];
    let to_pod = ["--to-pod", "8080"];
    let made = laptop.tp(&[&arguments[..], &to_pod].concat()).ok().json();

    let curl: Vec<&str> = made["curl"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|word| word.as_str())
        .collect();
    assert!(curl[1].len() >= "x-tp-intercept: ".len() + 26, "{made}");
    let printed = laptop.tp(&[&["curl", "-s"], &curl[..]].concat()).ok().out();
    assert_eq!(printed, "laptop\n");
    assert_eq!(
        answerer(&tp, "x-tp-intercept: aaaaaaaaaaaaaaaaaaaaaaaaaa"),
        "app"
    );
    let of_pod = || laptop.run("curl", &["-s", "http://127.0.0.1:8080/"]);
    assert_eq!(of_pod().ok().out(), "app\n");
    laptop.tp(&["leave", "web"]).ok();
    of_pod().exits(7);
}

#[test]
fn a_closed_local_port_lets_the_application_answer() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let laptop = Laptop::of(&cluster, &User::who_intercepts(&cluster, "ada", &namespace));
    let program = Program::start(&laptop, PROGRAM, &["laptop"]);
    let tp = laptop.connect(&[]);
    laptop.tp(&of_ada(&program)).ok();
    assert_eq!(answerer(&tp, "x-user: ada"), "laptop");

    drop(program);
    let answer = answer(&tp, "x-user: ada");

    assert!(answer.ends_with("app\n"), "{answer}");
    assert!(
        answer.to_ascii_lowercase().contains("x-tp-fallback: 1"),
        "{answer}"
    );
    let refused = tp.status()["intercepts"][0]["refused"].as_u64();
    assert!(refused >= Some(1), "{refused:?}");
}

#[test]
fn a_command_gets_the_environment_and_ends_the_intercept_with_its_exit_code() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let user = User::who_intercepts(&cluster, "ada", &namespace);
    let laptop = Laptop::of(&cluster, &user);
    let _tp = laptop.connect(&[]);
    let script = r#"printf '%s|%s|%s|%s' "$GREETING" "${NODE_OPTIONS-unset}" "$TELEPRESENCE_CONTAINER" "${TP_INTERCEPT_ID:+id}"; exit 42"#;
    let intercept = ["intercept", "web", "-p", "9", "--http-header", "auto"];

    // Without the right to read it, the command runs all the same.
    let without = laptop
        .tp(&[&intercept[..], &["--", "sh", "-c", script]].concat())
        .exits(42);
    assert_eq!(without.out(), "|unset|httpd|id");
    assert!(without.err().contains("pods/exec"), "{}", without.report());
    let refused = laptop
        .tp(&[&intercept[..], &["--env-file", "web.env"]].concat())
        .exits(1);
    assert!(refused.err().contains("pods/exec"), "{}", refused.report());

    let (role, who) = ("--role=exec", format!("--user={}", user.name));
    let binding = [
        "-n",
        &namespace.name,
        "create",
        "rolebinding",
        "exec",
        role,
        &who,
    ];
    cluster.kubectl(&binding);
    let file = ["--env-file", "web.env", "--env-syntax", "sh"];
    let with = laptop
        .tp(&[&intercept[..], &file, &["--", "sh", "-c", script]].concat())
        .exits(42);

    assert_eq!(with.out(), "it's $5 \"a\" day|unset|httpd|id");
    let read = laptop
        .run("sh", &["-c", ". ./web.env; printf %s \"$GREETING\""])
        .ok();
    assert_eq!(read.out(), "it's $5 \"a\" day");
    assert_eq!(
        laptop.run("stat", &["-c", "%a", "web.env"]).ok().out(),
        "600\n"
    );
    let script = r#"printf '%s|%s|' "$GREETING" "$TP_CONTAINER"; curl -s http://web/"#;
    let whole = ["run", "--workload", "web", "--", "sh", "-c", script];
    assert_eq!(
        laptop.tp(&whole).ok().out(),
        "it's $5 \"a\" day|httpd|app\n"
    );
    assert_eq!(intercepts(&namespace, &cluster), "");
    let nested = [
        "--",
        &tp_tests::laptop::binary("tp"),
        "run",
        "--",
        "curl",
        "-s",
        "http://web/",
    ];
    let nested = laptop.tp(&[&intercept[..], &nested].concat()).ok();
    assert_eq!(nested.out(), "app\n", "{}", nested.report());
    let missing = laptop
        .tp(&[&intercept[..], &["--", "./missing"]].concat())
        .exits(127);
    assert!(missing.err().contains("./missing"), "{}", missing.report());
    assert_eq!(intercepts(&namespace, &cluster), "");
}

#[test]
fn an_intercept_ends_with_the_command_that_was_killed() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let laptop = Laptop::of(&cluster, &User::who_intercepts(&cluster, "ada", &namespace));
    let _tp = laptop.connect(&[]);
    let arguments = ["intercept", "web", "-p", "9", "--", "sleep", "1000"];
    let mut command = laptop.spawn_tp(&arguments);
    eventually("the intercept is there", Duration::from_secs(20), || {
        (!intercepts(&namespace, &cluster).is_empty()).then_some(())
    });
    eventually("the command runs", Duration::from_secs(20), || {
        let runs = |(_, line): &(u32, String)| line.starts_with("sleep 1000");
        laptop.processes().iter().any(runs).then_some(())
    });

    command.kill().unwrap();
    command.wait().unwrap();

    eventually("the intercept is gone", Duration::from_secs(5), || {
        intercepts(&namespace, &cluster).is_empty().then_some(())
    });
}

#[test]
fn two_users_share_a_port_and_the_same_requests_belong_to_one() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let laptops = ["ada", "bob"]
        .map(|name| Laptop::of(&cluster, &User::who_intercepts(&cluster, name, &namespace)));
    let programs = [0, 1].map(|n| Program::start(&laptops[n], PROGRAM, &[["ada", "bob"][n]]));
    let connections = [laptops[0].connect(&[]), laptops[1].connect(&[])];
    for (laptop, (program, header)) in laptops
        .iter()
        .zip(programs.iter().zip(["x-user=ada", "x-user=bob"]))
    {
        laptop
            .tp(&[
                "intercept",
                "web",
                "--http-header",
                header,
                "-p",
                &program.port,
            ])
            .ok();
    }

    for tp in &connections {
        assert_eq!(answerer(tp, "x-user: ada"), "ada");
        assert_eq!(answerer(tp, "x-user: bob"), "bob");
        assert_eq!(answerer(tp, "x-user: eve"), "app");
    }
    let same = [
        "intercept",
        "again",
        "-w",
        "web",
        "--http-header",
        "x-user=ada",
        "-p",
        "9",
    ];
    let refused = laptops[1].tp(&same).exits(1);
    assert!(
        refused.err().contains("ada."),
        "the holder is named: {}",
        refused.report()
    );
    assert!(
        refused.took < Duration::from_secs(5),
        "{}",
        refused.report()
    );
}

#[test]
fn what_a_killed_daemon_left_behind_is_taken_over() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = web(&cluster);
    let laptop = Laptop::of(&cluster, &User::who_intercepts(&cluster, "ada", &namespace));
    let program = Program::start(&laptop, PROGRAM, &["laptop"]);
    let _tp = laptop.connect(&[]);
    laptop.tp(&of_ada(&program)).ok();

    let daemon = laptop.daemon().to_string();
    laptop.run("kill", &["-9", &daemon]).ok();
    laptop.tp(&["quit", "--all"]);
    let tp = laptop.connect(&[]);
    assert_ne!(intercepts(&namespace, &cluster), "", "nobody removed it");
    assert!(answerer(&tp, "x-user: ada").starts_with("app"));

    laptop.tp(&of_ada(&program)).ok();

    assert_eq!(answerer(&tp, "x-user: ada"), "laptop");
    laptop.tp(&["quit"]).ok();
    assert_eq!(intercepts(&namespace, &cluster), "");
}
