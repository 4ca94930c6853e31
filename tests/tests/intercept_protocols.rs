//! gRPC, WebSocket and GraphQL on the whole way from a client in the cluster to the laptop, with clients and servers that we did
//! not write: Debian's grpcio, websockets and graphql-core, as in `agent/tests/others`.

use tp_tests::{Cluster, Laptop, Namespace, Program, User};

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

/// Where the scripts are, each a server and a client that knows which of two servers has to answer.
const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../agent/tests/others");

/// One script as the application and on the laptop, and what only the laptop's is to have.
struct Case {
    script: &'static str,
    flags: &'static [&'static str],
    tls: bool,
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

fn each_server_has_what_is_its_own(case: &Case) {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("protocols");
    let certificate = application(&cluster, &namespace, case);
    let user = User::of_namespace(&cluster, "ada", &namespace);
    user.grant(&cluster, &namespace.name, "tp-intercept");
    let who = format!("--user={}", user.name);
    let binding = ["create", "rolebinding", "web-tls", "--role=web-tls", &who];
    cluster.kubectl(&[&["-n", &namespace.name], &binding[..]].concat());
    let laptop = Laptop::of(&cluster, &user);
    let script = format!("{SCRIPTS}/{}", case.script);
    let source = std::fs::read_to_string(&script).expect("it is in the repository");
    let program = Program::start(&laptop, &source, &["serve", "local"]);
    let _tp = laptop.connect(&[]);
    let intercept = ["intercept", "web", "-p", &program.port];
    laptop.tp(&[&intercept[..], case.flags].concat()).ok();

    let service = namespace.value("svc/web", ".spec.clusterIP");
    let trusted = laptop.write_file("home/web.crt", &certificate);
    let trusted = case.tls.then(|| trusted.display().to_string());
    let address = format!("{service}:8080");
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
