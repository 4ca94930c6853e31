//! The sockets around [`Direction`]: accepts, dials the target, and moves bytes under the current conditions.
//!
//! It decides nothing about time; the link does. One task a connection; a change of the cut state reaches all of them
//! through a watch channel.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::link::{Conditions, Direction};

/// How a cut shows itself to both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Connections are reset.
    Reset,
    /// Bytes vanish, and nobody is told.
    Silent,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    conditions: Conditions,
    cut: Option<Cut>,
    /// Counts the orders to reset; a connection that sees it change resets itself.
    epoch: u64,
}

/// The relay and its controls.
pub(crate) struct Relay {
    target: SocketAddr,
    seed: AtomicU64,
    state: watch::Sender<State>,
}

impl Relay {
    /// A relay to `target` whose jitter is drawn from `seed`.
    pub(crate) fn new(target: SocketAddr, seed: u64) -> Self {
        Self {
            target,
            seed: AtomicU64::new(seed),
            state: watch::Sender::new(State::default()),
        }
    }

    /// Changes delay, jitter or rate for every connection.
    pub(crate) fn set(
        &self,
        change: impl FnOnce(Conditions) -> anyhow::Result<Conditions>,
    ) -> anyhow::Result<()> {
        let conditions = change(self.state.borrow().conditions)?;
        self.state
            .send_modify(|state| state.conditions = conditions);
        Ok(())
    }

    /// Cuts the link, or ends a cut. Both ways, what a silent cut touched is reset when it ends.
    pub(crate) fn cut(&self, cut: Option<Cut>) -> anyhow::Result<()> {
        self.state.send_modify(|state| {
            state.cut = cut;
            state.epoch += u64::from(cut != Some(Cut::Silent));
        });
        Ok(())
    }

    /// Resets every connection once.
    pub(crate) fn drop_connections(&self) -> anyhow::Result<()> {
        self.state.send_modify(|state| state.epoch += 1);
        Ok(())
    }

    /// Accepts for ever.
    pub(crate) async fn serve(&self, listener: TcpListener) -> io::Result<()> {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (client, _) = accepted?;
                    let seed = self.seed.fetch_add(2, Ordering::Relaxed);
                    connections.spawn(connection(client, self.target, seed, self.state.subscribe()));
                }
                Some(ended) = connections.join_next() => ended.map_err(io::Error::other)?,
            }
        }
    }
}

