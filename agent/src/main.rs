//! `tp-agent`: beside a workload, in its pod.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::net::{TcpListener, UnixStream};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tp_agent::heartbeat::{Heard, Parent, Word};
use tp_agent::parent::{self, Sockets};
use tp_agent::redirect::Redirect;
use tp_agent::worker::{self, Destination, Inbound, Listeners, Worker};
use tp_agent::{handover, heartbeat};
use tp_manager_api::AGENT_RETIRE;
use tp_manager_api::route_table::LEASE;
use tp_tunnel::{Identity, KeyHash};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Routes a workload's requests to the workstations whose they are, and all others to the application.
///
/// Started by the manager, not by people. `TP_AGENT_SEED` holds 64 hexadecimal digits; the manager knows the key that
/// they make. `tp-agent retire`, run in an agent's container, ends that agent.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where the manager connects.
    #[arg(long, value_name = "IP:PORT", default_value = "[::]:15008")]
    control: SocketAddr,

    /// Hash of the only key that may push routes.
    #[arg(long, value_name = "sha256:…")]
    manager_key: KeyHash,

    /// Where the kernel sends connections that it redirects.
    #[arg(long, value_name = "IP:PORT", conflicts_with = "listen")]
    redirected: Option<SocketAddr>,

    /// Listen here in place of an application; one that is only a port is in the same pod. Repeatable.
    #[arg(long, value_name = "IP:PORT=[APP_IP:]PORT", value_parser = in_place_of, required_unless_present = "redirected")]
    listen: Vec<(SocketAddr, Destination)>,

    /// How long pushed routes hold.
    #[arg(long, value_name = "SECONDS", default_value_t = LEASE.as_secs())]
    lease: u64,

    /// Be the worker; the parent adds it.
    #[arg(long, hide = true)]
    worker: bool,

    /// End this process; how the parent ends a worker, which is another user's.
    #[arg(long, hide = true, value_name = "PID")]
    end: Option<i32>,
}

