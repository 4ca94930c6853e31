//! What each stopped call gets. One thread takes them all, and answers at once but for connects that must be dialled.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::SendFlags;
use socket2::{Domain, SockRef, Type};
use tokio::sync::mpsc;

use super::address::{self, Address};
use super::call::{Call, Memory};
use super::resolver::{self, Resolver};
use super::sockets::{Sockets, Step};
use super::sys::Answer;

/// Where resolver libraries ask others than a nameserver. Without them they ask the nameserver, as they do where these
/// do not run: nscd's, and that of systemd-resolved behind nss-resolve.
const RESOLVER_SOCKETS: [&[u8]; 3] = [
    b"/run/nscd/socket",
    b"/var/run/nscd/socket",
    b"/run/systemd/resolve/io.systemd.Resolve",
];

/// A datagram is no longer; and no resolver's `sendmmsg` has more messages.
const LONGEST_DATAGRAM: u64 = 65_535;
const MOST_MESSAGES: u64 = 64;
/// The kernel's own limit of pieces (`UIO_MAXIOV`).
const MOST_PIECES: u64 = 1_024;

/// `struct msghdr`, and `struct mmsghdr`, which has the sent length behind it.
const MESSAGE: usize = 56;
const MESSAGE_WITH_LENGTH: u64 = 64;

/// What both the thread and the tasks that dial need.
#[derive(Clone)]
pub(super) struct Program {
    pub(super) listener: Arc<OwnedFd>,
    sockets: Arc<Mutex<Sockets<Call>>>,
}

/// A connect that is to be dialled.
pub(super) struct Dial {
    /// Where to.
    pub(super) to: SocketAddr,
    /// To a nameserver: the resolver answers instead.
    pub(super) resolver: bool,
    /// The program's socket.
    pub(super) socket: OwnedFd,
    /// Names it.
    pub(super) cookie: u64,
    /// A non-blocking call, which wants to hear at once that it is in progress. Blocking ones wait with the socket.
    pub(super) impatient: Option<Call>,
}

impl Program {
    pub(super) fn new(listener: OwnedFd) -> Self {
        Self {
            listener: Arc::new(listener),
            sockets: Arc::default(),
        }
    }

