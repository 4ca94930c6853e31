//! Connections whose bytes are nobody's business: FIN for FIN, RST for RST, and no buffer of ours while idle.

use std::cell::RefCell;
use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tp_tunnel::{Flow, relay};

use crate::socket::Socket;
use crate::upstream::{Reader, Upstream, Writer, reset_on_close};

/// Bytes moved at a time.
const PIECE: usize = 16 * 1024;

/// Moves bytes between a client and whoever serves it until both directions have ended. `early` was read from the client
/// already, what stands in `upstream.buf` from the other side.
pub(crate) async fn join(client: Socket, upstream: Upstream, early: Bytes) {
    let Upstream { rx, tx, buf } = upstream;
    match (client, rx, tx) {
        (Socket::Tcp(client), Reader::Workstation(rx), Writer::Workstation(tx)) => {
            to_workstation(client, Flow::from_io(rx, tx), early, buf.freeze()).await;
        }
        (Socket::Tcp(client), Reader::App(rx), Writer::App(tx)) => match Socket::reunite(rx, tx) {
            Some(Socket::Tcp(app)) => to_app(client, app, early, buf.freeze()).await,
            Some(Socket::Tls(_)) | None => reset_on_close(&client),
        },
        (client, rx, tx) => decrypted(client, Upstream { rx, tx, buf }, early).await,
    }
}

async fn to_app(mut client: TcpStream, mut app: TcpStream, early: Bytes, answer: Bytes) {
    let moved = async {
        app.write_all(&early).await?;
        client.write_all(&answer).await?;
        // The connection may go on for days.
        drop((early, answer));
        let ((client_rx, client_tx), (app_rx, app_tx)) = (client.split(), app.split());
        tokio::try_join!(pump(client_rx, app_tx), pump(app_rx, client_tx))
    }
    .await;
    if let Err(error) = moved {
        tracing::debug!(%error, "opaque connection reset");
        reset_on_close(&client);
        reset_on_close(&app);
    }
}

async fn to_workstation(mut client: TcpStream, mut flow: Flow, early: Bytes, answer: Bytes) {
    let sent = async {
        client.write_all(&answer).await?;
        drop(answer);
        match early.is_empty() {
            true => Ok(()),
            false => flow.send(early).await.map_err(io::Error::other),
        }
    }
    .await;
    match sent {
        Ok(()) => drop(relay(flow, client).await),
        Err(_) => {
            reset_on_close(&client);
            flow.reset().await;
        }
    }
}

/// The same for what the agent has decrypted.
async fn decrypted(client: Socket, upstream: Upstream, early: Bytes) {
    let (mut client_rx, mut client_tx) = client.into_split();
    let (mut rx, mut tx) = (upstream.rx, upstream.tx);
    let moved = async {
        let there = async {
            tx.write_all(&early).await?;
            drop(early);
            let mut buf = BytesMut::new();
            while client_rx.fill(&mut buf).await? > 0 {
                tx.write_all(&buf).await?;
                buf = BytesMut::new();
            }
            tx.finish().await
        };
        let back = async {
            let mut buf = upstream.buf;
            loop {
                tokio::select! {
                    biased;
                    written = client_tx.write_all(&buf) => written?,
                    error = rx.stalled() => return Err(error),
                }
                buf = BytesMut::new();
                if rx.fill(&mut buf).await? == 0 {
                    return client_tx.finish().await;
                }
            }
        };
        tokio::try_join!(there, back)
    }
    .await;
    if let Err(error) = moved {
        tracing::debug!(%error, "opaque connection inside of TLS reset");
        client_rx.reset_on_close();
        // A flow is reset by being dropped.
        if let Reader::App(rx) = &rx {
            rx.reset_on_close();
        }
    }
}

async fn pump(rx: ReadHalf<'_>, mut tx: WriteHalf<'_>) -> io::Result<()> {
    loop {
        rx.readable().await?;
        match piece(&rx, &tx) {
            Ok(Piece::End) => return tx.shutdown().await,
            Ok(Piece::Moved) => {}
            Ok(Piece::Left(rest)) => tx.write_all(&rest).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

enum Piece {
    End,
    Moved,
    /// The other side took no more than a part.
    Left(Box<[u8]>),
}

thread_local! {
    static SCRATCH: RefCell<[u8; PIECE]> = const { RefCell::new([0; PIECE]) };
}

fn piece(rx: &ReadHalf<'_>, tx: &WriteHalf<'_>) -> io::Result<Piece> {
    SCRATCH.with_borrow_mut(|scratch| {
        let size = match rx.try_read(scratch)? {
            0 => return Ok(Piece::End),
            size => size,
        };
        let written = match tx.try_write(&scratch[..size]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            written => written?,
        };
        Ok(match written == size {
            true => Piece::Moved,
            false => Piece::Left(scratch[written..size].into()),
        })
    })
}
