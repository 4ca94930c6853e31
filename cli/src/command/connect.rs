//! `tp connect`: a proxy on loopback that leads into the cluster.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use tokio_util::sync::CancellationToken;

use super::child::{self, Signals};
use super::manager_args::ManagerArgs;
use crate::daemon::background::{self, Outcome, PASSWORD_VARIABLE};
use crate::daemon::parameters::{Listen, Parameters, ProxyCredentials};
use crate::daemon::running::{self, LogTo, Running, Started};
use crate::daemon::status::ConnectionStatus;
use crate::daemon::valid_name;
use crate::kubeconfig::{Secret, Selectors};
use crate::proxy::rule::Rule;
use crate::report::{self, BEFORE_COMMAND, Failure, OrFail, Output, USAGE, escaped};

/// Connect to a cluster: a SOCKS5 and HTTP proxy on loopback that reaches its Services, pods and names
///
/// The connection goes on in the background; `tp status` shows it, `tp quit` ends it. With `-- COMMAND` it lives as long
/// as the command, which finds the proxy in its environment, and its exit code is the command's.
#[derive(clap::Args, Debug, Clone)]
#[command(after_help = "\
Examples:
  tp connect -n shop                        then: eval \"$(tp env)\"; curl http://web/
  tp connect -n shop -- ./run-tests         only for this command
  tp connect --temporary                    where no manager is installed
  tp connect --never-proxy 10.0.0.0/8       keep the office network's addresses
")]
pub struct Args {
    /// Serve a proxy; the only mode so far, and the default
    #[arg(long)]
    pub proxy: bool,
    /// Namespace whose Services are reached by their short names [default: the context's]
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Name of this connection [default: the context's name]
    #[arg(long, value_name = "NAME", value_parser = connection_name)]
    pub name: Option<String>,
    /// Port, or address and port, to listen on; port 0 is any free one [default: 127.0.0.1:1080, or the next free port]
    #[arg(long, value_name = "[ADDRESS:]PORT")]
    pub listen: Option<Listen>,
    /// Send everything to the cluster, the internet too; needs the right to leave it
    #[arg(long)]
    pub all: bool,
    /// Send this to the cluster too: CIDR, address, host or *.suffix; repeatable, or separated by commas
    #[arg(long, value_name = "WHAT", value_delimiter = ',', value_parser = rule)]
    pub also_proxy: Vec<String>,
    /// Never send this to the cluster, whatever else says so: CIDR, address, host or *.suffix; as above
    #[arg(long, value_name = "WHAT", value_delimiter = ',', value_parser = rule)]
    pub never_proxy: Vec<String>,
    /// Stay in the foreground until Ctrl-C
    #[arg(long)]
    pub foreground: bool,
    /// Where the manager is.
    #[command(flatten)]
    pub manager: ManagerArgs,
    /// Let other machines use the proxy; needs --proxy-user and a password
    #[arg(long, requires = "proxy_user")]
    pub allow_lan: bool,
    /// User name that the proxy asks for; goes with --proxy-password or --proxy-password-file
    #[arg(long, value_name = "NAME")]
    pub proxy_user: Option<String>,
    /// Password that the proxy asks for; lists of processes show the flag, and not the variable
    #[arg(
        long,
        value_name = "PASSWORD",
        env = PASSWORD_VARIABLE,
        hide_env_values = true,
        requires = "proxy_user"
    )]
    pub proxy_password: Option<Secret>,
    /// File that holds that password
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "proxy_password",
        requires = "proxy_user"
    )]
    pub proxy_password_file: Option<PathBuf>,
    /// Which cluster, and as whom.
    #[command(flatten)]
    pub selectors: Selectors,
    /// Run this with the proxy in its environment, and end the connection after it
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Connects.
///
/// # Errors
/// Why there is no connection; with a command, its exit code is then the one for "before the command started".
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let parameters = args.parameters()?;
    if !args.command.is_empty() {
        return with_command(parameters, &args.command).await;
    }
    if args.foreground {
        return foreground(parameters, *output).await;
    }
    let outcome = report::step("connecting", background::spawn(&parameters)).await?;
    match outcome {
        Outcome::Up(status) => say_connected(&status, *output),
        Outcome::Already(status) => say_already(&status, *output),
    }
}

