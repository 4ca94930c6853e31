//! `tp intercept`: requests to a workload that match go to this workstation.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use serde::Serialize;
use tp_manager_api::SIDECAR_LABEL;
use tp_manager_api::intercept::AttachMode;
use tp_manager_api::route_table::Protocol;

use super::child::{self, Signals};
use super::connect::before_command;
use super::watch;
use crate::daemon::held::Held;
use crate::daemon::inbound::LocalAddress;
use crate::daemon::peers::{self, Peer};
use crate::daemon::status::InterceptStatus;
use crate::daemon::wanted::{Wanted, WantedPort};
use crate::env_syntax::EnvSyntax;
use crate::intercept::env::{self, Variables};
use crate::intercept::example;
use crate::intercept::flags::MatcherFlags;
use crate::intercept::missing::MissingFlags;
use crate::intercept::ports::{PortFlag, Target};
use crate::intercept::sidecar;
use crate::intercept::summary;
use crate::intercept::workload::{self, Found};
use crate::kubeconfig::Cluster;
use crate::report::{self, Failure, OrFail, Output};

/// Send requests to a workload that match to this workstation; everybody else's stay with the application
///
/// Without a flag that says which requests, a random header does, and is printed with a curl line to try it. The
/// intercept lives as long as the connection, or until `tp leave`; with `-- COMMAND` as long as the command, whose exit
/// code is passed on.
#[derive(clap::Args, Debug, Clone)]
#[command(after_help = "\
Examples:
  tp intercept web -p 3000                                   a random header, printed with a curl line
  tp intercept web -p 3000:http --http-header x-user=ada     port http of its Service, requests with that header
  tp intercept web -p 3000 -e web.env -- npm start           with the container's environment, as long as npm runs
  tp intercept web -p 3000 --http-path-prefix /api --http-header auto
  tp intercept web -p 3000:https --tls-secret web-tls        requests inside of TLS, opened with that Secret's key
")]
pub struct Args {
    /// Name of the intercept, and of the workload unless that is given
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The workload, as WORKLOAD or KIND/WORKLOAD: Deployment, StatefulSet, DaemonSet, ReplicaSet or Pod
    #[arg(short, long, value_name = "WORKLOAD")]
    pub workload: Option<String>,
    /// Port on the workstation, and the Service's port by name or number, `/udp` after it for datagrams; repeatable [default: the
    /// only port, as it is]
    #[arg(
        short,
        long,
        value_name = "LOCAL[:REMOTE][/udp]",
        value_delimiter = ','
    )]
    pub port: Vec<PortFlag>,
    /// Host that LOCAL is a port of, such as a container's address [default: this machine]
    #[arg(long, value_name = "HOST")]
    pub address: Option<String>,
    /// Service that REMOTE is a port of
    #[arg(long, value_name = "SERVICE")]
    pub service: Option<String>,
    /// Container that has the port and gives the environment
    #[arg(long, value_name = "CONTAINER")]
    pub container: Option<String>,
    /// Which requests.
    #[command(flatten)]
    pub matchers: MatcherFlags,
    /// Answer 502 when the workstation does not, instead of letting the application answer
    #[arg(long)]
    pub strict: bool,
    /// End TLS in the pod with the certificate and key of this Secret, and match the requests inside; LOCAL speaks plain HTTP
    #[arg(long, value_name = "SECRET")]
    pub tls_secret: Option<String>,
    /// Reset connections that were open before, once they are idle for a second: they bypass the intercept until they end
    #[arg(long)]
    pub close_idle: bool,
    /// How the agent gets into the pods
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Attach::Auto)]
    pub attach: Attach,
    /// Port of this machine's loopback that leads to the port of that number of an intercepted pod, such as a helper's
    /// beside the application; repeatable
    #[arg(long, value_name = "PORT[/tcp]", value_delimiter = ',', value_parser = to_pod)]
    pub to_pod: Vec<u16>,
    /// With `--attach sidecar`: give the pod template the label that asks for the agent, and make the pods anew
    #[arg(long)]
    pub restart_pods: bool,
    /// What reaches the local port is never encrypted; taken for the sake of scripts
    #[arg(long, hide = true)]
    pub plaintext: bool,
    /// Print each request that was this intercept's once it was answered, until Ctrl-C, which leaves the intercept as it is;
    /// of an intercept that is there already, too. `--output json` has the headers; values of authorization and cookies are
    /// hidden
    #[arg(long)]
    pub watch: bool,
    #[command(flatten)]
    missing: MissingFlags,
    /// Write the container's environment to this file; `-` is stdout
    #[arg(short, long, value_name = "FILE")]
    pub env_file: Option<PathBuf>,
    /// Its form
    #[arg(long, value_enum, value_name = "SYNTAX", default_value_t = EnvSyntax::Docker)]
    pub env_syntax: EnvSyntax,
    /// Write the container's environment to this file as JSON
    #[arg(short = 'j', long, value_name = "FILE")]
    pub env_json: Option<PathBuf>,
    /// Take over this variable although it changes how local tools run, such as NODE_OPTIONS; repeatable
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub env_allow: Vec<String>,
    /// The connection [default: the only one]
    #[arg(long, value_name = "NAME")]
    pub connection: Option<String>,
    /// Run this with the container's environment, and end the intercept after it
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// How the agent gets into the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Attach {
    /// As the pod allows
    Auto,
    /// As an ephemeral container; nothing restarts
    Ephemeral,
    /// As a sidecar, which takes no privilege, in pods that were made with it
    Sidecar,
}

