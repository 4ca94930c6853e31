//! Requests that were an intercept's, on their way from the agents to whoever watches.
//!
//! An agent offers to tell them ([`tp_manager_api::sighting`]); that is taken while a command watches, and refused
//! otherwise. What the command does not read in time, it misses.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio_util::sync::CancellationToken;
use tp_manager_api::sighting::{LINE_MAX, Sighting};
use tp_tunnel::Incoming;

use super::control::{read_line, write_line};
use super::held::hung_up;
use super::intercepts::Intercepts;

/// What is kept for a command that reads slowly.
const KEPT: usize = 256;

/// Sightings of one intercept. Clones share it.
#[derive(Clone, Debug)]
pub struct Sightings(broadcast::Sender<Sighting>);

impl Default for Sightings {
    fn default() -> Self {
        Self(broadcast::Sender::new(KEPT))
    }
}

impl Sightings {
    fn is_watched(&self) -> bool {
        self.0.receiver_count() > 0
    }
}

/// Takes what an agent offers to tell, for as long as somebody watches.
pub(super) async fn receive(incoming: Incoming, sightings: Sightings) {
    if !sightings.is_watched() {
        return incoming.refuse().await;
    }
    let Ok(flow) = incoming.opened().await else {
        return;
    };
    // Dropping it is how the agent hears that nobody watches any more.
    let (reader, _writer) = flow.into_io();
    let mut lines = BufReader::new(reader);
    while let Ok(Some(sighting)) = next(&mut lines).await {
        if sightings.0.send(sighting).is_err() {
            return;
        }
    }
}

/// The next one; `None` at the end. Not cancel safe.
async fn next(lines: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> io::Result<Option<Sighting>> {
    let mut line = Vec::new();
    let mut bounded = lines.take(LINE_MAX as u64);
    match bounded.read_until(b'\n', &mut line).await? {
        0 => Ok(None),
        _ => Ok(Some(serde_json::from_slice(&line)?)),
    }
}

/// The daemon's end of a command that watches an intercept, until that is left or the command has gone.
pub(super) async fn serve(
    stream: UnixStream,
    name: String,
    intercepts: Arc<Intercepts>,
    stop: CancellationToken,
) {
    let Some(Sightings(sightings)) = intercepts.sightings(&name) else {
        return;
    };
    let mut sightings_rx = sightings.subscribe();
    // The intercept's end is the end of its senders.
    drop((sightings, intercepts));
    let mut stream = BufReader::new(stream);
    // What is said before the command has spoken would be lost with its buffer.
    let begun = async {
        let Begin = read_line(&mut stream).await?;
        write_line(&mut stream, &Begin).await
    };
    if begun.await.is_err() {
        return;
    }
    loop {
        let sighting = tokio::select! {
            sighting = sightings_rx.recv() => match sighting {
                Ok(sighting) => sighting,
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            },
            () = hung_up(&mut stream) => return,
            () = stop.cancelled() => return,
        };
        if write_line(&mut stream, &sighting).await.is_err() {
            return;
        }
    }
}

/// Said by the command, then by the daemon: from here on nothing is missed, but for what is read too slowly.
#[derive(Debug, Serialize, Deserialize)]
struct Begin;

/// The command's end.
#[derive(Debug)]
pub struct Watch(BufReader<UnixStream>);

impl Watch {
    pub(super) async fn begin(stream: UnixStream) -> io::Result<Self> {
        let mut stream = BufReader::new(stream);
        write_line(&mut stream, &Begin).await?;
        let Begin = read_line(&mut stream).await?;
        Ok(Self(stream))
    }

    /// The next one; `None` once the intercept was left, or the daemon has gone. Not cancel safe: a dropped call may have
    /// taken a part of it.
    pub async fn next(&mut self) -> Option<Sighting> {
        read_line(&mut self.0).await.ok()
    }
}
