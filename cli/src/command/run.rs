//! `tp run`: one program sees the cluster.

mod calls;

use std::ffi::OsString;
use std::process::ExitCode;

use rustix::process::Rlimit;

use super::child::{self, Signals};
use super::connect::{before_command, connection_name, rule, up_with};
use super::manager_args::ManagerArgs;
use super::place::Place;
use crate::daemon::folder;
use crate::daemon::parameters::{Listen, Parameters};
use crate::daemon::peers::{self, Peer};
use crate::intercept::env::{self, Variables};
use crate::kubeconfig::Selectors;
use crate::report::{self, Failure, OrFail, Output};
use crate::run::device::Kind;
use crate::run::dns;
use crate::run::explain;
use crate::run::lease::{From, Wanted};
use crate::run::link::{Carrying, Link};
use crate::run::method::Method;
use crate::run::namespace::{Namespace, NotRun};
use crate::run::notify::program::Starting;
use crate::run::plan::{Made, Plan, Refused};
use crate::run::publish::{self, Published};

/// Run a program whose network is the cluster's: any program, without root, and nothing else changes
///
/// It uses the connection that is up, or one of its own that ends with it. Names resolve as in a pod; what is outside of
/// the cluster is reached from this workstation.
#[derive(clap::Args, Debug, Clone)]
#[command(after_help = "\
Examples:
  tp run -- ./my-service                    as if it ran in the connection's namespace
  tp run -n shop -- psql -h db orders       short names of another namespace
  tp run --publish 8080 -- ./my-service     and reach its port 8080 at localhost:8080
  tp run -w web -- ./my-service             with the environment of web's container
  tp run --explain                          what works on this machine, what does not, and the cure
")]
pub struct Args {
    /// Namespace whose Services are reached by their short names [default: the connection's]
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Use this connection [default: the only one, or one of its own]
    #[arg(long, value_name = "NAME", value_parser = connection_name, conflicts_with_all = ["via", "temporary"])]
    pub name: Option<String>,
    /// How the program gets to the cluster; `tp run --explain` says what each can do here
    #[arg(long, value_enum, default_value_t = Method::Auto)]
    pub method: Method,
    /// Run nothing; say which methods work here, which would be chosen, and what will not work
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
    /// Give it the environment of this workload's container; needs the right to run programs there
    #[arg(short, long, value_name = "WORKLOAD")]
    pub workload: Option<String>,
    /// Which of its containers [default: the first]
    #[arg(long, value_name = "CONTAINER", requires = "workload")]
    pub container: Option<String>,
    /// Take over this variable although it changes how local tools run; repeatable
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        requires = "workload"
    )]
    pub env_allow: Vec<String>,
    /// What the program gets in its environment.
    #[arg(skip)]
    given: Variables,
    /// What carries the program's packets with `--method netns` [default: tun, or veth where /dev/net/tun is root's alone]
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

/// Runs it.
///
/// # Errors
/// Why the program was not started; the exit code is then the one for that.
pub async fn run(mut args: Args, _output: &Output) -> Result<ExitCode, Failure> {
    if args.explain {
        return explain(&args).await;
    }
    args.given = args.environment().await.map_err(before_command)?;
    match args.method {
        Method::ProxyEnv => by_variables(&args).await,
        Method::Notify => calls::run(&args).await,
        Method::Auto | Method::Netns => in_namespace(&args).await,
    }
    .map_err(before_command)
}

async fn explain(args: &Args) -> Result<ExitCode, Failure> {
    let cannot = || "cannot start a process".to_owned();
    let tried = Namespace::start(&args.plan(), &[], &[]).or_fail(cannot)?;
    let beside = Starting::start(&[], &[], child::open_files()).or_fail(cannot)?;
    let made = tried.made().map(|(made, _)| made);
    tried.end();
    let kept = match beside.ready() {
        Ok((kept, _)) => {
            kept.end().await;
            Ok(())
        }
        Err(refused) => Err(refused),
    };
    let found = explain::Found {
        chosen: args.choose(&made, &kept),
        made,
        kept,
    };
    let connection = match args.peer() {
        Ok(Some(peer)) => Ok(format!("the one named {}", peer.name)),
        Ok(None) => Ok("one of its own, which ends with the program".to_owned()),
        Err(failure) => Err(failure.what),
    };
    report::write_out(&explain::told(&found, &connection))?;
    Ok(ExitCode::SUCCESS)
}

