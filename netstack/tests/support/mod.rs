//! What the tests without a kernel share: a smoltcp host as the program's side, a link between it and the stack that may
//! lose, repeat and reorder by a seed, and an owner of flows that follows a script. Time is simulated.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test that is surprised panics"
)]

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config as HostConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use tp_netstack::{
    Config, DialOutcome, Event, FlowError, FlowId, LONGEST_PACKET, Offload, Received, Stack,
};

pub mod packets;

/// Small seeded generator (splitmix64), so that a seed repeats a run on any machine.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// True in `percent` of 100 calls.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// The byte at `offset` of the stream `name`: any byte lost, doubled or moved is noticed.
pub fn byte(name: u64, offset: u64) -> u8 {
    let mixed = (offset ^ name.wrapping_mul(0x9E37_79B9)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (mixed >> 32) as u8
}

/// Fills `space` with the stream `name` from `offset` on.
pub fn fill(name: u64, offset: u64, space: &mut [u8]) {
    for (at, value) in space.iter_mut().enumerate() {
        *value = byte(name, offset + at as u64);
    }
}

/// Asserts that `bytes` are the stream `name` from `offset` on.
pub fn expect(name: u64, offset: u64, bytes: &[u8]) {
    for (at, value) in bytes.iter().enumerate() {
        assert_eq!(
            *value,
            byte(name, offset + at as u64),
            "stream {name} at byte {}",
            offset + at as u64
        );
    }
}

/// What a link does to packets, in percent, and how long they take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Impairment {
    pub loss: u64,
    pub duplicate: u64,
    pub reorder: u64,
    pub delay: Duration,
}

/// One direction of a link.
pub struct Pipe {
    random: Random,
    impairment: Impairment,
    packets: BTreeMap<(Instant, u64), Vec<u8>>,
    sent: u64,
}

impl Pipe {
    pub fn new(seed: u64, impairment: Impairment) -> Self {
        Self {
            random: Random(seed),
            impairment,
            packets: BTreeMap::new(),
            sent: 0,
        }
    }

    pub fn send(&mut self, now: Instant, packet: &[u8]) {
        if self.random.chance(self.impairment.loss) {
            return;
        }
        let copies = if self.random.chance(self.impairment.duplicate) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let late = if self.random.chance(self.impairment.reorder) {
                3
            } else {
                0
            };
            let arrival = now + self.impairment.delay + Duration::from_millis(late);
            self.sent += 1;
            self.packets.insert((arrival, self.sent), packet.to_vec());
        }
    }

    pub fn receive(&mut self, now: Instant) -> Option<Vec<u8>> {
        let first = self.packets.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    pub fn next(&self) -> Option<Instant> {
        self.packets.keys().next().map(|key| key.0)
    }
}

/// The program's machine.
pub struct Host {
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    device: Queues,
    epoch: Instant,
    next_port: u16,
}

struct Queues {
    mtu: usize,
    inbound: VecDeque<Vec<u8>>,
    outbound: VecDeque<Vec<u8>>,
}

pub struct Taken(Vec<u8>);
pub struct Put<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Taken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Put<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}

impl Device for Queues {
    type RxToken<'a> = Taken;
    type TxToken<'a> = Put<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Taken, Put<'_>)> {
        let packet = self.inbound.pop_front()?;
        Some((Taken(packet), Put(&mut self.outbound)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Put<'_>> {
        Some(Put(&mut self.outbound))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities
    }
}

pub const HOST: [u8; 4] = [10, 9, 0, 1];

impl Host {
    pub fn new(mtu: usize, now: Instant) -> Self {
        let mut device = Queues {
            mtu,
            inbound: VecDeque::new(),
            outbound: VecDeque::new(),
        };
        let mut interface = Interface::new(
            HostConfig::new(HardwareAddress::Ip),
            &mut device,
            smoltcp::time::Instant::from_secs(100),
        );
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(
                    IpAddress::from(std::net::IpAddr::from(HOST)),
                    0,
                ))
                .unwrap();
        });
        Self {
            interface,
            sockets: SocketSet::new(Vec::new()),
            device,
            epoch: now,
            next_port: 40_000,
        }
    }

    fn time(&self, now: Instant) -> smoltcp::time::Instant {
        smoltcp::time::Instant::from_micros((now - self.epoch).as_micros() as i64 + 100_000_000)
    }

    /// Starts to connect to `port` with rings of the given sizes.
    pub fn connect(&mut self, port: u16, rx: usize, tx: usize) -> SocketHandle {
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; rx]),
            tcp::SocketBuffer::new(vec![0; tx]),
        );
        self.next_port += 1;
        socket
            .connect(
                self.interface.context(),
                (IpAddress::v4(198, 51, 100, 7), port),
                self.next_port,
            )
            .unwrap();
        self.sockets.add(socket)
    }

    pub fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn poll(&mut self, now: Instant) {
        let time = self.time(now);
        self.interface
            .poll(time, &mut self.device, &mut self.sockets);
    }

    pub fn next(&mut self, now: Instant) -> Option<Instant> {
        let time = self.time(now);
        let delay = self.interface.poll_delay(time, &self.sockets)?;
        Some(now + Duration::from_micros(delay.total_micros()))
    }
}