/// What was made, for programs.
#[derive(Serialize)]
struct Made {
    name: String,
    namespace: String,
    /// One entry a port.
    intercepts: Vec<InterceptStatus>,
    /// Arguments of curl for a request that matches, where one can be shown.
    curl: Option<Vec<String>>,
    warnings: Vec<String>,
}

/// Everything about the cluster that the command line leads to.
struct Plan {
    namespace: String,
    wanted: Wanted,
    /// The container's variables, where they were asked for and may be read.
    variables: Option<Variables>,
    curl: Option<Vec<String>>,
    warnings: Vec<String>,
}

/// Makes the intercept.
///
/// # Errors
/// Why it cannot be; with a command, its exit code is then the one for "before the command started".
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    args.missing.refuse()?;
    if args.command.is_empty() {
        let peer = peers::one(args.connection.as_deref())?;
        if args.watch && args.is_there(&peer).await {
            return watched(&peer, &args.name, *output).await;
        }
        let plan = args.plan(&peer).await?;
        // What stays in the file after this command is of the intercept that it made.
        let made = report::step("intercepting", peer.intercept(plan.wanted.clone())).await;
        let (_, statuses) = made?;
        say(&args, plan, statuses, *output)?;
        return match args.watch {
            true => watched(&peer, &args.name, *output).await,
            false => Ok(ExitCode::SUCCESS),
        };
    }
    with_command(&args).await
}

async fn watched(peer: &Peer, name: &str, output: Output) -> Result<ExitCode, Failure> {
    watch::print(peer.watch(name).await?, output).await?;
    Ok(ExitCode::SUCCESS)
}

async fn with_command(args: &Args) -> Result<ExitCode, Failure> {
    let open_files = child::open_files();
    let mut signals = Signals::watch()?;
    let making = async {
        let peer = peers::one(args.connection.as_deref())?;
        let proxy = peer.variables().await?;
        let plan = args.plan(&peer).await?;
        let made = report::step("intercepting", peer.intercept(plan.wanted.clone())).await;
        let (held, statuses) = made?;
        let watch = match args.watch {
            true => Some(peer.watch(&args.name).await?),
            false => None,
        };
        Ok::<_, Failure>((held, statuses, plan, proxy, watch))
    };
    let made = tokio::select! {
        made = making => made,
        _ = signals.next() => Err(Failure::new("interrupted before the command started")),
    };
    let (held, statuses, plan, proxy, watch) = made.map_err(before_command)?;
    let variables = args.environment(&plan, &statuses, proxy);
    tell(&plan, &statuses);
    args.write_files(&plan, &statuses)?;
    let _watching = watch.map(watch::print_beside);
    match child::start(&args.command, &variables, open_files) {
        Ok(child) => attend(child, held, &mut signals).await,
        Err(failure) => {
            held.leave().await;
            Err(failure)
        }
    }
}

