//! How soon does the first request of mine reach the workstation, and how long does one take from then on? (C6)
//!
//! A diverted request begins in a pod of the cluster and is answered by this program; a direct one begins here and is
//! answered in the cluster. Both cross the tunnel once in each direction, and their two ends are the same code, so what one
//! takes more than the other is the agent's and the manager's way.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tp_benches::http;

use crate::measure::Spread;
use crate::path::{Path, Port, Tp};

/// Fresh pods, one a round: none has an agent before.
const ROUNDS: usize = 5;

/// Requests on one kept connection a round.
const REQUESTS: u32 = 400;

/// Makes a request mine.
const HEADER: &str = "x-tp-bench";

/// Prints both figures. `targets` are the names of pods of namespace `bench` that serve as the peer does, with their
/// addresses.
pub(crate) fn measure(tp: &Tp, targets: &[(String, String)]) -> Result<()> {
    ensure!(targets.len() >= ROUNDS, "{ROUNDS} pods, one a round");
    let local = TcpListener::bind("127.0.0.1:0")?;
    let port = local.local_addr()?.port();
    thread::spawn(move || {
        for stream in local.incoming().flatten() {
            // A connection that ends early is seen by its client.
            thread::spawn(move || http::answer(stream, b"laptop"));
        }
    });
    let (mut first, mut direct, mut diverted, mut beside) = (vec![], vec![], vec![], vec![]);
    for (pod, address) in &targets[..ROUNDS] {
        first.push(until_first(tp, pod, address, port)?.as_secs_f64());
        direct.push(median(here(tp)?));
        diverted.push(median(there(tp, address, Some(HEADER))?));
        beside.push(median(there(tp, address, None)?));
        run(tp, &["leave", pod])?;
    }
    println!("\nC6 `tp intercept` to the first diverted answer, s");
    show("a pod without an agent", first);
    println!("\nC6 one request on a kept connection p50, ms");
    let ratio = diverted
        .iter()
        .zip(&direct)
        .map(|(ours, other)| ours / other);
    let ratio = Spread::of(ratio.collect());
    show("direct, to a pod", direct);
    show("diverted, from a pod", diverted);
    show("past the agent, pod to pod", beside);
    println!(
        "  diverted / direct {:.2} ({:.2} to {:.2})",
        ratio.median, ratio.least, ratio.most
    );
    Ok(())
}

fn show(what: &str, figures: Vec<f64>) {
    let spread = Spread::of(figures);
    println!(
        "  {what:<26} {:>9.3}  ({:.3} to {:.3})",
        spread.median, spread.least, spread.most
    );
}

fn median(samples: Vec<f64>) -> f64 {
    Spread::of(samples).median
}

/// From the start of the command until a request with the header, sent to the pod again and again, is answered here.
fn until_first(tp: &Tp, pod: &str, address: &str, port: u16) -> Result<Duration> {
    let started = Instant::now();
    let mut intercept = tp.command(&[
        "intercept",
        pod,
        "--port",
        &format!("{port}:7000"),
        "--http-header",
        &format!("{HEADER}=yes"),
    ]);
    let mut command = intercept
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    loop {
        let answers = exchange(tp, address, Some(HEADER), 1)?;
        if answers.who == "laptop" {
            let took = started.elapsed();
            let status = command.wait()?;
            ensure!(status.success(), "tp intercept: {status}");
            return Ok(took);
        }
        ensure!(
            started.elapsed() < Duration::from_secs(30),
            "{pod} is not diverted"
        );
    }
}

/// Milliseconds of each request from here to the peer.
fn here(tp: &Tp) -> Result<Vec<f64>> {
    let stream = tp.open(Port::Commands)?;
    Ok(http::ask(stream, None, REQUESTS)?.millis())
}

/// The same from the peer to the pod.
fn there(tp: &Tp, address: &str, header: Option<&str>) -> Result<Vec<f64>> {
    let answers = exchange(tp, address, header, REQUESTS)?;
    let wanted = if header.is_some() { "laptop" } else { "peer" };
    ensure!(
        answers.who == wanted,
        "{} answered, not {wanted}",
        answers.who
    );
    Ok(answers.millis())
}

/// Has the peer ask the pod, and gives what it saw.
fn exchange(tp: &Tp, address: &str, header: Option<&str>, count: u32) -> Result<http::Answers> {
    let mut stream: TcpStream = tp.open(Port::Commands)?;
    http::write_order(&mut stream, &format!("{address}:7000"), header, count)?;
    let mut report = String::new();
    stream.read_to_string(&mut report)?;
    http::Answers::parse(&report).with_context(|| format!("the peer says {report:?}"))
}

fn run(tp: &Tp, arguments: &[&str]) -> Result<()> {
    let status = tp.command(arguments).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "tp {arguments:?}: {status}");
    Ok(())
}