/// A host, the stack and the link between.
pub struct World {
    pub now: Instant,
    pub stack: Stack,
    pub host: Host,
    up: Pipe,
    down: Pipe,
    buffer: Vec<u8>,
    /// Every packet that went either way, for tests that look at them: (to the stack, packet).
    pub seen: Vec<(bool, Vec<u8>)>,
    pub record: bool,
}

impl World {
    pub fn new(config: Config, seed: u64, impairment: Impairment) -> Self {
        let now = Instant::now();
        let mtu = usize::from(config.mtu);
        Self {
            now,
            stack: Stack::new(config, now),
            host: Host::new(mtu, now),
            up: Pipe::new(seed, impairment),
            down: Pipe::new(seed ^ 0xFFFF, impairment),
            buffer: vec![0; LONGEST_PACKET],
            seen: Vec::new(),
            record: false,
        }
    }

    /// Delivers what is due at this moment, until nothing moves; whether anything did.
    pub fn exchange(&mut self) -> bool {
        let mut any = false;
        loop {
            self.host.poll(self.now);
            let mut moved = false;
            while let Some(packet) = self.host.device.outbound.pop_front() {
                self.up.send(self.now, &packet);
            }
            while let Some(packet) = self.up.receive(self.now) {
                moved = true;
                self.note(true, &packet);
                self.stack
                    .handle_packet(self.now, &packet, Offload::default());
            }
            while let Some((len, _)) = self.stack.poll_packet(self.now, &mut self.buffer) {
                let packet = self.buffer[..len].to_vec();
                self.note(false, &packet);
                self.down.send(self.now, &packet);
            }
            while let Some(packet) = self.down.receive(self.now) {
                moved = true;
                self.host.device.inbound.push_back(packet);
            }
            self.stack.check();
            if !moved && self.host.device.outbound.is_empty() {
                return any;
            }
            any |= moved;
        }
    }

    /// Makes the link reliable. A reset that is lost is noticed by neither end of any TCP.
    pub fn heal(&mut self) {
        self.up.impairment = Impairment::default();
        self.down.impairment = Impairment::default();
    }

    /// Loses every packet from now on, as when the program's machine has vanished.
    pub fn cut(&mut self) {
        let lost = Impairment {
            loss: 100,
            ..Impairment::default()
        };
        self.up.impairment = lost;
        self.down.impairment = lost;
    }

    fn note(&mut self, up: bool, packet: &[u8]) {
        if self.record {
            self.seen.push((up, packet.to_vec()));
        }
    }

    /// Moves time to the next thing that is due, by at most `most`.
    pub fn step(&mut self, most: Duration) {
        let limit = self.now + most;
        let next = [
            self.up.next(),
            self.down.next(),
            self.host.next(self.now),
            self.stack.poll_timeout(),
        ];
        let next = next.into_iter().flatten().min().unwrap_or(limit);
        self.now = next.clamp(self.now + Duration::from_micros(50), limit);
    }

    /// Exchanges packets and moves time until `done` or `limit` of simulated time has passed.
    pub fn run(&mut self, limit: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let end = self.now + limit;
        while self.now < end {
            self.exchange();
            if done(self) {
                return true;
            }
            // Where the two ends still talk, time stands nearly still.
            let most = if self.exchange() {
                Duration::from_micros(100)
            } else {
                Duration::from_millis(500)
            };
            self.step(most);
        }
        false
    }
}

/// One end of a flow that sends a stream and checks one, as the owner of the stack.
#[derive(Debug)]
pub struct Served {
    pub id: FlowId,
    pub port: u16,
    pub received: u64,
    pub sent: u64,
    /// Bytes to send before FIN.
    pub to_send: u64,
    pub peer_finished: bool,
    pub finished: bool,
    pub closed: bool,
    pub reset: bool,
}

/// An owner that answers each flow with `to_send` bytes of the stream named by its port, and checks what it receives
/// against the stream port + 1.
pub struct Owner {
    pub flows: Vec<Served>,
    pub to_send: u64,
    pub outcome: DialOutcome,
    /// Sends FIN only after the program's.
    pub waits_for_fin: bool,
    /// Takes no byte while set.
    pub paused: bool,
    /// Bytes taken in one call at most.
    pub chunk: usize,
}

impl Owner {
    pub fn new(to_send: u64) -> Self {
        let outcome = DialOutcome::Accepted;
        Self {
            flows: Vec::new(),
            to_send,
            outcome,
            waits_for_fin: false,
            paused: false,
            chunk: usize::MAX,
        }
    }

