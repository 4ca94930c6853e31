//! What is measured on one path: throughput, round trips, time to the first byte; and how samples are summed up.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::path::{Direction, Path, Port};

/// Bytes a call hands to the kernel.
const BLOCK: usize = 256 * 1024;

/// Samples summed up.
pub(crate) struct Spread {
    pub(crate) least: f64,
    pub(crate) median: f64,
    pub(crate) p99: f64,
    pub(crate) most: f64,
}

impl Spread {
    pub(crate) fn of(mut samples: Vec<f64>) -> Self {
        assert!(!samples.is_empty(), "a figure has samples");
        samples.sort_by(f64::total_cmp);
        let at = |share: f64| samples[((samples.len() - 1) as f64 * share).round() as usize];
        Self {
            least: at(0.0),
            median: at(0.5),
            p99: at(0.99),
            most: at(1.0),
        }
    }
}

/// Megabytes a second of `bytes` over one new flow.
pub(crate) fn throughput(path: &dyn Path, direction: Direction, bytes: u64) -> Result<f64> {
    let mut stream = path.open(Port::Commands)?;
    let started = Instant::now();
    match direction {
        Direction::Down => {
            command(&mut stream, b'D', bytes)?;
            receive(&mut stream, bytes, &AtomicBool::new(false))?;
        }
        Direction::Up => {
            command(&mut stream, b'U', bytes)?;
            send(&mut stream, bytes)?;
            let mut done = [0; 1];
            stream
                .read_exact(&mut done)
                .context("the server's receipt")?;
            ensure!(done == *b".", "the server's receipt is wrong");
        }
    }
    Ok(bytes as f64 / 1e6 / started.elapsed().as_secs_f64())
}

/// From `connect` until the tool says that the server is connected.
pub(crate) fn connected(path: &dyn Path) -> Result<Duration> {
    let started = Instant::now();
    let _stream = path.open(Port::Commands)?;
    Ok(started.elapsed())
}

/// From `connect` to the first echoed byte of a new connection.
pub(crate) fn first_byte(path: &dyn Path) -> Result<Duration> {
    let started = Instant::now();
    let mut stream = path.open(Port::Commands)?;
    stream.write_all(b"Ex")?;
    let mut answer = [0; 1];
    stream
        .read_exact(&mut answer)
        .context("the first echoed byte")?;
    ensure!(answer == *b"x", "the echo is wrong");
    Ok(started.elapsed())
}

/// From `connect` to the first byte of a server that speaks first.
pub(crate) fn server_first(path: &dyn Path) -> Result<Duration> {
    let started = Instant::now();
    let mut stream = path.open(Port::ServerFirst)?;
    let mut greeting = [0; 1];
    stream.read_exact(&mut greeting).context("the greeting")?;
    ensure!(greeting == *b"!", "the greeting is wrong");
    Ok(started.elapsed())
}

/// `count` one-byte round trips on one connection, in milliseconds each.
pub(crate) fn round_trips(path: &dyn Path, count: usize) -> Result<Vec<f64>> {
    let mut stream = path.open(Port::Commands)?;
    stream.write_all(b"E")?;
    let mut answer = [0; 1];
    (0..count)
        .map(|round| {
            let sent = [round as u8];
            let started = Instant::now();
            stream.write_all(&sent)?;
            stream.read_exact(&mut answer)?;
            ensure!(answer == sent, "the echo is wrong");
            Ok(started.elapsed().as_secs_f64() * 1e3)
        })
        .collect()
}

/// The same round trips while another flow of the same tool downloads as fast as it can.
pub(crate) fn small_beside_bulk(path: &dyn Path, count: usize) -> Result<Vec<f64>> {
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        let bulk = scope.spawn(|| {
            let mut stream = path.open(Port::Commands)?;
            command(&mut stream, b'D', 1 << 40)?;
            receive(&mut stream, 1 << 40, &enough)
        });
        let samples = round_trips(path, count);
        enough.store(true, Ordering::Relaxed);
        let received = bulk.join().expect("the bulk thread does not panic")?;
        ensure!(
            received > 16 << 20,
            "the other flow was not saturating: {received} bytes"
        );
        samples
    })
}

fn command(stream: &mut TcpStream, command: u8, count: u64) -> Result<()> {
    let mut request = [command; 9];
    request[1..].copy_from_slice(&count.to_be_bytes());
    Ok(stream.write_all(&request)?)
}

fn send(stream: &mut TcpStream, mut bytes: u64) -> Result<()> {
    let block = vec![0x5a; BLOCK];
    while bytes > 0 {
        let part = bytes.min(BLOCK as u64);
        stream.write_all(&block[..part as usize])?;
        bytes -= part;
    }
    Ok(())
}

/// Reads until `bytes` came or somebody has `enough`; answers how many came.
fn receive(stream: &mut TcpStream, bytes: u64, enough: &AtomicBool) -> Result<u64> {
    let mut block = vec![0; BLOCK];
    let mut received = 0;
    while received < bytes && !enough.load(Ordering::Relaxed) {
        match stream.read(&mut block)? {
            0 => anyhow::bail!("the stream ended after {received} of {bytes} bytes"),
            read => received += read as u64,
        }
    }
    Ok(received)
}
