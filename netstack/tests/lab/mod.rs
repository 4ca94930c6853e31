//! A laboratory: a network namespace whose only way out is a TUN device that the stack serves. What runs in it uses the
//! kernel's TCP, so each test has a peer that nobody here wrote. It needs root and says so when it is not.

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

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use tp_netstack::{Config, DeviceOffload, LONGEST_PACKET, Offload, Stack, VIRTIO_HEADER};

pub mod services;
pub mod sys;

use super::support::{self, Impairment, Pipe};
use services::{Record, Records, Services};

/// What a laboratory looks like.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub mtu: u16,
    pub offload: bool,
    pub impairment: Impairment,
    pub seed: u64,
    /// Checks the stack's invariants after each packet: too slow for bulk.
    pub checks: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            mtu: 1500,
            offload: true,
            impairment: Impairment::default(),
            seed: 1,
            checks: true,
        }
    }
}

/// The inside of a laboratory, for the code under test.
#[derive(Clone)]
pub struct Lab {
    records: Records,
    next_port: Arc<AtomicU16>,
}

/// Below those that the kernel chooses from.
const FIRST_PORT: u16 = 10_000;

pub const V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));
pub const V6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7));

/// Whether laboratories can be made here. Says loudly if not.
pub fn is_possible() -> bool {
    let root = std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|status| status.contains("\nUid:\t0\t0"));
    if !root {
        eprintln!("SKIPPED: this test needs root for /dev/net/tun and a network namespace");
    }
    root
}

