//! The cluster of `tests/cluster`: started where it is down, shared between tests, and spoken to with its own kubectl.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::process::{LIMIT, Run, tool};
use crate::workload::Namespace;

/// A running cluster, and the right to use it until this value is dropped.
#[derive(Debug)]
pub struct Cluster {
    directory: PathBuf,
    _turn: File,
}

/// The namespace that `tp install` uses by default.
pub const MANAGER_NAMESPACE: &str = "tp-system";

impl Cluster {
    /// The cluster, beside other tests. `None`, after a loud message, only where root is missing.
    pub fn shared() -> Option<Self> {
        Self::ensure(|turn| turn.lock_shared())
    }

    /// The cluster for one test alone: for tests that install, uninstall, or count.
    pub fn exclusive() -> Option<Self> {
        Self::ensure(|turn| turn.lock())
    }

    fn ensure(wait_for_turn: impl Fn(&File) -> std::io::Result<()>) -> Option<Self> {
        if !is_root() {
            skip_loudly();
            return None;
        }
        let directory = directory();
        let turn = lock_file("tests.lock");
        wait_for_turn(&turn).expect("flock works on the cache folder");
        start_when_down(&directory);
        Some(Self {
            directory,
            _turn: turn,
        })
    }

    /// The folder with the cluster's programs, images and state.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The kubeconfig of the administrator as the laptop uses it: it names a host that nobody else resolves.
    pub fn laptop_kubeconfig(&self) -> String {
        std::fs::read_to_string(self.directory.join("kubeconfig-laptop"))
            .expect("up.sh wrote kubeconfig-laptop")
    }

    /// A kubectl that is not yet started, as administrator, outside the laptop.
    pub fn kubectl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.directory.join("bin/kubectl"));
        command
            .env_clear()
            .env("HOME", "/nonexistent")
            .env("KUBECONFIG", self.directory.join("kubeconfig"))
            .args(arguments);
        command
    }

    /// Runs kubectl as administrator; panics when it fails.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).ok().out()
    }

    /// Runs kubectl as administrator, whatever comes of it.
    pub fn try_kubectl(&self, arguments: &[&str]) -> Run {
        Run::new(
            self.kubectl_command(arguments),
            b"",
            Duration::from_secs(180),
        )
    }

    /// Applies manifests.
    #[track_caller]
    pub fn apply(&self, manifests: &str) {
        let command =
            self.kubectl_command(&["apply", "--server-side", "--force-conflicts", "-f", "-"]);
        Run::new(command, manifests.as_bytes(), LIMIT).ok();
    }

    /// One value of an object, by JSONPath without braces, such as `.status.podIP`.
    #[track_caller]
    pub fn value(&self, namespace: &str, object: &str, path: &str) -> String {
        self.kubectl(&[
            "-n",
            namespace,
            "get",
            object,
            "-o",
            &format!("jsonpath={{{path}}}"),
        ])
    }

    /// Replaces every pod of a Deployment, a StatefulSet or a DaemonSet, and waits until the new ones are ready.
    #[track_caller]
    pub fn roll(&self, namespace: &str, workload: &str) {
        self.kubectl(&["-n", namespace, "rollout", "restart", workload]);
        self.wait_rolled_out(namespace, workload);
    }

    /// Waits until all pods of a workload are those that it asks for, and ready.
    #[track_caller]
    pub fn wait_rolled_out(&self, namespace: &str, workload: &str) {
        let rollout = ["-n", namespace, "rollout", "status", workload];
        self.kubectl(&[&rollout[..], &["--timeout=120s"]].concat());
    }

    /// The pods with this label that are to stay, as objects.
    #[track_caller]
    pub fn pods(&self, namespace: &str, label: &str) -> Vec<serde_json::Value> {
        let text = self.kubectl(&["-n", namespace, "get", "pods", "-l", label, "-o", "json"]);
        let list: serde_json::Value = serde_json::from_str(&text).expect("kubectl writes JSON");
        let pods = list["items"].as_array().expect("a list").iter();
        let staying = pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        staying.cloned().collect()
    }

    /// Makes a namespace whose name begins with `prefix`; it goes when the value is dropped.
    pub fn namespace(&self, prefix: &str) -> Namespace<'_> {
        Namespace::create(self, prefix)
    }

    /// Runs a program in the node's namespaces, as root.
    #[track_caller]
    pub fn on_node(&self, arguments: &[&str]) -> String {
        tool(&mut self.node_command(arguments))
    }

    /// Whether a program succeeds in the node's namespaces.
    pub fn try_on_node(&self, arguments: &[&str]) -> bool {
        let output = self.node_command(arguments).output();
        output.is_ok_and(|output| output.status.success())
    }

    /// A program in the node's namespaces, as root, that is not yet started.
    pub fn node_command(&self, arguments: &[&str]) -> Command {
        let holder = std::fs::read_to_string(self.directory.join("run/holder.pid"))
            .expect("the cluster is up");
        let mut command = Command::new("nsenter");
        command
            .args(["-t", holder.trim(), "-m", "-n", "-u", "-p"])
            .args(arguments);
        command
    }

    /// Imports image archives into the cluster's containerd.
    pub fn load_image(&self, archive: &Path) {
        tool(Command::new(scripts().join("load.sh")).arg(archive));
    }

    /// Whether containerd has the image of this name.
    pub fn has_image(&self, name: &str) -> bool {
        self.on_node(&["ctr", "-n", "k8s.io", "images", "ls", "-q"])
            .lines()
            .any(|line| line == name)
    }

    /// Every object of the cluster that a person or a program made, as `kind/namespace/name` lines: what must be equal
    /// before an install and after the uninstall. Left out is what the cluster itself makes all the time.
    pub fn objects(&self) -> Vec<String> {
        let kinds = self.kubectl(&["api-resources", "--verbs=list", "-o", "name"]);
        let kinds: Vec<&str> = kinds
            .lines()
            .filter(|kind| !EPHEMERAL_KINDS.contains(kind))
            .collect();
        let format = "jsonpath={range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{\"\\n\"}{end}";
        let list = self.kubectl(&["get", "--all-namespaces", &kinds.join(","), "-o", format]);
        let terminating = self.terminating_namespaces();
        let of_another_test = |line: &&str| {
            let mut parts = line.split('/').skip(1);
            let (namespace, name) = (parts.next(), parts.next());
            terminating
                .iter()
                .any(|gone| namespace == Some(gone) || name == Some(gone))
        };
        let mut objects: Vec<String> = list
            .lines()
            .filter(|line| !of_another_test(line))
            .map(str::to_owned)
            .collect();
        objects.sort();
        objects
    }

    /// Namespaces that earlier tests deleted and that are still on their way out.
    fn terminating_namespaces(&self) -> Vec<String> {
        let path =
            "jsonpath={range .items[?(@.status.phase=='Terminating')]}{.metadata.name} {end}";
        let names = self.kubectl(&["get", "namespaces", "-o", path]);
        names.split_whitespace().map(str::to_owned).collect()
    }
}