/// Waits for the command. An intercept that ends under it is said and is not its end.
async fn attend(
    mut child: tokio::process::Child,
    mut held: Held,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    let mut is_held = true;
    loop {
        tokio::select! {
            ended = child.wait() => {
                let status = ended.or_fail(|| "cannot wait for the command".to_owned())?;
                held.leave().await;
                return Ok(child::exit_code(status));
            }
            signal = signals.next() => child::forward(signal, &child),
            () = held.ended(), if is_held => {
                is_held = false;
                Failure::new("the intercept has ended, and the command goes on")
                    .because("it was left, or its connection ended")
                    .print();
            }
        }
    }
}

impl Args {
    /// Whether an intercept of this name is up.
    async fn is_there(&self, peer: &Peer) -> bool {
        let intercepts = peer.status().await.intercepts;
        intercepts
            .iter()
            .any(|intercept| intercept.name == self.name)
    }

    async fn plan(&self, peer: &Peer) -> Result<Plan, Failure> {
        if self.restart_pods && self.attach != Attach::Sidecar {
            let failure = Failure::new("`--restart-pods` goes with `--attach sidecar`");
            let failure = failure.because("nothing else takes new pods");
            return Err(failure.exit(report::USAGE));
        }
        let chosen = self.matchers.choose()?;
        let (selectors, namespace) = peer.login().await?;
        let cluster = selectors.load().await?;
        let name = self.workload.as_deref().unwrap_or(&self.name);
        let (found, services) = futures::try_join!(
            workload::find(&cluster, &namespace, name),
            workload::services(&cluster, &namespace),
        )?;
        if let Some(obstacle) = found.obstacle(&namespace) {
            let what = format!("{} cannot be intercepted", found.workload);
            return Err(Failure::new(what).because(obstacle));
        }
        let ports = self.ports(&found, &services)?;
        let targets: Vec<_> = ports.iter().map(|(_, _, target)| target).collect();
        let beside = self.attach == Attach::Sidecar || found.labels.contains_key(SIDECAR_LABEL);
        let is_udp = |(_, protocol, _): &(_, Protocol, _)| *protocol == Protocol::Udp;
        if beside && ports.iter().any(is_udp) {
            return Err(sidecar::no_udp(&found));
        }
        if self.attach == Attach::Sidecar {
            let restart = self.restart_pods;
            sidecar::make_sure(&cluster, &namespace, &found, &services, &targets, restart).await?;
        } else if found.labels.contains_key(SIDECAR_LABEL) {
            sidecar::check(&found, &services, &targets)?;
        }
        let of_port = ports
            .iter()
            .find_map(|(_, _, target)| target.container.as_deref());
        let container = found.container(self.container.as_deref(), of_port)?;
        let mut warnings = chosen.warnings;
        let variables = self
            .variables(&cluster, &namespace, &found, &container, &mut warnings)
            .await?;
        let connections = ports
            .iter()
            .filter(|(_, protocol, _)| *protocol == Protocol::Tcp);
        let curl = connections.into_iter().find_map(|(_, _, target)| {
            let url = base_url(target, &namespace, self.tls_secret.is_some())?;
            example::curl_arguments(&chosen.matchers, &url)
        });
        let wanted = Wanted {
            name: self.name.clone(),
            workload: found.workload.clone(),
            ports: ports
                .into_iter()
                .map(|(local, protocol, target)| wanted_port(local, protocol, target))
                .collect(),
            container: Some(container),
            matchers: chosen.matchers,
            strict: self.strict,
            tls_secret: self.tls_secret.clone(),
            close_idle: self.close_idle,
            attach: self.attach.into(),
            to_pod: self.to_pod.clone(),
            held: !self.command.is_empty(),
        };
        Ok(Plan {
            namespace,
            wanted,
            variables,
            curl,
            warnings,
        })
    }