/// Runs `inside` in a laboratory of its own, with the stack in another thread.
pub fn run<R: Send + 'static>(setup: Setup, inside: impl FnOnce(&Lab) -> R + Send + 'static) -> R {
    let outcome = thread::spawn(move || {
        sys::enter_namespace().expect("unshare");
        let tun = sys::open_tun("tp0", setup.offload).expect("open a TUN device");
        configure(setup.mtu);
        let lab = Lab {
            records: Arc::new(Mutex::new(HashMap::new())),
            next_port: Arc::new(AtomicU16::new(FIRST_PORT)),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let driver = {
            let (stop, records) = (stop.clone(), lab.records.clone());
            thread::spawn(move || Driver::new(tun, setup, records).run(&stop))
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| inside(&lab)));
        stop.store(true, Ordering::Relaxed);
        driver.join().expect("the stack's thread");
        match result {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    match outcome.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn configure(mtu: u16) {
    let mut commands = vec![
        "link set lo up".to_owned(),
        format!("link set tp0 mtu {mtu} txqueuelen 2000 up"),
        "addr add 10.77.0.1/16 dev tp0".to_owned(),
        "route add default dev tp0 congctl cubic".to_owned(),
    ];
    if mtu >= 1280 {
        commands.push("-6 addr add fd77::1/64 dev tp0 nodad".to_owned());
        commands.push("-6 route add default dev tp0 congctl cubic".to_owned());
    }
    for arguments in commands {
        ip(&arguments);
    }
    while mtu >= 1280 && !has_local_route() {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs `ip` in this thread's namespace.
pub fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .expect("ip");
    assert!(status.success(), "ip {arguments}");
}

/// The kernel makes an IPv6 address usable for sending at once, but for receiving a little later.
fn has_local_route() -> bool {
    let arguments = ["-6", "route", "show", "table", "local", "fd77::1"];
    let output = Command::new("ip").args(arguments).output().expect("ip");
    !output.stdout.is_empty()
}

impl Lab {
    /// Connects from a port that no other connection of this laboratory has: the kernel gives one port to several
    /// connections with different destinations, and [`Self::record`] finds them by the port.
    pub fn connect(&self, ip: IpAddr, port: u16) -> TcpStream {
        let destination = SocketAddr::new(ip, port);
        let socket = Socket::new(Domain::for_address(destination), Type::STREAM, None).unwrap();
        let own: IpAddr = match ip {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let own_port = self.next_port.fetch_add(1, Ordering::Relaxed);
        socket.bind(&SocketAddr::new(own, own_port).into()).unwrap();
        socket
            .connect_timeout(&destination.into(), Duration::from_secs(20))
            .expect("connect");
        let stream = TcpStream::from(socket);
        stream
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        stream
    }

    /// What the owner knows of the flow from `source`, once `done` says it is what is waited for.
    pub fn record(&self, source: SocketAddr, done: impl Fn(&Record) -> bool) -> Record {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let record = self.records.lock().unwrap().get(&source).copied();
            if let Some(record) = record.filter(&done) {
                return record;
            }
            assert!(Instant::now() < deadline, "the owner has {record:?}");
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The stack's thread: the only I/O there is.
struct Driver {
    tun: File,
    setup: Setup,
    stack: Stack,
    services: Services,
    /// Present if the link is to be worse than the device.
    pipes: Option<(Pipe, Pipe)>,
    buffer: Vec<u8>,
}

impl Driver {
    fn new(tun: File, setup: Setup, records: Records) -> Self {
        let offload = DeviceOffload {
            checksum: setup.offload,
            tso4: setup.offload,
            tso6: setup.offload,
        };
        let config = Config {
            mtu: setup.mtu,
            offload,
            seed: setup.seed,
            ..Config::default()
        };
        let impaired = setup.impairment != Impairment::default();
        let pipes = impaired.then(|| {
            (
                Pipe::new(setup.seed, setup.impairment),
                Pipe::new(setup.seed ^ 0xABCD, setup.impairment),
            )
        });
        Self {
            tun,
            setup,
            stack: Stack::new(config, Instant::now()),
            services: Services::new(records),
            pipes,
            buffer: vec![0; VIRTIO_HEADER + LONGEST_PACKET],
        }
    }

    fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            self.read(now);
            self.services.serve(&mut self.stack, now);
            self.write(now);
            if self.setup.checks {
                self.stack.check();
            }
            sys::wait_readable(&self.tun, self.patience());
        }
    }

    fn patience(&self) -> Duration {
        let pipes = self
            .pipes
            .iter()
            .flat_map(|(up, down)| [up.next(), down.next()]);
        let next = pipes
            .chain([self.stack.poll_timeout(), self.services.next()])
            .flatten()
            .min();
        let most = Duration::from_millis(50);
        next.map_or(most, |next| {
            next.saturating_duration_since(Instant::now()).min(most)
        })
    }

    fn header(&self) -> usize {
        if self.setup.offload { VIRTIO_HEADER } else { 0 }
    }

    fn read(&mut self, now: Instant) {
        for _ in 0..64 {
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = self.tun.read(&mut buffer);
            match &read {
                Ok(len) => match &mut self.pipes {
                    Some((up, _)) => up.send(now, &buffer[..*len]),
                    None => self.handle(now, &buffer[..*len]),
                },
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
            }
            self.buffer = buffer;
            if read.is_err() {
                break;
            }
        }
        while let Some(packet) = self.pipes.as_mut().and_then(|(up, _)| up.receive(now)) {
            self.handle(now, &packet);
        }
    }

    fn handle(&mut self, now: Instant, frame: &[u8]) {
        let (header, packet) = frame.split_at(self.header());
        let offload = header
            .first_chunk()
            .map_or(Ok(Offload::default()), Offload::from_virtio)
            .expect("a known offload");
        self.stack.handle_packet(now, packet, offload);
    }

    fn write(&mut self, now: Instant) {
        let header = self.header();
        while let Some((len, offload)) = self.stack.poll_packet(now, &mut self.buffer[header..]) {
            self.buffer[..header].copy_from_slice(&offload.to_virtio()[..header]);
            match &mut self.pipes {
                Some((_, down)) => down.send(now, &self.buffer[..header + len]),
                None => write_all(&mut self.tun, &self.buffer[..header + len]),
            }
        }
        while let Some(packet) = self.pipes.as_mut().and_then(|(_, down)| down.receive(now)) {
            write_all(&mut self.tun, &packet);
        }
    }
}

fn write_all(tun: &mut File, packet: &[u8]) {
    let written = tun
        .write(packet)
        .unwrap_or_else(|error| panic!("{error} for {} bytes", packet.len()));
    assert_eq!(written, packet.len());
}

/// Sends `len` bytes of the stream `name`.
pub fn send_stream(stream: &mut TcpStream, name: u64, len: u64) {
    let mut chunk = vec![0; 64 << 10];
    let mut sent = 0;
    while sent < len {
        let part = chunk.len().min((len - sent) as usize);
        support::fill(name, sent, &mut chunk[..part]);
        stream.write_all(&chunk[..part]).expect("write");
        sent += part as u64;
    }
}

/// Reads the stream `name` until FIN; its length.
pub fn receive_stream(stream: &mut TcpStream, name: u64) -> u64 {
    let mut chunk = vec![0; 64 << 10];
    let mut received = 0;
    loop {
        let read = stream.read(&mut chunk).expect("read");
        if read == 0 {
            return received;
        }
        support::expect(name, received, &chunk[..read]);
        received += read as u64;
    }
}
