//! One userspace TCP/IP stack and the device under it, as connections that tasks can read and write.
//!
//! [`Pump`] moves packets between device and stack; [`Shard`] hands out what programs open. Everything belongs to one
//! thread: the stack is borrowed for single calls, never across an `await`. It knows neither tunnel nor names.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc};
use tp_netstack::{
    AssociationId, Config, DeviceOffload, DialOutcome, EchoRequest, Event, FlowError, FlowId,
    Offload, Received, Stack, Unreachable,
};

use super::device::{BUFFER, Device, HEADROOM, MTU};
use super::sys;

/// Packets read or written before tasks get their turn, and bytes: what is read shall still be in the cache when it is
/// passed on.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 256 * 1024;

/// Datagrams of one association that wait for whoever carries them; more are dropped, as UDP would.
const DATAGRAMS: usize = 256;

/// Bytes handed over at once.
const CHUNK: usize = 64 * 1024;

/// What a program opened.
pub enum Incoming {
    /// A TCP connection.
    Tcp(Pending),
    /// Datagrams between two addresses.
    Udp(Association),
    /// A ping.
    Echo(EchoRequest),
}

/// The programs' side of the network.
#[derive(Clone)]
pub struct Shard(Rc<Shared>);

struct Shared {
    stack: RefCell<Stack>,
    flows: RefCell<HashMap<FlowId, Rc<Watch>>>,
    associations: RefCell<HashMap<AssociationId, mpsc::Sender<Bytes>>>,
    incoming: RefCell<VecDeque<Incoming>>,
    came: Notify,
    /// A call has left the stack with something to send.
    touched: Notify,
    scratch: RefCell<BytesMut>,
}

/// What a flow's tasks wait for.
#[derive(Default)]
struct Watch {
    readable: Notify,
    writable: Notify,
    reset: Notify,
    was_reset: Cell<bool>,
    /// Nobody waits any more; a reset has to be acknowledged for it.
    let_go: Cell<bool>,
}

/// Moves packets. Nothing happens unless [`Pump::run`] is polled.
pub struct Pump {
    device: Box<dyn Device>,
    descriptor: AsyncFd<OwnedFd>,
    shared: Rc<Shared>,
    inbound: Vec<u8>,
    outbound: Vec<u8>,
    /// A packet that the device did not take yet.
    waiting: Option<(usize, Offload)>,
}

/// Puts a stack on a device.
///
/// # Errors
/// The device cannot be waited for.
pub fn open(device: Box<dyn Device>, descriptor: OwnedFd) -> io::Result<(Shard, Pump)> {
    let config = Config {
        mtu: MTU,
        offload: DeviceOffload {
            checksum: true,
            tso4: true,
            tso6: true,
        },
        seed: rand::random(),
        ..Config::default()
    };
    let shared = Rc::new(Shared {
        stack: RefCell::new(Stack::new(config, now())),
        flows: RefCell::default(),
        associations: RefCell::default(),
        incoming: RefCell::default(),
        came: Notify::new(),
        touched: Notify::new(),
        scratch: RefCell::default(),
    });
    let pump = Pump {
        device,
        descriptor: sys::watch(descriptor)?,
        shared: Rc::clone(&shared),
        inbound: vec![0; BUFFER],
        outbound: vec![0; BUFFER],
        waiting: None,
    };
    Ok((Shard(shared), pump))
}

/// The stack's clock.
fn now() -> Instant {
    Instant::now()
}

impl Shard {
    /// What a program opened next. Cancel safe.
    pub async fn incoming(&self) -> Incoming {
        loop {
            if let Some(incoming) = self.0.incoming.borrow_mut().pop_front() {
                return incoming;
            }
            self.0.came.notified().await;
        }
    }

    /// Answers a ping, or says that nobody is there.
    pub fn answer(&self, request: &EchoRequest, reached: Result<(), Unreachable>) {
        let mut stack = self.0.stack.borrow_mut();
        match reached {
            Ok(()) => stack.echo(request),
            Err(why) => stack.echo_unreachable(request, why),
        }
        self.0.touched.notify_one();
    }
}

