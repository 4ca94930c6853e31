//! `impair`: a TCP relay that makes the way between laptop and API server slow, narrow or dead.
//!
//! The kernels that the tests run on have no netem, so delay, rate and cuts are made here. It knows nothing of TLS or
//! Kubernetes. Usage: `impair LISTEN TARGET SEED`; then one command per line on stdin, each answered with `ok` or
//! `error: …`. The end of stdin ends it, so it cannot outlive its test.
//!
//! | command | effect |
//! | --- | --- |
//! | `delay MS [JITTER_MS]` | each direction takes that long |
//! | `rate BYTES_PER_SECOND` | each direction of each connection is that wide; 0 is unlimited |
//! | `cut rst` | every connection is reset now, and new ones at once |
//! | `cut silent` | nothing passes any more, nothing is closed; new connections are accepted and stay mute |
//! | `heal` | ends a cut; what a silent cut held back stays lost, so those connections are reset |
//! | `drop` | resets every connection now; new ones work |

mod link;
mod relay;

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;

use crate::link::Conditions;
use crate::relay::{Cut, Relay};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, target, seed] = arguments.as_slice() else {
        bail!("usage: impair LISTEN TARGET SEED")
    };
    let target: SocketAddr = tokio::net::lookup_host(target)
        .await
        .context("cannot resolve the target")?
        .next()
        .context("no address")?;
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
    say(&format!("listening {}", listener.local_addr()?))?;

    let relay = Relay::new(target, seed.parse().context("the seed is a number")?);
    tokio::select! {
        ended = relay.serve(listener) => ended.context("accepting failed"),
        ended = obey(&relay) => ended,
    }
}

/// Reads commands until stdin ends.
async fn obey(relay: &Relay) -> anyhow::Result<()> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        match apply(relay, &line) {
            Ok(()) => say("ok")?,
            Err(error) => say(&format!("error: {error:#}"))?,
        }
    }
    Ok(())
}

fn apply(relay: &Relay, line: &str) -> anyhow::Result<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["delay", delay] => relay.set(|c| {
            Ok(Conditions {
                delay: millis(delay)?,
                jitter: Duration::ZERO,
                ..c
            })
        }),
        ["delay", delay, jitter] => relay.set(|c| {
            Ok(Conditions {
                delay: millis(delay)?,
                jitter: millis(jitter)?,
                ..c
            })
        }),
        ["rate", rate] => relay.set(|c| {
            Ok(Conditions {
                rate: rate.parse()?,
                ..c
            })
        }),
        ["cut", "rst"] => relay.cut(Some(Cut::Reset)),
        ["cut", "silent"] => relay.cut(Some(Cut::Silent)),
        ["heal"] => relay.cut(None),
        ["drop"] => relay.drop_connections(),
        other => bail!("unknown command {other:?}"),
    }
}

fn millis(text: &str) -> anyhow::Result<Duration> {
    Ok(Duration::from_millis(text.parse().with_context(|| {
        format!("{text:?} is not a number of milliseconds")
    })?))
}

fn say(line: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}
