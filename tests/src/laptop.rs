//! A developer's laptop: a network namespace that reaches the API server and no pod, and a user who is not root.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{LIMIT, Run};
use crate::{Cluster, User, guard};

/// One user on the laptop, with an own uid, home and runtime folder. Dropping it ends every process of that uid.
#[derive(Debug)]
pub struct Laptop {
    uid: u32,
    directory: TempDir,
    kubectl: PathBuf,
}

impl Laptop {
    /// A laptop whose kubeconfig is the administrator's.
    pub fn admin(cluster: &Cluster) -> Self {
        Self::with_kubeconfig(cluster, &cluster.laptop_kubeconfig())
    }

    /// A laptop whose kubeconfig is `user`'s.
    pub fn of(cluster: &Cluster, user: &User) -> Self {
        Self::with_kubeconfig(cluster, &user.kubeconfig)
    }

    /// A laptop with this kubeconfig, in the default place. Panics when commands on it would run as root.
    pub fn with_kubeconfig(cluster: &Cluster, kubeconfig: &str) -> Self {
        guard::start();
        let directory = tempfile::Builder::new()
            .prefix(&format!("tp-laptop-{}-", std::process::id()))
            .tempdir()
            .expect("a temporary folder");
        let laptop = Self {
            uid: next_uid(),
            directory,
            kubectl: cluster.directory().join("bin"),
        };
        fs::set_permissions(laptop.directory.path(), fs::Permissions::from_mode(0o755))
            .expect("our folder");
        for folder in ["home", "home/.kube", "run"] {
            fs::create_dir(laptop.path(folder)).expect("our folder");
            laptop.give(&laptop.path(folder), 0o700);
        }
        laptop.write_file("home/.kube/config", kubeconfig);
        let id = laptop.run("id", &["-u"]).ok().out();
        assert_eq!(
            id.trim(),
            laptop.uid.to_string(),
            "commands on the laptop must run as its unprivileged user"
        );
        assert_ne!(id.trim(), "0", "these tests prove nothing as root");
        laptop
    }

    /// The user's uid.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// A path in the laptop's own folder; `home/` is the home and `run/` the runtime folder.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    /// The user's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path("home/.kube/config")
    }

    /// Writes a file that belongs to the user, mode 0600.
    pub fn write_file(&self, relative: &str, text: &str) -> PathBuf {
        let path = self.path(relative);
        fs::write(&path, text).expect("our folder is writable");
        self.give(&path, 0o600);
        path
    }

    fn give(&self, path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("we are root");
        chown(path, Some(self.uid), Some(self.uid)).expect("we are root");
    }

    /// A command as the user, in the laptop's network, with a clean environment.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        self.command_with(&[], program, arguments)
    }

    /// The same with more environment variables; a later one wins.
    pub fn command_with(
        &self,
        environment: &[(&str, &str)],
        program: &str,
        arguments: &[&str],
    ) -> Command {
        let uid = self.uid.to_string();
        let mut command = Command::new("ip");
        command.args([
            "netns",
            "exec",
            "k8s-laptop",
            "setpriv",
            "--reuid",
            &uid,
            "--regid",
            &uid,
            "--clear-groups",
        ]);
        command.args(["--inh-caps=-all", "--bounding-set=-all", "--", "env", "-i"]);
        let home = self.path("home");
        command.arg(format!("HOME={}", home.display()));
        command.arg(format!("XDG_RUNTIME_DIR={}", self.path("run").display()));
        command
            .arg("PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .arg("LANG=C.UTF-8")
            .arg("USER=dev");
        command.args(
            environment
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        command.arg(program).args(arguments).current_dir(home);
        command
    }

    /// Runs a program to its end.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Run {
        Run::new(self.command(program, arguments), b"", LIMIT)
    }

    /// Runs a program with input and an own limit.
    pub fn run_with(
        &self,
        program: &str,
        arguments: &[&str],
        input: &[u8],
        limit: Duration,
    ) -> Run {
        Run::new(self.command(program, arguments), input, limit)
    }

    /// Runs `tp`.
    pub fn tp(&self, arguments: &[&str]) -> Run {
        self.tp_with(&[], arguments)
    }

    /// Runs `tp` with more environment variables.
    pub fn tp_with(&self, environment: &[(&str, &str)], arguments: &[&str]) -> Run {
        Run::new(
            self.command_with(environment, &binary("tp"), arguments),
            b"",
            LIMIT,
        )
    }

    /// A `tp` that keeps running, as with `--foreground`; dropping the laptop ends it.
    pub fn spawn_tp(&self, arguments: &[&str]) -> std::process::Child {
        let mut command = self.command(&binary("tp"), arguments);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().expect("tp starts")
    }

    /// `tp status --output json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.tp(&["status", "--output", "json"]).ok().json()
    }

    /// Where kubectl is: a static Go program, which resolves names by itself.
    pub fn kubectl_program(&self) -> String {
        installed(&self.kubectl.join("kubectl"))
    }

    /// Runs kubectl as the user.
    pub fn kubectl(&self, arguments: &[&str]) -> Run {
        Run::new(self.command(&self.kubectl_program(), arguments), b"", LIMIT)
    }

    /// The ids of all processes of the user, with their command lines. One that has ended and that nobody has waited
    /// for has no command line any more, and does not count.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        let pids = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let line = |pid| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            (pid, line.replace('\0', " "))
        };
        pids.filter(|pid| owner(*pid) == Some(self.uid))
            .map(line)
            .filter(|(_, line)| !line.is_empty())
            .collect()
    }

    /// The process id of the daemon of the user's one connection.
    #[track_caller]
    pub fn daemon(&self) -> u32 {
        let status = self.status();
        let pid = status["connections"][0]["pid"]
            .as_u64()
            .and_then(|pid| u32::try_from(pid).ok());
        pid.filter(|pid| owner(*pid) == Some(self.uid))
            .unwrap_or_else(|| panic!("no daemon of ours in {status}"))
    }
}

