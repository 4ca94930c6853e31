//! What the benchmarks of the core share: a stack, and programs reduced to the numbers of their flows.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each benchmark uses its own part"
)]
#![allow(clippy::unwrap_used, reason = "a benchmark that is surprised panics")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use tp_netstack::{
    Checksum, Config, DeviceOffload, DialOutcome, Event, FlowId, LONGEST_PACKET, Offload, Stack,
};

/// The device vouches for the checksum, as a kernel on the same machine does.
pub const PROMISED: Offload = Offload {
    checksum: Checksum::Verified,
    segments: None,
};
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH_ACK: u8 = 0x18;
const ACK: u8 = 0x10;

/// A stack and the programs' ends of its flows, reduced to their numbers.
pub struct Bench {
    pub stack: Stack,
    pub now: Instant,
    pub buffer: Vec<u8>,
    flows: Vec<Peer>,
    random: u64,
    /// The packet to send next; one for all flows, as a device's read buffer is.
    packet: Vec<u8>,
}

pub struct Peer {
    id: FlowId,
    number: u32,
    sequence: u32,
    acknowledgement: u32,
}

impl Bench {
    pub fn new(flows: usize) -> Self {
        let offload = DeviceOffload {
            checksum: true,
            tso4: true,
            tso6: true,
        };
        let config = Config {
            mtu: 65_520,
            offload,
            seed: 9,
            memory: 4 << 30,
            ..Config::default()
        };
        let now = Instant::now();
        let mut bench = Self {
            stack: Stack::new(config, now),
            now,
            buffer: vec![0; LONGEST_PACKET],
            flows: Vec::new(),
            random: 1,
            packet: header(),
        };
        for number in 0..flows {
            let peer = bench.open(number as u32);
            bench.flows.push(peer);
        }
        bench
    }

    /// SYN, dial, SYN-ACK, ACK.
    pub fn open(&mut self, number: u32) -> Peer {
        self.send(number, 100, 0, SYN, 0);
        let Some(Event::FlowOpened { id, .. }) = self.stack.poll_event() else {
            panic!("no flow")
        };
        self.stack
            .dialed(id, DialOutcome::Accepted, self.now)
            .unwrap();
        self.stack.poll_packet(self.now, &mut self.buffer).unwrap();
        let acknowledgement = word(&self.buffer, 24).wrapping_add(1);
        self.send(number, 101, acknowledgement, ACK, 0);
        assert_eq!(self.stack.poll_event(), Some(Event::Writable(id)));
        Peer {
            id,
            number,
            sequence: 101,
            acknowledgement,
        }
    }

    pub fn send(
        &mut self,
        number: u32,
        sequence: u32,
        acknowledgement: u32,
        flags: u8,
        len: usize,
    ) {
        prepare(
            &mut self.packet,
            number,
            sequence,
            acknowledgement,
            flags,
            len,
        );
        self.stack.handle_packet(self.now, &self.packet, PROMISED);
    }

    /// The next flow: any of them, so that no cache knows which.
    pub fn pick(&mut self) -> usize {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as usize % self.flows.len()
    }

    /// 64 bytes in, 64 bytes out on one flow: two packets.
    pub fn echo(&mut self) {
        self.now += Duration::from_micros(2);
        let index = self.pick();
        let peer = &mut self.flows[index];
        prepare(
            &mut self.packet,
            peer.number,
            peer.sequence,
            peer.acknowledgement,
            PSH_ACK,
            64,
        );
        self.stack.handle_packet(self.now, &self.packet, PROMISED);
        let id = peer.id;
        while let Some(event) = self.stack.poll_event() {
            black_box(event);
        }
        let mut request = [0; 64];
        let read = self.stack.recv(id, |bytes| {
            request.copy_from_slice(&bytes[..64]);
            64
        });
        black_box(read).unwrap();
        let _ = self.stack.recv(id, <[u8]>::len);
        self.stack
            .send(id, |space| {
                space[..64].copy_from_slice(&request);
                64
            })
            .unwrap();
        // A flow that nobody picked for a second repeats its last answer.
        let mut answers = 0;
        while let Some((len, _)) = self.stack.poll_packet(self.now, &mut self.buffer) {
            answers += usize::from(len == 104);
        }
        assert!(answers > 0);
        peer.sequence = peer.sequence.wrapping_add(64);
        peer.acknowledgement = peer.acknowledgement.wrapping_add(64);
    }

