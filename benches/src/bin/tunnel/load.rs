//! The load: blocking threads, so that the generator costs as little as it can.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const BLOCK: usize = 256 * 1024;

/// Which way the bytes go, seen from the load generator.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Up,
    Down,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

/// MB/s of `flows` flows that move `total` bytes together, from the first connection to the last confirmed byte.
pub(crate) fn throughput(
    address: SocketAddr,
    direction: Direction,
    flows: u64,
    total: u64,
) -> io::Result<f64> {
    let start = Instant::now();
    let threads: Vec<_> = (0..flows)
        .map(|_| thread::spawn(move || transfer(address, direction, total / flows)))
        .collect();
    for thread in threads {
        thread.join().expect("no panic in transfer")?;
    }
    Ok(total as f64 / start.elapsed().as_secs_f64() / 1e6)
}

fn transfer(address: SocketAddr, direction: Direction, bytes: u64) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    let mut block = vec![7; BLOCK];
    let mut left = bytes;
    match direction {
        Direction::Up => {
            command(&mut stream, b'U', bytes)?;
            while left > 0 {
                let size = left.min(BLOCK as u64) as usize;
                stream.write_all(&block[..size])?;
                left -= size as u64;
            }
            stream.read_exact(&mut block[..1])
        }
        Direction::Down => {
            command(&mut stream, b'D', bytes)?;
            while left > 0 {
                match stream.read(&mut block)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    size => left -= size as u64,
                }
            }
            Ok(())
        }
    }
}

fn command(stream: &mut TcpStream, kind: u8, count: u64) -> io::Result<()> {
    let mut request = [kind; 9];
    request[1..].copy_from_slice(&count.to_be_bytes());
    stream.write_all(&request)
}

/// Times in the order of their length.
pub(crate) struct Times(Vec<Duration>);

impl Times {
    pub(crate) fn p50_us(&self) -> f64 {
        self.at(0.50)
    }

    pub(crate) fn p99_us(&self) -> f64 {
        self.at(0.99)
    }

    fn at(&self, quantile: f64) -> f64 {
        self.0[(self.0.len() as f64 * quantile) as usize].as_secs_f64() * 1e6
    }
}

/// Round trips of one byte on one flow.
pub(crate) fn round_trips(address: SocketAddr, count: usize) -> io::Result<Times> {
    let mut stream = echo(address)?;
    times(count, || {
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    })
}

/// New flows, each until its first echoed byte.
pub(crate) fn connect_times(address: SocketAddr, count: usize) -> io::Result<Times> {
    times(count, || {
        let mut stream = echo(address)?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    })
}

fn echo(address: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.write_all(b"E")?;
    Ok(stream)
}

fn times(count: usize, mut step: impl FnMut() -> io::Result<()>) -> io::Result<Times> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        step()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(Times(times))
}

/// A flow whose reader takes nothing while its sender sends all it can.
pub(crate) struct Stalled(TcpStream);

impl Stalled {
    pub(crate) fn open(address: SocketAddr) -> io::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        command(&mut stream, b'D', u64::MAX)?;
        Ok(Self(stream))
    }

    /// The flow was slowed and not ended: its bytes are still there to read.
    pub(crate) fn still_alive(mut self) -> io::Result<()> {
        self.0.read_exact(&mut [0; BLOCK])
    }
}

/// A flow that moves all it can until it is stopped.
pub(crate) struct Saturating {
    stop: Arc<AtomicBool>,
    moved: Arc<AtomicU64>,
    thread: JoinHandle<()>,
    start: Instant,
}

impl Saturating {
    pub(crate) fn start(address: SocketAddr, direction: Direction) -> io::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        let (stop, moved) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&moved));
        let kind = if direction == Direction::Up {
            b'U'
        } else {
            b'D'
        };
        command(&mut stream, kind, u64::MAX)?;
        let thread = thread::spawn(move || {
            let mut block = vec![7; BLOCK];
            while !stopped.load(Ordering::Relaxed) {
                let size = match direction {
                    Direction::Up => stream.write(&block),
                    Direction::Down => stream.read(&mut block),
                };
                count.fetch_add(size.expect("the flow lives") as u64, Ordering::Relaxed);
            }
        });
        Ok(Self {
            stop,
            moved,
            thread,
            start: Instant::now(),
        })
    }

    /// Ends it and returns its MB/s.
    pub(crate) fn stop(self) -> f64 {
        let rate =
            self.moved.load(Ordering::Relaxed) as f64 / self.start.elapsed().as_secs_f64() / 1e6;
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic in the saturating flow");
        rate
    }
}

/// A destination that echoes the first byte of every flow and then keeps the flow open.
pub(crate) fn holder() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        let mut held = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let mut byte = [0];
            if stream
                .read_exact(&mut byte)
                .and_then(|()| stream.write_all(&byte))
                .is_ok()
            {
                held.push(stream);
            }
        }
    });
    Ok(address)
}

/// Flows that have carried a byte each way and are idle since.
pub(crate) fn idle_flows(address: SocketAddr, count: usize) -> io::Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            Ok(stream)
        })
        .collect()
}
