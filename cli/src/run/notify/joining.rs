//! How a program's own socket is joined to one of ours, over the workstation's loopback.
//!
//! The socket stays the program's: its options, its number and what waits on it stay as they are. A blocking connect is
//! carried out when the flow is open, so nothing is to be undone when it is not. A non-blocking one must leave the
//! socket in `SynSent` until then: it connects to a listener whose queue is full, which hears no SYN (`listen(2)`), and a
//! socket of ours at the same address answers by opening from the other side (simultaneous open, RFC 9293 §3.5).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::TcpSocket;
use tokio::time::timeout;

/// Both ends are on this machine, and neither waits for anybody.
const AT_ONCE: Duration = Duration::from_secs(2);

/// The listeners that answer nobody.
pub(super) struct Loopback {
    v4: Silent,
    v6: Option<Silent>,
}

/// Silent as long as nobody takes what fills its queue.
struct Silent {
    _listener: Socket,
    _filling: Vec<TcpStream>,
    address: SocketAddr,
}

/// A queue of length 0 would make the kernel warn of a flood.
const QUEUE: i32 = 1;

/// A queue takes one more than its length.
const FULL: usize = 2;

impl Loopback {
    /// Opens them.
    ///
    /// # Errors
    /// There is no loopback, or no descriptor.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            v4: Silent::open(Ipv4Addr::LOCALHOST.into())?,
            // Without IPv6 no socket of the program needs it.
            v6: Silent::open(Ipv6Addr::LOCALHOST.into()).ok(),
        })
    }

    /// Leaves a non-blocking socket in `SynSent`. Gives the peer that it will show.
    ///
    /// # Errors
    /// It cannot reach the loopback, being bound to a device, say.
    pub(super) fn hold(&self, program: &OwnedFd) -> io::Result<SocketAddr> {
        let v6 = self.v6.as_ref().map(|silent| silent.address);
        connect(program, self.v4.address, v6)
    }

    /// Connects a socket that is held: gives the other end.
    ///
    /// # Errors
    /// The program has dissolved it in the meantime.
    pub(super) async fn release(&self, program: &OwnedFd) -> io::Result<TcpStream> {
        let to = canonical(inet(SockRef::from(program).local_addr()?)?);
        let own = match (to, &self.v6) {
            (SocketAddr::V6(_), Some(silent)) => silent.address,
            (SocketAddr::V4(_) | SocketAddr::V6(_), _) => self.v4.address,
        };
        let socket = reusable(own)?;
        socket.set_nonblocking(true)?;
        let socket = TcpSocket::from_std_stream(socket.into());
        timeout(AT_ONCE, socket.connect(to)).await??.into_std()
    }
}

/// Ends what [`Loopback::hold`] began; the program's poller hears of it.
pub(super) fn break_off(program: &OwnedFd) {
    // It fails only for a socket that is gone already.
    let _ = rustix::net::connect_unspec(program);
}

/// Connects a blocking socket and gives the other end, and the peer that it shows. Blocks, but for nobody else: the kernel accepts by itself.
///
/// # Errors
/// It cannot reach the loopback.
pub(super) fn join(program: &OwnedFd) -> io::Result<(TcpStream, SocketAddr)> {
    let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok();
    let second = v6.as_ref().map(TcpListener::local_addr).transpose()?;
    let shown = connect(program, v4.local_addr()?, second)?;
    let own = canonical(inet(SockRef::from(program).local_addr()?)?);
    let listener = match v6 {
        Some(v6) if canonical(shown).is_ipv6() => v6,
        Some(_) | None => v4,
    };
    SockRef::from(&listener).set_read_timeout(Some(AT_ONCE))?;
    loop {
        // Loopback is everybody's: others may have been quicker, and are not served.
        let (stream, from) = listener.accept()?;
        if from == own {
            return Ok((stream, shown));
        }
    }
}

/// Connects to `v4` or `v6`, whichever the socket can reach. Gives the address as the socket's kind writes it.
fn connect(program: &OwnedFd, v4: SocketAddr, v6: Option<SocketAddr>) -> io::Result<SocketAddr> {
    let mut failure = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    for address in ways(program, v4, v6)? {
        match rustix::net::connect(program, &address) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => return Ok(address),
            Err(error) => failure = error.into(),
        }
    }
    Err(failure)
}

