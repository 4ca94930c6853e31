//! Arbitrary packets, times and owner's calls into the stack: no panic, bounded memory, and every invariant after each.
//!
//! The input is a list of steps. Raw packets find what parsers do with nonsense; crafted segments, whose checksums hold and
//! whose numbers continue what the stack last sent, get far enough to find what the flows do with it.
#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use tp_netstack::{
    AssociationId, Checksum, Config, DeviceOffload, DialOutcome, EchoRequest, Event, FlowId,
    IpVersion, LONGEST_PACKET, Offload, Segments, Stack, Unreachable,
};

/// The input, read from the front; zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }
}

struct Fuzz {
    stack: Stack,
    now: Instant,
    buffer: Vec<u8>,
    flows: Vec<FlowId>,
    associations: Vec<AssociationId>,
    pings: Vec<EchoRequest>,
    /// Sequence and acknowledgement numbers of the stack's last segment to each port.
    seen: [(u32, u32); PORTS],
}

const PORTS: usize = 8;
const FIRST_PORT: u16 = 1000;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut fuzz = Fuzz::new(&mut input);
    while !input.0.is_empty() {
        fuzz.step(&mut input);
        fuzz.stack.check();
    }
});

impl Fuzz {
    fn new(input: &mut Input<'_>) -> Self {
        let bits = input.byte();
        let offload = DeviceOffload {
            checksum: bits & 1 != 0,
            tso4: bits & 2 != 0,
            tso6: bits & 4 != 0,
        };
        let mtu = [576, 1280, 1500, 65_520, 65_535][usize::from(bits >> 3) % 5];
        let config = Config {
            mtu,
            offload,
            seed: 1,
            flows: 6,
            memory: 4 << 20,
            associations: 3,
        };
        let now = Instant::now();
        Self {
            stack: Stack::new(config, now),
            now,
            buffer: vec![0; LONGEST_PACKET],
            flows: Vec::new(),
            associations: Vec::new(),
            pings: Vec::new(),
            seen: [(0, 0); PORTS],
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0 => {
                let len = usize::from(input.word());
                let packet = input.bytes(len);
                let offload = offload(input);
                self.stack.handle_packet(self.now, &packet, offload);
            }
            1..=6 => self.segment(input),
            7 => self.datagram(input),
            8 => self.advance(input),
            9 | 10 => self.flow_call(input),
            11 => self.association_call(input),
            12 => self.answer_ping(input),
            13 => self.mutated(input),
            _ => self.poll(),
        }
    }

    /// A TCP segment that may well be accepted.
    fn segment(&mut self, input: &mut Input<'_>) {
        let (slot, flags, kind) = (
            usize::from(input.byte()) % PORTS,
            input.byte(),
            input.byte(),
        );
        let (sequence, acknowledgement) = self.seen[slot];
        let shift = |value: u32, bits: u8, input: &mut Input<'_>| match bits & 3 {
            0 | 1 => value,
            2 => value.wrapping_add(i32::from(input.word() as i16) as u32),
            _ => value.wrapping_add(u32::from(input.word()) << 16),
        };
        let number = shift(acknowledgement, kind, input);
        let answer = shift(sequence, kind >> 2, input);
        let window = input.word();
        let options = if kind & 0x10 != 0 {
            input.bytes(usize::from(kind >> 6) * 4)
        } else {
            Vec::new()
        };
        let options = [options.as_slice(), &[0; 12][..(4 - options.len() % 4) % 4]].concat();
        let len = usize::from(input.byte()) * if kind & 0x20 != 0 { 64 } else { 1 };
        let mut tcp = Vec::new();
        tcp.extend((FIRST_PORT + slot as u16).to_be_bytes());
        tcp.extend((80 + u16::from(kind >> 7)).to_be_bytes());
        tcp.extend(number.to_be_bytes());
        tcp.extend(answer.to_be_bytes());
        tcp.extend([((20 + options.len()) / 4 << 4) as u8, flags]);
        tcp.extend(window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(options);
        tcp.resize(tcp.len() + len, 0x55);
        let packet = packet(slot % 2 == 1, 6, &tcp);
        self.stack.handle_packet(self.now, &packet, PROMISED);
    }

    fn datagram(&mut self, input: &mut Input<'_>) {
        let (slot, kind) = (usize::from(input.byte()) % PORTS, input.byte());
        let len = usize::from(input.word() % 3000);
        let payload = input.bytes(len);
        let v6 = slot % 2 == 1;
        let (protocol, message) = match kind % 3 {
            0 => {
                let ports = [FIRST_PORT + slot as u16, 53 + u16::from(kind >> 4)];
                let mut udp: Vec<u8> = ports.iter().flat_map(|port| port.to_be_bytes()).collect();
                udp.extend((8 + payload.len() as u16).to_be_bytes());
                udp.extend([0, 0]);
                (17, [udp, payload].concat())
            }
            1 => (
                if v6 { 58 } else { 1 },
                [
                    &[if v6 { 128 } else { 8 }, 0, 0, 0, 1, 2, 3, 4],
                    &payload[..],
                ]
                .concat(),
            ),
            _ => (
                if v6 { 58 } else { 1 },
                [
                    &[if v6 { 1 } else { 3 }, kind, 0, 0, 0, 0, 0, 0],
                    &payload[..],
                ]
                .concat(),
            ),
        };
        self.stack
            .handle_packet(self.now, &packet(v6, protocol, &message), PROMISED);
    }

