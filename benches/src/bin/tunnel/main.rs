//! How fast is the tunnel, beside plain loopback and beside `ssh -L`?
//!
//! `tunnel [loopback|ssh|streams|stalled|idle]...` prints one table for each question (all by default); `BENCH_ROUNDS=3`
//! makes it shorter. Every end runs in a
//! process of its own with one thread, as on two machines: load generator, entry, exit and the far peer. Rounds of the
//! compared paths alternate, so that a busy machine slows all of them alike.

mod ends;

use std::time::Duration;

use ends::{Carrier, Path};
use tp_benches::load::{self, Direction};
use tp_benches::process::{Running, free_address};
use tp_benches::ssh;
use tp_benches::table::{self, Table, Value};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Rounds of each measurement.
fn rounds() -> usize {
    const DEFAULT: usize = 7;
    let asked = std::env::var("BENCH_ROUNDS").ok();
    asked
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(DEFAULT)
}

const MIB: u64 = 1 << 20;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some("entry" | "exit") = arguments.first().map(String::as_str) {
        return ends::run(&arguments);
    }
    let wanted =
        |name: &str| arguments.is_empty() || arguments.iter().any(|argument| argument == name);
    table::print_machine(&[&["ssh", "-V"]]);
    if wanted("loopback") {
        loopback()?;
    }
    if wanted("ssh") {
        ssh_forward()?;
    }
    if wanted("streams") {
        streams()?;
    }
    if wanted("stalled") {
        stalled()?;
    }
    if wanted("idle") {
        idle()?;
    }
    Ok(())
}

/// B11: one flow through HTTP/2 without TLS against the same bytes straight over loopback.
fn loopback() -> anyhow::Result<()> {
    let direct = Path::direct()?;
    let plain = Path::tunnel(&direct, Carrier::Plain)?;
    let tls = Path::tunnel(&direct, Carrier::Tls)?;
    let mut table = Table::new(
        "B11 tunnel / loopback, 1 flow, MB/s (target >= 0.20 plain)",
        Value::Ratio(&["loopback"]),
    );
    for direction in [Direction::Up, Direction::Down] {
        for _ in 0..rounds() {
            table.add(
                direction,
                "loopback",
                load::throughput(direct.address, direction, 1, 2048 * MIB)?,
            );
            table.add(
                direction,
                "h2 plain",
                load::throughput(plain.address, direction, 1, 768 * MIB)?,
            );
            table.add(
                direction,
                "h2 + TLS",
                load::throughput(tls.address, direction, 1, 512 * MIB)?,
            );
        }
    }
    table.print();
    Ok(())
}

/// B12: one and eight flows through TLS against OpenSSH's local forwarding.
fn ssh_forward() -> anyhow::Result<()> {
    let direct = Path::direct()?;
    let Some(server) = ssh::Server::start(free_address()?)? else {
        return Ok(());
    };
    let ssh = server.forward(direct.address)?;
    let tls = Path::tunnel(&direct, Carrier::Tls)?;
    for flows in [1, 8] {
        let title = format!("B12 tunnel with TLS / ssh -L, {flows} flow(s), MB/s (target >= 2)");
        let mut table = Table::new(&title, Value::Ratio(&["ssh -L"]));
        for direction in [Direction::Up, Direction::Down] {
            for _ in 0..rounds() {
                table.add(
                    direction,
                    "ssh -L",
                    load::throughput(ssh.address, direction, flows, 256 * MIB)?,
                );
                table.add(
                    direction,
                    "h2 + TLS",
                    load::throughput(tls.address, direction, flows, 512 * MIB)?,
                );
            }
        }
        table.print();
    }
    let mut table = Table::new(
        "new connection to first echoed byte and 1-byte round trip, us p50",
        Value::Ratio(&["ssh -L"]),
    );
    for _ in 0..rounds() {
        for (name, address) in [("ssh -L", ssh.address), ("h2 + TLS", tls.address)] {
            table.add("connect", name, load::connect_times(address, 300)?.p50_us());
            table.add(
                "round trip",
                name,
                load::round_trips(address, 2000)?.p50_us(),
            );
        }
    }
    table.print();
    Ok(())
}

