//! The scheduler as tasks see it: ask for a turn, be woken, hand over a frame, give the slot back when it is written.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::flow_control::scheduler::{LaneId, SLOTS, Scheduler, Turn};

/// One per connection.
pub(crate) struct Turns {
    inner: Mutex<Inner>,
}

/// Lock order: this lock may be taken while h2 holds its own (a frame is dropped inside h2), so h2 is never called
/// under it.
struct Inner {
    scheduler: Scheduler,
    lanes: Vec<LaneTask>,
}

#[derive(Default)]
struct LaneTask {
    /// The one task that sends on this lane.
    waker: Option<Waker>,
    /// Frames handed over and not yet written.
    in_flight: u32,
    closing: bool,
}

/// One flow's place in the scheduler. Dropping it gives back whatever it holds.
pub(crate) struct Lane {
    turns: Arc<Turns>,
    id: LaneId,
}

/// A slot in use; travels inside the frame and comes back when the frame is dropped.
pub(crate) struct Slot {
    turns: Arc<Turns>,
    lane: LaneId,
}

impl Turns {
    pub(crate) fn new() -> Arc<Self> {
        let inner = Inner {
            scheduler: Scheduler::new(SLOTS),
            lanes: Vec::new(),
        };
        Arc::new(Self {
            inner: Mutex::new(inner),
        })
    }

    pub(crate) fn open(self: &Arc<Self>) -> Lane {
        let mut inner = self.lock();
        let id = inner.scheduler.open();
        if inner.lanes.len() <= id {
            inner.lanes.resize_with(id + 1, LaneTask::default);
        }
        inner.lanes[id] = LaneTask::default();
        drop(inner);
        Lane {
            turns: Arc::clone(self),
            id,
        }
    }

    /// A panic elsewhere cannot leave the state half changed: every change under the lock is complete.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn waker_of(&mut self, lane: Option<LaneId>) -> Option<Waker> {
        self.lanes[lane?].waker.take()
    }

    fn wait(&mut self, lane: LaneId, cx: &Context<'_>) {
        let waker = &mut self.lanes[lane].waker;
        if !waker
            .as_ref()
            .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *waker = Some(cx.waker().clone());
        }
    }

    fn close_when_idle(&mut self, lane: LaneId) {
        if self.lanes[lane].closing && self.lanes[lane].in_flight == 0 {
            self.scheduler.close(lane);
        }
    }
}

impl Lane {
    /// Waits for a turn to send `bytes`.
    pub(crate) fn poll_turn(&mut self, cx: &Context<'_>, bytes: usize) -> Poll<Slot> {
        let mut inner = self.turns.lock();
        let turn = match inner.scheduler.turn(self.id) {
            Turn::Idle => inner.scheduler.request(self.id, bytes),
            waiting @ (Turn::Queued(_) | Turn::Granted) => waiting,
        };
        match turn {
            Turn::Granted => {
                inner.scheduler.take(self.id);
                inner.lanes[self.id].in_flight += 1;
                Poll::Ready(Slot {
                    turns: Arc::clone(&self.turns),
                    lane: self.id,
                })
            }
            Turn::Idle | Turn::Queued(_) => {
                inner.wait(self.id, cx);
                Poll::Pending
            }
        }
    }

    /// Waits until every frame handed over was written to the carrier.
    pub(crate) fn poll_written(&mut self, cx: &Context<'_>) -> Poll<()> {
        let mut inner = self.turns.lock();
        if inner.lanes[self.id].in_flight == 0 {
            return Poll::Ready(());
        }
        inner.wait(self.id, cx);
        Poll::Pending
    }

    /// Gives up a turn that was asked for and not used.
    pub(crate) fn cancel(&mut self) {
        let mut inner = self.turns.lock();
        let next = inner.scheduler.cancel(self.id);
        let waker = inner.waker_of(next);
        drop(inner);
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.cancel();
        let mut inner = self.turns.lock();
        inner.lanes[self.id].closing = true;
        inner.lanes[self.id].waker = None;
        inner.close_when_idle(self.id);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut inner = self.turns.lock();
        let task = &mut inner.lanes[self.lane];
        task.in_flight -= 1;
        let written = if task.in_flight == 0 {
            task.waker.take()
        } else {
            None
        };
        let next = inner.scheduler.release();
        let next = inner.waker_of(next);
        inner.close_when_idle(self.lane);
        drop(inner);
        // Waking a task that waits for its turn and not for this is harmless: it polls and waits again.
        written.into_iter().chain(next).for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use futures::task::noop_waker_ref;

    use super::*;

    #[test]
    fn a_dropped_waiter_holds_nothing() {
        let turns = Turns::new();
        let cx = Context::from_waker(noop_waker_ref());
        let mut lanes: Vec<_> = (0..4).map(|_| turns.open()).collect();
        let slots: Vec<_> = lanes
            .iter_mut()
            .take(2)
            .map(|lane| lane.poll_turn(&cx, 10))
            .collect();
        assert!(slots.iter().all(Poll::is_ready));
        assert!(lanes[2].poll_turn(&cx, 10).is_pending());
        assert!(lanes[3].poll_turn(&cx, 10).is_pending());
        drop(lanes.remove(2));
        drop(slots);
        assert!(lanes[2].poll_turn(&cx, 10).is_ready());
        assert!(lanes[0].poll_written(&cx).is_ready());
    }
}