    /// The stack's own next packet, changed in one place and turned around.
    fn mutated(&mut self, input: &mut Input<'_>) {
        let Some((len, offload)) = self.stack.poll_packet(self.now, &mut self.buffer) else {
            return;
        };
        let mut packet = self.buffer[..len].to_vec();
        self.note(&packet, offload);
        let at = usize::from(input.word()) % packet.len();
        packet[at] = input.byte();
        if packet[0] >> 4 == 4 {
            packet[10..12].fill(0);
            let sum = checksum(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        self.stack.handle_packet(self.now, &packet, PROMISED);
    }

    fn advance(&mut self, input: &mut Input<'_>) {
        let step = u64::from(input.word());
        self.now += Duration::from_millis(if step & 1 == 0 { step >> 8 } else { step });
        self.stack.handle_timeout(self.now);
    }

    fn flow_call(&mut self, input: &mut Input<'_>) {
        let (call, which, amount) = (input.byte(), input.byte(), usize::from(input.word()));
        if self.flows.is_empty() {
            return;
        }
        let id = self.flows[usize::from(which) % self.flows.len()];
        match call % 8 {
            0 | 1 => drop(self.stack.dialed(id, DialOutcome::Accepted, self.now)),
            2 => {
                let outcome = match call >> 4 & 3 {
                    0 => DialOutcome::Refused,
                    1 => DialOutcome::TimedOut,
                    2 => DialOutcome::Unreachable(Unreachable::Host),
                    _ => DialOutcome::Unreachable(Unreachable::Prohibited),
                };
                let _ = self.stack.dialed(id, outcome, self.now);
            }
            3 => drop(self.stack.recv(id, |bytes| bytes.len().min(amount))),
            4 | 5 => drop(self.stack.send(id, |space| space.len().min(amount))),
            6 => drop(self.stack.finish(id)),
            _ => self.stack.reset(id),
        }
    }

    fn association_call(&mut self, input: &mut Input<'_>) {
        let (call, which, amount) = (input.byte(), input.byte(), usize::from(input.word()));
        self.stack.recv_datagram(|_, payload| payload.len());
        if self.associations.is_empty() {
            return;
        }
        let id = self.associations[usize::from(which) % self.associations.len()];
        match call % 4 {
            0 | 1 => drop(self.stack.send_datagram(id, &vec![7; amount.min(65_487)])),
            2 => self.stack.close_association(id),
            _ => self.stack.association_unreachable(id, Unreachable::Port),
        }
    }

    fn answer_ping(&mut self, input: &mut Input<'_>) {
        let Some(ping) = self.pings.pop() else { return };
        if input.byte() & 1 == 0 {
            self.stack.echo(&ping);
        } else {
            self.stack.echo_unreachable(&ping, Unreachable::Network);
        }
    }

    fn poll(&mut self) {
        while let Some(event) = self.stack.poll_event() {
            match event {
                Event::FlowOpened { id, .. } => self.flows.push(id),
                Event::AssociationOpened { id, .. } => self.associations.push(id),
                Event::Echo(request) => self.pings.push(request),
                _ => {}
            }
        }
        self.flows.drain(..self.flows.len().saturating_sub(16));
        self.associations
            .drain(..self.associations.len().saturating_sub(16));
        // A stack whose flows talk without end would never be asked for anything else.
        for _ in 0..256 {
            let Some((len, offload)) = self.stack.poll_packet(self.now, &mut self.buffer) else {
                break;
            };
            let packet = self.buffer[..len].to_vec();
            self.note(&packet, offload);
        }
    }

    fn note(&mut self, packet: &[u8], offload: Offload) {
        assert!(offload.segments.is_none_or(|segments| segments.size > 0));
        let header = if packet[0] >> 4 == 4 { 20 } else { 40 };
        let protocol = if header == 20 { packet[9] } else { packet[6] };
        let Some(tcp) = packet
            .get(header..)
            .filter(|tcp| protocol == 6 && tcp.len() >= 20)
        else {
            return;
        };
        let port = u16::from_be_bytes([tcp[2], tcp[3]]);
        let Some(slot) = port
            .checked_sub(FIRST_PORT)
            .map(usize::from)
            .filter(|slot| *slot < PORTS)
        else {
            return;
        };
        let number =
            |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let data = tcp.len() - usize::from(tcp[12] >> 4) * 4;
        let control = u32::from(tcp[13] & 1) + u32::from(tcp[13] >> 1 & 1);
        self.seen[slot] = (number(4).wrapping_add(data as u32 + control), number(8));
    }
}

/// The device vouches for the checksum, so that the fuzzer need not find it.
const PROMISED: Offload = Offload {
    checksum: Checksum::Verified,
    segments: None,
};

fn offload(input: &mut Input<'_>) -> Offload {
    let checksum = match input.byte() % 4 {
        0 => Checksum::Complete,
        1 => Checksum::Partial {
            start: input.word(),
            offset: input.word(),
        },
        _ => Checksum::Verified,
    };
    let segments = match input.byte() % 4 {
        0 => Some(Segments {
            version: IpVersion::V4,
            size: input.word(),
            header: input.word(),
        }),
        1 => Some(Segments {
            version: IpVersion::V6,
            size: input.word(),
            header: input.word(),
        }),
        _ => None,
    };
    Offload { checksum, segments }
}

fn packet(v6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    if v6 {
        packet.extend([0x60, 0, 0, 0]);
        packet.extend((payload.len() as u16).to_be_bytes());
        packet.extend([protocol, 64]);
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    } else {
        packet.extend([0x45, 0]);
        packet.extend((20 + payload.len() as u16).to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet.extend(payload);
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !(sum as u16)
}
