//! Another program run with the proxy's variables, so that it makes no difference to its caller that we are between.
//!
//! Its exit code is passed on as a shell would, and so are signals: those that a terminal sends to everybody in the
//! foreground are not sent a second time.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::huge_pages;
use crate::report::{Failure, OrFail};

/// A program that was not found, and one that cannot be executed.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// Signals that are meant for the program.
const FORWARDED: [Signal; 6] = [
    Signal::INT,
    Signal::TERM,
    Signal::HUP,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
];

/// Signals under way that nobody has taken yet; more are dropped, as the kernel does with pending ones.
const PENDING: usize = 16;

/// The signals that this process received. Watched from the moment it is made.
pub(super) struct Signals(mpsc::Receiver<Signal>);

impl Signals {
    /// Watches every signal that will be forwarded; none of them ends this process any more.
    ///
    /// # Errors
    /// The process cannot watch signals.
    pub(super) fn watch() -> Result<Self, Failure> {
        let (signal_tx, signal_rx) = mpsc::channel(PENDING);
        for forwarded in FORWARDED {
            let watched = signal(SignalKind::from_raw(forwarded.as_raw()));
            let mut watched = watched.or_fail(|| "cannot watch signals".to_owned())?;
            let signal_tx = signal_tx.clone();
            // Lives as long as the process; it owns nothing and cannot fail.
            tokio::spawn(async move {
                while watched.recv().await.is_some() {
                    let _ = signal_tx.try_send(forwarded);
                }
            });
        }
        Ok(Self(signal_rx))
    }

    /// The next one. Cancel safe.
    pub(super) async fn next(&mut self) -> Signal {
        match self.0.recv().await {
            Some(signal) => signal,
            None => std::future::pending().await,
        }
    }
}

/// A limit that a program is to have although ours is another.
pub(super) fn open_files() -> Rlimit {
    getrlimit(Resource::Nofile)
}

/// Starts `command` with these variables and this limit of open files.
///
/// # Errors
/// It cannot be started; the exit code is a shell's.
pub(super) fn start(
    command: &[OsString],
    variables: &[(String, String)],
    open_files: Rlimit,
) -> Result<Child, Failure> {
    let (program, arguments) = command.split_first().expect("clap demands a program");
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(variables.iter().map(|(name, value)| (name, value)));
    let child = huge_pages::allowed(|| command.spawn());
    let child = child.map_err(|error| not_started(program, &error))?;
    if let Some(pid) = pid(&child) {
        let _ = prlimit(Some(pid), Resource::Nofile, open_files);
    }
    Ok(child)
}

/// How a program that cannot be started is reported.
pub(super) fn not_started(program: &OsString, error: &io::Error) -> Failure {
    let code = if error.kind() == io::ErrorKind::NotFound {
        NOT_FOUND
    } else {
        NOT_EXECUTABLE
    };
    Failure::new(format!("cannot run {}", program.display()))
        .caused_by(error)
        .exit(code)
}

/// Passes a signal on to a program, unless the terminal has sent it one already.
pub(super) fn forward(signal: Signal, child: &Child) {
    if let (false, Some(pid)) = (heard_already(signal), pid(child)) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether the terminal has sent this signal to the program too.
pub(super) fn heard_already(signal: Signal) -> bool {
    matches!(signal, Signal::INT | Signal::QUIT) && in_foreground()
}

/// Says that programs were left running and had to be ended.
pub(super) fn note_left(left: usize) {
    if left > 0 {
        let what = crate::report::counted(left as u64, "program");
        crate::report::note(&format!("ended what was left running: {what}"));
    }
}

/// The program's exit code, or 128 and the number of the signal that ended it.
pub(super) fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    ExitCode::from(
        code.and_then(|code| u8::try_from(code).ok())
            .unwrap_or(crate::report::FAILED),
    )
}

/// Whether the program ran and has nothing to complain of.
pub(super) fn ended_well(code: &Result<ExitCode, Failure>) -> bool {
    matches!(code, Ok(code) if *code == ExitCode::SUCCESS)
}

fn pid(child: &Child) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child.id()?).ok()?)
}

/// Whether this process is in its terminal's foreground group, which Ctrl-C reaches as a whole.
fn in_foreground() -> bool {
    let terminal = std::fs::File::open("/dev/tty");
    let group = terminal
        .ok()
        .and_then(|terminal| rustix::termios::tcgetpgrp(&terminal).ok());
    group == Some(rustix::process::getpgrp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start_sh(script: &str, variables: &[(String, String)]) -> Child {
        let command = ["sh", "-c", script].map(OsString::from);
        start(&command, variables, open_files()).unwrap()
    }

    #[tokio::test]
    async fn exit_codes_pass_through_as_from_a_shell() {
        let plain = start_sh("exit 42", &[]).wait().await.unwrap();
        let killed = start_sh("kill -TERM $$", &[]).wait().await.unwrap();

        assert_eq!(exit_code(plain), ExitCode::from(42));
        assert_eq!(exit_code(killed), ExitCode::from(128 + 15));
    }

    #[tokio::test]
    async fn a_program_that_cannot_be_run_is_126_or_127() {
        let missing = start(&["/nonexistent/x".into()], &[], open_files()).unwrap_err();
        let folder = start(&["/tmp".into()], &[], open_files()).unwrap_err();

        assert_eq!(missing.exit, 127);
        assert_eq!(folder.exit, 126);
    }

    #[tokio::test]
    async fn variables_and_signals_reach_the_program() {
        let variables = [("TP_TEST_READY".to_owned(), "yes".to_owned())];
        let mut child = start_sh(
            "[ \"$TP_TEST_READY\" = yes ] || exit 9; trap 'exit 7' USR1; while :; do sleep 0.02; done",
            &variables,
        );
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;

        forward(Signal::USR1, &child);

        assert_eq!(exit_code(child.wait().await.unwrap()), ExitCode::from(7));
    }
}