impl Drop for Laptop {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_logs();
        }
        // Without a binary there is nothing to quit, and a panic here would hide the first one.
        if binary_directory().join("tp").exists() {
            let mut quit = self.command(&binary("tp"), &["quit", "--all"]);
            drop(quit.stdin(Stdio::null()).output());
        }
        for (pid, _) in self.processes() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

impl Laptop {
    /// What the daemons logged, when a test failed.
    fn show_logs(&self) {
        let find = Command::new("find")
            .arg(self.directory.path())
            .args(["-name", "*.log", "-size", "-1024k"])
            .output();
        for path in find
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .unwrap_or_default()
            .lines()
        {
            let text = fs::read_to_string(path).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(40).collect();
            eprintln!("--- {path}");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Where one of our programs is, in a place that every user may read.
pub fn binary(name: &str) -> String {
    installed(&binary_directory().join(name))
}

/// `$TP_BIN_DIR`, else where `make binaries` puts them.
fn binary_directory() -> PathBuf {
    if let Some(directory) = std::env::var_os("TP_BIN_DIR") {
        return directory.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/tp-target"),
        PathBuf::from,
    );
    target.join(format!(
        "{}-unknown-linux-gnu/release",
        std::env::consts::ARCH
    ))
}

/// Copies a program to a folder that every user can enter, once for each content.
fn installed(program: &Path) -> String {
    let program = program.canonicalize().unwrap_or_else(|error| {
        panic!(
            "{}: {error}; `make binaries` builds what the tests run",
            program.display()
        )
    });
    let metadata = fs::metadata(&program).expect("it was just resolved");
    let modified = metadata
        .modified()
        .ok()
        .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    let version = format!(
        "{:x}-{:x}",
        modified.unwrap_or_default().as_nanos(),
        metadata.len()
    );
    let directory = PathBuf::from(format!("/var/tmp/tp-tests-bin/{version}"));
    let name = program.file_name().expect("a program has a name");
    // kube-aio decides by its name what to be.
    let name = if name == "kube-aio" {
        "kubectl".as_ref()
    } else {
        name
    };
    let copy = directory.join(name);
    if !copy.exists() {
        fs::create_dir_all(&directory).expect("/var/tmp is writable");
        let partial = directory.join(format!("{}.{}", name.display(), next_uid()));
        fs::copy(&program, &partial).expect("/var/tmp has room for a copy");
        fs::set_permissions(&partial, fs::Permissions::from_mode(0o755)).expect("our copy");
        fs::rename(&partial, &copy).expect("one folder");
    }
    copy.display().to_string()
}

/// A uid that no other laptop of this machine uses now: from the process id, then counting.
fn next_uid() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    guard::first_uid() + NEXT.fetch_add(1, Ordering::Relaxed) % guard::UIDS
}

fn owner(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}
