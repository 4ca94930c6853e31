//! Where an exchange goes: a connection to the application, or a flow to a workstation.
//!
//! One of them serves one connection of a client and is never shared, so nothing that one client sent can be taken for
//! another's, and the application's close is the client's close.

use std::io;
use std::net::SocketAddr;
use std::task::Context;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tp_tunnel::{Flow, FlowReader, FlowWriter};

use crate::socket::{Socket, SocketReader, SocketWriter};

/// Bytes read at a time.
pub(crate) const READ: usize = 16 * 1024;

/// One connection towards who answers.
#[derive(Debug)]
pub struct Upstream {
    pub(crate) rx: Reader,
    pub(crate) tx: Writer,
    /// Received and not yet understood.
    pub(crate) buf: BytesMut,
}

/// The receiving direction.
#[derive(Debug)]
pub(crate) enum Reader {
    App(SocketReader),
    Workstation(FlowReader),
}

/// The sending direction.
#[derive(Debug)]
pub(crate) enum Writer {
    App(SocketWriter),
    Workstation(FlowWriter),
}

/// A connection to the application that is up or coming up.
pub(crate) type Dialing = BoxFuture<'static, io::Result<Socket>>;

/// Connects to the application, at the pod's own address.
pub(crate) async fn dial(app: SocketAddr) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect(app).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

impl Upstream {
    pub(crate) fn app(socket: Socket) -> Self {
        let (rx, tx) = socket.into_split();
        Self {
            rx: Reader::App(rx),
            tx: Writer::App(tx),
            buf: BytesMut::new(),
        }
    }

    pub(crate) fn workstation(flow: Flow) -> Self {
        let (rx, tx) = flow.into_io();
        Self {
            rx: Reader::Workstation(rx),
            tx: Writer::Workstation(tx),
            buf: BytesMut::new(),
        }
    }

    pub(crate) fn is_workstation(&self) -> bool {
        matches!(self.rx, Reader::Workstation(_))
    }

    /// Ends a connection that is not needed any more as its client would: with a FIN, not a reset. A workstation is waited
    /// for, since dropping one direction of a flow resets the other.
    pub(crate) async fn close(mut self) {
        const PATIENCE: Duration = Duration::from_secs(1);
        let closed = async {
            self.tx.finish().await?;
            while self.is_workstation() && self.rx.fill(&mut self.buf).await? > 0 {
                self.buf.clear();
            }
            io::Result::Ok(())
        };
        let _ = tokio::time::timeout(PATIENCE, closed).await;
    }

    /// Whether an idle connection can take another request: nothing came, and no end.
    pub(crate) fn is_idle(&mut self) -> bool {
        if !self.buf.is_empty() {
            return false;
        }
        match &mut self.rx {
            Reader::App(rx) => rx.is_idle(),
            Reader::Workstation(rx) => {
                let (mut byte, mut cx) =
                    ([0], Context::from_waker(futures::task::noop_waker_ref()));
                let rx = std::pin::Pin::new(rx);
                rx.poll_read(&mut cx, &mut ReadBuf::new(&mut byte))
                    .is_pending()
            }
        }
    }
}

impl Reader {
    /// As [`SocketReader::fill`].
    pub(crate) async fn fill(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::App(rx) => rx.fill(buf).await,
            Self::Workstation(rx) => {
                use tokio::io::AsyncReadExt;
                buf.reserve(READ);
                rx.read_buf(&mut buf.limit(READ)).await
            }
        }
    }

    /// Resolves when an idle connection has ended, or said something nobody asked for; what it said is lost. Cancel safe.
    pub(crate) async fn stirred(&mut self) {
        match self {
            Self::App(rx) => rx.stirred().await,
            Self::Workstation(_) => drop(self.fill(&mut BytesMut::new()).await),
        }
    }

    /// To be polled while the client takes no bytes; resolves when the other side is lost meanwhile.
    pub(crate) async fn stalled(&mut self) -> io::Error {
        match self {
            // The kernel's window holds what the application sends.
            Self::App(_) => std::future::pending().await,
            Self::Workstation(rx) => rx.stalled().await,
        }
    }
}

impl Writer {
    pub(crate) async fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::App(tx) => tx.write_all(data).await,
            Self::Workstation(tx) => tx.write_all(data).await,
        }
    }

    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::App(tx) => tx.finish().await,
            Self::Workstation(tx) => tx.shutdown().await,
        }
    }
}

/// Makes the end of a connection a reset.
pub(crate) fn reset_on_close(tcp: &TcpStream) {
    // Fails only on a socket that is already gone.
    let _ = tcp.set_zero_linger();
}
