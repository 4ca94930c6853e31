//! How much one side of a connection may send before we take more: its window, beside what already waits here.
//!
//! HTTP/2 has a window for each stream and one for all of them (RFC 9113 §5.2). With the latter alone, bodies that one
//! stream's peer does not take would use up what every other stream needs, and so would make requests wait that are
//! somebody else's. So the connection's window does not count what waits: it grows by that much and shrinks with it, and
//! what the sender may still send stays the same. What waits is bounded by the streams' own windows, and is charged.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::Context;

use futures::task::AtomicWaker;

use crate::budget::Share;
use crate::front::Shared;

/// Bytes by which a window grows and shrinks.
const STEP: usize = 16 * 1024;

/// What waits of all the streams of one side, in bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Backlog(Arc<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    bytes: AtomicUsize,
    /// Steps when the window was fitted last.
    fitted: AtomicUsize,
    /// Who drives the connection.
    driver: AtomicWaker,
}

impl Backlog {
    pub(super) fn add(&self, bytes: usize) {
        let waiting = self.0.bytes.fetch_add(bytes, Relaxed) + bytes;
        if waiting / STEP > self.0.fitted.load(Relaxed) {
            self.0.driver.wake();
        }
    }

    /// The window shrinks before the next byte of it is granted, so nobody needs to be woken.
    pub(super) fn remove(&self, bytes: usize) {
        self.0.bytes.fetch_sub(bytes, Relaxed);
    }
}

/// The window of a connection.
pub(super) struct Window {
    size: u32,
    backlog: Backlog,
    shared: Arc<Shared>,
    /// A step each.
    steps: Vec<Share>,
}

impl Window {
    /// A connection begins with `size`.
    pub(super) fn new(size: u32, backlog: Backlog, shared: Arc<Shared>) -> Self {
        Self {
            size,
            backlog,
            shared,
            steps: Vec::new(),
        }
    }

    /// What the window must be from now on, if that has changed. To be called each time before the connection is polled,
    /// in the task that moves its bodies: in between no frame leaves. Wakes that task when the window is to grow.
    pub(super) fn fit(&mut self, cx: &Context<'_>) -> Option<u32> {
        let Waiting {
            bytes,
            fitted,
            driver,
        } = &*self.backlog.0;
        driver.register(cx.waker());
        let before = self.steps.len();
        let wanted = bytes.load(Relaxed) / STEP;
        fitted.store(wanted, Relaxed);
        self.steps.truncate(wanted);
        while self.steps.len() < wanted
            && let Some(share) = self.shared.budget.take_spare(STEP)
        {
            self.steps.push(share);
        }
        let now = self.steps.len();
        let more = u32::try_from(now * STEP).ok()?;
        (now != before).then(|| self.size.saturating_add(more))
    }
}
