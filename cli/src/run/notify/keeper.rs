//! The process beside the program: it answers the program's system calls, and ends what the program leaves behind.
//!
//! It is this binary started anew. It is the parent of the program and of whatever the program's children leave without
//! one (`PR_SET_CHILD_SUBREAPER`): so the kernel lets it look at them also where only ancestors may (Yama), and nothing
//! gets away from it. It ends with the socket to the command outside, in whichever way that command ended.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::rc::Rc;

use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus, getrlimit, kill_process, setrlimit,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use super::asking::Connection;
use super::call::Call;
use super::channel::Channel;
use super::dialling::Dialling;
use super::filter;
use super::joining::Loopback;
use super::messages::{FromKeeper, Order, Outcome, ToKeeper};
use super::resolver::Resolver;
use super::sys::{self, Answer};
use super::watch::{Program, watch};
use crate::report::BEFORE_COMMAND;
use crate::run::plan::Refused;
use crate::run::sys::Fork;
use crate::run::{guard, inside, passing};

/// Name of the hidden command. Its arguments are the descriptor of a socket, then the program's.
pub const COMMAND: &str = "__beside";

/// Connects that wait for a task; each is a thread of the program that stands still.
const CONNECTS: usize = 1_024;

/// Does it all; whoever started it hears how it ended over the socket.
pub fn run(arguments: &[OsString]) -> ExitCode {
    let code = ExitCode::from(BEFORE_COMMAND);
    let [control, program @ ..] = arguments else {
        return code;
    };
    match inside::socket(control).and_then(|control| live(control, program)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => code,
    }
}

fn live(control: OwnedFd, program: &[OsString]) -> io::Result<()> {
    let (order, _) = inside::next::<Order>(&control)?;
    match start(control, &order, program)? {
        Started::Here(control, Ok(child)) => serve(control, child),
        Started::Here(control, Err(refused)) => {
            passing::send(&control, &Outcome::Refused(refused), &[])
        }
        // It was to become the program; who waits for that was told why it has not.
        Started::There => Err(io::ErrorKind::Other.into()),
    }
}

fn serve(control: OwnedFd, child: Child) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(LocalSet::new().run_until(keep(control, child)))?;
    // The thread that takes calls may stand in the kernel for ever.
    runtime.shutdown_background();
    Ok(())
}

/// The process that will become the program, under the filter.
struct Child {
    pid: Pid,
    /// It waits here for a word.
    socket: OwnedFd,
    program: Program,
}

/// Which of the two processes this is.
enum Started {
    Here(OwnedFd, Result<Child, Refused>),
    There,
}

fn start(control: OwnedFd, order: &Order, arguments: &[OsString]) -> io::Result<Started> {
    let (socket, theirs) = passing::pair()?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    match crate::run::sys::fork()? {
        Fork::Parent(child) => {
            drop(theirs);
            let pid = Pid::from_raw(child).ok_or(io::ErrorKind::NotFound)?;
            let child = prepare(control.as_fd(), pid, socket);
            Ok(Started::Here(control, child))
        }
        Fork::Child => {
            // Held here they would hide the keeper's end.
            drop((control, socket));
            let Err(_) = become_program(&theirs, order, arguments);
            Ok(Started::There)
        }
    }
}

/// Waits until the child is under the filter, and tries all that its calls will need.
fn prepare(control: BorrowedFd<'_>, pid: Pid, socket: OwnedFd) -> Result<Child, Refused> {
    let installed = inside::next::<Installed>(&socket)
        .and_then(|(installed, _)| installed.map_err(io::Error::from_raw_os_error));
    let number = installed.map_err(not_installed)?;
    // Away from the terminal's group, not from its session: a shell that is the program has its jobs stopped by it.
    rustix::process::setpgid(None, None)
        .map_err(io::Error::from)
        .and_then(|()| guard::let_go(&[control, socket.as_fd()]))
        .map_err(refused("starting a process"))?;
    let program = take_listener(pid, number)
        .map(Program::new)
        .map_err(refused("taking a descriptor of the program"))?;
    try_it(&program).map_err(refused("looking into the program"))?;
    Ok(Child {
        pid,
        socket,
        program,
    })
}

fn refused(step: &str) -> impl Fn(io::Error) -> Refused {
    let step = step.to_owned();
    move |error| Refused {
        step: step.clone(),
        why: error.to_string(),
        by_policy: true,
    }
}

