//! What the stack's owner does with flows in the tests against the kernel: a service for each port.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tp_netstack::{AssociationId, DialOutcome, Event, FlowId, Received, Stack, Unreachable};

use super::support::{expect, fill};

/// The ports and what they do. Streams to the program are named by the port, streams from it by the port + 1.
pub mod port {
    /// Gives back what it gets; FIN after the program's FIN.
    pub const ECHO: u16 = 7;
    /// Checks what it gets; after FIN answers how many bytes that were (8 bytes, big endian) and ends.
    pub const SINK: u16 = 9;
    /// Reads a length (8 bytes), sends that many bytes and ends, whatever the program does.
    pub const SOURCE: u16 = 19;
    /// Sends 1000 bytes and FIN at once; checks what it gets until FIN.
    pub const FINISHES_FIRST: u16 = 20;
    /// As `SINK`, but reads nothing for the first second.
    pub const STALLS: u16 = 21;
    /// Resets the flow at the first byte.
    pub const RESETS: u16 = 22;
    /// Sends FIN at once and resets at the first byte.
    pub const FINISHES_THEN_RESETS: u16 = 23;
    /// Reads until FIN, then resets.
    pub const RESETS_AFTER_FIN: u16 = 24;
    /// Sends 1000 bytes, and FIN when it gets the first byte: both ends close at once.
    pub const FINISHES_ON_BYTE: u16 = 25;
    pub const REFUSED: u16 = 1;
    pub const UNREACHABLE: u16 = 2;
    pub const SILENT: u16 = 3;
    /// Accepts 300 ms late.
    pub const SLOW_DIAL: u16 = 4;
    /// The dial never settles.
    pub const NEVER_DIALED: u16 = 5;
}

/// How a flow ended at the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Open,
    Closed,
    Reset,
    ResetByUs,
}

/// What the owner knows of one flow.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    pub received: u64,
    pub sent: u64,
    pub finished: bool,
    pub end: End,
}

/// Records by the program's address.
pub type Records = Arc<Mutex<HashMap<SocketAddr, Record>>>;

struct Served {
    id: FlowId,
    source: SocketAddr,
    port: u16,
    opened: Instant,
    record: Record,
    /// Bytes to send before FIN; unknown yet for `None`.
    to_send: Option<u64>,
    request: Vec<u8>,
    echo: Vec<u8>,
    finish_sent: bool,
    /// All that the program sent before FIN was read.
    drained: bool,
}

/// All services of a stack.
pub struct Services {
    flows: Vec<Served>,
    dials: Vec<(Instant, FlowId)>,
    associations: HashMap<AssociationId, u16>,
    records: Records,
}

impl Services {
    pub fn new(records: Records) -> Self {
        Self {
            flows: Vec::new(),
            dials: Vec::new(),
            associations: HashMap::new(),
            records,
        }
    }

    /// When to come back even if no packet comes.
    pub fn next(&self) -> Option<Instant> {
        let stalled = self
            .flows
            .iter()
            .filter(|flow| flow.port == port::STALLS)
            .map(|flow| flow.opened + STALL);
        self.dials.iter().map(|dial| dial.0).chain(stalled).min()
    }

    pub fn serve(&mut self, stack: &mut Stack, now: Instant) {
        while let Some(event) = stack.poll_event() {
            self.handle(stack, event, now);
        }
        self.dials.retain(|(due, id)| {
            let due = *due <= now;
            if due {
                let _ = stack.dialed(*id, DialOutcome::Accepted, now);
            }
            !due
        });
        for flow in &mut self.flows {
            flow.pump(stack, now);
            self.records
                .lock()
                .unwrap()
                .insert(flow.source, flow.record);
        }
        self.flows.retain(|flow| flow.record.end == End::Open);
        let associations = &self.associations;
        let mut answers = Vec::new();
        while stack
            .recv_datagram(|id, payload| answers.push((id, payload.to_vec())))
            .is_some()
        {}
        for (id, payload) in answers {
            match associations.get(&id) {
                Some(&port::UNREACHABLE) => stack.association_unreachable(id, Unreachable::Port),
                Some(_) => drop(stack.send_datagram(id, &payload)),
                None => {}
            }
        }
    }

    fn handle(&mut self, stack: &mut Stack, event: Event, now: Instant) {
        match event {
            Event::FlowOpened {
                id,
                source,
                destination,
            } => self.open(stack, id, source, destination.port(), now),
            Event::PeerFinished(id) => self.change(id, |flow| flow.record.finished = true),
            Event::Closed(id) => self.change(id, |flow| flow.record.end = End::Closed),
            Event::Reset(id) => self.change(id, |flow| {
                flow.drain(stack);
                flow.record.end = End::Reset;
                stack.reset(id);
            }),
            Event::AssociationOpened {
                id, destination, ..
            } => {
                self.associations.insert(id, destination.port());
            }
            Event::AssociationClosed(id) => {
                self.associations.remove(&id);
            }
            Event::Echo(request) => stack.echo(&request),
            _ => {}
        }
    }

