//! How fast the stack alone is, beside the kernel's loopback (B4): a program in a namespace sends to the stack, which
//! throws the bytes away, or takes what the stack makes up; the same with a kernel socket at the far end. Rounds take turns.
//! Each far end copies every byte once, as an owner would. Needs root, for the namespace and its TUN device.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a benchmark that is surprised panics"
)]
#![allow(clippy::print_stdout, reason = "the table is this program's output")]

#[path = "../tests/lab/sys.rs"]
#[allow(unreachable_pub, missing_docs, reason = "written for the tests")]
mod sys;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tp_netstack::{
    Config, DeviceOffload, DialOutcome, Event, FlowId, LONGEST_PACKET, Offload, Received, Stack,
    VIRTIO_HEADER,
};

const ROUNDS: usize = 9;
const TOTAL: u64 = 1 << 30;
const BLOCK: usize = 256 << 10;
const SINK: u16 = 9;
const SOURCE: u16 = 19;

fn main() {
    let root = std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|status| status.contains("\nUid:\t0\t0"));
    if !root {
        println!("SKIPPED: this bench needs root for a network namespace and /dev/net/tun");
        return;
    }
    sys::enter_namespace().unwrap();
    ip("link set lo up");
    for mtu in [65_520, 1_500] {
        compare(mtu);
    }
}

fn compare(mtu: u16) {
    let tun = sys::open_tun("tp0", true).unwrap();
    ip(&format!("link set tp0 mtu {mtu} txqueuelen 2000 up"));
    ip("addr replace 10.77.0.1/16 dev tp0");
    ip("route replace default dev tp0 congctl cubic");
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let driver = thread::spawn(move || Driver::new(tun, mtu).run(&stopped));
    let loopback = [kernel_sink(), kernel_source()];
    let stack = [SINK, SOURCE].map(|port| SocketAddr::from(([192, 0, 2, 7], port)));
    let measures = [
        ("sink, to the stack", sink as Measure),
        ("source, from the stack", source),
    ];
    for ((name, measure), (kernel, ours)) in
        measures.into_iter().zip(loopback.into_iter().zip(stack))
    {
        let mut rounds: Vec<(f64, f64)> = (0..ROUNDS)
            .map(|_| (measure(ours), measure(kernel)))
            .collect();
        rounds.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
        let ratio = |at: usize| rounds[at].0 / rounds[at].1;
        let (ours, kernel) = rounds[ROUNDS / 2];
        println!(
            "MTU {mtu}, {name}: {ours:.0} MB/s, loopback {kernel:.0}, ratio {:.2} [{:.2}, {:.2}], {ROUNDS} rounds",
            ratio(ROUNDS / 2),
            ratio(0),
            ratio(ROUNDS - 1)
        );
    }
    stop.store(true, Ordering::Relaxed);
    driver.join().unwrap();
}

/// MB/s.
type Measure = fn(SocketAddr) -> f64;

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// MB/s from here to `address`, until it has said that all has come.
fn sink(address: SocketAddr) -> f64 {
    let mut stream = TcpStream::connect(address).unwrap();
    let block = vec![7; BLOCK];
    let start = Instant::now();
    for _ in 0..TOTAL / BLOCK as u64 {
        stream.write_all(&block).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    rate(start)
}

/// MB/s from `address` to here.
fn source(address: SocketAddr) -> f64 {
    let mut stream = TcpStream::connect(address).unwrap();
    let mut block = vec![0; BLOCK];
    let start = Instant::now();
    let mut left = TOTAL;
    while left > 0 {
        let read = stream.read(&mut block).unwrap();
        assert!(read > 0, "ended early");
        left = left.saturating_sub(read as u64);
    }
    rate(start)
}

fn rate(start: Instant) -> f64 {
    TOTAL as f64 / start.elapsed().as_secs_f64() / 1e6
}

fn kernel_sink() -> SocketAddr {
    serve(|mut stream, block| while stream.read(block).unwrap_or(0) > 0 {})
}

fn kernel_source() -> SocketAddr {
    // The reader leaves when it has enough.
    serve(|mut stream, block| while stream.write_all(block).is_ok() {})
}

fn serve(each: fn(TcpStream, &mut [u8])) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut block = vec![7; BLOCK];
        for stream in listener.incoming().flatten() {
            each(stream, &mut block);
        }
    });
    address
}