/// The kernel allows one listener above a program.
fn not_installed(error: io::Error) -> Refused {
    let is_taken = error.raw_os_error() == Some(libc::EBUSY);
    let mut refused = refused("putting the program under a filter")(error);
    if is_taken {
        refused.why = "something above this shell listens to its system calls already, and the kernel allows one (EBUSY)"
            .to_owned();
    }
    refused
}

/// The number of the listener in the child, or why there is none.
type Installed = Result<i32, i32>;

/// In the child. Returns only if there is no program to run after all. Every message goes by `write`, since the filter
/// stops `sendmsg`, and at first nobody answers.
fn become_program(
    socket: &OwnedFd,
    order: &Order,
    arguments: &[OsString],
) -> io::Result<Infallible> {
    // An architecture whose numbers are not known is as a kernel without filters.
    let filter = filter::program().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSYS));
    let listener = filter.and_then(|filter| sys::install(&filter));
    let number = |error: &io::Error| error.raw_os_error().unwrap_or(libc::ENOSYS);
    let installed: Installed = listener.as_ref().map(AsRawFd::as_raw_fd).map_err(number);
    say(socket, &installed)?;
    let listener = listener?;
    // The keeper tries on this whether it can do its work.
    let _ = TcpStream::connect(TRIED);
    // Every process that has it keeps the calls of a keeper that has gone waiting.
    drop(listener);
    inside::next::<ToKeeper>(socket)?;
    let (current, maximum) = order.open_files;
    setrlimit(Resource::Nofile, Rlimit { current, maximum })?;
    let Some((name, arguments)) = arguments.split_first() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let error = Command::new(name).args(arguments).exec();
    say(socket, &number(&error))?;
    Err(error)
}

fn say(socket: &OwnedFd, message: &impl serde::Serialize) -> io::Result<()> {
    rustix::io::write(socket, &serde_json::to_vec(message)?)?;
    Ok(())
}

/// Never reached: the keeper answers (TEST-NET-1, RFC 5737).
const TRIED: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 9);

fn take_listener(pid: Pid, number: i32) -> io::Result<OwnedFd> {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
}

