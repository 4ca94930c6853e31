//! One UDP flow: extended CONNECT with `connect-udp` (RFC 9298), datagrams in capsules.
//!
//! A datagram that cannot leave now is dropped, as a full queue on the way would do: waiting would only make it late.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep_until};

use crate::error::FlowError;
use crate::flow_control::{Allowance, Frame};
use crate::link::Link;
use crate::meter::OpenFlow;
use crate::settings::FRAME_PAYLOAD;
use crate::streams::capsule::{self, Decoder, PAYLOAD_MAX};
use crate::streams::flow::{Flow, FlowReceiver};
use crate::target::{Host, Target, parse_port};

/// The client's end of one UDP flow. Datagrams stay whole; some may be lost, as with UDP itself.
pub struct DatagramFlow {
    sender: DatagramSender,
    receiver: DatagramReceiver,
}

/// The sending direction.
pub struct DatagramSender {
    stream: SendStream<Frame>,
    allowance: Allowance,
    link: Arc<Link>,
    _open: OpenFlow,
}

/// The receiving direction.
pub struct DatagramReceiver {
    body: FlowReceiver,
    decoder: Decoder,
}

impl fmt::Debug for DatagramFlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatagramFlow").finish_non_exhaustive()
    }
}

impl DatagramFlow {
    pub(crate) fn new(stream: SendStream<Frame>, body: RecvStream, link: Arc<Link>) -> Self {
        let receiver = DatagramReceiver {
            body: FlowReceiver::new(body, Arc::clone(&link)),
            decoder: Decoder::default(),
        };
        let open = link.meter.open_flow();
        let sender = DatagramSender {
            stream,
            allowance: Allowance::default(),
            link,
            _open: open,
        };
        Self { sender, receiver }
    }

    /// An inbound flow whose bytes are datagrams in capsules: both ends know that its intercept is about UDP.
    pub(crate) fn of(flow: Flow) -> Self {
        let (sender, body) = flow.into_split();
        let (stream, link, open) = sender.into_datagrams();
        let sender = DatagramSender {
            stream,
            allowance: Allowance::default(),
            link,
            _open: open,
        };
        let decoder = Decoder::default();
        let receiver = DatagramReceiver { body, decoder };
        Self { sender, receiver }
    }

    /// Sends one datagram now or drops it; never waits. `Ok(false)` means dropped, because the peer or the carrier is
    /// slow or because it is larger than UDP allows.
    pub fn send(&mut self, datagram: Bytes) -> Result<bool, FlowError> {
        self.sender.send(&datagram)
    }

    /// The next datagram, or `None` when the peer ended the flow (it was idle). Cancel safe.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, FlowError> {
        self.receiver.recv().await
    }

    /// The two directions, for two tasks. Dropping both ends the flow.
    pub fn into_split(self) -> (DatagramSender, DatagramReceiver) {
        (self.sender, self.receiver)
    }
}

/// Bytes of one UDP flow inside h2: one quantum of the scheduler that they bypass, and never less than a datagram.
const UNSENT_MAX: usize = 128 * 1024;

impl DatagramSender {
    /// As [`DatagramFlow::send`].
    pub fn send(&mut self, datagram: &[u8]) -> Result<bool, FlowError> {
        if datagram.len() > PAYLOAD_MAX {
            return Ok(false);
        }
        let mut capsule = capsule::encode(datagram);
        let size = capsule.len();
        self.stream.reserve_capacity(size);
        if self.stream.capacity() < size {
            self.stream.reserve_capacity(0);
            return self.alive().map(|()| false);
        }
        while !capsule.is_empty() {
            let piece = capsule.split_to(capsule.len().min(FRAME_PAYLOAD));
            let whole = piece.len() == size;
            // The first piece decides; the rest of a datagram under way must follow it.
            let limit = if whole || capsule.len() + piece.len() == size {
                UNSENT_MAX
            } else {
                usize::MAX
            };
            let Some(frame) = Frame::in_allowance(piece, &self.allowance, limit) else {
                self.stream.reserve_capacity(0);
                return self.alive().map(|()| false);
            };
            self.stream.send_data(frame, false)?;
        }
        self.link.meter.add_sent(size);
        Ok(true)
    }

    /// Ends the flow in this direction.
    pub fn finish(&mut self) -> Result<(), FlowError> {
        Ok(self.stream.send_data(Frame::empty(), true)?)
    }

    fn alive(&mut self) -> Result<(), FlowError> {
        let mut cx = std::task::Context::from_waker(futures::task::noop_waker_ref());
        match self.stream.poll_reset(&mut cx) {
            std::task::Poll::Ready(reason) => {
                Err(reason.map_or_else(FlowError::from, FlowError::Reset))
            }
            std::task::Poll::Pending => Ok(()),
        }
    }
}

impl DatagramReceiver {
    /// As [`DatagramFlow::recv`].
    pub async fn recv(&mut self) -> Result<Option<Bytes>, FlowError> {
        loop {
            if let Some(datagram) = self
                .decoder
                .next_datagram()
                .map_err(|_| FlowError::Framing)?
            {
                return Ok(Some(datagram));
            }
            match poll_fn(|cx| self.body.poll_data(cx)).await? {
                Some(piece) => {
                    self.body.release(piece.len());
                    self.decoder.push(piece);
                }
                None if self.decoder.is_complete() => return Ok(None),
                None => return Err(FlowError::Framing),
            }
        }
    }
}

thread_local! {
    /// Where a datagram lands before it is copied at its size; a flow that waits owns no buffer.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; PAYLOAD_MAX].into());
}

