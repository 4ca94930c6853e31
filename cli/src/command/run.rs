//! `tp run`: one program sees the cluster.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::ValueEnum;

use super::child::{self, Signals};
use super::connect::{before_command, connection_name, rule, up_with};
use super::manager_args::ManagerArgs;
use crate::daemon::parameters::{Listen, Parameters};
use crate::daemon::peers::{self, Peer};
use crate::kubeconfig::Selectors;
use crate::report::{self, Failure, OrFail, Output};
use crate::run::device::Kind;
use crate::run::dns;
use crate::run::explain;
use crate::run::lease::Wanted;
use crate::run::link::{Carrying, Link};
use crate::run::namespace::{Namespace, NotRun};
use crate::run::plan::{Plan, Refused};
use crate::run::publish::{self, Published};

/// Run a program whose network is the cluster's: any program, without root, and nothing else changes
///
/// It uses the connection that is up, or one of its own that ends with it. Names resolve as in a pod; what is outside of
/// the cluster is reached from this workstation.
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// Namespace whose Services are reached by their short names [default: the connection's]
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Use this connection [default: the only one, or one of its own]
    #[arg(long, value_name = "NAME", value_parser = connection_name, conflicts_with_all = ["via", "temporary"])]
    pub name: Option<String>,
    /// How the program gets to the cluster
    #[arg(long, value_enum, default_value_t = Method::Auto)]
    pub method: Method,
    /// Only say what would be chosen here, and what will not work
    #[arg(long)]
    pub explain: bool,
    /// Reach the cluster only, and nothing from this workstation
    #[arg(long)]
    pub offline: bool,
    /// The program's localhost:PORT is this workstation's, or its second PORT; repeatable
    #[arg(long, value_name = "PORT[:PORT]", value_delimiter = ',', value_parser = forwarded)]
    pub host_loopback: Vec<(u16, u16)>,
    /// What the program listens on is reached at this workstation's PORT; repeatable
    #[arg(long, value_name = "[ADDRESS:]PORT[:PORT]", value_delimiter = ',')]
    pub publish: Vec<Published>,
    /// Send everything to the cluster, the internet too; needs the right to leave it
    #[arg(long, conflicts_with = "offline")]
    pub all: bool,
    /// Send this to the cluster too: CIDR, host or *.suffix; repeatable
    #[arg(long, value_name = "WHAT", value_delimiter = ',', value_parser = rule)]
    pub also_proxy: Vec<String>,
    /// Never send this to the cluster: CIDR, host or *.suffix; repeatable
    #[arg(long, value_name = "WHAT", value_delimiter = ',', value_parser = rule)]
    pub never_proxy: Vec<String>,
    /// What carries the program's packets [default: tun, or veth where /dev/net/tun is root's alone]
    #[arg(long, value_enum)]
    pub device: Option<Kind>,
    /// Where the manager is.
    #[command(flatten)]
    pub manager: ManagerArgs,
    /// Which cluster, and as whom.
    #[command(flatten)]
    pub selectors: Selectors,
    /// The program and its arguments
    #[arg(
        last = true,
        value_name = "COMMAND",
        required_unless_present = "explain"
    )]
    pub command: Vec<OsString>,
}

/// How a program gets to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// The best that works here
    Auto,
    /// Network of its own: every program, TCP, UDP and ping
    Netns,
    /// Proxy variables: programs that heed them
    ProxyEnv,
}

/// Runs it.
///
/// # Errors
/// Why the program was not started; the exit code is then the one for that.
pub async fn run(args: Args, _output: &Output) -> Result<ExitCode, Failure> {
    if args.explain {
        return explain(&args).await;
    }
    match args.method {
        Method::ProxyEnv => by_variables(&args).await,
        Method::Auto | Method::Netns => in_namespace(&args).await,
    }
    .map_err(before_command)
}

async fn explain(args: &Args) -> Result<ExitCode, Failure> {
    let tried =
        Namespace::start(&args.plan(), &[]).or_fail(|| "cannot start a process".to_owned())?;
    let made = tried.made();
    let connection = match args.peer() {
        Ok(Some(peer)) => Ok(format!("the one named {}", peer.name)),
        Ok(None) => Ok("one of its own, which ends with the program".to_owned()),
        Err(failure) => Err(failure.what),
    };
    let told = explain::told(&made.map(|(made, _)| made), &connection);
    report::write_out(&told)?;
    Ok(ExitCode::SUCCESS)
}

