//! The process that makes the namespace and then becomes the program.
//!
//! It is this binary started anew, so that it has one thread when it leaves the workstation's namespaces, whatever the
//! command outside is doing. It makes everything itself: its capabilities end with `exec`. What it makes, it passes out;
//! it knows nothing of clusters.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use rustix::process::{getgid, getuid};

use super::device::{self, Kind};
use super::netlink::{Link, Netlink};
use super::plan::{Go, Made, NotStarted, Outcome, Plan, Refused};
use super::{files, guard, passing, sys};
use crate::huge_pages;
use crate::report::BEFORE_COMMAND;

/// Name of the hidden command. Its arguments are the descriptors of two sockets, then the program's.
pub const COMMAND: &str = "__in-namespace";

/// Does it all; returns only if there is no program to run after all. Whoever started it says why.
pub fn run(arguments: &[OsString]) -> ExitCode {
    let code = ExitCode::from(BEFORE_COMMAND);
    let [control, guard, program @ ..] = arguments else {
        return code;
    };
    if let (Ok(control), Ok(guard)) = (socket(control), socket(guard)) {
        let Err(_gone) = live(&control, guard, program);
    }
    code
}

pub(super) fn socket(number: &OsString) -> io::Result<OwnedFd> {
    let number = number.to_str().and_then(|number| number.parse().ok());
    sys::inherited_socket(number.ok_or(io::ErrorKind::InvalidInput)?)
}

/// An error means that nobody outside listens any more, or that the program was not started, which was said.
fn live(control: &OwnedFd, guard: OwnedFd, program: &[OsString]) -> io::Result<Infallible> {
    let (plan, _) = next::<Plan>(control)?;
    let (resolv_conf, descriptors, made) = match make(&plan, guard) {
        Ok(made) => made,
        Err(refused) => {
            passing::send(control, &Outcome::Refused(refused), &[])?;
            return Err(io::ErrorKind::Other.into());
        }
    };
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    passing::send(control, &Outcome::Ready(made), &borrowed)?;
    drop(descriptors);
    let (go, _) = next::<Go>(control)?;
    become_program(control, resolv_conf, &go, program)
}

/// The next message; the end is an error.
pub(super) fn next<T: serde::de::DeserializeOwned>(
    control: &OwnedFd,
) -> io::Result<(T, Vec<OwnedFd>)> {
    passing::receive(control)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn become_program(
    control: &OwnedFd,
    mut resolv_conf: File,
    go: &Go,
    program: &[OsString],
) -> io::Result<Infallible> {
    resolv_conf.write_all(go.resolv_conf.as_bytes())?;
    drop(resolv_conf);
    let Some((name, arguments)) = program.split_first() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let error = huge_pages::allowed(|| Command::new(name).args(arguments).exec());
    let number = error.raw_os_error().unwrap_or(libc::ENOEXEC);
    passing::send(control, &NotStarted(number), &[])?;
    Err(error)
}

fn make(plan: &Plan, guard: OwnedFd) -> Result<(File, Vec<OwnedFd>, Made), Refused> {
    let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
    at("making namespaces", sys::enter_namespaces())?;
    at("mapping the user", map_user(uid, gid))?;
    at("starting the guard", guard::start(guard))?;
    let mut notes = at("taking the loopback up", loopback(gid))?;
    let (resolv_conf, more) = at("mounting files", files::put_in_place())?;
    notes.extend(more);
    let (device, descriptor, passed_over) = device(plan.device)?;
    let mut descriptors = vec![descriptor];
    let mut listeners = Vec::new();
    for port in &plan.forwarded {
        for listener in at("listening on loopback", listen(*port))? {
            listeners.push(*port);
            descriptors.push(listener.into());
        }
    }
    let made = Made {
        device,
        passed_over,
        listeners,
        notes,
    };
    Ok((resolv_conf, descriptors, made))
}

/// Denials come with different numbers from different guardians of the kernel.
fn at<T>(step: &str, done: io::Result<T>) -> Result<T, Refused> {
    done.map_err(|error| Refused {
        step: step.to_owned(),
        why: error.to_string(),
        by_policy: matches!(
            error.raw_os_error(),
            Some(libc::EPERM | libc::EACCES | libc::ENOSPC | libc::ENOSYS | libc::EUSERS)
        ),
    })
}

/// One user and one group, both themselves: files keep their owner, and programs the user they know.
fn map_user(uid: u32, gid: u32) -> io::Result<()> {
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    // Without this a user could get rid of a group that denies something (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

/// The loopback, and what else the network namespace has of its own. Gives what could not be set.
fn loopback(gid: u32) -> io::Result<Vec<String>> {
    const FIRST: u32 = 1;
    let ping = format!("{gid} {gid}");
    let settings = [
        (
            "ping_group_range",
            ping.as_str(),
            "ping will need a setuid program, which cannot work here",
        ),
        (
            "ip_unprivileged_port_start",
            "0",
            "ports below 1024 cannot be listened on",
        ),
        (
            "tcp_rmem",
            "4096 1048576 33554432",
            "large transfers will be slower",
        ),
        (
            "tcp_wmem",
            "4096 1048576 33554432",
            "large transfers will be slower",
        ),
    ];
    let notes = settings.into_iter().filter_map(|(name, value, without)| {
        let written = fs::write(format!("/proc/sys/net/ipv4/{name}"), value);
        written
            .err()
            .map(|error| format!("net.ipv4.{name} cannot be set ({error}): {without}"))
    });
    let notes = notes.collect();
    Netlink::connect()?.set_up(FIRST, Link::default())?;
    Ok(notes)
}

type Device = (Kind, OwnedFd, Vec<(Kind, String)>);

/// The first kind that can be made, tried by making it.
fn device(forced: Option<Kind>) -> Result<Device, Refused> {
    let kinds = forced.map_or_else(|| vec![Kind::Tun, Kind::Veth], |kind| vec![kind]);
    let mut passed_over: Vec<(Kind, String)> = Vec::new();
    for kind in kinds {
        match device::make(kind) {
            Ok(descriptor) => return Ok((kind, descriptor, passed_over)),
            Err(error) => passed_over.push((kind, error.to_string())),
        }
    }
    let why: Vec<String> = passed_over
        .iter()
        .map(|(kind, why)| format!("{kind}: {why}"))
        .collect();
    Err(Refused {
        step: "making a network device".to_owned(),
        why: why.join("; "),
        by_policy: forced.is_none(),
    })
}

fn listen(port: u16) -> io::Result<Vec<TcpListener>> {
    let mut listeners = vec![TcpListener::bind((Ipv4Addr::LOCALHOST, port))?];
    // Without IPv6 there is no `::1` to be asked.
    listeners.extend(TcpListener::bind((Ipv6Addr::LOCALHOST, port)));
    Ok(listeners)
}
