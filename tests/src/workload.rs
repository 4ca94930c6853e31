//! A namespace of a test's own, and the servers that it may want there.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::cluster::{Cluster, lock_file, scripts};
use crate::laptop;
use crate::process::tool;

/// A namespace that is deleted when the value is dropped, unless `TP_TEST_KEEP` is set.
#[derive(Debug)]
pub struct Namespace<'a> {
    /// Its name.
    pub name: String,
    cluster: &'a Cluster,
}

impl<'a> Namespace<'a> {
    pub(crate) fn create(cluster: &'a Cluster, prefix: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "{prefix}-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        cluster.kubectl(&["create", "namespace", &name]);
        Self { name, cluster }
    }

    /// Applies manifests; `$NS` in them stands for the name.
    #[track_caller]
    pub fn apply(&self, manifests: &str) {
        self.cluster.apply(&manifests.replace("$NS", &self.name));
    }

    /// A certificate for a Service until that year, by its own key, and the key; both as PEM.
    #[track_caller]
    pub fn certificate(&self, service: &str, until: i32) -> (String, String) {
        let names = [service.to_owned(), format!("{service}.{}", self.name)];
        let mut params = rcgen::CertificateParams::new(names).expect("names");
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    /// Writes both into a Secret of TLS.
    #[track_caller]
    pub fn put_tls_secret(&self, name: &str, certificate: &str, key: &str) {
        let secret = serde_json::json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": { "name": name, "namespace": self.name },
            "stringData": { "tls.crt": certificate, "tls.key": key },
        });
        self.cluster.apply(&secret.to_string());
    }

    /// Waits until every pod with this label is ready.
    #[track_caller]
    pub fn wait_ready(&self, label: &str) {
        let arguments = [
            "-n",
            &self.name,
            "wait",
            "--for=condition=Ready",
            "pod",
            "-l",
            label,
            "--timeout=120s",
        ];
        // A Deployment's pods may not exist yet.
        let (run, _) = crate::eventually("pods exist", Duration::from_secs(30), || {
            let run = self.cluster.try_kubectl(&arguments);
            (!run.err().contains("no matching resources")).then_some(run)
        });
        if !run.succeeded() {
            panic!(
                "{}\n{}",
                run.report(),
                self.cluster
                    .kubectl(&["-n", &self.name, "describe", "pods"])
            );
        }
    }

    /// One value of an object, by JSONPath without braces.
    #[track_caller]
    pub fn value(&self, object: &str, path: &str) -> String {
        self.cluster.value(&self.name, object, path)
    }

    /// Runs a command in a pod and gives its stdout.
    #[track_caller]
    pub fn exec(&self, pod: &str, command: &[&str]) -> String {
        self.cluster
            .kubectl(&[&["-n", &self.name, "exec", pod, "--"], command].concat())
    }

    /// Starts our probe server as pod and Service `name`. See `tests/probe/serve.rs` for its ports.
    #[track_caller]
    pub fn probe(&self, name: &str) {
        load_probe_image(self.cluster);
        self.apply(&PROBE.replace("$NAME", name));
        self.wait_ready(&format!("app={name}"));
        self.wait_service(name, 80);
    }

    /// Makes the image of the real servers, `lab.local/servers:lab`, one that the node has.
    pub fn load_servers(&self) {
        load_servers_image(self.cluster);
    }

    /// Starts one of the real servers as pod and Service `name`: `postgres`, `mariadb`, `rabbitmq` or `nginx`.
    #[track_caller]
    pub fn server(&self, name: &str, program: &str, ports: &[u16]) {
        self.load_servers();
        let ports_yaml: Vec<String> = ports
            .iter()
            .map(|port| format!("{{name: p{port}, port: {port}}}"))
            .collect();
        let manifest = SERVER
            .replace("$NAME", name)
            .replace("$PROGRAM", program)
            .replace("$FIRST_PORT", &ports[0].to_string())
            .replace("$PORTS", &ports_yaml.join(", "));
        self.apply(&manifest);
        self.wait_ready(&format!("app={name}"));
        self.wait_service(name, ports[0]);
    }

    /// Starts the servers of developers' tools as pod and Service `name`: sshd for root with this public key, a git daemon
    /// with the empty `/srv/repo.git`, iperf3. See `cluster/tools/start`.
    #[track_caller]
    pub fn tools(&self, name: &str, authorized_key: &str) {
        load_tools_image(self.cluster);
        let manifest = TOOLS
            .replace("$NAME", name)
            .replace("$KEY", authorized_key.trim());
        self.apply(&manifest);
        self.wait_ready(&format!("app={name}"));
        self.wait_service(name, 22);
    }

    /// Waits until the node's packet rules lead to the Service's pods, and its name is known: that comes a moment after the
    /// pods are ready, or more on a busy machine.
    #[track_caller]
    pub fn wait_service(&self, name: &str, port: u16) {
        let address = self.value(&format!("svc/{name}"), ".spec.clusterIP");
        let connect = format!("exec 3<>/dev/tcp/{address}/{port}");
        let limit = Duration::from_secs(30);
        crate::eventually("the Service leads to its pods", limit, || {
            self.cluster
                .try_on_node(&["bash", "-c", &connect])
                .then_some(())
        });
        self.wait_name(name, limit);
    }

    /// Waits until the cluster's nameserver knows the Service.
    #[track_caller]
    pub fn wait_name(&self, name: &str, limit: Duration) {
        let address = self.value(&format!("svc/{name}"), ".spec.clusterIP");
        let full_name = format!("{name}.{}.svc.cluster.local", self.name);
        let resolve =
            format!("dig +short +time=2 +tries=1 @{CLUSTER_DNS} {full_name} | grep -qFx {address}");
        crate::eventually("the Service's name is known", limit, || {
            self.cluster
                .try_on_node(&["bash", "-c", &resolve])
                .then_some(())
        });
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        if std::env::var_os("TP_TEST_KEEP").is_none() {
            self.cluster.try_kubectl(&[
                "delete",
                "namespace",
                &self.name,
                "--wait=false",
                "--ignore-not-found",
            ]);
        }
    }
}

