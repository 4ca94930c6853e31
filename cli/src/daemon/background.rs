//! A connection in a process of its own, and the talk between it and the command that started it.
//!
//! The command hands the parameters over on a socket that is the daemon's stdout, and waits on it for one message: up,
//! up already, or why not. Until then the daemon shares stdin and stderr with the command, so that a credential plugin
//! can ask its question; then it lets go of both. A command that dies before ends its daemon too.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::control::{read_line, write_line};
use super::parameters::Parameters;
use super::running::{self, LogTo, Running, Started};
use super::status::ConnectionStatus;
use crate::report::{Failure, OrFail};

/// Name of the hidden command that is a daemon.
pub const COMMAND: &str = "daemon";

/// Where `tp connect` may find the proxy's password.
pub const PASSWORD_VARIABLE: &str = "TP_PROXY_PASSWORD";

/// What the daemon tells the command.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "value", rename_all = "snake_case")]
enum Message {
    Up(Box<ConnectionStatus>),
    Already(Box<ConnectionStatus>),
    Failed(Failure),
}

/// What came of it, for the command.
#[derive(Debug)]
pub enum Outcome {
    /// A daemon keeps it up now.
    Up(Box<ConnectionStatus>),
    /// A daemon kept it up before.
    Already(Box<ConnectionStatus>),
}

/// Starts a daemon and waits until its connection is up.
///
/// # Errors
/// The daemon's own failure, as if it were this process's.
pub async fn spawn(parameters: &Parameters) -> Result<Outcome, Failure> {
    let cannot = || "cannot start the daemon".to_owned();
    let (ours, theirs) = StdUnixStream::pair().or_fail(cannot)?;
    start_process(theirs).or_fail(cannot)?;
    ours.set_nonblocking(true).or_fail(cannot)?;
    let mut socket = BufReader::new(UnixStream::from_std(ours).or_fail(cannot)?);
    write_line(&mut socket, parameters).await.or_fail(cannot)?;
    match read_line(&mut socket).await {
        Ok(Message::Up(status)) => Ok(Outcome::Up(status)),
        Ok(Message::Already(status)) => Ok(Outcome::Already(status)),
        Ok(Message::Failed(failure)) => Err(failure),
        Err(error) => {
            Err(Failure::new("the daemon ended before it was connected").caused_by(&error))
        }
    }
}

fn start_process(theirs: StdUnixStream) -> io::Result<()> {
    let mut command = Command::new(own_program()?);
    command.arg0("tp").arg(COMMAND);
    // It is among the parameters; a daemon's environment can be read for as long as it lives, and plugins inherit it.
    command.env_remove(PASSWORD_VARIABLE);
    command
        .stdin(Stdio::inherit())
        .stderr(Stdio::inherit())
        .stdout(OwnedFd::from(theirs));
    // Never waited for: it outlives this process, and init reaps it.
    command.spawn().map(drop)
}

/// On Linux the running file itself, also when an upgrade has replaced it on disk.
fn own_program() -> io::Result<std::path::PathBuf> {
    if cfg!(target_os = "linux") {
        return Ok("/proc/self/exe".into());
    }
    std::env::current_exe()
}

/// The daemon's whole life.
///
/// # Errors
/// Only when nobody is there to be told; otherwise the command is told and this succeeds.
pub async fn run() -> Result<(), Failure> {
    let cannot = || format!("`tp {COMMAND}` is started by `tp connect`, not by hand");
    // Fails where this process leads its group, as when a shell started it: harmless then.
    let _ = rustix::process::setsid();
    let socket = io::stdout();
    let socket = std::os::fd::AsFd::as_fd(&socket)
        .try_clone_to_owned()
        .or_fail(cannot)?;
    let socket = StdUnixStream::from(socket);
    socket.set_nonblocking(true).or_fail(cannot)?;
    let mut command = BufReader::new(UnixStream::from_std(socket).or_fail(cannot)?);
    let parameters: Parameters = read_line(&mut command).await.or_fail(cannot)?;

    let stop = stop_signals()?;
    let started = {
        let starting = running::start(parameters, LogTo::File, &stop);
        let abandoned = abandoned(&mut command);
        tokio::pin!(starting, abandoned);
        tokio::select! {
            started = &mut starting => started,
            () = &mut abandoned => {
                stop.cancel();
                starting.await
            }
        }
    };
    let (message, running) = match started {
        Ok(Started::Up(running)) => (Message::Up(Box::new(running.status().await)), Some(running)),
        Ok(Started::Already(status)) => (Message::Already(status), None),
        Err(failure) => (Message::Failed(failure), None),
    };
    let told = write_line(&mut command, &message).await;
    drop(command);
    let Some(running) = running else {
        return Ok(());
    };
    if told.is_err() {
        stop.cancel();
    }
    let_go();
    std::panic::set_hook(Box::new(
        |panic| tracing::error!(%panic, "a task broke down"),
    ));
    live(running, stop).await;
    Ok(())
}

async fn live(mut running: Running, stop: CancellationToken) {
    tokio::select! {
        failure = running.ended() => {
            tracing::error!(error = failure.one_line(), "the connection is over");
            running.leave_word(&failure);
        }
        () = stop.cancelled() => tracing::info!("asked to end"),
    }
    running.end().await;
}

/// Returns when the command has gone. It says nothing after its first line.
async fn abandoned(command: &mut BufReader<UnixStream>) {
    let mut byte = [0];
    while !matches!(command.read(&mut byte).await, Ok(0) | Err(_)) {}
}

/// A token that SIGTERM, SIGINT and SIGHUP cancel.
///
/// # Errors
/// The process cannot watch signals.
pub fn stop_signals() -> Result<CancellationToken, Failure> {
    let stop = CancellationToken::new();
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ] {
        let mut signals = signal(kind).or_fail(|| "cannot watch signals".to_owned())?;
        let stop = stop.clone();
        // Lives as long as the process; it owns nothing and cannot fail.
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                stop.cancel();
            }
        });
    }
    Ok(stop)
}

/// Lets go of the command's terminal and pipes.
fn let_go() {
    let Ok(null) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
    else {
        return;
    };
    let _ = rustix::stdio::dup2_stdin(&null);
    let _ = rustix::stdio::dup2_stdout(&null);
    let _ = rustix::stdio::dup2_stderr(&null);
}