async fn in_namespace(args: &Args) -> Result<ExitCode, Failure> {
    let cannot = || "cannot start a process".to_owned();
    let mut signals = Signals::watch()?;
    // At the same time as the connection; and before it, so that the program has this shell's limits.
    let namespace = Namespace::start(&args.plan(), &args.command).or_fail(cannot)?;
    let link = args.link(&mut signals).await?;
    let (made, descriptors) = match namespace.made() {
        Ok(made) => made,
        Err(refused) => {
            link.end().await;
            namespace.end();
            return instead(args, &refused).await;
        }
    };
    for note in &made.notes {
        tracing::debug!(note, "in the namespace");
    }
    let (own, domain) = link.names();
    let names = dns::resolv_conf(args.namespace.as_deref().unwrap_or(&own), &domain);
    let published = match args.listen().await {
        Ok(published) => published,
        Err(failure) => {
            link.end().await;
            return Err(failure);
        }
    };
    let wanted = args.wanted(made.device, &made.listeners);
    let carrying = link.carry(&wanted, descriptors).await?;
    let ended = live(args, namespace, names, published, carrying, &mut signals).await;
    ended.map_err(before_command)
}

/// From the program's start until nothing is left of it.
async fn live(
    args: &Args,
    mut namespace: Namespace,
    names: String,
    published: Vec<(tokio::net::TcpListener, Published)>,
    mut carrying: Carrying,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    let code = match namespace.go(names) {
        Ok(()) => {
            let guard = namespace
                .guard()
                .or_fail(|| "cannot publish a port".to_owned())?;
            tokio::select! {
                code = attend(&mut namespace, &mut carrying, signals) => code,
                () = publish::serve(published, guard) => unreachable!("it is served until it is dropped"),
            }
        }
        Err(NotRun::Program(error)) => Err(child::not_started(&args.command[0], &error)),
        Err(NotRun::Other(error)) => {
            Err(Failure::new("the namespace broke down").caused_by(&error))
        }
    };
    let left = namespace.end();
    if left > 0 {
        let what = report::counted(left as u64, "program");
        report::note(&format!("ended what was left running: {what}"));
    }
    carrying.end().await;
    code
}

/// What a program in a namespace has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Network {
    Carried,
    /// Its flows are being reset.
    Ending,
    /// Whatever it tries fails at once.
    Gone,
}

/// Waits for the program. A connection that ends under it is said and is not its end.
async fn attend(
    namespace: &mut Namespace,
    carrying: &mut Carrying,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    let mut network = Network::Carried;
    loop {
        tokio::select! {
            // First, since a program may end because its connection did.
            biased;
            lost = next_loss(carrying, network) => match lost {
                Some(failure) => {
                    network = Network::Ending;
                    failure.print();
                }
                // Only now, so that no reset is lost in a device that is down.
                None => {
                    network = Network::Gone;
                    namespace.cut();
                }
            },
            ended = namespace.child().wait() => {
                let status = ended.or_fail(|| "cannot wait for the program".to_owned())?;
                return Ok(child::exit_code(status));
            }
            signal = signals.next() => child::forward(signal, namespace.child()),
        }
    }
}

/// Returns when the network is one step nearer to its end; with the reason, the first time. Cancel safe.
async fn next_loss(carrying: &mut Carrying, network: Network) -> Option<Failure> {
    match network {
        Network::Carried => Some(carrying.ended().await),
        Network::Ending => {
            carrying.released().await;
            None
        }
        Network::Gone => std::future::pending().await,
    }
}

/// What to do where there is no namespace.
async fn instead(args: &Args, refused: &Refused) -> Result<ExitCode, Failure> {
    let failure = explain::failure(refused);
    let only_variables = args.publish.is_empty() && args.host_loopback.is_empty() && !args.offline;
    if args.method == Method::Netns || args.device.is_some() || !only_variables {
        return Err(failure);
    }
    report::note(&format!(
        "warning: {} ({}); going on with proxy variables, which not every program heeds",
        failure.what, refused.why
    ));
    by_variables(args).await
}

async fn by_variables(args: &Args) -> Result<ExitCode, Failure> {
    let open_files = child::open_files();
    let mut signals = Signals::watch()?;
    if let Some(peer) = args.peer()? {
        let variables = peer.variables().await?;
        let mut child = child::start(&args.command, &variables, open_files)?;
        return wait(&mut child, &mut signals).await;
    }
    let running = up_with(args.parameters(), &mut signals).await?;
    let code = match child::start(&args.command, running.variables(), open_files) {
        Ok(mut child) => wait(&mut child, &mut signals).await,
        Err(failure) => Err(failure),
    };
    running.end().await;
    code
}

