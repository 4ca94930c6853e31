//! Moves the bytes of one TCP connection of a program, to the tunnel or to a socket of the workstation.
//!
//! FIN is FIN and RST is RST, in both directions and every order. To a socket bytes go from the stack's memory without a
//! stop. The tunnel lives on other threads and takes one frame at a time; as a wake-up between threads costs more than a
//! frame, a task beside the tunnel sends them, and only a short queue crosses over.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use bytes::Bytes;
use futures::future::try_join;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tp_tunnel::{Flow, FlowError, FlowSender};

use super::shard::{Lent, Stream};

/// Moves bytes until both directions have ended. Dropping either end before that resets it.
pub(super) async fn through_tunnel(stream: Stream, flow: Flow, runtime: &Handle) {
    let (sender, mut receiver) = flow.into_split();
    let (part_tx, part_rx) = mpsc::channel(AHEAD);
    let sending = AbortOnDropHandle::new(runtime.spawn(send(sender, part_rx)));
    let down = async {
        while let Some(bytes) = receiver.recv().await? {
            stream.write(&bytes).await?;
        }
        stream.finish()?;
        Ok(())
    };
    // Either way both ends have learnt of it, now or by being dropped.
    let _ = try_join(to_tunnel(&stream, part_tx, sending), down).await;
}

/// Pieces of at most 64 KiB that wait between the threads.
const AHEAD: usize = 4;

/// What goes to the tunnel.
enum Part {
    Bytes(Bytes),
    /// The program's FIN.
    End,
}

/// Beside the tunnel: sends what comes. A queue that closes without an end is the program's reset.
async fn send(
    mut sender: FlowSender,
    mut part_rx: mpsc::Receiver<Part>,
) -> Result<FlowSender, FlowError> {
    while let Some(part) = part_rx.recv().await {
        match part {
            Part::Bytes(bytes) => match sender.send(bytes).await {
                // The peer is complete and reads no more (RFC 9113 §8.1).
                Err(FlowError::Reset(reason)) if u32::from(reason) == 0 => break,
                sent => sent?,
            },
            Part::End => {
                sender.finish()?;
                break;
            }
        }
    }
    Ok(sender)
}

/// Answers the sender, which must not go before the other direction has ended.
async fn to_tunnel(
    stream: &Stream,
    part_tx: mpsc::Sender<Part>,
    mut sending: AbortOnDropHandle<Result<FlowSender, FlowError>>,
) -> Result<FlowSender, Broken> {
    loop {
        let part = match stream.read().await {
            Ok(Some(bytes)) => Part::Bytes(bytes),
            Ok(None) => Part::End,
            Err(reset) => {
                drop(part_tx);
                let _ = tokio::time::timeout(LAST_WORDS, sending).await;
                return Err(reset.into());
            }
        };
        let is_last = matches!(part, Part::End);
        // The other end of the queue goes when sending has ended, and then says why.
        if patiently(stream, part_tx.send(part)).await?.is_err() || is_last {
            break;
        }
    }
    Ok(patiently(stream, &mut sending).await???)
}

/// How long bytes that a program sent before its reset may wait for the other side's window.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Sends, unless the program resets the connection meanwhile and the other side takes nothing.
async fn patiently<T>(stream: &Stream, sending: impl Future<Output = T>) -> Result<T, Broken> {
    let given_up = async {
        stream.reset().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        biased;
        sent = sending => Ok(sent),
        () = given_up => Err(Broken::Program),
    }
}

/// Moves bytes until both directions have ended. Dropping it before that resets both.
pub(super) async fn from_workstation(stream: Stream, origin: TcpStream) {
    // Undone only after an end in order.
    let reset = SockRef::from(&origin).set_linger(Some(Duration::ZERO));
    let ended = try_join(
        to_workstation(&stream, &origin),
        to_program(&origin, &stream),
    );
    if ended.await.is_ok() && reset.is_ok() {
        let _ = SockRef::from(&origin).set_linger(None);
    }
}

/// Bytes that one flow moves before others, and the packets that they make, get their turn. They stay in the cache for
/// that long.
const QUANTUM: usize = 256 * 1024;

/// From the stack's memory straight to the socket.
async fn to_workstation(stream: &Stream, origin: &TcpStream) -> Result<(), Broken> {
    let mut moved = 0;
    loop {
        match stream.lend(|bytes| origin.try_write(bytes))? {
            Lent::Done(Ok(written)) => moved += written,
            Lent::Done(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                patiently(stream, origin.writable()).await??;
            }
            Lent::Done(Err(error)) => return Err(error.into()),
            Lent::Nothing => stream.readable().await,
            Lent::Finished => break,
        }
        if moved >= QUANTUM {
            moved = 0;
            tokio::task::yield_now().await;
        }
    }
    SockRef::from(origin).shutdown(Shutdown::Write)?;
    Ok(())
}

/// From the socket straight to the stack's memory.
async fn to_program(origin: &TcpStream, stream: &Stream) -> Result<(), Broken> {
    let mut moved = 0;
    loop {
        match stream.borrow_room(|room| origin.try_read(room))? {
            Lent::Done(Ok(0)) => break,
            Lent::Done(Ok(read)) => moved += read,
            Lent::Done(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                origin.readable().await?;
            }
            Lent::Done(Err(error)) => return Err(error.into()),
            Lent::Nothing | Lent::Finished => stream.writable().await,
        }
        if moved >= QUANTUM {
            moved = 0;
            tokio::task::yield_now().await;
        }
    }
    stream.finish()?;
    Ok(())
}

/// Why moving bytes stopped. Both ends are reset then, whoever it was.
enum Broken {
    Program,
    Flow,
}

impl From<tp_netstack::FlowError> for Broken {
    fn from(_: tp_netstack::FlowError) -> Self {
        Self::Program
    }
}

impl From<FlowError> for Broken {
    fn from(error: FlowError) -> Self {
        tracing::debug!(%error, "flow reset");
        Self::Flow
    }
}

/// A task beside the tunnel that broke down, or the runtime's end.
impl From<tokio::task::JoinError> for Broken {
    fn from(_: tokio::task::JoinError) -> Self {
        Self::Flow
    }
}

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Self::Flow
    }
}
