//! gRPC, WebSocket and GraphQL on the whole way from a client in the cluster to the laptop, with clients and servers that we did
//! not write: Debian's grpcio, websockets and graphql-core, as in `agent/tests/others`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

use tp_tests::{Cluster, Laptop, Namespace, Program, Run, User, eventually};

/// The node's own Python runs one of the scripts as the application.
const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: $NS}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: python
        image: lab.local/busybox:1.35
        command: [/usr/bin/python3, /scripts/$SCRIPT, serve, app, "0.0.0.0:8080"$MORE]
        ports: [{name: app, containerPort: 8080}]
        readinessProbe: {tcpSocket: {port: app}, periodSeconds: 1}
        volumeMounts:
        - {name: scripts, mountPath: /scripts}
        - {name: tls, mountPath: /tls}
        - {name: usr, mountPath: /usr, readOnly: true}
        - {name: lib, mountPath: /lib, readOnly: true}
        - {name: lib64, mountPath: /lib64, readOnly: true}
      volumes:
      - {name: scripts, configMap: {name: scripts}}
      - {name: tls, secret: {secretName: web-tls}}
      - {name: usr, hostPath: {path: /usr}}
      - {name: lib, hostPath: {path: /usr/lib}}
      - {name: lib64, hostPath: {path: /usr/lib64}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: $NS}
spec: {selector: {app: web}, ports: [{name: app, port: 8080}]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: web-tls, namespace: $NS}
rules: [{apiGroups: [""], resources: [secrets], resourceNames: [web-tls], verbs: [get]}]
"#;

/// How long an idle connection may stay open that was to be closed.
const LIMIT: Duration = Duration::from_secs(10);

/// Where the scripts are, each a server and a client that knows which of two servers has to answer.
const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../agent/tests/others");

/// One script as the application and on the laptop, and what only the laptop's is to have.
struct Case {
    script: &'static str,
    flags: &'static [&'static str],
    tls: bool,
}

impl Case {
    fn path(&self) -> String {
        format!("{SCRIPTS}/{}", self.script)
    }
}

#[test]
fn grpc_of_all_four_kinds_with_trailers_and_deadlines() {
    each_server_has_what_is_its_own(&Case {
        script: "grpc_peer.py",
        flags: &["--http-header", "x-tp-user=ada"],
        tls: false,
    });
}

#[test]
fn grpc_inside_of_tls() {
    each_server_has_what_is_its_own(&Case {
        script: "grpc_peer.py",
        flags: &["--http-header", "x-tp-user=ada", "--tls-secret", "web-tls"],
        tls: true,
    });
}

#[test]
fn websockets() {
    each_server_has_what_is_its_own(&Case {
        script: "websocket_peer.py",
        flags: &["--http-header", "x-tp-user=ada"],
        tls: false,
    });
}

#[test]
fn graphql_operations_however_they_are_sent() {
    each_server_has_what_is_its_own(&Case {
        script: "graphql_peer.py",
        flags: &["--graphql-operation", "GetCart"],
        tls: false,
    });
}

#[test]
fn a_grpc_channel_from_before_is_counted_and_closed_where_asked_for_and_then_routed() {
    what_was_open_before("grpc", "grpc_peer.py");
}

#[test]
fn a_kept_http_connection_from_before_is_counted_and_closed_where_asked_for_and_then_routed() {
    what_was_open_before("http", "graphql_peer.py");
}

