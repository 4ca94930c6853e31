//! The process that may change the packet filter. It reads nothing from the network: the worker says which ports want
//! traffic, twice a second, and as long as it does the rule is refreshed.
//!
//! The worker runs as another user without capabilities, and the parent cannot signal it (that would be one capability
//! more): closing its standard input asks it to stop, and a worker that does not answer is ended by a process of its own
//! user.

use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdout, Command};

use crate::bypass;
use crate::handover;
use crate::heartbeat::{Ports, Word, next};
use crate::redirect::Redirect;

/// User and group of the worker; no account of any image.
pub const WORKER: u32 = 65532;

/// A worker that has said nothing for so long has failed.
const SILENCE: Duration = Duration::from_secs(2);

/// A worker that ends so often within [`CRASH_WINDOW`] is not started again.
const CRASHES_MAX: usize = 5;

const CRASH_WINDOW: Duration = Duration::from_secs(60);

/// Before a worker is started again.
const REST: Duration = Duration::from_millis(200);

/// How long a worker may take to stop, its drain included.
const STOP: Duration = Duration::from_secs(25);

/// What every worker listens on.
#[derive(Debug)]
pub struct Sockets {
    /// Where the kernel sends connections that it redirects.
    pub redirected: TcpListener,
    /// Where the manager connects.
    pub control: TcpListener,
}

/// Keeps a worker running and the rule true, until `shutdown`, or until another agent takes over. `worker` makes the command
/// line of one.
pub async fn run(
    mut redirect: Redirect,
    sockets: Sockets,
    worker: impl Fn() -> Command,
    end: impl Fn(u32) -> Command,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    tokio::pin!(shutdown);
    let mut crashes = Crashes::default();
    loop {
        let (mut child, mut input) = start_worker(worker(), &sockets)?;
        let mut lines = child.stdout.take().map(BufReader::new);
        let ended = tokio::select! {
            () = &mut shutdown => Ended::Stopped,
            ended = follow(&mut child, &mut input, lines.as_mut(), &mut redirect) => ended,
        };
        // First of all, new connections go to the application.
        redirect.refresh(&Ports::default())?;
        match ended {
            Ended::Stopped => {
                // The last word about what is still accepted is the worker's.
                drop(sockets);
                stop(&mut child, input, &end).await;
                return redirect.remove();
            }
            Ended::Yielded => {
                tracing::info!("another agent takes over");
                drop(sockets);
                stop(&mut child, input, &end).await;
                // The table is the other one's by now.
                return Ok(());
            }
            Ended::Failed(why) => {
                tracing::error!("worker failed: {why}");
                end_now(&mut child, &end).await;
            }
        }
        if crashes.one_more(Instant::now()) {
            tracing::error!("the worker fails again and again; nothing is redirected any more");
            drop(sockets);
            shutdown.await;
            return redirect.remove();
        }
        tokio::select! {
            () = &mut shutdown => return redirect.remove(),
            () = tokio::time::sleep(REST) => {}
        }
    }
}

/// How the time of a worker ended.
enum Ended {
    /// We are to end.
    Stopped,
    /// It said that another agent takes over.
    Yielded,
    /// It is of no use any more, and why.
    Failed(String),
}

/// A worker, and the pipe that asks it to stop when it is closed.
fn start_worker(mut command: Command, sockets: &Sockets) -> io::Result<(Child, UnixStream)> {
    let (ours, workers) = net::UnixStream::pair()?;
    handover::give(&ours, sockets)?;
    ours.set_nonblocking(true)?;
    command.stdin(OwnedFd::from(workers)).stdout(Stdio::piped());
    Ok((start(command)?, UnixStream::from_std(ours)?))
}

/// As the worker's user.
fn start(mut command: Command) -> io::Result<Child> {
    if rustix::process::geteuid().is_root() {
        command.uid(WORKER).gid(WORKER);
    }
    command.kill_on_drop(true).spawn()
}

/// Refreshes the rule with what the worker says, and answers that it has. Returns when it says nothing more, and why.
async fn follow(
    child: &mut Child,
    input: &mut UnixStream,
    lines: Option<&mut BufReader<ChildStdout>>,
    redirect: &mut Redirect,
) -> Ended {
    let Some(lines) = lines else {
        return Ended::Failed("it has no voice".to_owned());
    };
    // Nothing is redirected before the first word.
    let mut redirected = Ports::default();
    loop {
        let word = tokio::select! {
            ended = child.wait() => return Ended::Failed(ended_by(ended)),
            word = tokio::time::timeout(SILENCE, next(lines)) => word,
        };
        let answer = match word {
            Err(_) => return Ended::Failed(format!("it was silent for {SILENCE:?}")),
            Ok(Err(error)) => return Ended::Failed(error.to_string()),
            Ok(Ok(Word::Yield)) => return Ended::Yielded,
            Ok(Ok(Word::Live(ports))) => {
                let idle = ports.is_empty() && redirected.is_empty();
                let refreshed = if idle {
                    Ok(())
                } else {
                    redirect.refresh(&ports)
                };
                if let Err(error) = refreshed {
                    return Ended::Failed(format!("the packet filter refused: {error}"));
                }
                redirected.clone_from(&ports);
                Word::Live(ports)
            }
            Ok(Ok(Word::Close(mut ports))) => {
                // Others are none of a worker's business.
                ports.retain(|port| redirected.tcp.contains(port));
                if let Err(error) = bypass::close_idle(&ports) {
                    tracing::warn!(%error, "cannot close idle connections");
                }
                Word::Close(ports)
            }
        };
        let answer = answer.to_string();
        let told = input.write_all(answer.as_bytes());
        match tokio::time::timeout(SILENCE, told).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return Ended::Failed("it does not listen".to_owned()),
        }
    }
}

fn ended_by(ended: io::Result<ExitStatus>) -> String {
    ended.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// Asks the worker to stop, and ends it when it does not.
async fn stop(child: &mut Child, input: UnixStream, end: &impl Fn(u32) -> Command) {
    drop(input);
    if tokio::time::timeout(STOP, child.wait()).await.is_err() {
        end_now(child, end).await;
    }
}

async fn end_now(child: &mut Child, end: &impl Fn(u32) -> Command) {
    let Some(id) = child.id() else {
        return;
    };
    // Allowed where the worker is our own user; else a process of its user does it.
    if child.start_kill().is_err() {
        let ended = start(end(id)).map(|mut helper| async move { helper.wait().await });
        match ended {
            Ok(waiting) => drop(waiting.await),
            Err(error) => tracing::error!(%error, "cannot end the worker"),
        }
    }
    if tokio::time::timeout(SILENCE, child.wait()).await.is_err() {
        tracing::error!("the worker does not end");
    }
}

/// The last ends of workers.
#[derive(Default)]
struct Crashes(VecDeque<Instant>);

impl Crashes {
    /// Whether that was one too many.
    fn one_more(&mut self, now: Instant) -> bool {
        self.0.push_back(now);
        self.0
            .retain(|then| now.duration_since(*then) < CRASH_WINDOW);
        self.0.len() >= CRASHES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_crashes_in_a_minute_are_too_many_and_slow_ones_are_not() {
        let start = Instant::now();
        let mut fast = Crashes::default();
        assert!((0..4).all(|_| !fast.one_more(start)));
        assert!(fast.one_more(start));
        let mut slow = Crashes::default();
        assert!((0..50).all(|n| !slow.one_more(start + Duration::from_secs(16 * n))));
    }
}