/// Kinds that come and go by themselves.
const EPHEMERAL_KINDS: [&str; 5] = [
    "events",
    "events.events.k8s.io",
    "leases.coordination.k8s.io",
    "componentstatuses",
    "bindings",
];

/// Where the harness's shell scripts are.
pub fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster")
}

/// A lock file beside the cluster's state, open and not yet locked. Each call opens it anew, so that threads of one
/// process exclude each other too.
pub fn lock_file(name: &str) -> File {
    let directory = directory();
    std::fs::create_dir_all(&directory).expect("the cache folder can be made");
    let path = directory.join(name);
    let options = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    options.unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()))
}

/// `$CLUSTER_DIR`, as `env.sh` derives it.
fn directory() -> PathBuf {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    variable("CLUSTER_DIR").unwrap_or_else(|| {
        let cache = variable("XDG_CACHE_HOME")
            .unwrap_or_else(|| variable("HOME").expect("HOME is set").join(".cache"));
        cache.join("tp-cluster")
    })
}

/// kubectl and the administrator's kubeconfig, for whoever outlives the tests.
pub(crate) fn kubectl_program() -> (PathBuf, PathBuf) {
    (
        directory().join("bin/kubectl"),
        directory().join("kubeconfig"),
    )
}

fn is_root() -> bool {
    static ROOT: OnceLock<bool> = OnceLock::new();
    *ROOT.get_or_init(|| tool(Command::new("id").arg("-u")).trim() == "0")
}

/// Past the test runner's capture, so that nobody takes a skipped test for a passed one.
fn skip_loudly() {
    static SAID: OnceLock<()> = OnceLock::new();
    SAID.get_or_init(|| {
        let text = "\n*** SKIPPED: the tests on a real cluster make network namespaces and need root.\n\
                    *** Nothing of them has run. Run them with: sudo make test\n\n";
        // The terminal where there is one, else stderr: print macros would be captured.
        let terminal = OpenOptions::new().write(true).open("/dev/tty");
        let _ = terminal.and_then(|mut tty| tty.write_all(text.as_bytes()));
        let _ = std::io::stderr().write_all(text.as_bytes());
    });
}

fn start_when_down(directory: &Path) {
    static UP: OnceLock<()> = OnceLock::new();
    UP.get_or_init(|| {
        let start = lock_file("start.lock");
        start.lock().expect("flock works on the cache folder");
        if is_up(directory) {
            return;
        }
        tool(Command::new(scripts().join("build.sh")).stderr(std::process::Stdio::inherit()));
        // It leaves daemons behind, which must not hold a pipe of ours.
        let log = directory.join("up.log");
        let output = File::create(&log).expect("the cache folder is writable");
        let errors = output.try_clone().expect("a descriptor is free");
        let up = Command::new(scripts().join("up.sh"))
            .stdout(output)
            .stderr(errors)
            .status()
            .expect("up.sh starts");
        assert!(
            up.success(),
            "up.sh failed: {}",
            std::fs::read_to_string(&log).unwrap_or_default()
        );
        // Whoever started it may end it: `.ci/run` looks for this file.
        let _ = std::fs::write(directory.join("run/started-by-tests"), "");
    });
}

fn is_up(directory: &Path) -> bool {
    let ready = Command::new(directory.join("bin/kubectl"))
        .env_clear()
        .env("HOME", "/nonexistent")
        .env("KUBECONFIG", directory.join("kubeconfig"))
        .args(["get", "--raw", "/readyz", "--request-timeout=3s"])
        .output();
    directory.join("kubeconfig").exists() && ready.is_ok_and(|output| output.status.success())
}
