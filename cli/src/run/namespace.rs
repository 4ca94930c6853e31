//! One program in namespaces of its own, as the command that started it sees it.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Pid, WaitOptions};
use tokio::process::{Child, Command};

use super::plan::{FromGuard, Go, Made, NotStarted, Outcome, Plan, Refused, ToGuard};
use super::{inside, passing};

/// How long the kernel may take to make a namespace. It takes some 10 ms where nothing is wrong.
const MADE_WITHIN: Duration = Duration::from_secs(10);

/// How long the guard may take to end what is left.
const CLEARED_WITHIN: Duration = Duration::from_secs(3);

/// A namespace in the making, or one with a program in it. Dropping it ends everything in there.
#[derive(Debug)]
pub struct Namespace {
    child: Child,
    control: OwnedFd,
    guard: OwnedFd,
}

/// Why a program does not run.
#[derive(Debug)]
pub enum NotRun {
    /// There is no such program, or it cannot be executed.
    Program(io::Error),
    /// The process that should become it has failed.
    Other(io::Error),
}

impl Namespace {
    /// Starts making namespaces for `program`, which gets these variables. It will wait until [`Namespace::go`].
    ///
    /// # Errors
    /// No process can be started.
    pub fn start(
        plan: &Plan,
        program: &[OsString],
        variables: &[(String, String)],
    ) -> io::Result<Self> {
        let (control, theirs) = passing::pair()?;
        let (guard, guards) = passing::pair()?;
        for socket in [&theirs, &guards] {
            rustix::io::fcntl_setfd(socket, FdFlags::empty())?;
        }
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("tp")
            .arg(inside::COMMAND)
            .arg(theirs.as_raw_fd().to_string())
            .arg(guards.as_raw_fd().to_string())
            .args(program);
        // What is no UTF-8 is no proxy either.
        let known = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        for proxy in out_of_reach(known, &plan.forwarded) {
            command.env_remove(proxy);
        }
        let child = command
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .spawn()?;
        drop((theirs, guards));
        set_socket_timeout(&control, Timeout::Recv, Some(MADE_WITHIN))?;
        set_socket_timeout(&guard, Timeout::Recv, Some(CLEARED_WITHIN))?;
        passing::send(&control, plan, &[])?;
        Ok(Self {
            child,
            control,
            guard,
        })
    }

    /// Waits until it is made, and gives what was made with its descriptors: the device, then the listeners. Blocks for
    /// some milliseconds.
    ///
    /// # Errors
    /// Why it could not be made.
    pub fn made(&self) -> Result<(Made, Vec<OwnedFd>), Refused> {
        let broken = |why: String| Refused {
            step: "waiting for the process in the namespace".to_owned(),
            why,
            by_policy: false,
        };
        match passing::receive(&self.control) {
            Ok(Some((Outcome::Ready(made), descriptors))) => Ok((made, descriptors)),
            Ok(Some((Outcome::Refused(refused), _))) => Err(refused),
            Ok(None) => Err(broken("it ended".to_owned())),
            Err(error) => Err(broken(error.to_string())),
        }
    }

    /// Lets the program run. Returns when it has started.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn go(&self, resolv_conf: String) -> Result<(), NotRun> {
        passing::send(&self.control, &Go { resolv_conf }, &[]).map_err(NotRun::Other)?;
        match passing::receive::<NotStarted>(&self.control) {
            // The socket closes when the program takes the process over.
            Ok(None) => Ok(()),
            Ok(Some((NotStarted(number), _))) => {
                Err(NotRun::Program(io::Error::from_raw_os_error(number)))
            }
            Err(error) => Err(NotRun::Other(error)),
        }
    }

    /// The process that becomes the program.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// A TCP socket of the namespace, not connected.
    ///
    /// # Errors
    /// The guard has gone.
    pub fn socket(guard: impl AsFd) -> io::Result<OwnedFd> {
        passing::send(&guard, &ToGuard::Socket, &[])?;
        match passing::receive::<FromGuard>(&guard)? {
            Some((FromGuard::Socket, mut descriptors)) if !descriptors.is_empty() => {
                Ok(descriptors.remove(0))
            }
            Some(_) | None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Takes the network away from what runs in there: connections end, new ones and names fail at once.
    pub fn cut(&self) {
        // Without a guard nothing runs any more.
        let _ = passing::send(&self.guard, &ToGuard::Cut, &[]);
    }

    /// The socket to the guard, for [`Namespace::socket`].
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn guard(&self) -> io::Result<OwnedFd> {
        self.guard.try_clone()
    }

    /// Ends whatever still runs in there; says how many programs that were. Blocks until they have gone, or for 3 s.
    pub fn end(self) -> usize {
        drop(self.control);
        if passing::send(&self.guard, &ToGuard::End, &[]).is_err() {
            return 0;
        }
        match passing::receive(&self.guard) {
            Ok(Some((FromGuard::Ended { processes, guard }, _))) => {
                if let Some(guard) = Pid::from_raw(guard) {
                    // It is exiting; whoever does not wait for it leaves a zombie.
                    let _ = rustix::process::waitpid(Some(guard), WaitOptions::empty());
                }
                processes
            }
            Ok(Some((FromGuard::Socket, _)) | None) | Err(_) => 0,
        }
    }
}

/// Names of proxy variables that lead to this workstation's loopback, which a network of its own does not have: those of
/// `tp env` among them. What stays is a port that is forwarded.
fn out_of_reach(
    variables: impl Iterator<Item = (String, String)>,
    forwarded: &[u16],
) -> Vec<String> {
    let leads_away = |value: &str| {
        let url = value.rsplit_once("://").map_or(value, |(_, rest)| rest);
        let authority = url.split(['/', '?']).next().unwrap_or_default();
        let place = authority
            .rsplit_once('@')
            .map_or(authority, |(_, place)| place);
        let (host, port) = place.rsplit_once(':').unwrap_or((place, ""));
        let loopback = host == "localhost" || host == "[::1]" || host.starts_with("127.");
        let port = port.parse().unwrap_or(80);
        loopback && !forwarded.contains(&port)
    };
    let is_proxy = |name: &str| {
        let name = name.to_ascii_lowercase();
        matches!(
            name.as_str(),
            "http_proxy" | "https_proxy" | "all_proxy" | "ftp_proxy"
        )
    };
    variables
        .filter(|(name, value)| is_proxy(name) && leads_away(value))
        .map(|(name, _)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_of_the_workstations_loopback_are_out_of_reach() {
        let variables = [
            ("http_proxy", "http://127.0.0.1:1080"),
            ("HTTPS_PROXY", "http://ada:a@b@localhost:1080/"),
            ("ALL_PROXY", "socks5h://[::1]:1080"),
            ("FTP_PROXY", "127.0.0.1:3128"),
            ("no_proxy", "127.0.0.1"),
            ("https_proxy", "http://proxy.corp:3128"),
            ("PATH", "127.0.0.1"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));

        assert_eq!(
            out_of_reach(variables.into_iter(), &[3128]),
            ["http_proxy", "HTTPS_PROXY", "ALL_PROXY"]
        );
    }
}