async fn connection(
    mut client: TcpStream,
    target: SocketAddr,
    seed: u64,
    mut state: watch::Receiver<State>,
) {
    let epoch = state.borrow().epoch;
    if state.borrow().cut == Some(Cut::Reset) {
        return reset(&client);
    }
    let Ok(mut server) = TcpStream::connect(target).await else {
        return reset(&client);
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (up_state, down_state) = (state.clone(), state.clone());
    {
        let (client_read, client_write) = client.split();
        let (server_read, server_write) = server.split();
        let both = async {
            tokio::join!(
                pump(client_read, server_write, Direction::new(seed), up_state),
                pump(
                    server_read,
                    client_write,
                    Direction::new(seed + 1),
                    down_state
                )
            )
        };
        tokio::select! {
            (up, down) = both => if up.is_ok() && down.is_ok() { return },
            _ = state.wait_for(|state| state.epoch != epoch) => {}
        }
    }
    reset(&client);
    reset(&server);
}

/// Makes the coming close of `stream` a RST.
fn reset(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

/// Moves one direction until its end has been passed on. At most `QUEUE` bytes are on the way at once.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut direction: Direction,
    mut state: watch::Receiver<State>,
) -> io::Result<()> {
    const PIECE: usize = 16 * 1024;
    const QUEUE: usize = 16 * 1024 * 1024;
    let (mut queue, mut queued) = (VecDeque::<(Instant, Vec<u8>)>::new(), 0);
    let (mut buffer, mut ended) = (vec![0; PIECE], false);
    loop {
        let (conditions, silent) = {
            let state = state.borrow_and_update();
            (state.conditions, state.cut == Some(Cut::Silent))
        };
        if silent {
            state.changed().await.map_err(io::Error::other)?;
            continue;
        }
        if ended && queue.is_empty() {
            return to.shutdown().await;
        }
        let due = queue.front().map_or(Duration::MAX, |(at, _)| {
            at.saturating_duration_since(Instant::now())
        });
        tokio::select! {
            biased;
            _ = state.changed() => {}
            () = sleep(due), if !queue.is_empty() => {
                let (_, piece) = queue.pop_front().expect("the queue was not empty");
                queued -= piece.len();
                to.write_all(&piece).await?;
            }
            read = from.read(&mut buffer), if !ended && queued < QUEUE => {
                let len = read?;
                ended = len == 0;
                queued += len;
                if !ended {
                    queue.push_back((direction.arrival(Instant::now(), len, conditions), buffer[..len].to_vec()));
                }
            }
        }
    }
}

/// Sleeps to the microsecond where it can: tokio's timer has a grain of 1 ms, too coarse for a narrow link.
async fn sleep(time: Duration) {
    if time > Duration::from_millis(1) {
        tokio::time::sleep(time - Duration::from_millis(1)).await;
    } else if !time.is_zero() {
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A relay with an echo server behind it; the relay runs until the test's runtime ends.
    async fn relay() -> (std::sync::Arc<Relay>, SocketAddr) {
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = echo.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = echo.accept().await.unwrap();
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, relay) = (
            listener.local_addr().unwrap(),
            std::sync::Arc::new(Relay::new(target, 1)),
        );
        let server = relay.clone();
        tokio::spawn(async move { server.serve(listener).await });
        (relay, address)
    }

    async fn round_trip(stream: &mut TcpStream) -> io::Result<Duration> {
        let (start, mut byte) = (Instant::now(), [0]);
        stream.write_all(b"x").await?;
        stream.read_exact(&mut byte).await?;
        Ok(start.elapsed())
    }

    #[tokio::test]
    async fn delay_is_added_once_each_way() {
        let (relay, address) = relay().await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        round_trip(&mut stream).await.unwrap();
        relay
            .set(|c| {
                Ok(Conditions {
                    delay: Duration::from_millis(40),
                    ..c
                })
            })
            .unwrap();
        let time = round_trip(&mut stream).await.unwrap().as_millis();
        assert!((78..160).contains(&time), "{time} ms");
    }

    #[tokio::test]
    async fn bytes_arrive_whole_and_half_close_passes() {
        let (_relay, address) = relay().await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
        let (mut read, mut write) = stream.split();
        let mut received = Vec::new();
        let (wrote, got) = tokio::join!(
            async {
                write.write_all(&sent).await?;
                write.shutdown().await
            },
            read.read_to_end(&mut received)
        );
        wrote.unwrap();
        got.unwrap();
        assert!(
            received == sent,
            "{} of {} bytes",
            received.len(),
            sent.len()
        );
    }

    #[tokio::test]
    async fn a_reset_cut_resets_old_connections_and_new_ones_until_healed() {
        let (relay, address) = relay().await;
        let mut old = TcpStream::connect(address).await.unwrap();
        round_trip(&mut old).await.unwrap();
        relay.cut(Some(Cut::Reset)).unwrap();
        assert_eq!(
            old.read(&mut [0]).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionReset
        );
        let mut new = TcpStream::connect(address).await.unwrap();
        assert!(round_trip(&mut new).await.is_err());
        relay.cut(None).unwrap();
        round_trip(&mut TcpStream::connect(address).await.unwrap())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_silent_cut_says_nothing() {
        let (relay, address) = relay().await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        round_trip(&mut stream).await.unwrap();
        relay.cut(Some(Cut::Silent)).unwrap();
        let mute = tokio::time::timeout(Duration::from_millis(300), round_trip(&mut stream)).await;
        assert!(mute.is_err(), "a silent cut answered: {mute:?}");
    }
}
