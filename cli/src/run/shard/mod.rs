//! One userspace TCP/IP stack and the device under it, as connections that tasks can read and write.
//!
//! [`Pump`] moves packets between device and stack; [`Shard`] hands out what programs open. Everything belongs to one
//! thread: the stack is borrowed for single calls, never across an `await`. It knows neither tunnel nor names.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, mpsc};
use tp_netstack::{
    AssociationId, Config, DeviceOffload, EchoRequest, Event, FlowId, Stack, Unreachable,
};

pub use self::pump::Pump;
use self::tcp::Flow;
pub use self::tcp::{Lent, Pending, Stream};
pub use self::udp::Association;
use super::device::Device;

mod pump;
mod tcp;
mod udp;

/// Datagrams of one association that wait for whoever carries them; more are dropped, as UDP would.
const DATAGRAMS: usize = 256;

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

/// Puts a stack on a device.
///
/// # Errors
/// The device cannot be waited for.
pub fn open(device: Box<dyn Device>, descriptor: OwnedFd) -> io::Result<(Shard, Pump)> {
    let config = Config {
        mtu: device.mtu(),
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
    let pump = Pump::new(device, descriptor, Rc::clone(&shared))?;
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
        let flow = Flow::new(id, watch, Rc::clone(self));
        self.hand_out(Incoming::Tcp(Pending::new(source, destination, flow)));
    }

    fn associated(self: &Rc<Self>, id: AssociationId, destination: SocketAddr) {
        let (datagram_tx, datagram_rx) = mpsc::channel(DATAGRAMS);
        self.associations.borrow_mut().insert(id, datagram_tx);
        let association = Association::new(id, destination, datagram_rx, Rc::clone(self));
        self.hand_out(Incoming::Udp(association));
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