async fn foreground(parameters: Parameters, output: Output) -> Result<ExitCode, Failure> {
    let stop = background::stop_signals()?;
    let mut running = match running::start(parameters, LogTo::Stderr, &stop).await? {
        Started::Up(running) => running,
        Started::Already(status) => return say_already(&status, output),
    };
    let said = say_connected(&running.status().await, output);
    let ended = tokio::select! {
        failure = running.ended() => Err(failure),
        () = stop.cancelled() => said,
    };
    running.end().await;
    ended
}

async fn with_command(
    mut parameters: Parameters,
    command: &[OsString],
) -> Result<ExitCode, Failure> {
    // Two commands at the same time must not share a connection that ends with the first of them.
    parameters
        .name
        .get_or_insert_with(|| format!("run-{}", std::process::id()));
    let open_files = child::open_files();
    let mut signals = Signals::watch()?;
    let mut running = up_with(parameters, &mut signals)
        .await
        .map_err(before_command)?;
    warn(&running.status().await);
    let code = match child::start(command, running.variables(), open_files) {
        Ok(child) => attend(child, &mut running, &mut signals).await,
        Err(failure) => Err(failure),
    };
    running.end().await;
    code
}

/// A connection of this process's own. A signal meanwhile gives it up.
pub(super) async fn up_with(
    parameters: Parameters,
    signals: &mut Signals,
) -> Result<Running, Failure> {
    let stop = CancellationToken::new();
    let starting = running::start(parameters, LogTo::File, &stop);
    let starting = report::step("connecting", starting);
    tokio::pin!(starting);
    let started = tokio::select! {
        started = &mut starting => started,
        _ = signals.next() => {
            stop.cancel();
            starting.await
        }
    };
    match started? {
        Started::Up(running) => Ok(running),
        Started::Already(status) => Err(taken(&status.name)),
    }
}

/// Waits for the command. A connection that ends under it is said and is not its end.
async fn attend(
    mut child: tokio::process::Child,
    running: &mut Running,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    let mut connected = true;
    loop {
        tokio::select! {
            ended = child.wait() => {
                let status = ended.or_fail(|| "cannot wait for the command".to_owned())?;
                return Ok(child::exit_code(status));
            }
            signal = signals.next() => child::forward(signal, &child),
            failure = running.ended(), if connected => {
                connected = false;
                failure.print();
            }
        }
    }
}

pub(super) fn before_command(failure: Failure) -> Failure {
    match failure.exit {
        report::FAILED => failure.exit(BEFORE_COMMAND),
        _ => failure,
    }
}

fn taken(name: &str) -> Failure {
    Failure::new(format!("there is a connection named {name} already"))
        .because("it would not end with the command")
        .hint("leave `--name` out, or give this one another name")
}

fn say_connected(status: &ConnectionStatus, output: Output) -> Result<ExitCode, Failure> {
    warn(status);
    output.print(status, || told("connected to", status))?;
    Ok(ExitCode::SUCCESS)
}

fn say_already(status: &ConnectionStatus, output: Output) -> Result<ExitCode, Failure> {
    output.print(status, || told("already connected to", status))?;
    Ok(ExitCode::SUCCESS)
}

fn told(how: &str, status: &ConnectionStatus) -> String {
    let place = match (&status.context, &status.manager) {
        (Some(context), _) => format!("namespace {} of {context}", status.namespace),
        (None, Some(manager)) => manager.name.clone(),
        (None, None) => "the manager".to_owned(),
    };
    let proxy = &status.proxy;
    escaped(&format!("{how} {place}"))
        + &format!(
            "\nproxy: {} (SOCKS5 and HTTP)\ntry:   curl -x {} http://SERVICE/\n",
            proxy.address, proxy.socks
        )
}

fn warn(status: &ConnectionStatus) {
    for warning in &status.warnings {
        report::note(&format!("warning: {warning}"));
    }
}

