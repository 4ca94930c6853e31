//! Requests inside of TLS: opened with a Secret that the user may read, and with no other.

use std::time::Duration;

use tp_tests::{Cluster, Connection, Laptop, Namespace, Program, User, eventually};

/// Two replicas of nginx with TLS, HTTP/1.1 and HTTP/2, whose certificate is in the Secret `web-tls`.
const WEB: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: nginx, namespace: $NS}
data:
  nginx.conf: |
    daemon off; user root; worker_processes 1; error_log /dev/stderr; pid /tmp/nginx.pid;
    events {}
    http {
      access_log off; default_type text/plain; client_body_temp_path /tmp;
      server {
        listen 8443 ssl http2;
        ssl_certificate /tls/tls.crt; ssl_certificate_key /tls/tls.key;
        location / { return 200 "app $server_protocol $ssl_server_name\n"; }
      }
    }
---
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
      - name: nginx
        image: lab.local/servers:lab
        command: [nginx, -c, /conf/nginx.conf]
        ports: [{name: https, containerPort: 8443}]
        readinessProbe: {tcpSocket: {port: https}, periodSeconds: 1}
        volumeMounts: [{name: conf, mountPath: /conf}, {name: tls, mountPath: /tls}]
      volumes: [{name: conf, configMap: {name: nginx}}, {name: tls, secret: {secretName: web-tls}}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: $NS}
spec: {selector: {app: web}, ports: [{name: https, port: 443, targetPort: https}]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: web-tls, namespace: $NS}
rules: [{apiGroups: [""], resources: [secrets], resourceNames: [web-tls, other-tls, old-tls, none-tls], verbs: [get]}]
"#;

/// A program of the laptop that speaks plain HTTP, and says its name and what the request was inside of.
const PROGRAM: &str = r#"
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = f"laptop {self.headers['x-forwarded-proto']}\n".encode()
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

/// The namespace with its Secrets and the application, and the certificate that clients trust.
struct Web<'a> {
    namespace: Namespace<'a>,
    certificate: String,
}

impl<'a> Web<'a> {
    fn start(cluster: &'a Cluster) -> Self {
        let namespace = cluster.namespace("tls");
        let (certificate, key) = namespace.certificate("web", 2040);
        namespace.put_tls_secret("web-tls", &certificate, &key);
        namespace.load_servers();
        namespace.apply(WEB);
        namespace.wait_ready("app=web");
        namespace.wait_service("web", 443);
        Self {
            namespace,
            certificate,
        }
    }

    /// A user who may intercept, and read the Secrets if `reads`.
    fn user(&self, cluster: &Cluster, reads: bool) -> User {
        let namespace = &self.namespace;
        let user = User::who_intercepts(cluster, "ada", namespace);
        if reads {
            self.let_read(cluster, &user);
        }
        user
    }

    fn let_read(&self, cluster: &Cluster, user: &User) {
        let who = format!("--user={}", user.name);
        let binding = ["create", "rolebinding", "web-tls", "--role=web-tls", &who];
        cluster.kubectl(&[&["-n", &self.namespace.name], &binding[..]].concat());
    }
}

/// What answers a request with this header, after the certificate was checked.
#[track_caller]
fn answer(tp: &Connection<'_>, header: &str, more: &[&str]) -> String {
    let base = ["--cacert", "web.crt", "--header", header];
    let arguments = [&base[..], more, &["https://web/"]].concat();
    tp.curl(&arguments).ok().out()
}

/// Arguments by which Ada's requests are opened with this Secret.
fn with_secret<'a>(program: &'a Program, secret: &'a str) -> [&'a str; 8] {
    let header = "x-user=ada";
    [
        "intercept",
        "web",
        "-p",
        &program.port,
        "--http-header",
        header,
        "--tls-secret",
        secret,
    ]
}

