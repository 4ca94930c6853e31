//! A TCP connection of a program: first it waits for an answer, then it is a stream.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use bytes::Bytes;
use tp_netstack::{DialOutcome, FlowError, FlowId, Received};

use super::{Shared, Watch, now};

/// Bytes handed over at once.
const CHUNK: usize = 64 * 1024;

/// A flow that somebody holds. Dropping it resets what has not ended in order.
pub(super) struct Flow {
    id: FlowId,
    watch: Rc<Watch>,
    shared: Rc<Shared>,
}

impl Flow {
    pub(super) fn new(id: FlowId, watch: Rc<Watch>, shared: Rc<Shared>) -> Self {
        Self { id, watch, shared }
    }

    async fn reset(&self) {
        while !self.watch.was_reset.get() {
            self.watch.reset.notified().await;
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if !self.watch.let_go.get() {
            self.shared.forget(self.id);
        }
    }
}

/// A TCP connection that waits for an answer. Dropping it resets the connection.
pub struct Pending {
    /// The program's end.
    pub source: SocketAddr,
    /// Where it wants to go.
    pub destination: SocketAddr,
    flow: Flow,
}

impl Pending {
    pub(super) fn new(source: SocketAddr, destination: SocketAddr, flow: Flow) -> Self {
        Self {
            source,
            destination,
            flow,
        }
    }

    /// Answers the program: connected.
    ///
    /// # Errors
    /// The program has given up.
    pub fn accept(self) -> Result<Stream, FlowError> {
        self.settle(DialOutcome::Accepted)?;
        Ok(Stream {
            flow: self.flow,
            ended: Cell::default(),
        })
    }

    /// Answers the program: no.
    pub fn refuse(self, outcome: DialOutcome) {
        // Gone means that the program has given up, which is the same in the end.
        let _ = self.settle(outcome);
        self.flow.shared.flows.borrow_mut().remove(&self.flow.id);
        self.flow.watch.let_go.set(true);
    }

    /// Returns when the program has given up. Cancel safe.
    pub async fn abandoned(&self) {
        self.flow.reset().await;
    }

    fn settle(&self, outcome: DialOutcome) -> Result<(), FlowError> {
        let shared = &self.flow.shared;
        let settled = shared
            .stack
            .borrow_mut()
            .dialed(self.flow.id, outcome, now());
        shared.touched.notify_one();
        settled
    }
}

/// A TCP connection of a program. Dropping it before both directions have ended resets it.
pub struct Stream {
    flow: Flow,
    ended: Cell<Ended>,
}

/// What came of lending a stream's own memory.
pub enum Lent {
    /// It was lent, and this is what the borrower answered.
    Done(io::Result<usize>),
    /// There are no bytes, or there is no room.
    Nothing,
    /// There will be no bytes any more: the program has sent FIN, and all before it was taken.
    Finished,
}

/// What a stream holds at this moment.
enum Now {
    Bytes(Bytes),
    End,
    Nothing,
}

#[derive(Clone, Copy, Default)]
struct Ended {
    by_program: bool,
    by_us: bool,
}

impl Stream {
    /// The next bytes from the program, at most 64 KiB; `None` after its FIN. Cancel safe.
    ///
    /// # Errors
    /// The program has reset the connection, and all that came before was read.
    pub async fn read(&self) -> Result<Option<Bytes>, FlowError> {
        loop {
            match self.read_now()? {
                Now::Bytes(bytes) => return Ok(Some(bytes)),
                Now::End => return Ok(None),
                Now::Nothing => self.flow.watch.readable.notified().await,
            }
        }
    }

    fn read_now(&self) -> Result<Now, FlowError> {
        let shared = &self.flow.shared;
        let mut scratch = shared.scratch.borrow_mut();
        let received = shared.stack.borrow_mut().recv(self.flow.id, |bytes| {
            let taken = &bytes[..bytes.len().min(CHUNK)];
            if scratch.capacity() < taken.len() {
                scratch.reserve(CHUNK);
            }
            scratch.extend_from_slice(taken);
            taken.len()
        })?;
        Ok(match received {
            Received::Data(_) => {
                shared.touched.notify_one();
                Now::Bytes(scratch.split().freeze())
            }
            Received::Finished => {
                self.note(|ended| ended.by_program = true);
                Now::End
            }
            Received::Empty => Now::Nothing,
        })
    }

    /// Sends bytes to the program; returns when all are in its connection's buffer.
    ///
    /// # Errors
    /// The program has reset the connection.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), FlowError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let shared = &self.flow.shared;
            let sent = shared.stack.borrow_mut().send(self.flow.id, |space| {
                let fits = space.len().min(rest.len());
                space[..fits].copy_from_slice(&rest[..fits]);
                fits
            })?;
            if sent == 0 {
                self.flow.watch.writable.notified().await;
                continue;
            }
            rest = &rest[sent..];
            shared.touched.notify_one();
        }
        Ok(())
    }

    /// Lends the oldest bytes from the program to `take`, which answers how many it took, as a socket's write does.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn lend(&self, take: impl FnOnce(&[u8]) -> io::Result<usize>) -> Result<Lent, FlowError> {
        let shared = &self.flow.shared;
        let mut outcome = Ok(0);
        let received = shared.stack.borrow_mut().recv(self.flow.id, |bytes| {
            outcome = take(bytes);
            *outcome.as_ref().unwrap_or(&0)
        })?;
        Ok(match received {
            Received::Data(_) => {
                shared.touched.notify_one();
                Lent::Done(outcome)
            }
            Received::Finished => {
                self.note(|ended| ended.by_program = true);
                Lent::Finished
            }
            Received::Empty => Lent::Nothing,
        })
    }

    /// Lends room for bytes to the program to `fill`, which answers how many it put there, as a socket's read does.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn borrow_room(
        &self,
        fill: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> Result<Lent, FlowError> {
        let shared = &self.flow.shared;
        let mut outcome = None;
        shared.stack.borrow_mut().send(self.flow.id, |space| {
            let filled = fill(space);
            let count = *filled.as_ref().unwrap_or(&0);
            outcome = Some(filled);
            count
        })?;
        Ok(match outcome {
            Some(filled) => {
                shared.touched.notify_one();
                Lent::Done(filled)
            }
            None => Lent::Nothing,
        })
    }

    /// Returns when [`Self::lend`] may have something again after it had nothing. Cancel safe.
    pub async fn readable(&self) {
        self.flow.watch.readable.notified().await;
    }

    /// Returns when [`Self::borrow_room`] may have room again after it had none. Cancel safe.
    pub async fn writable(&self) {
        self.flow.watch.writable.notified().await;
    }

    /// Sends FIN after everything that was written.
    ///
    /// # Errors
    /// The program has reset the connection.
    pub fn finish(&self) -> Result<(), FlowError> {
        let shared = &self.flow.shared;
        let finished = shared.stack.borrow_mut().finish(self.flow.id);
        shared.touched.notify_one();
        self.note(|ended| ended.by_us = true);
        finished
    }

    /// Returns when the program has reset the connection. Cancel safe.
    pub async fn reset(&self) {
        self.flow.reset().await;
    }

    fn note(&self, change: impl FnOnce(&mut Ended)) {
        let mut ended = self.ended.get();
        change(&mut ended);
        self.ended.set(ended);
        // From here on the stack ends it by itself.
        self.flow.watch.let_go.set(ended.by_program && ended.by_us);
    }
}
