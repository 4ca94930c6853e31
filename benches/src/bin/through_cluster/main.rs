//! How does one flow through `tp` compare with `kubectl port-forward`, on the real test cluster? (C1 to C6, C8)
//!
//! Runs in the laptop namespace, which has no route to pods; `benches/cluster.sh` prepares the cluster and calls it. Both
//! tools reach the same server (`peer`), rounds are interleaved, and every figure is printed with the ratio of its own
//! round. It knows nothing of how either tool works: it only opens sockets and counts.

#![expect(clippy::print_stdout, reason = "a bench's table is its output")]

mod diverted;
mod measure;
mod path;

use std::time::Duration;

use anyhow::{Context, Result};
use measure::{
    Spread, connected, first_byte, round_trips, server_first, small_beside_bulk, throughput,
};
use path::{Direction, Kubectl, Path, Tp};

/// Interleaved rounds of every figure.
const ROUNDS: usize = 5;
/// Bytes of one throughput round; about a second at the rates a port-forward reaches.
const BULK: u64 = 192 * 1024 * 1024;
/// New connections a round.
const CONNECTIONS: usize = 60;
/// One-byte round trips a round.
const ROUND_TRIPS: usize = 400;

fn main() -> Result<()> {
    let server = std::env::var("PEER").context("PEER names the server inside the cluster")?;
    let pod =
        std::env::var("PEER_POD").context("PEER_POD names the server's pod, as namespace/pod")?;
    let websocket = Kubectl::start(&pod, true)?;
    let spdy = Kubectl::start(&pod, false)?;
    let started = std::time::Instant::now();
    let tp = Tp::connect(&server)?;
    first_byte(&tp)?;
    println!(
        "C5 tp connect to first byte of a service: {:.2} s",
        started.elapsed().as_secs_f64()
    );
    println!("{}", tp.versions()?);

    let paths: [&dyn Path; 3] = [&websocket, &spdy, &tp];
    let questions: Vec<String> = std::env::args().skip(1).collect();
    let asked = |question: &str| questions.is_empty() || questions.iter().any(|q| q == question);
    if asked("bulk") {
        for direction in [Direction::Down, Direction::Up] {
            compare(&format!("C1 {direction:?}, MB/s"), &paths, |path| {
                throughput(path, direction, BULK)
            })?;
        }
    }
    let connecting: [(&str, Timed); 3] = [
        ("C2 new connection to first echoed byte, ms", first_byte),
        ("C2 connected (SOCKS success), ms", connected),
        (
            "C2 new connection to a server's first byte, ms",
            server_first,
        ),
    ];
    for (what, figure) in connecting.into_iter().filter(|_| asked("connections")) {
        compare(what, &paths, |path| {
            let times = (0..CONNECTIONS).map(|_| figure(path).map(millis));
            Ok(Spread::of(times.collect::<Result<_>>()?).median)
        })?;
    }
    if asked("round-trips") {
        compare("C3 one-byte round trip p50, ms", &paths, |path| {
            Ok(Spread::of(round_trips(path, ROUND_TRIPS)?).median)
        })?;
    }
    if asked("beside-bulk") {
        compare("C4 p99 of a small request alone, ms", &paths, |path| {
            Ok(Spread::of(round_trips(path, ROUND_TRIPS)?).p99)
        })?;
        compare(
            "C4 p99 of a small request beside a saturating flow, ms",
            &paths,
            |path| Ok(Spread::of(small_beside_bulk(path, ROUND_TRIPS)?).p99),
        )?;
    }
    if asked("intercept") {
        diverted::measure(&tp, &targets()?)?;
    }
    println!("C8 daemon resident: {:.1} MiB", tp.resident_mib()?);
    Ok(())
}

/// `TARGETS`: name=address of each pod that may be intercepted.
fn targets() -> Result<Vec<(String, String)>> {
    let targets = std::env::var("TARGETS").context("TARGETS names the pods to intercept")?;
    let pair = |word: &str| {
        let (name, address) = word.split_once('=').context("name=address")?;
        Ok((name.to_owned(), address.to_owned()))
    };
    targets.split_whitespace().map(pair).collect()
}

/// Runs `figure` on every path in turn, `ROUNDS` times, and prints medians, spreads and the last path's ratio to the others.
fn compare(
    what: &str,
    paths: &[&dyn Path],
    figure: impl Fn(&dyn Path) -> Result<f64>,
) -> Result<()> {
    let mut figures = vec![Vec::with_capacity(ROUNDS); paths.len()];
    for _ in 0..ROUNDS {
        for (path, figures) in paths.iter().zip(&mut figures) {
            figures.push(figure(*path).with_context(|| format!("{what}: {}", path.name()))?);
        }
    }
    println!("\n{what}");
    let ours = figures.last().cloned().unwrap_or_default();
    for (path, figures) in paths.iter().zip(figures) {
        let ratio = Spread::of(
            ours.iter()
                .zip(&figures)
                .map(|(ours, theirs)| ours / theirs)
                .collect(),
        );
        let spread = Spread::of(figures);
        println!(
            "  {:<22} {:>9.2}  ({:.2} to {:.2})   tp / it {:.2} ({:.2} to {:.2})",
            path.name(),
            spread.median,
            spread.least,
            spread.most,
            ratio.median,
            ratio.least,
            ratio.most
        );
    }
    Ok(())
}

/// One connection, timed.
type Timed = fn(&dyn Path) -> Result<Duration>;

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
