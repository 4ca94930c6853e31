//! The load: blocking threads, so that the generator costs as little as it can.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const BLOCK: usize = 256 * 1024;

/// Which way the bytes go, seen from the load generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From it.
    Up,
    /// To it.
    Down,
}

impl Direction {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Up, Self::Down];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

impl FromStr for Direction {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        match text {
            "up" => Ok(Self::Up),
            "down" => Ok(Self::Down),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// MB/s of `flows` flows that move `total` bytes together, from the first connection to the last confirmed byte.
///
/// # Errors
/// A flow ended early.
pub fn throughput(
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
pub struct Times(Vec<Duration>);

impl Times {
    /// Microseconds that half of them took at most.
    pub fn p50_us(&self) -> f64 {
        self.at(0.50)
    }

    /// Microseconds that 99 of 100 took at most.
    pub fn p99_us(&self) -> f64 {
        self.at(0.99)
    }

    fn at(&self, quantile: f64) -> f64 {
        self.0[(self.0.len() as f64 * quantile) as usize].as_secs_f64() * 1e6
    }
}

/// Round trips of one byte on one flow.
///
/// # Errors
/// The flow ended.
pub fn round_trips(address: SocketAddr, count: usize) -> io::Result<Times> {
    let mut stream = echo(address)?;
    times(count, || {
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    })
}

/// New flows, each until its first echoed byte.
///
/// # Errors
/// A flow could not be opened, or ended.
pub fn connect_times(address: SocketAddr, count: usize) -> io::Result<Times> {
    times(count, || {
        let mut stream = echo(address)?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    })
}

/// Connections per second: opened, one byte echoed, ended in order by the far peer and then here, `at_once` at a time.
///
/// The far peer ends first, so that TIME-WAIT takes no port of whoever connects.
///
/// # Errors
/// One of them failed.
pub fn connections(address: SocketAddr, at_once: u64, count: u64) -> io::Result<f64> {
    let start = Instant::now();
    let threads: Vec<_> = (0..at_once)
        .map(|_| thread::spawn(move || (0..count / at_once).try_for_each(|_| once(address))))
        .collect();
    for thread in threads {
        thread.join().expect("no panic in a connection")?;
    }
    Ok((count / at_once * at_once) as f64 / start.elapsed().as_secs_f64())
}

fn once(address: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.write_all(b"Ox")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer == b"x" {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
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
pub struct Stalled(TcpStream);

impl Stalled {
    /// Opens it.
    ///
    /// # Errors
    /// It is refused.
    pub fn open(address: SocketAddr) -> io::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        command(&mut stream, b'D', u64::MAX)?;
        Ok(Self(stream))
    }

    /// The flow was slowed and not ended: its bytes are still there to read.
    ///
    /// # Errors
    /// They are not.
    pub fn still_alive(mut self) -> io::Result<()> {
        self.0.read_exact(&mut [0; BLOCK])
    }
}

/// A flow that moves all it can until it is stopped.
pub struct Saturating {
    stop: Arc<AtomicBool>,
    moved: Arc<AtomicU64>,
    thread: JoinHandle<()>,
    start: Instant,
}

impl Saturating {
    /// Starts it.
    ///
    /// # Errors
    /// It is refused.
    pub fn start(address: SocketAddr, direction: Direction) -> io::Result<Self> {
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
    ///
    /// # Panics
    /// When the flow broke.
    pub fn stop(self) -> f64 {
        let rate =
            self.moved.load(Ordering::Relaxed) as f64 / self.start.elapsed().as_secs_f64() / 1e6;
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic in the saturating flow");
        rate
    }
}

/// Flows that have carried a byte each way and are idle since.
///
/// # Errors
/// One of them could not be opened.
pub fn idle_flows(address: SocketAddr, count: usize) -> io::Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(b"Hx")?;
            stream.read_exact(&mut [0])?;
            Ok(stream)
        })
        .collect()
}