/// The stack's thread.
struct Driver {
    tun: File,
    stack: Stack,
    flows: Vec<(FlowId, u16)>,
    buffer: Vec<u8>,
    block: Vec<u8>,
}

impl Driver {
    fn new(tun: File, mtu: u16) -> Self {
        let offload = DeviceOffload {
            checksum: true,
            tso4: true,
            tso6: true,
        };
        let config = Config {
            mtu,
            offload,
            seed: 5,
            ..Config::default()
        };
        Self {
            tun,
            stack: Stack::new(config, Instant::now()),
            flows: Vec::new(),
            buffer: vec![0; VIRTIO_HEADER + LONGEST_PACKET],
            block: vec![7; BLOCK],
        }
    }

    fn run(mut self, stop: &AtomicBool) {
        const PATIENCE: Duration = Duration::from_millis(20);
        while !stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            let read = self.read(now);
            self.serve(now);
            let wrote = self.write(now);
            if !read && !wrote {
                let due = self.stack.poll_timeout();
                let wait = due.map_or(PATIENCE, |due| {
                    due.saturating_duration_since(now).min(PATIENCE)
                });
                sys::wait_readable(&self.tun, wait);
            }
        }
    }

    fn read(&mut self, now: Instant) -> bool {
        const BATCH: usize = 8;
        for turn in 0..BATCH {
            let Ok(len) = self.tun.read(&mut self.buffer) else {
                return turn > 0;
            };
            let (header, packet) = self.buffer[..len].split_first_chunk().unwrap();
            let offload = Offload::from_virtio(header).unwrap();
            self.stack.handle_packet(now, packet, offload);
        }
        true
    }

    fn write(&mut self, now: Instant) -> bool {
        const BATCH: usize = 8;
        for turn in 0..BATCH {
            let room = &mut self.buffer[VIRTIO_HEADER..];
            let Some((len, offload)) = self.stack.poll_packet(now, room) else {
                return turn > 0;
            };
            self.buffer[..VIRTIO_HEADER].copy_from_slice(&offload.to_virtio());
            self.tun
                .write_all(&self.buffer[..VIRTIO_HEADER + len])
                .unwrap();
        }
        true
    }

    fn serve(&mut self, now: Instant) {
        while let Some(event) = self.stack.poll_event() {
            match event {
                Event::FlowOpened {
                    id, destination, ..
                } => {
                    self.stack.dialed(id, DialOutcome::Accepted, now).unwrap();
                    self.flows.push((id, destination.port()));
                }
                Event::Reset(id) => {
                    self.stack.reset(id);
                    self.flows.retain(|flow| flow.0 != id);
                }
                Event::Closed(id) => self.flows.retain(|flow| flow.0 != id),
                _ => {}
            }
        }
        for &(id, port) in &self.flows {
            if port == SINK {
                swallow(&mut self.stack, id, &mut self.block);
            } else {
                fill(&mut self.stack, id, &self.block);
            }
        }
    }
}

fn swallow(stack: &mut Stack, id: FlowId, block: &mut [u8]) {
    loop {
        let taken = stack.recv(id, |bytes| {
            let len = bytes.len().min(block.len());
            block[..len].copy_from_slice(&bytes[..len]);
            len
        });
        match taken {
            Ok(Received::Data(_)) => {}
            Ok(Received::Finished) => {
                let _ = stack.finish(id);
                return;
            }
            Ok(Received::Empty) | Err(_) => return,
        }
    }
}

fn fill(stack: &mut Stack, id: FlowId, block: &[u8]) {
    let put = |space: &mut [u8]| {
        let len = space.len().min(block.len());
        space[..len].copy_from_slice(&block[..len]);
        len
    };
    while stack.send(id, put).is_ok_and(|sent| sent > 0) {}
}