    /// Held for some instructions, never across a wait.
    pub(super) fn sockets(&self) -> MutexGuard<'_, Sockets<Call>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes calls until no process is left that could make one. Blocks.
pub(super) fn watch(program: &Program, resolver: &Resolver, dial_tx: &mpsc::Sender<Dial>) {
    let watcher = Watcher { program, resolver };
    while let Ok(()) = wait(&program.listener) {
        match Call::next(&program.listener) {
            Ok(call) => {
                if let Some(dial) = watcher.handle(call)
                    && dial_tx.blocking_send(dial).is_err()
                {
                    return;
                }
            }
            // Interrupted before it was seen.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => return,
        }
    }
}

/// An error means that there is no process left (Linux 5.9; before that it waits on).
fn wait(listener: &OwnedFd) -> io::Result<()> {
    let mut polled = [PollFd::new(listener, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut polled, None))?;
    match polled[0].revents().contains(PollFlags::IN) {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

struct Watcher<'a> {
    program: &'a Program,
    resolver: &'a Resolver,
}

/// What is to be done, or that the kernel should do what the program asked for.
type Done = io::Result<Option<Answer>>;

impl Watcher<'_> {
    /// Answers it, or gives what is to be dialled. What cannot be looked at, such as a process that forbids it, is the
    /// kernel's.
    fn handle(&self, call: Call) -> Option<Dial> {
        let done = match call.number() {
            libc::SYS_connect => return self.connect(call),
            libc::SYS_sendto => self.send_to(&call),
            libc::SYS_sendmsg => self.send_message(&call),
            libc::SYS_sendmmsg => self.send_messages(&call),
            libc::SYS_getpeername => self.peer_name(&call),
            libc::SYS_getsockopt => self.socket_error(&call),
            _ => Ok(None),
        };
        call.answer(done.ok().flatten().unwrap_or(Answer::Continue));
        None
    }

    fn connect(&self, call: Call) -> Option<Dial> {
        match self.look_at_connect(&call) {
            Ok(Connect::Answer(answer)) => {
                call.answer(answer);
                None
            }
            Ok(Connect::Dial {
                to,
                resolver,
                socket,
            }) => self.dial(call, to, resolver, socket),
            Err(_) => {
                call.answer(Answer::Continue);
                None
            }
        }
    }

    fn look_at_connect(&self, call: &Call) -> io::Result<Connect> {
        let memory = call.memory(false)?;
        let to = match memory.address(call.argument(1), call.argument(2))? {
            Address::Inet(to) => to,
            Address::Unix(path) if RESOLVER_SOCKETS.contains(&path.as_slice()) => {
                return Ok(Connect::Answer(Answer::Error(libc::ENOENT)));
            }
            Address::Unix(_) | Address::Other => return Ok(Connect::Answer(Answer::Continue)),
        };
        let resolver = resolver::is_nameserver(to);
        if !resolver && is_own(to) {
            return Ok(Connect::Answer(Answer::Continue));
        }
        let socket = call.descriptor(call.argument(0))?;
        Ok(match kind(&socket)? {
            Kind::Tcp => Connect::Dial {
                to,
                resolver,
                socket,
            },
            Kind::Udp if resolver => Connect::Answer(self.lead_to_resolver(&socket, to)?),
            Kind::Udp | Kind::Other => Connect::Answer(Answer::Continue),
        })
    }

    fn lead_to_resolver(&self, socket: &OwnedFd, asked: SocketAddr) -> io::Result<Answer> {
        let shown = self.resolver.address_for(socket)?;
        rustix::net::connect(socket, &shown)?;
        let cookie = SockRef::from(socket).cookie()?;
        self.program.sockets().joined(cookie, asked, shown);
        Ok(Answer::Value(0))
    }

    fn dial(&self, call: Call, to: SocketAddr, resolver: bool, socket: OwnedFd) -> Option<Dial> {
        let (cookie, blocking, has_peer) = {
            let known = SockRef::from(&socket);
            let Ok(cookie) = known.cookie() else {
                call.answer(Answer::Continue);
                return None;
            };
            // Joining a socket of MPTCP from the other side is not TCP's simultaneous open any more.
            let multipath = known.protocol().ok().flatten() == Some(socket2::Protocol::MPTCP);
            let blocking = multipath || !known.nonblocking().unwrap_or(true);
            (cookie, blocking, known.peer_addr().is_ok())
        };
        let step = self
            .program
            .sockets()
            .connect(cookie, blocking, has_peer, call);
        match step {
            Step::Dial(impatient) => Some(Dial {
                to,
                resolver,
                socket,
                cookie,
                impatient,
            }),
            Step::Waits => None,
            Step::Answer(call, answer) => {
                if let (Answer::Error(_), false) = (answer, has_peer) {
                    // Said once, as the kernel does.
                    let _ = SockRef::from(&socket).take_error();
                }
                if call.answer(answer) {
                    self.program.sockets().heard(cookie);
                }
                None
            }
        }
    }

    fn send_to(&self, call: &Call) -> Done {
        let memory = call.memory(false)?;
        let to = memory.address(call.argument(4), call.argument(5))?;
        let flags = call.argument(3) as u32;
        let Some(socket) = self.addressed(call, &to, flags)? else {
            return Ok(None);
        };
        let socket = match socket {
            Addressed::Refused(answer) => return Ok(Some(answer)),
            Addressed::Nameserver(socket) => socket,
        };
        let length = call.argument(2).min(LONGEST_DATAGRAM) as usize;
        let bytes = memory.read(call.argument(1), length)?;
        Ok(Some(self.send(&socket, &bytes, flags)))
    }

    fn send_message(&self, call: &Call) -> Done {
        let memory = call.memory(false)?;
        let message = Message::read(&memory, call.argument(1))?;
        let flags = call.argument(2) as u32;
        let Some(socket) = self.addressed(call, &message.to(&memory)?, flags)? else {
            return Ok(None);
        };
        let socket = match socket {
            Addressed::Refused(answer) => return Ok(Some(answer)),
            Addressed::Nameserver(socket) => socket,
        };
        Ok(Some(self.send(&socket, &message.bytes(&memory)?, flags)))
    }

    /// Sends the first message alone, if one of them is a question. The program sends the others again, as after every
    /// short count (`sendmmsg(2)`).
    fn send_messages(&self, call: &Call) -> Done {
        let memory = call.memory(true)?;
        let (first, flags) = (call.argument(1), call.argument(3) as u32);
        let count = u64::from(call.argument(2) as u32).min(MOST_MESSAGES);
        let mut messages = Vec::new();
        for number in 0..count {
            let message = Message::read(&memory, first + number * MESSAGE_WITH_LENGTH)?;
            messages.push((message.to(&memory)?, message));
        }
        let is_question =
            |to: &Address| matches!(to, Address::Inet(to) if resolver::is_nameserver(*to));
        if !messages.iter().any(|(to, _)| is_question(to)) {
            return Ok(None);
        }
        let Some((to, message)) = messages.into_iter().next() else {
            return Ok(None);
        };
        let bytes = message.bytes(&memory)?;
        let sent = match self.addressed(call, &to, flags)? {
            Some(Addressed::Refused(answer)) => answer,
            Some(Addressed::Nameserver(socket)) => self.send(&socket, &bytes, flags),
            None => {
                let socket = call.descriptor(call.argument(0))?;
                match to {
                    Address::Inet(to) => send(&socket, &bytes, flags, Some(to)),
                    Address::Unix(_) | Address::Other => send(&socket, &bytes, flags, None),
                }
            }
        };
        let Answer::Value(length) = sent else {
            return Ok(Some(sent));
        };
        memory.write(first + MESSAGE as u64, &(length as u32).to_ne_bytes())?;
        Ok(Some(Answer::Value(1)))
    }

    /// A question to a nameserver, or a connect in the shape of a send.
    fn addressed(&self, call: &Call, to: &Address, flags: u32) -> io::Result<Option<Addressed>> {
        let Address::Inet(to) = to else {
            return Ok(None);
        };
        let opens = flags & libc::MSG_FASTOPEN as u32 != 0 && !is_own(*to);
        if !opens && !resolver::is_nameserver(*to) {
            return Ok(None);
        }
        let socket = call.descriptor(call.argument(0))?;
        Ok(match kind(&socket)? {
            // As where TCP Fast Open is switched off: the program connects without it.
            Kind::Tcp if opens => Some(Addressed::Refused(Answer::Error(libc::EOPNOTSUPP))),
            Kind::Udp if !opens => Some(Addressed::Nameserver(socket)),
            Kind::Tcp | Kind::Udp | Kind::Other => None,
        })
    }

    fn send(&self, socket: &OwnedFd, bytes: &[u8], flags: u32) -> Answer {
        match self.resolver.address_for(socket) {
            Ok(to) => send(socket, bytes, flags, Some(to)),
            Err(error) => failed(&error),
        }
    }

    /// The destination in place of the loopback's end.
    fn peer_name(&self, call: &Call) -> Done {
        if self.program.sockets().is_empty() {
            return Ok(None);
        }
        let socket = call.descriptor(call.argument(0))?;
        let known = SockRef::from(&socket);
        let Some(peer) = known.peer_addr()?.as_socket() else {
            return Ok(None);
        };
        let Some(asked) = self.program.sockets().asked(known.cookie()?, peer) else {
            return Ok(None);
        };
        let memory = call.memory(true)?;
        let bytes = address::encode(asked);
        let room = memory.half(call.argument(2))?;
        if room > i32::MAX as u32 {
            return Ok(None);
        }
        let shown = bytes.get(..room as usize).unwrap_or(&bytes);
        memory.write(call.argument(1), shown)?;
        memory.write(call.argument(2), &(bytes.len() as u32).to_ne_bytes())?;
        Ok(Some(Answer::Value(0)))
    }

    /// Why a connect failed, where the socket itself knows only that it did.
    fn socket_error(&self, call: &Call) -> Done {
        if self.program.sockets().is_empty() {
            return Ok(None);
        }
        let socket = call.descriptor(call.argument(0))?;
        let known = SockRef::from(&socket);
        let memory = call.memory(true)?;
        if memory.half(call.argument(4))? < 4 {
            return Ok(None);
        }
        let Some(number) = self.program.sockets().take_error(known.cookie()?) else {
            return Ok(None);
        };
        // Asking clears it.
        let _ = known.take_error();
        memory.write(call.argument(3), &number.to_ne_bytes())?;
        memory.write(call.argument(4), &4_u32.to_ne_bytes())?;
        Ok(Some(Answer::Value(0)))
    }
}

enum Connect {
    Answer(Answer),
    Dial {
        to: SocketAddr,
        resolver: bool,
        socket: OwnedFd,
    },
}

enum Addressed {
    Nameserver(OwnedFd),
    Refused(Answer),
}

enum Kind {
    Tcp,
    Udp,
    Other,
}

fn kind(socket: &OwnedFd) -> io::Result<Kind> {
    let socket = SockRef::from(socket);
    if ![Domain::IPV4, Domain::IPV6].contains(&socket.domain()?) {
        return Ok(Kind::Other);
    }
    let tcp = [socket2::Protocol::TCP, socket2::Protocol::MPTCP];
    Ok(match socket.r#type()? {
        Type::STREAM if socket.protocol()?.is_none_or(|own| tcp.contains(&own)) => Kind::Tcp,
        Type::DGRAM
            if socket
                .protocol()?
                .is_none_or(|own| own == socket2::Protocol::UDP) =>
        {
            Kind::Udp
        }
        _ => Kind::Other,
    })
}

