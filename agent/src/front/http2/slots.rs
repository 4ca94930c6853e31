//! How many streams of one connection are served at a time.
//!
//! A stream costs memory before its first byte. A few are part of what the connection is charged, so that each connection
//! goes on whatever others do. The others share what there is for streams, and where nothing is left they wait, as they
//! would behind a lower SETTINGS_MAX_CONCURRENT_STREAMS (RFC 9113 §5.1.2).

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::Semaphore;

use crate::budget::{STREAM, Share};
use crate::front::Shared;

/// Streams of a connection that need no slot of the shared ones.
const FEW: usize = 4;

/// What those are charged.
pub(super) const CHARGE: usize = FEW * STREAM;

/// The slots of one connection.
pub(super) struct Slots {
    few: Arc<Semaphore>,
    shared: Arc<Shared>,
    /// The next stream's, which holds it for as long as it runs.
    next: Option<Share>,
    /// For a shared one, while there is none.
    waiting: Option<BoxFuture<'static, Share>>,
}

impl Slots {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            few: Arc::new(Semaphore::new(FEW)),
            shared,
            next: None,
            waiting: None,
        }
    }

    /// Ready when the next stream has a slot, which [`Self::take`] gives. Who waits asks again when one of the connection's
    /// streams has ended.
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.next.is_none() {
            let slot = match Arc::clone(&self.few).try_acquire_owned() {
                Ok(permit) => permit.into(),
                Err(_) => ready!(self.poll_shared(cx)),
            };
            self.waiting = None;
            self.next = Some(slot);
        }
        Poll::Ready(())
    }

    fn poll_shared(&mut self, cx: &mut Context<'_>) -> Poll<Share> {
        if self.waiting.is_none()
            && let Some(slot) = self.shared.budget.stream()
        {
            return Poll::Ready(slot);
        }
        let shared = &self.shared;
        let waiting = self.waiting.get_or_insert_with(|| {
            let shared = Arc::clone(shared);
            async move { shared.budget.wait_for_stream().await }.boxed()
        });
        waiting.poll_unpin(cx)
    }

    /// The slot of a stream that was taken.
    pub(super) fn take(&mut self) -> Option<Share> {
        self.next.take()
    }
}
