//! Flows that do not go through the tunnel: dialled from here, relayed between two kernel sockets.
//!
//! An idle flow owns no buffer: bytes pass through one buffer a thread, and only what the other side does not take at
//! once is kept.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use socket2::SockRef;
use tokio::net::{TcpStream, lookup_host};
use tp_tunnel::{DialError, DialErrorKind, Host, Target};

use super::counters::OpenFlow;
use super::scratch;
use super::split::is_loopback_address;

/// Resolves and dials; addresses are tried 250 ms apart (RFC 8305 §5), the first that answers wins.
pub(super) async fn dial(target: &Target) -> Result<TcpStream, DialError> {
    let addresses = resolve(target).await?;
    let mut attempts: FuturesUnordered<_> = (0_u32..)
        .zip(addresses)
        .map(|(turn, address)| async move {
            tokio::time::sleep(turn * STAGGER).await;
            TcpStream::connect(address).await
        })
        .collect();
    let mut failure = None;
    while let Some(attempt) = attempts.next().await {
        match attempt {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    Err(failure.map_or_else(|| no_such_name(target), DialError::from))
}

const STAGGER: Duration = Duration::from_millis(250);

/// The addresses of `target`. Loopback is refused after resolving, since a page of the web could otherwise reach this
/// machine's own services through a name of its own (DNS rebinding).
pub(super) async fn resolve(target: &Target) -> Result<Vec<SocketAddr>, DialError> {
    let addresses: Vec<SocketAddr> = match &target.host {
        Host::Ip(address) => vec![SocketAddr::new(*address, target.port)],
        Host::Name(name) => match lookup_host((name.as_str(), target.port)).await {
            Ok(addresses) => addresses.collect(),
            Err(error) => return Err(DialError::new(DialErrorKind::Dns, error.to_string())),
        },
    };
    let mut allowed = addresses.clone();
    allowed.retain(|address| !is_loopback_address(address.ip()));
    match (addresses.is_empty(), allowed.is_empty()) {
        (true, _) => Err(no_such_name(target)),
        (false, true) => Err(DialError::new(
            DialErrorKind::Forbidden,
            "the name resolves to this machine itself",
        )),
        (false, false) => Ok(allowed),
    }
}

fn no_such_name(target: &Target) -> DialError {
    DialError::new(
        DialErrorKind::Dns,
        format!("no address for {}", target.host),
    )
}

/// Moves bytes both ways until both directions have ended; a reset of one side becomes a reset of the other.
pub(super) async fn relay(client: TcpStream, origin: TcpStream, flow: &OpenFlow) {
    let up = pump(&client, &origin, |bytes| flow.up(bytes));
    let down = pump(&origin, &client, |bytes| flow.down(bytes));
    if tokio::try_join!(up, down).is_err() {
        reset_on_drop(&client);
        reset_on_drop(&origin);
    }
}

/// Makes the close of this socket a RST.
pub(super) fn reset_on_drop(stream: &TcpStream) {
    // It fails only for a socket that is gone already.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// One direction, until end of stream, which is passed on as a FIN.
async fn pump(from: &TcpStream, to: &TcpStream, count: impl Fn(usize)) -> io::Result<()> {
    loop {
        from.readable().await?;
        match step(from, to) {
            Ok(Step::End) => return SockRef::from(to).shutdown(Shutdown::Write),
            Ok(Step::Moved { bytes, rest }) => {
                count(bytes);
                write_all(to, &rest).await?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        tokio::task::consume_budget().await;
    }
}

enum Step {
    Moved { bytes: usize, rest: Vec<u8> },
    End,
}

fn step(from: &TcpStream, to: &TcpStream) -> io::Result<Step> {
    scratch::with(|buffer| {
        let bytes = from.try_read(buffer)?;
        if bytes == 0 {
            return Ok(Step::End);
        }
        let taken = match to.try_write(&buffer[..bytes]) {
            Ok(taken) => taken,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        let rest = buffer[taken..bytes].to_vec();
        Ok(Step::Moved { bytes, rest })
    })
}

async fn write_all(to: &TcpStream, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        to.writable().await?;
        match to.try_write(rest) {
            Ok(taken) => rest = &rest[taken..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