fn in_place_of(text: &str) -> Result<(SocketAddr, Destination), String> {
    let (own, app) = text
        .split_once('=')
        .ok_or("two addresses with a `=` between")?;
    let address = |text: &str| text.parse().map_err(|error| format!("{text}: {error}"));
    let app = match app.parse() {
        Ok(port) => Destination::Beside(port),
        Err(_) => Destination::App(address(app)?),
    };
    Ok((address(own)?, app))
}

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == AGENT_RETIRE)
    {
        return retire();
    }
    if let Err(error) = without_huge_pages() {
        eprintln!("tp-agent takes more memory than it needs: {error}");
    }
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("TP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends the agent of this container, which may well take this process with it.
fn retire() -> ExitCode {
    match tp_agent::retire::retire() {
        Ok(1..) => ExitCode::SUCCESS,
        Ok(0) => {
            eprintln!("no agent runs here");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("the agent cannot be ended: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A huge page for the first bytes of each thread would be most of the memory that this program has. The allocator has
/// begun before anything else, so the program begins anew, once.
fn without_huge_pages() -> std::io::Result<()> {
    use rustix::thread::{disable_transparent_huge_pages, transparent_huge_pages_are_disabled};
    if transparent_huge_pages_are_disabled()? {
        return Ok(());
    }
    disable_transparent_huge_pages(true)?;
    let mut again = std::process::Command::new(std::env::current_exe()?);
    Err(again.args(std::env::args_os().skip(1)).exec())
}

fn run(arguments: Arguments) -> Result<()> {
    if let Some(process) = arguments.end {
        return end(process);
    }
    match arguments.redirected {
        Some(redirected) if !arguments.worker => supervise(redirected, arguments.control),
        Some(_) | None => serve(arguments),
    }
}

/// The parent: the rule, and a worker with the same arguments.
fn supervise(redirected: SocketAddr, control: SocketAddr) -> Result<()> {
    // Whatever it starts stays without privileges.
    rustix::thread::set_no_new_privs(true).context("cannot give up new privileges")?;
    let program = std::env::current_exe().context("where is this program?")?;
    let worker = || {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).arg("--worker");
        command
    };
    let end = |process: u32| {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1));
        command.arg("--end").arg(process.to_string());
        command
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?
        .block_on(async {
            let mut terminate = signal(SignalKind::terminate()).context("no signal handler")?;
            let terminated = async move {
                terminate.recv().await;
            };
            let sockets = Sockets {
                redirected: bind_once_free(redirected).await?.into_std()?,
                control: bind_once_free(control).await?.into_std()?,
            };
            let redirect = Redirect::install(redirected.port()).context(
                "cannot install the redirecting rule, which needs NET_ADMIN and nf_tables",
            )?;
            parent::run(redirect, sockets, worker, end, terminated)
                .await
                .context("the packet filter or the worker failed")
        })
}

fn end(process: i32) -> Result<()> {
    let process = rustix::process::Pid::from_raw(process).context("no process")?;
    rustix::process::kill_process(process, rustix::process::Signal::KILL).context("cannot end it")
}

fn serve(arguments: Arguments) -> Result<()> {
    if arguments.worker {
        // The packet filter follows the parent; without it the worker serves nobody.
        let signal = Some(rustix::process::Signal::KILL);
        rustix::process::set_parent_process_death_signal(signal).context("no death signal")?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .event_interval(tp_tunnel::carrier::EVENT_INTERVAL)
        .enable_all()
        .build()
        .context("no runtime")?;
    runtime.block_on(work(arguments))
}

async fn work(arguments: Arguments) -> Result<()> {
    let identity = identity()?;
    let (listeners, pipe) = match arguments.worker {
        true => {
            let (listeners, pipe) = inherited().context("the parent gave nothing to do")?;
            (listeners, Some(pipe))
        }
        false => (bound(arguments.control, arguments.listen).await?, None),
    };
    for listener in &listeners.inbound {
        tracing::info!(address = ?listener.socket.local_addr().ok(), "inbound");
    }
    tracing::info!(address = ?listeners.control.local_addr().ok(), key = %identity.key_hash(), "control");
    let mut terminate = signal(SignalKind::terminate()).context("no signal handler")?;
    let supervised = arguments.worker;
    let (heard_tx, heard) = watch::channel(Heard::default());
    let stopped = async move {
        let parent = async {
            match pipe {
                Some(pipe) => heartbeat::hear(pipe, heard_tx).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = terminate.recv() => {}
            () = parent => {}
        }
    };
    let worker = Worker {
        listeners,
        identity,
        manager: arguments.manager_key,
        lease: Duration::from_secs(arguments.lease),
        parent: supervised.then(|| Parent::new(heard)),
    };
    let mut say = heartbeat::say_to(std::io::stdout());
    let say = |word: &Word| match supervised {
        true => say(word),
        false => Ok(()),
    };
    let served = worker::serve(worker, say, stopped);
    served.await.context("the parent is gone")
}

/// The parent's sockets, and the pipe from it.
fn inherited() -> std::io::Result<(Listeners, UnixStream)> {
    let pipe = std::io::stdin().as_fd().try_clone_to_owned()?;
    let sockets = handover::take(&pipe)?;
    let pipe = std::os::unix::net::UnixStream::from(pipe);
    pipe.set_nonblocking(true)?;
    let redirected = Inbound {
        socket: TcpListener::from_std(sockets.redirected)?,
        destination: Destination::Redirected,
    };
    let listeners = Listeners {
        inbound: vec![redirected],
        control: TcpListener::from_std(sockets.control)?,
    };
    Ok((listeners, UnixStream::from_std(pipe)?))
}

/// Sockets of our own, where nobody redirects.
async fn bound(control: SocketAddr, listen: Vec<(SocketAddr, Destination)>) -> Result<Listeners> {
    let mut inbound = Vec::new();
    for (own, destination) in listen {
        let socket = bind(own).await?;
        inbound.push(Inbound {
            socket,
            destination,
        });
    }
    let control = bind(control).await?;
    Ok(Listeners { inbound, control })
}

/// An agent whose place this one takes keeps its ports for about a second (`worker.rs`).
async fn bind_once_free(address: SocketAddr) -> Result<TcpListener> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    loop {
        let bound = bind(address).await;
        let taken = |error: &anyhow::Error| {
            let error = error.downcast_ref::<std::io::Error>();
            error.is_some_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
        };
        if !bound.as_ref().is_err_and(taken) || tokio::time::Instant::now() > deadline {
            return bound;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// All addresses of IPv6 stand for those of IPv4 too, and for them alone where there is no IPv6.
async fn bind(address: SocketAddr) -> Result<TcpListener> {
    let bound = match TcpListener::bind(address).await {
        Err(error)
            if address.ip() == Ipv6Addr::UNSPECIFIED
                && error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error()) =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    bound.with_context(|| format!("cannot listen on {address}"))
}

fn identity() -> Result<Identity> {
    let seed = std::env::var("TP_AGENT_SEED").context("TP_AGENT_SEED is not set")?;
    Identity::from_seed(&seed).context("TP_AGENT_SEED is no seed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_is_an_address_or_a_port_of_the_same_pod() {
        let parsed = |text: &str| {
            let (own, app) = in_place_of(text).ok()?;
            Some((own.port(), format!("{app:?}")))
        };

        let beside = ("[::]:15100=8080", "Beside(8080)");
        let elsewhere = ("[::]:15100=10.0.0.7:8080", "App(10.0.0.7:8080)");
        for (text, app) in [beside, elsewhere] {
            assert_eq!(parsed(text), Some((15100, app.to_owned())));
        }
        for bad in [
            "[::]:15100",
            "15100=8080",
            "[::]:15100=",
            "[::]:15100=70000",
        ] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }
}
