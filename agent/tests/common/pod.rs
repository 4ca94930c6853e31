//! A pod made of two network namespaces, its own and its clients'.

use std::fs::{self, File, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tp_tunnel::carrier::tls::connect_tls;
use tp_tunnel::{Identity, Tunnel};

use super::SEED;

/// Two namespaces with a wire between them, and what runs in the pod's. Dropping it leaves nothing behind.
pub struct Pod {
    pub name: String,
    children: Vec<Child>,
    /// The agent, where the worker's user may execute it.
    image: tempfile::TempDir,
}

impl Pod {
    pub fn new(name: &str) -> Self {
        let name = format!("tp-{name}-{}", std::process::id());
        let (pod, client) = (format!("{name}-p"), format!("{name}-c"));
        let everybody = Permissions::from_mode(0o755);
        let mut image = tempfile::Builder::new();
        let image = image.permissions(everybody.clone()).tempdir().unwrap();
        let program = image.path().join("tp-agent");
        fs::copy(env!("CARGO_BIN_EXE_tp-agent"), &program).unwrap();
        fs::set_permissions(program, everybody).unwrap();
        let made = Self {
            name,
            children: Vec::new(),
            image,
        };
        for line in [
            format!("netns add {pod}"),
            format!("netns add {client}"),
            format!("-n {pod} link add eth0 type veth peer name eth0 netns {client}"),
            format!("-n {pod} address add 10.77.0.2/24 dev eth0"),
            format!("-n {client} address add 10.77.0.1/24 dev eth0"),
            format!("-n {pod} address add fd77::2/64 dev eth0 nodad"),
            format!("-n {client} address add fd77::1/64 dev eth0 nodad"),
            format!("-n {pod} link set eth0 up"),
            format!("-n {client} link set eth0 up"),
            format!("-n {pod} link set lo up"),
            format!("-n {client} link set lo up"),
        ] {
            let status = Command::new("ip").args(line.split(' ')).status().unwrap();
            assert!(status.success(), "ip {line}");
        }
        made
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}-p", self.name), program]);
        command.stdin(Stdio::null());
        command
    }

    pub fn start(&mut self, mut command: Command) -> u32 {
        let child = command.spawn().unwrap();
        let id = child.id();
        self.children.push(child);
        id
    }

    pub fn start_agent(&mut self, manager: &Identity) -> u32 {
        let program = self.image.path().join("tp-agent");
        let mut agent = self.command(program.to_str().unwrap());
        agent
            .env("TP_AGENT_SEED", SEED)
            .args(["--control", "[::]:15008", "--redirected", "[::]:15006"])
            .args(["--manager-key", &manager.key_hash().to_string()]);
        self.start(agent)
    }

    pub fn rules(&self) -> String {
        let output = self
            .command("nft")
            .args(["list", "ruleset"])
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    /// This thread is a client of the pod from now on.
    pub fn enter_as_client(&self) {
        let namespace = File::open(format!("/run/netns/{}-c", self.name)).unwrap();
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), kind)
            .unwrap();
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for end in ["p", "c"] {
            let name = format!("{}-{end}", self.name);
            let _ = Command::new("ip").args(["netns", "delete", &name]).status();
        }
    }
}

/// Dials the agent as its manager does.
pub async fn dial(manager: &Identity) -> Tunnel {
    let pinned = Identity::from_seed(SEED).unwrap().key_hash();
    let control: SocketAddr = "10.77.0.2:15008".parse().unwrap();
    until("the agent listens", Duration::from_secs(10), async || {
        TcpStream::connect(control).await.is_ok()
    })
    .await;
    let tcp = TcpStream::connect(control).await.unwrap();
    tp_tunnel::carrier::tune(&tcp).unwrap();
    let tls = connect_tls(tcp, manager, &pinned).await.unwrap();
    let (tunnel, driver) = Tunnel::establish(tls).await.unwrap();
    tokio::spawn(driver);
    tunnel
}

pub async fn until(what: &str, limit: Duration, condition: impl AsyncFn() -> bool) -> Duration {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    start.elapsed()
}

/// Runs `test` as a client of a new pod.
pub fn in_a_pod(name: &str, test: impl AsyncFnOnce(&mut Pod)) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut pod = Pod::new(name);
    pod.enter_as_client();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test(&mut pod));
}
