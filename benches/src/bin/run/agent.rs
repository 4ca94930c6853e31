//! The load generator, in the place of a user's program: it takes requests as lines on its standard input and answers
//! each with a line, a number or what went wrong.

use std::fmt;
use std::io::{self, BufRead as _};
use std::net::SocketAddr;
use std::str::FromStr;

use anyhow::Context;
use tp_benches::load::{self, Direction};

/// First argument of this program in this role; the second is the server's address.
pub(crate) const ROLE: &str = "agent";

/// What to do next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    /// Connect once; answers 0.
    Reach,
    /// Answers MB/s.
    Throughput {
        direction: Direction,
        flows: u64,
        total: u64,
    },
    /// Answers connections per second.
    Connections { at_once: u64, count: u64 },
    /// Answers microseconds, the median.
    RoundTrips { count: usize },
    /// Opens flows and keeps them, idle; answers their number.
    Idle { flows: usize },
}

pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let address: SocketAddr = arguments.first().context("no address")?.parse()?;
    let mut kept = Vec::new();
    for line in io::stdin().lock().lines() {
        let request = line?.parse::<Request>()?;
        match serve(address, request, &mut kept) {
            Ok(number) => answer(&number.to_string()),
            Err(error) => answer(&format!("error: {error}")),
        }
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the bench reads it")]
fn answer(line: &str) {
    println!("{line}");
}

fn serve(
    address: SocketAddr,
    request: Request,
    kept: &mut Vec<std::net::TcpStream>,
) -> io::Result<f64> {
    match request {
        Request::Reach => load::connections(address, 1, 1).map(|_| 0.0),
        Request::Throughput {
            direction,
            flows,
            total,
        } => load::throughput(address, direction, flows, total),
        Request::Connections { at_once, count } => load::connections(address, at_once, count),
        Request::RoundTrips { count } => {
            load::round_trips(address, count).map(|times| times.p50_us())
        }
        Request::Idle { flows } => {
            kept.extend(load::idle_flows(address, flows)?);
            Ok(kept.len() as f64)
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reach => f.write_str("reach"),
            Self::Throughput {
                direction,
                flows,
                total,
            } => write!(f, "throughput {direction} {flows} {total}"),
            Self::Connections { at_once, count } => write!(f, "connections {at_once} {count}"),
            Self::RoundTrips { count } => write!(f, "round-trips {count}"),
            Self::Idle { flows } => write!(f, "idle {flows}"),
        }
    }
}

impl FromStr for Request {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> anyhow::Result<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        Ok(match words[..] {
            ["reach"] => Self::Reach,
            ["throughput", direction, flows, total] => Self::Throughput {
                direction: direction.parse()?,
                flows: flows.parse()?,
                total: total.parse()?,
            },
            ["connections", at_once, count] => Self::Connections {
                at_once: at_once.parse()?,
                count: count.parse()?,
            },
            ["round-trips", count] => Self::RoundTrips {
                count: count.parse()?,
            },
            ["idle", flows] => Self::Idle {
                flows: flows.parse()?,
            },
            _ => anyhow::bail!("not a request: {line}"),
        })
    }
}
