//! The ways from a namespace to the server: one constructor a tool.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tp_benches::load::Direction;
use tp_benches::process::{Running, free_address};
use tp_benches::ssh;

use crate::agent::Request;
use crate::lab::{Lab, NETWORK, system};

/// An agent in a namespace, and what carries its packets.
pub(crate) struct Path {
    pub(crate) name: &'static str,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// The process that carries; the agent's parent or not. `None`: only the kernel.
    tool: Tool,
    agent: Running,
    /// How many bytes take a good while.
    sizes: HashMap<(Direction, u64), u64>,
    counts: HashMap<u64, u64>,
    /// What has to live as long.
    kept: Vec<Box<dyn std::any::Any>>,
}

enum Tool {
    Kernel,
    /// It has started the agent.
    Parent,
    Other(Running),
}

/// What moved, and how.
pub(crate) struct Moved {
    /// MB/s.
    pub(crate) rate: f64,
    /// Processor seconds of the tool for each GB.
    pub(crate) cost: Option<f64>,
}

/// What `tp run` is to use.
#[derive(Clone, Copy)]
pub(crate) enum Device {
    Tun,
    Veth,
}

impl Device {
    fn flag(self) -> [&'static str; 2] {
        match self {
            Self::Tun => ["--device", "tun"],
            Self::Veth => ["--device", "veth"],
        }
    }
}

impl Path {
    /// No tool: what the kernel makes of it.
    pub(crate) fn direct(lab: &Lab, name: &'static str) -> anyhow::Result<Self> {
        Self::start(name, command(&lab.agent()), Tool::Kernel)
    }

    /// `tp run`, whose own interface gets this MTU, to a server that is not the cluster's.
    pub(crate) fn run(
        lab: &Lab,
        name: &'static str,
        device: Device,
        mtu: u32,
    ) -> anyhow::Result<Self> {
        let mut command = lab.tp_run();
        command
            .args(device.flag())
            .args(["--never-proxy", NETWORK, "--"]);
        if mtu != crate::LARGE {
            let small = format!("ip link set tp0 mtu {mtu} && exec \"$@\"");
            command.args(["sh", "-c", &small, "sh"]);
        }
        command.args(lab.agent());
        Self::start(name, command, Tool::Parent)
    }

    /// `tp run`, to a server that is the cluster's: through HTTP/2, TLS and the manager.
    pub(crate) fn through_manager(
        lab: &Lab,
        name: &'static str,
        device: Device,
    ) -> anyhow::Result<Self> {
        let mut command = lab.tp_run();
        command.args(device.flag()).arg("--");
        command.args(lab.agent());
        Self::start(name, command, Tool::Parent)
    }