impl Args {
    fn parameters(&self) -> Result<Parameters, Failure> {
        let listen = self.listen.clone().unwrap_or(Listen::Default);
        let credentials = self.credentials()?;
        if listen.beyond_loopback() && !self.allow_lan {
            let failure = Failure::new("the proxy would listen beyond this machine").exit(USAGE);
            return Err(failure
                .hint("that needs `--allow-lan` with `--proxy-user` and `--proxy-password-file`"));
        }
        Ok(Parameters {
            name: self.name.clone(),
            selectors: self.selectors.clone(),
            namespace: self.namespace.clone(),
            manager_namespace: self.manager.manager_namespace.clone(),
            way: self.manager.way(),
            listen,
            all: self.all,
            also_proxy: self.also_proxy.clone(),
            never_proxy: self.never_proxy.clone(),
            allow_lan: self.allow_lan,
            credentials,
        })
    }

    fn credentials(&self) -> Result<Option<ProxyCredentials>, Failure> {
        let Some(user) = self.proxy_user.clone() else {
            return Ok(None);
        };
        let password = match (&self.proxy_password, &self.proxy_password_file) {
            (Some(password), _) => password.clone(),
            (None, Some(file)) => password_of(file)?,
            (None, None) => {
                let failure = Failure::new("`--proxy-user` needs a password").exit(USAGE);
                return Err(
                    failure.hint("give it with `--proxy-password-file`, or in TP_PROXY_PASSWORD")
                );
            }
        };
        if user.is_empty()
            || user.len() > 255
            || password.reveal().is_empty()
            || password.reveal().len() > 255
        {
            return Err(Failure::new(
                "the proxy's user and password must have 1 to 255 bytes each",
            )
            .exit(USAGE));
        }
        Ok(Some(ProxyCredentials { user, password }))
    }
}

/// The file's first line.
fn password_of(file: &std::path::Path) -> Result<Secret, Failure> {
    let cannot = || format!("cannot read the password file {}", file.display());
    let text = std::fs::read_to_string(file).or_fail(cannot)?;
    Ok(text.lines().next().unwrap_or_default().into())
}

pub(super) fn connection_name(text: &str) -> Result<String, String> {
    let expected = "expected up to 48 letters, digits, `-`, `_` and `.`, beginning with none of the last three but `_`";
    valid_name(text)
        .then(|| text.to_owned())
        .ok_or_else(|| expected.to_owned())
}

/// Checked here, so that a bad one is a usage error; kept as canonical text.
pub(super) fn rule(text: &str) -> Result<String, String> {
    text.parse::<Rule>()
        .map(|rule| rule.to_string())
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::parameters::Way;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        crate::command::parse_args(line)
    }

    #[test]
    fn the_way_follows_from_the_flags() {
        let hash = format!("sha256:{}", "0".repeat(64));
        let standalone = format!("--via h:1 --key /k --manager-key {hash}");

        assert_eq!(parse("").unwrap().manager.way(), Way::PortForward);
        assert!(matches!(
            parse("--via h:1").unwrap().manager.way(),
            Way::Direct { .. }
        ));
        assert!(matches!(
            parse(&standalone).unwrap().manager.way(),
            Way::Standalone { .. }
        ));
        assert!(
            matches!(parse("--temporary --image x").unwrap().manager.way(), Way::Temporary { image } if image == "x")
        );
    }

    #[test]
    fn flags_that_make_no_sense_are_usage_errors() {
        for line in [
            "--key /k",
            "--manager-key sha256:00",
            "--temporary --via h:1",
            "--image x",
            "--allow-lan",
            "--name a/b",
            "--also-proxy 10.0.0.0/99",
            "--via nohost",
            "--listen nowhere",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn listening_beyond_loopback_needs_consent_and_a_password() {
        let alone = parse("--listen 0.0.0.0:1080")
            .unwrap()
            .parameters()
            .unwrap_err();
        let no_password = parse("--listen 0.0.0.0:1080 --allow-lan --proxy-user u")
            .unwrap()
            .parameters();
        let full = parse("--listen 0.0.0.0:1080 --allow-lan --proxy-user u --proxy-password p")
            .unwrap()
            .parameters();

        assert_eq!(alone.exit, USAGE);
        assert_eq!(no_password.unwrap_err().exit, USAGE);
        assert!(full.unwrap().credentials.is_some());
    }

    #[test]
    fn rules_are_separated_by_commas_and_made_canonical() {
        let args = parse("--never-proxy 10.1.2.3/8,*.LAN. --never-proxy db").unwrap();

        assert_eq!(args.never_proxy, ["10.0.0.0/8", "*.lan", "db"]);
    }
}