/// What it means that nobody has the port that a socket is connected to (ICMP port unreachable).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The datagram is lost and the flow goes on, as with any way.
    IsLost,
    /// The flow ends with a reset, so that the next datagrams can go elsewhere.
    Ends,
}

/// Joins a flow with a connected socket until it was idle for `idle`, either side ends it, or the other end refuses and that
/// ends it. Dropping it resets the flow.
pub async fn relay_datagrams(
    flow: DatagramFlow,
    socket: UdpSocket,
    idle: Duration,
    refusal: Refusal,
) {
    let (mut sender, mut receiver) = flow.into_split();
    // A new socket counts as full until the runtime has asked the kernel, and that would lose the first datagram.
    if socket.writable().await.is_err() {
        return;
    }
    let ends = |error: &io::Error| {
        refusal == Refusal::Ends && error.kind() == io::ErrorKind::ConnectionRefused
    };
    let mut active = Instant::now();
    loop {
        tokio::select! {
            outbound = receiver.recv() => match outbound {
                // A full socket buffer or an ICMP error loses this datagram only.
                Ok(Some(datagram)) => if socket.try_send(&datagram).is_err_and(|error| ends(&error)) {
                    break;
                },
                Ok(None) => break drop(sender.finish()),
                Err(error) => break tracing::debug!(%error, "UDP flow ended"),
            },
            ready = socket.readable() => {
                if ready.is_err() || forward_all(&socket, &mut sender, ends).is_err() {
                    break;
                }
            }
            () = sleep_until(active + idle) => break drop(sender.finish()),
        }
        active = Instant::now();
    }
}

/// Datagrams moved in one turn.
const BURST: usize = 32;

fn forward_all(
    socket: &UdpSocket,
    sender: &mut DatagramSender,
    ends: impl Fn(&io::Error) -> bool,
) -> Result<(), FlowError> {
    SCRATCH.with_borrow_mut(|scratch| {
        for _ in 0..BURST {
            match socket.try_recv(scratch) {
                Ok(size) => drop(sender.send(&scratch[..size])?),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if ends(&error) => return Err(FlowError::Local),
                // An ICMP error that an earlier datagram caused; the flow lives.
                Err(_) => {}
            }
        }
        Ok(())
    })
}

/// RFC 9298 §3: the default template, with the colons of an IPv6 address percent-encoded.
const TEMPLATE: &str = "/.well-known/masque/udp/";

pub(crate) fn to_path(target: &Target) -> String {
    let host = target.host.to_string().replace(':', "%3A");
    format!("{TEMPLATE}{host}/{}/", target.port)
}

pub(crate) fn from_path(path: &str) -> Option<Target> {
    let (host, port) = path
        .strip_prefix(TEMPLATE)?
        .strip_suffix('/')?
        .split_once('/')?;
    let host = Host::parse(&host.replace("%3A", ":").replace("%3a", ":")).ok()?;
    if let Host::Name(name) = &host
        && name.parse::<IpAddr>().is_ok()
    {
        return None;
    }
    Some(Target {
        host,
        port: parse_port(port).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;
    use crate::settings::Settings;

    #[tokio::test]
    async fn a_datagram_that_waits_for_its_socket_is_not_lost() {
        let (near, far) = duplex(1 << 16);
        let accepting = tokio::spawn(async move {
            let mut connection = h2::server::Builder::new()
                .handshake::<_, Frame>(far)
                .await
                .unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            let stream = respond
                .send_response(http::Response::new(()), false)
                .unwrap();
            tokio::spawn(async move { while connection.accept().await.is_some() {} });
            DatagramFlow::new(stream, request.into_body(), Link::new(Settings::default()))
        });
        let (mut requests, connection) = h2::client::handshake(near).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::post("https://tp/").body(()).unwrap();
        let (_response, mut stream) = requests.send_request(request, false).unwrap();
        stream.send_data(capsule::encode(b"first"), false).unwrap();
        let flow = accepting.await.unwrap();
        // The datagram is there before the socket exists.
        tokio::time::sleep(Duration::from_millis(50)).await;

        let destination = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        destination.set_nonblocking(true).unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(destination.local_addr().unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let destination = UdpSocket::from_std(destination).unwrap();
        tokio::spawn(async move {
            let socket = UdpSocket::from_std(socket).unwrap();
            relay_datagrams(flow, socket, Duration::from_secs(60), Refusal::IsLost).await;
        });

        let mut received = [0; 16];
        let receiving =
            tokio::time::timeout(Duration::from_secs(5), destination.recv(&mut received));
        assert_eq!(receiving.await.unwrap().unwrap(), 5);
        assert_eq!(&received[..5], b"first");
    }

    #[test]
    fn paths_round_trip_and_bad_ones_are_refused() {
        for text in ["dns.default.svc:53", "10.0.0.1:53", "[2001:db8::1]:443"] {
            let target: Target = text.parse().unwrap();
            assert_eq!(from_path(&to_path(&target)), Some(target));
        }
        assert_eq!(
            to_path(&"[::1]:53".parse().unwrap()),
            "/.well-known/masque/udp/%3A%3A1/53/"
        );
        for path in [
            "",
            TEMPLATE,
            "/x",
            "/.well-known/masque/udp/a/53",
            "/.well-known/masque/udp/a/0/",
            "/.well-known/masque/udp/a%2Fb/53/",
            "/.well-known/masque/udp/a/53/x/",
        ] {
            assert_eq!(from_path(path), None, "{path}");
        }
    }
}
