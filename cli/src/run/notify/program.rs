//! One program whose calls a keeper answers, as the command that started it sees it.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Rlimit, Signal};
use tokio::process::{Child, Command};

use super::channel::Channel;
use super::keeper;
use super::messages::{FromKeeper, Order, Outcome, ToKeeper};
use crate::run::namespace::NotRun;
use crate::run::passing;
use crate::run::plan::Refused;

/// How long the keeper may take to be ready. It takes some 10 ms where nothing is wrong.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// How long it may take to end what is left.
const CLEARED_WITHIN: Duration = Duration::from_secs(3);

/// A keeper, with or without a program yet. Dropping it ends both.
#[derive(Debug)]
pub struct Starting {
    child: Child,
    control: OwnedFd,
}

/// A keeper that is ready.
pub struct Kept {
    child: Child,
    control: Channel,
}

impl Starting {
    /// Starts a keeper for `program`, which is to have these variables and this limit of open files.
    ///
    /// # Errors
    /// No process can be started.
    pub fn start(
        program: &[OsString],
        variables: &[(String, String)],
        open_files: Rlimit,
    ) -> io::Result<Self> {
        let (control, theirs) = passing::pair()?;
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?;
        let child = Command::new("/proc/self/exe")
            .arg0("tp")
            .arg(keeper::COMMAND)
            .arg(theirs.as_raw_fd().to_string())
            .args(program)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .spawn()?;
        drop(theirs);
        set_socket_timeout(&control, Timeout::Recv, Some(READY_WITHIN))?;
        let order = Order {
            open_files: (open_files.current, open_files.maximum),
        };
        passing::send(&control, &order, &[])?;
        Ok(Self { child, control })
    }

    /// Waits until it is ready, and gives what the opener needs. Blocks for some milliseconds.
    ///
    /// # Errors
    /// Why this cannot be done here.
    pub fn ready(self) -> Result<(Kept, Vec<OwnedFd>), Refused> {
        let broken = |why: String| Refused {
            step: "waiting for the keeper".to_owned(),
            why,
            by_policy: false,
        };
        match passing::receive(&self.control) {
            Ok(Some((Outcome::Ready, descriptors))) => {
                let control =
                    Channel::new(self.control).map_err(|error| broken(error.to_string()))?;
                let child = self.child;
                Ok((Kept { child, control }, descriptors))
            }
            Ok(Some((Outcome::Refused(refused), _))) => Err(refused),
            Ok(None) => Err(broken("it ended".to_owned())),
            Err(error) => Err(broken(error.to_string())),
        }
    }
}

impl Kept {
    /// Lets the program run. Returns when it has started.
    ///
    /// # Errors
    /// It cannot be started.
    pub async fn go(&mut self) -> Result<(), NotRun> {
        let sent = self.control.send(&ToKeeper::Go, &[]).await;
        sent.map_err(NotRun::Other)?;
        match self.control.receive().await {
            Ok(Some((FromKeeper::Started, _))) => Ok(()),
            Ok(Some((FromKeeper::NotStarted(number), _))) => {
                Err(NotRun::Program(io::Error::from_raw_os_error(number)))
            }
            Ok(Some((FromKeeper::Ended { .. }, _)) | None) => {
                Err(NotRun::Other(io::ErrorKind::UnexpectedEof.into()))
            }
            Err(error) => Err(NotRun::Other(error)),
        }
    }

    /// Passes a signal on to the program.
    pub async fn signal(&self, signal: Signal) {
        // It may have ended.
        let _ = self
            .control
            .send(&ToKeeper::Signal(signal.as_raw()), &[])
            .await;
    }

    /// Waits until the program has ended and nothing of it is left: its status, and how many other programs had to be
    /// ended. Cancel safe.
    ///
    /// # Errors
    /// The keeper has gone.
    pub async fn ended(&self) -> io::Result<(ExitStatus, usize)> {
        loop {
            match self.control.receive().await? {
                Some((FromKeeper::Ended { status, left }, _)) => {
                    return Ok((ExitStatus::from_raw(status), left));
                }
                Some((FromKeeper::Started | FromKeeper::NotStarted(_), _)) => {}
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Ends whatever is left, and waits for the keeper, or for 3 s.
    pub async fn end(mut self) {
        drop(self.control);
        let _ = tokio::time::timeout(CLEARED_WITHIN, self.child.wait()).await;
    }
}
