//! `tp connect --via`: straight to the installed manager, without a port-forward.

use std::time::Duration;

use tp_tests::cluster::MANAGER_NAMESPACE;
use tp_tests::{Cluster, Laptop, User, eventually};

/// Leads from the node's address, which the laptop reaches, to the manager's tunnel port.
const DOOR: &str = "
apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: tp-system}
spec:
  type: NodePort
  selector: {app.kubernetes.io/name: tp, app.kubernetes.io/component: manager}
  ports: [{port: 8443, targetPort: tunnel}]
";

/// A NodePort of the manager; gone when dropped.
struct Door<'a>(&'a Cluster, String);

impl<'a> Door<'a> {
    fn open(cluster: &'a Cluster, name: &str) -> Self {
        cluster.apply(&DOOR.replace("NAME", name));
        Self(cluster, name.to_owned())
    }

    fn address(&self) -> String {
        let service = format!("svc/{}", self.1);
        let port = self
            .0
            .value(MANAGER_NAMESPACE, &service, ".spec.ports[0].nodePort");
        format!("node-1:{port}")
    }
}

impl Drop for Door<'_> {
    fn drop(&mut self) {
        let delete = [
            "-n",
            MANAGER_NAMESPACE,
            "delete",
            "service",
            &self.1,
            "--wait=false",
        ];
        self.0.try_kubectl(&delete);
    }
}

#[test]
fn a_connection_needs_no_port_forward_where_an_address_leads_to_the_manager() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("direct");
    namespace.probe("web");
    let user = User::of_namespace(&cluster, "ada", &namespace);
    let laptop = Laptop::of(&cluster, &user);
    let door = Door::open(&cluster, &namespace.name);
    let address = door.address();

    // The node learns of the Service a moment after the API server.
    eventually(
        "the door leads to the manager",
        Duration::from_secs(20),
        || {
            let connect = format!("exec 3<>/dev/tcp/{}", address.replace(':', "/"));
            laptop
                .run("bash", &["-c", &connect])
                .succeeded()
                .then_some(())
        },
    );
    let tp = laptop.connect(&["--via", &address]);

    assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
    tp.probe(&["udp", "PROXY", "web", "7", "5", "100"]).ok();
    let carrier = &tp.status()["carriers"][0];
    assert_eq!(carrier["kind"], "direct", "{carrier}");
    assert_eq!(carrier["peer"], address.as_str(), "{carrier}");
    assert_eq!(
        tp.socks_reply("10.99.0.1", 6443),
        0,
        "the laptop's own network is dialled from it"
    );
}

#[test]
fn somebody_else_at_the_address_is_not_taken_for_the_manager() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("direct");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));

    // The API server speaks TLS as well, with a key of its own.
    let run = laptop
        .tp(&["connect", "--listen", "127.0.0.1:0", "--via", "node-1:6443"])
        .exits(1);

    assert!(run.took < Duration::from_secs(5), "{}", run.report());
    assert!(
        run.err().contains("no secure connection"),
        "{}",
        run.report()
    );
    assert_eq!(laptop.processes(), []);
}
