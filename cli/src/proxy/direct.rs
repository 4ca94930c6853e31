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
async fn pump(from: &TcpStream, to: &TcpStream, count: impl Fn(u64)) -> io::Result<()> {
    loop {
        from.readable().await?;
        match step(from, to) {
            Ok(Step::End) => return SockRef::from(to).shutdown(Shutdown::Write),
            Ok(Step::Moved { bytes, rest }) => {
                count(bytes as u64);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::task::JoinHandle;

    use super::super::counters::{Counters, Kind};
    use super::*;

    /// Two ends with a relay between them, and what it counts.
    async fn relayed() -> (TcpStream, TcpStream, Arc<Counters>, JoinHandle<()>) {
        let (client, inner_client) = pair().await;
        let (origin, inner_origin) = pair().await;
        let counters = Arc::new(Counters::default());
        let flow = counters.open(Kind::Socks);
        let task = tokio::spawn(async move { relay(inner_client, inner_origin, &flow).await });
        (client, origin, counters, task)
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_half_close_still_delivers_the_reply() {
        let (mut client, mut origin, counters, task) = relayed().await;
        let sent: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
        let upload = async {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
        };
        let mut received = Vec::new();

        let (_, read) = tokio::join!(upload, origin.read_to_end(&mut received));
        read.unwrap();
        origin.write_all(b"reply").await.unwrap();
        drop(origin);
        let mut reply = Vec::new();
        client.read_to_end(&mut reply).await.unwrap();
        task.await.unwrap();

        assert!(received == sent, "{} bytes", received.len());
        assert_eq!(reply, b"reply");
        let counted = counters.snapshot();
        assert_eq!(
            (counted.bytes_up, counted.bytes_down, counted.flows_open),
            (3_000_000, 5, 0)
        );
    }

    #[tokio::test]
    async fn a_reset_of_one_side_is_a_reset_of_the_other() {
        let (mut client, origin, _, task) = relayed().await;

        reset_on_drop(&origin);
        drop(origin);
        let error = client.read(&mut [0; 1]).await.unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn what_resolves_to_this_machine_is_refused() {
        for target in [
            "127.0.0.1:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "0.0.0.0:80",
            "localhost:80",
        ] {
            let error = dial(&target.parse().unwrap()).await.unwrap_err();
            assert_eq!(error.kind, DialErrorKind::Forbidden, "{target}: {error}");
        }
    }

    #[tokio::test]
    async fn a_name_that_does_not_exist_is_a_dns_error() {
        let error = dial(&"no-such-name.invalid:80".parse().unwrap())
            .await
            .unwrap_err();
        assert_eq!(error.kind, DialErrorKind::Dns, "{error}");
    }
}