/// B16: what 64 flows reach together, as a share of what one reaches.
fn streams() -> anyhow::Result<()> {
    let direct = Path::direct()?;
    let tls = Path::tunnel(&direct, Carrier::Tls)?;
    let plain = Path::tunnel(&direct, Carrier::Plain)?;
    for (name, path) in [("h2 plain", &plain), ("h2 + TLS", &tls)] {
        let title = format!("B16 {name}: 64 flows / 1 flow, aggregate MB/s (target >= 0.8)");
        let mut table = Table::new(&title, Value::Ratio(&["1 flow"]));
        for direction in [Direction::Up, Direction::Down] {
            for _ in 0..rounds() {
                table.add(
                    direction,
                    "1 flow",
                    load::throughput(path.address, direction, 1, 768 * MIB)?,
                );
                // What the far peer and the kernel alone make of it: the tunnel has two more such hops.
                for (row, flows) in [("loopback, 1", 1), ("loopback, 64", 64)] {
                    let rate = load::throughput(direct.address, direction, flows, 2048 * MIB)?;
                    table.add(direction, row, rate);
                }
                table.add(
                    direction,
                    "8 flows",
                    load::throughput(path.address, direction, 8, 768 * MIB)?,
                );
                table.add(
                    direction,
                    "64 flows",
                    load::throughput(path.address, direction, 64, 768 * MIB)?,
                );
            }
        }
        table.print();
    }
    Ok(())
}

/// B17: the round trip of a small flow beside one that saturates the tunnel and one whose reader has stopped.
fn stalled() -> anyhow::Result<()> {
    let direct = Path::direct()?;
    let tls = Path::tunnel(&direct, Carrier::Tls)?;
    let mut table = Table::new(
        "B17 1-byte round trip beside a full and a stalled flow, us (target p99 <= 5000)",
        Value::Ratio(&["idle p99"]),
    );
    for direction in [Direction::Up, Direction::Down] {
        for _ in 0..rounds() {
            table.add(
                direction,
                "idle p99",
                load::round_trips(tls.address, 2000)?.p99_us(),
            );
            let stalled = load::Stalled::open(tls.address)?;
            let saturating = load::Saturating::start(tls.address, direction)?;
            std::thread::sleep(Duration::from_millis(300));
            let times = load::round_trips(tls.address, 2000)?;
            table.add(direction, "loaded p50", times.p50_us());
            table.add(direction, "loaded p99", times.p99_us());
            table.add(direction, "full flow MB/s", saturating.stop());
            stalled.still_alive()?;
        }
    }
    table.print();
    Ok(())
}

/// What an idle flow costs in resident memory at each end, all of the process included.
fn idle() -> anyhow::Result<()> {
    const FLOWS: usize = 4000;
    let direct = Path::direct()?;
    let mut table = Table::new(
        "memory of one idle flow among 4,000, bytes (target entry <= 12288, exit <= 20480)",
        Value::Ratio(&["entry"]),
    );
    for _ in 0..3 {
        let tls = Path::tunnel(&direct, Carrier::Tls)?;
        let first = load::idle_flows(tls.address, 100)?;
        let before: Vec<u64> = tls
            .processes
            .iter()
            .map(Running::resident)
            .collect::<Result<_, _>>()?;
        let flows = load::idle_flows(tls.address, FLOWS)?;
        for ((name, process), before) in ["entry", "exit"]
            .into_iter()
            .zip(&tls.processes)
            .zip(before)
        {
            let grown = process.resident()?.saturating_sub(before);
            table.add("idle", name, grown as f64 / FLOWS as f64);
        }
        drop((first, flows));
    }
    table.print();
    Ok(())
}
