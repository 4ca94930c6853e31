//! Connections whose bytes are nobody's business: FIN for FIN, RST for RST, and no buffer while idle.

use std::cell::RefCell;
use std::io;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tp_tunnel::{Flow, relay};

use crate::upstream::reset_on_close;

/// Bytes moved at a time.
const PIECE: usize = 16 * 1024;

/// Moves bytes between a client and the application until both directions have ended. `early` was read from the client
/// already, `answer` from the application.
pub(crate) async fn to_app(mut client: TcpStream, mut app: TcpStream, early: Bytes, answer: Bytes) {
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

/// The same with a workstation.
pub(crate) async fn to_workstation(
    mut client: TcpStream,
    mut flow: Flow,
    early: Bytes,
    answer: Bytes,
) {
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
