//! A workstation of the tests: a Session, a connection to one replica of the manager, and answers to what it offers.
//!
//! It is no `tp`: it takes whatever arrives for its intercepts and says so, or does not, as a test wants it.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tp_manager_api::CLUSTER_PATH;
use tp_manager_api::sighting::OFFER;
use tp_tests::{Cluster, eventually, time_in};
use tp_tunnel::carrier::tls::connect_tls;
use tp_tunnel::{Identity, Tunnel};

/// What it answers to every request.
pub(crate) const ANSWER: &str = "hello-from-workstation\n";

/// Connected until it is dropped.
pub(crate) struct Workstation<'a> {
    cluster: &'a Cluster,
    /// Name of its Session.
    pub(crate) session: String,
    namespace: String,
    user: Value,
    served: Arc<AtomicU64>,
    forward: Child,
    runtime: Option<Runtime>,
}

impl<'a> Workstation<'a> {
    /// Connects to the first ready replica.
    pub(crate) fn connect(cluster: &'a Cluster, namespace: &str) -> Self {
        Self::connect_to(cluster, namespace, 0)
    }

    /// Connects to one of the ready replicas.
    pub(crate) fn connect_to(cluster: &'a Cluster, namespace: &str, replica: usize) -> Self {
        let identity = Identity::generate();
        let who = cluster.kubectl(&["auth", "whoami", "-o", "json"]);
        let who: Value = serde_json::from_str(&who).expect("kubectl writes JSON");
        let user = who["status"]["userInfo"].clone();
        let session = format!("test-{}", &identity.key_hash().to_string()[7..15]);
        cluster.apply(
            &json!({
                "apiVersion": "tp.dev/v1alpha1",
                "kind": "Session",
                "metadata": { "name": session, "namespace": namespace },
                "spec": {
                    "user": user["username"], "groups": user["groups"],
                    "keyHash": identity.key_hash().to_string(), "expiresAt": time_in(1800),
                },
            })
            .to_string(),
        );
        let pods = cluster.manager_pods();
        let pod = pods.get(replica).expect("so many replicas are ready");
        let (forward, port) = port_forward(cluster, pod);
        let locator = cluster.value("tp-system", "configmap/tp-manager", ".data.manager\\.json");
        let locator: Value = serde_json::from_str(&locator).expect("the manager writes JSON");
        let key = locator["keyHash"].as_str().and_then(|key| key.parse().ok());
        let key = key.expect("the locator has the key's hash");
        let runtime = Runtime::new().expect("threads");
        let served = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&served);
        let (ready_tx, ready_rx) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            let tcp = TcpStream::connect(("127.0.0.1", port))
                .await
                .expect("forwarded");
            let tls = connect_tls(tcp, &identity, &key)
                .await
                .expect("the pinned manager");
            let (tunnel, driver) = Tunnel::establish(tls).await.expect("admitted");
            tokio::spawn(driver);
            // Who follows the view stays with this replica.
            let follow = format!("{CLUSTER_PATH}?after=0");
            let view = tunnel.control(http::Method::GET, &follow, Bytes::new());
            view.await.expect("the view");
            ready_tx.send(()).expect("the test waits");
            serve(tunnel, counted).await;
        });
        ready_rx
            .recv_timeout(Duration::from_secs(10))
            .expect("connected");
        Self {
            cluster,
            session,
            namespace: namespace.to_owned(),
            user,
            served,
            forward,
            runtime: Some(runtime),
        }
    }

    /// How many flows it took.
    pub(crate) fn served(&self) -> u64 {
        self.served.load(Relaxed)
    }

    /// An Intercept of its own, with the name that it must have.
    pub(crate) fn intercept(
        &self,
        kind: &str,
        workload: &str,
        port: u16,
        matchers: &Value,
    ) -> Intercept<'a> {
        let matchers_of_it = serde_json::from_value(matchers.clone()).expect("matchers");
        let kind_in_name = kind.to_lowercase();
        let name =
            tp_manager_api::matcher::intercept_name(&kind_in_name, workload, port, &matchers_of_it);
        let object = json!({
            "apiVersion": "tp.dev/v1alpha1",
            "kind": "Intercept",
            "metadata": { "name": name, "namespace": self.namespace },
            "spec": {
                "name": workload, "session": self.session,
                "user": self.user["username"], "groups": self.user["groups"],
                "workload": { "kind": kind, "name": workload }, "port": port, "matchers": matchers,
            },
        });
        Intercept {
            cluster: self.cluster,
            namespace: self.namespace.clone(),
            name,
            object,
        }
    }

    /// Cuts the connection and leaves the Session behind.
    pub(crate) fn vanish(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        let _ = self.forward.kill();
        let _ = self.forward.wait();
    }
}

