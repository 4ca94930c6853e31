//! One run in a test: its folder of ledgers, and the processes that write them.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use super::join::{Expectation, Report, join};
use super::record::{Event, Record, now, read_all};
use crate::cluster::{Cluster, lock_file, scripts};
use crate::laptop::{Laptop, binary};
use crate::process::tool;
use crate::workload::Namespace;

/// The folder of one run.
#[derive(Debug)]
pub struct Book {
    folder: TempDir,
    seed: u64,
    /// Each load has flows of its own numbers.
    loads: AtomicU32,
}

/// Flows that one load can have.
const FLOWS_MAX: u32 = 1000;

/// Traffic that runs until [`Load::finish`]. Dropping it kills it.
#[derive(Debug)]
pub struct Load {
    process: Child,
    stdin: Option<ChildStdin>,
}

/// A server on the laptop. Dropping it kills it.
#[derive(Debug)]
pub struct Serving {
    process: Child,
    /// Where it listens.
    pub port: u16,
}

impl Book {
    /// A run of that seed.
    pub fn new(seed: u64) -> Self {
        // Where the node and the laptop's user find it too.
        let folder = tempfile::Builder::new()
            .prefix("tp-ledger-")
            .tempdir_in("/var/tmp");
        let folder = folder.expect("/var/tmp is writable");
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o1777))
            .expect("our folder");
        Self {
            folder,
            seed,
            loads: AtomicU32::new(0),
        }
    }

    /// A Deployment and a Service `name`, port 80, whose pods sign as `name`.
    #[track_caller]
    pub fn deploy(&self, cluster: &Cluster, namespace: &Namespace<'_>, name: &str, replicas: u32) {
        load_image(cluster);
        let folder = self.folder.path().display().to_string();
        let manifest = DEPLOYMENT
            .replace("$NAME", name)
            .replace("$FOLDER", &folder);
        namespace.apply(&manifest.replace("$REPLICAS", &replicas.to_string()));
        cluster.wait_rolled_out(&namespace.name, &format!("deployment/{name}"));
        namespace.wait_service(name, 80);
    }

    /// A server on the laptop, on a port of the kernel's choice unless `port` says one, that signs as `instance`. Each reply
    /// takes `delay`, half of it in the middle of its body.
    #[track_caller]
    pub fn serve(&self, laptop: &Laptop, instance: &str, port: u16, delay: Duration) -> Serving {
        let delay = delay.as_millis().to_string();
        let address = format!("127.0.0.1:{port}");
        let arguments = ["serve", self.path(), &address, instance, &delay];
        let mut command = laptop.command(&binary("ledger"), &arguments);
        let mut process = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut address = String::new();
        let stdout = process.stdout.take().expect("stdout is a pipe");
        BufReader::new(stdout)
            .read_line(&mut address)
            .expect("stdout is a pipe");
        let port = address
            .trim()
            .rsplit(':')
            .next()
            .and_then(|port| port.parse().ok());
        let port = port.unwrap_or_else(|| panic!("the server said {address:?}"));
        Serving { process, port }
    }

    /// Requests from the node to `address`: `h1` on a kept connection for each flow, `h1-fresh` on one for each request,
    /// `h2` as streams of one connection. Those that the plan calls mine carry `header`, as `name:value`.
    #[track_caller]
    pub fn load(
        &self,
        cluster: &Cluster,
        address: &str,
        flows: u32,
        per_second: u32,
        version: &str,
        header: Option<&str>,
    ) -> Load {
        assert!(flows <= FLOWS_MAX, "{flows} flows");
        let first = FLOWS_MAX * self.loads.fetch_add(1, Ordering::Relaxed);
        let [seed, first, flows, per_second] =
            [self.seed, first.into(), flows.into(), per_second.into()]
                .map(|number: u64| number.to_string());
        let program = binary("ledger");
        let mut arguments = vec![
            &program,
            "load",
            self.path(),
            address,
            &seed,
            &first,
            &flows,
            &per_second,
            version,
        ];
        arguments.extend(header);
        let mut process = cluster
            .node_command(&arguments)
            .stdin(Stdio::piped())
            .spawn()
            .expect("it starts");
        let stdin = process.stdin.take();
        Load { process, stdin }
    }

    /// Waits until `count` more requests were sent.
    #[track_caller]
    pub fn see_sent(&self, count: usize) {
        let from = now();
        crate::eventually("requests are sent", Duration::from_secs(60), || {
            let records = read_all(self.folder.path()).expect("the ledgers are whole");
            let sent =
                |record: &&Record| record.at >= from && matches!(record.event, Event::Sent { .. });
            (records.iter().filter(sent).count() >= count).then_some(())
        });
    }

    /// How many requests `instance` had so far.
    pub fn received_by(&self, instance: &str) -> usize {
        let records = read_all(self.folder.path()).expect("the ledgers are whole");
        let by = |record: &&Record| matches!(&record.event, Event::Received { instance: by, .. } if by == instance);
        records.iter().filter(by).count()
    }

    /// Who had those of mine that were sent since then, so far.
    pub fn holders_of_mine(&self, since: u64) -> BTreeSet<String> {
        let records = read_all(self.folder.path()).expect("the ledgers are whole");
        let mine = |record: &&Record| {
            record.at >= since && matches!(record.event, Event::Sent { mine: true })
        };
        let mine: BTreeSet<_> = records
            .iter()
            .filter(mine)
            .map(|record| record.id)
            .collect();
        let holder = |record: Record| match record.event {
            Event::Received { instance, .. } => Some(instance),
            Event::Sent { .. } | Event::Answered { .. } | Event::Failed { .. } => None,
        };
        let of_mine = records
            .into_iter()
            .filter(|record| mine.contains(&record.id));
        of_mine.filter_map(holder).collect()
    }

    /// What became of every request so far.
    pub fn report(&self, expected: &Expectation) -> Report {
        join(
            read_all(self.folder.path()).expect("the ledgers are whole"),
            expected,
        )
    }

    fn path(&self) -> &str {
        self.folder.path().to_str().expect("our own name")
    }
}