async fn wait(
    child: &mut tokio::process::Child,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    loop {
        tokio::select! {
            ended = child.wait() => {
                let status = ended.or_fail(|| "cannot wait for the program".to_owned())?;
                return Ok(child::exit_code(status));
            }
            signal = signals.next() => child::forward(signal, child),
        }
    }
}

impl Args {
    fn plan(&self) -> Plan {
        Plan {
            device: self.device,
            forwarded: self
                .host_loopback
                .iter()
                .map(|(inside, _)| *inside)
                .collect(),
        }
    }

    /// The connection to use, unless one is to be made.
    fn peer(&self) -> Result<Option<Peer>, Failure> {
        let own = self.manager.is_given() || self.selectors != Selectors::default();
        match (&self.name, peers::all().len()) {
            (Some(name), _) => peers::one(Some(name)).map(Some),
            (None, 0) => Ok(None),
            (None, _) if own => Ok(None),
            (None, _) => peers::one(None).map(Some),
        }
    }

    async fn link(&self, signals: &mut Signals) -> Result<Link, Failure> {
        match self.peer()? {
            Some(peer) => Link::lent(&peer).await,
            None => up_with(self.parameters(), signals).await.map(Link::Own),
        }
    }

    /// The rules are not the connection's but the program's.
    fn parameters(&self) -> Parameters {
        Parameters {
            name: Some(format!("run-{}", std::process::id())),
            selectors: self.selectors.clone(),
            namespace: self.namespace.clone(),
            manager_namespace: self.manager.manager_namespace.clone(),
            way: self.manager.way(),
            listen: Listen::Loopback(0),
            all: self.all,
            also_proxy: self.also_proxy.clone(),
            never_proxy: self.never_proxy.clone(),
            allow_lan: false,
            credentials: None,
        }
    }

    fn wanted(&self, device: Kind, listeners: &[u16]) -> Wanted {
        let outside = |port: &u16| {
            let forwarded = self.host_loopback.iter().find(|(inside, _)| inside == port);
            forwarded.map_or(*port, |(_, outside)| *outside)
        };
        Wanted {
            device,
            forwards: listeners.iter().map(outside).collect(),
            offline: self.offline,
            all: self.all,
            also_proxy: self.also_proxy.clone(),
            never_proxy: self.never_proxy.clone(),
        }
    }

    async fn listen(&self) -> Result<Vec<(tokio::net::TcpListener, Published)>, Failure> {
        let mut listeners = Vec::new();
        for published in &self.publish {
            let listener = publish::listen(*published).await;
            let listener =
                listener.or_fail(|| format!("cannot listen on {}", published.outside))?;
            listeners.push((listener, *published));
        }
        Ok(listeners)
    }
}

fn forwarded(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port @ 1..) => Ok(port),
        Ok(0) | Err(_) => Err("expected PORT or PORT:PORT".to_owned()),
    };
    match text.split_once(':') {
        Some((inside, outside)) => Ok((port(inside)?, port(outside)?)),
        None => port(text).map(|port| (port, port)),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, clap::Error> {
        let words = std::iter::once("tp").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.args)
    }

    #[test]
    fn a_program_is_needed_unless_it_is_only_explained() {
        assert!(parse("").is_err());
        assert!(parse("--explain").unwrap().command.is_empty());
        assert_eq!(parse("-- curl -s x").unwrap().command, ["curl", "-s", "x"]);
    }

    #[test]
    fn flags_that_make_no_sense_are_usage_errors() {
        for line in [
            "--method notify -- x",
            "--device tap -- x",
            "--host-loopback 0 -- x",
            "--host-loopback 1:2:3 -- x",
            "--publish x -- x",
            "--all --offline -- x",
            "--name a --temporary -- x",
            "--key /k -- x",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_forwarded_port_may_have_another_number_outside() {
        let args = parse("--host-loopback 5432:15432,80 -- x").unwrap();

        assert_eq!(args.plan().forwarded, [5432, 80]);
        let wanted = args.wanted(Kind::Tun, &[5432, 5432, 80]);
        assert_eq!(wanted.forwards, [15432, 15432, 80]);
    }
}