fn what_was_open_before(kind: &str, script: &'static str) {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let case = Case {
        script,
        flags: &["--http-header", "x-tp-user=ada"],
        tls: false,
    };
    let lab = Lab::start(&cluster, &case);
    let _tp = lab.laptop.connect(&[]);
    let mut client = Client::start(&cluster, kind, &lab.address());
    assert_eq!(client.ask(), "app");

    let counted = lab.intercept(&case, &[]);

    let warning = "1 connection to port 8080 was open before";
    assert!(counted.err().contains(warning), "{}", counted.report());
    assert_eq!(client.ask(), "app", "nobody asked to close it");
    lab.laptop.tp(&["leave", "web"]).ok();
    lab.intercept(&case, &["--close-idle"]);
    eventually("idle for a second, it is closed", LIMIT, || {
        let status = lab.laptop.tp(&["status", "--output", "json"]).ok().json();
        let intercept = &status["connections"][0]["intercepts"][0];
        (intercept["open_before"] == 0).then_some(())
    });
    assert_eq!(client.ask(), "local");
    lab.laptop.tp(&["leave", "web"]).ok();
    assert_eq!(client.ask(), "app");
}

/// `held_open.py` on the node. Dropping it ends it.
struct Client {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Client {
    fn start(cluster: &Cluster, kind: &str, address: &str) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/held_open.py");
        let mut command = cluster.node_command(&["/usr/bin/python3", script, kind, address]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3 starts");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, answers }
    }

    fn ask(&mut self) -> String {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        stdin.write_all(b"\n").expect("it reads");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("it answers");
        answer.trim_end().to_owned()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The application in the cluster, and its developer with the same program on the laptop.
struct Lab<'a> {
    namespace: Namespace<'a>,
    certificate: String,
    laptop: Laptop,
    program: Program,
}

impl<'a> Lab<'a> {
    fn start(cluster: &'a Cluster, case: &Case) -> Self {
        let namespace = cluster.namespace("protocols");
        let certificate = application(cluster, &namespace, case);
        let user = User::who_intercepts(cluster, "ada", &namespace);
        let who = format!("--user={}", user.name);
        let binding = ["create", "rolebinding", "web-tls", "--role=web-tls", &who];
        cluster.kubectl(&[&["-n", &namespace.name], &binding[..]].concat());
        let laptop = Laptop::of(cluster, &user);
        let source = std::fs::read_to_string(case.path()).expect("it is in the repository");
        let program = Program::start(&laptop, &source, &["serve", "local"]);
        Self {
            namespace,
            certificate,
            laptop,
            program,
        }
    }

    /// Where clients in the cluster find it.
    fn address(&self) -> String {
        let service = self.namespace.value("svc/web", ".spec.clusterIP");
        format!("{service}:8080")
    }

    #[track_caller]
    fn intercept(&self, case: &Case, more: &[&str]) -> Run {
        let intercept = ["intercept", "web", "-p", &self.program.port];
        let arguments = [&intercept[..], case.flags, more].concat();
        self.laptop.tp(&arguments).ok()
    }
}

fn each_server_has_what_is_its_own(case: &Case) {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let lab = Lab::start(&cluster, case);
    let _tp = lab.laptop.connect(&[]);
    lab.intercept(case, &[]);

    let trusted = lab.laptop.write_file("home/web.crt", &lab.certificate);
    let trusted = case.tls.then(|| trusted.display().to_string());
    let (script, address) = (case.path(), lab.address());
    let mut call = vec!["/usr/bin/python3", &script, "call", &address];
    call.extend(trusted.as_deref());
    cluster.on_node(&call);
}

/// Starts the application, and gives the certificate that it may use.
fn application(cluster: &Cluster, namespace: &Namespace<'_>, case: &Case) -> String {
    let (certificate, key) = namespace.certificate("web", 2040);
    namespace.put_tls_secret("web-tls", &certificate, &key);
    let folder = format!("--from-file={SCRIPTS}");
    let scripts = ["create", "configmap", "scripts", &folder];
    cluster.kubectl(&[&["-n", &namespace.name], &scripts[..]].concat());
    let more = match case.tls {
        true => ", /tls/tls.crt, /tls/tls.key",
        false => "",
    };
    let manifest = WEB.replace("$SCRIPT", case.script).replace("$MORE", more);
    namespace.apply(&manifest);
    namespace.wait_ready("app=web");
    namespace.wait_service("web", 8080);
    certificate
}
