//! `tp-manager`: chooses the mode, starts it, turns signals into a shutdown and errors into exit codes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::error::ErrorKind;
use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};
use tp_manager::{in_cluster, sidecar, standalone, temporary};
use tp_tunnel::KeyHash;
use tracing_subscriber::EnvFilter;

/// glibc's allocator halves the tunnel's throughput with many streams.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The manager: admits sessions, dials and resolves for them.
///
/// Without a flag it runs in a cluster, as the pod that POD_NAME, POD_NAMESPACE and POD_IP name.
#[derive(Parser, Debug)]
#[command(name = "tp-manager", version)]
struct Arguments {
    /// Serve a network without Kubernetes.
    #[arg(long, conflicts_with = "temporary", requires_all = ["listen", "key", "authorized_keys"])]
    standalone: bool,

    /// Address and port of the tunnel.
    #[arg(long, value_name = "ADDR", requires = "standalone")]
    listen: Option<SocketAddr>,

    /// PEM file with this manager's private key; made when it is missing.
    #[arg(long, value_name = "FILE", requires = "standalone")]
    key: Option<PathBuf>,

    /// File with one key hash (sha256:…) a line; read again when it changes.
    #[arg(long, value_name = "FILE", requires = "standalone")]
    authorized_keys: Option<PathBuf>,

    /// Names under SUFFIX are reachable.
    #[arg(long, value_name = "SUFFIX", requires = "standalone")]
    suffix: Vec<String>,

    /// Addresses in CIDR are reachable.
    #[arg(long, value_name = "CIDR", requires = "standalone")]
    range: Vec<IpNet>,

    /// Everything else is reachable too.
    #[arg(long, requires = "standalone")]
    egress: bool,

    /// Serve one session in one namespace without any right in the cluster, then exit.
    #[arg(long, requires_all = ["namespace", "client_key"])]
    temporary: bool,

    /// Namespace the session is limited to.
    #[arg(long, value_name = "NS", requires = "temporary")]
    namespace: Option<String>,

    /// The one key that is admitted.
    #[arg(long, value_name = "HASH", requires = "temporary")]
    client_key: Option<KeyHash>,

    /// Add agents to pods that ask for it, as the API server's webhook, in a pod without any right.
    #[arg(long, conflicts_with_all = ["standalone", "temporary"])]
    webhook: bool,

    /// Exit after so long without a connection.
    #[arg(long, value_name = "DURATION", requires = "temporary", default_value = "60s", value_parser = seconds)]
    lease: Duration,
}

enum Mode {
    InCluster(in_cluster::Options),
    Webhook(sidecar::Options),
    Standalone(standalone::Options),
    Temporary(temporary::Options),
}

impl Arguments {
    fn mode(self) -> Result<Mode, String> {
        if self.webhook {
            let variable = |name: &str| std::env::var(name).ok();
            return sidecar::Options::from_env(variable).map(Mode::Webhook);
        }
        match (self.standalone, self.temporary) {
            (true, _) => self.standalone_mode().map(Mode::Standalone),
            (_, true) => Ok(Mode::Temporary(temporary::Options {
                namespace: self.namespace.expect("required by --temporary"),
                client_key: self.client_key.expect("required by --temporary"),
                lease: self.lease,
            })),
            (false, false) => {
                in_cluster::Options::from_env(|name| std::env::var(name).ok()).map(Mode::InCluster)
            }
        }
    }

    fn standalone_mode(self) -> Result<standalone::Options, String> {
        if self.suffix.is_empty() && self.range.is_empty() && !self.egress {
            return Err(
                "nothing would be reachable: give --suffix, --range or --egress".to_owned(),
            );
        }
        Ok(standalone::Options {
            listen: self.listen.expect("required by --standalone"),
            key: self.key.expect("required by --standalone"),
            authorized_keys: self.authorized_keys.expect("required by --standalone"),
            suffixes: self.suffix,
            ranges: self.range,
            egress: self.egress,
        })
    }
}

/// `60`, `60s` or `5m`.
fn seconds(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    match number.parse::<u32>() {
        Ok(number) if number > 0 => Ok(Duration::from_secs(u64::from(number) * unit)),
        Ok(_) | Err(_) => Err("a number of seconds (60s) or minutes (5m) is needed".to_owned()),
    }
}

/// Exit code for a wrong command line; anything else that goes wrong is 1.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let mode = match Arguments::try_parse() {
        Ok(arguments) => arguments.mode(),
        Err(error) => {
            let help = matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            );
            let _ = error.print();
            return if help {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(USAGE)
            };
        }
    };
    let mode = match mode {
        Ok(mode) => mode,
        Err(problem) => {
            eprintln!("error: {problem}");
            return ExitCode::from(USAGE);
        }
    };
    start_logging();
    tp_manager::refuse_huge_pages();
    tp_manager::raise_descriptor_limit();
    match runtime().block_on(run(mode)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(mode: Mode) -> anyhow::Result<()> {
    let shutdown = terminated()?;
    match mode {
        Mode::InCluster(options) => in_cluster::run(options, shutdown).await,
        Mode::Webhook(options) => sidecar::run(options, shutdown).await,
        Mode::Standalone(options) => standalone::run(options, shutdown).await,
        Mode::Temporary(options) => temporary::run(options, shutdown).await,
    }
}

/// Resolves at SIGTERM or SIGINT. A second one ends the process at once.
fn terminated() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM, draining"),
            _ = interrupt.recv() => tracing::info!("SIGINT, draining"),
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            std::process::exit(130);
        });
    })
}

fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}

/// Two workers at most: a manager moves bytes, and each worker's stack and allocator heap would count when idle.
fn runtime() -> tokio::runtime::Runtime {
    let workers = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(2));
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .event_interval(tp_tunnel::carrier::EVENT_INTERVAL)
        .enable_all()
        .build()
        .expect("threads and an epoll instance can be made at start")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_mode_needs_all_of_its_flags() {
        for line in [
            "tp-manager --standalone",
            "tp-manager --standalone --listen 127.0.0.1:1 --key k",
            "tp-manager --temporary --namespace x",
            "tp-manager --egress",
            "tp-manager --standalone --temporary",
            "tp-manager --webhook --temporary",
            "tp-manager --temporary --namespace x --client-key sha256:00",
        ] {
            assert!(
                Arguments::try_parse_from(line.split(' ')).is_err(),
                "{line}"
            );
        }
        let line = "tp-manager --standalone --listen 127.0.0.1:1 --key k --authorized-keys a";
        assert!(
            Arguments::try_parse_from(line.split(' '))
                .unwrap()
                .mode()
                .is_err(),
            "nothing reachable"
        );
    }

    #[test]
    fn a_lease_is_seconds_or_minutes() {
        assert_eq!(seconds("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(seconds("5m"), Ok(Duration::from_secs(300)));
        for bad in ["", "0", "s", "-1s", "1h"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