impl Pump {
    /// Runs until the device fails, which is when its namespace has gone.
    pub async fn run(&mut self) -> io::Error {
        loop {
            if let Err(error) = self.turn().await {
                return error;
            }
        }
    }

    /// Sends what the stack has to say last, such as the resets of flows that were dropped. Never waits.
    pub fn flush(&mut self) {
        while let Ok(Sent::Batch) = self.write_batch(now()) {}
    }

    async fn turn(&mut self) -> io::Result<()> {
        let begun = now();
        let more_to_read = self.read_batch(begun)?;
        self.shared.tell();
        let sent = self.write_batch(begun)?;
        self.shared.tell();
        if more_to_read || sent == Sent::Batch {
            tokio::task::yield_now().await;
            return Ok(());
        }
        let due = self.shared.stack.borrow().poll_timeout();
        let timer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        let blocked = sent == Sent::Blocked;
        tokio::select! {
            ready = self.descriptor.readable() => drop(ready?),
            ready = self.descriptor.writable(), if blocked => drop(ready?),
            () = self.shared.touched.notified(), if !blocked => {}
            () = timer => {}
        }
        Ok(())
    }

    /// Whether there may be more.
    fn read_batch(&mut self, now: Instant) -> io::Result<bool> {
        let mut stack = self.shared.stack.borrow_mut();
        let mut bytes = 0;
        for _ in 0..BATCH {
            if bytes >= BATCH_BYTES {
                break;
            }
            let read = self.descriptor.try_io(Interest::READABLE, |from| {
                self.device.receive(from.as_fd(), &mut self.inbound)
            });
            match read {
                Ok((place, offload)) => {
                    bytes += place.len();
                    stack.handle_packet(now, &self.inbound[place], offload);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                // A header that makes no sense concerns one packet.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn write_batch(&mut self, now: Instant) -> io::Result<Sent> {
        let mut stack = self.shared.stack.borrow_mut();
        for _ in 0..BATCH {
            let next = match self.waiting.take() {
                Some(waiting) => Some(waiting),
                None => stack.poll_packet(now, &mut self.outbound[HEADROOM..]),
            };
            let Some((length, offload)) = next else {
                return Ok(Sent::All);
            };
            let written = self.descriptor.try_io(Interest::WRITABLE, |to| {
                self.device
                    .send(to.as_fd(), &mut self.outbound, length, offload)
            });
            match written {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.waiting = Some((length, offload));
                    return Ok(Sent::Blocked);
                }
                // Lost, as on any link; TCP sends it again.
                Err(error) => tracing::debug!(%error, length, "a packet was not taken"),
            }
        }
        Ok(Sent::Batch)
    }
}

/// How far a batch got.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    All,
    Batch,
    Blocked,
}

impl Shared {
    /// Passes the stack's events on to those who wait for them.
    fn tell(self: &Rc<Self>) {
        loop {
            let event = self.stack.borrow_mut().poll_event();
            match event {
                Some(event) => self.tell_one(event),
                None => break,
            }
        }
        let mut stack = self.stack.borrow_mut();
        let associations = self.associations.borrow();
        let pass_on = |id, payload: &[u8]| {
            if let Some(datagram_tx) = associations.get(&id) {
                let _ = datagram_tx.try_send(Bytes::copy_from_slice(payload));
            }
        };
        while stack.recv_datagram(pass_on).is_some() {}
    }

