//! Bytes that were handed to h2 and wait to be written.
//!
//! h2 takes as much as its peer's windows allow and holds it for as long as the peer does not read; a hostile peer opens
//! its windows wide and reads nothing. So what waits is counted for each connection: every piece takes room, and gives it
//! back when it was written.

use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::intake::Intake;

/// Bytes that may wait in one connection, in one direction.
pub(super) const QUEUE: usize = 32 * 1024;

/// Room of one direction of a connection; its streams share it.
#[derive(Clone, Debug)]
pub(super) struct Queue(Arc<Semaphore>);

/// Room for one piece, or more than it needs.
#[derive(Debug)]
pub(super) struct Room {
    size: usize,
    permit: Option<OwnedSemaphorePermit>,
}

/// A piece with its room.
#[derive(Debug)]
pub(super) struct Queued {
    data: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(QUEUE)))
    }

    /// Waits for room, at most [`QUEUE`] bytes. Cancel safe.
    pub(super) async fn room(&self, size: usize) -> Room {
        let size = size.min(QUEUE);
        let permits = u32::try_from(size).unwrap_or_default();
        // It is never closed.
        let permit = Arc::clone(&self.0).acquire_many_owned(permits).await.ok();
        Room { size, permit }
    }
}

impl Room {
    /// A piece of what waits.
    pub(super) fn of(self, intake: &mut Intake) -> Queued {
        Queued {
            data: intake.take(self.size),
            _room: self.permit,
        }
    }
}

/// A few bytes of our own, or none: they need no room.
impl From<Bytes> for Queued {
    fn from(data: Bytes) -> Self {
        Self { data, _room: None }
    }
}

impl Buf for Queued {
    fn remaining(&self) -> usize {
        self.data.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.data.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.data.advance(count);
    }
}