/// Loopback, or unspecified, which connects to loopback: the workstation's own, which the program shares.
fn is_own(to: SocketAddr) -> bool {
    let address = to.ip().to_canonical();
    address.is_loopback() || address.is_unspecified()
}

/// Never waits: who would have to is told so.
fn send(socket: &OwnedFd, bytes: &[u8], flags: u32, to: Option<SocketAddr>) -> Answer {
    let flags = SendFlags::from_bits_retain(flags) | SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = match to {
        Some(to) => rustix::net::sendto(socket.as_fd(), bytes, flags, &to),
        None => rustix::net::send(socket.as_fd(), bytes, flags),
    };
    match sent {
        Ok(length) => Answer::Value(length as i64),
        Err(error) => Answer::Error(error.raw_os_error()),
    }
}

/// The error number of what we failed at.
pub(super) fn failed(error: &io::Error) -> Answer {
    Answer::Error(error.raw_os_error().unwrap_or(libc::EHOSTUNREACH))
}

/// What of a `struct msghdr` says where and what.
struct Message {
    name: u64,
    name_length: u64,
    pieces: u64,
    count: u64,
}

impl Message {
    fn read(memory: &Memory, at: u64) -> io::Result<Self> {
        let bytes = memory.read(at, MESSAGE)?;
        let (words, _) = bytes.as_chunks::<8>();
        let word = |index: usize| u64::from_ne_bytes(words[index]);
        Ok(Self {
            name: word(0),
            name_length: word(1) & u64::from(u32::MAX),
            pieces: word(2),
            count: word(3),
        })
    }

    fn to(&self, memory: &Memory) -> io::Result<Address> {
        memory.address(self.name, self.name_length)
    }

    fn bytes(&self, memory: &Memory) -> io::Result<Vec<u8>> {
        const PIECE: u64 = 16;
        let mut bytes = Vec::new();
        for number in 0..self.count.min(MOST_PIECES) {
            let piece = self.pieces + number * PIECE;
            let (base, length) = (memory.word(piece)?, memory.word(piece + 8)?);
            let length = length.min(LONGEST_DATAGRAM) as usize;
            if bytes.len() + length > LONGEST_DATAGRAM as usize {
                return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
            }
            bytes.extend(memory.read(base, length)?);
        }
        Ok(bytes)
    }
}
