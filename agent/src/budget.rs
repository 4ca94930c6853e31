//! The memory that traffic may hold. Strangers decide how much traffic there is; the pod's memory is not theirs.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What connections hold for parsing, in all. With the binary, the tunnel and opaque connections it stays within the
/// agent's 48 MiB.
pub const PARSING: usize = 24 << 20;

/// Connections at a time, opaque ones included; each opaque one may hold two small buffers.
pub const CONNECTIONS: usize = 1024;

/// HTTP/2 streams at a time, of all connections, beside the few that each one may always have.
pub const STREAMS: usize = 768;

/// What one of them takes before its first byte: our task, its state in h2 on both sides, its heads.
pub const STREAM: usize = 8 << 10;

/// What one HTTP/1 exchange is charged: a buffer for each direction and their heads.
pub const EXCHANGE: usize = 48 << 10;

/// What a head that is larger than usual, or a body that is looked into, is charged beside it.
pub const LARGE: usize = 128 << 10;

/// Shared by all connections.
#[derive(Debug)]
pub struct Budget {
    parsing: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

/// A part of the budget; dropping it gives it back.
#[derive(Debug)]
pub struct Share(#[expect(dead_code, reason = "held for its Drop")] OwnedSemaphorePermit);

impl From<OwnedSemaphorePermit> for Share {
    fn from(permit: OwnedSemaphorePermit) -> Self {
        Self(permit)
    }
}

const UNIT: usize = 1024;

impl Default for Budget {
    fn default() -> Self {
        Self {
            parsing: Arc::new(Semaphore::new(PARSING / UNIT)),
            streams: Arc::new(Semaphore::new(STREAMS)),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
        }
    }
}

impl Budget {
    /// `None` when so much is not left. Who gets none must not wait: it passes traffic on unparsed.
    pub fn take(&self, bytes: usize) -> Option<Share> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        let permit = Arc::clone(&self.parsing).try_acquire_many_owned(units);
        permit.ok().map(Share)
    }

    /// The same for what can be done without: half of all stays for who else comes.
    pub fn take_spare(&self, bytes: usize) -> Option<Share> {
        let left = self.parsing.available_permits() * UNIT;
        match left.checked_sub(bytes) {
            Some(rest) if rest >= PARSING / 2 => self.take(bytes),
            Some(_) | None => None,
        }
    }

    /// A slot for one more stream.
    pub fn stream(&self) -> Option<Share> {
        let permit = Arc::clone(&self.streams).try_acquire_owned();
        permit.ok().map(Share)
    }

    /// The same for who waits until there is one: first come, first served. Cancel safe, but for the place in the queue.
    pub async fn wait_for_stream(&self) -> Share {
        match Arc::clone(&self.streams).acquire_owned().await {
            Ok(permit) => Share(permit),
            // It is never closed.
            Err(_) => std::future::pending().await,
        }
    }

    /// A place for one more connection.
    pub fn connection(&self) -> Option<Share> {
        let permit = Arc::clone(&self.connections).try_acquire_owned();
        permit.ok().map(Share)
    }

    /// Whether new connections had better not come here: few places are left.
    pub fn is_strained(&self) -> bool {
        self.connections.available_permits() < CONNECTIONS / 16
    }
}