    /// Each port with where it leads.
    fn ports(
        &self,
        found: &Found,
        services: &[k8s_openapi::api::core::v1::Service],
    ) -> Result<Vec<(LocalAddress, Protocol, Target)>, Failure> {
        let scene = found.scene(services);
        let choose = |remote: Option<&str>, protocol| {
            let (service, container) = (self.service.as_deref(), self.container.as_deref());
            let target = scene.choose(service, container, remote, protocol);
            target.map_err(|failure| failure.within(format!("cannot intercept {}", found.workload)))
        };
        let local = |port| LocalAddress {
            host: self.address.clone(),
            port,
        };
        if self.port.is_empty() {
            let target = choose(None, Protocol::Tcp)?;
            return Ok(vec![(local(target.port), Protocol::Tcp, target)]);
        }
        let mut ports: Vec<(LocalAddress, Protocol, Target)> = Vec::new();
        for flag in &self.port {
            if flag.protocol == Protocol::Udp && !self.matchers.global {
                let what = "datagrams are no requests that could be chosen from";
                let failure = Failure::new(what).exit(report::USAGE);
                return Err(failure.hint("`--global` takes all that comes to a UDP port"));
            }
            let target = choose(flag.remote.as_deref(), flag.protocol)?;
            let same = |(_, protocol, other): &(LocalAddress, Protocol, Target)| {
                *protocol == flag.protocol && other.port == target.port
            };
            if ports.iter().any(same) {
                let what = format!("port {} was given twice", target.port);
                return Err(Failure::new(what).exit(report::USAGE));
            }
            ports.push((local(flag.local), flag.protocol, target));
        }
        Ok(ports)
    }