#[test]
fn matching_requests_inside_of_tls_reach_the_laptop_and_all_others_the_application() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let web = Web::start(&cluster);
    let laptop = Laptop::of(&cluster, &web.user(&cluster, true));
    laptop.write_file("home/web.crt", &web.certificate);
    let program = Program::start(&laptop, PROGRAM, &[]);
    let tp = laptop.connect(&[]);
    assert_eq!(answer(&tp, "x-user: ada", &[]), "app HTTP/2.0 web\n");

    let run = laptop.tp(&with_secret(&program, "web-tls")).ok();

    assert!(
        run.out().contains("opened with Secret web-tls"),
        "{}",
        run.report()
    );
    for _ in 0..10 {
        // The laptop's program speaks HTTP/1.1 only, so its clients say so.
        assert_eq!(answer(&tp, "x-user: ada", &["--http1.1"]), "laptop https\n");
        assert_eq!(
            answer(&tp, "x-user: bob", &["--http1.1"]),
            "app HTTP/1.1 web\n"
        );
        assert_eq!(answer(&tp, "x-user: bob", &[]), "app HTTP/2.0 web\n");
    }
    std::thread::scope(|scope| {
        for n in 0..16 {
            let tp = &tp;
            scope.spawn(move || {
                let (user, who) = match n % 2 {
                    0 => ("x-user: ada", "laptop https\n"),
                    _ => ("x-user: bob", "app HTTP/1.1 web\n"),
                };
                assert_eq!(answer(tp, user, &["--http1.1"]), who);
            });
        }
    });
    let key = web.namespace.value("secret/web-tls", ".data.tls\\.key");
    let objects = cluster.kubectl(&[
        "-n",
        &web.namespace.name,
        "get",
        "intercepts.tp.dev",
        "-o",
        "yaml",
    ]);
    assert!(objects.contains("tlsSecret: web-tls"), "{objects}");
    assert!(
        !objects.contains("PRIVATE") && !objects.contains(&key[..40]),
        "{objects}"
    );

    laptop.tp(&["leave", "web"]).ok();
    assert_eq!(answer(&tp, "x-user: ada", &[]), "app HTTP/2.0 web\n");
}

#[test]
fn what_is_wrong_with_the_secret_is_named_at_once() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let web = Web::start(&cluster);
    let namespace = &web.namespace;
    let user = web.user(&cluster, false);
    let laptop = Laptop::of(&cluster, &user);
    let program = Program::start(&laptop, PROGRAM, &[]);
    let _tp = laptop.connect(&[]);
    // Another certificate than the application's, one that is over, and one with the key of another.
    let (other, other_key) = namespace.certificate("web", 2040);
    namespace.put_tls_secret("other-tls", &other, &other_key);
    let (old, old_key) = namespace.certificate("web", 2020);
    namespace.put_tls_secret("old-tls", &old, &old_key);

    let refused = |secret: &str| {
        let run = laptop.tp(&with_secret(&program, secret)).exits(1);
        assert!(run.took < Duration::from_secs(5), "{}", run.report());
        assert!(run.err().contains("hint: "), "{}", run.report());
        run.err()
    };
    let forbidden = refused("web-tls");
    assert!(
        forbidden.contains("may not read Secret web-tls"),
        "{forbidden}"
    );
    web.let_read(&cluster, &user);
    for (secret, part) in [
        ("none-tls", "there is no Secret none-tls"),
        ("old-tls", "has expired"),
        ("other-tls", "shows a certificate with another key"),
    ] {
        let why = refused(secret);
        assert!(why.contains(part), "{why}");
    }
    namespace.put_tls_secret("other-tls", &other, &old_key);
    let mismatch = refused("other-tls");
    assert!(mismatch.contains("tls.key is not the key"), "{mismatch}");
    let left = cluster.kubectl(&[
        "-n",
        &namespace.name,
        "get",
        "intercepts.tp.dev",
        "-o",
        "name",
    ]);
    assert_eq!(left, "");
}

#[test]
fn after_a_restart_of_the_manager_the_key_is_handed_over_again() {
    let Some(cluster) = Cluster::exclusive_with_manager() else {
        return;
    };
    let web = Web::start(&cluster);
    let laptop = Laptop::of(&cluster, &web.user(&cluster, true));
    laptop.write_file("home/web.crt", &web.certificate);
    let program = Program::start(&laptop, PROGRAM, &[]);
    let tp = laptop.connect(&[]);
    laptop.tp(&with_secret(&program, "web-tls")).ok();
    assert_eq!(answer(&tp, "x-user: ada", &["--http1.1"]), "laptop https\n");

    cluster.roll("tp-system", "deploy/tp-manager");

    eventually("the laptop answers again", Duration::from_secs(20), || {
        let arguments = [
            "--cacert",
            "web.crt",
            "--http1.1",
            "--header",
            "x-user: ada",
            "https://web/",
        ];
        (tp.curl(&arguments).out() == "laptop https\n").then_some(())
    });
}