    pub fn serve(&mut self, world: &mut World) {
        while let Some(event) = world.stack.poll_event() {
            self.handle(world, event);
        }
        for index in 0..self.flows.len() {
            self.pump(world, index);
        }
    }

    fn handle(&mut self, world: &mut World, event: Event) {
        match event {
            Event::FlowOpened {
                id, destination, ..
            } => {
                let (port, to_send) = (destination.port(), self.to_send);
                self.flows.push(Served {
                    id,
                    port,
                    received: 0,
                    sent: 0,
                    to_send,
                    peer_finished: false,
                    finished: false,
                    closed: false,
                    reset: false,
                });
                // A program that has reset meanwhile is the next event.
                let told = world.stack.dialed(id, self.outcome, world.now);
                assert!(matches!(told, Ok(()) | Err(FlowError::Gone)), "{told:?}");
            }
            Event::PeerFinished(id) => self.find(id).peer_finished = true,
            Event::Closed(id) => self.find(id).closed = true,
            Event::Reset(id) => {
                self.find(id).reset = true;
                world.stack.reset(id);
            }
            Event::Readable(_) | Event::Writable(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    }

    pub fn find(&mut self, id: FlowId) -> &mut Served {
        self.flows.iter_mut().find(|flow| flow.id == id).unwrap()
    }

    fn pump(&mut self, world: &mut World, index: usize) {
        let (paused, chunk, waits) = (self.paused, self.chunk, self.waits_for_fin);
        let flow = &mut self.flows[index];
        if flow.closed || flow.reset {
            return;
        }
        loop {
            if paused {
                break;
            }
            let (name, offset) = (u64::from(flow.port) + 1, flow.received);
            let take = |bytes: &[u8]| {
                let taken = bytes.len().min(chunk);
                expect(name, offset, &bytes[..taken]);
                taken
            };
            match world.stack.recv(flow.id, take) {
                Ok(Received::Data(taken)) => flow.received += taken as u64,
                Ok(Received::Empty | Received::Finished) | Err(_) => break,
            }
        }
        while flow.sent < flow.to_send {
            let (name, offset, left) = (
                u64::from(flow.port),
                flow.sent,
                (flow.to_send - flow.sent) as usize,
            );
            let put = |space: &mut [u8]| {
                let len = space.len().min(left);
                fill(name, offset, &mut space[..len]);
                len
            };
            match world.stack.send(flow.id, put) {
                Ok(0) | Err(FlowError::Gone | FlowError::Finished) | Err(_) => break,
                Ok(sent) => flow.sent += sent as u64,
            }
        }
        if flow.sent == flow.to_send && !flow.finished && (!waits || flow.peer_finished) {
            flow.finished = world.stack.finish(flow.id).is_ok();
        }
    }
}

/// The program's end: sends `to_send` bytes of stream port + 1, checks stream `port`.
#[derive(Debug)]
pub struct Program {
    pub handle: SocketHandle,
    pub port: u16,
    pub sent: u64,
    pub to_send: u64,
    pub received: u64,
    pub finished: bool,
    /// Sends FIN only after the stack's.
    pub waits_for_fin: bool,
    pub paused: bool,
}

impl Program {
    pub fn connect(world: &mut World, port: u16, to_send: u64, rx: usize, tx: usize) -> Self {
        let handle = world.host.connect(port, rx, tx);
        Self {
            handle,
            port,
            sent: 0,
            to_send,
            received: 0,
            finished: false,
            waits_for_fin: false,
            paused: false,
        }
    }

    pub fn pump(&mut self, world: &mut World) {
        let socket = world.host.socket(self.handle);
        while !self.paused && socket.can_recv() {
            let (name, offset) = (u64::from(self.port), self.received);
            let taken = socket.recv(|bytes| {
                expect(name, offset, bytes);
                (bytes.len(), bytes.len())
            });
            self.received += taken.unwrap() as u64;
        }
        while self.sent < self.to_send && socket.can_send() {
            let (name, offset, left) = (
                u64::from(self.port) + 1,
                self.sent,
                (self.to_send - self.sent) as usize,
            );
            let sent = socket.send(|space| {
                let len = space.len().min(left);
                fill(name, offset, &mut space[..len]);
                (len, len)
            });
            self.sent += sent.unwrap() as u64;
        }
        let may_finish = !self.waits_for_fin || !socket.may_recv();
        if self.sent == self.to_send && !self.finished && socket.may_send() && may_finish {
            socket.close();
            self.finished = true;
        }
    }

    pub fn state(&self, world: &mut World) -> tcp::State {
        world.host.socket(self.handle).state()
    }

    /// Whether both directions have ended on this side.
    pub fn is_over(&self, world: &mut World) -> bool {
        matches!(self.state(world), tcp::State::Closed | tcp::State::TimeWait)
    }
}