    /// What cannot be had is an error where a file was asked for, and a warning where only a command is to be run.
    async fn variables(
        &self,
        cluster: &Cluster,
        namespace: &str,
        found: &Found,
        container: &str,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Variables>, Failure> {
        let for_file = self.env_file.is_some() || self.env_json.is_some();
        if !for_file && self.command.is_empty() {
            return Ok(None);
        }
        match env::of_container(cluster, namespace, found, container).await {
            Ok(variables) => Ok(Some(env::without_denied(variables, &self.env_allow))),
            Err(failure) if for_file => Err(failure),
            Err(failure) => {
                warnings.push(format!(
                    "the command gets no environment of the container: {}",
                    failure.one_line()
                ));
                Ok(None)
            }
        }
    }

    /// The proxy's variables, over them the container's, over them what says which intercept it is.
    fn environment(
        &self,
        plan: &Plan,
        statuses: &[InterceptStatus],
        proxy: Variables,
    ) -> Variables {
        let container = plan.variables.iter().flatten().cloned();
        proxy
            .into_iter()
            .chain(container)
            .chain(self.of_intercept(plan, statuses))
            .collect()
    }

    fn of_intercept(&self, plan: &Plan, statuses: &[InterceptStatus]) -> Variables {
        let id = statuses
            .first()
            .map(|status| status.id.as_str())
            .unwrap_or_default();
        env::of_intercept(id, plan.wanted.container.as_deref())
    }

    fn write_files(&self, plan: &Plan, statuses: &[InterceptStatus]) -> Result<(), Failure> {
        let Some(container) = &plan.variables else {
            return Ok(());
        };
        let mut all = container.clone();
        all.extend(self.of_intercept(plan, statuses));
        let files = [
            (&self.env_file, self.env_syntax),
            (&self.env_json, EnvSyntax::Json),
        ];
        for (path, syntax) in files {
            let Some(path) = path else { continue };
            let written = syntax.write(&all);
            env::write_private(path, &written.text)?;
            if !written.left_out.is_empty() {
                let names = written.left_out.join(", ");
                report::note(&format!(
                    "warning: {} cannot hold {names}; `--env-syntax json` holds everything",
                    path.display()
                ));
            }
        }
        Ok(())
    }
}

fn to_pod(text: &str) -> Result<u16, String> {
    let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    match (port.parse(), protocol.to_ascii_lowercase().as_str()) {
        (Ok(port @ 1..), "tcp") => Ok(port),
        (Ok(1..), "udp") => Err("UDP ports of a pod are not forwarded".to_owned()),
        _ => Err("expected PORT or PORT/tcp".to_owned()),
    }
}

fn wanted_port(local: LocalAddress, protocol: Protocol, target: Target) -> WantedPort {
    WantedPort {
        port: target.port,
        protocol,
        service: target.service.map(|(name, _)| name),
        local,
    }
}

/// `http://web.shop`, with a port unless it is the scheme's own.
fn base_url(target: &Target, namespace: &str, tls: bool) -> Option<String> {
    let (service, port) = target.service.as_ref()?;
    let (scheme, usual) = if tls { ("https", 443) } else { ("http", 80) };
    Some(match *port == usual {
        true => format!("{scheme}://{service}.{namespace}"),
        false => format!("{scheme}://{service}.{namespace}:{port}"),
    })
}

impl From<Attach> for AttachMode {
    fn from(attach: Attach) -> Self {
        match attach {
            Attach::Auto => Self::Auto,
            Attach::Ephemeral => Self::Ephemeral,
            Attach::Sidecar => Self::Sidecar,
        }
    }
}

fn say(
    args: &Args,
    plan: Plan,
    statuses: Vec<InterceptStatus>,
    output: Output,
) -> Result<(), Failure> {
    args.write_files(&plan, &statuses)?;
    warn(&plan, &statuses);
    let made = Made {
        name: plan.wanted.name.clone(),
        namespace: plan.namespace,
        intercepts: statuses,
        curl: plan.curl,
        warnings: plan.warnings,
    };
    // The file that was asked for on stdout is all that is there.
    if !args.writes_to_stdout() {
        let to_pod = &plan.wanted.to_pod;
        output.print(&made, || {
            summary::told(&made.intercepts, made.curl.as_deref(), to_pod)
        })?;
    }
    Ok(())
}

impl Args {
    fn writes_to_stdout(&self) -> bool {
        let files = [&self.env_file, &self.env_json];
        files
            .into_iter()
            .flatten()
            .any(|path| path.as_os_str() == "-")
    }
}

/// On stderr: stdout is the command's.
fn tell(plan: &Plan, statuses: &[InterceptStatus]) {
    warn(plan, statuses);
    for line in summary::told(statuses, plan.curl.as_deref(), &plan.wanted.to_pod).lines() {
        report::note_line(line);
    }
}

fn warn(plan: &Plan, statuses: &[InterceptStatus]) {
    for warning in &plan.warnings {
        report::note(&format!("warning: {warning}"));
    }
    for status in statuses {
        if let Some(open @ 1..) = status.open_before {
            let what = summary::open_before(open, status.port);
            report::note(&format!("warning: {what}"));
        }
        if let (false, Some(message)) = (status.ready, &status.message) {
            report::note(&format!("warning: {message}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        crate::command::parse_args(line)
    }

    #[test]
    fn telepresences_command_lines_are_taken() {
        let args = parse(
            "web -w deploy/web -p 8080:http,9090:80 -p 1 --address 10.0.0.2 --service web --container app -e a.env \
             --env-syntax sh:export -j a.json --http-header x-user=ada --http-path-prefix /api --plaintext --mount=false --to-pod 9000,9001/tcp -- npm start",
        )
        .unwrap();

        assert_eq!(args.port.len(), 3);
        assert_eq!(args.env_syntax, EnvSyntax::Sh);
        assert_eq!(args.to_pod, [9000, 9001]);
        assert!(args.missing.refuse().is_ok());
        assert_eq!(args.command, ["npm", "start"]);
        for bad in [
            "",
            "web -p x",
            "web --env-syntax cmd",
            "web --attach x",
            "web --to-pod 53/udp",
            "web --http-header x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
