//! How fast is `tp run`, beside loopback, slirp4netns, pasta, sshuttle and `ssh -L`? (B1 to B3, B5, B6, B8 to B10, B13 to B15)
//!
//! `run [bulk|mtu|connections|latency|memory|tunnel]...` prints the tables of each question (all by default);
//! `BENCH_ROUNDS=3` makes it shorter. It needs root, for namespaces in which the peers find what they expect and for a TUN
//! device, and changes nothing outside of them. `TP_BIN_DIR` is the folder of `tp` and `tp-manager`.
//!
//! The load runs where a program would (`agent`): in the namespace that each tool makes or is given. All of them lead to
//! the same server, whose address is on the loopback of the namespace the tools run in. Rounds of the compared paths
//! take turns, so that a busy machine slows all of them alike.

mod agent;
mod lab;
mod path;

use std::net::SocketAddr;

use anyhow::bail;
use lab::Lab;
use path::{Device, Path};
use tp_benches::load::Direction;
use tp_benches::table::{self, Table, Value};

use crate::agent::Request;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [role, rest @ ..] if role == agent::ROLE => agent::run(rest),
        [role, wanted @ ..] if role == lab::ROLE => inside(wanted),
        wanted => lab::enter(wanted),
    }
}

type Question = fn(&Lab) -> anyhow::Result<()>;

const QUESTIONS: [(&str, Question); 6] = [
    ("bulk", bulk),
    ("mtu", mtu),
    ("connections", connections),
    ("latency", latency),
    ("memory", memory),
    ("tunnel", tunnel),
];

fn inside(wanted: &[String]) -> anyhow::Result<()> {
    let known = |name: &String| QUESTIONS.iter().any(|(question, _)| question == name);
    if let Some(unknown) = wanted.iter().find(|name| !known(name)) {
        bail!("`{unknown}` is not one of the questions");
    }
    let lab = Lab::new()?;
    table::print_machine(&[
        &["slirp4netns", "--version"],
        // pasta of Debian 12 does not know its own version.
        &["dpkg-query", "-W", "-f=passt ${Version}", "passt"],
        &["sshuttle", "--version"],
        &["ssh", "-V"],
    ]);
    for (name, ask) in QUESTIONS {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            ask(&lab)?;
        }
    }
    Ok(())
}

/// Rounds of each measurement.
fn rounds() -> usize {
    const DEFAULT: usize = 5;
    let asked = std::env::var("BENCH_ROUNDS").ok();
    asked
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(DEFAULT)
}

const TUN: &str = "tp, tun";
const VETH: &str = "tp, veth";
const LOOPBACK: &str = "loopback";
const SLIRP: &str = "slirp4netns";
const PASTA: &str = "pasta";

/// The largest MTU, which is what `tp run` uses.
const LARGE: u32 = 65_520;
const ETHERNET: u32 = 1_500;

/// Loopback, the peers, and `tp run` with both devices, to a server outside of the cluster.
fn all(lab: &Lab) -> anyhow::Result<[Path; 5]> {
    Ok([
        Path::direct(lab, LOOPBACK)?,
        Path::slirp4netns(lab, SLIRP, LARGE)?,
        Path::pasta(lab, PASTA, LARGE)?,
        Path::run(lab, TUN, Device::Tun, LARGE)?,
        Path::run(lab, VETH, Device::Veth, LARGE)?,
    ])
}

/// B1, B2, B3, B6.
fn bulk(lab: &Lab) -> anyhow::Result<()> {
    let mut paths = all(lab)?;
    let title = "B1 to B3: namespace to a TCP server outside, MTU 65520, MB/s (targets: loopback >= 0.50 with 1 flow, \
                 >= 0.45 with 8 and 64; slirp4netns >= 3, each >= 2; pasta >= 1.5)";
    let rates = Table::new(title, Value::Ratio(&[LOOPBACK, SLIRP, PASTA]));
    throughputs(&mut paths, &[1, 8, 64], rates)
}

/// B5, and B2 at the small MTU.
fn mtu(lab: &Lab) -> anyhow::Result<()> {
    const SMALL_TUN: &str = "tp, tun, 1500";
    const SMALL_VETH: &str = "tp, veth, 1500";
    let mut paths = [
        Path::slirp4netns(lab, "slirp4netns, 1500", ETHERNET)?,
        Path::run(lab, TUN, Device::Tun, LARGE)?,
        Path::run(lab, SMALL_TUN, Device::Tun, ETHERNET)?,
        Path::run(lab, VETH, Device::Veth, LARGE)?,
        Path::run(lab, SMALL_VETH, Device::Veth, ETHERNET)?,
    ];
    let title = "B5: MTU 1500 with segmentation offload / MTU 65520, MB/s (target >= 0.9)";
    let rates = Table::new(title, Value::Ratio(&[TUN, VETH, "slirp4netns, 1500"]));
    throughputs(&mut paths, &[1, 8], rates)
}

