//! An installed manager, of the image and the `tp` under test, shared by the tests that do not care how it got there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cluster::{Cluster, MANAGER_NAMESPACE, lock_file};
use crate::laptop::{Laptop, binary};
use crate::process::tool;
use crate::user::GROUP;

/// The image's name in the cluster.
pub const IMAGE: &str = "lab.local/tp:dev";

impl Cluster {
    /// Makes sure that two replicas of the manager under test are installed and ready. With
    /// `TP_TEST_MANAGER=installed` it takes what is there, for work on one test beside other uses of the cluster.
    pub fn ensure_manager(&self) {
        if std::env::var("TP_TEST_MANAGER").is_ok_and(|manager| manager == "installed") {
            return self.let_developers_connect();
        }
        let lock = lock_file("manager.lock");
        lock.lock().expect("flock works on the cache folder");
        let wanted = self.load_manager_image();
        let stamp = self.manager_stamp();
        if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted)
            && self.manager_is_ready()
        {
            return;
        }
        let admin = Laptop::admin(self);
        if self
            .try_kubectl(&["get", "namespace", MANAGER_NAMESPACE])
            .succeeded()
        {
            admin.tp(&["uninstall", "--everything"]).ok();
        }
        admin
            .tp(&["install", "--image", IMAGE, "--replicas", "2"])
            .ok();
        self.let_developers_connect();
        fs::write(stamp, wanted).expect("the cache folder is writable");
    }

    /// The cluster, beside other tests, with the manager under test installed.
    pub fn with_manager() -> Option<Self> {
        let cluster = Self::shared()?;
        cluster.ensure_manager();
        Some(cluster)
    }

    /// The cluster for one test alone, with the manager under test installed.
    pub fn exclusive_with_manager() -> Option<Self> {
        let cluster = Self::exclusive()?;
        cluster.ensure_manager();
        Some(cluster)
    }

    /// Binds the role with which people find and reach the manager to every user of the tests.
    pub fn let_developers_connect(&self) {
        self.apply(&format!(
            "apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
\
             metadata: {{name: {GROUP}, namespace: {MANAGER_NAMESPACE}}}
\
             roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: tp-connect}}
\
             subjects: [{{apiGroup: rbac.authorization.k8s.io, kind: Group, name: {GROUP}}}]
"
        ));
    }

    /// The manager's processes on this machine: pod name and process id.
    pub fn manager_processes(&self) -> Vec<(String, u32)> {
        let entries = fs::read_dir("/proc").expect("/proc is mounted");
        let pids = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok());
        let of_pod = |pid: u32| {
            let environment = fs::read_to_string(format!("/proc/{pid}/environ")).ok()?;
            let program = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            let pod = environment
                .split('\0')
                .find_map(|pair| pair.strip_prefix("POD_NAME="))?;
            (program.trim() == "tp-manager").then(|| (pod.to_owned(), pid))
        };
        pids.filter_map(of_pod).collect()
    }

    /// The webhook's processes on this machine.
    pub fn webhook_processes(&self) -> Vec<u32> {
        let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_webhook = |pid: &u32| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line == "/tp-manager\0--webhook\0"
        };
        pids.filter(is_webhook).collect()
    }

    /// The agents' processes on this machine, of the pods with these uids: a parent and a worker each.
    pub fn agent_processes(&self, pod_uids: &str) -> Vec<u32> {
        self.processes_of_pods(pod_uids, "tp-agent")
    }

    /// Processes of this name on this machine, of the pods with these uids.
    pub fn processes_of_pods(&self, pod_uids: &str, name: &str) -> Vec<u32> {
        // The driver of systemd's groups writes them with underscores.
        let groups: Vec<_> = pod_uids
            .split_whitespace()
            .flat_map(|uid| [uid.to_owned(), uid.replace('-', "_")])
            .collect();
        let read = |pid: u32, file: &str| {
            fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default()
        };
        let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| read(*pid, "comm").trim() == name)
            .filter(|pid| {
                let group = read(*pid, "cgroup");
                groups.iter().any(|uid| group.contains(uid))
            })
            .collect()
    }

    /// Says that whatever is installed now is not what other tests expect.
    pub fn forget_manager(&self) {
        let _ = fs::remove_file(self.manager_stamp());
    }

    /// Imports the image under test where it is not yet the one in containerd; gives a name for its content.
    pub fn load_manager_image(&self) -> String {
        let archive = image_archive();
        let version = version_of(&archive) + &binary("tp");
        let stamp = self.directory().join("run/manager-image");
        if !fs::read_to_string(&stamp).is_ok_and(|loaded| loaded == version) {
            self.load_image(&archive);
            fs::write(stamp, &version).expect("the cache folder is writable");
        }
        version
    }

    /// The names of the manager's ready pods.
    pub fn manager_pods(&self) -> Vec<String> {
        let path = "jsonpath={range .items[?(@.status.containerStatuses[0].ready==true)]}{.metadata.name} {end}";
        let pods = self.kubectl(&["-n", MANAGER_NAMESPACE, "get", "pods", "-o", path]);
        pods.split_whitespace()
            .filter(|name| name.starts_with("tp-manager"))
            .map(str::to_owned)
            .collect()
    }

    fn manager_is_ready(&self) -> bool {
        let arguments = [
            "-n",
            MANAGER_NAMESPACE,
            "rollout",
            "status",
            "deploy/tp-manager",
            "--timeout=60s",
        ];
        self.try_kubectl(&arguments).succeeded() && self.manager_pods().len() == 2
    }

    fn manager_stamp(&self) -> PathBuf {
        self.directory().join("run/manager-installed")
    }
}

/// What `make image` writes.
fn image_archive() -> PathBuf {
    let archive = std::env::var_os("TP_IMAGE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/image/tp.tar"),
        PathBuf::from,
    );
    assert!(
        archive.exists(),
        "{} is missing; `make image` writes it",
        archive.display()
    );
    archive
}

fn version_of(file: &Path) -> String {
    tool(Command::new("sha256sum").arg(file))
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}