impl Drop for Workstation<'_> {
    fn drop(&mut self) {
        self.vanish();
        self.cluster.try_kubectl(&[
            "-n",
            &self.namespace,
            "delete",
            "sessions.tp.dev",
            &self.session,
        ]);
    }
}

/// An Intercept, made or about to be.
pub(crate) struct Intercept<'a> {
    cluster: &'a Cluster,
    namespace: String,
    pub(crate) name: String,
    pub(crate) object: Value,
}

impl Intercept<'_> {
    /// Writes it, and waits until it is ready. Says how long that took.
    #[track_caller]
    pub(crate) fn ready(&self) -> Duration {
        self.cluster.apply(&self.object.to_string());
        self.becomes("ready", |status| condition(status)["status"] == "True")
            .1
    }

    /// Waits until its status is as `wanted`.
    #[track_caller]
    pub(crate) fn becomes(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> (Value, Duration) {
        let seen = std::cell::RefCell::new(Value::Null);
        let _said = SayOnPanic(&seen);
        eventually(what, Duration::from_secs(30), || {
            let status = self.status();
            let found = wanted(&status);
            seen.replace(status.clone());
            found.then_some(status)
        })
    }

    /// Its status.
    pub(crate) fn status(&self) -> Value {
        let arguments = [
            "-n",
            &self.namespace,
            "get",
            "intercepts.tp.dev",
            &self.name,
            "-o",
            "jsonpath={.status}",
        ];
        let text = self.cluster.try_kubectl(&arguments).out();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// Gives it a name of one's own choice.
    pub(crate) fn rename(&mut self, name: &str) {
        self.name = name.to_owned();
        self.object["metadata"]["name"] = json!(name);
    }

    /// Takes it away.
    pub(crate) fn delete(&self) {
        self.cluster.kubectl(&[
            "-n",
            &self.namespace,
            "delete",
            "intercepts.tp.dev",
            &self.name,
        ]);
    }
}

/// The one condition.
pub(crate) fn condition(status: &Value) -> &Value {
    &status["conditions"][0]
}

struct SayOnPanic<'a>(&'a std::cell::RefCell<Value>);

impl Drop for SayOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("last status: {:#}", self.0.borrow());
        }
    }
}

/// kubectl's own port-forward, to the manager's tunnel.
fn port_forward(cluster: &Cluster, pod: &str) -> (Child, u16) {
    let arguments = [
        "-n",
        "tp-system",
        "port-forward",
        "--address=127.0.0.1",
        &format!("pod/{pod}"),
        ":8443",
    ];
    let mut child = cluster
        .kubectl_command(&arguments)
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl starts");
    let mut line = String::new();
    // It goes on to write there, and would not survive its end.
    let stdout = child.stdout.as_mut().expect("stdout is a pipe");
    BufReader::new(stdout)
        .read_line(&mut line)
        .expect("kubectl says its port");
    let port = line
        .split(':')
        .nth(1)
        .and_then(|rest| rest.split(' ').next()?.parse().ok());
    (
        child,
        port.unwrap_or_else(|| panic!("kubectl said {line:?}")),
    )
}

/// Takes everything that is offered and answers as an HTTP server does.
async fn serve(tunnel: Tunnel, served: Arc<AtomicU64>) {
    let waiting = (0..16).map(|_| {
        let (tunnel, served) = (tunnel.clone(), Arc::clone(&served));
        tokio::spawn(async move {
            while let Ok(incoming) = tunnel.accept().await {
                if incoming.intercept().starts_with(OFFER) {
                    incoming.refuse().await;
                    continue;
                }
                served.fetch_add(1, Relaxed);
                tokio::spawn(async move {
                    if let Ok(mut flow) = incoming.opened().await {
                        answer(&mut flow).await;
                    }
                });
            }
        })
    });
    for waiting in waiting.collect::<Vec<_>>() {
        let _ = waiting.await;
    }
}

/// One request without a body.
async fn answer(flow: &mut tp_tunnel::Flow) {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        match flow.recv().await {
            Ok(Some(data)) => {
                head.extend_from_slice(&data);
            }
            Ok(None) | Err(_) => return,
        }
    }
    let text = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{ANSWER}",
        ANSWER.len()
    );
    if flow.send(text.into_bytes().into()).await.is_ok() {
        let _ = flow.finish();
    }
    // Both halves are held until each has ended.
    while let Ok(Some(_)) = flow.recv().await {}
}