/// `DNS_IP` of `cluster/env.sh`.
const CLUSTER_DNS: &str = "10.96.0.10";

const PROBE: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: $NAME, namespace: $NS, labels: {app: $NAME}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - {name: probe, image: "lab.local/probe:lab", readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: $NAME, namespace: $NS}
spec:
  selector: {app: $NAME}
  ports:
  - {name: echo, port: 7}
  - {name: echo-udp, port: 7, protocol: UDP}
  - {name: digest, port: 9}
  - {name: hello, port: 13}
  - {name: reset, port: 14}
  - {name: silent, port: 15}
  - {name: source, port: 19}
  - {name: http, port: 80}
  - {name: closed, port: 81}
"#;

const SERVER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: $NAME, namespace: $NS, labels: {app: $NAME}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: server
    image: lab.local/servers:lab
    command: [/start/$PROGRAM]
    env: [{name: NAMES, value: "$NAME,$NAME.$NS,$NAME.$NS.svc,$NAME.$NS.svc.cluster.local"}]
    readinessProbe: {tcpSocket: {port: $FIRST_PORT}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: $NAME, namespace: $NS}
spec: {selector: {app: $NAME}, ports: [$PORTS]}
"#;

const TOOLS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: $NAME, namespace: $NS, labels: {app: $NAME}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: tools
    image: lab.local/tools:lab
    env: [{name: AUTHORIZED_KEY, value: "$KEY"}]
    readinessProbe: {tcpSocket: {port: 22}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: $NAME, namespace: $NS}
spec:
  selector: {app: $NAME}
  ports:
  - {name: ssh, port: 22}
  - {name: iperf3, port: 5201}
  - {name: iperf3-udp, port: 5201, protocol: UDP}
  - {name: git, port: 9418}
"#;

/// What the image of [`Namespace::tools`] holds: this machine's programs with their libraries.
const TOOLS_PROGRAMS: [&str; 5] = [
    "/usr/sbin/sshd",
    "/usr/bin/ssh-keygen",
    "/usr/bin/git",
    "/usr/lib/git-core/git-daemon",
    "/usr/bin/iperf3",
];

/// Packs this machine's own servers as an image and imports it, once a cluster.
fn load_tools_image(cluster: &Cluster) {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let lock = lock_file("tools-image.lock");
        lock.lock().expect("flock works on the cache folder");
        let folder = scripts().join("tools");
        let file = |name: &str| folder.join(name).display().to_string();
        let (start, passwd) = (file("start"), file("passwd"));
        let content = [&TOOLS_PROGRAMS[..], &["/bin/busybox", &start, &passwd]].concat();
        let version = tool(Command::new("sha256sum").args(content));
        let stamp = cluster.directory().join("run/tools-image");
        if std::fs::read_to_string(&stamp).is_ok_and(|loaded| loaded == version) {
            return;
        }
        let archive = cluster.directory().join("tools.tar");
        let mut pack = Command::new("python3");
        pack.arg(scripts().join("mkimage.py"))
            .arg(&archive)
            .arg("lab.local/tools:lab");
        for program in TOOLS_PROGRAMS {
            pack.args(["--bin", program]);
        }
        pack.args(["--link", "/bin/sh=/bin/busybox"]);
        for name in ["git-upload-pack", "git-receive-pack"] {
            pack.args(["--link", &format!("/usr/bin/{name}=/usr/bin/git")]);
        }
        pack.args(["--entrypoint", r#"["/start"]"#]);
        pack.args([
            "/bin/busybox=/bin/busybox",
            &format!("{start}=/start"),
            &format!("{passwd}=/etc/passwd"),
        ]);
        tool(&mut pack);
        cluster.load_image(&archive);
        std::fs::write(stamp, version).expect("the cache folder is writable");
    });
}

/// Packs our own probe as an image and imports it, once a process.
fn load_probe_image(cluster: &Cluster) {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let lock = lock_file("probe-image.lock");
        lock.lock().expect("flock works on the cache folder");
        let program = laptop::binary("probe");
        // The folder of the copied program is named after its content.
        let stamp = cluster.directory().join("run/probe-image");
        if std::fs::read_to_string(&stamp).is_ok_and(|loaded| loaded == program) {
            return;
        }
        let archive = cluster.directory().join("probe.tar");
        let mut pack = Command::new("python3");
        pack.arg(scripts().join("mkimage.py"))
            .arg(&archive)
            .arg("lab.local/probe:lab");
        pack.args(["--entrypoint", r#"["/probe", "serve"]"#])
            .arg(format!("{program}=/probe"));
        tool(&mut pack);
        cluster.load_image(&archive);
        std::fs::write(stamp, program).expect("the cache folder is writable");
    });
}

/// Builds the servers' image where it is missing, and imports it once a cluster.
fn load_servers_image(cluster: &Cluster) {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let lock = lock_file("servers-image.lock");
        lock.lock().expect("flock works on the cache folder");
        tool(&mut Command::new(scripts().join("build-servers.sh")));
        if !cluster.has_image("lab.local/servers:lab") {
            let archive: PathBuf = cluster.directory().join("servers/servers.tar");
            cluster.load_image(&archive);
        }
    });
}
