//! How much dearer a packet is when its flow is one of thousands (B7): a table of ratios, in processor time, from rounds
//! that take turns, so that it can be read on a machine that does other work as well.

#![allow(clippy::unwrap_used, reason = "a benchmark that is surprised panics")]
#![allow(clippy::print_stdout, reason = "the table is this program's output")]

#[path = "support/mod.rs"]
mod support;

use std::time::Duration;

use support::Bench;

const COUNTS: [usize; 3] = [1, 10_000, 50_000];
const ROUNDS: usize = 15;
const PACKETS: u32 = 40_000;

fn main() {
    memory();
    let mut benches = COUNTS.map(Bench::new);
    for (bench, count) in benches.iter_mut().zip(COUNTS) {
        for _ in 0..count * 3 {
            bench.echo();
        }
    }
    table("acknowledgement in", &mut benches, Bench::acknowledge);
    table("64 bytes in and 64 out", &mut benches, Bench::echo);
}

fn table(name: &str, benches: &mut [Bench; 3], step: fn(&mut Bench)) {
    let mut costs = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        for (bench, costs) in benches.iter_mut().zip(&mut costs) {
            let start = processor_time();
            for _ in 0..PACKETS {
                step(bench);
            }
            costs.push((processor_time() - start) as f64 / f64::from(PACKETS));
        }
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    for (index, count) in COUNTS.iter().enumerate() {
        let ratio = median(
            costs[index]
                .iter()
                .zip(&costs[0])
                .map(|(many, one)| many / one)
                .collect(),
        );
        println!(
            "{name}: {count} flows {:.0} ns, {ratio:.2} of one flow",
            median(costs[index].clone())
        );
    }
}

/// What a flow that has carried bytes and then fell silent costs in resident memory (B10).
fn memory() {
    const FLOWS: usize = 10_000;
    let before = resident();
    let mut bench = Bench::new(FLOWS);
    for _ in 0..FLOWS * 4 {
        bench.echo();
    }
    for _ in 0..FLOWS * 12 {
        bench.acknowledge();
    }
    let busy = resident() - before;
    bench.rest(Duration::from_secs(3));
    let idle = resident() - before;
    println!(
        "{FLOWS} flows: {} bytes each while they talk, {} idle",
        busy / FLOWS,
        idle / FLOWS
    );
}

/// Resident bytes of this process.
fn resident() -> usize {
    let usage = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    usage
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<usize>().ok())
        .expect("pages")
        * 4096
}

/// Nanoseconds that this thread has run.
fn processor_time() -> u64 {
    let usage = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    usage
        .split(' ')
        .next()
        .and_then(|time| time.parse().ok())
        .expect("nanoseconds")
}