/// In the order in which to try them.
pub(super) fn ways(
    program: &OwnedFd,
    v4: SocketAddr,
    v6: Option<SocketAddr>,
) -> io::Result<Vec<SocketAddr>> {
    let socket = SockRef::from(program);
    if socket.domain()? == Domain::IPV4 {
        return Ok(vec![v4]);
    }
    let mapped = match v4.ip() {
        IpAddr::V4(address) => SocketAddr::new(address.to_ipv6_mapped().into(), v4.port()),
        IpAddr::V6(_) => v4,
    };
    let mapped = (!socket.only_v6()?).then_some(mapped);
    Ok(mapped.into_iter().chain(v6).collect())
}

impl Silent {
    fn open(address: IpAddr) -> io::Result<Self> {
        let listener = reusable(SocketAddr::new(address, 0))?;
        listener.listen(QUEUE)?;
        let address = inet(listener.local_addr()?)?;
        let fill = || TcpStream::connect_timeout(&address, AT_ONCE);
        Ok(Self {
            _listener: listener,
            _filling: (0..FULL).map(|_| fill()).collect::<io::Result<_>>()?,
            address,
        })
    }
}

/// Several sockets of one user may have the same address.
fn reusable(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn inet(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    address
        .as_socket()
        .ok_or_else(|| io::ErrorKind::Unsupported.into())
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    fn program(domain: Domain, only_v6: bool) -> Socket {
        let socket = Socket::new(domain, Type::STREAM, None).unwrap();
        if domain == Domain::IPV6 {
            socket.set_only_v6(only_v6).unwrap();
        }
        socket
    }

    fn kinds() -> Vec<Socket> {
        vec![
            program(Domain::IPV4, false),
            program(Domain::IPV6, false),
            program(Domain::IPV6, true),
        ]
    }

    fn talk(program: Socket, mut ours: TcpStream) {
        let mut program = TcpStream::from(program);
        program.set_nonblocking(false).unwrap();
        ours.set_nonblocking(false).unwrap();
        let mut read = [0; 4];
        ours.write_all(b"ping").unwrap();
        program.read_exact(&mut read).unwrap();
        program.write_all(&read).unwrap();
        ours.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"ping");
    }

    fn is_writable(socket: &OwnedFd) -> bool {
        let mut polled = [rustix::event::PollFd::new(
            socket,
            rustix::event::PollFlags::OUT,
        )];
        let now = rustix::event::Timespec::default();
        rustix::event::poll(&mut polled, Some(&now)).unwrap() == 1
    }

    #[tokio::test]
    async fn a_held_socket_is_in_progress_until_it_is_released_and_then_carries_bytes() {
        let loopback = Loopback::open().unwrap();
        for program in kinds() {
            program.set_nonblocking(true).unwrap();
            let ours = OwnedFd::from(program.try_clone().unwrap());

            loopback.hold(&ours).unwrap();
            assert!(!is_writable(&ours));
            let end = loopback.release(&ours).await.unwrap();

            assert!(is_writable(&ours));
            assert!(program.take_error().unwrap().is_none());
            talk(program, end);
        }
    }

    #[tokio::test]
    async fn a_held_socket_that_is_broken_off_wakes_its_poller_and_can_be_used_again() {
        let loopback = Loopback::open().unwrap();
        let program = program(Domain::IPV4, false);
        program.set_nonblocking(true).unwrap();
        let ours = OwnedFd::from(program.try_clone().unwrap());

        loopback.hold(&ours).unwrap();
        break_off(&ours);

        assert!(is_writable(&ours));
        assert!(program.take_error().unwrap().is_some());
        loopback.hold(&ours).unwrap();
        talk(program, loopback.release(&ours).await.unwrap());
    }

    #[test]
    fn a_blocking_socket_is_joined_at_once() {
        for program in kinds() {
            let ours = OwnedFd::from(program.try_clone().unwrap());
            let (end, _) = join(&ours).unwrap();
            talk(program, end);
        }
    }
}
