//! The ways to one server inside the cluster: `kubectl port-forward` in both of its protocols, and `tp`.
//!
//! Each starts its own process and ends it on drop. A path opens connected sockets; what is sent on them is not its business.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Which way the bytes of a throughput round go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Direction {
    /// Cluster to workstation.
    Down,
    /// Workstation to cluster.
    Up,
}

/// The server's two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Port {
    /// Waits for a command.
    Commands = 7000,
    /// Sends one byte as soon as it is connected.
    ServerFirst = 7001,
}

/// A way to the server.
pub(crate) trait Path: Sync {
    fn name(&self) -> &str;
    /// A socket that speaks with the server, once the tool has said that it is connected.
    fn open(&self, port: Port) -> Result<TcpStream>;
}

/// `kubectl port-forward` to the server's pod.
pub(crate) struct Kubectl {
    child: Child,
    commands: u16,
    server_first: u16,
    name: &'static str,
}

impl Kubectl {
    /// Starts it; `websocket` says which protocol it speaks with the API server.
    pub(crate) fn start(pod: &str, websocket: bool) -> Result<Self> {
        let (namespace, pod) = pod.split_once('/').context("PEER_POD is namespace/pod")?;
        let mut child = Command::new("kubectl")
            .args([
                "-n",
                namespace,
                "port-forward",
                &format!("pod/{pod}"),
                ":7000",
                ":7001",
            ])
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websocket.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("kubectl does not start")?;
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let commands = forwarded(&mut stdout, Port::Commands)?;
        let server_first = forwarded(&mut stdout, Port::ServerFirst)?;
        // kubectl prints a line for each connection; it must never block on a full pipe.
        std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        let name = if websocket {
            "kubectl, WebSocket"
        } else {
            "kubectl, SPDY"
        };
        Ok(Self {
            child,
            commands,
            server_first,
            name,
        })
    }
}

/// The local port that kubectl says it forwards to `port`.
fn forwarded(stdout: &mut impl BufRead, port: Port) -> Result<u16> {
    let target = format!("-> {}", port as u16);
    loop {
        let mut line = String::new();
        ensure!(
            stdout.read_line(&mut line)? > 0,
            "kubectl forwards nothing to {port:?}"
        );
        let local = line
            .strip_prefix("Forwarding from 127.0.0.1:")
            .and_then(|rest| rest.split(' ').next());
        if let (Some(local), true) = (local, line.contains(&target)) {
            return Ok(local.parse()?);
        }
    }
}

impl Path for Kubectl {
    fn name(&self) -> &str {
        self.name
    }

    fn open(&self, port: Port) -> Result<TcpStream> {
        let port = match port {
            Port::Commands => self.commands,
            Port::ServerFirst => self.server_first,
        };
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(stream)
    }
}

impl Drop for Kubectl {
    fn drop(&mut self) {
        // Best effort: the process may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `tp connect --proxy`, through its SOCKS5 side.
pub(crate) struct Tp {
    program: String,
    proxy: String,
    server: String,
}

const CONNECTION: &str = "bench";
/// Where the server is.
const NAMESPACE: &str = "bench";

impl Tp {
    pub(crate) fn connect(server: &str) -> Result<Self> {
        let program = std::env::var("TP_BIN").unwrap_or_else(|_| "tp".into());
        let status = Command::new(&program)
            .args(["connect", "--name", CONNECTION, "--listen", "127.0.0.1:0"])
            .args(["--namespace", NAMESPACE])
            .stdout(Stdio::null())
            .status()
            .with_context(|| format!("{program} does not start"))?;
        ensure!(status.success(), "tp connect: {status}");
        let status = run(&program, &["status", CONNECTION, "--output", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        let proxy = status["connections"][0]["proxy"]["address"]
            .as_str()
            .context("status names the proxy's address")?
            .to_owned();
        Ok(Self {
            program,
            proxy,
            server: server.to_owned(),
        })
    }

    /// A command line of `tp`.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        command
    }

    /// Both tools' versions, for the table's head.
    pub(crate) fn versions(&self) -> Result<String> {
        let ours = run(&self.program, &["version"])?;
        let theirs = run("kubectl", &["version"])?;
        Ok(format!(
            "{}\nkubectl: {}",
            ours.trim(),
            theirs.trim().replace('\n', ", ")
        ))
    }

    /// Resident memory of the connection's daemon.
    pub(crate) fn resident_mib(&self) -> Result<f64> {
        let status = run(&self.program, &["status", CONNECTION, "--output", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        let pid = status["connections"][0]["pid"]
            .as_u64()
            .context("status names the daemon's pid")?;
        let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kib: f64 = text
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().split(' ').next())
            .context("VmRSS")?
            .parse()?;
        Ok(kib / 1024.0)
    }
}

impl Path for Tp {
    fn name(&self) -> &str {
        "tp, SOCKS5"
    }

    fn open(&self, port: Port) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.proxy)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(&[5, 1, 0])?;
        let mut method = [0; 2];
        stream.read_exact(&mut method)?;
        let mut request = vec![5, 1, 0, 3, u8::try_from(self.server.len())?];
        request.extend_from_slice(self.server.as_bytes());
        request.extend_from_slice(&(port as u16).to_be_bytes());
        stream.write_all(&request)?;
        let mut reply = [0; 4];
        stream.read_exact(&mut reply)?;
        ensure!(reply[1] == 0, "SOCKS reply {}", reply[1]);
        let mut bound = vec![0; if reply[3] == 4 { 18 } else { 6 }];
        stream.read_exact(&mut bound)?;
        Ok(stream)
    }
}

impl Drop for Tp {
    fn drop(&mut self) {
        // Best effort: a failed bench may have lost its connection already.
        let _ = Command::new(&self.program)
            .args(["quit", CONNECTION])
            .stdout(Stdio::null())
            .status();
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("{program} does not start"))?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