/// Takes the child's first call, with all that a real one needs.
fn try_it(program: &Program) -> io::Result<()> {
    let call = Call::next(&program.listener)?;
    let memory = call.memory(true)?;
    memory.address(call.argument(1), call.argument(2))?;
    call.descriptor(call.argument(0))?;
    match call.answer(Answer::Error(libc::ENETUNREACH)) {
        true => Ok(()),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Everything that answering needs, before the program may run.
struct Ready {
    opener: OwnedFd,
    sockets: Vec<OwnedFd>,
    resolver: Resolver,
    dialling: Rc<Dialling>,
}

impl Ready {
    fn make(program: &Program) -> io::Result<Self> {
        let (opener, ours) = passing::pair()?;
        let (resolver, sockets) = Resolver::open()?;
        let dialling = Dialling {
            program: program.clone(),
            connection: Connection::new(ours)?,
            loopback: Loopback::open()?,
        };
        Ok(Self {
            opener,
            sockets,
            resolver,
            dialling: Rc::new(dialling),
        })
    }
}

async fn keep(control: OwnedFd, child: Child) -> io::Result<()> {
    // Before the program runs, so that its end is not missed.
    let mut ended = signal(SignalKind::child())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let control = Channel::new(control)?;
    let made = Ready::make(&child.program).map_err(refused("opening sockets on loopback"));
    let Ready {
        opener,
        sockets,
        resolver,
        dialling,
    } = match made {
        Ok(ready) => ready,
        Err(refused) => return control.send(&Outcome::Refused(refused), &[]).await,
    };
    raise_open_files();
    let mut descriptors = vec![opener.as_fd()];
    descriptors.extend(sockets.iter().map(AsFd::as_fd));
    control.send(&Outcome::Ready, &descriptors).await?;
    drop((opener, sockets));

    let (dial_tx, dial_rx) = mpsc::channel(CONNECTS);
    let program = child.program.clone();
    std::thread::Builder::new()
        .name("tp-calls".to_owned())
        .spawn(move || watch(&program, &resolver, &dial_tx))?;
    let answering = async {
        tokio::join!(dialling.connection.run(), Rc::clone(&dialling).run(dial_rx));
        // The connection and every process under the filter have gone, which is not for this to say.
        std::future::pending::<Infallible>().await
    };
    let attending = attend(&control, &child, &mut ended, &mut terminated);
    let status = tokio::select! {
        // Whatever went wrong, nothing is to be left.
        status = attending => status.unwrap_or_default(),
        never = answering => match never {},
    };
    let left = tokio::task::spawn_blocking(|| guard::clear(descendants)).await;
    let ended = FromKeeper::Ended {
        status: status.unwrap_or_default(),
        left: left.map_err(io::Error::other)??,
    };
    // Nobody may be there to hear it.
    let _ = control.send(&ended, &[]).await;
    Ok(())
}

/// Serves the command outside until the program has ended, which gives its status, or is to end.
async fn attend(
    control: &Channel,
    child: &Child,
    ended: &mut tokio::signal::unix::Signal,
    terminated: &mut tokio::signal::unix::Signal,
) -> io::Result<Option<i32>> {
    loop {
        tokio::select! {
            _ = ended.recv() => {
                if let Some(status) = reap(child.pid)? {
                    return Ok(Some(status.as_raw()));
                }
            }
            _ = terminated.recv() => return Ok(None),
            order = control.receive::<ToKeeper>() => match order {
                Ok(Some((ToKeeper::Go, _))) => control.send(&go(child)?, &[]).await?,
                Ok(Some((ToKeeper::Signal(number), _))) => {
                    if let Some(signal) = Signal::from_named_raw(number) {
                        // It may be ending.
                        let _ = kill_process(child.pid, signal);
                    }
                }
                Ok(Some((ToKeeper::End, _)) | None) | Err(_) => return Ok(None),
            },
        }
    }
}

/// Waits until the program runs, or could not be run.
fn go(child: &Child) -> io::Result<FromKeeper> {
    say(&child.socket, &ToKeeper::Go)?;
    match passing::receive::<i32>(&child.socket)? {
        // The socket closes when the program takes the process over.
        None => Ok(FromKeeper::Started),
        Some((number, _)) => Ok(FromKeeper::NotStarted(number)),
    }
}

/// Waits for every child that has ended, also for those that the program left. Gives the program's status.
fn reap(program: Pid) -> io::Result<Option<WaitStatus>> {
    let mut own = None;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == program => own = Some(status),
            Ok(Some(_)) => {}
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(own),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The living processes that come from this one.
fn descendants() -> io::Result<Vec<Pid>> {
    // Ended ones would be counted for ever.
    while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(number) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let stat = std::fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
        if let Some(parent) = parent(&stat) {
            parents.push((number, parent));
        }
    }
    Ok(below(rustix::process::getpid().as_raw_pid(), &parents))
}

/// Behind the name, which may hold anything: the state, then the parent (`proc_pid_stat(5)`). Zombies have none.
fn parent(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut words = rest.split(' ');
    match words.next()? {
        "Z" | "X" => None,
        _ => words.next()?.parse().ok(),
    }
}

fn below(root: i32, parents: &[(i32, i32)]) -> Vec<Pid> {
    let mut found = vec![root];
    let mut seen = 0;
    while let Some(parent) = found.get(seen).copied() {
        seen += 1;
        let children = parents.iter().filter(|(_, of)| *of == parent);
        found.extend(children.map(|(child, _)| *child));
    }
    found
        .into_iter()
        .skip(1)
        .filter_map(Pid::from_raw)
        .collect()
}

/// Each connect that is being dialled holds a few.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Then there are fewer at a time.
    let _ = setrlimit(Resource::Nofile, raised);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_pretend_another_parent() {
        assert_eq!(parent("7 (a) R 1 2) S 42 7 7"), Some(42));
        assert_eq!(parent("7 (a) Z 42 7 7"), None);
        assert_eq!(parent(""), None);
    }

    #[test]
    fn descendants_are_children_and_theirs() {
        let parents = [(5, 1), (6, 5), (7, 6), (8, 2), (9, 5)];
        let found = below(5, &parents);
        let numbers: Vec<i32> = found.iter().map(|pid| pid.as_raw_pid()).collect();

        assert_eq!(numbers, [6, 9, 7]);
    }
}
