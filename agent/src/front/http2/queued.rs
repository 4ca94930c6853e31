//! Bytes that were handed to h2 and wait to be written.
//!
//! h2 takes as much as its peer's windows allow and holds it for as long as the peer does not read; a hostile peer opens
//! its windows wide and reads nothing. So what waits is counted for each connection: every piece takes room, and gives it
//! back when it was written.

use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that may wait in one connection, in one direction.
pub(super) const QUEUE: usize = 32 * 1024;

/// Room of one direction of a connection; its streams share it.
#[derive(Clone, Debug)]
pub(super) struct Queue(Arc<Semaphore>);

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

    /// Waits for room. `data` is at most [`QUEUE`] bytes. Cancel safe, but for the data.
    pub(super) async fn put(&self, data: Bytes) -> Queued {
        let size = u32::try_from(data.len().min(QUEUE)).unwrap_or_default();
        let room = Arc::clone(&self.0).acquire_many_owned(size).await;
        // It is never closed.
        Queued {
            data,
            _room: room.ok(),
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