    /// Lets time pass, and what is due happen.
    pub fn rest(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(10);
            while self.stack.poll_packet(self.now, &mut self.buffer).is_some() {}
        }
    }

    /// An acknowledgement that says nothing new: parse, find the flow, let TCP look at it.
    pub fn acknowledge(&mut self) {
        self.now += Duration::from_micros(1);
        let index = self.pick();
        let peer = &mut self.flows[index];
        prepare(
            &mut self.packet,
            peer.number,
            peer.sequence,
            peer.acknowledgement,
            ACK,
            0,
        );
        self.stack.handle_packet(self.now, &self.packet, PROMISED);
        assert!(self.stack.poll_packet(self.now, &mut self.buffer).is_none());
    }

    /// One 64 KiB segment in and read.
    pub fn receive(&mut self, len: usize) {
        self.now += Duration::from_micros(20);
        let peer = &mut self.flows[0];
        prepare(
            &mut self.packet,
            peer.number,
            peer.sequence,
            peer.acknowledgement,
            ACK,
            len,
        );
        self.stack.handle_packet(self.now, &self.packet, PROMISED);
        let id = peer.id;
        while let Some(event) = self.stack.poll_event() {
            black_box(event);
        }
        let mut left = len;
        while left > 0 {
            let read = self.stack.recv(id, |bytes| {
                // The owner's one copy.
                self.buffer[..bytes.len()].copy_from_slice(bytes);
                left -= bytes.len();
                bytes.len()
            });
            black_box(read).unwrap();
        }
        peer.sequence = peer.sequence.wrapping_add(len as u32);
        while self.stack.poll_packet(self.now, &mut self.buffer).is_some() {}
    }

    /// One 64 KiB segment written, sent and acknowledged.
    pub fn transmit(&mut self, len: usize, payload: &[u8]) {
        self.now += Duration::from_micros(20);
        let id = self.flows[0].id;
        let mut sent = 0;
        while sent < len {
            sent += self
                .stack
                .send(id, |space| {
                    let part = space.len().min(len - sent);
                    space[..part].copy_from_slice(&payload[..part]);
                    part
                })
                .unwrap();
        }
        while self.stack.poll_packet(self.now, &mut self.buffer).is_some() {}
        let peer = &mut self.flows[0];
        peer.acknowledgement = peer.acknowledgement.wrapping_add(len as u32);
        prepare(
            &mut self.packet,
            peer.number,
            peer.sequence,
            peer.acknowledgement,
            ACK,
            0,
        );
        self.stack.handle_packet(self.now, &self.packet, PROMISED);
        assert!(self.stack.poll_packet(self.now, &mut self.buffer).is_none());
    }

    /// A flow from SYN to the end of the handshake, and away again.
    pub fn accept(&mut self, number: u32) {
        self.now += Duration::from_micros(10);
        let peer = self.open(number);
        let (sequence, acknowledgement) = (peer.sequence, peer.acknowledgement);
        self.send(number, sequence, acknowledgement, RST, 0);
        assert_eq!(self.stack.poll_event(), Some(Event::Reset(peer.id)));
        self.stack.reset(peer.id);
    }
}

pub fn header() -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0];
    packet.extend([10, 0, 0, 1, 192, 0, 2, 7, 0, 1]);
    packet.extend([0, 80]);
    packet
}

/// Completes `packet` to a segment of flow `number` with these numbers and `len` bytes of payload.
fn prepare(
    packet: &mut Vec<u8>,
    number: u32,
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
    len: usize,
) {
    // A SYN offers an MSS of 65,480 and a window scale of 7.
    let options: &[u8] = if flags == SYN {
        &[2, 4, 0xFF, 0xC8, 3, 3, 7, 0]
    } else {
        &[]
    };
    let total = 40 + options.len() + len;
    packet.resize(total, 0x55);
    packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
    let (host, port) = (number / 50_000, number % 50_000 + 1);
    packet[14..16].copy_from_slice(&(host as u16 + 1).to_be_bytes());
    packet[20..22].copy_from_slice(&(port as u16).to_be_bytes());
    packet[24..28].copy_from_slice(&sequence.to_be_bytes());
    packet[28..32].copy_from_slice(&acknowledgement.to_be_bytes());
    packet[32] = (((20 + options.len()) / 4) << 4) as u8;
    packet[33] = flags;
    packet[34..36].copy_from_slice(&0xFFFFu16.to_be_bytes());
    packet[38..40].fill(0);
    packet[40..40 + options.len()].copy_from_slice(options);
    packet[10..12].fill(0);
    let mut sum: u32 = packet[..20]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

fn word(packet: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
}
