//! The process that stays in the namespace until `tp run` ends, and then ends whatever the program left behind.
//!
//! It holds a socket to the command outside. When that closes, in whichever way the command ended, every process in the
//! same user namespace, or in one made there, is ended; so nothing is left even after SIGKILL. No PID namespace is needed
//! for this, and programs see the process ids that they have. It also makes sockets for connections into the namespace,
//! and takes the network away from programs when nobody carries their packets any more.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, Signal, kill_process};

use super::plan::{FromGuard, ToGuard};
use super::sys::{self, Fork};
use super::{device, passing};

/// How long a program may take after SIGTERM.
const GRACE: Duration = Duration::from_millis(500);

/// How long the end may take in all. Processes in uninterruptible sleep cannot be waited for.
const END_WITHIN: Duration = Duration::from_secs(2);

/// Starts the guard, in the namespaces that this process is in now, and gives it `outside`.
///
/// It is a child of the command outside, which waits for it, and not of this process, which is to become a program that
/// expects none.
///
/// # Errors
/// No process is free.
pub(super) fn start(outside: OwnedFd) -> io::Result<()> {
    match sys::fork_sibling()? {
        Fork::Parent(_) => Ok(()),
        Fork::Child => std::process::exit(i32::from(live(outside).is_err())),
    }
}

fn live(outside: OwnedFd) -> io::Result<()> {
    // Away from the terminal's session.
    rustix::process::setsid()?;
    let_go(&[outside.as_fd()])?;
    loop {
        match passing::receive(&outside) {
            Ok(Some((ToGuard::Socket, _))) => give_socket(&outside)?,
            // There is nothing else that could be done where this is not possible.
            Ok(Some((ToGuard::Cut, _))) => drop(device::cut()),
            Ok(Some((ToGuard::End, _)) | None) | Err(_) => break,
        }
    }
    let ended = FromGuard::Ended {
        processes: clear(others)?,
        guard: rustix::process::getpid().as_raw_pid(),
    };
    // Nobody may be there to hear it.
    let _ = passing::send(&outside, &ended, &[]);
    Ok(())
}

fn give_socket(outside: &OwnedFd) -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    passing::send(outside, &FromGuard::Socket, &[socket.as_fd()])
}

/// Leaves everything that was inherited but `kept`: a pipe held here would seem open to its reader.
pub(super) fn let_go(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    std::mem::forget(null);
    sys::close_all_but(kept);
    std::env::set_current_dir("/")
}

/// Ends all `others`; says how many there were. Blocks until they have gone, or for 2 s.
pub(super) fn clear(others: impl Fn() -> io::Result<Vec<Pid>>) -> io::Result<usize> {
    let begun = Instant::now();
    let first = others()?;
    let mut left = first.clone();
    signal_all(&left, Signal::TERM);
    // A stopped process takes no other signal.
    signal_all(&left, Signal::CONT);
    while !left.is_empty() && begun.elapsed() < END_WITHIN {
        std::thread::sleep(Duration::from_millis(2));
        left = others()?;
        if begun.elapsed() > GRACE {
            signal_all(&left, Signal::KILL);
        }
    }
    Ok(first.len())
}

fn signal_all(processes: &[Pid], signal: Signal) {
    for process in processes {
        // It may have ended by itself.
        let _ = kill_process(*process, signal);
    }
}

/// The other processes of this user namespace and of those below it. A program that left the network namespace, as
/// browsers and container tools do, had to make a user namespace for that.
fn others() -> io::Result<Vec<Pid>> {
    let own = identity(&File::open("/proc/self/ns/user")?)?;
    let me = rustix::process::getpid();
    let entries = std::fs::read_dir("/proc")?.flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let here = numbers.filter(|number| is_below(number, own).unwrap_or(false));
    let processes = here.filter_map(|number| Pid::from_raw(number.parse().ok()?));
    Ok(processes.filter(|process| *process != me).collect())
}

/// Whether a process is in the user namespace `own` or in one below. Those of other users cannot be looked at.
fn is_below(process: &str, own: (u64, u64)) -> io::Result<bool> {
    // Of all namespaces a dead process that nobody has waited for keeps only its user's.
    std::fs::read_link(format!("/proc/{process}/ns/net"))?;
    let mut namespace = File::open(format!("/proc/{process}/ns/user"))?;
    while identity(&namespace)? != own {
        namespace = sys::parent_namespace(&namespace)?.into();
    }
    Ok(true)
}

/// Device and inode: `ioctl_ns(2)` says to compare both.
fn identity(namespace: &File) -> io::Result<(u64, u64)> {
    let metadata = namespace.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}
