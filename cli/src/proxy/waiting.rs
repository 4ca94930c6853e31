//! Bounds the connections that have not said yet what they want.
//!
//! A client that opens connections and says nothing holds descriptors and memory for the handshake timeout. At the
//! limit the oldest such connection gives way: honest clients speak within milliseconds and are never the oldest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;

use tokio::sync::Notify;

/// Handshakes under way.
#[derive(Debug)]
pub(super) struct Waiting {
    limit: usize,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    waiting: BTreeMap<u64, Arc<Notify>>,
}

impl Waiting {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            queue: Mutex::default(),
        }
    }

    /// Runs a handshake; `None` when it had to give way. Cancel safe.
    pub(super) async fn run<F: Future>(&self, handshake: F) -> Option<F::Output> {
        let (ticket, evicted) = self.enter();
        tokio::select! {
            biased;
            output = handshake => Some(output),
            () = evicted.notified() => {
                drop(ticket);
                None
            }
        }
    }

    /// Ends the oldest handshake, for example to get its descriptor back.
    pub(super) fn evict_oldest(&self) {
        if let Some((_, oldest)) = self.queue().waiting.pop_first() {
            oldest.notify_one();
        }
    }

    fn enter(&self) -> (Ticket<'_>, Arc<Notify>) {
        if self.queue().waiting.len() >= self.limit {
            self.evict_oldest();
        }
        let evicted = Arc::new(Notify::new());
        let mut queue = self.queue();
        let number = queue.next;
        queue.next += 1;
        queue.waiting.insert(number, evicted.clone());
        drop(queue);
        (
            Ticket {
                number,
                waiting: self,
            },
            evicted,
        )
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

struct Ticket<'a> {
    number: u64,
    waiting: &'a Waiting,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.waiting.queue().waiting.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn the_oldest_gives_way_at_the_limit_and_places_are_returned() {
        let waiting = Waiting::new(2);
        let mut oldest = Box::pin(waiting.run(pending::<()>()));
        let mut younger = Box::pin(waiting.run(pending::<()>()));
        assert!(futures::poll!(&mut oldest).is_pending());
        assert!(futures::poll!(&mut younger).is_pending());

        assert_eq!(waiting.run(async { 7 }).await, Some(7));

        assert_eq!(oldest.await, None);
        assert!(futures::poll!(&mut younger).is_pending());
        drop(younger);
        assert!(waiting.queue().waiting.is_empty());
    }
}
