//! Many flows: at once, idle, or one after the other. Every byte of every flow is compared.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::pattern::Pattern;
use crate::{say, socks};

/// New flows that are opened at the same time; the rest wait their turn. It keeps the listen queue short.
const OPENING: usize = 64;

/// Opens `count` flows to an echo server, moves `bytes` through each, and says so. With `hold` they stay open until
/// stdin ends, and then each must still echo.
pub(crate) async fn many(
    proxy: &str,
    host: &str,
    port: u16,
    count: usize,
    bytes: usize,
    hold: bool,
) -> anyhow::Result<()> {
    let (start, mut streams, mut errors) = (Instant::now(), Vec::new(), Vec::new());
    let (mut opening, mut next) = (JoinSet::new(), 0);
    while next < count || !opening.is_empty() {
        while next < count && opening.len() < OPENING {
            opening.spawn(open(
                proxy.to_owned(),
                host.to_owned(),
                port,
                next as u64,
                bytes,
            ));
            next += 1;
        }
        match opening.join_next().await {
            Some(Ok(Ok(stream))) => streams.push(stream),
            Some(Ok(Err(error))) => errors.push(format!("{error:#}")),
            Some(Err(panic)) => errors.push(panic.to_string()),
            None => break,
        }
    }
    let open_ms = u64::try_from(start.elapsed().as_millis())?;
    let open = streams.len();
    if hold {
        say(
            &json!({ "open": open, "failed": errors.len(), "errors": sample(&errors), "ms": open_ms }),
        );
        let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
    }
    let (start, mut checks, mut alive) = (Instant::now(), JoinSet::new(), 0);
    for (seed, mut stream) in streams.into_iter().enumerate() {
        checks.spawn(async move { check_and_end(&mut stream, seed as u64, bytes.min(4096)).await });
    }
    while let Some(ended) = checks.join_next().await {
        match ended? {
            Ok(()) => alive += 1,
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    let check_ms = u64::try_from(start.elapsed().as_millis())?;
    say(&json!({
        "open": open, "alive": alive, "failed": errors.len(), "errors": sample(&errors),
        "open_ms": open_ms, "check_ms": check_ms,
    }));
    ensure!(
        errors.is_empty(),
        "{} of {count} flows failed",
        errors.len()
    );
    Ok(())
}

/// Opens, echoes and closes `count` connections in `at_once` lanes.
pub(crate) async fn short(
    proxy: &str,
    host: &str,
    port: u16,
    count: usize,
    at_once: usize,
) -> anyhow::Result<()> {
    let (start, mut lanes) = (Instant::now(), JoinSet::new());
    for lane in 0..at_once {
        let (proxy, host) = (proxy.to_owned(), host.to_owned());
        let share = count / at_once + usize::from(lane < count % at_once);
        lanes.spawn(async move {
            let (mut done, mut errors) = (0_usize, Vec::new());
            for i in 0..share {
                let seed = (lane * count + i) as u64;
                let result = async {
                    let mut stream = open(proxy.clone(), host.clone(), port, seed, 64).await?;
                    check_and_end(&mut stream, seed, 64).await
                };
                match result.await {
                    Ok(()) => done += 1,
                    Err(error) => errors.push(format!("{error:#}")),
                }
            }
            (done, errors)
        });
    }
    let (mut done, mut errors) = (0, Vec::new());
    while let Some(lane) = lanes.join_next().await {
        let (lane_done, lane_errors) = lane?;
        done += lane_done;
        errors.extend(lane_errors);
    }
    let ms = u64::try_from(start.elapsed().as_millis())?;
    say(&json!({ "done": done, "failed": errors.len(), "errors": sample(&errors), "ms": ms }));
    ensure!(
        errors.is_empty(),
        "{} of {count} connections failed",
        errors.len()
    );
    Ok(())
}

async fn open(
    proxy: String,
    host: String,
    port: u16,
    seed: u64,
    bytes: usize,
) -> anyhow::Result<TcpStream> {
    let mut stream = timed("connect", socks::connect(&proxy, &host, port)).await?;
    exchange(&mut stream, seed, bytes).await?;
    Ok(stream)
}

/// A last exchange, then FIN both ways.
async fn check_and_end(stream: &mut TcpStream, seed: u64, bytes: usize) -> anyhow::Result<()> {
    exchange(stream, seed.wrapping_add(1 << 40), bytes).await?;
    stream.shutdown().await?;
    let rest = timed("FIN", async { Ok(stream.read(&mut [0]).await?) }).await?;
    ensure!(rest == 0, "bytes after the echo");
    Ok(())
}

async fn exchange(stream: &mut TcpStream, seed: u64, bytes: usize) -> anyhow::Result<()> {
    let sent = Pattern::bytes(seed, bytes);
    let (mut read, mut write) = stream.split();
    let mut received = vec![0; bytes];
    timed("echo", async {
        tokio::try_join!(write.write_all(&sent), read.read_exact(&mut received))?;
        Ok(())
    })
    .await?;
    ensure!(received == sent, "flow {seed}: other bytes than those sent");
    Ok(())
}

async fn timed<T>(what: &str, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    match tokio::time::timeout(Duration::from_secs(60), work).await {
        Ok(result) => result,
        Err(_) => anyhow::bail!("{what} took more than 60 s"),
    }
}

/// A few errors tell as much as all of them.
fn sample(errors: &[String]) -> &[String] {
    &errors[..errors.len().min(5)]
}