/// Fills and prints a table of rates, and one of what they cost.
fn throughputs(paths: &mut [Path], flows: &[u64], mut rates: Table) -> anyhow::Result<()> {
    let mut costs = Table::new(
        "B6: processor time of the tool in the same rounds, s/GB (target <= 0.20 with 1 flow, <= 0.35 with 64)",
        Value::Plain,
    );
    for &flows in flows {
        for direction in Direction::BOTH {
            let group = format!("{flows} {direction}");
            for _ in 0..rounds() {
                for path in &mut *paths {
                    let moved = told(path.throughput(direction, flows));
                    rates.add(&group, path.name, moved.as_ref().map(|moved| moved.rate));
                    if path.has_tool() {
                        costs.add(&group, path.name, moved.and_then(|moved| moved.cost));
                    }
                }
            }
        }
    }
    rates.print();
    costs.print();
    Ok(())
}

/// A round that failed is missing from the table and the reason is said aloud: peers do fail at times.
fn told<T>(outcome: anyhow::Result<T>) -> Option<T> {
    outcome
        .inspect_err(|error| eprintln!("FAILED {error:#}"))
        .ok()
}

/// B8.
fn connections(lab: &Lab) -> anyhow::Result<()> {
    let mut paths = all(lab)?;
    let mut table = Table::new(
        "B8: connections per second, one byte echoed on each (target: slirp4netns >= 1.0 with 32 at a time)",
        Value::Ratio(&[LOOPBACK, SLIRP, PASTA]),
    );
    connect(&mut paths, &[1, 32], &mut table)?;
    table.print();
    Ok(())
}

fn connect(paths: &mut [Path], at_once: &[u64], table: &mut Table) -> anyhow::Result<()> {
    for &at_once in at_once {
        for _ in 0..rounds() {
            for path in &mut *paths {
                let rate = told(path.connections(at_once));
                table.add(format!("{at_once} at a time"), path.name, rate);
            }
        }
    }
    Ok(())
}

/// B9.
fn latency(lab: &Lab) -> anyhow::Result<()> {
    const TRIPS: usize = 5_000;
    let mut paths = all(lab)?;
    let mut table = Table::new(
        "B9: round trip of one byte, us p50, and what is added to loopback's (target <= 15 us)",
        Value::Difference(LOOPBACK),
    );
    for _ in 0..rounds() {
        for path in &mut paths {
            let time = told(path.ask(&Request::RoundTrips { count: TRIPS }));
            table.add("", path.name, time);
        }
    }
    table.print();
    Ok(())
}

/// B10.
fn memory(lab: &Lab) -> anyhow::Result<()> {
    const ROUNDS: usize = 2;
    let mut table = Table::new(
        "B10: resident memory of the tool for each flow that has carried a byte and is idle, bytes (target <= 8192)",
        Value::Plain,
    );
    for flows in [1_000, 10_000] {
        for _ in 0..ROUNDS {
            for (name, device) in [(TUN, Device::Tun), (VETH, Device::Veth)] {
                let path = Path::run(lab, name, device, LARGE)?;
                let memory = told(path.idle_memory(flows));
                table.add(format!("{flows} flows"), name, memory);
            }
            let path = Path::slirp4netns(lab, SLIRP, LARGE)?;
            let memory = told(path.idle_memory(flows));
            table.add(format!("{flows} flows"), SLIRP, memory);
        }
    }
    table.print();
    Ok(())
}

/// B13, B14, B15.
fn tunnel(lab: &Lab) -> anyhow::Result<()> {
    const SSHUTTLE: &str = "sshuttle";
    const SSH: &str = "ssh -L";
    let direct = Path::direct(lab, LOOPBACK)?;
    let ssh = Path::ssh(lab, SSH)?;
    let tun = Path::through_manager(lab, TUN, Device::Tun)?;
    let veth = Path::through_manager(lab, VETH, Device::Veth)?;
    let mut paths: Vec<Path> = [direct].into_iter().chain(ssh).chain([tun, veth]).collect();
    let mut table = Table::new(
        "B15: connections per second through the tunnel (target: ssh -L >= 1.5)",
        Value::Ratio(&[LOOPBACK, SSH]),
    );
    connect(&mut paths, &[32], &mut table)?;
    table.print();
    paths.extend(Path::sshuttle(lab, SSHUTTLE)?);
    let title = "B13, B14: namespace, HTTP/2, TLS, manager, TCP server, MB/s (targets: sshuttle >= 20; loopback >= 0.14 \
                 with 1 flow)";
    let rates = Table::new(title, Value::Ratio(&[LOOPBACK, SSH, SSHUTTLE]));
    throughputs(&mut paths, &[1, 8], rates)
}

/// Where the server is: an address that is nobody's (RFC 5737).
const SERVER: SocketAddr = SocketAddr::new(
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1)),
    7000,
);
