//! What slow readers hold, as tasks see it.
//!
//! The connection's window must grow by these bytes, or one stalled reader would use up the window of all flows. Only a
//! flow whose socket takes no more bytes touches this, so the lock is off the fast path.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures::task::AtomicWaker;

use crate::flow_control::window::Held;

/// One per connection.
pub(crate) struct Holds {
    inner: Mutex<Inner>,
    /// Copy of the total for the driver.
    total: AtomicU64,
    /// The total that the driver has already turned into window.
    applied: AtomicU64,
    driver: AtomicWaker,
}

struct Inner {
    held: Held,
    wakers: HashMap<u64, Waker>,
}

/// The driver is woken when the total moved by this many bytes.
const STEP: u64 = 256 * 1024;

/// One flow that is behind. Dropping it says that the flow caught up or ended.
pub(crate) struct Hold {
    holds: Arc<Holds>,
    flow: u64,
}

impl Holds {
    pub(crate) fn new(max: u32) -> Arc<Self> {
        let inner = Inner {
            held: Held::new(max.into()),
            wakers: HashMap::new(),
        };
        Arc::new(Self {
            inner: Mutex::new(inner),
            total: AtomicU64::new(0),
            applied: AtomicU64::new(0),
            driver: AtomicWaker::new(),
        })
    }

    pub(crate) fn begin(self: &Arc<Self>) -> Hold {
        let flow = self.lock().held.begin();
        Hold {
            holds: Arc::clone(self),
            flow,
        }
    }

    /// The driver takes note of the total and is woken when it has moved on.
    pub(crate) fn total(&self, cx: &Context<'_>) -> u64 {
        self.driver.register(cx.waker());
        let total = self.total.load(Ordering::Acquire);
        self.applied.store(total, Ordering::Release);
        total
    }

    /// The total, without taking note of it.
    pub(crate) fn peek(&self) -> u64 {
        self.total.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, total: u64) {
        self.total.store(total, Ordering::Release);
        if total.abs_diff(self.applied.load(Ordering::Acquire)) >= STEP {
            self.driver.wake();
        }
    }
}

impl Hold {
    /// Reports what the flow holds. Ready when the flow must be reset because it was the slowest.
    pub(crate) fn poll_update(&self, cx: &Context<'_>, bytes: usize) -> Poll<()> {
        let mut inner = self.holds.lock();
        inner.held.set(self.flow, bytes as u64);
        inner.wakers.insert(self.flow, cx.waker().clone());
        let mut evicted = Vec::new();
        while let Some(flow) = inner.held.evict() {
            evicted.extend(inner.wakers.remove(&flow));
        }
        let gone = !inner.held.contains(self.flow);
        self.holds.changed(inner.held.total());
        drop(inner);
        evicted.into_iter().for_each(Waker::wake);
        if gone { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut inner = self.holds.lock();
        inner.held.end(self.flow);
        let waker = inner.wakers.remove(&self.flow);
        self.holds.changed(inner.held.total());
        drop(inner);
        drop(waker);
    }
}