async fn in_namespace(args: &Args) -> Result<ExitCode, Failure> {
    let cannot = || "cannot start a process".to_owned();
    let mut signals = Signals::watch()?;
    let open_files = child::open_files();
    // At the same time as the connection; and before it, so that the program has this shell's limits.
    let namespace = Namespace::start(&args.plan(), &args.command, &args.given).or_fail(cannot)?;
    let link = args.link(&mut signals).await?;
    let (made, descriptors) = match namespace.made() {
        Ok(made) => made,
        Err(refused) => {
            namespace.end();
            return instead(args, link, &refused, open_files, &mut signals).await;
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
    let wanted = args.wanted(From::Device {
        kind: made.device,
        forwards: args.forwards(&made.listeners),
        offline: args.offline,
    });
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
    child::note_left(namespace.end());
    carrying.end(child::ended_well(&code)).await;
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
async fn instead(
    args: &Args,
    link: Link,
    refused: &Refused,
    open_files: Rlimit,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    let mut failure = explain::failure("the program cannot get a network of its own here", refused);
    if args.method == Method::Netns || args.device.is_some() {
        link.end().await;
        return Err(failure);
    }
    let why_not = match args.unfit_for_calls() {
        Some(why) => why,
        None => {
            let starting = Starting::start(&args.command, &args.given, open_files);
            let starting = starting.or_fail(|| "cannot start a process".to_owned())?;
            match starting.ready() {
                Ok((kept, descriptors)) => {
                    report::note(&format!(
                        "note: no namespaces here ({}), so --method notify is used: TCP and names only, see \
                         `tp run --explain`",
                        refused.why
                    ));
                    return calls::live(args, link, kept, descriptors, signals).await;
                }
                Err(refused) => format!("{}: {}", refused.step, refused.why),
            }
        }
    };
    link.end().await;
    failure = failure.because(format!("--method notify: {why_not}"));
    if args.needs_own_network() {
        return Err(failure.because(
            "--method proxy-env: it has neither --publish nor --host-loopback nor --offline",
        ));
    }
    report::note(&format!(
        "warning: {} ({}; {why_not}); going on with proxy variables, which not every program heeds",
        failure.what, refused.why
    ));
    by_variables(args).await
}

async fn by_variables(args: &Args) -> Result<ExitCode, Failure> {
    let open_files = child::open_files();
    let mut signals = Signals::watch()?;
    if let Some(peer) = args.peer()? {
        let mut variables = peer.variables().await?;
        variables.extend(args.given.iter().cloned());
        let mut child = child::start(&args.command, &variables, open_files)?;
        return wait(&mut child, &mut signals).await;
    }
    let running = up_with(args.parameters(), &mut signals).await?;
    let mut variables = running.variables().to_vec();
    variables.extend(args.given.iter().cloned());
    let code = match child::start(&args.command, &variables, open_files) {
        Ok(mut child) => wait(&mut child, &mut signals).await,
        Err(failure) => Err(failure),
    };
    running.end_with_program(child::ended_well(&code)).await;
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

    /// The workload's, where one is named.
    async fn environment(&self) -> Result<Variables, Failure> {
        let Some(workload) = &self.workload else {
            return Ok(Variables::new());
        };
        let place = Place {
            namespace: self.namespace.clone(),
            connection: self.name.clone(),
            selectors: self.selectors.clone(),
        };
        let (cluster, namespace) = place.find().await?;
        let container = self.container.as_deref();
        env::of_workload(&cluster, &namespace, workload, container, &self.env_allow).await
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
            name: Some(folder::program_name()),
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

    fn wanted(&self, from: From) -> Wanted {
        Wanted {
            from,
            all: self.all,
            also_proxy: self.also_proxy.clone(),
            never_proxy: self.never_proxy.clone(),
        }
    }

    /// Where each listener of the namespace leads.
    fn forwards(&self, listeners: &[u16]) -> Vec<u16> {
        let outside = |port: &u16| {
            let forwarded = self.host_loopback.iter().find(|(inside, _)| inside == port);
            forwarded.map_or(*port, |(_, outside)| *outside)
        };
        listeners.iter().map(outside).collect()
    }

    /// What only a namespace gives.
    fn needs_own_network(&self) -> bool {
        self.offline || !self.publish.is_empty() || !self.host_loopback.is_empty()
    }

    /// Why answering system calls is not enough. The program shares the workstation's network then, so ports that are to
    /// be the same on both sides are so by themselves.
    fn unfit_for_calls(&self) -> Option<String> {
        let why = if self.offline {
            "it cannot keep a program from this workstation's network, as --offline asks"
        } else if self.device.is_some() {
            "there is no network device, as --device asks for"
        } else if self
            .host_loopback
            .iter()
            .any(|(inside, outside)| inside != outside)
        {
            "the program's loopback is this workstation's, so --host-loopback cannot change a port"
        } else if self
            .publish
            .iter()
            .any(|published| !published.is_by_itself())
        {
            "the program listens on this workstation itself, so --publish cannot change a port or an address"
        } else {
            return None;
        };
        Some(why.to_owned())
    }

    /// What `--explain` is about.
    fn choose(&self, made: &Result<Made, Refused>, kept: &Result<(), Refused>) -> Method {
        match self.method {
            Method::Auto if made.is_ok() => Method::Netns,
            Method::Auto if kept.is_ok() => Method::Notify,
            Method::Auto => Method::ProxyEnv,
            chosen @ (Method::Netns | Method::Notify | Method::ProxyEnv) => chosen,
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
    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        crate::command::parse_args(line)
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
            "--method magic -- x",
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
        assert_eq!(args.forwards(&[5432, 5432, 80]), [15432, 15432, 80]);
    }

    #[test]
    fn what_a_shared_network_gives_by_itself_needs_no_namespace() {
        let fits = |line: &str| parse(line).unwrap().unfit_for_calls().is_none();

        assert!(fits("-- x"));
        assert!(fits("--host-loopback 80,5432:5432 --publish 8080 -- x"));
        for line in [
            "--offline -- x",
            "--device tun -- x",
            "--host-loopback 80:8080 -- x",
            "--publish 8080:80 -- x",
            "--publish 0.0.0.0:80:80 -- x",
        ] {
            assert!(!fits(line), "{line}");
        }
    }
}