impl Load {
    /// Sends nothing more, waits for what is on its way, and panics where that takes too long.
    #[track_caller]
    pub fn finish(mut self) {
        drop(self.stdin.take());
        let (status, _) = crate::eventually("the load ends", Duration::from_secs(40), || {
            self.process.try_wait().expect("our child")
        });
        assert!(status.success(), "the load ended with {status}");
    }
}

impl Serving {
    /// The process, for signals.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

fn end(process: &mut Child) {
    let _ = process.kill();
    let _ = process.wait();
}

/// Packs the program as an image and imports it, once a process.
fn load_image(cluster: &Cluster) {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let lock = lock_file("ledger-image.lock");
        lock.lock().expect("flock works on the cache folder");
        let program = binary("ledger");
        // The folder of the copied program is named after its content.
        let stamp = cluster.directory().join("run/ledger-image");
        if std::fs::read_to_string(&stamp).is_ok_and(|loaded| loaded == program) {
            return;
        }
        let archive = cluster.directory().join("ledger.tar");
        let mut pack = Command::new("python3");
        pack.arg(scripts().join("mkimage.py"))
            .arg(&archive)
            .arg("lab.local/ledger:lab");
        pack.args(["--entrypoint", r#"["/ledger"]"#])
            .arg(format!("{program}=/ledger"));
        tool(&mut pack);
        cluster.load_image(&archive);
        std::fs::write(stamp, program).expect("the cache folder is writable");
    });
}

const DEPLOYMENT: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: $NAME, namespace: $NS}
spec:
  replicas: $REPLICAS
  selector: {matchLabels: {app: $NAME}}
  template:
    metadata: {labels: {app: $NAME}}
    spec:
      # It ends by itself once Services have forgotten its pod.
      terminationGracePeriodSeconds: 15
      containers:
      - name: app
        image: lab.local/ledger:lab
        args: [serve, /ledgers, "0.0.0.0:80", $NAME]
        ports: [{name: http, containerPort: 80}]
        readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 1}
        volumeMounts: [{name: ledgers, mountPath: /ledgers}]
      volumes: [{name: ledgers, hostPath: {path: $FOLDER}}]
---
apiVersion: v1
kind: Service
metadata: {name: $NAME, namespace: $NS}
spec: {selector: {app: $NAME}, ports: [{name: http, port: 80}]}
"#;