    pub(crate) fn slirp4netns(lab: &Lab, name: &'static str, mtu: u32) -> anyhow::Result<Self> {
        let agent = in_namespace(&lab.agent());
        let attach = |agent: u32| {
            let tool = Command::new("slirp4netns")
                .args(["--configure", &format!("--mtu={mtu}")])
                .args([&agent.to_string(), "tap0"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            Ok(Tool::Other(Running(
                tool.context("cannot start slirp4netns")?,
            )))
        };
        Self::attach(name, agent, attach)
    }

    /// Without its short cut for ports of loopback that are named in advance, which copies nothing.
    pub(crate) fn pasta(lab: &Lab, name: &'static str, mtu: u32) -> anyhow::Result<Self> {
        let mut command = command(
            &[
                "setpriv",
                "--reuid",
                "65534",
                "--regid",
                "65534",
                "--clear-groups",
                "--",
                "pasta",
                "--foreground",
                "--quiet",
                "--config-net",
                "-m",
                &mtu.to_string(),
                "-i",
                "outside",
                "-t",
                "none",
                "-u",
                "none",
                "-T",
                "none",
                "-U",
                "none",
                "--",
            ]
            .map(str::to_owned),
        );
        command.args(lab.agent()).stderr(Stdio::null());
        Self::start(name, command, Tool::Parent)
    }

    /// A local forwarding of OpenSSH; no namespace.
    pub(crate) fn ssh(lab: &Lab, name: &'static str) -> anyhow::Result<Option<Self>> {
        let Some(server) = ssh::Server::start(free_address()?)? else {
            return Ok(None);
        };
        let forward = server.forward(crate::SERVER)?;
        let [program, role, _] = lab.agent();
        let agent = command(&[program, role, forward.address.to_string()]);
        let mut path = Self::start(name, agent, Tool::Other(forward.client))?;
        path.kept.push(Box::new(server));
        Ok(Some(path))
    }

    /// sshuttle, in a namespace whose only neighbour is the one with the ssh server: it redirects what programs beside it
    /// send, and would redirect its own server as well.
    pub(crate) fn sshuttle(lab: &Lab, name: &'static str) -> anyhow::Result<Option<Self>> {
        system("ip link add to-shuttle type veth peer name shuttle")?;
        for setting in [
            "ip link set to-shuttle mtu 65520 up",
            "ip link set shuttle mtu 65520",
            "ip addr add 10.99.0.1/24 dev to-shuttle",
        ] {
            system(setting)?;
        }
        let Some(server) = ssh::Server::start(([10, 99, 0, 1], 2222).into())? else {
            return Ok(None);
        };
        let attach = |agent: u32| {
            system(&format!("ip link set shuttle netns {agent}"))?;
            for setting in [
                "link set lo up",
                "addr add 10.99.0.2/24 dev shuttle",
                "link set shuttle up",
                // To nobody: what sshuttle does not redirect does not arrive.
                "route add default via 10.99.0.9",
            ] {
                system(&format!("nsenter -t {agent} -n ip {setting}"))?;
            }
            let tool = Command::new("nsenter")
                .args(["-t", &agent.to_string(), "-n", "sshuttle"])
                .args(["--method", "nft", "-r", "root@10.99.0.1"])
                .args(["-e", &server.client().join(" ")])
                .arg(NETWORK)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(std::fs::File::create(lab.folder.join("sshuttle.log"))?)
                .spawn();
            Ok(Tool::Other(Running(tool.context("cannot start sshuttle")?)))
        };
        let mut path = Self::attach(name, in_namespace(&lab.agent()), attach)?;
        path.kept.push(Box::new(server));
        Ok(Some(path))
    }

    /// Starts an agent, then the tool that attaches itself to its namespace.
    fn attach(
        name: &'static str,
        agent: Command,
        tool: impl FnOnce(u32) -> anyhow::Result<Tool>,
    ) -> anyhow::Result<Self> {
        let mut path = Self::spawn(name, agent, Tool::Kernel)?;
        let agent = path.agent.0.id();
        wait_until(|| Ok(namespace(agent)? != namespace(std::process::id())?))?;
        path.tool = tool(agent)?;
        path.reach()
    }

    fn start(name: &'static str, agent: Command, tool: Tool) -> anyhow::Result<Self> {
        Self::spawn(name, agent, tool)?.reach()
    }

    fn spawn(name: &'static str, mut agent: Command, tool: Tool) -> anyhow::Result<Self> {
        let mut agent = agent
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let asks = agent.stdin.take().context("stdin is piped")?;
        let answers = BufReader::new(agent.stdout.take().context("stdout is piped")?);
        Ok(Self {
            name,
            asks,
            answers,
            tool,
            agent: Running(agent),
            sizes: HashMap::new(),
            counts: HashMap::new(),
            kept: Vec::new(),
        })
    }

    /// Returns it once the server is reached through it.
    fn reach(mut self) -> anyhow::Result<Self> {
        wait_until(|| Ok(self.ask(&Request::Reach).is_ok()))?;
        Ok(self)
    }

    /// What the agent answers.
    pub(crate) fn ask(&mut self, request: &Request) -> anyhow::Result<f64> {
        let name = self.name;
        writeln!(self.asks, "{request}").with_context(|| format!("{name} has ended"))?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        let answer = answer.trim();
        answer
            .parse()
            .map_err(|_| anyhow!("{name}, {request}: {answer}"))
    }

    pub(crate) fn has_tool(&self) -> bool {
        self.tool().is_some()
    }

    fn tool(&self) -> Option<&Running> {
        match &self.tool {
            Tool::Kernel => None,
            Tool::Parent => Some(&self.agent),
            Tool::Other(tool) => Some(tool),
        }
    }

    /// Moves as much as takes about 0.4 s.
    pub(crate) fn throughput(&mut self, direction: Direction, flows: u64) -> anyhow::Result<Moved> {
        const PROBE: u64 = 24 << 20;
        const SECONDS: f64 = 0.4;
        let request = |total| Request::Throughput {
            direction,
            flows,
            total,
        };
        let total = match self.sizes.get(&(direction, flows)) {
            Some(total) => *total,
            None => {
                let rate = self.ask(&request(PROBE))?;
                let total = ((rate * 1e6 * SECONDS) as u64).max(PROBE);
                self.sizes.insert((direction, flows), total);
                total
            }
        };
        let before = self.tool().map(Running::processor_time).transpose()?;
        let rate = self.ask(&request(total))?;
        let after = self.tool().map(Running::processor_time).transpose()?;
        let used = after.zip(before).map(|(after, before)| after - before);
        Ok(Moved {
            rate,
            cost: used.map(|used| used / (total as f64 / 1e9)),
        })
    }

    /// Connections per second, for about 0.4 s.
    pub(crate) fn connections(&mut self, at_once: u64) -> anyhow::Result<f64> {
        const PROBE: u64 = 320;
        const SECONDS: f64 = 0.4;
        let count = match self.counts.get(&at_once) {
            Some(count) => *count,
            None => {
                let probe = Request::Connections {
                    at_once,
                    count: PROBE,
                };
                let count = ((self.ask(&probe)? * SECONDS) as u64).max(PROBE);
                self.counts.insert(at_once, count);
                count
            }
        };
        self.ask(&Request::Connections { at_once, count })
    }

    /// Bytes of resident memory that the tool has more for each of so many flows, a while after they fell silent.
    pub(crate) fn idle_memory(mut self, flows: usize) -> anyhow::Result<f64> {
        const WARM: usize = 50;
        const QUIET: Duration = Duration::from_secs(3);
        self.ask(&Request::Idle { flows: WARM })?;
        let resident = |path: &Self| path.tool().context("no tool")?.resident();
        std::thread::sleep(QUIET);
        let before = resident(&self)?;
        self.ask(&Request::Idle { flows })?;
        std::thread::sleep(QUIET);
        Ok((resident(&self)? as f64 - before as f64) / flows as f64)
    }
}

fn command(line: &[String]) -> Command {
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]);
    command
}

fn in_namespace(agent: &[String]) -> Command {
    let mut command = Command::new("unshare");
    command.arg("--net").args(agent);
    command
}

fn namespace(process: u32) -> anyhow::Result<std::path::PathBuf> {
    Ok(std::fs::read_link(format!("/proc/{process}/ns/net"))?)
}

fn wait_until(mut done: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    for _ in 0..200 {
        if done()? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    bail!("it did not come up within 5 s")
}
