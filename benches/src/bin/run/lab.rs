//! The namespaces of one run of the bench: network, mounts and processes of its own, so that whatever happens, nothing is
//! left of it and the machine's own network is not touched.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use tp_benches::process::{Running, wait_for};

use crate::SERVER;

/// First argument of this program once it is inside.
pub(crate) const ROLE: &str = "inside";

/// Names the folder for this run's files.
const FOLDER: &str = "BENCH_FOLDER";

/// Runs this program again in namespaces of its own, which end with it.
pub(crate) fn enter(wanted: &[String]) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("tp-bench-").tempdir()?;
    // pasta gives up root, and what it starts has to be found then.
    open_to_all(folder.path())?;
    let program = folder.path().join("run");
    fs::copy(std::env::current_exe()?, &program)?;
    let peer = std::env::current_exe()?.with_file_name("peer");
    fs::copy(peer, folder.path().join("peer")).context("the bench `peer` is not built")?;
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child"])
        .arg("--mount-proc")
        .arg(program)
        .arg(ROLE)
        .args(wanted)
        .env(FOLDER, folder.path())
        .status()
        .context("cannot start unshare")?;
    if !status.success() {
        bail!("the bench failed");
    }
    Ok(())
}

fn open_to_all(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
}

/// What all paths of one run share.
pub(crate) struct Lab {
    pub(crate) folder: PathBuf,
    /// Folder of `tp` and `tp-manager`.
    binaries: PathBuf,
    /// Hash of the manager's key.
    manager_key: String,
    _manager: Running,
    _server: Running,
}

impl Lab {
    /// Network, server and manager.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let folder =
            PathBuf::from(std::env::var_os(FOLDER).context("started by itself, not by hand")?);
        let binaries = std::env::var_os("TP_BIN_DIR").context("TP_BIN_DIR is not set")?;
        let binaries = PathBuf::from(binaries);
        network()?;
        let server = Command::new(folder.join("peer"))
            .arg(SERVER.port().to_string())
            .spawn()?;
        let server = Running(server);
        wait_for(SERVER)?;
        let (manager, manager_key) = start_manager(&folder, &binaries)?;
        Ok(Self {
            folder,
            binaries,
            manager_key,
            _manager: manager,
            _server: server,
        })
    }

    /// The command line of this program as an agent.
    pub(crate) fn agent(&self) -> [String; 3] {
        let program = self.folder.join("run").display().to_string();
        [program, crate::agent::ROLE.to_owned(), SERVER.to_string()]
    }

    /// `tp run` on a connection of its own to the manager, up to its further options.
    pub(crate) fn tp_run(&self) -> Command {
        let mut command = Command::new(self.binaries.join("tp"));
        command
            .env("HOME", &self.folder)
            .env("XDG_RUNTIME_DIR", &self.folder)
            .args(["run", "--via", MANAGER, "--key"])
            .arg(self.folder.join("key.pem"))
            .args(["--manager-key", &self.manager_key]);
        command
    }
}

/// The network of the server, which the manager offers.
pub(crate) const NETWORK: &str = "198.51.100.0/24";

const MANAGER: &str = "127.0.0.1:8443";

/// The server's address, and an interface with a default route, which pasta takes its own addresses from. Nothing leaves
/// through it. Everybody in here may use TUN, as on most machines.
fn network() -> anyhow::Result<()> {
    for command in [
        "ip link set lo up",
        "ip addr add 198.51.100.1/32 dev lo",
        "ip link add outside type veth peer name nowhere",
        "ip addr add 203.0.113.2/24 dev outside",
        "ip link set outside up",
        "ip link set nowhere up",
        "ip route add default via 203.0.113.1",
        "mount --make-rprivate /",
        "mount -t tmpfs none /mnt",
        "mknod -m 666 /mnt/tun c 10 200",
        "mount --bind /mnt/tun /dev/net/tun",
    ] {
        system(command)?;
    }
    Ok(())
}

/// Runs a command line without quotes.
pub(crate) fn system(line: &str) -> anyhow::Result<()> {
    let mut words = line.split(' ');
    let program = words.next().context("no program")?;
    let status = Command::new(program).args(words).status();
    let status = status.with_context(|| format!("cannot start {program}"))?;
    if !status.success() {
        bail!("`{line}` failed");
    }
    Ok(())
}

fn start_manager(folder: &Path, binaries: &Path) -> anyhow::Result<(Running, String)> {
    let key = Command::new(binaries.join("tp"))
        .args(["key", "new", "--file"])
        .arg(folder.join("key.pem"))
        .output()
        .context("cannot start tp")?;
    let authorized = folder.join("authorized-keys");
    fs::File::create(&authorized)?.write_all(&key.stdout)?;
    let log = folder.join("manager.log");
    let manager = Command::new(binaries.join("tp-manager"))
        .args(["--standalone", "--listen", MANAGER, "--key"])
        .arg(folder.join("manager.pem"))
        .arg("--authorized-keys")
        .arg(authorized)
        .args(["--range", NETWORK])
        .stdout(fs::File::create(&log)?)
        .stderr(Stdio::from(fs::File::options().append(true).open(&log)?))
        .spawn()
        .context("cannot start tp-manager")?;
    let manager = Running(manager);
    for _ in 0..200 {
        if let Some(hash) = key_hash(&fs::read_to_string(&log)?) {
            return Ok((manager, hash));
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    bail!("the manager did not start: {}", fs::read_to_string(&log)?)
}

fn key_hash(log: &str) -> Option<String> {
    const HASH: usize = "sha256:".len() + 64;
    let start = log.find("sha256:")?;
    log.get(start..start + HASH).map(str::to_owned)
}