    fn tell_one(self: &Rc<Self>, event: Event) {
        match event {
            Event::FlowOpened {
                id,
                source,
                destination,
            } => self.opened(id, source, destination),
            Event::Readable(id) | Event::PeerFinished(id) => {
                self.with_watch(id, |watch| watch.readable.notify_one())
            }
            Event::Writable(id) => self.with_watch(id, |watch| watch.writable.notify_one()),
            Event::Reset(id) => self.was_reset(id),
            Event::Closed(id) => drop(self.flows.borrow_mut().remove(&id)),
            Event::AssociationOpened {
                id, destination, ..
            } => self.associated(id, destination),
            Event::AssociationClosed(id) => drop(self.associations.borrow_mut().remove(&id)),
            Event::Echo(request) => self.hand_out(Incoming::Echo(request)),
            other => tracing::warn!(?other, "an event that this version does not know"),
        }
    }

    fn with_watch(&self, id: FlowId, tell: impl FnOnce(&Watch)) {
        if let Some(watch) = self.flows.borrow().get(&id) {
            tell(watch);
        }
    }

    fn opened(self: &Rc<Self>, id: FlowId, source: SocketAddr, destination: SocketAddr) {
        let watch = Rc::new(Watch::default());
        self.flows.borrow_mut().insert(id, Rc::clone(&watch));
        let flow = Flow {
            id,
            watch,
            shared: Rc::clone(self),
        };
        self.hand_out(Incoming::Tcp(Pending {
            source,
            destination,
            flow,
        }));
    }

    fn associated(self: &Rc<Self>, id: AssociationId, destination: SocketAddr) {
        let (datagram_tx, datagram_rx) = mpsc::channel(DATAGRAMS);
        self.associations.borrow_mut().insert(id, datagram_tx);
        self.hand_out(Incoming::Udp(Association {
            id,
            destination,
            datagram_rx,
            shared: Rc::clone(self),
        }));
    }

    fn hand_out(&self, incoming: Incoming) {
        self.incoming.borrow_mut().push_back(incoming);
        self.came.notify_one();
    }

    fn was_reset(&self, id: FlowId) {
        let watch = self.flows.borrow().get(&id).cloned();
        match watch {
            Some(watch) if !watch.let_go.get() => {
                watch.was_reset.set(true);
                watch.readable.notify_one();
                watch.writable.notify_one();
                watch.reset.notify_waiters();
            }
            Some(_) | None => self.forget(id),
        }
    }

    fn forget(&self, id: FlowId) {
        self.flows.borrow_mut().remove(&id);
        self.stack.borrow_mut().reset(id);
        self.touched.notify_one();
    }
}

/// A flow that somebody holds. Dropping it resets what has not ended in order.
struct Flow {
    id: FlowId,
    watch: Rc<Watch>,
    shared: Rc<Shared>,
}

impl Flow {
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

/// Datagrams between a program and one destination. Dropping it makes the program's next datagram a new one.
pub struct Association {
    /// Where the datagrams go.
    pub destination: SocketAddr,
    id: AssociationId,
    datagram_rx: mpsc::Receiver<Bytes>,
    shared: Rc<Shared>,
}

impl Association {
    /// The next datagram from the program; `None` when it has closed its socket or was idle for two minutes. Cancel safe.
    pub async fn recv(&mut self) -> Option<Bytes> {
        self.datagram_rx.recv().await
    }

    /// Sends a datagram to the program. One that is too large is dropped, as UDP would.
    pub fn send(&self, payload: &[u8]) {
        if payload.len() <= LARGEST_DATAGRAM {
            // Gone means that the program has.
            let _ = self
                .shared
                .stack
                .borrow_mut()
                .send_datagram(self.id, payload);
            self.shared.touched.notify_one();
        }
    }

    /// Tells the program that its datagrams do not arrive.
    pub fn refuse(self, why: Unreachable) {
        self.shared
            .stack
            .borrow_mut()
            .association_unreachable(self.id, why);
        self.shared.touched.notify_one();
    }
}

/// What fits an IPv4 packet (RFC 768).
const LARGEST_DATAGRAM: usize = 65_507;

impl Drop for Association {
    fn drop(&mut self) {
        self.shared.associations.borrow_mut().remove(&self.id);
        self.shared.stack.borrow_mut().close_association(self.id);
    }
}