    fn change(&mut self, id: FlowId, change: impl FnOnce(&mut Served)) {
        if let Some(flow) = self.flows.iter_mut().find(|flow| flow.id == id) {
            change(flow);
            self.records
                .lock()
                .unwrap()
                .insert(flow.source, flow.record);
        }
    }

    fn open(&mut self, stack: &mut Stack, id: FlowId, source: SocketAddr, port: u16, now: Instant) {
        let outcome = match port {
            port::REFUSED => DialOutcome::Refused,
            port::UNREACHABLE => DialOutcome::Unreachable(Unreachable::Host),
            port::SILENT => DialOutcome::TimedOut,
            port::SLOW_DIAL | port::NEVER_DIALED => {
                let wait = if port == port::SLOW_DIAL {
                    300
                } else {
                    3_600_000
                };
                self.dials.push((now + Duration::from_millis(wait), id));
                self.flows.push(Served::new(id, source, port, now));
                return;
            }
            _ => DialOutcome::Accepted,
        };
        stack.dialed(id, outcome, now).unwrap();
        if outcome == DialOutcome::Accepted {
            self.flows.push(Served::new(id, source, port, now));
        }
    }
}

const STALL: Duration = Duration::from_secs(1);

impl Served {
    fn new(id: FlowId, source: SocketAddr, port: u16, opened: Instant) -> Self {
        let record = Record {
            received: 0,
            sent: 0,
            finished: false,
            end: End::Open,
        };
        let to_send = match port {
            port::FINISHES_FIRST | port::FINISHES_ON_BYTE => Some(1000),
            port::FINISHES_THEN_RESETS => Some(0),
            _ => None,
        };
        Self {
            id,
            source,
            port,
            opened,
            record,
            to_send,
            request: Vec::new(),
            echo: Vec::new(),
            finish_sent: false,
            drained: false,
        }
    }

    fn pump(&mut self, stack: &mut Stack, now: Instant) {
        if self.record.end != End::Open || (self.port == port::STALLS && now < self.opened + STALL)
        {
            return;
        }
        self.drain(stack);
        self.decide(stack);
        self.answer(stack);
    }

    fn drain(&mut self, stack: &mut Stack) {
        let (port, request, echo) = (self.port, &mut self.request, &mut self.echo);
        loop {
            let offset = self.record.received;
            let take = |bytes: &[u8]| {
                let taken = if port == port::ECHO {
                    bytes.len().min((256 << 10) - echo.len())
                } else {
                    bytes.len()
                };
                match port {
                    port::ECHO => echo.extend_from_slice(&bytes[..taken]),
                    port::SOURCE => request.extend_from_slice(bytes),
                    _ => expect(u64::from(port) + 1, offset, bytes),
                }
                taken
            };
            match stack.recv(self.id, take) {
                Ok(Received::Finished) => {
                    self.drained = true;
                    return;
                }
                Ok(Received::Data(0) | Received::Empty) | Err(_) => return,
                Ok(Received::Data(taken)) => self.record.received += taken as u64,
            }
        }
    }

    /// What the bytes so far mean for the service.
    fn decide(&mut self, stack: &mut Stack) {
        let got_byte = self.record.received > 0;
        match self.port {
            port::SOURCE if self.request.len() >= 8 && self.to_send.is_none() => {
                self.to_send = self
                    .request
                    .first_chunk()
                    .map(|length| u64::from_be_bytes(*length));
            }
            port::SINK | port::STALLS if self.drained && self.to_send.is_none() => {
                self.echo = self.record.received.to_be_bytes().to_vec();
                self.to_send = Some(0);
            }
            port::ECHO if self.drained && self.to_send.is_none() => self.to_send = Some(0),
            port::SLOW_DIAL if self.drained => self.to_send = Some(0),
            port::RESETS | port::FINISHES_THEN_RESETS if got_byte => self.reset(stack),
            port::RESETS_AFTER_FIN if self.drained => self.reset(stack),
            _ => {}
        }
    }

    fn reset(&mut self, stack: &mut Stack) {
        stack.reset(self.id);
        self.record.end = End::ResetByUs;
    }

    fn answer(&mut self, stack: &mut Stack) {
        while !self.echo.is_empty() {
            let echo = &mut self.echo;
            let put = |space: &mut [u8]| {
                let len = space.len().min(echo.len());
                space[..len].copy_from_slice(&echo[..len]);
                len
            };
            let Ok(sent @ 1..) = stack.send(self.id, put) else {
                return;
            };
            self.echo.drain(..sent);
        }
        let Some(to_send) = self.to_send else { return };
        while self.record.sent < to_send {
            let (name, offset, left) = (
                u64::from(self.port),
                self.record.sent,
                to_send - self.record.sent,
            );
            let put = |space: &mut [u8]| {
                let len = space.len().min(left as usize);
                fill(name, offset, &mut space[..len]);
                len
            };
            let Ok(sent @ 1..) = stack.send(self.id, put) else {
                return;
            };
            self.record.sent += sent as u64;
        }
        let waits = self.port == port::FINISHES_ON_BYTE && self.record.received == 0;
        if !self.finish_sent && !waits {
            self.finish_sent = stack.finish(self.id).is_ok();
        }
    }
}
