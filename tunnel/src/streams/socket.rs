//! The kernel socket at an end of a flow.

use std::os::fd::AsRawFd;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// How long a socket is silent before the kernel asks its other side for a sign of life.
const SILENT_FOR: Duration = Duration::from_secs(60);

/// Pause between the questions.
const ASKED_EVERY: Duration = Duration::from_secs(15);

/// Questions without an answer that make it dead, which is a reset to the flow: after two minutes of silence in all.
const ASKED_TIMES: u32 = 4;

/// Sets up the socket of a flow, accepted or dialled.
///
/// Small answers leave at once instead of waiting for the application's delayed acknowledgement. A peer that vanished
/// is found after two minutes (tcp(7), `TCP_KEEPIDLE`); without that a half-closed flow would keep its descriptors for
/// as long as its tunnel lives. Fails only on a socket that is gone already, which its reader will notice.
pub fn set_up_flow_socket(tcp: &TcpStream) {
    let _ = tcp.set_nodelay(true);
    let keepalive = TcpKeepalive::new()
        .with_time(SILENT_FOR)
        .with_interval(ASKED_EVERY)
        .with_retries(ASKED_TIMES);
    let _ = SockRef::from(tcp).set_tcp_keepalive(&keepalive);
}

/// Descriptors that flows leave to whatever keeps the process useful: a new carrier, its control socket, its log.
const KEPT_BACK: u64 = 16;

/// Whether a flow with this new socket would take one of the last descriptors that the process may have.
///
/// The kernel gives the lowest number that is free (open(2)), so a number close to the limit says that all below are
/// taken. Such a flow is better refused: otherwise nothing could be accepted, dialled or asked any more, and nobody told
/// why.
pub fn descriptors_are_scarce(socket: &impl AsRawFd) -> bool {
    let number = u64::try_from(socket.as_raw_fd()).unwrap_or_default();
    let limit = getrlimit(Resource::Nofile).current;
    limit.is_some_and(|limit| number + KEPT_BACK >= limit)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_vanished_peer_is_found_after_two_minutes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();

        set_up_flow_socket(&tcp);

        let socket = SockRef::from(&tcp);
        assert!(socket.keepalive().unwrap() && tcp.nodelay().unwrap());
        let silence = socket.tcp_keepalive_time().unwrap();
        let asking =
            socket.tcp_keepalive_interval().unwrap() * socket.tcp_keepalive_retries().unwrap();
        assert_eq!(silence + asking, Duration::from_secs(120));
    }
}
